"""A run that is stopped and resumed is logged once; loggers can be filled after training."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from experiments.config.entry import RunFailed
from experiments.relog import relog
from experiments.runs.metrics import MetricsFile
from experiments.runs.run_dir import RunDir
from experiments.training import loggers
from experiments.training.fit import fit

from .conftest import approx, logged, of_tensorboard, wanted


def test_a_run_that_is_stopped_and_resumed_is_logged_once(
    freeze: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the trainer: stopped by a signal at step 8 and killed at step 13 of 20."""
    run = freeze("logger=tensorboard", "execution.checkpoint_every_min=0.0001")
    append = MetricsFile.append

    to_come = {8: signal.SIGTERM, 13: None}

    def disturbed(self: MetricsFile, row: dict[str, Any]) -> None:
        append(self, row)
        if row["step"] in to_come:
            number = to_come.pop(row["step"])
            if number is None:
                raise MemoryError  # nothing is saved any more
            os.kill(os.getpid(), number)

    monkeypatch.setattr(MetricsFile, "append", disturbed)
    with pytest.raises(SystemExit) as stopped:
        fit(run)
    assert stopped.value.code == 143
    with pytest.raises(MemoryError):
        fit(run)
    fit(run)
    expected = wanted(MetricsFile(run.metrics_file))
    assert [step for step, _ in expected["train/loss"]] == list(range(1, 21))
    series = of_tensorboard(run)[1]
    assert logged(series) == approx(expected)


def settings(run: RunDir, logger: dict[str, Any]) -> DictConfig:
    return OmegaConf.create({"run": str(run.path), "suite": None, "execution": {"logger": logger}})


def test_loggers_are_filled_after_training(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = MetricsFile(run.metrics_file)
    metrics.rewind(0)
    for step in (10, 20):
        metrics.append({"step": step, "tokens": 64 * step, "time_s": 1.0, "train/loss": 1 / step})
    cfg = settings(run, {"tensorboard": {}})
    with run.lock(), pytest.raises(RunFailed, match=f"not logged.*{run.path.name}"):
        relog(cfg)
    for _ in range(2):
        relog(cfg)
        assert of_tensorboard(run)[1]["train/loss"] == approx({"x": [(10, 0.1), (20, 0.05)]})["x"]
    printed = capsys.readouterr()
    assert printed.out.count("logged") == 2
    assert "another process is at" in printed.err
    with pytest.raises(ValueError, match="say where to log"):
        relog(settings(run, {}))

    def down(*args: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(loggers.TensorBoard, "__init__", down)
    with pytest.raises(RunFailed, match="not logged"):
        relog(cfg)
    assert "no network" in capsys.readouterr().err
