"""Trials trained by processes of this machine, several at once, shared with other launches."""

import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue

from tqdm import tqdm

from experiments.runs.run_dir import RunDir
from experiments.runs.state import State
from experiments.sweeps.slots import Slot
from experiments.sweeps.trial import By, Outcome, Stops, error_stamp, train_trial

LOOK_S = 1.0  # between two looks at trials that other processes hold


def train_all(
    runs: Sequence[RunDir], slots: Sequence[Slot], fail_fast: bool, stops: Stops
) -> list[Outcome]:
    """Train frozen runs, one in each device slot at a time, until every one has an outcome.

    A run that another process holds is left to it; if that one dies, we resume the run. When
    `stops` has received a signal no other run is started; nor with `fail_fast` when one failed,
    and those in training are asked to save and stop.

    Returns:
        Outcomes in the order of the runs; WAITING for those that were never started.
    """
    outcomes: dict[str, Outcome] = {}
    stamps = {str(run.path): error_stamp(run) for run in runs}
    free: SimpleQueue[Slot] = SimpleQueue()
    for slot in slots:
        free.put(slot)
    several = len(slots) > 1

    def train(run: RunDir) -> Outcome:
        if stops.stopping:
            return Outcome(str(run.path), State.WAITING)
        slot = free.get()
        try:
            if not several:
                report.begin(run)
            # the outputs of several at once would be one mess: each goes into its log.txt
            outcome = train_trial(run, stops, slot, several, stamps[str(run.path)])
            if outcome.state is State.FAILED and fail_fast:
                stops.stop()
            return outcome
        finally:
            free.put(slot)

    left = list(runs)
    with Report(len(runs), bar=several) as report, ThreadPoolExecutor(len(slots)) as pool:
        while left and not stops.stopping:
            running: set[Future[Outcome]] = {pool.submit(train, run) for run in left}
            while running:  # with a time-out, so that signals are handled at once
                ended, running = wait(running, timeout=LOOK_S, return_when=FIRST_COMPLETED)
                for outcome in (future.result() for future in ended):
                    outcomes[outcome.run] = outcome
                    report.end(outcome, quiet=not several)
            left = [run for run in runs if outcomes[str(run.path)].state is State.RUNNING]
            if left and not stops.stopping:
                report.wait_for(left)
                wait_for_any(left, stops)
    return [outcomes.get(str(run.path), Outcome(str(run.path), State.WAITING)) for run in runs]


def wait_for_any(runs: Sequence[RunDir], stops: Stops) -> None:
    """Wait until one of the runs that others hold is free or finished, or we are stopped."""
    time.sleep(LOOK_S)
    while not stops.stopping and all(not run.finished and run.holder() for run in runs):
        time.sleep(LOOK_S)


class Report:
    """A line for each trial that ends, and a bar over all of them on a terminal.

    Args:
        total: how many trials there are.
        bar: False if the trials show bars of their own.
    """

    def __init__(self, total: int, bar: bool) -> None:
        self.total, self.ended, self.waits = total, 0, False
        hide = not bar or total == 1 or not sys.stderr.isatty()
        self.bar = tqdm(total=total, unit="trial", disable=hide, leave=False, dynamic_ncols=True)

    def begin(self, run: RunDir) -> None:
        if self.total > 1:
            self.say(f"[{self.ended + 1}/{self.total}] {run.name}")

    def end(self, outcome: Outcome, quiet: bool) -> None:
        if outcome.state in (State.RUNNING, State.WAITING):  # not yet
            return
        self.ended += 1
        self.bar.update()
        if outcome.state is State.DONE and outcome.by is By.US and quiet:  # it has said so itself
            return
        name = "/".join(Path(outcome.run).parts[-3:])
        line = f"{outcome.state}: {name}: {outcome.detail}"
        self.say(f"[{self.ended}/{self.total}] {line}" if self.total > 1 else line)

    def wait_for(self, runs: Sequence[RunDir]) -> None:
        if not self.waits:
            self.waits = True
            who = ", ".join(f"{run.name} ({run.holder() or 'ending'})" for run in runs)
            self.say(f"waiting for {len(runs)} in training elsewhere: {who}")

    def say(self, line: str) -> None:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
