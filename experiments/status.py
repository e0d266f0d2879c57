"""How far a suite is: ``python -m experiments.status suite=NAME``."""

from pathlib import Path

from omegaconf import DictConfig

from experiments.config.entry import entry
from experiments.runs.run_dir import find_runs
from experiments.runs.state import progress_of
from experiments.sweeps.table import table, total


@entry("status")
def main(cfg: DictConfig) -> None:
    runs = [progress_of(run) for run in find_runs(Path(cfg.paths.runs) / cfg.suite / "*" / "*")]
    print(table(runs))
    print(total(runs))


if __name__ == "__main__":
    main()
