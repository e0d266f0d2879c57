"""Sources of text whose documents are records: lines of JSON, rows of a Hugging Face dataset.

Where no held-out part is named, a share of the documents is held out by a hash of their text, so
that copies of one document are never on both sides.
"""

import gzip
import json
import os
import zlib
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from experiments.data.files import content_id, find_files, find_splits
from experiments.data.sources import (
    PIECE_CHARS,
    Piece,
    TextSource,
    check_fraction,
    cut,
    cut_stream,
    rank,
)


class _Records(TextSource):
    """Splits documents by hash unless `val_given`."""

    def __init__(self, val_given: bool, val_fraction: float) -> None:
        check_fraction(val_fraction)
        self.val_given, self.val_fraction = val_given, val_fraction

    @abstractmethod
    def documents(self, split: str) -> Iterator[str]:
        """The documents of a split; all of them when no held-out part is given."""

    def pieces(self, split: str) -> Iterator[Piece]:
        for text in self.documents(split):
            is_held_out = rank(text) < self.val_fraction * 2**64
            if self.val_given or is_held_out == (split == "val"):
                yield from cut(text)


class Jsonl(_Records):
    """Lines of JSON objects with the text under `field`; files, folders, globs; `.gz` or plain."""

    def __init__(
        self,
        paths: str | list[str],
        val_paths: str | list[str] | None = None,
        field: str = "text",
        val_fraction: float = 0.01,
    ) -> None:
        super().__init__(bool(val_paths), val_fraction)
        train, val = find_splits(paths, val_paths)
        self.files = {"train": train, "val": val or train}
        self.field = field

    def identity(self) -> dict[str, Any]:
        files = {split: [content_id(p) for p in paths] for split, paths in self.files.items()}
        settings = {"field": self.field, "val_fraction": self.val_fraction}
        return {"kind": "jsonl", **files, "val_given": self.val_given, **settings}

    def size_hint(self) -> int | None:
        files = self.files["train"]
        if any(path.suffix == ".gz" for path in files):
            return None
        return sum(path.stat().st_size for path in files)

    def documents(self, split: str) -> Iterator[str]:
        for path in self.files[split]:
            for number, line in enumerate(_lines(path), 1):
                if line.strip():
                    yield self._text(line, f"{path}:{number}")

    def _text(self, line: bytes, where: str) -> str:
        try:
            record = json.loads(line)
        except ValueError as error:  # UnicodeDecodeError too
            raise ValueError(f"{where}: not JSON ({error})") from None
        text = record.get(self.field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ValueError(
                f"{where}: no text under {self.field!r} (data.source.field names the key)"
            )
        return text


class HuggingFace(_Records):
    """A dataset of the hub, or a local folder in one of the library's formats, streamed.

    `one_document` says that the rows are lines of one running text. A dataset on the hub is
    identified by name and revision, not by content: pin the revision where that matters.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        column: str = "text",
        revision: str | None = None,
        one_document: bool = False,
        val_fraction: float = 0.01,
    ) -> None:
        super().__init__(bool(val_split), val_fraction)
        if one_document and not val_split:
            raise ValueError("one_document rows cannot be held out one by one: name a val_split")
        if val_split == split:
            raise ValueError(
                f"split {split!r} of {path} is both training and held-out text: name another"
                " val_split, or none"
            )
        self.path, self.name, self.revision = os.path.expanduser(path), name, revision
        self.splits = {"train": split, "val": val_split or split}
        self.column, self.one_document = column, one_document

    def identity(self) -> dict[str, Any]:
        local = Path(self.path).exists()
        data = [content_id(p) for p in find_files(self.path)] if local else self.path
        return {"kind": "hf", "data": data, **{k: v for k, v in vars(self).items() if k != "path"}}

    def pieces(self, split: str) -> Iterator[Piece]:
        if self.one_document:
            return cut_stream(_joined(self.documents(split)))
        return super().pieces(split)

    def documents(self, split: str) -> Iterator[str]:
        for row in self._rows(self.splits[split]):
            text = row.get(self.column)
            if not isinstance(text, str):
                raise ValueError(
                    f"{self.path}: no text in column {self.column!r} (it has: {', '.join(row)})"
                )
            yield text

    def _rows(self, split: str) -> Iterator[dict[str, Any]]:
        import datasets  # slow to import, and only this source needs it

        try:
            yield from datasets.load_dataset(
                self.path, self.name, split=split, revision=self.revision, streaming=True
            )
        except Exception as error:  # what networks and file formats raise has no common base
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"cannot read dataset {self.path!r}, split {split!r}: {reason}"
            ) from error


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with cast(IO[bytes], gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _joined(rows: Iterator[str]) -> Iterator[str]:
    waiting: list[str] = []
    n_chars = 0
    for row in rows:
        waiting.append(row)
        n_chars += len(row)
        if n_chars >= PIECE_CHARS:
            yield "".join(waiting)
            waiting, n_chars = [], 0
    yield "".join(waiting)
