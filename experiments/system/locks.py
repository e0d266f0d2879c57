"""Who works on a folder: one process at most, on this machine or on any that shares the folder.

A lease of `filelock`: a file that its holder touches every `BEAT_S` seconds. That of a process of
this machine is free the moment the process dies; that of another machine after it was not touched
for `LEASE_S` seconds of watching, by the watcher's stopwatch, so that no clock matters.
"""

import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import SoftFileLease, Timeout

BEAT_S = 5.0
LEASE_S = 100.0  # NFS may show a time that is a minute old


class RunLocked(ValueError):
    """Another process holds the run."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease."""

    host: str
    pid: int

    def __str__(self) -> str:
        return f"{self.host}, process {self.pid}"


def lease(file: Path) -> SoftFileLease:
    """The lease that a file stands for, not held yet; its holder ends at once if it is lost."""
    return SoftFileLease(
        file,
        lease_duration=LEASE_S,
        heartbeat_interval=BEAT_S,
        on_compromise=leave,
        thread_local=False,
    )


def leave(loss: Any) -> None:
    """End this process: it slept so long that another took over, so nothing more may be saved."""
    if loss.reason == "marker-missing":  # somebody removed the folder; nobody else is at it
        return
    print(f"error: {loss.lock_file} was taken over by another process", file=sys.stderr, flush=True)
    os._exit(1)


@contextmanager
def holding(file: Path, wait: bool = False) -> Iterator[None]:
    """Hold a lease within the context.

    Args:
        file: what stands for it, in the folder that is worked on.
        wait: watch the lease of another machine until it is seen to be alive or dead.

    Raises:
        RunLocked: if another process holds it.
    """
    ours = lease(file)
    start, first = time.monotonic(), touched(file)
    while True:
        try:
            ours.acquire(timeout=0.2, poll_interval=0.02)
            break
        except Timeout:
            who = holder(file)
            away = wait and who is not None and who.host != platform.node()
            if not away or touched(file) != first or time.monotonic() - start > 2 * LEASE_S:
                by = f" ({who})" if who else ""
                raise RunLocked(f"another process is at {file.parent}{by}") from None
            time.sleep(1)
    try:
        yield
    finally:
        ours.release()


def touched(file: Path) -> int | None:
    """When a lease was renewed last, by its file server's clock, in ns."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def holder(file: Path) -> Holder | None:
    """Who holds a lease, as far as one look can tell; nothing is disturbed."""
    owner, renewed = lease(file).owner, touched(file)
    if owner is None or renewed is None:
        return None
    host = owner.hostname.partition("?")[0]  # filelock adds a container's namespace
    if host == platform.node():
        alive = psutil.pid_exists(owner.pid)
    else:
        alive = abs(server_time(file.parent) - renewed / 1e9) < LEASE_S
    return Holder(host, owner.pid) if alive else None


def server_time(folder: Path) -> float:
    """What time it is for the files of a folder: by its server's clock, if we may write there."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()
