"""A run to be logged, and what a service must have got of it."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from experiments.runs.metrics import MetricsFile
from experiments.runs.run_dir import RunDir
from experiments.system.files import write_json

Series = dict[str, list[tuple[int, float]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    path = tmp_path / "runs" / "s" / "m" / "seed=0"
    path.mkdir(parents=True)
    OmegaConf.save({"suite": "s", "seed": 0, "optim": {"betas": [0.9, 0.95]}}, path / "config.yaml")
    write_json(path / "manifest.json", {"created": "2020-01-01T00:00:00+00:00"})
    return RunDir(path)


NAMES = ("lr", "train/loss", "val/loss", "val/bpb")  # each is measured once a step


def wanted(metrics: MetricsFile) -> Series:
    return {name: metrics.column(name) for name in NAMES}


def logged(series: Series) -> Series:
    return {name: series[name] for name in NAMES}


def approx(series: Series) -> Any:
    """Steps exactly, values as float32 keeps them."""
    return {
        key: [(step, pytest.approx(value, rel=1e-6)) for step, value in points]
        for key, points in series.items()
    }


def of_tensorboard(run: RunDir) -> tuple[str, Series]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "tensorboard"), {"scalars": 0})
    events.Reload()
    keys = [key for key in events.Tags()["scalars"] if key != "hp_metric"]
    series = {key: [(e.step, e.value) for e in events.Scalars(key)] for key in keys}
    return str(run.path / "tensorboard"), series
