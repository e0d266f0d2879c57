"""Which engine trains the trials of a sweep: processes of this machine, SLURM, or Ray.

All of them start ``python -m experiments.fit RUN_DIR`` for a trial.
"""

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from experiments.config.identity import plain
from experiments.runs.run_dir import RunDir
from experiments.runs.state import State
from experiments.sweeps import ray_engine, slurm
from experiments.sweeps.launches import queued_by
from experiments.sweeps.local import LOOK_S, train_all
from experiments.sweeps.slots import device_slots
from experiments.sweeps.trial import By, Outcome, Stops

BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
SUBMITIT = "hydra_plugins.hydra_submitit_launcher.submitit_launcher"
ENGINES: dict[str, Callable[[Sequence[RunDir], dict[str, Any], bool], list[Outcome]]] = {
    f"{SUBMITIT}.SlurmLauncher": slurm.on_slurm,
    f"{SUBMITIT}.LocalLauncher": slurm.on_this_machine,
    "experiments.sweeps.ray_engine.launch": ray_engine.launch,
}


def train_runs(
    runs: Sequence[RunDir], config: DictConfig
) -> tuple[list[Outcome], signal.Signals | None]:
    """Train frozen runs by the engine that the config chooses.

    Returns:
        How each ended, and the signal that stopped us, if one did.

    Raises:
        ValueError: if the engine refuses its settings.
    """
    if not runs:
        return [], None
    if not is_local(config.hydra.launcher):
        try:
            return on_cluster(runs, config), None
        except KeyboardInterrupt:
            return [Outcome(str(run.path), State.WAITING) for run in runs], signal.SIGINT
    slots = device_slots(config.jobs, config.execution.trainer)
    if config.dry_run:
        for i, run in enumerate(runs):
            where = slots[i % len(slots)].items()
            print(f"would train {run.path}", *(f"{k}={v}" for k, v in where))
        return [Outcome(str(run.path), State.WAITING) for run in runs], None
    with Stops() as stops:
        return train_all(runs, slots, config.fail_fast, stops), stops.received


def is_local(launcher: Any) -> bool:
    """True if no hydra/launcher was chosen: trials are processes of this one."""
    return launcher._target_ == BASIC_LAUNCHER


def on_cluster(runs: Sequence[RunDir], config: DictConfig) -> list[Outcome]:
    """Train runs by an engine of a cluster, and again those whose other holder died."""
    outcomes: dict[str, Outcome] = {}
    left = list(runs)
    while left:
        outcomes |= {outcome.run: outcome for outcome in launch(left, config)}
        left = [run for run in left if outcomes[str(run.path)].state is State.RUNNING]
        while left and all(run.holder() and not run.finished for run in left):
            time.sleep(LOOK_S)
        for run in [run for run in left if run.finished]:
            outcomes[str(run.path)] = Outcome(
                str(run.path), State.DONE, run.summary(), by=By.OTHERS
            )
            left.remove(run)
    return list(outcomes.values())


def launch(runs: Sequence[RunDir], config: DictConfig) -> list[Outcome]:
    """Train frozen runs by the engine that ``hydra/launcher`` names, and wait for all of them.

    Raises:
        ValueError: for another launcher, or if the engine refuses its settings.
        KeyboardInterrupt: on Ctrl-C; jobs of SLURM continue by themselves.
    """
    launcher = plain(config.hydra.launcher)
    target = launcher.pop("_target_")
    engine = ENGINES.get(target)
    if engine is None:
        raise ValueError(
            f"hydra/launcher {target} is not supported: use slurm, ray or submitit_local, or leave "
            "it out and set jobs=N for processes of this machine"
        )
    if config.dry_run:
        if engine is slurm.on_slurm:
            print(slurm.script(len(runs), launcher))
        for run in runs:
            print(f"would submit {run.path}")
        return [Outcome(str(run.path), State.WAITING) for run in runs]
    # what a process outside of the queue trains is left to it
    held = [run for run in runs if slurm.queued_job(run) is None and run.holder()]
    free = [run for run in runs if run not in held]
    outcomes = engine(free, launcher, config.fail_fast) if free else []
    return outcomes + [Outcome(str(run.path), State.RUNNING, by=By.OTHERS) for run in held]


def queued_elsewhere(path: Path) -> str:
    """Who else has a run in a queue, in words; empty if nobody."""
    job = slurm.queued_job(RunDir(path))
    if job and job in slurm.in_queue([job]):
        return f"in SLURM's queue as job {job}"
    return queued_by(path)
