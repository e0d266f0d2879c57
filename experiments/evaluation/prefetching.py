"""Making a task pack: rows from the hub or from files, checked by building every document."""

import gzip
import json
import shutil
import tempfile
import zlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from experiments.config.entry import one_line
from experiments.evaluation.pack import content_hash, rows_file, write_rows
from experiments.evaluation.task_files import (
    data_set_names,
    definition,
    fewshot_split,
    scored_split,
    task_config,
    task_from_rows,
)
from experiments.evaluation.tasks import Tasks
from experiments.system.files import sha256, write_json

if TYPE_CHECKING:
    from datasets import Dataset

PARTS = {"pack.json", "data", "tokenizer.json"}  # of a pack's folder


@dataclass(frozen=True)
class Wanted:
    """What goes into a pack.

    Attributes:
        tasks: those asked for; a group is expanded.
        num_fewshot: examples in a prompt, for which their split is taken along; None: as each task
            says.
        n_documents: rows of whole official splits by task, where known.
        files: of each task the file of its rows; None: they come from the hub.
        tokenizer: a `tokenizer.json` to take along, or None.
    """

    tasks: Tasks
    num_fewshot: int | None
    n_documents: dict[str, int]
    files: dict[str, Path] | None
    tokenizer: Path | None = None


def make_pack(out: Path, wanted: Wanted) -> str:
    """Write a pack beside `out`, then rename it, in place of what is there; its hash.

    Raises:
        ValueError: if rows cannot be had or do not fit their task. Nothing is left behind then.
    """
    members = {name: wanted.tasks.leaves(name) for name in wanted.tasks.names}
    names = list(dict.fromkeys(leaf for leaves in members.values() for leaf in leaves))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        folder = Path(temporary) / "new"
        folder.mkdir()
        if wanted.tokenizer is not None:
            shutil.copyfile(wanted.tokenizer, folder / "tokenizer.json")
        tasks = {name: add_task(folder, name, wanted) for name in tqdm(names, disable=None)}
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        content: dict[str, Any] = {
            "lm_eval": version("lm-eval"),
            "tasks": tasks,
            "groups": {name: leaves for name, leaves in members.items() if leaves != [name]},
            "files": {path.relative_to(folder).as_posix(): sha256(path) for path in files},
        }
        content["hash"] = content_hash(content)
        write_json(folder / "pack.json", content)
        if out.exists():
            out.rename(Path(temporary) / "old")
        folder.rename(out)
    return content["hash"]


def add_task(folder: Path, name: str, wanted: Wanted) -> dict[str, Any]:
    """Check a task and write its rows into a pack's folder; its part of `pack.json`."""
    file, root = wanted.tasks.task_file(name)
    config = task_config(file)
    scored, shots = scored_split(config), wanted.num_fewshot
    splits = [scored]
    n_examples = (config.get("num_fewshot") or 0) if shots is None else shots
    if n_examples and (examples := fewshot_split(config)) not in (None, scored):
        splits.append(str(examples))
    if wanted.files is None:
        rows, origin = hub_rows(config, splits), str(config.get("dataset_path"))
    else:
        rows, origin = {scored: read_jsonl(wanted.files[name])}, str(wanted.files[name])
    official, n_rows = wanted.n_documents.get(name), len(rows[scored])
    try:
        if official is not None and n_rows > official:
            raise ValueError(f"{n_rows} rows, but its {scored} split has {official}")
        check_documents(build_task(config, rows), name)
    except ValueError as error:
        raise ValueError(f"{origin} is not right for task {name}: {error}") from None
    if official is None and wanted.files is None:
        official = n_rows
    return {
        "source": None if wanted.tasks.is_own(name) else file.relative_to(root).as_posix(),
        "definition": definition(file, root),
        "splits": {
            split: {"rows": len(part), "content": write_rows(part, folder / rows_file(name, split))}
            for split, part in rows.items()
        },
        "scored": scored,
        "official": official,
        "subset": None if official is None else n_rows < official,
    }


def build_task(config: dict[str, Any], rows: "dict[str, Dataset]") -> Any:
    """The task on its rows; where that fails, ValueError with the first row that is to blame."""
    try:
        return task_from_rows(config, rows)
    except Exception as error:  # task files run code of all kinds
        scored = scored_split(config)
        good, bad, reason = 0, len(rows[scored]), error
        while bad - good > 1:  # rows before `good` are fine, those before `bad` are not
            middle = (good + bad) // 2
            try:
                task_from_rows(config, rows | {scored: rows[scored].select(range(middle))})
                good = middle
            except Exception as earlier:  # as above
                bad, reason = middle, earlier
        raise ValueError(f"row {bad} does not fit it: {_typed(reason)}") from None


