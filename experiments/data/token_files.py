"""Sources that are tokens already: Megatron / GPT-NeoX `.bin` with `.idx`, and nanoGPT `.bin`.

The files are used where they lie, never copied (the tokenised Pile has 664 GB); what a run needs to
trust them is checked once: headers, sizes, and samples of the ids. Formats: paper notes section
4.4; nanoGPT has no header at all.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from experiments.data.files import content_id, sampled_sha256

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document index entries
CHECKED_BLOCK = 1 << 20  # tokens
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}


@dataclass(frozen=True)
class TokenSpan:
    """Tokens [offset, offset + n_tokens) of a file of ids without header, little-endian."""

    path: Path
    dtype: str
    offset: int
    n_tokens: int

    def array(self) -> np.ndarray:
        """The tokens, mapped read-only."""
        start = self.offset * np.dtype(self.dtype).itemsize
        return np.memmap(self.path, self.dtype, mode="r", offset=start, shape=(self.n_tokens,))

    def meta(self) -> dict[str, Any]:
        """How `meta.json` refers to the span."""
        width = np.dtype(self.dtype).itemsize
        digest = sampled_sha256(self.path, self.offset * width, self.n_tokens * width)
        return {
            "path": str(self.path),
            "offset": self.offset,
            "n_tokens": self.n_tokens,
            "file_bytes": self.path.stat().st_size,
            "sampled_sha256": digest,
        }


@dataclass(frozen=True)
class _IndexedSpan(TokenSpan):
    index: Path
    n_sequences: int


@runtime_checkable
class TokenSource(Protocol):
    """What `prepare` asks of a source of ids."""

    def identity(self) -> dict[str, Any]: ...
    def spans(self, val_tokens: int | None) -> dict[str, TokenSpan]: ...


class Megatron:
    """`<prefix>.bin` and `.idx` as one flat stream; without val_prefix its end is held out."""

    def __init__(self, prefix: str, val_prefix: str | None = None) -> None:
        self.train = _read_index(prefix)
        self.val = _read_index(val_prefix) if val_prefix else None
        _check_apart(self.train, self.val)

    def identity(self) -> dict[str, Any]:
        return _identity("megatron", self.train, self.val)

    def spans(self, val_tokens: int | None) -> dict[str, TokenSpan]:
        for span in (self.train, self.val):
            if span is not None:  # not sooner: the index of the Pile has gigabytes
                _check_contiguous(span)
        return _spans(self.train, self.val, val_tokens)


class NanoGpt:
    """A raw file of uint16 ids; without val_path the last val_tokens are held out."""

    def __init__(self, path: str, val_path: str | None = None) -> None:
        self.train = _flat(_existing(Path(path).expanduser()), "uint16")
        self.val = _flat(_existing(Path(val_path).expanduser()), "uint16") if val_path else None
        _check_apart(self.train, self.val)

    def identity(self) -> dict[str, Any]:
        return _identity("nanogpt", self.train, self.val)

    def spans(self, val_tokens: int | None) -> dict[str, TokenSpan]:
        return _spans(self.train, self.val, val_tokens)


def check_ids(span: TokenSpan, vocab_size: int) -> None:
    """Raises ValueError when ids of a span (samples of a long one) exceed the vocabulary."""
    tokens, block = span.array(), CHECKED_BLOCK
    n_blocks = min(64, -(-len(tokens) // block))
    for i in range(n_blocks):
        start = max(0, len(tokens) - block) * i // max(1, n_blocks - 1)
        part = tokens[start : start + block]
        low, high = int(part.min()), int(part.max())
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(
                f"{span.path} holds id {wrong}, outside vocab_size={vocab_size}:"
                " it was made with another tokenizer"
            )


def _identity(kind: str, train: TokenSpan, val: TokenSpan | None) -> dict[str, Any]:
    # the place counts here: the prepared folder refers to it
    files = [[str(s.path), s.dtype, content_id(s.path)] for s in (train, val) if s is not None]
    return {"kind": kind, "files": files}


def _check_apart(train: TokenSpan, val: TokenSpan | None) -> None:
    if val is not None and val.path == train.path:
        raise ValueError(
            f"{val.path} is both training and held-out text: name another file, or none to hold out"
            " its end"
        )


def _spans(train: TokenSpan, val: TokenSpan | None, val_tokens: int | None) -> dict[str, TokenSpan]:
    if val is not None:
        if val.dtype != train.dtype:
            raise ValueError(f"{val.path} has {val.dtype} tokens, {train.path} {train.dtype}")
        n_val = min(val.n_tokens, val_tokens or val.n_tokens)
        return {"train": train, "val": TokenSpan(val.path, val.dtype, 0, n_val)}
    if val_tokens is None or val_tokens >= train.n_tokens:
        raise ValueError(
            f"cannot hold out val_tokens={val_tokens} of {train.n_tokens} tokens in {train.path}"
        )
    n_train = train.n_tokens - val_tokens
    return {
        "train": TokenSpan(train.path, train.dtype, 0, n_train),
        "val": TokenSpan(train.path, train.dtype, n_train, val_tokens),
    }


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"no token file {path}")
    return path.resolve()


def _flat(path: Path, dtype: str) -> TokenSpan:
    width, size = np.dtype(dtype).itemsize, path.stat().st_size
    if size == 0 or size % width:
        raise ValueError(f"token file {path} has {size} bytes, not a positive multiple of {width}")
    return TokenSpan(path, dtype, 0, size // width)


def _read_index(prefix: str) -> _IndexedSpan:
    base = str(Path(prefix).expanduser())
    index, data = _existing(Path(base + ".idx")), _existing(Path(base + ".bin"))
    with index.open("rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise ValueError(f"{index} is not a Megatron index (it should start with {MAGIC!r})")
    _, version, code, n_sequences, n_documents = HEADER.unpack(head)
    if version != 1 or code not in DTYPES:
        raise ValueError(f"{index}: version {version} with dtype code {code} is not supported")
    if index.stat().st_size != HEADER.size + 12 * n_sequences + 8 * n_documents:
        raise ValueError(
            f"{index} is truncated or damaged: its size does not fit {n_sequences} sequences"
        )
    span = _flat(data, DTYPES[code])
    return _IndexedSpan(data, span.dtype, 0, span.n_tokens, index, n_sequences)


def _check_contiguous(span: _IndexedSpan) -> None:
    """The flat stream is only right when the sequences lie back to back and fill the file."""
    index, n_sequences = span.index, span.n_sequences
    sizes = np.memmap(index, "<i4", mode="r", offset=HEADER.size, shape=(n_sequences,))
    pointers = np.memmap(
        index, "<i8", mode="r", offset=HEADER.size + 4 * n_sequences, shape=(n_sequences,)
    )
    width, at, block = np.dtype(span.dtype).itemsize, 0, 1 << 20
    for start in range(0, n_sequences, block):
        ends = np.cumsum(sizes[start : start + block], dtype=np.int64) * width + at
        if not np.array_equal(pointers[start : start + block], np.append(at, ends[:-1])):
            raise ValueError(f"{index}: the sequences are not back to back, so it is not supported")
        at = int(ends[-1])
    if at != span.n_tokens * width:
        raise ValueError(
            f"{span.path} has {span.n_tokens * width} bytes, but {index.name} says {at}"
        )
