"""Checkpoints in parts: a folder with a file for each process, made of nothing but tensors.

Each file is that process's own checkpoint, holding its rows of every sharded tensor. They are read
back whole, on any number of processes. torch.distributed.checkpoint's own folders are not used, as
reading one runs the pickles in it.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from experiments.runs.checkpoints.files import put, write
from experiments.runs.checkpoints.reading import SHARDED, map_tensors, read_shards
from experiments.system.files import beside


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


def make_whole(path: Path) -> None:
    """Put a file, as any other strategy writes it, in the place of a folder of shards."""
    if path.is_dir():
        with beside(path) as new:
            put(new, path, write(read_shards(path), new))
