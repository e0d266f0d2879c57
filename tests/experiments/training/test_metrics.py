"""metrics.csv: rewinding, the summary, speed without validations."""

import csv
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.runs.metrics import MetricsFile, summarise
from experiments.runs.run_dir import RunDir
from experiments.training.fit import fit


def test_metrics_rewind_drops_what_is_trained_again_and_a_cut_line(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv")
    metrics.rewind(0)
    for step in range(1, 6):
        metrics.append({"step": step, "tokens": step, "train/loss": 1 / step})
    with open(metrics.path, "a") as file:
        file.write("6,6,0.1,1e-")
    assert [row["step"] for row in metrics.rows()] == list("12345")
    assert MetricsFile(tmp_path / "none").rows() == []
    (tmp_path / "damaged").write_bytes(b"\xff\xfe\x00")
    assert MetricsFile(tmp_path / "damaged").rows() == []
    metrics.rewind(3)
    metrics.append({"step": 4, "tokens": 4, "val/loss": 2.0})
    with open(metrics.path, newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["step"] for row in table] == list("1234")
    assert metrics.column("train/loss")[-1] == (3, pytest.approx(1 / 3))
    assert table[-1]["val/loss"] == "2"


def test_summary_of_a_run_by_hand(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv")
    metrics.rewind(0)
    speeds = {"perf/mfu": 0.5, "perf/peak_mem_bytes": 7}
    for step, speed in ((1, 10.0), (2, 30.0), (3, 20.0)):
        metrics.append(
            {"step": step, "tokens": 8 * step, "train/loss": 9.0 - step, "perf/tokens_per_s": speed}
            | speeds
        )
    metrics.append({"step": 2, "tokens": 16, "val/loss": 1.0, "val/bpb": 1.5, "time_s": 2.0})
    metrics.append({"step": 3, "tokens": 24, "val/loss": 2.0, "val/bpb": 3.0, "time_s": 4.0})
    assert summarise(metrics, flops_per_token=100) == {
        "step": 3,
        "tokens": 24,
        "flops": 2400,
        "time_s": 4.0,
        "train/loss": 6.0,
        "val/loss": 2.0,
        "val/bpb": 3.0,
        "best": {"step": 2, "val/loss": 1.0, "val/bpb": 1.5},
        "perf/tokens_per_s": 20.0,
        "perf/mfu": 0.5,
        "perf/peak_mem_bytes": 7,
    }


def test_tokens_per_second_by_a_fake_clock(
    freeze: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock moves 2 s a training step and 100 s a validation, which must not count."""
    now = [0.0]
    monkeypatch.setattr(
        "experiments.training.run_log.time",
        SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: 0.0),
    )
    from experiments.training.module import LitLM

    step, validate = LitLM.training_step, LitLM.validation_step

    def slow_step(self, *args):  # type: ignore[no-untyped-def]
        now[0] += 2
        return step(self, *args)

    def slow_validation(self, *args):  # type: ignore[no-untyped-def]
        now[0] += 100
        return validate(self, *args)

    monkeypatch.setattr(LitLM, "training_step", slow_step)
    monkeypatch.setattr(LitLM, "validation_step", slow_validation)
    run = freeze("execution.log_every=5")
    fit(run)
    speeds = MetricsFile(run.path / "metrics.csv").column("perf/tokens_per_s")
    assert [s for _, s in speeds] == [4 * 64 / 2] * 4
    assert run.result is not None
    assert run.result["time_s"] == 40
