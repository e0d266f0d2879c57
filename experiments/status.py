"""How far a suite is: ``python -m experiments.status suite=NAME``.

Everything is read from the run directories; nothing in them is changed or kept from changing.
"""

from pathlib import Path

from omegaconf import DictConfig

from experiments.config.entry import entry
from experiments.runs.run_dir import find_runs
from experiments.runs.state import state, table, total


@entry("status")
def main(cfg: DictConfig) -> None:
    states = [state(run) for run in find_runs(Path(cfg.paths.runs) / cfg.suite / "*" / "*")]
    print(table(states))
    print(total(states))


if __name__ == "__main__":
    main()
