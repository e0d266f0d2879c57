"""A task pack: the rows and definitions of tasks in one folder, to score where there is no network.

    pack.json                    what is in it, with a SHA-256 of every file
    tasks/<task>.yaml            the task's definition, to read and to compare, never to execute
    data/<task>/<split>.parquet  rows as the data set has them, with its column types
    tokenizer/tokenizer.json     if one was given

`experiments.prefetch` makes packs. All of a pack is data: nothing in it is executed.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT = 1
# What a column may hold. Others (images, audio) would open files or addresses named in the rows.
COLUMN_TYPES = {"Value", "ClassLabel", "List", "LargeList", "Sequence", "Translation"}


class Pack:
    """A pack on disk, every file of it checked against its hash.

    Args:
        path: the folder.

    Attributes:
        hash: of everything in it, 64 hex digits; two packs of the same content have the same.
        tasks: by name, as `pack.json` has them: `version`, `source` (task file, relative to
            lm-eval's), `definition`, `splits` (each with `file`, `sha256`, `rows` and their
            `content`'s hash), `scored` (a split), `official` (rows of the whole split, or None),
            `subset` (True, False, None).
        groups: names that stand for several tasks -> those tasks.
        lm_eval: version of lm-eval it was made with.
        tokenizer: path of a `tokenizer.json`, or None.

    Raises:
        FileNotFoundError: if there is no pack, or a file of it is missing.
        ValueError: if it is damaged, of another format, or names files outside its folder.
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
            if content["format"] != FORMAT:
                raise ValueError(
                    f"{index} has format {content['format']!r}, this version reads {FORMAT}: "
                    "make the pack again"
                )
            self.hash = content.pop("hash")
            if self.hash != content_hash(content):
                raise ValueError(f"{index} is damaged: its hash is off; copy the pack again")
            self.tasks: dict[str, dict[str, Any]] = content["tasks"]
            self.groups: dict[str, list[str]] = content["groups"]
            self.lm_eval = str(content["lm_eval"])
            _ = [self.tasks[leaf] for leaves in self.groups.values() for leaf in leaves]
            for name, task in self.tasks.items():
                check_name(name)
                _within(task["source"] or "own.yaml", ".yaml")
                self.task_hash(name)
                _ = task["splits"][task["scored"]], task["official"], task["subset"]
            for entry in files_of(content):
                self._check_file(entry)
            tokenizer = content["tokenizer"]
            self.tokenizer = self.path / tokenizer["file"] if tokenizer else None
        except (
            json.JSONDecodeError, UnicodeDecodeError, RecursionError,
            KeyError, TypeError, AttributeError,
        ):  # fmt: skip
            raise ValueError(f"{index} is damaged: copy the pack again, or make it again") from None

    def _check_file(self, entry: dict[str, Any]) -> None:
        _within(entry["file"])
        file = self.path / entry["file"]
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: copy the pack again")
        if not file.resolve().is_relative_to(self.path.resolve()):
            raise ValueError(f"{file} leads out of the pack: do not use it")
        if file_hash(file) != entry["sha256"]:
            raise ValueError(f"{file} is damaged: its hash is off; copy the pack again")

    def definition(self, task: str) -> dict[str, Any]:
        """A task's definition as plain data; functions are texts, `!function file.name`.

        Raises:
            ValueError: if it is more than data.
        """
        file = self.path / self.tasks[task]["definition"]["file"]
        try:
            read = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            read = None
        if not isinstance(read, dict):
            raise ValueError(f"{file} is not a task's definition as plain data: do not use it")
        return read

    def task_hash(self, task: str) -> str:
        """Hash of a task's definition and rows, 64 hex digits, whatever else the pack holds."""
        entry = self.tasks[task]
        rows = {split: part["content"] for split, part in entry["splits"].items()}
        return content_hash({"definition": entry["definition"]["sha256"], "rows": rows})

    def dataset(self, task: str) -> "dict[str, Dataset]":
        """The rows of a task by split, in memory: no cache is read or written.

        Raises:
            ValueError: if a file is not a table of plain columns.
        """
        splits = self.tasks[task]["splits"].items()
        return {split: read_rows(self.path / entry["file"]) for split, entry in splits}


def files_of(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The entries (`file`, `sha256`) of all files that a pack.json names."""
    for task in content["tasks"].values():
        yield task["definition"]
        yield from task["splits"].values()
    if content["tokenizer"]:
        yield content["tokenizer"]


def content_hash(content: dict[str, Any]) -> str:
    """Hash of a JSON object, such as a pack.json without its own `hash`; 64 hex digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_hash(file: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_name(name: str) -> None:
    """Raise ValueError unless a task's or split's name can name a file."""
    if not re.fullmatch(r"[A-Za-z0-9_.+:-]*[A-Za-z0-9_]", name):
        raise ValueError(f"{name!r} cannot name a file: use letters, digits, '_', '-', '.'")


def _within(file: str, suffix: str = "") -> None:
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or not file.endswith(suffix) or "\\" in file:
        raise ValueError(f"the pack names a file outside its folder, {file!r}: do not use it")


def write_rows(dataset: "Dataset", file: Path) -> str:
    """Write rows as Parquet with the data set's column types; same rows, same bytes.

    Returns a hash of the rows that, unlike the file's, is the same for every version of the library
    that writes it.

    Raises:
        ValueError: if a column is of a kind that packs do not hold (images, audio).
    """
    import pyarrow.parquet as pq

    schema = dataset.features.arrow_schema
    _check_columns(json.loads(schema.metadata[b"huggingface"])["info"]["features"], str(file))
    table = dataset.with_format("arrow")[:].cast(schema).combine_chunks()
    pq.write_table(table.replace_schema_metadata(schema.metadata), file, compression="zstd")
    digest = hashlib.sha256()
    for row in table.to_pylist():
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def read_rows(file: Path) -> "Dataset":
    """Rows that `write_rows` wrote, in memory.

    Raises:
        ValueError: if the file is not such a table, or holds columns that are not plain.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset, DatasetInfo, Features

    try:
        with pq.ParquetFile(file) as parquet:
            table = parquet.read()
        described = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        _check_columns(described, str(file))
        info = DatasetInfo(features=Features.from_dict(described))
        return Dataset(table, info=info, fingerprint=file_hash(file)[:16])
    except (pa.ArrowException, KeyError, TypeError) as error:
        raise ValueError(f"{file} holds no rows of a task ({error}): make the pack again") from None


def _check_columns(node: Any, file: str) -> None:
    """Raise ValueError for a column type that is not in COLUMN_TYPES, at any depth."""
    if isinstance(node, list):
        for value in node:
            _check_columns(value, file)
    elif isinstance(node, dict):
        kind = node.get("_type", "Value")
        if isinstance(kind, str) and kind not in COLUMN_TYPES:
            raise ValueError(f"{file} has a column of type {kind!r}: packs hold text and numbers")
        for value in node.values():
            _check_columns(value, file)
