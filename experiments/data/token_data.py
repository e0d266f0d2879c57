"""Prepared tokens, and the order in which a run sees them.

Batch i is a pure function of (data seed, i). The training tokens are cut into slots of ctx_len + 1
tokens that share their borders; a keyed permutation, evaluated at one point in constant time,
orders the slots of each epoch. Seeking costs nothing, and workers, devices and micro-batches only
decide who loads which part of the same batch.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from experiments.data.token_files import TokenSpan
from experiments.data.tokenizer import Tokenizer

IGNORED = -100  # target of a position that is not scored


class TokenData:
    """A folder that `prepare` made.

    Attributes:
        path: the folder.
        meta: the content of its meta.json.
        fingerprint: hash of tokens and tokenizer, 64 hex digits.
        vocab_size: ids of the tokenizer.
        tokenizer: what made the tokens.
        train: ids, mapped read-only.
        val: ids held out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.meta: dict[str, Any] = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        self.fingerprint: str = self.meta["fingerprint"]
        self.vocab_size: int = self.meta["vocab_size"]
        self.tokenizer = Tokenizer.from_json((path / "tokenizer.json").read_text(encoding="utf-8"))
        self.train, self.val = self._tokens("train"), self._tokens("val")

    def __reduce__(self) -> tuple[type["TokenData"], tuple[Path]]:
        return TokenData, (self.path,)  # a worker maps the files itself

    def _tokens(self, split: str) -> np.ndarray:
        part = self.meta[split]
        file = self.path / part["path"]  # an absolute path stands for itself
        return TokenSpan(file, self.meta["dtype"], part["offset"], part["n_tokens"]).array()


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
    ids = torch.from_numpy(tokens.astype(np.int64))
    # `prepare` looks at samples of a long file that was made elsewhere
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < data.vocab_size:
        raise ValueError(
            f"{data.path} holds ids outside its vocabulary of {data.vocab_size}:"
            " its source was made with another tokenizer"
        )
    return ids


class MicroBatches:
    """Sample numbers of one rank's micro-batches from step `first_step` on, without end."""

    def __init__(
        self, batch_size: int, micro_batch_size: int, rank: int, world_size: int, first_step: int
    ) -> None:
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.rank, self.world_size, self.first_step = rank, world_size, first_step

    def __iter__(self) -> Iterator[list[int]]:
        start = self.first_step * self.batch_size + self.rank * self.micro_batch_size
        while True:
            yield list(range(start, start + self.micro_batch_size))
            start += self.micro_batch_size * self.world_size
