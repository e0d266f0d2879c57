"""doctor: one screen that tells the truth, and an exit code of 0 only where training can run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments import bench_wkv, doctor
from experiments.bench_measure import interleaved
from models.ops import cpu

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "machine", lambda device: iter([("device", device)]))
    monkeypatch.setattr(
        "experiments.bench_measure.interleaved",
        lambda candidates, repeats, warmup=1: interleaved(candidates, 1, 0),
    )


def screen(problems: list[str]) -> str:
    return "\n".join(
        f"{heading} {text}" for heading, text in doctor.examine(Path("runs"), problems)
    )


def test_all_is_well() -> None:
    problems: list[str] = []
    text = screen(problems)
    assert problems == []
    live = re.findall(r"WKV cpu (\w+) +live", text)
    assert live == ["torch" if cpu.missing() else "cpu"]
    assert "WKV cpu reference  ok" in text
    assert re.search(r"WKV cpu cuda +no +it runs on NVIDIA GPUs", text)
    assert "offline by HF_HUB_OFFLINE" in text
    assert len(re.findall("a step works", text)) == 2
    assert len(text.splitlines()) < 40


def test_a_rung_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_wkv.wkv

    def wrong(w, u, k, v, state=None, backend="auto"):  # type: ignore[no-untyped-def]
        y, last = right(w, u, k, v, state, backend)
        return (y * 1.001 if backend == "cpu" else y), last

    monkeypatch.setattr(bench_wkv, "wkv", wrong)
    if cpu.missing():
        pytest.skip("no C++ compiler")
    problems: list[str] = []
    text = screen(problems)
    assert problems == ["the WKV backend 'cpu' gives wrong results on cpu"]
    assert re.search(r"WKV cpu cpu +live +FAILED", text)
    assert "WKV cpu torch      ok" in text


def test_a_step_that_fails_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    problems: list[str] = []
    lines = list(doctor.training_step("gpt", "cpu", problems))
    assert lines == [("training", "gpt on cpu: FAILED")]
    assert "a step of gpt fails on cpu: losses" in problems[0]


def test_hub_that_does_not_answer_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://localhost:9")
    assert "localhost does not answer" in doctor.hub()


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_command(tmp_path: Path, broken: bool) -> None:
    """As a user runs it; without a compiler the torch rung is live and training can run."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    if broken:
        environment["CXX"] = "/nowhere/c++"
    done = subprocess.run(
        [sys.executable, "-m", "experiments.doctor", "n_threads=1"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("training can run")
    if broken:
        assert "CXX=/nowhere/c++ is not there" in done.stdout
        assert re.search(r"torch +live", done.stdout)
