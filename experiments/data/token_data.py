"""Prepared tokens, and the order in which a run sees them.

Batch i is a pure function of (data seed, i). The training tokens are cut into slots of ctx_len + 1
tokens that share their borders; a keyed permutation, evaluated at one point in constant time,
orders the slots of each epoch. Seeking costs nothing, and workers, devices and micro-batches only
decide who loads which part of the same batch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from experiments.data.files import WHOLE_UP_TO, sampled_sha256
from experiments.data.tokenizer import Tokenizer

IGNORED = -100  # target of a position that is not scored


class TokenData:
    """A prepared folder: `meta`, `fingerprint`, `tokenizer`, and the id arrays `train`, `val`.

    Made by `open`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._remedy = f"delete {self.path} and prepare again"
        self.meta: dict[str, Any] = json.loads(self._read("meta.json"))
        self.fingerprint: str = self.meta["fingerprint"]
        self.vocab_size: int = self.meta["vocab_size"]
        try:
            self.tokenizer = Tokenizer.from_json(self._read("tokenizer.json"))
            sound = self.tokenizer.hash == self.meta["tokenizer_hash"]
        except ValueError:
            sound = False
        if not sound:
            raise ValueError(f"{self.path}/tokenizer.json was changed: {self._remedy}")
        self.train = self._tokens("train")
        self.val = self._tokens("val")

    @classmethod
    def open(cls, path: str | Path) -> TokenData:
        """Opens what `prepare` made.

        Raises FileNotFoundError or ValueError in one line when files are missing, truncated or
        changed. Tokens are read whole up to 256 MiB (0.2 s), else, or where they lie elsewhere, in
        samples.
        """
        try:
            data = cls(path)
            data._check("train")
            data._check("val")
            return data
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}/meta.json is damaged ({error!r}): delete {path} and prepare again"
            ) from None

    def __reduce__(self) -> tuple[Callable[..., TokenData], tuple[Path]]:
        return TokenData, (self.path,)  # a worker maps the files itself, checked before

    def _read(self, name: str) -> str:
        file = self.path / name
        if not file.is_file():
            raise FileNotFoundError(
                f"no prepared data at {self.path} ({name} is missing): {self._remedy}"
            )
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{file} is damaged: {self._remedy}") from None

    def _tokens(self, split: str) -> np.ndarray:
        part, dtype = self.meta[split], np.dtype(self.meta["dtype"])
        file = self.path / part["path"]  # an absolute path stands for itself
        if not file.is_file():
            raise FileNotFoundError(f"token file {file} is missing: {self._remedy}")
        size, needed = (
            file.stat().st_size,
            part.get("file_bytes", part["n_tokens"] * dtype.itemsize),
        )
        if size != needed:
            raise ValueError(
                f"token file {file} has {size} bytes instead of {needed}: {self._remedy}"
            )
        offset = part["offset"] * dtype.itemsize
        return np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=(part["n_tokens"],))

    def _check(self, split: str) -> None:
        part, tokens = self.meta[split], getattr(self, split)
        file = self.path / part["path"]
        if "sha256" in part and tokens.nbytes <= WHOLE_UP_TO:
            with file.open("rb") as content:  # read, not mapped: it should not count as memory
                sound = hashlib.file_digest(content, "sha256").hexdigest() == part["sha256"]
        else:
            start = part["offset"] * tokens.itemsize
            sound = sampled_sha256(file, start, tokens.nbytes) == part["sampled_sha256"]
        if not sound:
            raise ValueError(f"token file {file} was changed: {self._remedy}")


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
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < data.vocab_size:
        raise ValueError(
            f"{data.path} holds ids outside its vocabulary of {data.vocab_size}: it is damaged"
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
