"""From pieces of text to token files: tokenized a few batches ahead of the writer, then measured.

The cores are kept busy by the tokenizers library, whose threads work outside Python's lock: there
are no worker processes to start, to feed, or to leave behind when a run is killed.
"""

from __future__ import annotations

import hashlib
import lzma
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.data.files import sampled_sha256
from experiments.data.sources import Piece
from experiments.data.tokenizer import Tokenizer

BATCH_CHARS = 2 << 20
XZ_BYTES = 16 << 20
TOKEN_DTYPES = ("uint8", "uint16", "int32")


def token_dtype(vocab_size: int) -> str:
    """The smallest of TOKEN_DTYPES that holds ids below vocab_size; ValueError when none does."""
    for dtype in TOKEN_DTYPES:
        if vocab_size - 1 <= np.iinfo(dtype).max:
            return dtype
    raise ValueError(f"vocab_size={vocab_size} does not fit into {TOKEN_DTYPES[-1]}")


def token_arrays(
    pieces: Iterable[Piece], tokenizer: Tokenizer, dtype: str, label: str, total: int | None
) -> Generator[np.ndarray, None, None]:
    """Token arrays in the order of the documents, eot after each; at most three batches wait.

    Shows a bar named `label` (of `total` bytes, if known) when stderr is a terminal.
    """

    def encode(batch: list[Piece]) -> np.ndarray:
        eot = np.array([tokenizer.eot_id])
        parts: list[np.ndarray] = []
        arrays = tokenizer.encode_arrays([text for text, _ in batch])
        for (_, ends_document), ids in zip(batch, arrays, strict=True):
            parts += [ids, eot] if ends_document else [ids]
        return np.concatenate(parts).astype(dtype)

    waiting: deque[tuple[Future[np.ndarray], int]] = deque()
    bar = tqdm(desc=label, total=total, unit="B", unit_scale=True, disable=None, leave=False)
    pool = ThreadPoolExecutor(2)  # one turns ids into arrays while the other tokenizes
    try:
        for batch in _batches(pieces):
            waiting.append((pool.submit(encode, batch), sum(_n_bytes(text) for text, _ in batch)))
            if len(waiting) == 3:
                future, n_bytes = waiting.popleft()
                yield future.result()
                bar.update(n_bytes)
        for future, n_bytes in waiting:
            yield future.result()
            bar.update(n_bytes)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        bar.close()


def _n_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="replace"))


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    n_chars = 0
    for piece in pieces:
        batch.append(piece)
        n_chars += len(piece[0])
        if n_chars >= BATCH_CHARS:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch


def write_tokens(
    path: Path, arrays: Generator[np.ndarray, None, None], limit: int | None
) -> dict[str, Any]:
    """Writes the first `limit` tokens (None: all); returns how `meta.json` refers to the file."""
    digest, n_tokens = hashlib.sha256(), 0
    with path.open("wb") as file:
        for array in arrays:
            ids = array if limit is None else array[: limit - n_tokens]
            file.write(ids.data)
            digest.update(ids.data)
            n_tokens += len(ids)
            if n_tokens == limit:
                break
    arrays.close()
    return {
        "path": path.name,
        "offset": 0,
        "n_tokens": n_tokens,
        "sha256": digest.hexdigest(),
        "sampled_sha256": sampled_sha256(path, 0, path.stat().st_size),
    }


def count_bytes(ids: np.ndarray, tokenizer: Tokenizer) -> int | None:
    """UTF-8 bytes that ids decode to, separators excluded; None when the tokenizer cannot tell."""
    sizes = tokenizer.token_bytes()
    if sizes is None:
        return None
    return sum(int(sizes[part].sum()) for part in _blocks(ids))


def xz_bits_per_byte(ids: np.ndarray, tokenizer: Tokenizer) -> float | None:
    """Bits per byte of xz (preset 9e) over the text of ids, 16 MiB at most; None without text."""
    if tokenizer.kind == "ids":
        return None
    text = bytearray()
    for part in _blocks(ids):
        text += tokenizer.decode_bytes(part)
        if len(text) >= XZ_BYTES:
            break
    if not text:
        return None
    text = text[:XZ_BYTES]
    # preset 9's own dictionary of 64 MiB costs 0.7 GB; beyond the text's length it changes nothing
    lzma2 = {
        "id": lzma.FILTER_LZMA2,
        "preset": 9 | lzma.PRESET_EXTREME,
        "dict_size": max(4096, len(text)),
    }
    return 8 * len(lzma.compress(text, filters=[lzma2])) / len(text)


def _blocks(ids: np.ndarray, size: int = 1 << 20) -> Iterator[np.ndarray]:
    for start in range(0, len(ids), size):
        yield np.asarray(ids[start : start + size])
