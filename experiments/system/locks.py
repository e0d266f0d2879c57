"""Who works on a folder: one process at most, on this machine or on any that shares the folder.

A lease of `filelock`: a file that its holder touches every `BEAT_S` seconds. That of a process of
this machine is free the moment the process dies; that of another machine after it was not touched
for `LEASE_S` seconds of watching, by the watcher's stopwatch, so that no clock matters. Machines
are told apart by their host names.

Two things are done here because `filelock` does not. It takes a dead holder's file over only where
the file system can exchange two names, which NFS cannot: there we remove the file, under a lock.
And it watches within one attempt; we remember what we saw, so that nobody waits for long.
"""

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, LeaseCompromise, OwnerRecord, SoftFileLease, Timeout
from filelock._identity import host_name, owner_is_stale  # as it judges who is dead, so do we

BEAT_S = 2.0
LEASE_S = 100.0  # NFS may show a time that is a minute old

# what we saw of a lease's file, and when we saw that first, by our stopwatch
_seen: dict[Path, tuple[tuple[int, int], float]] = {}


class RunLocked(ValueError):
    """Another process holds the run."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease."""

    host: str
    pid: int

    def __str__(self) -> str:
        return f"{self.host.partition('?')[0]}, process {self.pid}"  # without its namespace


def lease(file: Path, on_loss: Callable[[LeaseCompromise], None] | None = None) -> SoftFileLease:
    """The lease that a file stands for, not held yet."""
    return SoftFileLease(
        file,
        lease_duration=LEASE_S,
        heartbeat_interval=BEAT_S,
        on_compromise=on_loss,
        thread_local=False,
    )


def leave(loss: LeaseCompromise) -> None:
    """End this process: another may be at it by now, so nothing more may be saved."""
    if not Path(loss.lock_file).parent.is_dir():  # removed or renamed; nobody else is at it
        return
    why = "could not be renewed" if loss.error else "was taken over by another process, or removed"
    print(f"error: {loss.lock_file} {why}: nothing more is saved", file=sys.stderr, flush=True)
    os._exit(1)


@contextmanager
def holding(file: Path, wait: bool = False, working: bool = False) -> Iterator[None]:
    """Hold a lease within the context.

    Args:
        file: what stands for it, in the folder that is worked on.
        wait: watch the lease of another machine until it is seen to be alive or dead.
        working: end this process at once if it slept so long that another took the lease over.

    Raises:
        RunLocked: if another process holds it.
    """
    ours = lease(file, leave if working else None)
    first = sight(file)
    while not taken(ours):
        seen = sight(file)
        if seen is None:
            continue
        owner = ours.owner
        if dead(owner) or unchanged_s(file, seen) >= LEASE_S:
            remove_dead(file, seen)
            continue
        away = owner is None or owner.hostname != host_name()
        if seen != first or not (wait and away):
            by = f" ({Holder(owner.hostname, owner.pid)})" if owner else ""
            raise RunLocked(f"another process is at {file.parent}{by}")
        time.sleep(min(1.0, BEAT_S))
    try:
        with checked_when_resumed(ours) if working else nullcontext():
            yield
    finally:
        ours.release()


def taken(some: SoftFileLease) -> bool:
    """Try to take a lease; True if it is ours now."""
    try:
        some.acquire(timeout=0.2, poll_interval=0.02)
    except Timeout:
        return False
    except OSError as error:  # a full disk, for one
        raise OSError(error.errno, error.strerror, some.lock_file) from None
    return True


@contextmanager
def checked_when_resumed(some: SoftFileLease) -> Iterator[None]:
    """Within it, a process that was suspended looks first whether it still has its lease."""

    process = os.getpid()

    def look(*_: object) -> None:
        if os.getpid() == process and not some.is_lock_held_by_us:  # not in a forked data loader
            leave(LeaseCompromise(some.lock_file, some.token or "", "owner-changed"))

    if threading.current_thread() is not threading.main_thread():  # Python allows no handlers
        yield
        return
    previous = signal.signal(signal.SIGCONT, look)
    try:
        yield
    finally:
        signal.signal(signal.SIGCONT, previous)


def sight(file: Path) -> tuple[int, int] | None:
    """When a lease was renewed last, by its file server's clock in ns, and which file it is."""
    try:
        with open(file, "rb") as opened:  # a file server is asked then, instead of a cache
            found = os.fstat(opened.fileno())
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_ino


def unchanged_s(file: Path, seen: tuple[int, int]) -> float:
    """For how long we have seen a lease as it is."""
    now = time.monotonic()
    if _seen.get(file, (None, 0.0))[0] != seen:
        _seen[file] = (seen, now)
    return now - _seen[file][1]


def dead(owner: OwnerRecord | None) -> bool:
    """True if the process that a lease names was one of this machine, and has ended."""
    return owner is not None and owner_is_stale(owner.pid, owner.hostname, owner.start)


def remove_dead(file: Path, seen: tuple[int, int]) -> None:
    """Remove a dead holder's lease, unless somebody else has done so meanwhile."""
    with FileLock(f"{file}.takeover"):
        if sight(file) == seen:
            file.unlink(missing_ok=True)


def holder(file: Path) -> Holder | None:
    """Who holds a lease, as far as one look can tell; nothing is disturbed."""
    owner, seen = lease(file).owner, sight(file)
    if owner is None or seen is None or dead(owner) or unchanged_s(file, seen) >= LEASE_S:
        return None
    age_s = abs(server_time(file.parent) - seen[0] / 1e9)
    return Holder(owner.hostname, owner.pid) if age_s < LEASE_S else None


def server_time(folder: Path) -> float:
    """What time it is for the files of a folder: by its server's clock, if we may write there."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()
