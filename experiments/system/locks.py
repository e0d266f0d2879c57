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
            owner = named(ours)
            away = owner is not None and owner.host != platform.node()
            watched_s = time.monotonic() - start
            if not (wait and away) or touched(file) != first or watched_s > 2 * LEASE_S:
                by = f" ({owner})" if owner else ""
                raise RunLocked(f"another process is at {file.parent}{by}") from None
            time.sleep(1)
        except OSError as error:  # a full disk, for one
            raise OSError(error.errno, error.strerror, str(file)) from None
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
    owner, renewed = named(lease(file)), touched(file)
    if owner is None or renewed is None:
        return None
    if owner.host == platform.node():
        alive = psutil.pid_exists(owner.pid)
    else:
        alive = abs(server_time(file.parent) - renewed / 1e9) < LEASE_S
    return owner if alive else None


def named(some: SoftFileLease) -> Holder | None:
    """Whom a lease's file names, dead or alive; None if there is none."""
    owner = some.owner  # filelock adds the namespace of a container to the name of its host
    return None if owner is None else Holder(owner.hostname.partition("?")[0], owner.pid)


def server_time(folder: Path) -> float:
    """What time it is for the files of a folder: by its server's clock, if we may write there."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()
