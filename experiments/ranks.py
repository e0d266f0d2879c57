"""Processes that share one evaluation, started by torchrun.

Each scores a part of the requests; then all have all answers, and the first writes.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from itertools import accumulate
from typing import Any, TypeVar

Item = TypeVar("Item")


def start() -> None:
    """Join the other processes, if torchrun started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
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


def gather(mine: Any) -> list[Any]:
    """What each process gives, in the order of ranks, in every process."""
    if size() == 1:
        return [mine]
    from torch import distributed

    parts: list[Any] = [None] * size()
    distributed.all_gather_object(parts, mine)
    return parts


def local_device(device: str) -> str:
    """The device of this process: of "cuda", one of its own where torchrun started several."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and size() > 1 else device


def share(items: list[Item], cost: Callable[[Item], int]) -> list[Item]:
    """This process's part: a stretch of the list, costing about as much as every other's."""
    ends = list(accumulate(map(cost, items)))
    total = ends[-1] if ends else 0
    n, mine = size(), rank()
    return [
        item
        for item, end in zip(items, ends, strict=True)
        if min((end - 1) * n // total, n - 1) == mine
    ]


def _ask(question: str, alone: int) -> int:
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return alone
    return getattr(distributed, question)()
