"""A run that is stopped and goes on is logged once; loggers can be filled after training."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from experiments.config.entry import RunFailed
from experiments.relog import relog
from experiments.runs.metrics import MetricsFile
from experiments.runs.run_dir import RunDir
from experiments.training import loggers

from .conftest import Series, StandIn, approx, of_tensorboard, wanted


def of_mlflow_of_a_run(run: RunDir) -> tuple[str, Series]:
    (one,) = StandIn.runs.values()
    assert one.info.status == "FINISHED"
    return one.info.run_id, {
        key: [(metric.step, metric.value) for metric in points]
        for key, points in one.data.history.items()
    }


def test_a_run_that_is_stopped_and_goes_on_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: type[StandIn]
) -> None:
    """Through the trainer: stopped by a signal at step 8 and killed at step 13 of 20."""
    from hydra import compose, initialize_config_dir

    from experiments.config.entry import CONF_DIR
    from experiments.training.fit import fit

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
    relog(cfg)
    assert [one.info.status for one in stand_in.runs.values()] == ["FAILED"]  # not at its end yet
    (run.path / "result.json").write_text("{}")
    with run.claim(), pytest.raises(RunFailed, match=f"not logged.*{run.path.name}"):
        relog(cfg)
    for _ in range(2):
        relog(cfg)
        assert of_mlflow_of_a_run(run)[1]["train/loss"] == [(10, 0.1), (20, 0.05)]
    printed = capsys.readouterr()
    assert printed.out.count("logged") == 3
    assert "another process is training" in printed.err
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
