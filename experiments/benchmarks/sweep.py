"""bench=sweep: what skipping finished cells takes, and what a second job at once brings."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments.benchmarks.measure import Report, bar, check_counts, interleaved, paired_ratio
from experiments.config.entry import RunFailed
from experiments.runs.run_dir import find_runs
from experiments.system.files import write_json


def measure(train: list[str], n_finished: int, n_cells: int, repeats: int) -> Report:
    """Time whole commands, start-up included, in a temporary folder.

    Args:
        train: overrides of conf/train.yaml; every cell has another seed besides.
        n_finished: how many finished cells are skipped.
        n_cells: how many cells are trained, by one job and by two, each with one thread.
        repeats: how often each is timed.

    Raises:
        RunFailed: if a sweep does not end well.
    """
    check_counts(repeats=repeats)
    report = Report()
    wanted = []
    with tempfile.TemporaryDirectory() as folder:
        if n_finished:
            seconds = skipping(train, n_finished, repeats, Path(folder))
            report.tables["Skipping finished cells"] = [
                {"cells": n_finished, "median_s": statistics.median(seconds), "max_s": max(seconds)}
            ]
            wanted.append(
                bar(f"seconds to skip {n_finished} finished cells", max(seconds), 5, at_most=True)
            )
        if n_cells:
            jobs = sharing(train, n_cells, repeats, Path(folder))
            report.tables[f"{n_cells} cells, one thread each"] = [
                {"jobs": n, "median_s": statistics.median(s), "cells_per_hour": 3600 * n_cells / m}
                for n, s in jobs.items()
                if (m := statistics.median(s))
            ]
            ratio = paired_ratio(jobs["1"], jobs["2"])
            wanted.append(bar("cells an hour, two jobs / one", ratio, 1.6))
    report.tables["Against what is wanted"] = wanted
    return report


def skipping(train: list[str], n_finished: int, repeats: int, folder: Path) -> list[float]:
    """Seconds of the same command again, when all its cells are finished."""
    given = [*train, "suite=finished", f"seed=range({n_finished})", f"paths.runs={folder}"]
    command(*given, "dry_run=true")  # frozen
    result = {"step": 1, "val/loss": 1.0, "val/bpb": 1.0, "tokens": 1, "time_s": 1.0}
    for run in find_runs(folder / "finished" / "*" / "*"):
        write_json(run.path / "result.json", result | {"perf/tokens_per_s": 1.0})
    return interleaved({"skip": lambda: command(*given)}, repeats)["skip"]


def sharing(train: list[str], n_cells: int, repeats: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of a sweep by one job and by two."""

    def sweep(jobs: int) -> float:
        suite = f"suite=sweep{time.monotonic_ns()}"
        seeds = "seed=" + ",".join(map(str, range(n_cells)))
        start = time.perf_counter()
        command(
            *train, suite, seeds, f"paths.runs={folder}", "execution.n_threads=1", f"jobs={jobs}"
        )
        return time.perf_counter() - start

    return interleaved({"1": lambda: sweep(1), "2": lambda: sweep(2)}, repeats, warmup=0)


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
