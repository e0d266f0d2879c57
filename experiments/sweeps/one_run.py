"""One run that is no trial of a sweep: in a fresh process, or as one of torchrun's or srun's."""

import contextlib
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from experiments.runs.run_dir import RunDir, yaml_of
from experiments.sweeps.local import train_all
from experiments.sweeps.sweep import exit_code
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
