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
from hydra import compose, initialize_config_dir

from experiments.config.entry import CONF_DIR
from experiments.runs.checkpoints.reading import read_checkpoint
from experiments.runs.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[2]


class Processes:
    """Freezes runs under a folder and trains them on forked processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text = folder / "a.txt"
        self.text.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(2000)))
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
        return [
            "data=text",
            "debug=smoke",
            "execution.trainer.accelerator=cpu",
            "size.n_layer=2",
            f"data.source.paths={self.text}",
            "data.val_tokens=500",
            f"paths.runs={self.folder / runs}",
            f"paths.data={self.folder / 'data'}",
            *more,
        ]

    def freeze(self, runs: str, *overrides: str) -> RunDir:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            config = compose("train", overrides=self.overrides(runs, *overrides))
            return RunDir.freeze(config, [o for o in overrides if o.startswith("model=")])

    def train(self, run: RunDir, n_ranks: int, **job: Any) -> list[int]:
        """Exit codes of the processes."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps({"run": str(run.path), "n_ranks": n_ranks} | job) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def copy(self, run: RunDir, runs: str) -> None:
        """To go on from it elsewhere."""
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
