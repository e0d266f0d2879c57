"""Make a task pack: rows and definitions of tasks in one folder, to be scored without a network.

    python -m experiments.prefetch tasks=paper12 out=packs/paper12
    python -m experiments.prefetch tasks=paper12 out=packs/paper12 source=rows \\
        'files={record: record_dev.jsonl}' tokenizer_file=20B_tokenizer.json

Rows come from the hub, or from `<task>.jsonl` files of one row a line. Every document is built once
as the task builds it, so that what does not fit is found here and not on the cluster. Training rows
are taken along only where the task set asks for worked examples (`tasks.num_fewshot`).
"""

import logging
import os
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import DictConfig
from tqdm import tqdm

from experiments.config.entry import entry, one_line
from experiments.config.identity import plain
from experiments.evaluation.pack import (
    FORMAT,
    Pack,
    check_name,
    content_hash,
    file_hash,
    write_rows,
)
from experiments.evaluation.task_files import (
    definition,
    fewshot_split,
    scored_split,
    task_config,
    task_from_rows,
)
from experiments.evaluation.task_rows import Source
from experiments.evaluation.tasks import Tasks
from experiments.system.files import write_json

if TYPE_CHECKING:
    from datasets import Dataset


def check_documents(task: Any, name: str) -> None:
    """Build every document's requests and answer as the task (a `ConfigurableTask`) does.

    Raises:
        ValueError: with the number of the first document (from 1) that the rows do not allow.
    """
    for i, doc in enumerate(tqdm(task.eval_docs, desc=name, disable=None, leave=False), 1):
        try:
            context = task.fewshot_context(doc, num_fewshot=0)
            task.construct_requests(doc=doc, ctx=context, metadata=(name, i, 1))
            if task.OUTPUT_TYPE == "multiple_choice" and not task.config.process_results:
                # of several questions with one answer, the text is the number of the right one
                gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
                choices = task.doc_to_choice(doc)
                for one in gold if isinstance(gold, list) else [gold]:
                    known = one in choices if isinstance(one, str) else 0 <= one < len(choices)
                    if not known:
                        raise ValueError(f"the answer {one!r} is none of the {len(choices)}")
            else:
                task.doc_to_target(doc)
        except Exception as error:  # task files run code of all kinds
            raise ValueError(f"row {i} does not fit it: {_typed(error)}") from None


def _typed(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)[:200]}"


def _build(config: dict[str, Any], rows: "dict[str, Dataset]") -> Any:
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


def add_task(
    folder: Path, name: str, tasks: Tasks, source: Source, wanted: dict[str, Any]
) -> dict[str, Any]:
    """Check a task and write its files into a pack's folder; its part of `pack.json`."""
    check_name(name)
    file, root = tasks.task_file(name)
    config = task_config(file)
    scored, shots = scored_split(config), wanted["num_fewshot"]
    splits = [scored]
    if (config.get("num_fewshot") or 0 if shots is None else shots) and fewshot_split(config):
        splits = list(dict.fromkeys([scored, str(fewshot_split(config))]))
    rows = source.rows(config, splits)
    official, n_rows = wanted["n_documents"].get(name), len(rows[scored])
    try:
        if official is not None and n_rows > official:
            raise ValueError(f"{n_rows} rows, but its {scored} split has {official}")
        check_documents(_build(config, rows), name)
    except ValueError as error:
        origin = source.files[name] if source.files else config.get("dataset_path")
        raise ValueError(f"{origin} is not right for task {name}: {error}") from None
    if official is None and source.files is None:
        official = n_rows
    own = tasks.include_path is not None and root == Path(tasks.include_path).resolve()
    text = yaml.safe_dump(definition(file, root), sort_keys=True, allow_unicode=True)
    described = folder / "tasks" / f"{name}.yaml"
    described.parent.mkdir(exist_ok=True)
    described.write_text(text, encoding="utf-8")
    written = {}
    for split, part in rows.items():
        check_name(split)
        target = folder / "data" / name / f"{split}.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        content = write_rows(part, target)
        written[split] = {**_file(target, folder), "rows": len(part), "content": content}
    return {
        "version": (config.get("metadata") or {}).get("version"),
        "source": None if own else file.relative_to(root).as_posix(),
        "definition": _file(described, folder),
        "splits": written,
        "scored": scored,
        "official": official,
        "subset": None if official is None else n_rows < official,
    }


