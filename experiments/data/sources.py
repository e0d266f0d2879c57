"""Sources of text: each streams its training and its held-out documents, piece by piece.

A source has `identity()`, JSON that changes when its documents may change (the name of the prepared
folder hangs on it, file paths do not enter), `size_hint()`, bytes of training text where that is
known, and `pieces(split)`, which yields (text, ends_document) for split "train" or "val". A
document longer than PIECE_CHARS comes in several pieces, cut after a newline where there is one, so
that memory stays small and a byte-level tokenizer loses nothing.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

PIECE_CHARS = 1 << 20
SAMPLED_FROM = 4 << 20  # files above this many bytes are identified by samples
Piece = tuple[str, bool]


class TextSource(Protocol):
    """What `prepare` asks of a source of text."""

    def identity(self) -> dict[str, Any]: ...
    def size_hint(self) -> int | None: ...
    def pieces(self, split: str) -> Iterator[Piece]: ...


class Stdlib:
    """The .py files of the running interpreter's standard library, a document each, by name.

    Left out: installed packages, test suites (half of the bytes, mostly data tables) and the
    build's own `_sysconfigdata*`. One file in 20 of at most 32 KiB, by a hash of its name, is held
    out; larger ones always train, because one of them would fill the held-out set.
    """

    SKIPPED = frozenset(
        {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    )

    def __init__(self) -> None:
        self.root = Path(sysconfig.get_path("stdlib"))
        found = {p.relative_to(self.root).as_posix(): p for p in self.root.rglob("*.py")}
        self.files = {
            name: path
            for name, path in sorted(found.items())
            if self.SKIPPED.isdisjoint(name.split("/")) and not name.startswith("_sysconfigdata")
        }
        if not self.files:
            raise FileNotFoundError(
                f"no standard library sources in {self.root}: choose other data"
            )

    def identity(self) -> dict[str, Any]:
        return {"kind": "stdlib", "files": {n: content_id(p) for n, p in self.files.items()}}

    def size_hint(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())

    def pieces(self, split: str) -> Iterator[Piece]:
        held_out = [
            n for n, p in self.files.items() if _rank(n) % 20 == 0 and p.stat().st_size <= 32768
        ]
        if split == "val":  # by hash, so that a cut at val_tokens takes from the whole alphabet
            names: Iterable[str] = sorted(held_out, key=_rank)
        else:
            names = self.files.keys() - set(held_out)
        for name in sorted(names) if split == "train" else names:
            with tokenize.open(self.files[name]) as file:  # honours the coding line
                yield from cut(file.read())


class TextFiles:
    """UTF-8 text: files, folders (all below) or globs, one document a file, by name.

    Held out, by what is given: `val_paths`; the second of `split_bytes` = [train, val] when the
    paths are one file (a cut inside a character moves to its start); else of several files the
    share `val_fraction` by a hash of their names, and of one file its last part.
    """

    def __init__(
        self,
        paths: str | list[str],
        val_paths: str | list[str] | None = None,
        split_bytes: list[int] | None = None,
        val_fraction: float = 0.02,
    ) -> None:
        self.spans = {
            "train": _whole(find_files(paths)),
            "val": _whole(find_files(val_paths or [])),
        }
        if split_bytes and (val_paths or len(self.spans["train"]) != 1):
            raise ValueError("split_bytes cuts a single file: give one path and no val_paths")
        if val_paths:
            return
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction} must lie between 0 and 1")
        if len(self.spans["train"]) > 1:
            self._split_by_file(val_fraction)
        else:
            self._split_by_byte(split_bytes, val_fraction)

    def _split_by_file(self, val_fraction: float) -> None:
        spans = sorted(self.spans["train"], key=lambda span: _rank(span[0].name))
        n_val = max(1, round(val_fraction * len(spans)))
        self.spans = {"train": sorted(spans[n_val:]), "val": sorted(spans[:n_val])}

    def _split_by_byte(self, split_bytes: list[int] | None, val_fraction: float) -> None:
        path, _, size = self.spans["train"][0]
        n_train, n_val = split_bytes or (
            size - round(val_fraction * size),
            round(val_fraction * size),
        )
        if n_train + n_val > size:
            raise ValueError(f"{path} has {size} bytes, fewer than split_bytes={n_train},{n_val}")
        middle, end = _character_start(path, n_train), _character_start(path, n_train + n_val)
        self.spans = {"train": [(path, 0, middle)], "val": [(path, middle, end)]}

    def identity(self) -> dict[str, Any]:
        spans = {
            split: [[content_id(path), start, end] for path, start, end in spans]
            for split, spans in self.spans.items()
        }
        return {"kind": "text", **spans}

    def size_hint(self) -> int:
        return sum(end - start for _, start, end in self.spans["train"])

    def pieces(self, split: str) -> Iterator[Piece]:
        for path, start, end in self.spans[split]:
            yield from cut_stream(_decoded(path, start, end))


def find_files(paths: str | list[str]) -> list[Path]:
    """Files named by paths, folders (all below but hidden files) and globs, sorted by name.

    Raises FileNotFoundError for a path that names nothing and ValueError for a file without
    content.
    """
    files: list[Path] = []
    for pattern in [paths] if isinstance(paths, str) else paths:
        path = Path(pattern).expanduser()
        matches = (
            [path] if path.exists() else [Path(p) for p in glob.glob(str(path), recursive=True)]
        )
        below = [q for p in sorted(matches) for q in (sorted(p.rglob("*")) if p.is_dir() else [p])]
        found = [q for q in below if q.is_file() and not q.name.startswith(".")]
        if not found:
            raise FileNotFoundError(f"no data file at {path}")
        files += found
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"data file {file} is empty")
    return files


def content_id(path: Path) -> str:
    """Identifies a file wherever it lies: SHA-256, or above 4 MiB size, time and samples."""
    stat = path.stat()
    if stat.st_size <= SAMPLED_FROM:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{stat.st_size}-{stat.st_mtime_ns}-{sampled_sha256(path)}"


def sampled_sha256(path: Path, n_blocks: int = 64, block: int = 65536) -> str:
    """SHA-256 over the size and n_blocks evenly spaced blocks, which may overlap."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(n_blocks):
            file.seek(max(0, size - block) * i // (n_blocks - 1))
            digest.update(file.read(block))
    return digest.hexdigest()


def cut(text: str) -> Iterator[Piece]:
    """A document as pieces of at most PIECE_CHARS."""
    return cut_stream(text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS))


