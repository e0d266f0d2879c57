"""`make distributed`: both strategies and families over 50 steps, all ways to start processes."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.runs.run_dir import RunDir

from ..small_runs import FAMILIES, ROOT, rows
from .conftest import Processes, apart

STRATEGIES = ["ddp", "fsdp"]
LONG = ["budget_tokens=25600"]  # 50 steps

MORE = {
    "long": LONG,
    "memory": [
        "execution.grad_checkpoint=true",
        "execution.chunk_len=21",
        "execution.loss=chunked",
    ],
    "recipes": ["precision=bf16-mixed", "optim=own", "schedule=own"],
}


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("what", MORE)
def test_two_processes_equal_one(
    processes: Processes, model: str, strategy: str, what: str
) -> None:
    """To the bit, where one adds up in the order of two."""
    name, more = f"{strategy}-{what}", MORE[what]
    one = processes.freeze(f"one-{name}", f"model={model}", "trainer=cpu", *more)
    two = processes.freeze(f"two-{name}", f"model={model}", f"trainer={strategy}", *more)
    assert processes.train(one, 1, adds_as=strategy) == [0]
    assert processes.train(two, 2) == [0, 0]
    assert apart(one, two) == 0
    assert rows(one) == rows(two)


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_order_of_additions_is_rounding(
    processes: Processes, model: str, strategy: str
) -> None:
    """Losses and weights agree to 1e-6 over 50 steps."""
    one = processes.freeze("plain", f"model={model}", "trainer=cpu", *LONG)
    if not one.finished:
        assert processes.train(one, 1) == [0]
    two = processes.freeze(f"two-{strategy}-long", f"model={model}", f"trainer={strategy}", *LONG)
    if not two.finished:
        assert processes.train(two, 2) == [0, 0]
    losses = [
        [float(row["train/loss"]) for row in rows(run) if row["train/loss"]] for run in (one, two)
    ]
    worst = max(abs(a - b) / a for a, b in zip(*losses, strict=True))
    weights = apart(one, two, key_biases=False)
    print(f"{model} {strategy}: losses {worst:.1e}, weights {weights:.1e} apart")
    assert worst < 1e-6
    assert weights < 1e-6


PATHS = [("ddp", 2), ("cpu", 1), ("fsdp", 2), ("ddp", 2), ("fsdp", 1), ("cpu", 1)]


@pytest.mark.parametrize("model", FAMILIES)
def test_a_run_moves_between_strategies_and_numbers_of_processes(
    processes: Processes, model: str
) -> None:
    """Stopped every step, it resumes by another; the micro-batch changes too."""
    whole = processes.freeze("whole", f"model={model}", "trainer=cpu")
    assert processes.train(whole, 1) == [0]
    for step, (trainer, n_ranks) in enumerate(PATHS, 1):
        run = processes.freeze(
            "moving",
            f"model={model}",
            f"trainer={trainer}",
            f"execution.micro_batch_size={4 if step % 2 else 1}",
        )
        assert processes.train(run, n_ranks, stop=[n_ranks - 1, step]) == [143] * n_ranks
    assert processes.train(run, 1) == [0]
    assert apart(whole, run, key_biases=False) < 1e-5
    for a, b in zip(rows(whole), rows(run), strict=True):
        assert (a["step"], a["tokens"], a["lr"]) == (b["step"], b["tokens"], b["lr"])
        if a["train/loss"]:
            assert float(a["train/loss"]) == pytest.approx(float(b["train/loss"]), rel=1e-5)


@pytest.fixture(scope="module")
def expected(processes: Processes) -> RunDir:
    run = processes.freeze("expected", "model=rwkv4", "trainer=ddp")
    assert processes.train(run, 2) == [0, 0]
    return run


def found(processes: Processes, runs: str) -> RunDir:
    (path,) = (processes.folder / runs).glob("*/*/*/result.json")
    return RunDir(path.parent)


def same(a: RunDir, b: RunDir) -> bool:
    return apart(a, b) == 0 and rows(a) == rows(b)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TRAIN = ["-m", "experiments.train"]


def call(processes: Processes, command: list[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(command, cwd=ROOT, env=processes.environment | environment)


def test_torchrun_starts_them_and_again(processes: Processes, expected: RunDir) -> None:
    given = processes.overrides("torchrun", "model=rwkv4", "trainer=ddp")
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *TRAIN, *given]
    assert call(processes, command).wait(300) == 0
    assert same(expected, found(processes, "torchrun"))
    before = found(processes, "torchrun").checkpoint("last").stat().st_mtime_ns
    assert call(processes, command).wait(300) == 0
    assert found(processes, "torchrun").checkpoint("last").stat().st_mtime_ns == before


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_torchrun_on_two_nodes(processes: Processes, expected: RunDir) -> None:
    given = processes.overrides("nodes", "model=rwkv4", "trainer=ddp")
    where = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    where += ["--rdzv-id", "1", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    nodes = [call(processes, [*TORCHRUN, *where, *TRAIN, *given]) for _ in range(2)]
    assert [node.wait(300) for node in nodes] == [0, 0]
    run = found(processes, "nodes")
    assert same(expected, run)
    assert run.manifest["device"]["n_devices"] == 2


def test_srun_starts_them(processes: Processes, expected: RunDir) -> None:
    """By what srun sets in the environment of two tasks on two nodes."""
    given = processes.overrides("srun", "model=rwkv4", "trainer=ddp")
    common = {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": "localhost,localhost",
        "SLURM_LOCALID": "0",
    }
    tasks = [
        call(
            processes,
            [sys.executable, *TRAIN, *given],
            **common,
            SLURM_PROCID=str(rank),
            SLURM_NODEID=str(rank),
        )
        for rank in range(2)
    ]
    assert [task.wait(300) for task in tasks] == [0, 0]
    assert same(expected, found(processes, "srun"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_first_of_lightnings_processes_stops_all(
    processes: Processes, number: int
) -> None:
    run = processes.freeze(
        f"signal{number}", "model=gpt", "trainer=fsdp", "execution.trainer.devices=2",
        "budget_tokens=1e9",
    )  # fmt: skip
    first = call(processes, [sys.executable, "-m", "experiments.fit", str(run.path)])
    table = run.path / "metrics.csv"
    deadline = time.monotonic() + 300
    while not (table.is_file() and len(table.read_text().splitlines()) > 3):
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.2)
    os.kill(first.pid, number)
    assert first.wait(60) == (143 if number == signal.SIGTERM else 75)
    assert run.checkpoint("last").is_dir()
    deadline = time.monotonic() + 10
    while subprocess.run(["pgrep", "-f", str(run.path)], stdout=subprocess.DEVNULL).returncode == 0:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_one_line_where_the_numbers_do_not_fit(processes: Processes, tmp_path: Path) -> None:
    given = processes.overrides("wrong", "model=gpt", "trainer=cpu")
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *TRAIN, *given]
    done = subprocess.run(
        command, cwd=ROOT, env=processes.environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert "2 processes were started on 1 machines, but" in done.stderr
