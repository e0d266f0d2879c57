"""bench=decode at toy size: what its tables hold, and that its arithmetic and check are real."""

import os
from importlib.util import find_spec

import pytest
import torch

from experiments.benchmarks import decode as bench_decode
from experiments.benchmarks.decode import (
    PACKAGE,
    Contender,
    check_agreement,
    decode,
    decoding,
    our_own,
    random_model,
    weight_bytes,
)
from experiments.config.entry import RunFailed

SIZES = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "ctx_len": 40}
TOY = {
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "vocab_size": 50,
    "prompt_tokens": 5,
    "lengths": [3, 20],
    "batch_size": 9,
    "n_tokens": 2,
    "stream_mb": 1,
    "repeats": 1,
}


@pytest.mark.slow  # the other libraries take seconds to load
def test_report() -> None:
    environment = dict(os.environ)
    report = decode(**TOY)  # type: ignore[arg-type]
    assert dict(os.environ) == environment
    rows, prompts, bars = report.tables.values()
    ours = [(row["model"], row["dtype"], row["batch"], row["tokens before"]) for row in rows]
    assert ours[:6] == [
        ("RWKV-4", "fp32", 1, 16), ("RWKV-4", "bf16", 1, 16),
        ("GPT", "fp32", 1, 3), ("GPT", "fp32", 1, 20),
        ("GPT", "bf16", 1, 3), ("GPT", "bf16", 1, 20),
    ]  # fmt: skip
    assert ours[-2:] == [("RWKV-4", "fp32", 9, 16), ("GPT", "fp32", 9, 16)]
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["step_ms"] * 1e3)
        assert row["of limit"] == pytest.approx(row["limit_ms"] / row["step_ms"])
    assert len(bars) == 4
    package = find_spec("rwkv") is not None
    assert (bars[0]["measured"] is not None) == package
    assert [row["dtype"] for row in prompts] == ["fp32", "bf16"] * (2 + package)
    assert bars[2]["measured"] > 0
    assert report.text()


def test_without_the_other_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_decode, "find_spec", lambda name: None)
    report = decode(**TOY | {"lengths": [3]})  # type: ignore[arg-type]
    rows, prompts, bars = report.tables.values()
    assert {row["model"] for row in [*rows, *prompts]} == {"RWKV-4", "GPT"}
    assert [row["met"] is None for row in bars] == [True, True, False, True]
    assert "The rwkv package is not installed: pip install rwkv" in report.notes


def test_bytes_of_a_step() -> None:
    models = {kind: random_model(kind, SIZES) for kind in ("rwkv4", "gpt")}
    for kind, model in models.items():
        total = sum(p.numel() for p in model.parameters())
        assert weight_bytes(model) == 4 * (total - 50 * 16)
        half = our_own(kind, model, "bf16")
        vectors = sum(p.numel() for p in model.parameters() if p.dim() != 2)
        assert half.weight_bytes == 2 * (total - 50 * 16) + 2 * vectors
        assert model.head.weight.dtype == torch.float32
    cases = [(our_own(kind, models[kind], "fp32"), 2, 5) for kind in models]
    cases += [(our_own("rwkv4", models["rwkv4"], "fp32"), 1, 16)]
    cases += [(our_own("rwkv4", models["rwkv4"], "fp32"), 2, 16)]
    rows, _ = decoding(cases, 1, 1, 1, [])
    assert rows[0]["read_bytes"] == weight_bytes(models["rwkv4"])
    cache = 2 * 5 * 2 * 2 * 16 * 4  # B, t, L, keys and values, C, bytes
    assert rows[1]["read_bytes"] == weight_bytes(models["gpt"]) + cache


def test_another_choice_of_tokens_is_noticed() -> None:
    ours = our_own("rwkv4", random_model("rwkv4", SIZES), "fp32")

    def theirs(change: int) -> Contender:
        def step(ids: torch.Tensor, state: object) -> tuple[torch.Tensor, object]:
            ids, state = ours.step(ids, state)
            return (ids + change) % 50, state

        return Contender(PACKAGE, "fp32", 1, 0, ours.read, step, ours.first)

    check_agreement([ours, theirs(0)], 4)
    with pytest.raises(RunFailed, match="the rwkv package"):
        check_agreement([ours, theirs(1)], 4)


@pytest.mark.parametrize("name", ["n_embd", "batch_size", "n_tokens", "stream_mb", "repeats"])
def test_settings_that_are_not_counts(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0: it must be a whole number"):
        decode(**TOY | {name: 0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lengths is 'a'"):
        decode(**TOY | {"lengths": ["a"]})  # type: ignore[arg-type]
