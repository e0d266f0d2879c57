"""bench=sweep: what skipping finished trials takes, and what a second job at once brings."""

import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from experiments.benchmarks.measure import Report, Timings, check_counts, interleaved
from experiments.config.entry import RunFailed
from experiments.runs.run_dir import find_runs
from experiments.system.files import write_json


def measure(train: list[str], n_finished: int, n_trials: int, repeats: int) -> Report:
    """Time whole commands, start-up included, in a temporary folder.

    Args:
        train: overrides of conf/train.yaml; every trial has another seed besides.
        n_finished: how many finished trials are skipped; 0: none.
        n_trials: how many are trained, each with one thread, by one job and by two; 0: none.
        repeats: how often each is timed.

    Raises:
        RunFailed: if a sweep does not end well.
    """
    check_counts(repeats=repeats)
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        if n_finished:
            seconds = skipping(train, n_finished, repeats, Path(folder))
            row = {"trials": n_finished, "median_s": seconds.median("skip")}
            report.tables["Skipping finished trials"] = [row | {"max_s": max(seconds["skip"])}]
        if n_trials:
            seconds = sharing(train, n_trials, repeats, Path(folder))
            report.tables[f"{n_trials} trials, one thread each"] = [
                {
                    "jobs": jobs,
                    "median_s": seconds.median(jobs),
                    "trials_per_hour": 3600 * n_trials / seconds.median(jobs),
                    "speed over one job": seconds.ratio(1, jobs),
                }
                for jobs in seconds
            ]
    return report


def skipping(train: list[str], n_finished: int, repeats: int, folder: Path) -> Timings:
    """Seconds of the same command again, when all its trials are finished."""
    given = [*train, "suite=finished", f"seed=range({n_finished})", f"paths.runs={folder}"]
    command(*given, "dry_run=true")  # frozen
    result = {"step": 1, "val/loss": 1.0, "val/bpb": 1.0, "tokens": 1, "time_s": 1.0}
    for run in find_runs(folder / "finished" / "*" / "*"):
        write_json(run.path / "result.json", result | {"perf/tokens_per_s": 1.0})
    return interleaved({"skip": lambda: command(*given)}, repeats)


def sharing(train: list[str], n_trials: int, repeats: int, folder: Path) -> Timings:
    """Seconds of a sweep by one job and by two."""
    seeds = f"seed=range({n_trials})"
    shared = [*train, seeds, f"paths.runs={folder}", "execution.n_threads=1"]

    def sweep(jobs: int) -> None:
        command(*shared, f"suite=sweep{time.monotonic_ns()}", f"jobs={jobs}")

    return interleaved({jobs: partial(sweep, jobs) for jobs in (1, 2)}, repeats, warmup=0)


def command(*overrides: str) -> None:
    """Run a sweep to its end."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HYDRA_")}
    done = subprocess.run(
        [sys.executable, "-m", "experiments.train", "-m", *overrides],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RunFailed(f"a sweep ended with exit code {done.returncode}: {done.stderr[-300:]}")
