"""A stand-in for ``experiments.fit`` that trains nothing: it locks the run, counts, ends.

``FAKE_LOG`` is a file that gets a line at each start and end; ``FAKE_DEEDS`` is JSON that tells by
run name what happens: a number is seconds of work, else fail, bad, kill (itself), late (itself,
when all is done), exit, remove (its own folder), linger (until there is a file ``end``), or deaf
(works for a minute and heeds no signal).
"""

import fcntl
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from experiments.runs.run_dir import RunDir
from experiments.system.locks import RunLocked
from experiments.system.signals import BUSY, die_with_parent

stopped: list[int] = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda n, frame: stopped.append(n))


def log(event: str, folder: Path) -> None:
    with open(os.environ["FAKE_LOG"], "a") as file:
        file.write(f"{event} {folder.parent.name}/{folder.name} {os.getpid()}\n")


def main() -> int:
    folder = Path(sys.argv[1])
    die_with_parent()
    try:
        with RunDir(folder).lock():
            return work(folder)
    except RunLocked:
        return BUSY


def work(folder: Path) -> int:
    with open(folder / "busy", "ab") as busy:
        log("start", folder)
        try:
            fcntl.flock(busy, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a killed one holds it no more
        except BlockingIOError:
            log("twice", folder)
        deeds = json.loads(os.environ.get("FAKE_DEEDS", "{}"))
        deed = next((d for part, d in deeds.items() if part in str(folder)), deeds.get("", 0))
        print(f"working on {folder.name}", file=sys.stderr, flush=True)
        if deed == "fail":
            (folder / "error.txt").write_text("it went wrong\n\nTraceback ...\n")
            return 1
        if deed == "bad":
            (folder / "error.txt").write_text("bad input\n\nTraceback ...\n")
            return 2
        if deed == "remove":
            shutil.rmtree(folder)
            return 1
        if deed == "exit":
            return 3
        if deed == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        (folder / "manifest.json").write_text("{}")
        while deed == "linger" and not (folder / "end").exists():
            time.sleep(0.01)
        end = time.monotonic() + {"deaf": 60, "late": 0, "linger": 0}.get(deed, deed)
        while time.monotonic() < end and (deed == "deaf" or not stopped):
            time.sleep(0.01)
        if stopped:
            log("stopped", folder)
            return 75 if stopped[0] in (signal.SIGUSR1, signal.SIGUSR2) else 128 + stopped[0]
        temporary = folder / ".result"
        temporary.write_text("{}")
        temporary.rename(folder / "result.json")
        if deed == "late":
            os.kill(os.getpid(), signal.SIGKILL)
        log("done", folder)
        return 0


if __name__ == "__main__":
    sys.exit(main())
