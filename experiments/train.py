"""Train one run, or with ``-m`` (or an experiment's own grid) many.

Every run is frozen into its directory first and trained in a fresh process from there. The same
command again skips what is finished, resumes what is not, and refuses what differs.
"""

import sys

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.config.checks import check_launch
from experiments.config.entry import entry
from experiments.runs.run_dir import RunDir
from experiments.sweeps.engines import is_local, queued_elsewhere
from experiments.sweeps.one_run import train, train_together
from experiments.system import ranks


@entry("train")
def main(cfg: DictConfig) -> None:
    """One run; a multirun never comes here, `experiments.sweeps.sweep` ends it."""
    check_launch(cfg)
    if not is_local(HydraConfig.get().launcher):
        raise ValueError("hydra/launcher trains the trials of a sweep: add -m")
    path, frozen = RunDir.locate(cfg, list(HydraConfig.get().overrides.task))
    if ranks.started() and not cfg.dry_run:
        train_together(path, frozen)
    run = RunDir.store(path, frozen, queued_elsewhere)
    if cfg.dry_run:
        print(f"would train {run.path}")
        return
    if code := train(run):
        sys.exit(code)


if __name__ == "__main__":
    main()
