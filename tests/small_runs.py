"""Small trainings of both families, and what they are compared by."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from experiments.config.entry import CONF_DIR
from experiments.runs.checkpoints.reading import read_checkpoint
from experiments.runs.metrics import MetricsFile
from experiments.runs.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["data=text", "data.val_tokens=500", "debug=smoke", "trainer=cpu", "size=nano"]
FAMILIES = ["rwkv4", "gpt"]


def text_in(folder: Path) -> Path:
    """A text to train on."""
    path = folder / "a.txt"
    path.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(2000)))
    return path


def places(runs: Path, text: Path) -> list[str]:
    """Where runs, their text and their prepared data are, as overrides."""
    data = text.parent / "data"
    return [f"data.source.paths={text}", f"paths.runs={runs}", f"paths.data={data}"]


def freeze_in(runs: Path, text: Path, *overrides: str, small: Sequence[str] = SMALL) -> RunDir:
    """A run that nothing has trained yet; its overrides name it, what makes it small does not."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("train", overrides=[*small, *places(runs, text), *overrides])
        return RunDir.freeze(config, overrides)


def command(runs: Path, text: Path, *overrides: str) -> list[str]:
    """The command that trains one."""
    given = [*SMALL, *places(runs, text), "execution.n_threads=1", *overrides]
    return [sys.executable, "-m", "experiments.train", *given]


def rows(run: RunDir) -> list[dict[str, str]]:
    """metrics.csv without what a clock or a memory meter decides."""
    return [
        {k: v for k, v in row.items() if not k.startswith("perf/") and k != "time_s"}
        for row in MetricsFile(run.metrics_file).rows()
    ]


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return read_checkpoint(run.checkpoint("last"))["state_dict"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], 1e-3, 1e-4) for k in a)
