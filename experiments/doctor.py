"""Can this machine train? ``python -m experiments.doctor`` prints one screen and says.

Exit code 0 if training can run, 1 if a self-test failed.
"""

from pathlib import Path

from omegaconf import DictConfig

from experiments.config.checks import Number, Optional, check_values
from experiments.config.entry import RunFailed, entry


@entry("doctor")
def main(cfg: DictConfig) -> None:
    check_values(cfg, {"n_threads": Optional(Number(1, whole=True))})
    import torch

    from experiments.benchmarks.diagnosis import examine

    if cfg.n_threads is not None:
        torch.set_num_threads(cfg.n_threads)
    found = examine(Path(cfg.paths.runs))
    print("\n".join(found.lines), flush=True)
    if found.failures:
        raise RunFailed(f"training cannot be trusted here: {'; '.join(found.failures)}")
    print("\ntraining can run", flush=True)


if __name__ == "__main__":
    main()
