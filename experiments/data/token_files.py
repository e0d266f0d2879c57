"""Files of tokens, and sources that are tokens already: Megatron / GPT-NeoX and nanoGPT.

The files of such a source are used where they are, never copied (the tokenised Pile has 664 GB).
Headers, sizes and the held-out ids are checked once; other ids when they are read.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.files import content_id, sampled_sha256

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document index entries
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
        """How `meta.json` refers to the span, with a hash of samples."""
        width = np.dtype(self.dtype).itemsize
        digest = sampled_sha256(self.path, self.offset * width, self.n_tokens * width)
        place = {"path": str(self.path), "offset": self.offset, "n_tokens": self.n_tokens}
        return place | {"sha256": digest}


class TokenSource:
    """What `prepare` needs of a source of ids; without a held-out file its end is held out."""

    kind: str

    def __init__(self, train: TokenSpan, val: TokenSpan | None) -> None:
        if val is not None and val.path == train.path:
            raise ValueError(
                f"{val.path} is both training and held-out text: name another file, or none to hold"
                " out its end"
            )
        if val is not None and val.dtype != train.dtype:
            raise ValueError(f"{val.path} has {val.dtype} tokens, {train.path} {train.dtype}")
        self.train, self.val = train, val

    def identity(self) -> dict[str, Any]:
        """JSON that changes when the tokens may; with paths, for prepared data refers to them."""
        spans = [span for span in (self.train, self.val) if span is not None]
        files = [[str(span.path), span.dtype, content_id(span.path)] for span in spans]
        return {"kind": self.kind, "files": files}

    def check(self) -> None:
        """Raise ValueError if the files are not one flat stream of tokens."""

    def spans(self, val_tokens: int | None) -> dict[str, TokenSpan]:
        """The tokens of "train" and "val".

        Raises:
            ValueError: if val_tokens cannot be held out of a single file.
        """
        train, val = self.train, self.val
        if val is not None:
            n_val = min(val.n_tokens, val_tokens or val.n_tokens)
            return {"train": train, "val": TokenSpan(val.path, val.dtype, 0, n_val)}
        if val_tokens is None or val_tokens >= train.n_tokens:
            raise ValueError(
                f"cannot hold out val_tokens={val_tokens} of {train.n_tokens} tokens in"
                f" {train.path}"
            )
        n_train = train.n_tokens - val_tokens
        return {
            "train": TokenSpan(train.path, train.dtype, 0, n_train),
            "val": TokenSpan(train.path, train.dtype, n_train, val_tokens),
        }


class NanoGpt(TokenSource):
    """A raw file of uint16 ids."""

    kind = "nanogpt"

    def __init__(self, path: str, val_path: str | None = None) -> None:
        val = _whole_file(_existing(val_path), "uint16") if val_path else None
        super().__init__(_whole_file(_existing(path), "uint16"), val)


class Megatron(TokenSource):
    """`<prefix>.bin` with `<prefix>.idx`, as one flat stream."""

    kind = "megatron"

    def __init__(self, prefix: str, val_prefix: str | None = None) -> None:
        self.indices = [Index(one) for one in (prefix, val_prefix) if one]
        train, *val = [index.span for index in self.indices]
        super().__init__(train, val[0] if val else None)

    def check(self) -> None:
        for index in self.indices:
            index.check_contiguous()


class Index:
    """The `.idx` file beside Megatron tokens: header, lengths and positions of its sequences.

    Raises:
        FileNotFoundError, ValueError: if either is missing, damaged or of another version.
    """

    def __init__(self, prefix: str) -> None:
        self.path = _existing(prefix + ".idx")
        with self.path.open("rb") as file:
            head = file.read(HEADER.size)
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise ValueError(f"{self.path} is not a Megatron index (no {MAGIC!r} at its start)")
        _, version, code, self.n_sequences, n_documents = HEADER.unpack(head)
        if version != 1 or code not in DTYPES:
            raise ValueError(
                f"{self.path}: version {version} with dtype code {code} is not supported"
            )
        if self.path.stat().st_size != HEADER.size + 12 * self.n_sequences + 8 * n_documents:
            raise ValueError(
                f"{self.path} is truncated or damaged: its size does not fit {self.n_sequences}"
                " sequences"
            )
        self.span = _whole_file(_existing(prefix + ".bin"), DTYPES[code])

    def check_contiguous(self) -> None:
        """Raise ValueError unless the sequences are back to back and fill the file of tokens."""
        n, span, block = self.n_sequences, self.span, 1 << 20
        width = np.dtype(span.dtype).itemsize
        lengths = np.memmap(self.path, "<i4", mode="r", offset=HEADER.size, shape=(n,))
        starts = np.memmap(self.path, "<i8", mode="r", offset=HEADER.size + 4 * n, shape=(n,))
        at = 0  # bytes
        for first in range(0, n, block):  # the index of the Pile has gigabytes
            ends = np.cumsum(lengths[first : first + block], dtype=np.int64) * width + at
            if not np.array_equal(starts[first : first + block], np.append(at, ends[:-1])):
                raise ValueError(
                    f"{self.path}: the sequences are not back to back, so it is not supported"
                )
            at = int(ends[-1])
        if at != span.n_tokens * width:
            raise ValueError(
                f"{span.path} has {span.n_tokens * width} bytes, but {self.path.name} says {at}"
            )


def checked_ids(tokens: np.ndarray, vocab_size: int, origin: Path) -> np.ndarray:
    """Tokens as int64; ValueError if they were made with another tokenizer."""
    ids = tokens.astype(np.int64)
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(
            f"{origin} holds ids from {ids.min()} to {ids.max()}, outside vocab_size={vocab_size}:"
            " it was made with another tokenizer"
        )
    return ids


def _existing(path: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no token file {file}")
    return file.resolve()


def _whole_file(path: Path, dtype: str) -> TokenSpan:
    width, size = np.dtype(dtype).itemsize, path.stat().st_size
    if size == 0 or size % width:
        raise ValueError(f"token file {path} has {size} bytes, not a positive multiple of {width}")
    return TokenSpan(path, dtype, 0, size // width)
