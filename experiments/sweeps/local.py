"""Cells trained by processes of this machine, several at once, shared with other launches."""

import signal
import sys
import time
from collections import deque
from collections.abc import Sequence

from tqdm import tqdm

from experiments.runs.run_dir import RunDir
from experiments.sweeps.slots import Place
from experiments.sweeps.trial import Child, Outcome, Stops, tell
from experiments.system.locks import RunLocked, holder

LOOK_S = 0.05  # between two looks at the children
ASK_S = 1.0  # between two looks at cells that other processes hold


class Pool:
    """Trains cells, one in each place at a time, until every one has an outcome.

    A cell that another process holds is left to it; if that one dies, we go on with it. When
    `stops` has received a signal no other cell is started; nor with `fail_fast` when one failed,
    and those in training are told to save and stop.

    Args:
        cells: frozen runs.
        places: where; each is used by one cell at a time.
        fail_fast: stop at the first cell that fails.
        stops: passes signals on to the processes.
    """

    def __init__(
        self, cells: Sequence[RunDir], places: Sequence[Place], fail_fast: bool, stops: Stops
    ) -> None:
        self.cells, self.fail_fast, self.stops = cells, fail_fast, stops
        self.free = list(places)
        self.log = len(places) > 1  # the outputs of several would be one mess
        self.waiting = deque(cells)
        self.away: deque[RunDir] = deque()  # held by others
        self.asked = time.monotonic()
        self.running: dict[Child, Place] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.errors = {str(run.path): error_stamp(run) for run in cells}
        self.stopping = False
        self.told = False

    def train(self) -> list[Outcome]:
        """Outcomes in the order of the cells; `waiting` for those that were never started."""
        with Progress(len(self.cells), bar=self.log) as self.progress:
            while True:
                self.stopping = self.stopping or self.stops.received is not None
                self._start()
                self._collect()
                if not self.running and (self.stopping or not (self.waiting or self.away)):
                    break
                time.sleep(LOOK_S)
        for run in self.away:
            detail = f"in training elsewhere ({holder(run.path)})"
            self.outcomes[str(run.path)] = Outcome(str(run.path), "elsewhere", detail)
        return [
            self.outcomes.get(str(run.path), Outcome(str(run.path), "waiting"))
            for run in self.cells
        ]

    def _start(self) -> None:
        if self.away and time.monotonic() - self.asked > ASK_S:
            self.asked = time.monotonic()
            if not self.waiting and not self.running and not self.told:
                self.told = True
                who = [f"{run.name} ({holder(run.path) or 'ending'})" for run in self.away]
                self.progress.say(
                    f"waiting for {len(self.away)} in training elsewhere: {', '.join(who)}"
                )
            self.waiting.extend(self.away)
            self.away.clear()
        while self.waiting and self.free and not self.stopping:
            run = self.waiting.popleft()
            try:
                claim = run.claim(training=False)
            except RunLocked:
                self.away.append(run)
                continue
            except (OSError, ValueError) as error:  # ValueError: a link out of the directory
                self._settle(run, Outcome(str(run.path), "failed", str(error), 1))
                continue
            if known := self._by_others(run):
                claim.release()
                self._settle(run, known)
                continue
            place = self.free.pop(0)
            if not self.log:
                self.progress.start(run)
            try:
                child = Child(run, claim, place, self.log)
            except OSError as error:  # no more processes, a full disk
                self.free.append(place)
                self._settle(run, Outcome(str(run.path), "failed", str(error), 1))
                continue
            self.running[child] = place
            self.stops.add(child)

    def _by_others(self, run: RunDir) -> Outcome | None:
        """How a cell ended that another launch has trained meanwhile."""
        path = str(run.path)
        if run.finished:
            return Outcome(path, "other", run.summary())
        if error_stamp(run) not in (None, self.errors[path]):
            reason = (run.path / "error.txt").read_text(encoding="utf-8").partition("\n")[0]
            return Outcome(path, "failed", reason, 1)
        return None

    def _collect(self) -> None:
        for child in list(self.running):
            code = child.process.poll()
            if code is None:
                continue
            self.free.append(self.running.pop(child))
            self.stops.children.remove(child)
            outcome = child.outcome(code)
            if outcome.status == "elsewhere":  # another launch was quicker than we to go on with it
                self.away.append(child.run)
            else:
                self._settle(child.run, outcome)

    def _settle(self, run: RunDir, outcome: Outcome) -> None:
        self.outcomes[outcome.run] = outcome
        self.progress.end(run, outcome, print_done=self.log)
        if outcome.status == "failed" and self.fail_fast and not self.stopping:
            self.stopping = True
            for child in self.running:
                tell(child, signal.SIGTERM)


def error_stamp(run: RunDir) -> int | None:
    """When the run last failed, by the file's time; None if it did not."""
    try:
        return (run.path / "error.txt").stat().st_mtime_ns
    except FileNotFoundError:
        return None


class Progress:
    """A line for each cell that ends, and a bar over all of them on a terminal.

    Args:
        total: how many cells there are.
        bar: False if the cells show bars of their own.
    """

    def __init__(self, total: int, bar: bool) -> None:
        self.total, self.ended = total, 0
        hide = not bar or total == 1 or not sys.stderr.isatty()
        self.bar = tqdm(total=total, unit="cell", disable=hide, leave=False, dynamic_ncols=True)

    def start(self, run: RunDir) -> None:
        if self.total > 1:
            self.say(f"[{self.ended + 1}/{self.total}] {run.name}")

    def end(self, run: RunDir, outcome: Outcome, print_done: bool) -> None:
        self.ended += 1
        if outcome.status == "done" and not print_done:  # it has said so itself
            return
        done = "done" if outcome.status == "other" else outcome.status
        line = f"{done}: {run.name}: {outcome.detail}"
        self.say(f"[{self.ended}/{self.total}] {line}" if self.total > 1 else line)
        self.bar.update()

    def say(self, line: str) -> None:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
