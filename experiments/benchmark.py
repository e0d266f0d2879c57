"""Measure speed and memory: ``python -m experiments.benchmark bench=NAME key=value ...``.

A benchmark is a function that takes the keys of its conf/bench/NAME.yaml and returns a `Report`.
"""

import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.config.entry import as_typed, entry
from experiments.config.identity import plain
from experiments.config.targets import resolve
from experiments.system.files import write_json

SHARED = ("n_threads", "out", "paths")  # keys of conf/benchmark.yaml; the rest are the function's


def run(settings: dict[str, Any]) -> None:
    """Run the benchmark whose function and keys these are, print its report and keep it."""
    import torch

    from experiments.benchmarks.measure import Report, check_counts
    from experiments.system.machine import describe

    n_threads, out, _ = (settings.pop(key) for key in SHARED)
    if n_threads is not None:
        check_counts(n_threads=n_threads)
        torch.set_num_threads(n_threads)
    benchmark = resolve(settings.pop("_target_"), Report)
    machine = describe()
    known = [f"{key} {value}" for key, value in machine.items() if value is not None]
    print(", ".join(known), end="\n\n", flush=True)
    report = benchmark(**settings)
    print(report.text(), flush=True)
    if out is not None:
        content = {"bench": HydraConfig.get().runtime.choices["bench"], "machine": machine}
        content |= {"settings": settings, "tables": report.tables, "notes": report.notes}
        write_json(Path(out), content)


def main() -> None:
    typed, sys.argv[1:] = as_typed(sys.argv[1:], ("run", "pack", "out"))

    @entry("benchmark")
    def task(cfg: DictConfig) -> None:
        run(plain(cfg) | typed)

    task()


if __name__ == "__main__":
    main()
