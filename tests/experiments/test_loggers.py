"""TensorBoard, W&B and MLflow beside metrics.csv: one identity a run, and the same series."""

import importlib.util
import json
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf

from experiments import loggers
from experiments.entry import RunFailed
from experiments.loggers import Loggers, make_loggers
from experiments.metrics import MetricsFile
from experiments.relog import relog
from experiments.run_dir import RunDir, write_json

SETTINGS: dict[str, dict[str, Any]] = {
    "tensorboard": {},
    "wandb": {"project": "p", "group": "s", "entity": None, "tags": None},
    "mlflow": {"experiment_name": "s"},
}
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


def start(run: RunDir, name: str) -> Loggers:
    made = make_loggers(OmegaConf.create({"logger": {name: SETTINGS[name]}}), run)
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


def wanted(metrics: MetricsFile) -> Series:
    names = ("lr", "train/loss", "val/loss", "val/bpb")  # each once a step
    return {name: metrics.column(name) for name in names}


def of_tensorboard(run: RunDir) -> tuple[str, Series]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "tensorboard"), {"scalars": 0})
    events.Reload()
    keys = [key for key in events.Tags()["scalars"] if key != "hp_metric"]
    series = {key: [(e.step, e.value) for e in events.Scalars(key)] for key in keys}
    return str(run.path / "tensorboard"), series


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


def killed(work: Callable[[], None]) -> None:
    """Do it in a process of its own that SIGKILL ends."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def in_memory(work: Callable[[], None]) -> None:
    work()


def survives(
    run: RunDir,
    name: str,
    read: Callable[[RunDir], tuple[str, Series]],
    dies: Callable[[Callable[[], None]], None] = killed,
) -> None:
    """Kill it at step 70, go on from step 40, go on once more when done: one run, no repeats."""
    metrics = MetricsFile(run.path / "metrics.csv")
    metrics.rewind(0)
    dies(lambda: train(start(run, name), metrics, 10, 70))
    saved = MetricsFile(metrics.path)
    saved.rewind(40)
    again = start(run, name)
    train(again, saved, 50, 100)
    again.finalize("success")
    first = read(run)
    assert {k: v for k, v in first[1].items() if k in wanted(saved)} == approx(wanted(saved))
    longer = start(run, name)
    train(longer, saved, 110, 120)
    longer.finalize("success")
    identity, series = read(run)
    assert identity == first[0]
    assert {k: v for k, v in series.items() if k in wanted(saved)} == approx(wanted(saved))


def approx(series: Series) -> Any:
    """Steps exactly, values as float32 keeps them."""
    return {
        key: [(step, pytest.approx(value, rel=1e-6)) for step, value in points]
        for key, points in series.items()
    }


def test_tensorboard_holds_what_metrics_csv_holds(run: RunDir) -> None:
    survives(run, "tensorboard", of_tensorboard)


@pytest.mark.slow
def test_wandb_offline_is_one_run_in_one_folder(run: RunDir) -> None:
    pytest.importorskip("wandb", reason="W&B is not installed: pip install -e '.[wandb]'")
    survives(run, "wandb", of_wandb)
    earlier = list((run.path / "wandb" / "superseded").iterdir())
    assert len(earlier) == 2  # nothing of an earlier start is lost, nor found by `wandb sync`
    assert of_wandb(run)[0] == loggers.identity(run)


def test_mlflow_goes_on_with_the_run_it_began(run: RunDir, stand_in: type[StandIn]) -> None:
    survives(run, "mlflow", of_mlflow, dies=in_memory)
    assert [one.info.status for one in stand_in.runs.values()] == ["FINISHED"]


@pytest.mark.slow
def test_mlflow_itself_goes_on_with_the_run_it_began(run: RunDir) -> None:
    pytest.importorskip("mlflow", reason="MLflow is not installed: pip install -e '.[mlflow]'")
    survives(run, "mlflow", of_mlflow)


def test_wandb_online_gets_each_step_once(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Online W&B says how far it came; what it has is not sent again, what it lacks is."""
    logged: list[int] = []
    package = ModuleType("wandb")
    package.__spec__ = importlib.util.spec_from_loader("wandb", None)
    package.init = lambda **settings: SimpleNamespace(  # type: ignore[attr-defined]
        step=logged[-1] + 1 if logged else 0,
        log=lambda values, step: logged.append(step),
        finish=lambda exit_code: None,
    )
    monkeypatch.setitem(sys.modules, "wandb", package)
    metrics = MetricsFile(run.path / "metrics.csv")
    metrics.rewind(0)
    train(start(run, "wandb"), metrics, 10, 50)
    del logged[-1:]  # the last did not reach it
    metrics = MetricsFile(metrics.path)
    metrics.rewind(30)
    train(start(run, "wandb"), metrics, 40, 70)
    assert sorted(set(logged)) == [10, 20, 30, 40, 50, 60, 70]
    assert logged == sorted(logged)


