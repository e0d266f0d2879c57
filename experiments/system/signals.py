"""How a run is asked to stop: signals that are noted, and heeded where it can save."""

import ctypes
import math
import os
import signal
import sys
import time
from types import FrameType
from typing import Any

ASK_REQUEUE = (signal.SIGUSR1, signal.SIGUSR2)  # a cluster's: time is up, or it is preempted
REQUEUE = 75  # exit code: saved, wants to be started again; EX_TEMPFAIL of sysexits.h
BUSY = 79  # exit code: another process holds the run; nothing was done
PARENT = "RWKV_PARITY_PARENT"  # the process that started a training and looks after it
CODES = {
    signal.SIGINT: 128 + signal.SIGINT,
    signal.SIGTERM: 128 + signal.SIGTERM,
    **dict.fromkeys(ASK_REQUEUE, REQUEUE),
}
TWICE_S = 1.0  # the same request may arrive twice: from a terminal, and from who started us


class StopRequest:
    """Within it, a signal asks the run to stop: at once before training, then after a save.

    SIGINT or SIGTERM a second time means now. Of different signals the first decides the exit code.
    """

    def __init__(self) -> None:
        self.code = 0  # exit code that is asked for; 0: none
        self.training = False  # whether there is something to save
        self._insisted_at = math.inf  # of the first SIGINT or SIGTERM, by the monotonic clock
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Take the signals over, also from whoever took them meanwhile."""
        for number in CODES:
            signal.signal(number, self._receive)

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.getsignal(number) for number in CODES}
        self.install()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = False
        if number in (signal.SIGINT, signal.SIGTERM):
            now = time.monotonic()
            again = now - self._insisted_at > TWICE_S
            self._insisted_at = min(self._insisted_at, now)
        self.code = self.code or CODES[signal.Signals(number)]
        if again or not self.training:
            raise SystemExit(self.code)


def die_with_parent() -> None:
    """Get SIGTERM when the process that `PARENT` names ends, if it does; on Linux."""
    parent = os.environ.pop(PARENT, "")
    if parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG
        if os.getppid() != int(parent):
            sys.exit(128 + signal.SIGTERM)
