"""Starts processes that train together by forking, from one that has imported all of it once.

Each line of standard input is a job, {"run": directory, "n_ranks": number, ...}, started as by
torchrun and answered by a line with the exit codes of its processes. A job may also have

"stop": [rank, step]: SIGTERM reaches that process after that step;
"kill": [rank, step]: so does SIGKILL;
"adds_as": "ddp" or "fsdp": one process reads the micro-batches and adds up their gradients in the
order in which two processes of that strategy do, which makes a comparison sharp.
"""

import json
import math
import os
import signal
import socket
import sys
import time
import traceback
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only

from experiments.data.order import MicroBatches
from experiments.fit import main as train
from experiments.training.module import LitLM
from experiments.training.run_log import RunLog

N_RANKS = 2  # whose order `adds_as` means


def interrupt(step: int, number: int) -> None:
    original = RunLog.on_train_batch_end

    def then(self, trainer, *args):  # type: ignore[no-untyped-def]
        original(self, trainer, *args)
        if trainer.global_step == step:
            os.kill(os.getpid(), number)

    RunLog.on_train_batch_end = then  # type: ignore[method-assign]


def add_as(strategy: str) -> None:
    """DDP: each rank adds up its own first. FSDP: each pass is added up over the ranks first."""
    sizes = {"ddp": lambda n: n // N_RANKS, "fsdp": lambda n: N_RANKS}

    def ranks_in_turn(self):  # type: ignore[no-untyped-def]
        n, size = self.batch_size // self.micro_batch_size, self.micro_batch_size
        start = self.first_step * self.batch_size
        while True:
            for rank in range(N_RANKS):
                for i in range(rank, n, N_RANKS):
                    yield list(range(start + i * size, start + (i + 1) * size))
            start += self.batch_size

    if strategy == "ddp":
        MicroBatches.__iter__ = ranks_in_turn  # type: ignore[method-assign]

    def on_after_backward(self) -> None:  # type: ignore[no-untyped-def]
        n, done = self.trainer.accumulate_grad_batches, len(self.micro_losses)
        if done % sizes[strategy](n):
            return
        for p in self.model.parameters():
            p.sums = p.grad if done == sizes[strategy](n) else p.sums + p.grad
            p.grad = p.sums if done == n else None

    LitLM.on_after_backward = on_after_backward  # type: ignore[method-assign]


def work(job: dict[str, Any], rank: int, port: int) -> int:
    os.dup2(2, 1)
    n_ranks = str(job["n_ranks"])
    if job["n_ranks"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
        os.environ |= {"WORLD_SIZE": n_ranks, "LOCAL_WORLD_SIZE": n_ranks}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        rank_zero_only.rank = rank
    for key, number in (("stop", signal.SIGTERM), ("kill", signal.SIGKILL)):
        if key in job and job[key][0] == rank:
            interrupt(job[key][1], number)
    if "adds_as" in job:
        add_as(job["adds_as"])
    sys.argv = ["fit", job["run"]]
    try:
        train()
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else 1
    return 0


def wait_for(children: list[int]) -> list[int]:
    """Exit codes; when one failed, the others have ten seconds, or are killed as by torchrun."""
    codes: dict[int, int] = {}
    deadline = math.inf
    while len(codes) < len(children):
        time.sleep(0.02)
        for child in children:
            if child in codes:
                continue
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child]:
                    deadline = min(deadline, time.monotonic() + 10)
    return [codes[child] for child in children]


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(job["n_ranks"]):
            child = os.fork()
            if child == 0:
                code = 70
                try:
                    code = work(job, rank, port)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)  # never back into this loop
            children.append(child)
        print(json.dumps(wait_for(children)), flush=True)


if __name__ == "__main__":
    main()
