"""Train one run, or with ``-m`` (or an experiment's own grid) many.

Every run is frozen into its directory first and trained in a fresh process from there. The same
command again skips what is finished, goes on with what is not, and refuses what differs.
"""

import contextlib
import shutil
import sys

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.cell import Outcome, Stops, train_cell
from experiments.entry import entry
from experiments.grid import place
from experiments.pool import Pool
from experiments.run_dir import RunDir
from experiments.sweep import exit_code

__all__ = ["Outcome", "main", "train", "train_cell"]


def train(run: RunDir) -> int:
    """Bring one frozen run to its end, in a process of its own; the exit code."""
    if run.finished:
        print(f"{run.name}: finished already", flush=True)
        return 0
    with Stops() as stops:
        (outcome,) = Pool([run], [{}], False, stops).train()
    if outcome.exit_code == 2 and not run.manifest:
        shutil.rmtree(run.path)  # bad input, nothing trained: leave nothing behind
        with contextlib.suppress(OSError):  # nor an empty folder of this model
            run.path.parent.rmdir()
    return outcome.exit_code or exit_code([outcome], stops.received)


@entry("train")
def main(cfg: DictConfig) -> None:
    """One run; a multirun never comes here, `experiments.sweep` ends it."""
    run = RunDir.store(*place(cfg, list(HydraConfig.get().overrides.task)))
    if cfg.dry_run:
        print(f"would train {run.path}")
        return
    if code := train(run):
        sys.exit(code)


if __name__ == "__main__":
    main()
