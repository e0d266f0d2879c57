"""Who trains a run: one process at most, on this machine or on any that shares the folder.

On one machine a lock of the operating system on ``.lock`` decides; it is free the moment its holder
dies. Other machines may not see it, so a claim is also a numbered file, ``.claim.1``, ``.claim.2``,
... of which the newest counts: created exclusively, touched every `BEAT_S` seconds by its holder,
never reused. A claim of another machine is dead when it was not touched during `DEAD_S` seconds of
watching by a stopwatch; what time a clock shows, here or on the file server, never matters.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import platform
import signal
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

BEAT_S = 10.0
DEAD_S = 100.0  # NFS may show a time that is a minute old
INHERITED = "RWKV_PARITY_CLAIM"  # number, file descriptor and giver of a claim handed to a child

# claims of other machines: when we first saw the newest one as it is, by the stopwatch
_watched: dict[Path, tuple[tuple[int, int], float]] = {}


class RunLocked(ValueError):
    """Another process is training the run."""


@dataclass(frozen=True)
class Holder:
    """Who holds a claim, as the claim's file says."""

    number: int
    touched_ns: int
    host: str = "?"
    machine: str = ""
    pid: int = 0
    since: str = "?"
    released: bool = False

    def __str__(self) -> str:
        return f"{self.host}, process {self.pid}, since {self.since}"


def this_machine() -> str:
    """A name of this machine that no other has, the same for all processes."""
    number = uuid.getnode()
    if number >> 40 & 1 and (boot := Path("/proc/sys/kernel/random/boot_id")).is_file():
        return f"{platform.node()}/{boot.read_text().strip()}"  # no network: it was made up
    return f"{platform.node()}/{number:012x}"


def newest(folder: Path) -> Holder | None:
    """The newest claim of a folder, or None if there never was one."""
    numbers = [
        int(name.removeprefix(".claim."))
        for name in os.listdir(folder)
        if name.startswith(".claim.") and name.removeprefix(".claim.").isdigit()
    ]
    if not numbers:
        return None
    try:
        # opened, for a file server is then asked instead of a cache
        with open(folder / f".claim.{max(numbers)}", encoding="utf-8", errors="replace") as file:
            touched, text = os.fstat(file.fileno()).st_mtime_ns, file.read()
    except FileNotFoundError:  # a newer one has come
        return newest(folder)
    try:
        return Holder(max(numbers), touched, **json.loads(text))
    except (ValueError, TypeError):  # cut or damaged: nobody we know
        return Holder(max(numbers), touched)


