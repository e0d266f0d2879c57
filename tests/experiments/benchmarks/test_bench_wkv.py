"""bench=wkv at toy size: what its tables hold, and that errors and bars are real."""

import sys

import pytest
import torch

from experiments.benchmarks import wkv as bench_wkv
from experiments.benchmarks.wkv import (
    busy_seconds,
    every_rung,
    inputs,
    thread_gain,
    wkv_op,
    worst_error,
)


def test_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_wkv, "memory", lambda shape: {"what": "memory"})
    report = wkv_op("cpu", [[2, 8, 16], [1, 16, 4]], [4, 8], repeats=1)  # type: ignore[list-item]
    speed, flat, rungs, bars = report.tables.values()
    assert [(row["B, T, C"], row["dtype"]) for row in speed] == [
        ("(2, 8, 16)", "float32"), ("(2, 8, 16)", "float16"), ("(2, 8, 16)", "bfloat16"),
        ("(1, 16, 4)", "float32"),
    ]  # fmt: skip
    for row in speed:
        share = row["both GB/s"] / row["both / copy rate"]
        assert share == pytest.approx(row["forward GB/s"] / row["forward / copy rate"])
        assert row["both_ms"] > 0
    assert [row["B, T, C"] for row in flat] == ["(2, 4, 256)", "(1, 8, 256)"]
    assert [row["rung"] for row in rungs] == ["cuda", "cpu", "torch", "reference"]
    assert all(row["both_ms"] or row["not here"] for row in rungs)
    assert len(bars) == 10
    assert report.text()


def test_errors_are_those_of_the_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < worst_error("torch", torch.float32, "cpu") < 1e-5
    op = sys.modules["models.ops.wkv"]  # the package gives that name to the function
    right = op.wkv_scan
    monkeypatch.setattr(op, "wkv_scan", lambda w, u, *rest: right(w, u + 1e-3, *rest))
    assert worst_error("torch", torch.float32, "cpu") > 1e-4
    rows, _ = every_rung("cpu", (1, 4, 4), 1)
    assert next(row for row in rows if row["rung"] == "torch")["error float32"] > 1e-4


def test_thread_gain_leaves_the_threads_alone() -> None:
    torch.set_num_threads(1)
    assert thread_gain([(2, 4, 64), (1, 32, 8)], 1)["what"].startswith(
        "one thread / two threads at (1, 32, 8)"
    )
    assert torch.get_num_threads() == 1


def test_inputs_have_the_decays_of_a_new_model() -> None:
    w, u, k, v, gy = inputs((2, 3, 5), torch.bfloat16, "cpu")
    assert (-w).log().min() == pytest.approx(-5)
    assert (-w).log().max() == pytest.approx(3)
    assert u.dtype == torch.float32
    assert {x.dtype for x in (k, v, gy)} == {torch.bfloat16}


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="device is 'gpu': use auto or"):
        wkv_op("gpu", [(1, 2, 3)], [2], repeats=1)


def test_busy_seconds_are_told_apart() -> None:
    own, others = busy_seconds()
    while busy_seconds()[0] < own + 0.05:
        pass
    assert busy_seconds()[1] >= others - 0.05
