"""Reads run directories (CONTRIBUTING.md) into tidy frames, and says which it had to leave out.

Nothing here writes. A run that is missing pieces, still going or damaged never stops the others: it
becomes a row of `Study.left_out` with the reason.
"""

import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import formats as fmt

REFERENCE = "gpt"  # the family that the others are compared with, and come before
MARKS = ("config.yaml", "manifest.json", "metrics.csv", "result.json", "error.txt")
NOT_RUNS = {"report", "checkpoints", "eval", "bench"}
SPEED = ["perf/tokens_per_s", "perf/mfu", "perf/peak_mem_bytes"]
METRICS = ["step", "tokens", "time_s", "lr", "train/loss", "train/grad_norm"]
METRICS += ["val/loss", "val/bpb", *SPEED]
SIZES = ["parameters/total", "parameters/non_embedding", "flops_per_token"]
# what a finished run must have, and may not leave empty, for any table to be right
TEXTS = ("suite", "model", "family", "name", "data/fingerprint", "data/tokenizer_hash")
NUMBERS = ["seed", *SIZES, "budget_tokens", "step", "tokens", "flops", "time_s", "val/loss"]
OPTIONAL = ["val/bpb", "train/loss", "data/xz_bpb", "ctx_len", "batch_size", "data/seed", *SPEED]
# how a run was trained; runs that differ here are no repeats of each other
CONDITIONS = ["recipe/optim", "recipe/schedule", "precision"]
ABOUT = ["run", "model", "family", "parameters/total"]
COSTS = ("n_tokens", "seconds", "state_bytes")
GENERATION_PROTOCOL = ["batch_size", "n_threads", "device", "dtype", "prompt_tokens"]
# of a score's protocol, what may differ between scores in one table: the weights and the longest
# context are the model's own, the device only rounds, the rest is counted or timed
NOT_COMPARED = {"weights", "max_ctx", "device", "n_truncated", "time_s"}

# what reading a damaged or foreign file can raise
BROKEN = (OSError, ValueError, TypeError, KeyError, AttributeError)


def load_runs(path_or_glob: str | Path) -> pd.DataFrame:
    """One row a run: manifest and result flattened with "/" (`parameters/total`, `val/bpb`), and
    `path`, `run`, `variant` (the overrides without the seed), `status` (finished,
    running-or-interrupted, failed, unreadable) and `reason`.

    FileNotFoundError when there is no run at all."""
    text = str(path_or_glob)
    roots = sorted(glob.glob(text)) if glob.has_magic(text) else [text]
    found = sorted({run for root in roots for run in _run_dirs(root)})
    if not found:
        raise FileNotFoundError(
            f"no runs in {text}: give a folder (or glob) that holds run directories"
        )
    runs = pd.DataFrame([_read_run(path) for path in found])
    for column in (*NUMBERS, *OPTIONAL):
        if column not in runs:
            runs[column] = np.nan
        runs[column] = pd.to_numeric(runs[column], errors="coerce")
    for column in (*TEXTS, *CONDITIONS):
        if column not in runs:
            runs[column] = None
    runs["is_reference"] = runs["family"] == REFERENCE
    order = ["is_reference", "family", "parameters/total", "run"]
    return runs.sort_values(order, ignore_index=True).drop(columns="is_reference")


