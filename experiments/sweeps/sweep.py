"""A sweep: freeze all its cells, skip what is done, train the rest, say how each ended.

Hydra's own sweeper forgets everything at the first failure and cannot continue. So this callback
expands the grid with Hydra's parser when a multirun starts, brings it to its end, and leaves with
the number of cells that failed as exit code; Hydra's sweeper never runs.
"""

import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from tqdm import tqdm

from experiments.config.checks import check_launch
from experiments.config.entry import REPORTED, one_line, one_line_errors
from experiments.config.identity import plain
from experiments.runs.run_dir import RunDir
from experiments.runs.state import state, table
from experiments.sweeps import grid
from experiments.sweeps.launches import Launch
from experiments.sweeps.local import ASK_S, Pool
from experiments.sweeps.slots import places
from experiments.sweeps.trial import Outcome, Stops
from experiments.system import ranks
from experiments.system.locks import holder
from experiments.system.signals import ASK_REQUEUE, REQUEUE

DONE = ("done", "skipped", "other")
BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


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
    """Bring every cell of a multirun to its end, or as near as can be; its exit code.

    Raises:
        ValueError, HydraException: if the grid or the launch cannot be understood.
    """
    if ranks.started():
        raise ValueError(
            "a sweep starts its processes by itself: leave torchrun or srun out, or give "
            "hydra/launcher=slurm"
        )
    check_launch(config)
    cells = grid.expand(config)
    common = set.intersection(*map(set, cells)) if len(cells) > 1 else set()
    remembered = grid.Remembered(config)
    outcomes: dict[str, Outcome] = {}
    known: dict[Path, RunDir] = {}
    placed: dict[Path, tuple[list[str], dict[str, Any]]] = {}
    for overrides in tqdm(cells, "composing", unit="cell", leave=False, disable=None, delay=1):
        try:
            if run := remembered.known(overrides):
                path, frozen = run.path, plain(run.config) if run.path in placed else {}
                known[path] = run
            else:
                path, frozen = grid.locate(grid.compose(config, overrides), overrides)
            # two cells with one directory: one cell, written in two ways, or an error
            if path in placed:
                grid.check_same(path, placed[path][1], frozen)
            elif path in known and not run:
                grid.check_same(path, plain(known[path].config), frozen)
            elif not run:
                placed[path] = (overrides, frozen)
        except REPORTED as error:
            label = " ".join(o for o in overrides if o not in common) or " ".join(overrides)
            outcomes[label] = failed(label, error)
    with Launch([*known, *placed]) as launch:
        for path, (overrides, frozen) in placed.items():
            try:
                known[path] = RunDir.store(path, frozen, launch.queued_by)
                remembered.note(overrides, known[path], frozen)
            except REPORTED as error:
                outcomes[str(path)] = failed(str(path), error)
        remembered.save()
        outcomes |= {str(run.path): skipped(run) for run in known.values() if run.finished}
        return finish([r for r in known.values() if str(r.path) not in outcomes], outcomes, config)


def finish(waiting: list[RunDir], outcomes: dict[str, Outcome], config: DictConfig) -> int:
    """Train the cells that wait, report on all, return the exit code."""
    received: signal.Signals | None = None
    try:
        with Stops() if is_local(config.hydra.launcher) else nullcontext() as stops:
            trained = launch_cells(waiting, config, stops)
            received = stops.received if stops else None
    except KeyboardInterrupt:
        received = signal.SIGINT
        trained = [Outcome(str(run.path), "waiting") for run in waiting]
    outcomes |= {outcome.run: outcome for outcome in trained}
    report(list(outcomes.values()))
    return exit_code(list(outcomes.values()), received)


def is_local(launcher: Any) -> bool:
    """True if no hydra/launcher was chosen: cells are processes of this one."""
    return launcher._target_ == BASIC_LAUNCHER


def launch_cells(cells: Sequence[RunDir], config: DictConfig, stops: Stops | None) -> list[Outcome]:
    """Train frozen cells by the engine that the config chooses; how each ended.

    Raises:
        ValueError: if the engine refuses its settings.
        KeyboardInterrupt: if another engine than the local one was interrupted.
    """
    if not cells:
        return []
    if stops is None:
        return on_cluster(cells, config)
    chosen = places(config.jobs, config.execution.trainer)
    if config.dry_run:
        for i, run in enumerate(cells):
            where = chosen[i % len(chosen)].items()
            print(f"would train {run.path}", *(f"{k}={v}" for k, v in where))
        return [Outcome(str(run.path), "waiting") for run in cells]
    return Pool(cells, chosen, config.fail_fast, stops).train()


def on_cluster(cells: Sequence[RunDir], config: DictConfig) -> list[Outcome]:
    """Train cells by an engine of `cluster`, and again those whose holder died."""
    from experiments.sweeps import cluster

    outcomes: dict[str, Outcome] = {}
    left = list(cells)
    while left:
        outcomes |= {outcome.run: outcome for outcome in cluster.launch(left, config)}
        left = [run for run in left if outcomes[str(run.path)].status == "elsewhere"]
        while left and all(holder(run.path) for run in left):
            time.sleep(ASK_S)
        for run in [run for run in left if run.finished]:
            outcomes[str(run.path)] = Outcome(str(run.path), "other", run.summary())
            left.remove(run)
    return list(outcomes.values())


def skipped(run: RunDir) -> Outcome:
    """A cell that was finished before, if its result can be read."""
    try:
        return Outcome(str(run.path), "skipped", run.summary())
    except (ValueError, KeyError, TypeError) as error:
        return failed(str(run.path), error)


def failed(label: str, error: Exception) -> Outcome:
    """A cell that did not come to training."""
    print(f"error: {label}: {one_line(error)}", file=sys.stderr, flush=True)
    return Outcome(label, "failed", one_line(error), 2)


def report(outcomes: Sequence[Outcome]) -> None:
    """Print a table, how many cells ended how, and why those that are not done are not."""
    runs = [o.run for o in outcomes if len(outcomes) <= 40 or o.status not in DONE]
    if states := [state(RunDir(run)) for run in runs if Path(run, "config.yaml").is_file()]:
        print(table(states))
    counts = Counter(outcome.status for outcome in outcomes)
    parts = [
        f"{counts['done']} trained",
        f"{counts['skipped']} finished before",
        f"{counts['failed']} failed",
    ]
    words = {"other": "trained by other launches", "requeue": "to be requeued"}
    words |= {"elsewhere": "in training elsewhere"}
    for status in ("other", "interrupted", "requeue", "elsewhere", "waiting"):
        if counts[status]:
            parts.append(f"{counts[status]} {words.get(status, status)}")
    print(f"sweep: {', '.join(parts)}", flush=True)
    for outcome in outcomes:
        if outcome.status not in (*DONE, "waiting"):
            line = f"  {outcome.status}: {outcome.run}: {outcome.detail}"
            print(line, file=sys.stderr, flush=True)


def exit_code(outcomes: Sequence[Outcome], received: signal.Signals | None) -> int:
    """128 + the signal that stopped us, or 75 if it asked for a requeue; else how many cells
    failed or were interrupted, 100 at most; 75 if none did, but some wait for a requeue."""
    if received is not None:
        return REQUEUE if received in ASK_REQUEUE else 128 + received
    bad = sum(outcome.status in ("failed", "interrupted") for outcome in outcomes)
    if not bad and any(outcome.status == "requeue" for outcome in outcomes):
        return REQUEUE
    return min(bad, 100)
