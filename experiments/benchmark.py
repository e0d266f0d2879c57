"""Measure speed and memory: ``python -m experiments.benchmark bench=NAME key=value ...``.

A benchmark is a function that takes the keys of its conf/bench/NAME.yaml and returns a `Report`.
"""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_method
from omegaconf import DictConfig

from experiments.entry import entry
from experiments.run_dir import check_targets, plain, write_json

SHARED = ("n_threads", "out", "paths")  # keys of conf/benchmark.yaml; the rest are the function's


@entry("benchmark")
def main(cfg: DictConfig) -> None:
    settings = plain(cfg)
    check_targets(settings)
    n_threads, out, _ = (settings.pop(key) for key in SHARED)

    from experiments.bench_measure import check_counts, machine

    if n_threads is not None:
        check_counts(n_threads=n_threads)
        import torch

        torch.set_num_threads(n_threads)
    benchmark = get_method(settings.pop("_target_"))
    where = machine()
    gpu = f", {where['gpu']}" if where["gpu"] else ""
    print(
        f"{where['cpu']}, {where['n_threads']} threads{gpu}, torch {where['torch']}\n", flush=True
    )
    report = benchmark(**settings)
    print(report.text(), flush=True)
    if out is not None:
        content = {"bench": HydraConfig.get().runtime.choices["bench"], "machine": where}
        content |= {"settings": settings, "tables": report.tables, "notes": report.notes}
        write_json(Path(out), content)


if __name__ == "__main__":
    main()
