"""Sources of text: each streams its training and its held-out documents, piece by piece."""

import codecs
import hashlib
import os
import sysconfig
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.data.files import content_id, find_splits

PIECE_CHARS = 1 << 16  # small, so that one long document can keep many cores busy


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a document.

    Documents longer than PIECE_CHARS come in several pieces, cut after a newline where there is
    one, so that memory stays small and a byte-level tokenizer loses nothing.
    """

    text: str
    ends_document: bool


class TextSource(ABC):
    """What `prepare` needs of a source of text."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON that changes when the documents may change; paths of files are not part of it."""

    @abstractmethod
    def pieces(self, split: str) -> Iterator[Piece]:
        """The documents of split "train" or "val"."""

    def size_hint(self) -> int | None:
        """Bytes of training text, if known."""
        return None


class Stdlib(TextSource):
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
        small = (name for name, path in self.files.items() if path.stat().st_size <= 32768)
        # in the order of their hash, so that a cut at val_tokens takes from all over
        self.held_out = sorted((name for name in small if rank(name) % 20 == 0), key=rank)

    def identity(self) -> dict[str, Any]:
        files = {name: content_id(path) for name, path in self.files.items()}
        return {"kind": "stdlib", "files": files, "held_out": self.held_out}

    def size_hint(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())

    def pieces(self, split: str) -> Iterator[Piece]:
        train = sorted(self.files.keys() - set(self.held_out))
        for name in self.held_out if split == "val" else train:
            with tokenize.open(self.files[name]) as file:  # honours the coding line
                yield from cut(file.read())


@dataclass(frozen=True)
class ByteSpan:
    """Bytes [start, end) of a file."""

    path: Path
    start: int
    end: int


class TextFiles(TextSource):
    """UTF-8 text: files, folders (all below) or globs, one document a file, by name.

    Held out are, by what is given: `val_paths`; the second of `split_bytes` = [train, val] of a
    single file (a cut inside a character moves to its start); else the share `val_fraction`, of
    several files by a hash of their content (copies stay together), of one file its last part.

    Raises:
        FileNotFoundError, ValueError: if there are no such files, or they cannot be split so.
    """

    def __init__(
        self,
        paths: str | list[str],
        val_paths: str | list[str] | None = None,
        split_bytes: list[int] | None = None,
        val_fraction: float = 0.02,
    ) -> None:
        check_fraction(val_fraction)
        train, val = find_splits(paths, val_paths)
        self.ids = {path: content_id(path) for path in (*train, *val)}
        if split_bytes and (val or len(train) > 1):
            raise ValueError("split_bytes cuts a single file: give one path and no val_paths")
        if val:
            self.spans = {"train": _whole(train), "val": _whole(val)}
        elif len(train) > 1:
            self.spans = self._split_by_file(train, val_fraction)
        else:
            self.spans = _split_by_byte(train[0], split_bytes, val_fraction)

    def _split_by_file(self, files: list[Path], val_fraction: float) -> dict[str, list[ByteSpan]]:
        ranked = sorted(set(self.ids.values()), key=rank)
        held_out = set(ranked[: max(1, round(val_fraction * len(ranked)))])
        return {
            "train": _whole([file for file in files if self.ids[file] not in held_out]),
            "val": _whole([file for file in files if self.ids[file] in held_out]),
        }

    def identity(self) -> dict[str, Any]:
        spans = {
            split: [[self.ids[span.path], span.start, span.end] for span in spans]
            for split, spans in self.spans.items()
        }
        return {"kind": "text", **spans}

    def size_hint(self) -> int:
        return sum(span.end - span.start for span in self.spans["train"])

    def pieces(self, split: str) -> Iterator[Piece]:
        for span in self.spans[split]:
            yield from cut_stream(_decoded(span))


def check_fraction(val_fraction: float) -> None:
    """Raise ValueError unless a share of the documents can be held out."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} must lie between 0 and 1")


def rank(text: str) -> int:
    """A hash that orders texts at random, uniform in [0, 2^64)."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:8], "big")


def cut(text: str) -> Iterator[Piece]:
    """A document as pieces of about PIECE_CHARS."""
    return cut_stream(text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS))


def cut_stream(chunks: Iterable[str]) -> Iterator[Piece]:
    """A document that comes in chunks as pieces: cut after the last newline, else at the chunk."""
    waiting = ""
    for chunk in chunks:
        if waiting:
            at = waiting.rfind("\n") + 1 or len(waiting)
            yield Piece(waiting[:at], ends_document=False)
            waiting = waiting[at:]
        waiting += chunk
    if waiting:
        yield Piece(waiting, ends_document=True)


def _whole(files: list[Path]) -> list[ByteSpan]:
    return [ByteSpan(path, 0, path.stat().st_size) for path in files]


def _split_by_byte(
    path: Path, split_bytes: list[int] | None, val_fraction: float
) -> dict[str, list[ByteSpan]]:
    size = path.stat().st_size
    middle, end = size - round(val_fraction * size), size
    if split_bytes:
        if len(split_bytes) != 2 or not all(isinstance(n, int) and n > 0 for n in split_bytes):
            raise ValueError(f"split_bytes={split_bytes} must be two positive numbers of bytes")
        middle, end = split_bytes[0], sum(split_bytes)
        if end > size:
            raise ValueError(f"{path} has {size} bytes, fewer than split_bytes={split_bytes}")
    middle, end = _character_start(path, middle), _character_start(path, end)
    return {"train": [ByteSpan(path, 0, middle)], "val": [ByteSpan(path, middle, end)]}


def _character_start(path: Path, offset: int) -> int:
    with path.open("rb") as file:
        while offset > 0:
            file.seek(offset)
            byte = file.read(1)
            if not byte or byte[0] & 0xC0 != 0x80:  # not a continuation byte
                break
            offset -= 1
    return offset


def _decoded(span: ByteSpan) -> Iterator[str]:
    """The text of a span, in chunks; ValueError where it is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = span.start
    with span.path.open("rb") as file:
        file.seek(at)
        while data := file.read(min(PIECE_CHARS, span.end - at)):
            at += len(data)
            try:
                yield decoder.decode(data, final=at == span.end)
            except UnicodeDecodeError as error:
                wrong = at - len(error.object) + error.start
                raise ValueError(
                    f"{span.path} is not UTF-8 at byte {wrong}: convert it (iconv -f ... -t utf-8)"
                ) from None