def check_documents(task: Any, name: str) -> None:
    """Build every document's requests and answer as the task (a `ConfigurableTask`) does.

    Raises:
        ValueError: with the number of the first document (from 1) that the rows do not allow.
    """
    for i, doc in enumerate(tqdm(task.eval_docs, desc=name, disable=None, leave=False), 1):
        try:
            context = task.fewshot_context(doc, num_fewshot=0)
            task.construct_requests(doc=doc, ctx=context, metadata=(name, i, 1))
            if task.OUTPUT_TYPE != "multiple_choice" or task.config.process_results:
                task.doc_to_target(doc)
                continue
            # of several questions with one answer, the text is the number of the right one
            gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
            choices = task.doc_to_choice(doc)
            for one in gold if isinstance(gold, list) else [gold]:
                known = one in choices if isinstance(one, str) else 0 <= one < len(choices)
                if not known:
                    raise ValueError(f"the answer {one!r} is none of the {len(choices)}")
        except Exception as error:  # task files run code of all kinds
            raise ValueError(f"row {i} does not fit it: {_typed(error)}") from None


def _typed(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)[:200]}"


def find_files(folder: Path | None, files: Any, tasks: list[str]) -> dict[str, Path] | None:
    """Of each task the file of its rows; None if there is no folder.

    Args:
        folder: holds `<task>.jsonl` or `<task>.jsonl.gz`, rows of the split that is scored.
        files: other file names by task, relative to the folder.

    Raises:
        FileNotFoundError: with all files that are missing and the tasks they are for.
        ValueError: if `files` is no mapping, or names something else than these tasks.
    """
    if not isinstance(files, dict):
        raise ValueError(f"files must be {{TASK: NAME.jsonl, ...}}, got {files!r}")
    if stray := files.keys() - set(tasks):
        raise ValueError(f"files= names tasks that are not asked for: {', '.join(stray)}")
    if folder is None:
        if files:
            raise ValueError("files= names files of source=FOLDER: give that too")
        return None
    if not folder.is_dir():
        raise FileNotFoundError(f"source={folder} is not a folder")
    found, missing = {}, []
    for task in tasks:
        names = [files[task]] if task in files else [f"{task}.jsonl", f"{task}.jsonl.gz"]
        there = [folder / name for name in names if (folder / name).is_file()]
        if there:
            found[task] = there[0]
        else:
            missing.append(f"{names[0]} (task {task})")
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {', '.join(missing)}: leave such tasks out (tasks.tasks=[...]) "
            "or name other files ('files={TASK: NAME.jsonl}')"
        )
    return found


def read_jsonl(file: Path) -> "Dataset":
    """Rows of a (gzipped) file of one JSON object a line.

    Raises:
        ValueError: for a line that is none, or whose keys or types differ from the first's.
    """
    import pyarrow as pa
    from datasets import Dataset

    rows: list[dict[str, Any]] = []
    number = 0
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):  # noqa: B007, the last one is named
                if line.strip():
                    rows.append(json.loads(line))
                    if rows[-1].keys() != rows[0].keys():
                        raise AttributeError
        if not rows:
            raise ValueError(f"{file} holds no rows")
        return Dataset.from_list(rows)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"line {number} of {file} is not JSON: {one_line(error)}") from None
    except AttributeError:  # a line that is no object has no keys either
        raise ValueError(
            f"line {number} of {file} does not have the fields of the first line"
        ) from None
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file} is damaged: {one_line(error)}") from None
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

    task, kwargs = config["task"], config.get("dataset_kwargs") or {}
    kwargs = {k: v for k, v in kwargs.items() if k != "trust_remote_code"}
    if callable(config.get("custom_dataset")):
        found = config["custom_dataset"](**(config.get("metadata") or {}), **kwargs)
        return {split: found[split] for split in splits}
    reasons = []
    for name in data_set_names(config.get("dataset_path")):
        try:
            found = datasets.load_dataset(name, name=config.get("dataset_name"), **kwargs)
            return {split: found[split] for split in splits}
        except Exception as error:  # networks, hubs and data set builders fail in all ways
            reasons.append(f"{name}: {one_line(error)[:120]}")
    raise ValueError(
        f"the rows of {task} cannot be had from the hub ({'; '.join(reasons)}): give "
        f"source=FOLDER with {task}.jsonl, or copy a pack made where there is a network"
    )


def check_out(out: Path, force: bool) -> None:
    """Raise ValueError if something is there that may not be replaced."""
    parts = {path.name for path in out.iterdir()} if out.is_dir() else set()
    is_pack = "pack.json" in parts and parts <= PARTS
    if out.exists() and not is_pack and (parts or not out.is_dir()):
        raise ValueError(f"out={out} is there and holds other things than a pack: name another")
    if is_pack and not force:
        raise ValueError(f"out={out} holds a pack: force=true replaces it")


def check_tokenizer(path: str | None) -> Path | None:
    """The path of a `tokenizer.json`, once that is one.

    Raises:
        FileNotFoundError, ValueError: if it is none.
    """
    from tokenizers import Tokenizer

    if path is None:
        return None
    if not Path(path).is_file():
        raise FileNotFoundError(f"tokenizer_file={path} is not a file")
    try:
        Tokenizer.from_file(path)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"tokenizer_file={path} is not a tokenizer.json: {one_line(error)}"
        ) from None
    return Path(path)
