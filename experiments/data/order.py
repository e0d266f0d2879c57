"""The order in which a run sees its tokens: batch i is a pure function of (data seed, i).

The training tokens are cut into slots of ctx_len + 1 tokens that share their borders; a keyed
permutation, evaluated at one point in constant time, orders the slots of each epoch. Seeking costs
nothing, and workers, devices and micro-batches only decide who loads which part of the same batch.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import Dataset

from experiments.data.token_data import TokenData
from experiments.data.token_files import checked_ids

IGNORED = -100  # target of a position that is not scored


def permute(n_slots: int, seed: int, epoch: int, i: int) -> int:
    """The slot at position i of an epoch: a bijection of range(n_slots) for each (seed, epoch).

    A Feistel network over a grid barely larger than n_slots; points outside are walked along their
    cycle until they fall inside.
    """
    width = math.isqrt(n_slots - 1) + 1
    height = -(-n_slots // width)
    keys = _round_keys(seed, epoch)
    while True:
        row, column = divmod(i, width)
        for even, odd in keys:
            column = (column + _mix(row ^ even)) % width
            row = (row + _mix(column ^ odd)) % height
        i = row * width + column
        if i < n_slots:
            return i


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> tuple[tuple[int, int], ...]:
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=64).digest()
    words = [int.from_bytes(digest[j : j + 8], "little") for j in range(0, 64, 8)]
    return tuple(zip(words[::2], words[1::2], strict=True))


def _mix(x: int) -> int:
    # multiply and fold twice: every input bit reaches the returned upper half
    x = (x * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x ^= x >> 29
    x = (x * 0xD6E8FEB86659FD93) & 0xFFFFFFFFFFFFFFFF
    return x >> 32


class TrainWindows(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Sample n >= 0 of a run, without end -> inputs and targets, (ctx_len,) int64 each."""

    def __init__(self, data: TokenData, ctx_len: int, seed: int) -> None:
        self.data, self.ctx_len, self.seed = data, ctx_len, seed
        self.n_slots = (len(data.train) - 1) // ctx_len
        if self.n_slots < 1:
            raise ValueError(
                f"{data.path} has {len(data.train)} training tokens, fewer than"
                f" ctx_len + 1 = {ctx_len + 1}: lower ctx_len or take more data"
            )

    def slot(self, n: int) -> int:
        """The slot that sample n reads."""
        epoch, i = divmod(n, self.n_slots)
        return permute(self.n_slots, self.seed, epoch, i)

    def __getitem__(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.slot(n) * self.ctx_len
        ids = _ids(self.data, self.data.train[start : start + self.ctx_len + 1])
        return ids[:-1], ids[1:]


class ValWindows(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Window i of the held-out tokens -> inputs and targets, (ctx_len,) int64.

    Every token but the first is a target once. Targets beyond the end are -100 and inputs there 0;
    so is all of a window past the last, which fills up a rank.
    """

    def __init__(self, data: TokenData, ctx_len: int) -> None:
        self.data, self.ctx_len = data, ctx_len
        if len(data.val) < ctx_len + 1:
            raise ValueError(
                f"{data.path} has {len(data.val)} held-out tokens, fewer than"
                f" ctx_len + 1 = {ctx_len + 1}: lower ctx_len or raise data.val_tokens"
            )

    def __len__(self) -> int:
        return -(-(len(self.data.val) - 1) // self.ctx_len)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = i * self.ctx_len
        ids = _ids(self.data, self.data.val[start : start + self.ctx_len + 1])
        inputs = torch.zeros(self.ctx_len, dtype=torch.int64)
        targets = torch.full((self.ctx_len,), IGNORED)
        n_targets = max(0, len(ids) - 1)
        inputs[:n_targets], targets[:n_targets] = ids[:n_targets], ids[1:]
        return inputs, targets


def _ids(data: TokenData, tokens: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(checked_ids(tokens, data.vocab_size, data.path))


@dataclass(frozen=True)
class MicroBatches:
    """Sample numbers of one rank's micro-batches from step `first_step` on, without end."""

    batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int
    first_step: int

    def __iter__(self) -> Iterator[list[int]]:
        start = self.first_step * self.batch_size + self.rank * self.micro_batch_size
        while True:
            yield list(range(start, start + self.micro_batch_size))
            start += self.micro_batch_size * self.world_size