def cut_stream(chunks: Iterable[str]) -> Iterator[Piece]:
    """A document that comes in chunks as pieces: cut after the last newline, else at the chunk."""
    waiting = ""
    for chunk in chunks:
        if waiting:
            at = waiting.rfind("\n") + 1 or len(waiting)
            yield waiting[:at], False
            waiting = waiting[at:]
        waiting += chunk
    if waiting:
        yield waiting, True


def _whole(files: list[Path]) -> list[tuple[Path, int, int]]:
    return [(path, 0, path.stat().st_size) for path in files]


def _rank(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _character_start(path: Path, offset: int) -> int:
    with path.open("rb") as file:
        while offset > 0:
            file.seek(offset)
            byte = file.read(1)
            if not byte or byte[0] & 0xC0 != 0x80:  # not a continuation byte
                break
            offset -= 1
    return offset


def _decoded(path: Path, start: int, end: int) -> Iterator[str]:
    """Bytes [start, end) of a file as text, in chunks; ValueError where they are not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        file.seek(start)
        while start < end:
            data = file.read(min(PIECE_CHARS, end - start))
            if not data:
                raise ValueError(f"{path} shrank while it was read")
            start += len(data)
            try:
                yield decoder.decode(data, final=start >= end)
            except UnicodeDecodeError as error:
                at = start - len(error.object) + error.start
                raise ValueError(
                    f"{path} is not UTF-8 at byte {at}: convert it (iconv -f ... -t utf-8)"
                ) from None
