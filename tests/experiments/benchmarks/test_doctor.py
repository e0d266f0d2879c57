"""The doctor: what it says of a machine that is well, and of ones that are not."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiments import doctor
from experiments.benchmarks import diagnosis, self_test
from experiments.benchmarks.self_test import Tried
from models.families import families
from models.language_model import LanguageModel
from models.ops.wkv import wkv

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A problem of few steps, and no measuring."""
    monkeypatch.setattr(self_test, "SHAPE", (2, 20, 9))
    monkeypatch.setattr(diagnosis, "measured_flops", lambda device, dtype: 1e11)
    monkeypatch.setattr(diagnosis, "copy_rate", lambda device: 1e10)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def break_backend(monkeypatch: pytest.MonkeyPatch, name: str, how: Callable[[Any], Any]) -> None:
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
    for family in families().values():
        assert f"{family.label:<11}an optimizer step works" in text
    assert "100 GFLOP/s       100 GFLOP/s       10 GB/s" in text
    assert "offline by HF_HUB_OFFLINE" in text
    assert not list(tmp_path.iterdir())  # it looks, and leaves nothing


@pytest.mark.usefixtures("small")
def test_a_backend_that_is_wrong_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    break_backend(monkeypatch, "torch", lambda y: y * 1.01)
    assert run_main(monkeypatch, f"paths.runs={tmp_path}") == 1
    out, err = capsys.readouterr()
    assert err == "error: training cannot be trusted here: WKV backend torch on cpu\n"
    assert "1.0e-02 FAILED" in out
    assert "training can run" not in out


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("how", [lambda y: y * float("nan"), lambda y: y.no_such_thing])
def test_a_backend_that_gives_nan_or_raises_fails(
    monkeypatch: pytest.MonkeyPatch, how: Callable[[Any], Any], tmp_path: Path
) -> None:
    break_backend(monkeypatch, "reference", how)
    found = diagnosis.examine(tmp_path)
    assert found.failures == ["WKV backend reference on cpu"]
    assert sum("FAILED" in line for line in found.lines) == 1


@pytest.mark.usefixtures("small")
def test_every_backend_is_tried_or_said_to_be_missing() -> None:
    found = self_test.backends(CPU)
    assert [tried.name for tried in found] == ["cuda", "cpu", "torch", "reference"]
    for tried in found:
        assert tried.ok
        assert (tried.missing is None) == (len(tried.errors) == len(self_test.DTYPES))
    assert "NVIDIA GPUs" in str(found[0].missing)


def test_what_is_within_the_tolerance() -> None:
    limits = self_test.TOLERANCES
    assert Tried("cpu", errors=limits).ok
    assert not Tried("cpu", errors=limits | {torch.bfloat16: 2 * limits[torch.bfloat16]}).ok
    assert not Tried("cpu", errors={torch.float32: float("nan")}).ok
    assert not Tried("cpu", broken="no").ok
    assert Tried("cuda", missing="no GPU").ok


@pytest.mark.parametrize("family", families().values(), ids=lambda family: family.name)
def test_a_parameter_without_a_gradient_fails(family: Any) -> None:
    def with_a_stray() -> LanguageModel:
        model = family.toy()
        model.stray = torch.nn.Parameter(torch.zeros(3))
        return model

    assert self_test.step(family, CPU) is None
    said = self_test.step(replace(family, toy=with_a_stray), CPU)
    assert said == "stray has no finite gradient"


def test_gpus_of_a_kind_share_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [("A", 80), ("A", 80), ("B", 24)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda i: SimpleNamespace(name=cards[i][0], total_memory=cards[i][1] << 30),
    )
    found = {str(device): text for device, text in diagnosis.devices().items() if device != CPU}
    assert found == {"cuda:0": "A, 80 GiB (2 of them)", "cuda:2": "B, 24 GiB"}


def at_hub(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


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
        said = diagnosis.hub()
    assert said.endswith("answers" if status == 200 else "answers with HTTP 403")


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
    for wrong in (address, "no address at all"):  # nobody listens there any more
        at_hub(monkeypatch, wrong)
        assert "cannot be reached" in diagnosis.hub()


@pytest.mark.slow
def test_without_a_compiler_training_can_run(tmp_path: Path) -> None:
    clean = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    env = clean | {"CXX": "/nowhere", "XDG_CACHE_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    args = [sys.executable, "-m", "experiments.doctor", f"paths.runs={tmp_path}", "n_threads=1"]
    done = subprocess.run(args, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar where nobody watches, no warning
    assert "works on the torch backend (right, but slower)" in done.stdout
    assert done.stdout.count("C++ compiler") == 2
    assert done.stdout.endswith("\ntraining can run\n")
