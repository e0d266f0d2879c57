"""bench=train, loss and overhead: their arithmetic, and that they run at toy size."""

import inspect
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import initialize_config_dir

from experiments.benchmarks import train as bench_train
from experiments.benchmarks.loss import TOY, loss
from experiments.benchmarks.overhead import Loops, overhead
from experiments.benchmarks.train import build_model, matmul_flops, train
from experiments.config.entry import CONF_DIR
from experiments.training.run_log import MetricsFile
from models.language_model import count_parameters

SIZES = bench_train.TOY


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is measured in fresh processes, which take seconds to start; one test does."""

    def peak(build: Callable[..., Any], toy: dict[str, Any], full: dict[str, Any]) -> int:
        assert build(**toy) is not None
        return {"rwkv4": 10, "gpt": 20, "hf_rwkv": 40, "hf_gpt_neox": 20}.get(full["kind"], 1)

    monkeypatch.setattr("experiments.benchmarks.train.peak_memory", peak)
    monkeypatch.setattr("experiments.benchmarks.loss.peak_memory", peak)


@pytest.fixture
def small_matmuls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_train, "MATMUL_SIZES", (8, 16))


@pytest.mark.usefixtures("no_processes", "small_matmuls")
def test_train_compares_four_models() -> None:
    report = train(**SIZES, wide_n_embd=32, repeats=2, warmup=1)
    speeds, shares, rates, bars = report.tables.values()
    assert [row["model"] for row in speeds] == list(bench_train.NAMES.values())
    for row in speeds:
        assert row["tokens_per_s"] * row["step_s"] == pytest.approx(2 * 8)
    assert len(shares) == len(rates) == 4
    best = max(rate["GFLOP/s"] for rate in rates if rate["precision"] == "32-true")
    assert shares[0]["share"] == pytest.approx(shares[0]["GFLOP/s"] / best)
    assert [row["wanted"] for row in bars] == [
        ">= 3.5", ">= 0.85", ">= 1.1", "<= 0.5", ">= 0.6", ">= 0.6", ">= 0.4", ">= 0.4"
    ]  # fmt: skip
    assert bars[3]["measured"] == 0.25
    assert all(row["measured"] > 0 for row in bars)
    assert report.text()


@pytest.mark.usefixtures("no_processes", "small_matmuls")
def test_train_without_hugging_face_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_train, "find_spec", lambda name: None)
    report = train(**SIZES, wide_n_embd=32, repeats=1, warmup=1)
    speeds, *_, bars = report.tables.values()
    assert [row["model"] for row in speeds] == ["RWKV-4", "GPT"]
    assert [row["met"] is None for row in bars[:4]] == [True, False, True, True]
    assert "transformers is not installed" in report.notes[0]


def test_train_ratios_are_ours_over_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"rwkv4": [1.0], "gpt": [0.9], "hf_rwkv": [4.0], "hf_gpt_neox": [1.8]}
    monkeypatch.setattr(bench_train, "interleaved", lambda *args, **kwargs: seconds)
    monkeypatch.setattr(bench_train, "peak_memory", lambda *args: 7)
    _, bars = bench_train.speed(list(seconds), SIZES, repeats=1, warmup=1)
    assert [row["measured"] for row in bars] == pytest.approx([4, 0.9, 2, 1])


def test_the_models_compared_have_the_same_size() -> None:
    counts = {}
    for kind in bench_train.NAMES:
        model, nats = build_model(kind, **SIZES)
        counts[kind] = count_parameters(model)["total"]
        ids = torch.randint(SIZES["vocab_size"], (2, 9))
        loss = nats(ids[:, :-1], ids[:, 1:])
        assert loss.shape == ()
        assert 3 < loss.item() < 6  # near ln 64 before training
    assert counts["rwkv4"] == counts["hf_rwkv"]
    assert counts["gpt"] == counts["hf_gpt_neox"]


@pytest.mark.parametrize("n_embd", [256, 512])
def test_the_families_compared_match_at_the_default_shape(n_embd: int) -> None:
    sizes = SIZES | {"n_layer": 6, "n_embd": n_embd, "n_head": 8, "vocab_size": 4096}
    with torch.device("meta"):
        gpt, rwkv4 = (build_model(kind, **sizes)[0] for kind in ("gpt", "rwkv4"))
    total = count_parameters(rwkv4)["total"]
    assert count_parameters(gpt)["total"] == pytest.approx(total, rel=1e-3)


def test_matmul_flops_of_a_step_by_hand() -> None:
    # forward multiply-adds a token: head 64 x 16, two layers of 13 x 16^2; 16 tokens, 3 passes
    assert matmul_flops("rwkv4", SIZES) == 3 * 16 * 2 * (64 * 16 + 2 * 13 * 16**2)


def test_training_step_trains() -> None:
    for kind, precision in (("rwkv4", "bf16-mixed"), ("hf_gpt_neox", "32-true")):
        step = bench_train.training_step(kind, precision, **SIZES)
        for _ in range(2):
            step()
        cells = inspect.getclosurevars(step).nonlocals
        assert all(state["step"] == 2 for state in cells["optimizer"].state.values())
        with torch.no_grad():
            before = float(cells["loss"](cells["ids"], cells["targets"]))
        for _ in range(20):
            step()
        with torch.no_grad():
            assert float(cells["loss"](cells["ids"], cells["targets"])) < before


@pytest.fixture
def train_overrides(tmp_path: Path) -> Iterator[list[str]]:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the hat. " * 400)
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        yield [
            "model=rwkv4_pico", "data=text", f"data.source.paths={text}", "data.val_tokens=256",
            "ctx_len=16", "batch_size=2", f"paths.data={tmp_path}", "log_every=2",
        ]  # fmt: skip


def test_both_loops_do_the_same_maths(train_overrides: list[str], tmp_path: Path) -> None:
    loops = Loops([*train_overrides, "optim=own"], 5, str(tmp_path / "runs"))
    assert loops.lightning() > 0
    logged = loops.model
    log = MetricsFile(loops.run.path / "metrics.csv")
    assert [step for step, _ in log.column("train/loss")] == [2, 4, 5]
    assert loops.bare() > 0
    assert loops.model is not logged
    for mine, theirs in zip(loops.model.parameters(), logged.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_overhead_is_a_share_of_the_bare_step(
    train_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loops, "bare", lambda self: 2.0)
    monkeypatch.setattr(Loops, "lightning", lambda self: 2.06)
    loops, (wanted,) = overhead(train_overrides, n_steps=4, repeats=2).tables.values()
    assert [row["step_s"] for row in loops] == pytest.approx([1.0, 1.03])
    assert loops[0]["tokens_per_s"] == pytest.approx(2 * 16)
    assert wanted["measured"] == pytest.approx(0.03)
    assert wanted["met"] is True


def test_overhead_needs_steps_to_time() -> None:
    with pytest.raises(ValueError, match="n_steps is 2"):
        overhead([], n_steps=2, repeats=1)


@pytest.mark.usefixtures("no_processes")
def test_loss_compares_with_full() -> None:
    (rows,) = loss(**TOY, repeats=2).tables.values()
    kinds = [(row["precision"], row["loss"]) for row in rows]
    assert kinds == list(product(("32-true", "bf16-mixed"), ("full", "chunked")))
    assert [row["time_over_full"] for row in rows if row["loss"] == "full"] == [1, 1]
    assert all(row["seconds"] > 0 for row in rows)
