"""`make faults`: twelve trials, two launchers, kills of both; with the stand-in, and real training.

What the real ones left is compared with a sweep that nothing happened to.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.runs.checkpoints.reading import read_checkpoint
from experiments.runs.metrics import MetricsFile

FAKE = Path(__file__).resolve().parents[2] / "experiments" / "sweeps" / "fake_fit.py"
REAL = Path(__file__).with_name("counted_fit.py")


@pytest.mark.parametrize("n_kills", [40, 41, 42, 43, 44])
def test_stand_in(storm: Callable[..., Any], n_kills: int) -> None:
    twelve = storm(FAKE)
    print(dict(twelve.blow(n_kills, pause_s=0.4)))
    twelve.check()


def test_training(storm: Callable[..., Any], tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(2000)))
    small = (
        *("data=text", f"data.source.paths={text}", "data.val_tokens=300", "ctx_len=32"),
        *("batch_size=4", "budget_tokens=38400", "n_validations=4", "execution.n_threads=1"),
        *("execution.checkpoint_every_min=0.005", f"paths.data={tmp_path / 'data'}"),
    )
    twelve = storm(REAL, *small)
    print(dict(twelve.blow(40, pause_s=6.0)))
    twelve.check()
    twelve.given.append(f"paths.runs={tmp_path / 'calm'}")
    assert twelve.start("jobs=2").wait(timeout=900) == 0
    for run in sorted(twelve.suite.glob("*/*/")):
        calm = tmp_path / "calm" / "s" / run.relative_to(twelve.suite)
        a, b = (read_checkpoint(one / "checkpoints" / "last.ckpt") for one in (run, calm))
        assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in b["state_dict"])
        assert losses(run) == losses(calm)


def losses(run: Path) -> list[list[str]]:
    rows = MetricsFile(run / "metrics.csv").rows()
    return [[row[key] for key in ("step", "tokens", "train/loss", "val/loss")] for row in rows]
