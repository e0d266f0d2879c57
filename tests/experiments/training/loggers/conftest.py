"""A run to be logged, what a service must have got of it, and a stand-in for MLflow."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
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


def wanted(metrics: MetricsFile) -> Series:
    names = ("lr", "train/loss", "val/loss", "val/bpb")  # each once a step
    return {name: metrics.column(name) for name in names}


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


class StandIn:
    """What we use of MlflowClient, in memory; as strict as MLflow about parameters."""

    experiments: dict[str, str] = {}  # noqa: RUF012
    runs: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, uri: str) -> None:
        pass

    def get_experiment_by_name(self, name: str) -> Any:
        known = name in self.experiments
        return SimpleNamespace(experiment_id=self.experiments[name]) if known else None

    def create_experiment(self, name: str) -> str:
        assert name not in self.experiments
        return self.experiments.setdefault(name, f"e{len(self.experiments)}")

    def create_run(self, experiment: str, tags: dict[str, str], run_name: str) -> Any:
        info = SimpleNamespace(run_id=f"r{len(self.runs)}", status="RUNNING")
        data = SimpleNamespace(params={}, metrics={}, tags=tags, history={})
        return self.runs.setdefault(info.run_id, SimpleNamespace(info=info, data=data))

    def search_runs(self, experiments: list[str], wanted: str = "") -> list[Any]:
        _, _, value = wanted.partition(" = ")
        value = value.strip("'")
        return [run for run in self.runs.values() if value in ("", *run.data.tags.values())]

    def update_run(self, run_id: str, status: str) -> None:
        self.runs[run_id].info.status = status

    set_terminated = update_run

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        data = self.runs[run_id].data
        assert len(params) <= 100
        for param in params:
            assert data.params.setdefault(param.key, param.value) == param.value
        for metric in metrics:
            data.metrics[metric.key] = metric.value
            data.history.setdefault(metric.key, []).append(metric)

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        return self.runs[run_id].data.history[key]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    entities, tracking = ModuleType("mlflow.entities"), ModuleType("mlflow.tracking")
    entities.Param = lambda k, v: SimpleNamespace(key=k, value=v)  # type: ignore[attr-defined]
    entities.Metric = lambda k, v, t, s: SimpleNamespace(  # type: ignore[attr-defined]
        key=k, value=v, timestamp=t, step=s
    )
    tracking.MlflowClient = StandIn  # type: ignore[attr-defined]
    package = ModuleType("mlflow")
    package.__spec__ = importlib.util.spec_from_loader("mlflow", None)
    for module in (package, entities, tracking):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(StandIn, "experiments", {})
    monkeypatch.setattr(StandIn, "runs", {})
    return StandIn
