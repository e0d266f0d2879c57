"""What the proofs on real clusters share: a small sweep, its undisturbed result, comparisons."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments.runs.checkpoints.reading import read_checkpoint
from experiments.runs.run_dir import RunDir

from ..small_runs import rows

ROOT = Path(__file__).resolve().parents[2]


class Sweep:
    """Four trials, two of each family, with runs and data below one folder.

    Args:
        folder: where everything goes.
        n_tokens: budget of each trial.
    """

    def __init__(self, folder: Path, n_tokens: int) -> None:
        self.folder = folder
        text = folder / "a.txt"
        text.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(2000)))
        self.shared = [
            "data=text",
            "trainer=cpu",
            "execution.n_threads=1",
            f"data.source.paths={text}",
            "data.val_tokens=500",
            f"paths.runs={folder / 'runs'}",
            f"paths.data={folder / 'data'}",
            "ctx_len=64",
            "batch_size=4",
            f"budget_tokens={n_tokens}",
            "execution.log_every=20",
            "n_validations=4",
            "execution.checkpoint_every_min=0.1",
        ]

    def start(self, suite: str, *given: str) -> subprocess.Popen[str]:
        """The command, started; what it prints is in `<suite>.log`."""
        words = [f"suite={suite}", "model=rwkv4,gpt", "size=pico", "seed=0,1", *given, *self.shared]
        with open(self.folder / f"{suite}.log", "a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "experiments.train", "-m", *words],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def run(self, suite: str, *given: str) -> int:
        """The command, to its end; its exit code."""
        return self.start(suite, *given).wait(timeout=3600)

    def printed(self, suite: str) -> str:
        return (self.folder / f"{suite}.log").read_text()

    def trials(self, suite: str) -> list[RunDir]:
        """The run directories of a suite, in a fixed order."""
        return [RunDir(p.parent) for p in sorted(self.folder.glob(f"runs/{suite}/*/*/config.yaml"))]


def wait_for(condition: Callable[[], object], timeout_s: float = 600) -> None:
    """Return as soon as a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def assert_same(runs: list[RunDir], undisturbed: list[RunDir]) -> None:
    """Every weight and every metric is equal, bit for bit."""
    assert len(runs) == len(undisturbed) > 0
    for run, other in zip(runs, undisturbed, strict=True):
        assert run.finished
        assert other.finished
        a, b = (read_checkpoint(r.checkpoint("last"))["state_dict"] for r in (run, other))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), run.name
        assert rows(run) == rows(other), run.name


@pytest.fixture(scope="module")
def sweep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """The sweep, trained once without any cluster or disturbance as the suite ``quiet``."""
    made = Sweep(tmp_path_factory.mktemp("sweep"), request.module.N_TOKENS)
    start = time.monotonic()
    assert made.run("quiet", "jobs=2") == 0, made.printed("quiet")
    print(f"\nundisturbed, two at once on this machine: {time.monotonic() - start:.0f} s")
    return made