def test_a_logger_that_fails_is_told_once_and_caught_up(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = MetricsFile(run.path / "metrics.csv")
    metrics.rewind(0)
    made = start(run, "tensorboard")
    train(made, metrics, 10, 20)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(TensorBoardLogger, "experiment", property(fails))
        train(made, metrics, 30, 50)
        patch.setattr(loggers, "RETRY_S", 0.0)
        made.followers[0].retry_at = -1.0
        train(made, metrics, 60, 60)
    made.followers[0].retry_at = -1.0
    told = capsys.readouterr().err
    assert told.count("warning: logger tensorboard failed") == 1
    assert "No space left" in told
    assert told.count("\n") == 1
    train(made, metrics, 70, 80)
    made.finalize("success")
    series = of_tensorboard(run)[1]
    assert {k: v for k, v in series.items() if k in wanted(metrics)} == approx(wanted(metrics))


def test_a_failed_logger_is_left_alone_when_the_time_is_up(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    class Down(loggers.TensorBoard):
        def open(self) -> None:
            tries.append(1)
            raise ConnectionError("no network")

    monkeypatch.setitem(loggers.SERVICES, "tensorboard", Down)
    metrics = MetricsFile(run.path / "metrics.csv")
    metrics.rewind(0)
    made = start(run, "tensorboard")
    train(made, metrics, 10, 90)
    assert len(tries) == 1
    try:
        raise SystemExit(75)
    except SystemExit:
        made.finalize("failed")
    assert len(tries) == 1
    made.finalize("success")
    assert len(tries) == 2


def test_processes_that_log_nothing_make_nothing(run: RunDir) -> None:
    start(run, "tensorboard").finalize("success")
    assert {path.name for path in run.path.iterdir()} == {"config.yaml", "manifest.json"}


def test_how_a_run_ended(run: RunDir, stand_in: type[StandIn]) -> None:
    metrics = MetricsFile(run.path / "metrics.csv")
    metrics.rewind(0)
    for error, status in ((SystemExit(143), "KILLED"), (ValueError("x"), "FAILED")):
        made = start(run, "mlflow")
        train(made, metrics, 10, 10)
        try:
            raise error
        except BaseException:
            made.finalize("failed")
        assert [one.info.status for one in stand_in.runs.values()] == [status]


def test_unknown_loggers_and_settings_are_refused(run: RunDir) -> None:
    for nodes, message in (
        ({"neptune": {}}, "logger 'neptune' is unknown"),
        ({"wandb": {"settings": {"base_url": "http://x"}}}, "no setting 'settings'"),
        ({"mlflow": {"tracking_uri": "http://x"}}, "no setting 'tracking_uri'"),
        ({"tensorboard": {"_target_": "os.system"}}, "no setting '_target_'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_loggers(OmegaConf.create({"logger": nodes}), run)
    assert make_loggers(OmegaConf.create({"logger": {}}), run) is None


def test_a_package_that_is_missing_is_named_before_training(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[wandb\]'"):
        start(run, "wandb")


def test_a_run_that_is_stopped_and_goes_on_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: type[StandIn]
) -> None:
    """Through the trainer: stopped by a signal at step 8 and killed at step 13 of 20."""
    from hydra import compose, initialize_config_dir

    from experiments.entry import CONF_DIR
    from experiments.fit import fit

    (tmp_path / "a.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(900)))
    given = ["data=text", "debug=smoke", "trainer=cpu", "model=rwkv4_pico", "logger=tensorboard"]
    given += [f"data.source.paths={tmp_path / 'a.txt'}", "data.val_tokens=300", "suite=s"]
    given += [f"paths.{name}={tmp_path / name}" for name in ("runs", "data")]
    given += ["checkpoint_every_min=0.0001", "+logger.mlflow.experiment_name=s"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        run = RunDir.freeze(compose("train", overrides=given), [])
    append = MetricsFile.append

    def disturbed(self: MetricsFile, row: dict[str, Any]) -> None:
        append(self, row)
        if row["step"] == 8 and not self.path.with_name("once").exists():
            self.path.with_name("once").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        if row["step"] == 13 and not self.path.with_name("twice").exists():
            self.path.with_name("twice").touch()
            raise MemoryError  # nothing is saved any more

    monkeypatch.setattr(MetricsFile, "append", disturbed)
    with pytest.raises(SystemExit) as stopped:
        fit(run)
    assert stopped.value.code == 143
    assert [one.info.status for one in stand_in.runs.values()] == ["KILLED"]
    with pytest.raises(MemoryError):
        fit(run)
    fit(run)
    expected = wanted(MetricsFile(run.path / "metrics.csv"))
    assert [step for step, _ in expected["train/loss"]] == list(range(1, 21))
    for read in (of_tensorboard, of_mlflow_of_a_run):
        series = read(run)[1]
        assert {k: v for k, v in series.items() if k in expected} == approx(expected)


def of_mlflow_of_a_run(run: RunDir) -> tuple[str, Series]:
    (one,) = StandIn.runs.values()
    assert one.info.status == "FINISHED"
    return one.info.run_id, {
        key: [(metric.step, metric.value) for metric in points]
        for key, points in one.data.history.items()
    }


def test_loggers_are_filled_after_training(
    run: RunDir, capsys: pytest.CaptureFixture[str], stand_in: type[StandIn]
) -> None:
    metrics = MetricsFile(run.path / "metrics.csv")
    metrics.rewind(0)
    for step in (10, 20):
        metrics.append({"step": step, "tokens": 64 * step, "time_s": 1.0, "train/loss": 1 / step})
    cfg = OmegaConf.create(
        {"run": str(run.path), "suite": None, "logger": {"mlflow": {"experiment_name": "${suite}"}}}
    )
    for _ in range(2):
        relog(cfg)
        assert of_mlflow_of_a_run(run)[1]["train/loss"] == [(10, 0.1), (20, 0.05)]
    assert capsys.readouterr().out.count("logged") == 2
    assert list(stand_in.experiments) == ["s"]
    with pytest.raises(ValueError, match="say where to log"):
        relog(OmegaConf.create({"run": str(run.path), "suite": None, "logger": {}}))


def test_a_logger_that_cannot_be_filled_is_a_failure(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Down(loggers.TensorBoard):
        def open(self) -> None:
            raise ConnectionError("no network")

    monkeypatch.setitem(loggers.SERVICES, "tensorboard", Down)
    MetricsFile(run.path / "metrics.csv").rewind(0)
    settings = {"run": str(run.path), "suite": None, "logger": {"tensorboard": {}}}
    with pytest.raises(RunFailed, match="not logged"):
        relog(OmegaConf.create(settings))
    assert "no network" in capsys.readouterr().err
