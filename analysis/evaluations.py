"""Reads what was measured on runs: scores, what each document gave, and the cost of generating.

Nothing here writes, and a damaged file never stops the others: it is returned with the reason.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis import formats as fmt
from analysis.runs import ABOUT, BROKEN, each_run, one_line, read_json

COSTS = ["n_tokens", "prefill_s", "decode_s", "state_bytes"]
PEAK = "peak_mem_bytes"
GENERATION_PROTOCOL = ["batch_size", "n_threads", "device", "dtype", "chunk_len"]
# of a score's protocol, what may differ between scores in one table: weights, tokenizer and longest
# context are the model's own, the device only rounds, a pack only brings the documents, which are
# compared themselves, the rest is counted or timed
MODELS_OWN = {"weights", "tokenizer", "max_ctx"}
NOT_COMPARED = MODELS_OWN | {"device", "pack", "n_truncated", "time_s", "protocol_hash"}
# the metric that stands for a task: the paper's tables use these, plain accuracy for the others
HEADLINES = {
    "arc_challenge": "acc_norm",
    "headqa_en": "acc_norm",
    "hellaswag": "acc_norm",
    "openbookqa": "acc_norm",
    "record": "em",
}
# shares of documents: more is better, and a mean over tasks may be taken
SHARES = ("acc", "acc_norm", "em", "exact_match")
LOWER_IS_BETTER = ("perplexity", "byte_perplexity", "word_perplexity", "bits_per_byte")
ROLLING = "loglikelihood_rolling"
USUAL = ("acc", "bits_per_byte", "em", "exact_match", "perplexity")
# what guessing gets, from the number of choices; ARC has a few questions with 3 or 5 of them
CHANCE = {
    "arc_challenge": 0.25, "arc_easy": 0.25, "boolq": 0.5, "copa": 0.5, "headqa_en": 0.25,
    "hellaswag": 0.25, "openbookqa": 0.25, "piqa": 0.5, "sciq": 0.25, "winogrande": 0.5,
}  # fmt: skip


def load_scores(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """One row per run, task and metric of eval/*.json: `score`, `stderr` and `chance` (NaN when
    unknown), `headline`, `weights`, `n_documents`, `subset` (None when unknown), and a column
    `protocol/...` for each thing that must be equal in one table, as text (a dash for none). Also
    (run, reason) for what could not be read."""
    rows: list[dict[str, Any]] = []
    problems = []
    for path, about in each_run(runs):
        for file in sorted(path.glob("eval/*.json")):
            try:
                rows += [about | score for score in _task_scores(read_json(file), file.stem)]
            except BROKEN as error:
                problems.append((about["run"], f"eval/{file.name}: {one_line(error)}"))
    columns = [*ABOUT, "task", "metric", "score", "stderr", "headline", "higher_is_better"]
    columns += ["chance", "n_documents", "subset", "weights"]
    protocol = sorted({key for row in rows for key in row if key.startswith("protocol/")})
    scores = pd.DataFrame(rows, columns=[*columns, *protocol])
    return scores.fillna(dict.fromkeys(protocol, fmt.MISSING)), problems


def load_documents(run: Path, task: str) -> pd.DataFrame:
    """What every document of a task gave: a row each, in the order of eval/<task>.documents.jsonl,
    with its hash in `doc` and a column per metric (lm-eval's bare names).

    FileNotFoundError when the run has no such file; ValueError for one that is damaged, or that was
    not made together with eval/<task>.json."""
    file = run / "eval" / f"{task}.documents.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"no eval/{file.name}: score it again")
    scored = read_json(run / "eval" / f"{task}.json")
    made = (scored.get("protocol") or {}).get("protocol_hash")
    try:
        head, *rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        told = (head["task"], head["protocol_hash"])
        frame = pd.DataFrame(rows)
        whole = len(frame) > 0 and all(isinstance(doc, str) for doc in frame["doc"])
    except BROKEN as error:
        raise ValueError(f"eval/{file.name} is damaged: {one_line(error)}") from None
    if made is None or told != (task, made):
        raise ValueError(f"eval/{file.name} is not of the protocol of eval/{task}.json")
    n = _n_documents(scored, task)
    if not whole or (np.isfinite(n) and n != len(frame)):
        raise ValueError(f"eval/{file.name} has {len(frame)} documents, eval/{task}.json {n:.0f}")
    return frame


def document_values(documents: pd.DataFrame, metric: str) -> tuple[npt.NDArray, npt.NDArray]:
    """A metric's value for each document and the weight it has in the task's score: 1, or the
    bytes or words it is taken over. A perplexity's values are logarithms, in nats.

    ValueError for a metric that documents do not have, or not as a number."""
    if metric not in documents:
        raise ValueError(f"its documents have no {metric}")
    values = documents[metric].to_list()
    rates = {"bits_per_byte": 1 / np.log(2), "byte_perplexity": 1.0, "word_perplexity": 1.0}
    try:
        if metric in rates:  # (log-likelihood, length): the score is a ratio of their sums
            pairs = np.array(values, dtype="float64").reshape(len(values), 2)
            numbers, weights = -pairs[:, 0] * rates[metric] / pairs[:, 1], pairs[:, 1]
        else:
            numbers, weights = np.array(values, dtype="float64"), np.ones(len(values))
    except (TypeError, ValueError):
        raise ValueError(f"the {metric} of its documents is not one number each") from None
    if numbers.ndim != 1 or not np.isfinite(numbers).all() or not (weights > 0).all():
        raise ValueError(f"the {metric} of its documents is not one finite number each")
    return (-numbers if metric == "perplexity" else numbers), weights


def load_generation(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """The rows of every bench/generate.json: at context length `n_tokens` the seconds to read it
    (`prefill_s`) and for one more token (`decode_s`), `state_bytes` computed, `peak_mem_bytes`
    measured beyond the weights (NaN when not), the protocol and the run. Also (run, reason) for
    what could not be read."""
    rows: list[dict[str, Any]] = []
    problems = []
    for path, about in each_run(runs):
        file = path / "bench" / "generate.json"
        if not file.exists():
            continue
        try:
            content = read_json(file)
            if any("seconds" in row for row in content["rows"]):
                raise ValueError("measured by an earlier version: measure again")
            about |= {key: content["protocol"].get(key) for key in GENERATION_PROTOCOL}
            for row in content["rows"]:
                peak = row.get(PEAK)
                costs = {key: float(row[key]) for key in COSTS}
                rows.append(about | costs | {PEAK: np.nan if peak is None else float(peak)})
        except BROKEN as error:
            problems.append((about["run"], f"bench/generate.json: {one_line(error)}"))
    generation = pd.DataFrame(rows, columns=[*ABOUT, *COSTS, PEAK, *GENERATION_PROTOCOL])
    return generation.astype({"n_tokens": "int64"}), problems


def _task_scores(content: dict[str, Any], task: str) -> list[dict[str, Any]]:
    results = content.get("results", {}).get(task)
    if not isinstance(results, dict):
        raise ValueError(f"no results for {task}")
    metrics = [
        key
        for key, value in results.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    ]
    if not metrics:
        raise ValueError(f"no numeric metric for {task}")
    usual = [f"{m},none" for m in (HEADLINES.get(task), *USUAL)]
    first = next((m for m in usual if m in metrics), metrics[0])
    config = content.get("config", {}).get(task, {})
    protocol = content.get("protocol", {})
    n_documents = _n_documents(content, task)
    compared = {key: value for key, value in protocol.items() if key not in NOT_COMPARED}
    if config.get("output_type", ROLLING) != ROLLING:
        compared.pop("rolling_ctx", None)  # the window of other tasks; RWKV's and GPT's may differ
    compared |= {
        "version": content.get("versions", {}).get(task),
        "n_shot": content.get("n-shot", {}).get(task),
        "n_documents": n_documents,
    }
    about = {
        "task": task,
        "chance": (config.get("metadata") or {}).get("chance", CHANCE.get(task, np.nan)),
        "n_documents": n_documents,
        "subset": protocol.get("subset"),
        "weights": fmt.text(protocol.get("weights"))[:8],
        **{f"protocol/{key}": fmt.text(value) for key, value in compared.items()},
    }
    told = content.get("higher_is_better", {}).get(task) or {}
    scores = []
    for metric in sorted(metrics, key=lambda m: m != first):
        name, _, tail = metric.partition(",")
        stderr = results.get(f"{name}_stderr,{tail}")
        stderr = stderr if isinstance(stderr, int | float) else np.nan  # lm-eval writes "N/A"
        about_metric = {"metric": metric, "score": results[metric], "stderr": stderr}
        about_metric |= {"higher_is_better": told.get(name, name not in LOWER_IS_BETTER)}
        scores.append(about | about_metric | {"headline": metric == first})
    return scores


def _n_documents(content: dict[str, Any], task: str) -> float:
    told = content.get("protocol", {}).get("n_documents")
    if told is None:
        told = content.get("n-samples", {}).get(task, {}).get("effective")
    return np.nan if told is None else told
