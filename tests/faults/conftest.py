"""Small trainings that are killed again and again, and what must be left of them."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.runs.checkpoints.reading import read_checkpoint
from experiments.runs.metrics import MetricsFile
from experiments.runs.run_dir import RunDir
from experiments.training.fit import fit

from ..small_runs import ROOT, freeze_in, rows, text_in

N_STEPS, LOG_EVERY, N_VALIDATIONS = 24, 5, 4
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 75}
# parts of files' names, and about as many operations on them as a run executes
AIMS: dict[str, tuple[list[str], int]] = {
    "checkpoint": ([".ckpt"], 250),
    "checksums": (["checksums.json"], 120),
    "metrics": (["metrics.csv"], 40),
    "result": (["result.json", "manifest.json", "tokenizer.json", "error.txt", ".lock"], 15),
}


# validates, accumulates, and saves after every step
SMALL = [
    "data=text", "data.val_tokens=300", "trainer=cpu", "size=pico", "ctx_len=32", "batch_size=4",
    f"budget_tokens={N_STEPS * 128}", f"n_validations={N_VALIDATIONS}",
    "execution.micro_batch_size=2", "execution.n_threads=1", f"execution.log_every={LOG_EVERY}",
    "execution.checkpoint_every_min=1e-9",
]  # fmt: skip


@pytest.fixture(scope="session")
def freeze(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunDir]:
    """Freeze a run that is to be disturbed."""
    text = text_in(tmp_path_factory.mktemp("faults"))

    def make(runs: Path, *overrides: str, model: str = "rwkv4") -> RunDir:
        return freeze_in(runs, text, *overrides, small=[*SMALL, f"model={model}"])

    return make


class Server:
    """`fork_server.py`, asked for one training at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        self.line()

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the fork server died"
        return line.strip()

    def start(self, run: RunDir, aim: dict[str, Any] | None = None) -> int:
        """Start training a run; its process id."""
        assert self.process.stdin is not None
        job = {"run": str(run.path), "log": str(run.path / "log.txt"), "aim": aim}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return int(self.line())

    def wait(self) -> int:
        """The exit code of what was started."""
        return int(self.line())


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="session")
def undisturbed(
    freeze: Callable[..., RunDir], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[RunDir, float]]:
    """A model's run that nothing happened to, and the seconds that it took."""
    done: dict[str, tuple[RunDir, float]] = {}

    def get(model: str) -> tuple[RunDir, float]:
        if model not in done:
            run = freeze(tmp_path_factory.mktemp("undisturbed"), model=model)
            start = time.monotonic()
            fit(run)
            done[model] = run, time.monotonic() - start
        return done[model]

    return get


@pytest.fixture(scope="session")
def kill(
    freeze: Callable[..., RunDir],
    undisturbed: Callable[[str], tuple[RunDir, float]],
    server: Server,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, int], Counter[str]]:
    """Kill trainings of a model a number of times, at any time and before operations on files.

    Each is started again until it is done, and compared with the undisturbed one. The result says
    how many kills were aimed at what, and how many trainings they were.
    """

    def kill(model: str, n_kills: int) -> Counter[str]:
        whole, seconds = undisturbed(model)
        draw, counts, n_done = random.Random(f"{model}/{n_kills}"), Counter[str](), 0
        aims = ["any time", *AIMS, "any time"]
        while n_done < n_kills:
            assert counts["trainings"] < 10 + n_kills, f"no kill arrives any more: {counts}"
            run = freeze(tmp_path_factory.mktemp("killed"), model=model)
            counts["trainings"] += 1
            while not run.finished:
                aim = aims[n_done % len(aims)] if n_done < n_kills else "nothing"
                number = draw.choice(SIGNALS)
                code = strike(server, run, aim, number, draw, seconds)
                if code == 0:  # it came too late
                    assert run.finished
                    continue
                log = (run.path / "log.txt").read_text()
                assert code in (-number, CODES.get(number)), (aim, number, log)
                n_done += 1
                counts[aim] += 1
            assert_same(whole, run)
        return counts

    return kill


def strike(
    server: Server, run: RunDir, aim: str, number: int, draw: random.Random, seconds: float
) -> int:
    """Start a training, let a signal come as aimed, and return its exit code."""
    if aim in AIMS:
        files, n_operations = AIMS[aim]
        count = draw.randint(1, n_operations)
        server.start(run, {"files": files, "count": count, "signal": number})
        return server.wait()
    pid = server.start(run)
    if aim == "any time":
        time.sleep(draw.uniform(0, 0.8 * seconds))
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    return server.wait()


@pytest.fixture(scope="session")
def same_end() -> Callable[[RunDir, RunDir], None]:
    """`assert_same`, for tests."""
    return assert_same


def assert_same(whole: RunDir, run: RunDir) -> None:
    """What a training left is that of an undisturbed one, but for times."""
    for name in ("last", "best"):
        a, b = (read_checkpoint(one.checkpoint(name)) for one in (whole, run))
        assert a["global_step"] == b["global_step"]
        for key in ("state_dict", "optimizer_states", "lr_schedulers"):
            assert_equal(a[key], b[key])
    assert rows(whole) == rows(run)
    table = MetricsFile(run.metrics_file).rows()
    steps = [int(row["step"]) for row in table if row["train/loss"]]
    assert steps == [n for n in range(1, N_STEPS + 1) if n % LOG_EVERY == 0 or n == N_STEPS]
    times = [float(row["time_s"]) for row in table]
    assert times == sorted(times)
    for key in ("step", "tokens", "flops", "train/loss", "val/loss", "val/bpb", "best"):
        assert (whole.result or {})[key] == (run.result or {})[key]
    assert run.manifest.keys() == whole.manifest.keys()
    expected = {p.name for p in whole.path.rglob("*")} | {"log.txt", ".lock"}
    left = {p.name for p in run.path.rglob("*")}
    assert left <= expected


def assert_equal(a: Any, b: Any) -> None:
    """Equal trees of tensors and values, bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b
