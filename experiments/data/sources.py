"""Sources of text: each streams its training and its held-out documents, piece by piece.

A source has `identity()`, JSON that changes when its documents may change (the name of the prepared
folder hangs on it, file paths do not enter), `size_hint()`, bytes of training text where that is
known, and `pieces(split)`, which yields (text, ends_document) for split "train" or "val". A
document longer than PIECE_CHARS comes in several pieces, cut after a newline where there is one, so
that memory stays small and a byte-level tokenizer loses nothing.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from experiments.data.files import content_id, find_both

PIECE_CHARS = 1 << 16  # small, so that one long document can keep many cores busy
Piece = tuple[str, bool]
Span = tuple[Path, int, int]  # bytes [start, end) of a file


@runtime_checkable
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
        root = Path(sysconfig.get_path("stdlib"))
        self.files: dict[str, Path] = {}
        for folder, below, names in os.walk(root):
            below[:] = [name for name in below if name not in self.SKIPPED]
            for name in names:
                if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                    path = Path(folder, name)
                    self.files[path.relative_to(root).as_posix()] = path
        if not self.files:
            raise FileNotFoundError(f"no standard library sources in {root}: choose other data")

    def identity(self) -> dict[str, Any]:
        files = {name: content_id(path) for name, path in self.files.items()}
        return {"kind": "stdlib", "files": files, "held_out": self._held_out()}

    def size_hint(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())

    def pieces(self, split: str) -> Iterator[Piece]:
        held_out = self._held_out()
        for name in held_out if split == "val" else sorted(self.files.keys() - set(held_out)):
            with tokenize.open(self.files[name]) as file:  # honours the coding line
                yield from cut(file.read())

    def _held_out(self) -> list[str]:
        """Names in the order of their hash, so that a cut at val_tokens takes from all over."""
        names = [n for n, path in self.files.items() if _rank(n) % 20 == 0 and _is_small(path)]
        return sorted(names, key=_rank)


class TextFiles:
    """UTF-8 text: files, folders (all below) or globs, one document a file, by name.

    Held out, by what is given: `val_paths`; the second of `split_bytes` = [train, val] when the
    paths are one file (a cut inside a character moves to its start); else of several files the
    share `val_fraction` by a hash of their content (copies stay together), and of one file its last
    part.
    """

    def __init__(
        self,
        paths: str | list[str],
        val_paths: str | list[str] | None = None,
        split_bytes: list[int] | None = None,
        val_fraction: float = 0.02,
    ) -> None:
        train, val = find_both(paths, val_paths)
        self.ids = {path: content_id(path) for path in (*train, *val)}
        self.spans = {"train": _whole(train), "val": _whole(val)}
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
        ranked = sorted(set(self.ids.values()), key=_rank)
        held_out = set(ranked[: max(1, round(val_fraction * len(ranked)))])
        sides: dict[str, list[Span]] = {"train": [], "val": []}
        for span in self.spans["train"]:
            sides["val" if self.ids[span[0]] in held_out else "train"].append(span)
        self.spans = sides

    def _split_by_byte(self, split_bytes: list[int] | None, val_fraction: float) -> None:
        path, _, size = self.spans["train"][0]
        if split_bytes and not (len(split_bytes) == 2 and all(map(_is_count, split_bytes))):
            raise ValueError(f"split_bytes={split_bytes} must be two positive numbers of bytes")
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
            split: [[self.ids[path], start, end] for path, start, end in spans]
            for split, spans in self.spans.items()
        }
        return {"kind": "text", **spans}

    def size_hint(self) -> int:
        return sum(end - start for _, start, end in self.spans["train"])

    def pieces(self, split: str) -> Iterator[Piece]:
        for path, start, end in self.spans[split]:
            yield from cut_stream(_decoded(path, start, end))


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


def _whole(files: list[Path]) -> list[Span]:
    return [(path, 0, path.stat().st_size) for path in files]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value > 0


def _is_small(path: Path) -> bool:
    return path.stat().st_size <= 32768


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
