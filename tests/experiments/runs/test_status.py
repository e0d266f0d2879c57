"""The status of runs, from their files alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments.runs.metrics import MetricsFile
from experiments.runs.run_dir import RunDir
from experiments.runs.state import progress_of
from experiments.sweeps.table import duration, seconds_left, table, total
from experiments.system.files import write_json

ROOT = Path(__file__).resolve().parents[3]
RESULT = {
    "step": 100, "tokens": 1000, "val/loss": 2.5, "val/bpb": 3.6, "time_s": 10.0,
    "perf/tokens_per_s": 100.0,
}  # fmt: skip


@pytest.fixture
def make(tmp_path: Path):  # type: ignore[no-untyped-def]
    def make(name: str, steps: int = 0, speed: float | None = None, model: str = "m") -> RunDir:
        path = tmp_path / "runs" / "s" / model / name
        path.mkdir(parents=True)
        config = {
            "batch_size": 2,
            "ctx_len": 5,
            "budget_tokens": 1000,
            "suite": "s",
            "continue_to": None,
        }
        OmegaConf.save(OmegaConf.create(config), path / "config.yaml")
        if steps:
            write_json(path / "manifest.json", {"suite": "s"})
            metrics = MetricsFile(path / "metrics.csv")
            metrics.rewind(0)
            metrics.append({"step": steps, "tokens": 10 * steps, "perf/tokens_per_s": speed})
        return RunDir(path)

    return make


def test_every_state_and_the_time_left(make) -> None:  # type: ignore[no-untyped-def]
    done, running, failed = make("done"), make("running", 40, 50.0), make("failed", 10, 60.0)
    write_json(done.path / "result.json", RESULT)
    (failed.path / "error.txt").write_text("it went wrong: do this\n\nTraceback\n")
    stopped, waiting, unknown = make("stopped", 90, None), make("waiting"), make("new", model="n")
    damaged, cut, queued = make("damaged"), make("cut"), make("queued")
    write_json(queued.queued_file, {"job": "7_1"})
    (damaged.path / "result.json").write_text("{")
    (cut.path / "config.yaml").write_text("a: [")
    with running.lock():
        states = [
            progress_of(run)
            for run in (done, running, failed, stopped, waiting, unknown, damaged, cut, queued)
        ]
    names = [
        "done",
        "running",
        "failed",
        "interrupted",
        "waiting",
        "waiting",
        "damaged",
        "damaged",
        "queued",
    ]
    assert [one.state for one in states] == names
    assert [one.step for one in states] == [100, 40, 10, 90, 0, 0, 0, 0, 0]
    assert {one.n_steps for one in states} == {100, None}
    assert f"process {os.getpid()}" in states[1].detail
    assert states[2].detail == "it went wrong: do this"
    assert "is not valid JSON" in states[6].detail
    assert "is not readable YAML" in states[7].detail
    # tokens left over the speed measured; else over that of its model, whose median is 60
    left = [0.0, 600 / 50, 900 / 60, 100 / 60, 1000 / 60, None, None, None, 1000 / 60]
    assert seconds_left(states) == [s if s is None else pytest.approx(s) for s in left]
    text = table(states)
    row = next(line for line in text.splitlines() if line.startswith("m/running"))
    assert row.split()[:6] == ["m/running", "running", "40/100", "50", "12", "s"]
    assert "val/loss 2.5000 nats/token (3.6000 bits/byte), 10 s" in text
    assert total(states) == (
        "9 runs: 1 done, 1 running, 1 failed, 1 interrupted, 1 queued, 2 waiting, 2 damaged; "
        "time left 47 s with 1 at once, not counting 1 whose speed is not known yet"
    )


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("config.yaml", "batch_size: 2", "batch_size: 0"),
        ("config.yaml", "budget_tokens: 1000", "budget_tokens: .inf"),
        ("manifest.json", "{", "["),
        ("metrics.csv", "40,400", "40.5,400"),
        ("result.json", "100.0", '"fast"'),
    ],
)
def test_one_damaged_run_spoils_no_table(make, file: str, old: str, new: str) -> None:  # type: ignore[no-untyped-def]
    run, other = make("a", 40, 50.0), make("b", 40, 50.0)
    if file == "result.json":
        write_json(run.path / file, RESULT)
    text = (run.path / file).read_text()
    assert old in text
    (run.path / file).write_text(text.replace(old, new))
    states = [progress_of(run), progress_of(other)]
    assert [one.state for one in states] == ["damaged", "interrupted"]
    assert "a" in table(states)
    assert "1 damaged" in total(states)


def test_durations() -> None:
    seconds = [0, 89, 600, 2 * 3600, 47.5 * 3600, 3 * 86400]
    shown = ["0 s", "89 s", "10 min", "2 h 0 min", "47 h 30 min", "3 d 0 h"]
    assert [duration(s) for s in seconds] == shown
    assert duration(None) == "?"


@pytest.mark.slow
def test_the_command_needs_neither_torch_nor_an_unlocked_run(make) -> None:  # type: ignore[no-untyped-def]
    run = make("a")
    code = (
        "import sys\nfrom experiments.status import main\nmain()\n"
        "assert not {'torch', 'lightning', 'pandas'} & set(sys.modules)"
    )
    with run.lock():
        done = subprocess.run(
            [sys.executable, "-c", code, "suite=s", f"paths.runs={run.path.parents[2]}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    assert "running" in done.stdout
    none = subprocess.run(
        [sys.executable, "-m", "experiments.status", "suite=none"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert none.returncode == 2
    assert none.stderr.startswith("error: no run directory matches")
