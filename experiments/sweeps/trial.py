"""One cell of a sweep: a frozen run, trained to its end by a process of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from experiments.config.entry import one_line
from experiments.runs.run_dir import RunDir
from experiments.system.files import write_text
from experiments.system.locks import Claim, RunLocked
from experiments.system.signals import ASK_REQUEUE, REQUEUE

COMMAND = [sys.executable, "-m", "experiments.fit"]
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class Outcome:
    """How one cell of a sweep ended."""

    run: str
    # done, skipped (finished before), other (done by another launch), failed, interrupted,
    # requeue, elsewhere, waiting
    status: str
    detail: str = ""
    exit_code: int = 0


def train_cell(run: RunDir) -> Outcome:
    """Train a frozen run to its end in a fresh process, which is told of signals that we get.

    The outcome is `elsewhere` if another process holds the run, and `requeue` (exit code 75) if it
    was stopped by SIGUSR1 or SIGUSR2, saved, and wants to be started again.
    """
    if run.finished:
        return Outcome(str(run.path), "skipped")
    try:
        claim = run.claim(training=False)
    except RunLocked as error:
        return Outcome(str(run.path), "elsewhere", str(error))
    except (OSError, ValueError) as error:  # ValueError: a link out of the directory
        return Outcome(str(run.path), "failed", one_line(error), 1)
    with Stops() as stops:
        child = Child(run, claim)
        stops.add(child)
        return child.outcome(child.process.wait())


class Child:
    """The process that trains a claimed run.

    Args:
        run: the frozen run.
        claim: the launcher's claim on it; handed to the child.
        environment: what the child's environment has beyond ours.
        log: True if its output goes into the run's ``log.txt``, not to our own.
    """

    def __init__(
        self,
        run: RunDir,
        claim: Claim,
        environment: dict[str, str] | None = None,
        log: bool = False,
    ) -> None:
        self.run, self.claim = run, claim
        (run.path / "error.txt").unlink(missing_ok=True)  # of the attempt before
        output = open(run.path / "log.txt", "ab") if log else None  # noqa: SIM115
        try:
            self.process = subprocess.Popen(
                [*COMMAND, str(run.path)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **(environment or {}), **claim.environment()},
                pass_fds=() if claim.lock is None else (claim.lock,),
                process_group=0,  # a terminal's Ctrl-C reaches it through us alone, and once
            )
        except BaseException:
            claim.release()
            raise
        finally:
            if output is not None:
                output.close()
        claim.close_lock()

    def outcome(self, code: int) -> Outcome:
        """What the ended process came to; its claim is released."""
        if code < 0:  # its own processes, data loaders and ranks, must not outlive it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        try:  # while we hold it: who claims it next must see the error, and no later one
            gone = self.run.finished or not self.run.path.is_dir()
            if not gone and not self.claim.retake():
                return Outcome(str(self.run.path), "elsewhere", "another process goes on with it")
            return judge(self.run, code)
        except (OSError, ValueError, KeyError) as error:  # somebody removed or damaged its files
            return Outcome(str(self.run.path), "failed", one_line(error), 1)
        finally:
            self.claim.release()


def judge(run: RunDir, code: int) -> Outcome:
    """What a process with this exit code has made of a run; a reason it left none for is written.

    Raises:
        ValueError, OSError: if files of the run are damaged or gone.
    """
    path, error_file = str(run.path), run.path / "error.txt"
    if run.finished:  # whatever hit the process afterwards
        return Outcome(path, "done", run.summary())
    if code in (REQUEUE, *(-number for number in ASK_REQUEUE)):
        return Outcome(path, "requeue", "stopped; the same command goes on", REQUEUE)
    for number in (signal.SIGINT, signal.SIGTERM):
        if code in (128 + number, -number):
            reason = f"stopped by {number.name}; the same command goes on"
            return Outcome(path, "interrupted", reason, 128 + number)
    if code > 0 and error_file.is_file():  # the process has written and printed it
        reason = error_file.read_text(encoding="utf-8").partition("\n")[0]
        return Outcome(path, "failed", reason, code)
    reason = f"training ended with exit code {code}"
    if code < 0:
        reason = f"training was killed by signal {-code}"
        reason += " (the system was out of memory?)" if code == -signal.SIGKILL else ""
        reason += "; the same command goes on"
    if not run.path.is_dir():
        reason = f"{run.path} was removed while it was in training"
    else:
        write_text(error_file, f"{reason}\n\n{tail(run.path / 'log.txt')}")
    return Outcome(path, "failed", reason, max(code, 1))


def tail(log: Path, n_bytes: int = 10_000) -> str:
    """The end of a log, or nothing if there is none."""
    try:
        return log.read_bytes()[-n_bytes:].decode(errors="replace")
    except FileNotFoundError:
        return ""


class Stops:
    """Within it, a signal that asks to stop is remembered and passed on to the children.

    A second Ctrl-C kills them. Outside the main thread, where Python allows no handlers, nothing
    is changed.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.children: list[Child] = []
        self._previous: dict[signal.Signals, Any] = {}

    def add(self, child: Child) -> None:
        self.children.append(child)
        if self.received is not None:  # it came while the child was starting
            tell(child, self.received)

    def __enter__(self) -> "Stops":
        if threading.current_thread() is threading.main_thread():
            for number in STOPS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup's SIGHUP
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = number == self.received == signal.SIGINT
        if self.received is None:
            self.received = signal.Signals(number)
        for child in self.children:
            tell(child, signal.SIGKILL if again else signal.Signals(number))


def tell(child: Child, number: signal.Signals) -> None:
    """Send a signal to a child; a hang-up of the terminal is SIGTERM to it."""
    child.process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
