"""``experiments.fit``, with a line in the file ``FAKE_LOG`` at each start and each end."""

import os
import sys
from pathlib import Path

folder = Path(sys.argv[1])


def log(event: str) -> None:
    with open(os.environ["FAKE_LOG"], "a") as file:
        file.write(f"{event} {folder.parent.name}/{folder.name} {os.getpid()}\n")


busy = folder / "busy"
if busy.exists() and Path(f"/proc/{busy.read_text()}").exists():
    log("twice")
busy.write_text(str(os.getpid()))
log("start")
if (folder / "result.json").exists():
    log("again")

from experiments import fit  # noqa: E402  # seconds later

fit.main()
busy.unlink()
log("done")
