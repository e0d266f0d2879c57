"""The doctor: what it says of a machine that is well, and of ones that are not."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiments import doctor
from experiments.benchmarks import self_test
from experiments.benchmarks.self_test import Rung
from models.gpt.model import GPT
from models.ops import cpu
from models.ops.wkv import wkv

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A problem of few steps, and no measuring."""
    monkeypatch.setattr(self_test, "SHAPE", (2, 20, 9))
    monkeypatch.setattr(self_test, "rates", lambda device: [1e11, 2e11, 1e10])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def break_rung(monkeypatch: pytest.MonkeyPatch, name: str, how: Callable[[Any], Any]) -> None:
    def broken(*args: Any) -> Any:
        y, last = wkv(*args)
        return (how(y), last) if args[-1] == name else (y, last)

    monkeypatch.setattr(self_test, "wkv", broken)


def run_main(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> int:
    monkeypatch.setattr(sys, "argv", ["doctor", *overrides])
    try:
        doctor.main()
    except SystemExit as left:
        return left.code  # type: ignore[return-value]
    return 0


@pytest.mark.usefixtures("small")
def test_a_machine_that_is_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_main(monkeypatch, f"paths.runs={tmp_path / 'not' / 'there'}", "n_threads=1") == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert lines[-1] == "training can run"
    assert "FAILED" not in text
    assert text.count(" live") == 1
    assert "100 GFLOP/s       200 GFLOP/s       10 GB/s" in text
    assert "offline by HF_HUB_OFFLINE" in text
    assert not list(tmp_path.iterdir())  # it looks, and leaves nothing


@pytest.mark.usefixtures("small")
def test_a_rung_that_is_wrong_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    break_rung(monkeypatch, "torch", lambda y: y * 1.01)
    assert run_main(monkeypatch, f"paths.runs={tmp_path}") == 1
    out, err = capsys.readouterr()
    assert err == "error: training cannot be trusted here: WKV rung torch on cpu\n"
    assert "1.0e-02 FAILED" in out
    assert "training can run" not in out


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("how", [lambda y: y * float("nan"), lambda y: y.no_such_thing])
def test_a_rung_that_gives_nan_or_raises_fails(
    monkeypatch: pytest.MonkeyPatch, how: Callable[[Any], Any], tmp_path: Path
) -> None:
    break_rung(monkeypatch, "reference", how)
    lines, failures = doctor.examine(tmp_path)
    assert failures == ["WKV rung reference on cpu"]
    assert sum("FAILED" in line for line in lines) == 1


@pytest.mark.usefixtures("small")
def test_every_rung_is_tried_or_said_to_be_missing() -> None:
    live, rungs = self_test.rungs(CPU)
    assert [rung.name for rung in rungs] == ["cuda", "cpu", "torch", "reference"]
    assert live == ("torch" if cpu.missing() else "cpu")
    for rung in rungs:
        assert rung.ok
        assert (rung.missing is None) == (len(rung.errors) == len(self_test.DTYPES))
    assert rungs[0].missing is not None
    assert "NVIDIA GPUs" in rungs[0].missing


def test_gpus_of_a_kind_share_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [("A", 80), ("A", 80), ("B", 24)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda i: SimpleNamespace(name=cards[i][0], total_memory=cards[i][1] << 30),
    )
    assert {str(device): text for device, text in doctor.devices().items() if device != CPU} == {
        "cuda:0": "A, 80 GiB (2 of them)",
        "cuda:2": "B, 24 GiB",
    }


def test_what_is_within_the_tolerance() -> None:
    limits = tuple(self_test.TOLERANCES.values())
    assert Rung("cpu", errors=limits, seconds=(1, 1)).ok
    assert not Rung("cpu", errors=(limits[0], 2 * limits[1]), seconds=(1, 1)).ok
    assert not Rung("cpu", errors=(float("nan"), 0.0), seconds=(1, 1)).ok
    assert not Rung("cpu", broken="no").ok
    assert Rung("cuda", missing="no GPU").ok


def test_a_parameter_without_a_gradient_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_a_stray() -> GPT:
        model = GPT(64, n_layer=1, n_embd=16, n_head=2, ctx_len=32)
        model.stray = torch.nn.Parameter(torch.zeros(3))
        return model

    assert self_test.step("GPT", CPU) is None
    assert self_test.step("RWKV-4", CPU) is None
    monkeypatch.setitem(self_test.TOYS, "GPT", with_a_stray)
    assert self_test.step("GPT", CPU) == "stray has no finite gradient"


def test_rates_are_above_zero() -> None:
    assert all(rate > 0 for rate in self_test.rates(CPU, copied_bytes=1 << 16))


@pytest.mark.parametrize("status", [200, 403])
def test_a_hub_that_answers(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        at_hub(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        said = doctor.hub(timeout_s=10)
    assert said.endswith("answers" if status == 200 else "answers with HTTP 403")


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        at_hub(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        said = doctor.hub(timeout_s=0.2)
        assert "does not answer within 0.2 s" in said or "cannot be reached (timed out" in said
    assert "cannot be reached" in doctor.hub(timeout_s=10)  # closed by now
    at_hub(monkeypatch, "no address at all")
    assert "cannot be reached" in doctor.hub(timeout_s=10)
    monkeypatch.setenv("HF_HUB_OFFLINE", "true")
    assert doctor.hub() == "offline by HF_HUB_OFFLINE"


def at_hub(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.slow
@pytest.mark.parametrize("without", [{"CXX": "/nowhere"}, {"PATH": "/nowhere", "CXX": ""}])
def test_without_a_compiler_training_can_run(tmp_path: Path, without: dict[str, str]) -> None:
    clean = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    env = clean | without | {"XDG_CACHE_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    args = [sys.executable, "-m", "experiments.doctor", f"paths.runs={tmp_path}", "n_threads=1"]
    done = subprocess.run(args, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar where nobody watches, no warning
    live = [line for line in done.stdout.splitlines() if line.endswith(" live")]
    assert [line.split()[1] for line in live] == ["torch"]
    assert "takes the torch rung: right, but slower" in done.stdout
    assert done.stdout.count("C++ compiler") == 2
    assert done.stdout.endswith("\ntraining can run\n")


@pytest.mark.slow
def test_bad_input_is_one_line() -> None:
    args = [sys.executable, "-m", "experiments.doctor", "n_threads=0"]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: n_threads is 0: it must be a whole number of at least 1\n"
