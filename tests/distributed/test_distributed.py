"""Two processes train as one does, and resume where another number of them stopped."""

import subprocess
import sys

import pytest
import torch

from experiments.runs.checkpoints.reading import read_checkpoint
from experiments.runs.metrics import MetricsFile
from experiments.runs.run_dir import RunDir
from experiments.runs.trained_model import load_model

from ..small_runs import ROOT, rows
from .conftest import Processes, apart

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(processes: Processes) -> RunDir:
    """A sharded run that was never stopped."""
    run = processes.freeze("whole", "model=gpt", "trainer=fsdp")
    assert processes.train(run, 2) == [0, 0]
    return run


def test_sharded_processes_train_as_one(processes: Processes, whole: RunDir) -> None:
    one = processes.freeze("one", "model=gpt", "trainer=cpu")
    assert processes.train(one, 1, adds_as="fsdp") == [0]
    assert apart(one, whole) == 0
    assert rows(one) == rows(whole)
    assert whole.checkpoint("last").is_file()
    assert whole.checkpoint("best").is_file()


@pytest.fixture(scope="module")
def copies(processes: Processes) -> RunDir:
    """A run of two processes with a copy of the model each."""
    run = processes.freeze("ddp", "model=rwkv4", "trainer=ddp")
    assert processes.train(run, 2) == [0, 0]
    return run


def test_copies_of_a_model_train_as_one(processes: Processes, copies: RunDir) -> None:
    one = processes.freeze("one", "model=rwkv4", "trainer=cpu")
    assert processes.train(one, 1, adds_as="ddp") == [0]
    assert apart(one, copies) == 0
    assert rows(one) == rows(copies)


def test_speed_and_utilisation_are_of_all_devices(whole: RunDir) -> None:
    device = whole.manifest["device"]
    assert device["n_devices"] == 2
    peak = 2 * device["peak_flops"]
    times = {0: 0.0}
    for row in MetricsFile(whole.metrics_file).rows():
        step, time_s = int(row["step"]), float(row["time_s"])
        if not row["perf/mfu"]:
            continue
        assert int(row["tokens"]) == step * 8 * 64
        speed = float(row["perf/tokens_per_s"])
        assert speed == pytest.approx(8 * 64 / (time_s - times[step - 1]), rel=1e-3)
        used = speed * whole.manifest["flops_per_token"] / peak
        assert float(row["perf/mfu"]) == pytest.approx(used, rel=1e-6)
        times[step] = time_s


@pytest.fixture(scope="module")
def stopped(processes: Processes) -> RunDir:
    """The same run, asked to stop by a signal to its second process."""
    run = processes.freeze("stopped", "model=gpt", "trainer=fsdp")
    assert processes.train(run, 2, stop=[1, 5]) == [143, 143]
    assert run.checkpoint("last").is_dir()
    return run


def test_a_stopped_sharded_run_resumes_to_the_same_end(
    processes: Processes, whole: RunDir, stopped: RunDir
) -> None:
    processes.copy(stopped, "same")
    same = processes.freeze("same", "model=gpt", "trainer=fsdp")
    assert processes.train(same, 2) == [0, 0]
    assert apart(whole, same) == 0
    assert rows(whole) == rows(same)


def test_a_stopped_sharded_run_resumes_by_another_strategy(
    processes: Processes, whole: RunDir, stopped: RunDir
) -> None:
    processes.copy(stopped, "other")
    other = processes.freeze("other", "model=gpt", "trainer=ddp")
    assert processes.train(other, 2) == [0, 0]
    assert apart(whole, other, key_biases=False) < 1e-6
    for a, b in zip(rows(whole), rows(other), strict=True):
        assert a.keys() == b.keys()
        assert [float(x or 0) for x in a.values()] == pytest.approx(
            [float(x or 0) for x in b.values()], rel=1e-5
        )


def test_a_stopped_sharded_run_can_be_evaluated(stopped: RunDir) -> None:
    assert read_checkpoint(stopped.checkpoint("last"))["global_step"] == 5
    logits, _ = load_model(stopped, "last")(torch.arange(32)[None])
    assert logits.isfinite().all()
    weights = read_checkpoint(stopped.checkpoint("last"))["optimizer_states"][0]["state"]
    assert all(float(state["step"]) == 5 for state in weights.values())


def test_a_process_that_dies_ends_the_run_and_the_next_start_resumes(
    processes: Processes, whole: RunDir
) -> None:
    run = processes.freeze(
        "killed",
        "model=gpt",
        "trainer=fsdp",
        "execution.checkpoint_every_min=1e-9",
    )
    first, second = processes.train(run, 2, kill=[1, 6])
    assert first == 1
    assert "another process of this run ended" in (run.path / "error.txt").read_text()
    assert second == -9
    assert not run.finished
    assert read_checkpoint(run.checkpoint("last"))["global_step"] in (5, 6)
    assert processes.train(run, 2) == [0, 0]
    assert apart(whole, run) == 0
    assert rows(whole) == rows(run)


def test_a_file_of_a_shard_that_was_changed_is_noticed(stopped: RunDir) -> None:
    shard = stopped.checkpoint("last") / "rank-1-of-2.pt"
    content = shard.read_bytes()
    try:
        shard.write_bytes(content[:-100] + bytes(100))
        with pytest.raises(ValueError, match="is damaged"):
            load_model(stopped, "last")
    finally:
        shard.write_bytes(content)


def test_lightning_starts_its_processes_itself(processes: Processes, copies: RunDir) -> None:
    given = processes.overrides("command", "model=rwkv4", "trainer=ddp")
    train = [sys.executable, "-m", "experiments.train", *given, "execution.trainer.devices=2"]
    subprocess.run(train, cwd=ROOT, env=processes.environment, check=True)
    (path,) = (processes.folder / "command").glob("*/*/*/result.json")
    assert apart(copies, RunDir(path.parent)) == 0
    assert rows(copies) == rows(RunDir(path.parent))