def holder(folder: Path) -> Holder | None:
    """Who holds the claim of a folder, as far as one look can tell, without disturbing anything."""
    last = newest(folder)
    if last is None or last.released:
        return None
    if last.machine != this_machine():
        return last if abs(file_time(folder) - last.touched_ns / 1e9) < DEAD_S else None
    try:
        with open(folder / ".lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return last
    except OSError:
        return None
    return None


def file_time(folder: Path) -> float:
    """What time it is for the files of a folder: by its server's clock, if we may write there."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


class Claim:
    """A held claim. A thread keeps it alive; as a context manager it is released at the end."""

    def __init__(self, folder: Path, number: int, lock: int | None, training: bool = True) -> None:
        self.folder, self.number, self.lock = folder, number, lock
        self.training = training  # in this process; a launcher's is in another
        self._ended = threading.Event()
        threading.Thread(target=self._beat, name=f"claim {folder.name}", daemon=True).start()

    @property
    def path(self) -> Path:
        return self.folder / f".claim.{self.number}"

    @classmethod
    def take(cls, folder: Path, wait: bool = False, training: bool = True) -> "Claim":
        """Claim a run.

        Args:
            wait: where another machine's claim may be dead, watch it until that is known.
            training: this process trains; one that finds its claim taken over then ends at once.

        Raises:
            RunLocked: if another process holds it.
        """
        lock = take_lock(folder / ".lock")
        try:
            last = free_claim(folder, lock is not None, wait)
            number = 1 if last is None else last.number + 1
            describe(folder / f".claim.{number}", new=True)
            if (winner := newest(folder)) is None or winner.number != number:
                (folder / f".claim.{number}").unlink(missing_ok=True)
                raise RunLocked(busy(folder, winner))
            for older in folder.glob(".claim.*"):
                if older.suffix[1:].isdigit() and int(older.suffix[1:]) < number:
                    older.unlink(missing_ok=True)
        except FileExistsError:
            close(lock)
            raise RunLocked(busy(folder, newest(folder))) from None
        except BaseException:
            close(lock)
            raise
        return cls(folder, number, lock, training)

    @classmethod
    def inherited(cls, folder: Path) -> "Claim | None":
        """The claim that the process which started this one took for it, or None.

        From here on it is this process's; if the giver dies, this process gets SIGTERM.
        """
        given = os.environ.pop(INHERITED, "")
        if not given:
            return None
        number, lock, giver = (int(part) for part in given.split(":"))
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG
        if os.getppid() != giver:
            sys.exit(128 + signal.SIGTERM)
        if lock >= 0:
            os.set_inheritable(lock, False)
        describe(folder / f".claim.{number}")
        return cls(folder, number, lock if lock >= 0 else None)

    def environment(self) -> dict[str, str]:
        """What a child finds its claim by; the lock's file descriptor must be passed on too."""
        lock = -1 if self.lock is None else self.lock
        return {INHERITED: f"{self.number}:{lock}:{os.getpid()}"}

    def close_lock(self) -> None:
        """Leave the lock to the child that inherited it: it is free when that one dies."""
        close(self.lock)
        self.lock = None

    def retake(self) -> bool:
        """Hold the lock again that a child has let go by its end; False if others were quicker."""
        for _ in range(100):
            locked = True
            try:
                self.lock = take_lock(self.folder / ".lock")
            except RunLocked:
                locked = False
            last = newest(self.folder)
            if last is None or last.number != self.number:
                return False
            if locked:
                break
            time.sleep(0.01)  # somebody who is about to claim it, or what the child left
        return True

    def release(self) -> None:
        """Let go. The file stays, so that its number is not given again."""
        self._ended.set()
        with contextlib.suppress(FileNotFoundError):  # the folder was removed, or it is lost
            last = newest(self.folder)
            if last is not None and last.number == self.number:
                describe(self.path, released=True)
        self.close_lock()

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                last = newest(self.folder)
                if last is None or last.number == self.number:
                    os.utime(self.path)
                    continue
            except OSError:  # a file server that is away, a folder that was removed
                continue
            if self._ended.is_set() or not self.training:
                return
            # we slept so long that another machine goes on with the run: nothing more may be saved
            print(f"error: {self.folder} was taken over by {last}", file=sys.stderr, flush=True)
            os._exit(1)


def take_lock(path: Path) -> int | None:
    """The file descriptor of a lock on a file, or None where the file system has no locks.

    Raises:
        RunLocked: if another process holds it.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    for attempt in range(5):  # one that only looks holds it for a moment
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if attempt == 4:
                os.close(file)
                raise RunLocked(busy(path.parent, newest(path.parent))) from None
            time.sleep(0.01)
        except OSError:
            break
    os.close(file)
    return None


def close(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def busy(folder: Path, who: Holder | None) -> str:
    return f"another process is training {folder}" + (f" ({who})" if who else "")


def free_claim(folder: Path, locked: bool, wait: bool) -> Holder | None:
    """The newest claim of a folder, released or of a dead holder; None if there never was one.

    Args:
        locked: we hold this machine's lock, so no claim of this machine is alive.
        wait: go on watching another machine's until it is seen to be alive or dead.

    Raises:
        RunLocked: if it may be alive.
    """
    while True:
        last = newest(folder)
        if last is None or last.released or (locked and last.machine == this_machine()):
            return last
        sight = (last.number, last.touched_ns)
        first = _watched.get(folder)
        moves = first is not None and first[0] != sight
        if first is None or moves:
            _watched[folder] = first = (sight, time.monotonic())
        if time.monotonic() - first[1] > DEAD_S:
            return last
        if moves or not wait:
            raise RunLocked(busy(folder, last))
        time.sleep(min(1.0, BEAT_S))


def describe(path: Path, new: bool = False, released: bool = False) -> None:
    """Write into a claim who holds it; a new one must not exist yet."""
    content = {
        "host": platform.node(),
        "machine": this_machine(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "released": released,
    }
    flags = os.O_WRONLY | (os.O_CREAT | os.O_EXCL if new else os.O_TRUNC)
    file = os.open(path, flags, 0o666)
    try:
        os.write(file, json.dumps(content).encode())
    except OSError as error:
        if new:
            path.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(file)
