"""Checkpoints in parts: a folder with a file for each process, made of nothing but tensors.

Each file is that process's own checkpoint, holding its rows of every sharded tensor. They are read
back whole, on any number of processes. torch.distributed.checkpoint's own folders are not used, as
reading one runs the pickles in it.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.runs.checkpoints.files import put, write
from experiments.system.files import remove

SHARDED = ("state_dict", "optimizer_states")  # the parts of a checkpoint that hold such tensors
NAME = re.compile(r"rank-(\d+)-of-(\d+)\.pt")


def rows_of(whole: Tensor, rank: int, n_ranks: int) -> Tensor:
    """The rows that fully_shard gives a process: equal parts rounded up, the last ones shorter."""
    parts = whole.chunk(n_ranks)
    return parts[rank] if rank < len(parts) else whole[:0]


def write_shard(
    checkpoint: dict[str, Any], folder: Path, rank: int, n_ranks: int
) -> tuple[str, str]:
    """Write this process's file; all of its sharded tensors are DTensors split by rows.

    Returns:
        Its name and SHA-256.
    """
    from torch.distributed.tensor import DTensor

    def local(x: Tensor) -> Tensor:
        assert isinstance(x, DTensor) or x.dim() == 0
        return x.to_local().detach().cpu().clone() if isinstance(x, DTensor) else x

    parts = {key: map_tensors(local, [checkpoint[key]]) for key in SHARDED}
    path = folder / f"rank-{rank}-of-{n_ranks}.pt"
    return path.name, write(checkpoint | parts, path)


def read_shards(folder: Path, take: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Any]:
    """The checkpoint that a folder holds, without running any code of it.

    Args:
        take: what to keep of each whole tensor; only one is held whole at a time.

    Raises:
        ValueError: if a file is missing.
    """
    found = {
        match[1]: match[2] for path in folder.iterdir() if (match := NAME.fullmatch(path.name))
    }
    n_ranks = int(next(iter(found.values()), 0))
    if not found or set(found) != {str(rank) for rank in range(n_ranks)}:
        raise ValueError(f"{folder} lacks files: it has those of {len(found)} ranks of {n_ranks}")
    parts = [
        torch.load(
            folder / f"rank-{rank}-of-{n_ranks}.pt",
            map_location="cpu",
            mmap=True,
            weights_only=True,
        )
        for rank in range(n_ranks)
    ]

    def join(*rows: Tensor) -> Tensor:
        return take(torch.cat(rows)) if rows[0].dim() else rows[0].clone()

    whole = {key: map_tensors(join, [part[key] for part in parts]) for key in SHARDED}
    return parts[0] | whole


def make_whole(path: Path) -> None:
    """Put a file, as any other strategy writes it, in the place of a folder of shards."""
    if path.is_dir():
        new = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            put(new, path, write(read_shards(path), new))
        finally:
            remove(new)


def map_tensors(function: Callable[..., Tensor], trees: list[Any]) -> Any:
    """Apply a function to the tensors at the same place of equal trees of dicts and lists."""
    first = trees[0]
    if isinstance(first, Tensor):
        return function(*trees)
    if isinstance(first, dict):
        return {key: map_tensors(function, [tree[key] for tree in trees]) for key in first}
    if isinstance(first, list):
        return [map_tensors(function, list(items)) for items in zip(*trees, strict=True)]
    return first