def load_curves(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """The rows of every metrics.csv, tidy, with `run`, `model`, `family` and `parameters/total`; of
    two rows of one step and kind (train or val) the later counts. Also (run, reason) for what
    could not be read."""
    frames, problems = {}, []
    abouts = list(_each(runs))
    for i, (path, about) in enumerate(abouts):
        try:
            frames[i], dropped = _read_metrics(path / "metrics.csv")
        except BROKEN as error:
            problems.append((about["run"], f"metrics.csv: {_one_line(error)}"))
            continue
        if dropped:
            problems.append((about["run"], f"metrics.csv: {dropped} damaged rows skipped"))
    if not frames:
        return pd.DataFrame(columns=[*METRICS, *ABOUT]), problems
    curves = pd.concat(frames)
    owners = runs[ABOUT].take(curves.index.get_level_values(0).to_numpy()).reset_index(drop=True)
    return pd.concat([curves.reset_index(drop=True), owners], axis=1), problems


def load_scores(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """One row per run, task and metric of eval/*.json: `score`, `stderr` and `chance` (NaN when
    unknown), `headline`, `weights`, and a column `protocol/...` for each thing that must be equal
    in one table, as text (a dash for none). Also (run, reason) for what could not be read."""
    rows: list[dict[str, Any]] = []
    problems = []
    for path, about in _each(runs):
        for file in sorted(path.glob("eval/*.json")):
            try:
                rows += [about | score for score in _task_scores(_read_json(file), file.stem)]
            except BROKEN as error:
                problems.append((about["run"], f"eval/{file.name}: {_one_line(error)}"))
    columns = [*ABOUT, "task", "metric", "score", "stderr", "headline", "chance", "n_documents"]
    protocol = sorted({key for row in rows for key in row if key.startswith("protocol/")})
    scores = pd.DataFrame(rows, columns=[*columns, "weights", *protocol])
    return scores.fillna(dict.fromkeys(protocol, fmt.MISSING)), problems


def load_generation(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """The rows of every bench/generate.json: `n_tokens`, cumulative `seconds`, `state_bytes`, the
    protocol and the run. Also (run, reason) for what could not be read."""
    rows: list[dict[str, Any]] = []
    problems = []
    for path, about in _each(runs):
        file = path / "bench" / "generate.json"
        if not file.exists():
            continue
        try:
            content = _read_json(file)
            about |= {key: content["protocol"].get(key) for key in GENERATION_PROTOCOL}
            rows += [about | {key: float(row[key]) for key in COSTS} for row in content["rows"]]
        except BROKEN as error:
            problems.append((about["run"], f"bench/generate.json: {_one_line(error)}"))
    generation = pd.DataFrame(rows, columns=[*ABOUT, *COSTS, *GENERATION_PROTOCOL])
    return generation.astype({"n_tokens": "int64"}), problems


def _each(runs: pd.DataFrame) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path, *about in runs[["path", *ABOUT]].itertuples(index=False):
        yield Path(path), dict(zip(ABOUT, about, strict=True))


def _run_dirs(root: str) -> Iterator[str]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in NOT_RUNS and not s.startswith(".")]
        if any(mark in files for mark in MARKS):
            subfolders.clear()
            yield folder


def _read_run(path: str) -> dict[str, Any]:
    folder = Path(path)
    row: dict[str, Any] = {
        "path": path,
        "run": "/".join(folder.parts[-3:]),
        "variant": "",
        "reason": "",
    }
    manifest, result = folder / "manifest.json", folder / "result.json"
    try:
        if manifest.exists():
            row |= _flat(_read_json(manifest))
        if result.exists():
            row |= _flat(_read_json(result))
            _check_finished(row)
            row["run"] = row["name"]
            overrides = row["name"].rsplit("/", 1)[-1].split(",")
            row["variant"] = ",".join(o for o in overrides if not o.startswith("seed="))
            return row | {"status": "finished"}
    except (OSError, ValueError) as error:
        return row | {"status": "unreadable", "reason": _one_line(error)}
    if (folder / "error.txt").exists():
        lines = (folder / "error.txt").read_text(errors="replace").strip().splitlines()
        return row | {
            "status": "failed",
            "reason": (lines or ["error.txt is empty"])[0].strip()[:200],  # a traceback follows
        }
    return row | {"status": "running-or-interrupted", "reason": _progress(folder / "metrics.csv")}


def _check_finished(row: dict[str, Any]) -> None:
    for key in TEXTS:
        if not isinstance(row.get(key), str):
            raise ValueError(f"manifest.json lacks {key}")
    for key in NUMBERS:
        value = row.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise ValueError(f"manifest.json and result.json have {key}={value!r}, not a number")


def _progress(metrics: Path) -> str:
    try:
        frame, _ = _read_metrics(metrics)
    except (OSError, ValueError):
        return "no result.json, no readable metrics.csv yet"
    if frame.empty:
        return "no result.json, no metrics yet"
    return f"no result.json; reached step {int(frame['step'].max())}"


def _read_metrics(path: Path) -> tuple[pd.DataFrame, int]:
    """The rows, and how many were damaged; the first parse is fast and nearly always enough."""
    try:
        frame = pd.read_csv(path, dtype="float64", index_col=False)
        n_lines = len(frame)
    except (ValueError, pd.errors.ParserError):
        frame = pd.read_csv(path, dtype="str", on_bad_lines="skip", index_col=False)
        n_lines = (
            sum(1 for line in path.read_text(errors="replace").splitlines() if line.strip()) - 1
        )
        cells = frame.apply(pd.to_numeric, errors="coerce")
        frame = cells[~(cells.isna() & frame.notna()).any(axis=1)]
    if list(frame.columns) != METRICS:
        raise ValueError("its first line is not the list of columns in CONTRIBUTING.md")
    frame = frame[frame["step"].notna() & frame["tokens"].notna()]
    dropped = n_lines - len(frame)
    kinds = pd.DataFrame({"step": frame["step"], "is_val": frame["val/loss"].notna()})
    return frame[~kinds.duplicated(keep="last")], dropped


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
    first = next(
        (m for m in ("acc,none", "bits_per_byte,none", "perplexity,none") if m in metrics),
        metrics[0],
    )
    config = content.get("config", {}).get(task, {})
    protocol = content.get("protocol", {})
    n_documents = content.get("n-samples", {}).get(task, {}).get("effective", np.nan)
    compared = {key: value for key, value in protocol.items() if key not in NOT_COMPARED}
    compared |= {
        "version": content.get("versions", {}).get(task),
        "n_shot": content.get("n-shot", {}).get(task),
        "n_documents": n_documents,
    }
    about = {
        "task": task,
        "chance": (config.get("metadata") or {}).get("chance", np.nan),
        "n_documents": n_documents,
        "weights": fmt.text(protocol.get("weights"))[:8],
        **{f"protocol/{key}": fmt.text(value) for key, value in compared.items()},
    }
    scores = []
    for metric in sorted(metrics, key=lambda m: m != first):
        name, _, tail = metric.partition(",")
        stderr = results.get(f"{name}_stderr,{tail}")
        stderr = stderr if isinstance(stderr, int | float) else np.nan  # lm-eval writes "N/A"
        about_metric = {"metric": metric, "score": results[metric], "stderr": stderr}
        scores.append(about | about_metric | {"headline": metric == first})
    return scores


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:  # also a UnicodeDecodeError
        raise ValueError(f"{path.name} is not JSON: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return content


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat


def _one_line(error: Exception) -> str:
    text = f"no {error}" if isinstance(error, KeyError) else str(error)
    return " ".join(text.split())[:200] or type(error).__name__
