"""Where the rows of tasks come from when a pack is made: the hub, or files of one row a line."""

import gzip
import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.config.entry import one_line
from experiments.evaluation.task_files import scored_split

if TYPE_CHECKING:
    from datasets import Dataset

# Names of one data set on the hub: sets were moved, and a version of lm-eval names either.
SAME_DATA = (
    ("baber/piqa", "ybisk/piqa", "piqa"),
    ("aps/super_glue", "super_glue"),
    ("allenai/ai2_arc", "ai2_arc"),
    ("Rowan/hellaswag", "hellaswag"),
    ("allenai/winogrande", "winogrande"),
    ("allenai/openbookqa", "openbookqa"),
    ("allenai/sciq", "sciq"),
)


def data_set_names(path: str | None) -> list[str | None]:
    """A data set's name on the hub, and then the others it has or had."""
    same = next((names for names in SAME_DATA if path in names), ())
    return list(dict.fromkeys([path, *same]))


class Source:
    """Where rows come from: a folder of jsonl files, or the hub if `folder` is None.

    Args:
        folder: holds `<task>.jsonl` or `<task>.jsonl.gz`, rows of the split that is scored.
        files: other file names by task, relative to the folder.
        tasks: all tasks that will be asked for.

    Raises:
        FileNotFoundError: with all files that are missing and the tasks they are for.
    """

    def __init__(self, folder: Path | None, files: dict[str, str], tasks: list[str]) -> None:
        self.files: dict[str, Path] | None = None
        if files and (stray := files.keys() - set(tasks)):
            raise ValueError(f"files= names tasks that are not asked for: {', '.join(stray)}")
        if folder is None:
            if files:
                raise ValueError("files= names files of source=FOLDER: give that too")
            return
        if not folder.is_dir():
            raise FileNotFoundError(f"source={folder} is not a folder")
        self.files, missing = {}, []
        for task in tasks:
            names = [files[task]] if task in files else [f"{task}.jsonl", f"{task}.jsonl.gz"]
            found = [folder / name for name in names if (folder / name).is_file()]
            if found:
                self.files[task] = found[0]
            else:
                missing.append(f"{names[0]} (task {task})")
        if missing:
            raise FileNotFoundError(
                f"{folder} has no {', '.join(missing)}: leave such tasks out (tasks.tasks=[...]) "
                "or name other files ('files={TASK: NAME.jsonl}')"
            )

    def rows(self, config: dict[str, Any], splits: list[str]) -> "dict[str, Dataset]":
        """Rows of a task by split; from files those of the scored split alone."""
        if self.files is None:
            return hub_rows(config, splits)
        return {scored_split(config): read_jsonl(self.files[config["task"]])}


def read_jsonl(file: Path) -> "Dataset":
    """Rows of a (gzipped) file of one JSON object a line.

    Raises:
        ValueError: for a line that is none, or whose keys or types differ from the first's.
    """
    import pyarrow as pa
    from datasets import Dataset

    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as stream:
            lines = stream.read().split("\n")  # other marks of line ends may stand in a text
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file} is damaged: {one_line(error)}") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} of {file} is not JSON: {one_line(error)}") from None
        if row is None:
            continue
        if not isinstance(row, dict) or (rows and row.keys() != rows[0].keys()):
            raise ValueError(f"line {number} of {file} does not have the fields of the first line")
        rows.append(row)
    if not rows:
        raise ValueError(f"{file} holds no rows")
    try:
        return Dataset.from_list(rows)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise ValueError(
            f"a field of {file} has values of several types, or too large a number: {error}"
        ) from None


def hub_rows(config: dict[str, Any], splits: list[str]) -> "dict[str, Dataset]":
    """Rows of a task from the hub or its cache, under any name its data set has or had.

    Raises:
        ValueError: if it can be had under none, or lacks a split.
    """
    import datasets

    task, path, kwargs = config["task"], config.get("dataset_path"), config.get("dataset_kwargs")
    kwargs = {k: v for k, v in (kwargs or {}).items() if k != "trust_remote_code"}
    if callable(config.get("custom_dataset")):
        found = config["custom_dataset"](**(config.get("metadata") or {}), **kwargs)
        return {split: found[split] for split in splits}
    reasons = []
    for name in data_set_names(path):
        try:
            found = datasets.load_dataset(name, name=config.get("dataset_name"), **kwargs)
            return {split: found[split] for split in splits}
        except Exception as error:  # networks, hubs and data set builders fail in all ways
            reasons.append(f"{name}: {one_line(error)[:120]}")
    raise ValueError(
        f"the rows of {task} cannot be had from the hub ({'; '.join(reasons)}): give "
        f"source=FOLDER with {task}.jsonl, or copy a pack made where there is a network"
    )
