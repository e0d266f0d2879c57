"""The train command in processes of its own: a sweep, kill -9, errors of one line."""

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
def test_sweep_skips_what_is_done_and_lists_what_failed(tmp_path: Path, text: Path) -> None:
    sweep = command(tmp_path, text, "model=rwkv4,gpt", "size=nano", "ctx_len=64,100000", "-m")
    done = subprocess.run(sweep, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2  # how many failed
    assert "2 trained, 0 finished before, 2 failed" in done.stdout
    assert done.stderr.count("failed: ") == 2
    assert "Traceback" not in done.stderr
    results = sorted((tmp_path / "runs" / "debug").glob("*/*/result.json"))
    assert len(results) == 2
    assert not list((tmp_path / "runs").glob("*/*/*100000*"))  # bad input leaves nothing
    before = [path.stat().st_mtime_ns for path in results]
    again = subprocess.run(
        command(tmp_path, text, "model=rwkv4,gpt", "size=nano", "ctx_len=64", "-m"),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    assert "0 trained, 2 finished before, 0 failed" in again.stdout
    assert before == [path.stat().st_mtime_ns for path in results]


@pytest.mark.slow
def test_kill_minus_nine_then_the_same_command(tmp_path: Path, text: Path) -> None:
    overrides = [
        "model=rwkv4",
        "size=nano",
        "budget_tokens=51200",
        "execution.checkpoint_every_min=0.000001",
    ]
    args = command(tmp_path, text, *overrides)
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
    straight = subprocess.run(
        [a.replace(str(tmp_path / "runs"), str(tmp_path / "straight")) for a in args], cwd=ROOT
    )
    assert straight.returncode == 0
    other = RunDir(next((tmp_path / "straight").glob("*/*/*")))
    assert rows(killed) == rows(other)
    assert same(weights(killed), weights(other))


@pytest.mark.slow
def test_command_line_errors_are_one_line(tmp_path: Path, text: Path) -> None:
    for overrides in (
        ["modell=x"],
        ["model=rwkv5"],
        ["nosuch=1"],
        ["budget_tokens=1"],
        ["backprop=truncated"],
        ["execution.backend=cuda"],  # not on a CPU
        ["execution.backend=cpu", "model=gpt"],
    ):
        done = subprocess.run(
            command(tmp_path, text, *overrides), cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 2, (overrides, done.stderr)
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs" / "debug").exists() or not list(
        (tmp_path / "runs" / "debug").glob("*/*")
    )


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
        assert "saved; the same command goes on" in child.communicate(timeout=120)[1]
        assert child.returncode == code
        n_rows = len(rows(run))


@pytest.mark.slow
def test_bad_input_removes_no_training(tmp_path: Path, text: Path) -> None:
    run = freeze_in(tmp_path / "runs", text, "ctx_len=100000")  # longer than the text
    last = run.path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    last.touch()
    assert train(run) == 2
    assert last.exists()
    last.unlink()
    assert train(run) == 2
    assert not run.path.exists()
