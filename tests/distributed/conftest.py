"""Runs on several gloo processes of this machine."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.runs.checkpoints.reading import read_checkpoint
from experiments.runs.run_dir import RunDir

from ..small_runs import ROOT, freeze_in, places, text_in

SMALL = [
    "data=text", "data.val_tokens=500", "debug=smoke", "size=nano", "size.n_layer=2",
    "execution.trainer.accelerator=cpu", "batch_size=8", "execution.micro_batch_size=2",
    "budget_tokens=4096",
]  # fmt: skip  # 8 steps of 2 x 2 micro-batches


class Processes:
    """Freezes runs under a folder and trains them on forked processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text = text_in(folder)
        self.environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.server = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("rank_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=self.environment,
        )

    def overrides(self, runs: str, *more: str) -> list[str]:
        """Of a small run on CPUs whose directory is found under `runs`."""
        return [*SMALL, *places(self.folder / runs, self.text), *more]

    def freeze(self, runs: str, *overrides: str) -> RunDir:
        return freeze_in(self.folder / runs, self.text, small=[*SMALL, *overrides])

    def train(self, run: RunDir, n_ranks: int, **job: Any) -> list[int]:
        """Exit codes of the processes."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps({"run": str(run.path), "n_ranks": n_ranks} | job) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def copy(self, run: RunDir, runs: str) -> None:
        """To resume it elsewhere."""
        shutil.copytree(run.path, self.folder / runs / Path(*run.path.parts[-3:]))


def apart(a: RunDir, b: RunDir, key_biases: bool = True) -> float:
    """Relative RMS difference of all weights of two runs, with or without a GPT's key biases.

    Softmax does not see those, so their gradient is rounding alone, of which Adam makes full steps.
    """
    x, y = (read_checkpoint(run.checkpoint("last"))["state_dict"] for run in (a, b))
    assert x.keys() == y.keys()
    squares = total = 0.0
    for name, weight in x.items():
        difference = (weight.double() - y[name].double()).square()
        if name.endswith("qkv.bias") and not key_biases:
            difference.view(a.config.model.net.n_head, 3, -1)[:, 1] = 0
        squares += float(difference.sum())
        total += float(weight.double().square().sum())
    return math.sqrt(squares / total)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    made = Processes(tmp_path_factory.mktemp("runs"))
    yield made
    made.server.kill()
    made.server.wait()
