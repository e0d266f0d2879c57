"""Reading checkpoints, whole or in shards, without running any code in them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.runs.checkpoints.checksums import CHECKSUMS, is_whole

SHARDED = ("state_dict", "optimizer_states")  # the parts of a checkpoint that hold such tensors
NAME = re.compile(r"rank-(\d+)-of-(\d+)\.pt")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint, a file or a folder of shards, without running any code of it.

    Raises:
        ValueError: if it is damaged or wants more than tensors.
    """
    if is_whole(path) is False:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one written in {CHECKSUMS}")
    try:
        if path.is_dir():
            return read_shards(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} is not a readable checkpoint ({reason[:120]})") from None


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
