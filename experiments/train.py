"""Train one run, or with ``-m`` (or an experiment's own grid) many.

Every run is frozen into its directory first and trained in a fresh process from there. The same
command again skips what is finished, resumes what is not, and refuses what differs.
"""

import contextlib
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.config.checks import check_launch
from experiments.config.entry import entry
from experiments.runs.run_dir import RunDir, yaml_of
from experiments.sweeps.local import train_all
from experiments.sweeps.slurm import queued_elsewhere
from experiments.sweeps.sweep import exit_code, is_local
from experiments.sweeps.trial import COMMAND, Stops
from experiments.system import ranks


def train(run: RunDir) -> int:
    """Bring one frozen run to its end, in a process of its own; the exit code."""
    if run.finished:
        print(f"{run.name}: finished already", flush=True)
        return 0
    with Stops() as stops:
        (outcome,) = train_all([run], [{}], False, stops)
    if outcome.exit_code == 2 and not run.manifest and not run.has_training:
        shutil.rmtree(run.path)  # bad input, nothing trained: leave nothing behind
        with contextlib.suppress(OSError):  # nor an empty folder of this model
            run.path.parent.rmdir()
    return outcome.exit_code or exit_code([outcome], stops.received)


def train_together(path: Path, frozen: dict[str, Any]) -> None:
    """Train a run as one of the processes that torchrun or srun started for it; never returns.

    The first of them freezes the config, the others wait until it is the one they composed too.

    Raises:
        ValueError: if the config cannot be frozen, or is not within five minutes.
    """
    file, text = path / "config.yaml", yaml_of(frozen).encode()
    deadline = time.monotonic() + 300
    if ranks.started_as() == 0:
        run = RunDir.store(path, frozen)
        if run.finished:
            print(f"{run.name}: finished already", flush=True)
    while not (path / "result.json").is_file() and not (
        file.is_file() and file.read_bytes() == text
    ):
        if time.monotonic() > deadline:
            raise ValueError(
                f"{file} is not what this process composed: see the first one's output"
            )
        time.sleep(0.1)
    if (path / "result.json").is_file():
        sys.exit(0)
    os.execv(COMMAND[0], [*COMMAND, str(path)])  # signals and exit codes are the run's own


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
