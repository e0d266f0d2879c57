"""What stands beside a score: the weights, the data and the file it is kept in."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.evaluation.journal import protocol_hash
from experiments.runs.run_dir import RunDir
from experiments.system.files import write_json, write_text

# What lm-eval reports for each task, and the name under which our files have it.
PARTS = {
    "results": "results",
    "versions": "versions",
    "n-shot": "n-shot",
    "higher_is_better": "higher_is_better",
    "configs": "config",
    "n-samples": "n-samples",
}


def result_file(run: RunDir, task: str) -> Path:
    """Where the result of a task is kept."""
    if not re.fullmatch(r"[A-Za-z0-9_.+:-]*[A-Za-z0-9_]", task):
        raise ValueError(f"{task!r} cannot name a result file: use letters, digits, '_', '-', '.'")
    return run.scores / f"{task}.json"


def read_scored(file: Path, protocol: dict[str, Any]) -> dict[str, Any] | None:
    """A result file's content, if it was made under exactly this protocol."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        stored = content["protocol"]
        return content if all(stored[k] == v for k, v in protocol.items()) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def split_by_task(
    results: dict[str, Any],
    protocol: dict[str, Any],
    extra: dict[str, Any],
    documents: Callable[[str], dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """lm-eval's results as one such dictionary for each task (and group with scores of its own).

    Args:
        protocol: what decides the scores; `extra` stands beside it and does not.
        documents: a task's `official` number of documents and whether `subset` of them is here.
    """
    from lm_eval.utils import handle_non_serializable

    contents = {}
    for task, scores in results["results"].items():
        if not any(isinstance(v, int | float) and "," in k for k, v in scores.items()):
            continue  # a group that does not average its tasks
        content: dict[str, Any] = {"protocol": protocol | extra}
        for lm_eval_name, name in PARTS.items():
            content[name] = {k: v for k, v in results[lm_eval_name].items() if k == task}
        content["config"].get(task, {}).pop("custom_dataset", None)  # code, for our own tasks
        samples = results["samples"].get(task)
        if samples is not None:
            hashes = {sample["doc_id"]: sample["doc_hash"] for sample in samples}
            joined = "".join(sorted(hashes.values()))
            counts, here = results["n-samples"][task], documents(task)
            fewer = len(hashes) < (here["official"] or counts["original"])
            content["protocol"] |= {
                "n_documents": len(hashes),
                "subset": True if fewer else here["subset"],
                "documents": hashlib.sha256(joined.encode()).hexdigest()[:16],
            }
        content["protocol"]["protocol_hash"] = protocol_hash(protocol | {"task": task})
        contents[task] = json.loads(json.dumps(content, default=handle_non_serializable))
    return contents


def write_scored(
    run: RunDir, task: str, content: dict[str, Any], samples: list[dict[str, Any]] | None
) -> None:
    """Keep a task's result, and before it each document's own metrics for paired comparisons.

    `<task>.documents.jsonl` begins with a line {task, protocol_hash}; then a line a document, in
    order: `doc`, the hash of what was asked, and its metrics by lm-eval's names (of filters other
    than "none", as "metric,filter").
    """
    file = result_file(run, task)
    if samples is not None:
        documents: dict[int, dict[str, Any]] = {}
        seen: Counter[str] = Counter()
        for sample in samples:
            if sample["doc_id"] not in documents:
                name = sample["doc_hash"][:24]
                again = f"#{seen[name]}" if seen[name] else ""  # a document that occurs twice
                documents[sample["doc_id"]] = {"doc": name + again}
                seen[name] += 1
            row = documents[sample["doc_id"]]
            for metric in sample["metrics"]:
                name = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                row[name] = sample[metric]
        head = {"task": task, "protocol_hash": content["protocol"]["protocol_hash"]}
        rows = (documents[number] for number in sorted(documents))
        lines = [json.dumps(row, default=float) for row in (head, *rows)]
        write_text(file.with_suffix(".documents.jsonl"), "\n".join([*lines, ""]))
    write_json(file, content)


def table(scored: dict[str, dict[str, dict[str, Any]]]) -> str:
    """lm-eval's own table over all runs: run -> task -> content of its file."""
    from lm_eval.utils import make_table

    rows: dict[str, dict[str, Any]] = {name: {} for name in PARTS.values()}
    for run, contents in scored.items():
        for task, content in contents.items():
            for part in PARTS.values():
                rows[part] |= {f"{run} {task}": v for v in content[part].values()}
            rows["results"][f"{run} {task}"] |= {"alias": f"{run} {task}"}
    return make_table(rows)