def _file(file: Path, folder: Path) -> dict[str, Any]:
    return {"file": file.relative_to(folder).as_posix(), "sha256": file_hash(file)}


def make_pack(
    out: Path, tasks: Tasks, source: Source, wanted: dict[str, Any], tokenizer: Path | None
) -> str:
    """Write a pack beside `out`, then rename it, in place of what is there; its hash.

    Args:
        tasks: those asked for; a group is expanded.
        wanted: the task set (conf/tasks): `num_fewshot`, `n_documents`.
        tokenizer: a `tokenizer.json` to take along, or None.

    Raises:
        ValueError: if rows cannot be had or do not fit their task. Nothing is left behind then.
    """
    expanded = {name: tasks.leaves(name) for name in tasks.names}
    leaves = list(dict.fromkeys(leaf for leaves in expanded.values() for leaf in leaves))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        folder = Path(temporary) / "new"
        folder.mkdir()
        content: dict[str, Any] = {
            "format": FORMAT,
            "lm_eval": version("lm-eval"),
            "tasks": {},
            "groups": {name: part for name, part in expanded.items() if part != [name]},
            "tokenizer": None,
        }
        if tokenizer is not None:
            (folder / "tokenizer").mkdir()
            copy = folder / "tokenizer" / "tokenizer.json"
            shutil.copyfile(tokenizer, copy)
            content["tokenizer"] = _file(copy, folder)
        for leaf in tqdm(leaves, desc="tasks", disable=None):
            content["tasks"][leaf] = add_task(folder, leaf, tasks, source, wanted)
        content["hash"] = content_hash(content)
        write_json(folder / "pack.json", content)
        if out.exists():
            out.rename(Path(temporary) / "old")
        folder.rename(out)
    return content["hash"]


def check_out(out: Path, force: bool) -> None:
    """Raise ValueError if a folder is there that may not be replaced."""
    parts = {path.name for path in out.iterdir()} if out.is_dir() else set()
    pack = {"pack.json", "tasks", "data", "tokenizer"}
    if out.exists() and (not out.is_dir() or parts - pack or (parts and "pack.json" not in parts)):
        raise ValueError(f"out={out} is there and holds other things than a pack: name another")
    if parts and not force:
        raise ValueError(f"out={out} holds a pack: force=true replaces it")


def read_tokenizer(path: str | None) -> Path | None:
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


@entry("prefetch")
def main(cfg: DictConfig) -> None:
    out, wanted = Path(str(cfg.out)), plain(cfg.tasks)  # out=2024 is read as a number
    check_out(out, cfg.force)
    tokenizer = read_tokenizer(cfg.tokenizer_file)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # before it is imported
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = Tasks(wanted["tasks"], wanted["include_path"], seed=0)
    for name in tasks.names:
        if tasks.uses_data(name):
            raise ValueError(f"{name} is made from each run's own text: it needs no pack")
    leaves = [leaf for name in tasks.names for leaf in tasks.leaves(name)]
    folder = None if cfg.source is None else Path(str(cfg.source))
    files = plain(cfg)["files"] or {}
    if not isinstance(files, dict):
        raise ValueError(f"files must be {{TASK: NAME.jsonl, ...}}, got {files!r}")
    source = Source(folder, files, leaves)
    digest = make_pack(out, tasks, source, wanted, tokenizer)
    for name, task in Pack(out).tasks.items():
        n_rows, of = task["splits"][task["scored"]]["rows"], task["official"] or "an unknown number"
        note = f" (a subset: the official split has {of})" if task["subset"] else ""
        print(f"{name}: {n_rows} rows of {task['scored']}{note}")
    print(f"{out}: {len(leaves)} tasks, hash {digest[:16]}")


if __name__ == "__main__":
    main()
