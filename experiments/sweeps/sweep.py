"""A sweep: freeze all its trials, skip what is done, train the rest, report how each ended.

Hydra's own sweeper forgets everything at the first failure and cannot resume. So this callback
expands the grid with Hydra's parser when a multirun starts, brings it to its end, and leaves with
the number of trials that failed as exit code; Hydra's sweeper never runs.
"""

import signal
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from tqdm import tqdm

from experiments.config.checks import check_launch
from experiments.config.entry import REPORTED, one_line, one_line_errors
from experiments.runs.run_dir import RunDir
from experiments.runs.state import State, progress_of
from experiments.sweeps.engines import queued_elsewhere, train_runs
from experiments.sweeps.grid import Composer, check_same, expand
from experiments.sweeps.launches import announced
from experiments.sweeps.table import table
from experiments.sweeps.trial import By, Outcome
from experiments.system import ranks
from experiments.system.signals import ASK_REQUEUE, REQUEUE


class Sweep(Callback):
    """Hydra's hook into a multirun; an error is one line, as everywhere."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        with one_line_errors():
            try:
                sys.exit(sweep(config))
            except REPORTED:
                raise
            except Exception:  # which Hydra would turn into a warning
                traceback.print_exc()
                sys.exit(1)


def sweep(config: DictConfig) -> int:
    """Bring every trial of a multirun to its end, or as near as can be; its exit code.

    Raises:
        ValueError, HydraException: if the grid or the launch cannot be understood.
    """
    if ranks.started():
        raise ValueError(
            "a sweep starts its processes by itself: leave torchrun or srun out, or give "
            "hydra/launcher=slurm"
        )
    check_launch(config)
    located, outcomes = locate_all(config)
    with announced(located):
        waiting = []
        for path, frozen in located.items():
            try:
                run = RunDir.store(path, frozen, queued_elsewhere)
                if run.finished:
                    outcomes.append(Outcome(str(path), State.DONE, run.summary(), by=By.BEFORE))
                else:
                    waiting.append(run)
            except (*REPORTED, KeyError, TypeError) as error:
                outcomes.append(failed(str(path), error))
        trained, received = train_runs(waiting, config)
    report([*outcomes, *trained])
    return exit_code([*outcomes, *trained], received)


def locate_all(config: DictConfig) -> tuple[dict[Path, dict[str, Any]], list[Outcome]]:
    """The run directory and frozen config of each trial; outcomes of those that have none."""
    located: dict[Path, dict[str, Any]] = {}
    outcomes = []
    trials, composer = expand(config), Composer(config)
    common = set.intersection(*map(set, trials)) if len(trials) > 1 else set()
    for overrides in tqdm(trials, "composing", unit="trial", leave=False, disable=None, delay=1):
        try:
            path, frozen = RunDir.locate(composer.compose(overrides), overrides)
            if path in located:  # one trial, written in two ways, or an error
                check_same(path, located[path], frozen)
            located[path] = frozen
        except REPORTED as error:
            label = " ".join(o for o in overrides if o not in common) or " ".join(overrides)
            outcomes.append(failed(label, error))
    return located, outcomes


def failed(label: str, error: Exception) -> Outcome:
    """A trial that did not come to training."""
    print(f"error: {label}: {one_line(error)}", file=sys.stderr, flush=True)
    return Outcome(label, State.FAILED, one_line(error), 2)


def report(outcomes: Sequence[Outcome]) -> None:
    """Print a table, how many trials ended how, and why those that are not done are not."""
    runs = [o.run for o in outcomes if len(outcomes) <= 40 or o.state is not State.DONE]
    if shown := [progress_of(RunDir(run)) for run in runs if Path(run, "config.yaml").is_file()]:
        print(table(shown))
    counts = Counter(
        "to be requeued" if outcome.exit_code == REQUEUE else (outcome.state, outcome.by)
        for outcome in outcomes
    )
    bad = sum(outcome.state is State.FAILED for outcome in outcomes)
    parts = [
        f"{counts[State.DONE, By.US]} trained",
        f"{counts[State.DONE, By.BEFORE]} finished before",
        f"{bad} failed",
    ]
    others = {
        "trained by other launches": counts[State.DONE, By.OTHERS],
        "interrupted": counts[State.INTERRUPTED, By.US],
        "to be requeued": counts["to be requeued"],
        "in training elsewhere": counts[State.RUNNING, By.OTHERS],
        "waiting": counts[State.WAITING, By.US],
    }
    parts += [f"{n} {words}" for words, n in others.items() if n]
    print(f"sweep: {', '.join(parts)}", flush=True)
    for outcome in outcomes:
        if outcome.state not in (State.DONE, State.WAITING):
            line = f"  {outcome.state}: {outcome.run}: {outcome.detail}"
            print(line, file=sys.stderr, flush=True)


def exit_code(outcomes: Sequence[Outcome], received: signal.Signals | None) -> int:
    """128 + the signal that stopped us, or 75 if it asked for a requeue; else how many trials
    failed or were interrupted, 100 at most; 75 if none did, but some wait for a requeue."""
    if received is not None:
        return REQUEUE if received in ASK_REQUEUE else 128 + received
    requeued = sum(outcome.exit_code == REQUEUE for outcome in outcomes)
    bad = sum(outcome.state in (State.FAILED, State.INTERRUPTED) for outcome in outcomes)
    return min(bad - requeued, 100) or (REQUEUE if requeued else 0)
