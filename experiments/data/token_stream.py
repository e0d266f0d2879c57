"""From pieces of text to token files: tokenized a few batches ahead of the writer, then measured.

The cores are kept busy by the tokenizers library, whose threads work outside Python's lock: there
are no worker processes to start, to feed, or to leave behind when a run is killed.
"""

import hashlib
import lzma
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.data.sources import Piece
from experiments.data.tokenizer import Tokenizer

BATCH_CHARS = 2 << 20
AHEAD = 2  # batches that are tokenized while one is written
XZ_BYTES = 16 << 20


@dataclass(frozen=True)
class _Encoded:
    ids: np.ndarray
    n_bytes: int  # of the text


def token_dtype(vocab_size: int) -> str:
    """The smallest type that holds ids below vocab_size."""
    return next(t for t in ("uint8", "uint16", "int32") if vocab_size - 1 <= np.iinfo(t).max)


def write_tokens(
    path: Path,
    pieces: Iterable[Piece],
    tokenizer: Tokenizer,
    limit: int | None,
    label: str,
    n_bytes: int | None = None,
) -> dict[str, Any]:
    """Write the tokens of documents in order, end-of-text after each, under a progress bar.

    Args:
        limit: how many tokens to write at most.
        label: name of the bar.
        n_bytes: of all pieces, if known.

    Returns:
        How `meta.json` refers to the file.
    """
    digest, n_tokens = hashlib.sha256(), 0
    bar = tqdm(desc=label, total=n_bytes, unit="B", unit_scale=True, disable=None, leave=False)
    with path.open("wb") as file, bar:
        for encoded in _encoded(pieces, tokenizer):
            ids = encoded.ids[: None if limit is None else limit - n_tokens]
            file.write(ids.data)
            digest.update(ids.data)
            n_tokens += len(ids)
            bar.update(encoded.n_bytes)
            if n_tokens == limit:
                break
    return {"path": path.name, "offset": 0, "n_tokens": n_tokens, "sha256": digest.hexdigest()}


def _encoded(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[_Encoded]:
    dtype, eot = token_dtype(tokenizer.vocab_size), np.array([tokenizer.eot_id])

    def encode(batch: list[Piece]) -> _Encoded:
        parts: list[np.ndarray] = []
        arrays = tokenizer.encode_arrays([piece.text for piece in batch])
        for piece, ids in zip(batch, arrays, strict=True):
            parts += [ids, eot] if piece.ends_document else [ids]
        n_bytes = sum(len(piece.text.encode(errors="replace")) for piece in batch)
        return _Encoded(np.concatenate(parts).astype(dtype), n_bytes)

    waiting: deque[Future[_Encoded]] = deque()
    with ThreadPoolExecutor(2) as pool:  # one turns ids into arrays while the other tokenizes
        for batch in _batches(pieces):
            waiting.append(pool.submit(encode, batch))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    n_chars = 0
    for piece in pieces:
        batch.append(piece)
        n_chars += len(piece.text)
        if n_chars >= BATCH_CHARS:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch


def count_bytes(ids: np.ndarray, tokenizer: Tokenizer) -> int | None:
    """UTF-8 bytes that ids decode to, separators excluded; None if the tokenizer cannot tell."""
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
