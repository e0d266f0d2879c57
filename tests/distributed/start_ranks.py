"""Train runs, each on some processes that are forked from this one, which has imported all.

python start_ranks.py 'JSON list of {"run": DIR, "n_ranks": 1, "stop_at": null, "rank": 0}' prints
the exit codes of each job's processes. `stop_at`: SIGTERM reaches process `rank` at that step.
"""

import json
import math
import os
import signal
import socket
import sys
import time
import traceback

import torch

from experiments import fit
from experiments.callbacks import RunLog
from experiments.run_dir import RunDir


def work(job: dict, rank: int, port: int) -> int:
    n_ranks = job["n_ranks"]
    if n_ranks > 1:  # as torchrun would
        size = str(n_ranks)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
        os.environ |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        fit.rank_zero_only.rank = rank
    original = RunLog.on_train_batch_end

    def stop(self, trainer, *args):  # type: ignore[no-untyped-def]
        original(self, trainer, *args)
        if trainer.global_step == job.get("stop_at") and rank == job.get("rank", 0):
            os.kill(os.getpid(), signal.SIGTERM)

    RunLog.on_train_batch_end = stop  # type: ignore[method-assign]
    try:
        fit.attempt(RunDir(job["run"]))
    except SystemExit as left:
        return int(left.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def wait_for(children: list[int]) -> list[int]:
    """Exit codes; when one failed, the others have ten seconds."""
    codes: dict[int, int] = {}
    deadline = math.inf
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
                    if codes[child] and deadline == math.inf:
                        deadline = time.monotonic() + 10
                elif time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
    return [codes[child] for child in children]


def main() -> None:
    torch.set_num_threads(1)
    codes = []
    for job in json.loads(sys.argv[1]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(job["n_ranks"]):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    code = work(job, rank, port)
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
        codes.append(wait_for(children))
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
