"""Small trainings of both families, and what they are compared by."""

import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from experiments.config.entry import CONF_DIR
from experiments.runs.checkpoints.reading import read_checkpoint
from experiments.runs.metrics import MetricsFile
from experiments.runs.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["data=text", "debug=smoke", "trainer=cpu", "size=nano"]
FAMILIES = ["rwkv4", "gpt"]


def freeze_in(runs: Path, text: Path, *overrides: str) -> RunDir:
    """A run that nothing has trained yet; its overrides name it."""
    given = [
        *SMALL,
        f"data.source.paths={text}",
        "data.val_tokens=500",
        f"paths.runs={runs}",
        f"paths.data={text.parent / 'data'}",
        *overrides,
    ]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return RunDir.freeze(compose("train", overrides=given), overrides)


def command(tmp_path: Path, text: Path, *overrides: str) -> list[str]:
    """The command that trains one on a text, with runs and prepared data below a folder."""
    return [
        sys.executable,
        "-m",
        "experiments.train",
        *SMALL,
        f"data.source.paths={text}",
        "data.val_tokens=500",
        f"paths.runs={tmp_path / 'runs'}",
        f"paths.data={tmp_path / 'data'}",
        "execution.n_threads=1",
        *overrides,
    ]


def rows(run: RunDir) -> list[dict[str, str]]:
    """metrics.csv without what a clock or a memory meter decides."""
    table = MetricsFile(run.path / "metrics.csv").rows()
    return [
        {k: v for k, v in row.items() if not k.startswith("perf/") and k != "time_s"}
        for row in table
    ]


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return read_checkpoint(run.checkpoint("last"))["state_dict"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], 1e-3, 1e-4) for k in a)
