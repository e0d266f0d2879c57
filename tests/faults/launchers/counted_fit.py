"""``experiments.fit``, with a line in the file ``FAKE_LOG`` at each start and each end."""

import fcntl
import os
import sys
from pathlib import Path

from experiments import fit
from experiments.runs.run_dir import RunDir
from experiments.training import fit as training

folder = Path(sys.argv[1])
attempt = training.attempt_locked


def log(event: str) -> None:
    with open(os.environ["FAKE_LOG"], "a") as file:
        file.write(f"{event} {folder.parent.name}/{folder.name} {os.getpid()}\n")


def counted(run: RunDir) -> None:
    """Train; a second process that trains the same run at the same time is logged."""
    with open(folder / "busy", "ab") as busy:
        try:
            fcntl.flock(busy, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a killed one holds it no more
        except BlockingIOError:
            log("twice")
        log("start")
        if run.finished:
            log("again")
        attempt(run)


training.attempt_locked = counted
fit.main()
log("done")
