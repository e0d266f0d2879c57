"""The train command in processes of its own: kill -9, signals, errors of one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.runs.run_dir import RunDir
from experiments.sweeps.one_run import train

from ...small_runs import ROOT, command, freeze_in, rows, same, weights


@pytest.mark.slow
def test_kill_minus_nine_then_the_same_command(tmp_path: Path, text: Path) -> None:
    more = ["model=rwkv4", "budget_tokens=25600", "execution.checkpoint_every_min=0.000001"]
    args = command(tmp_path / "runs", text, *more)
    child = subprocess.Popen(args, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    metrics: list[Path] = []
    while not metrics or metrics[0].read_text().count("\n") < 20:
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.05)
        metrics = list((tmp_path / "runs").glob("*/*/*/metrics.csv"))
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    again = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    killed = RunDir(metrics[0].parent)
    straight = subprocess.run(command(tmp_path / "straight", text, *more), cwd=ROOT)
    assert straight.returncode == 0
    other = RunDir(next((tmp_path / "straight").glob("*/*/*")))
    assert rows(killed) == rows(other)
    assert same(weights(killed), weights(other))


@pytest.mark.slow
def test_command_line_errors_are_one_line(tmp_path: Path, text: Path) -> None:
    for overrides in (["modell=x"], ["model=rwkv5"], ["execution.backend=cpu", "model=gpt"]):
        args = command(tmp_path / "runs", text, *overrides)
        done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2, (overrides, done.stderr)
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
    assert not list((tmp_path / "runs").glob("debug/*/*"))


@pytest.mark.slow
def test_signals_to_all_processes_of_a_run_with_workers(tmp_path: Path, text: Path) -> None:
    """As a terminal, torchrun or srun send them; and one that comes while modules are imported."""
    run = freeze_in(tmp_path / "runs", text, "execution.num_workers=2", "budget_tokens=1e8")
    fit = [sys.executable, "-m", "experiments.fit", str(run.path)]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            fit, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    child = start()
    time.sleep(0.7)
    child.send_signal(signal.SIGINT)
    assert "Traceback" not in child.communicate(timeout=120)[1]
    assert child.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    n_rows = 0
    for number, code in ((signal.SIGUSR1, 75), (signal.SIGTERM, 143), (signal.SIGINT, 130)):
        child = start()
        deadline = time.monotonic() + 120
        while len(rows(run)) < n_rows + 3:
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.05)
        os.killpg(child.pid, number)
        assert "saved; the same command resumes it" in child.communicate(timeout=120)[1]
        assert child.returncode == code
        n_rows = len(rows(run))


@pytest.mark.slow
def test_bad_input_removes_no_training(tmp_path: Path, text: Path) -> None:
    run = freeze_in(tmp_path / "runs", text, "ctx_len=100000", "budget_tokens=1e9")
    last = run.path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    last.touch()
    assert train(run) == 2
    assert last.exists()
    last.unlink()
    assert train(run) == 2
    assert not run.path.exists()
