"""Processes that torchrun or srun started together: to train one run, or to share an evaluation.

In an evaluation each scores a part of the requests; then all have all answers, and the first
writes.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from itertools import accumulate
from typing import Any, TypeVar

Item = TypeVar("Item")


def started() -> tuple[int, int] | None:
    """Processes of this machine and of all machines, if torchrun or srun started several.

    srun's variables get torchrun's names, which is all that later code reads.

    Raises:
        ValueError: if srun started other numbers on different machines.
    """
    environ = os.environ
    if "RANK" not in environ and "SLURM_STEP_ID" in environ and int(environ["SLURM_NTASKS"]) > 1:
        from lightning.fabric.plugins.environments import SLURMEnvironment

        n_all, n_nodes = int(environ["SLURM_NTASKS"]), int(environ.get("SLURM_STEP_NUM_NODES", "1"))
        if n_all % n_nodes:
            raise ValueError(
                f"srun started {n_all} processes on {n_nodes} machines: give --ntasks-per-node, so "
                "that each has as many"
            )
        nodes = environ.get("SLURM_STEP_NODELIST", "127.0.0.1")
        job, step = int(environ["SLURM_JOB_ID"]), int(environ["SLURM_STEP_ID"])
        environ["RANK"], environ["LOCAL_RANK"] = environ["SLURM_PROCID"], environ["SLURM_LOCALID"]
        environ["GROUP_RANK"] = environ.get("SLURM_NODEID", "0")
        environ["WORLD_SIZE"], environ["LOCAL_WORLD_SIZE"] = str(n_all), str(n_all // n_nodes)
        environ.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))
        # one port for all of a step, hardly ever that of another
        environ.setdefault("MASTER_PORT", str(15000 + (16 * job + step) % 15000))
    if "RANK" not in environ or int(environ.get("WORLD_SIZE", "1")) == 1:
        return None
    n_all = int(environ["WORLD_SIZE"])
    return int(environ.get("LOCAL_WORLD_SIZE", n_all)), n_all


def started_as() -> int:
    """This process's number among those that were `started`."""
    return int(os.environ["RANK"])


def start() -> None:
    """Join the other processes, if torchrun or srun started several."""
    if started():
        from torch import distributed

        # what is exchanged are Python objects; the first to finish may wait long for the others
        distributed.init_process_group("gloo", timeout=timedelta(days=7))


def size() -> int:
    """Number of processes."""
    return _ask("get_world_size", 1)


def rank() -> int:
    """This process's number; the first, 0, prints and writes."""
    return _ask("get_rank", 0)


def stop() -> None:
    """Leave the group, so that the process ends without a warning."""
    from torch import distributed

    if size() > 1:
        distributed.destroy_process_group()


def gather(part: Any) -> list[Any]:
    """What each process gives, in the order of ranks, in every process."""
    if size() == 1:
        return [part]
    from torch import distributed

    parts: list[Any] = [None] * size()
    distributed.all_gather_object(parts, part)
    return parts


def local_device(device: str) -> str:
    """The device of this process: of "cuda", one of its own where several were started."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and size() > 1 else device


def share(items: list[Item], cost: Callable[[Item], int]) -> list[Item]:
    """This process's part: a stretch of the list, costing about as much as every other's."""
    ends = list(accumulate(map(cost, items)))
    total = ends[-1] if ends else 0
    n, this = size(), rank()
    return [
        item
        for item, end in zip(items, ends, strict=True)
        if min((end - 1) * n // total, n - 1) == this
    ]


def _ask(question: str, alone: int) -> int:
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return alone
    return getattr(distributed, question)()
