"""TensorBoard, W&B and MLflow beside metrics.csv: one identity a run, and the same series."""

import importlib.util
import json
import os
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf

from experiments.runs.metrics import MetricsFile
from experiments.runs.run_dir import RunDir
from experiments.training import loggers
from experiments.training.loggers import Loggers, make_loggers

from .conftest import Series, approx, logged, of_tensorboard, wanted

SETTINGS: dict[str, dict[str, Any]] = {
    "tensorboard": {},
    "wandb": {"project": "p", "group": "s", "entity": None, "tags": None},
    "mlflow": {"experiment_name": "s"},
}


def start(run: RunDir, name: str) -> Loggers:
    made = make_loggers(OmegaConf.create({"execution": {"logger": {name: SETTINGS[name]}}}), run)
    assert made is not None
    return made


def train(made: Loggers, metrics: MetricsFile, first: int, last: int) -> None:
    """Rows of steps first..last by tens, with a validation at each 20, as RunLog writes them."""
    for step in range(first, last + 1, 10):
        base = {"step": step, "tokens": step * 64, "time_s": step / 7}
        rows = [base | {"lr": 1e-3 / step, "train/loss": 5 - step / 33}]
        rows += [base | {"val/loss": 5 - step / 31, "val/bpb": 7 - step / 31}] * (step % 20 == 0)
        for row in rows:
            metrics.append(row)
            made.log_metrics(row, step=step)


def wandb_records(path: Path) -> list[Any]:
    """The records of a .wandb file: LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, records, whole = path.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too little for a header: padding
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # the record's only or last part
            records.append(wandb_internal_pb2.Record())
            records[-1].ParseFromString(whole)
            whole = b""
    return records


def of_wandb(run: RunDir) -> tuple[str, Series]:
    (file,) = run.path.glob("wandb/offline-run-*/*.wandb")  # one only: what `wandb sync` finds
    records = []
    patience = time.monotonic() + 20
    while not any(record.HasField("exit") for record in records):  # W&B's own process writes it
        assert time.monotonic() < patience
        records = wandb_records(file)
    series: Series = {}
    name = ""
    for record in records:
        if record.HasField("run"):
            name = record.run.run_id
        if record.HasField("history"):
            items = {
                i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item
            }
            for key, value in items.items():
                if not key.startswith("_"):
                    series.setdefault(key, []).append((items["_step"], value))
    return name, series


def of_mlflow(run: RunDir) -> tuple[str, Series]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{run.path.parents[2] / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("s")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.data.params["optim.betas"] == "[0.9, 0.95]"
    history = {key: client.get_metric_history(found.info.run_id, key) for key in found.data.metrics}
    series = {key: sorted((m.step, m.value) for m in points) for key, points in history.items()}
    return found.info.run_id, series


def killed(work: Callable[[], None]) -> None:
    """Do it in a process of its own that SIGKILL ends."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def survives(run: RunDir, name: str, read: Callable[[RunDir], tuple[str, Series]]) -> None:
    """Kill it at step 70, resume from step 40, resume once more when done: one run, no repeats."""
    metrics = MetricsFile(run.metrics_file)
    metrics.rewind(0)
    killed(lambda: train(start(run, name), metrics, 10, 70))
    saved = MetricsFile(metrics.path)
    saved.rewind(40)
    again = start(run, name)
    train(again, saved, 50, 100)
    again.finalize("success")
    first = read(run)
    assert logged(first[1]) == approx(wanted(saved))
    longer = start(run, name)
    train(longer, saved, 110, 120)
    longer.finalize("success")
    identity, series = read(run)
    assert identity == first[0]
    assert logged(series) == approx(wanted(saved))


def test_tensorboard_holds_what_metrics_csv_holds(run: RunDir) -> None:
    survives(run, "tensorboard", of_tensorboard)


@pytest.mark.slow
def test_wandb_offline_is_one_run_in_one_folder(run: RunDir) -> None:
    survives(run, "wandb", of_wandb)
    earlier = list((run.path / "wandb" / "superseded").iterdir())
    assert len(earlier) == 2  # nothing of an earlier start is lost, nor found by `wandb sync`
    assert of_wandb(run)[0] == loggers.identity(run)


@pytest.mark.slow
def test_mlflow_continues_the_run_it_began(run: RunDir) -> None:
    survives(run, "mlflow", of_mlflow)


def test_a_logger_that_fails_is_reported_once_and_catches_up(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = MetricsFile(run.metrics_file)
    metrics.rewind(0)
    made = start(run, "tensorboard")
    train(made, metrics, 10, 20)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(TensorBoardLogger, "experiment", property(fails))
        train(made, metrics, 30, 50)
        made.retry_at["tensorboard"] = -1.0
        train(made, metrics, 60, 60)
    reported = capsys.readouterr().err
    assert reported.count("warning: logger tensorboard failed") == 1
    assert reported.count("\n") == 1
    train(made, metrics, 70, 80)  # not yet retried
    made.finalize("success")
    series = of_tensorboard(run)[1]
    assert logged(series) == approx(wanted(metrics))


def test_processes_that_log_nothing_make_nothing(run: RunDir) -> None:
    start(run, "tensorboard").finalize("success")
    assert {path.name for path in run.path.iterdir()} == {"config.yaml", "manifest.json"}


def test_unknown_loggers_and_settings_are_refused(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    for nodes, message in (
        ({"neptune": {}}, "logger 'neptune' is unknown"),
        ({"wandb": {"settings": {"base_url": "http://x"}}}, "no setting 'settings'"),
        ({"mlflow": {"tracking_uri": "http://x"}}, "no setting 'tracking_uri'"),
        ({"tensorboard": {"_target_": "os.system"}}, "no setting '_target_'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_loggers(OmegaConf.create({"execution": {"logger": nodes}}), run)
    assert make_loggers(OmegaConf.create({"execution": {"logger": {}}}), run) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[wandb\]'"):
        start(run, "wandb")
