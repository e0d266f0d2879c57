"""A task pack: tasks, their rows and a tokenizer in one hashed folder, to score without a network.

    pack.json                    what is in it, and a SHA-256 of every other file
    data/<task>/<split>.parquet  rows as the data set has them, with its column types
    tokenizer.json               if one was given

`prefetching.py` makes packs. A pack is data: what a task does is always said by the installed
lm-eval (or the user's own task file), and must be what the pack was made for.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.system.files import sha256

if TYPE_CHECKING:
    from datasets import Dataset, Features


class Pack:
    """A pack on disk, every file of it checked against its hash.

    Args:
        path: the folder.

    Attributes:
        tasks: by name: `source` (the task file, relative to lm-eval's folder of tasks; None for a
            user's own), `definition` (that file as plain data), `splits` (of each the number of
            `rows` and a hash of their `content`), `scored` (one of these), `official` (rows of the
            whole split, or None), `subset` (True, False, None: not known).
        groups: names that stand for several tasks -> those tasks.
        lm_eval: version of lm-eval it was made with.
        tokenizer: path of its `tokenizer.json`, or None.

    Raises:
        FileNotFoundError: if there is no pack, or a file of it is missing.
        ValueError: if it is damaged or names files outside its folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index = self.path / "pack.json"
        if not index.is_file():
            raise FileNotFoundError(
                f"{self.path} is not a task pack: it has no pack.json; make one with "
                "python -m experiments.prefetch out=DIR"
            )
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
            self.hash: str = content.pop("hash")
            intact = self.hash == content_hash(content)
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            intact = False
        if not intact:
            raise ValueError(f"{index} is damaged: its hash is off; copy the pack again")
        self.tasks: dict[str, dict[str, Any]] = content["tasks"]
        self.groups: dict[str, list[str]] = content["groups"]
        self.lm_eval: str = content["lm_eval"]
        self._files: dict[str, str] = content["files"]
        for file, digest in self._files.items():
            check_file(self.path, file, digest)
        has_one = "tokenizer.json" in self._files
        self.tokenizer = self.path / "tokenizer.json" if has_one else None

    def task_hash(self, task: str) -> str:
        """Hash of a task's definition and rows, 64 hex digits, whatever else the pack holds."""
        entry = self.tasks[task]
        rows = {split: part["content"] for split, part in entry["splits"].items()}
        return content_hash({"definition": entry["definition"], "rows": rows})

    def dataset(self, task: str) -> "dict[str, Dataset]":
        """The rows of a task by split, in memory: no cache is read or written.

        Raises:
            ValueError: if a file is not listed, or holds columns that are not plain.
        """
        import pyarrow.parquet as pq
        from datasets import Dataset

        rows = {}
        for split in self.tasks[task]["splits"]:
            file = rows_file(task, split)
            if file not in self._files:
                raise ValueError(f"{self.path} lists no hash of {file}: do not use this pack")
            with pq.ParquetFile(self.path / file) as parquet:
                rows[split] = Dataset(parquet.read())
            check_columns(rows[split].features, file)
        return rows


def check_file(folder: Path, name: str, digest: str) -> None:
    """Raise unless a file lies within a pack's folder and has this SHA-256."""
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"the pack names a file outside its folder, {name!r}: do not use it")
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: copy the pack again")
    if sha256(file) != digest:
        raise ValueError(f"{file} is damaged: its hash is off; copy the pack again")


def rows_file(task: str, split: str) -> str:
    """Where a pack keeps the rows of a split.

    Raises:
        ValueError: for a name that cannot be a file's.
    """
    for name in (task, split):
        if not re.fullmatch(r"[A-Za-z0-9_.+:-]*[A-Za-z0-9_]", name):
            raise ValueError(f"{name!r} cannot name a file: use letters, digits, '_', '-', '.'")
    return f"data/{task}/{split}.parquet"


def write_rows(rows: "Dataset", file: Path) -> str:
    """Write rows as Parquet with their column types, and return a hash of their values.

    Unlike the file's, this hash is the same for every version of the library that writes it.

    Raises:
        ValueError: if a column is of a kind that packs do not hold.
    """
    check_columns(rows.features, str(file))
    file.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(str(file))
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def check_columns(features: "Features", file: str) -> None:
    """Raise ValueError for a column (an image, audio) that opens files named in the rows."""
    from datasets.features.features import require_decoding

    for column, kind in features.items():
        if require_decoding(kind, ignore_decode_attribute=True):
            raise ValueError(f"{file}: column {column!r} is no text or number, as packs hold")


def content_hash(content: Any) -> str:
    """Hash of a JSON value; 64 hex digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
