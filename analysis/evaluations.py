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
from analysis.runs import ABOUT, BENCH, BROKEN, EVAL, Problems, one_line, read_each, read_json

COSTS = ["n_tokens", "prefill_s", "decode_s", "state_bytes"]
PEAK = "peak_mem_bytes"
GENERATION_PROTOCOL = ["batch_size", "n_threads", "device", "dtype", "chunk_len"]
# of a score's protocol, what may differ between scores in one table: weights, tokenizer and longest
# context belong to the model, the device only rounds, a pack only brings the documents, which are
# compared themselves, the rest is counted or timed
NOT_COMPARED = {
    "weights", "tokenizer", "max_ctx", "device", "pack", "n_truncated", "time_s", "protocol_hash",
}  # fmt: skip
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


def load_scores(runs: pd.DataFrame) -> tuple[pd.DataFrame, Problems]:
    """One row per run, task and metric of eval/*.json.

    Returns:
        `score`, `stderr` and `chance` (NaN when unknown), `headline`, `weights`, `n_documents`,
        `subset` (None when unknown), and a column `protocol/...` for each thing that must be equal
        in one table, as text (a dash for none).
    """
    rows, problems = read_each(runs, f"{EVAL}/*.json", _task_scores)
    columns = [*ABOUT, "task", "metric", "score", "stderr", "headline", "higher_is_better"]
    columns += ["chance", "n_documents", "subset", "weights"]
    protocol = sorted({key for row in rows for key in row if key.startswith("protocol/")})
    scores = pd.DataFrame(rows, columns=[*columns, *protocol])
    return scores.fillna(dict.fromkeys(protocol, fmt.MISSING)), problems


def load_generation(runs: pd.DataFrame) -> tuple[pd.DataFrame, Problems]:
    """The rows of every bench/generate.json, with the protocol and the run.

    Returns:
        At context length `n_tokens` the seconds to read it (`prefill_s`) and for one more token
        (`decode_s`), `state_bytes` computed, `peak_mem_bytes` measured beyond the weights (NaN
        when not).
    """
    rows, problems = read_each(runs, f"{BENCH}/generate.json", _generation_costs)
    generation = pd.DataFrame(rows, columns=[*ABOUT, *COSTS, PEAK, *GENERATION_PROTOCOL])
    return generation.astype({"n_tokens": "int64"}), problems


def _generation_costs(file: Path) -> list[dict[str, Any]]:
    content = read_json(file)
    protocol = {key: content["protocol"].get(key) for key in GENERATION_PROTOCOL}
    return [
        protocol
        | {key: float(row[key]) for key in COSTS}
        | {PEAK: np.nan if row.get(PEAK) is None else float(row[PEAK])}
        for row in content["rows"]
    ]


def load_documents(run: Path, task: str) -> pd.DataFrame:
    """What every document of a task gave, in the order of eval/<task>.documents.jsonl.

    Returns:
        A row a document: its hash in `doc` and a column per metric (lm-eval's bare names).

    Raises:
        FileNotFoundError: if the run has no such file.
        ValueError: if it is damaged, or was not made together with eval/<task>.json.
    """
    file = run / EVAL / f"{task}.documents.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"no {EVAL}/{file.name}: score it again")
    protocol = read_json(run / EVAL / f"{task}.json")["protocol"]
    try:
        head, *rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        made_for = (head["task"], head["protocol_hash"])
        frame = pd.DataFrame(rows)
    except BROKEN as error:
        raise ValueError(f"{EVAL}/{file.name} is damaged: {one_line(error)}") from None
    if made_for != (task, protocol.get("protocol_hash")):
        raise ValueError(f"{EVAL}/{file.name} is not of the protocol of {EVAL}/{task}.json")
    n = protocol["n_documents"]
    if n != len(frame):
        raise ValueError(f"{EVAL}/{file.name} has {len(frame)} documents, {EVAL}/{task}.json {n}")
    return frame


def document_values(documents: pd.DataFrame, metric: str) -> tuple[npt.NDArray, npt.NDArray]:
    """A metric's value for each document, and the weight it has in the task's score.

    Returns:
        Values (n,), of a perplexity the logarithms, in nats; weights (n,): 1, or the bytes or words
        that a value is taken over.

    Raises:
        ValueError: for a metric that documents do not have, or not as a number.
    """
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


def _task_scores(file: Path) -> list[dict[str, Any]]:
    content, task = read_json(file), file.stem
    results, protocol = content["results"][task], content["protocol"]
    metrics = [
        key
        for key, value in results.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    ]
    if not metrics:
        raise ValueError(f"no numeric metric for {task}")
    usual = [f"{m},none" for m in (HEADLINES.get(task), *USUAL)]
    first = next((m for m in usual if m in metrics), metrics[0])
    config = content["config"][task]
    compared = {key: value for key, value in protocol.items() if key not in NOT_COMPARED}
    if config.get("output_type", ROLLING) != ROLLING:
        compared.pop("rolling_ctx", None)  # the window of other tasks; models' may differ
    compared |= {"version": content["versions"].get(task), "n_shot": content["n-shot"].get(task)}
    about = {
        "task": task,
        "chance": (config.get("metadata") or {}).get("chance", CHANCE.get(task, np.nan)),
        "n_documents": protocol["n_documents"],
        "subset": protocol["subset"],
        "weights": fmt.text(protocol["weights"])[:8],
        **{f"protocol/{key}": fmt.text(value) for key, value in compared.items()},
    }
    directions = content.get("higher_is_better", {}).get(task) or {}
    scores = []
    for metric in sorted(metrics, key=lambda m: m != first):
        name, _, tail = metric.partition(",")
        stderr = results.get(f"{name}_stderr,{tail}")
        about_metric = {
            "metric": metric,
            "score": results[metric],
            "stderr": stderr if isinstance(stderr, int | float) else np.nan,  # lm-eval's "N/A"
            "headline": metric == first,
            "higher_is_better": directions.get(name, name not in LOWER_IS_BETTER),
        }
        scores.append(about | about_metric)
    return scores
