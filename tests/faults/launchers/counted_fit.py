"""``experiments.fit``, with a line in the file ``FAKE_LOG`` at each start and each end."""

import fcntl
import os
import sys
from pathlib import Path

from experiments.system.locks import Claim

folder = Path(sys.argv[1])


def log(event: str) -> None:
    with open(os.environ["FAKE_LOG"], "a") as file:
        file.write(f"{event} {folder.parent.name}/{folder.name} {os.getpid()}\n")


busy = open(folder / "busy", "ab")  # noqa: SIM115  # to the end of the claim
release = Claim.release


def release_both(claim: Claim) -> None:
    busy.close()  # first: from the release on another may train, while we are still leaving
    release(claim)


setattr(Claim, "release", release_both)  # noqa: B010  # mypy allows no assignment to a method
try:
    fcntl.flock(busy, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a killed one holds it no more
except BlockingIOError:
    log("twice")
log("start")
if (folder / "result.json").exists():
    log("again")

from experiments import fit  # noqa: E402

fit.main()
log("done")
