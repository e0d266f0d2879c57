"""One trial of a sweep: a frozen run, trained to its end by a process of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Any

from experiments.config.entry import one_line
from experiments.runs.run_dir import RunDir
from experiments.runs.state import RESUMES, State, state_of
from experiments.system.files import write_text
from experiments.system.locks import LEASE_S, RunLocked, holding
from experiments.system.signals import ASK_REQUEUE, BUSY, PARENT, REQUEUE

COMMAND = [sys.executable, "-m", "experiments.fit"]
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class By(StrEnum):
    """Who brought a trial into its state."""

    US = "this launch"
    BEFORE = "an earlier launch"
    OTHERS = "another launch"


@dataclass
class Outcome:
    """How a trial stands when a launch is done with it.

    Attributes:
        run: its directory; or its overrides, if it came to none.
        detail: the result, the reason, or who is at it.
        exit_code: of its process; that of a run to be requeued is `REQUEUE`.
    """

    run: str
    state: State
    detail: str = ""
    exit_code: int = 0
    by: By = By.US


def train_trial(
    run: RunDir,
    stops: "Stops",
    environment: dict[str, str] | None = None,
    log: bool = False,
    failed_before: int | None = None,
) -> Outcome:
    """Train a frozen run to its end in a fresh process, which gets the signals that we get.

    The outcome is RUNNING if another process holds the run.

    Args:
        environment: what the process's environment has beyond ours.
        log: True if its output goes into the run's ``log.txt``, not to our own.
        failed_before: the run's `error_stamp` when this launch began; if it has another by now,
            another launch has tried it meanwhile.
    """
    path = str(run.path)
    try:
        with holding(run.launch_file):
            with run.lock():  # nobody trains it; the process takes the lock as soon as it can
                if run.finished:
                    return Outcome(path, State.DONE, run.summary(), by=By.OTHERS)
                if error_stamp(run) not in (None, failed_before):
                    return Outcome(path, State.FAILED, run.error(), 1, By.OTHERS)
                run.error_file.unlink(missing_ok=True)  # of the attempt before
            process = start(run, environment, log)
            with stops.forwarding_to(process):
                code = process.wait()
            if code < 0:  # its own processes, data loaders and ranks, must not outlive it
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            return judge(run, code)
    except RunLocked as error:
        return Outcome(path, State.RUNNING, str(error), by=By.OTHERS)
    except (OSError, ValueError, KeyError) as error:  # its files are damaged, or cannot be written
        return Outcome(path, State.FAILED, one_line(error), 1)


def train_when_free(run: RunDir) -> Outcome:
    """`train_trial`, as soon as an earlier job of the same trial that has died lets go of it."""
    start, failed_before = time.monotonic(), error_stamp(run)
    while True:
        with Stops() as stops:
            outcome = train_trial(run, stops, failed_before=failed_before)
        if outcome.state is not State.RUNNING or time.monotonic() - start > LEASE_S + 20:
            return outcome
        time.sleep(1)


def start(
    run: RunDir, environment: dict[str, str] | None = None, log: bool = False
) -> subprocess.Popen[bytes]:
    """Start the process that trains a run; if this one dies, that one saves and stops."""
    output = open(run.log_file, "ab") if log else None  # noqa: SIM115
    with output or contextlib.nullcontext():
        return subprocess.Popen(
            [*COMMAND, str(run.path)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **(environment or {}), PARENT: str(os.getpid())},
            process_group=0,  # a terminal's Ctrl-C reaches it through us alone, and once
        )


def judge(run: RunDir, code: int) -> Outcome:
    """What a process with this exit code has made of a run; a reason it left none for is written.

    Raises:
        RunLocked: if another process is at it by now.
        ValueError, OSError: if files of the run are damaged or gone.
    """
    path = str(run.path)
    if not run.path.is_dir():
        return Outcome(path, State.FAILED, f"{path} was removed while it was in training", 1)
    state, detail = state_of(run, launching=True)
    if state is State.DONE:  # whatever hit the process afterwards
        return Outcome(path, state, detail)
    if code == BUSY or state is State.RUNNING:
        return Outcome(path, State.RUNNING, detail, by=By.OTHERS)
    if code in (REQUEUE, *(-number for number in ASK_REQUEUE)):
        return Outcome(path, State.INTERRUPTED, f"stopped; {RESUMES}", REQUEUE)
    for number in (signal.SIGINT, signal.SIGTERM):
        if code in (128 + number, -number):
            reason = f"stopped by {number.name}; {RESUMES}"
            return Outcome(path, State.INTERRUPTED, reason, 128 + number)
    if code > 0 and state is State.FAILED:  # the process has written and printed it
        return Outcome(path, state, detail, code)
    reason = f"training ended with exit code {code}"
    if code < 0:
        killer = " (the system was out of memory?)" if code == -signal.SIGKILL else ""
        reason = f"training was killed by signal {-code}{killer}; {RESUMES}"
    with run.lock():  # unless somebody has taken it over since
        write_text(run.error_file, f"{reason}\n\n{tail(run.log_file)}")
    return Outcome(path, State.FAILED, reason, max(code, 1))


def error_stamp(run: RunDir) -> int | None:
    """When the run last failed, by the file's time; None if it did not."""
    try:
        return run.error_file.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def tail(log: Path, n_bytes: int = 10_000) -> str:
    """The end of a log, or nothing if there is none."""
    try:
        return log.read_bytes()[-n_bytes:].decode(errors="replace")
    except FileNotFoundError:
        return ""


class Stops:
    """Within it, a signal that asks to stop is remembered and passed on to the trials' processes.

    A second Ctrl-C kills them. Outside the main thread, where Python allows no handlers, nothing
    is changed.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.stopping = False  # no other trial is started
        self._processes: list[subprocess.Popen[bytes]] = []
        self._previous: dict[signal.Signals, Any] = {}

    @contextlib.contextmanager
    def forwarding_to(self, process: "subprocess.Popen[bytes]") -> Iterator[None]:
        """Within it, a process gets the signals too."""
        self._processes.append(process)
        try:
            if self.stopping:  # it came while the process was starting
                send(process, self.received or signal.SIGTERM)
            yield
        finally:
            self._processes.remove(process)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Start no other trial, and ask those in training to save and stop."""
        self.stopping = True
        for process in list(self._processes):
            send(process, number)

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
        self.stop(signal.SIGKILL if again else signal.Signals(number))


def send(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    """Send a signal to a process; a hang-up of the terminal is SIGTERM to it."""
    process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
