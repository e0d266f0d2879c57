"""Reads run directories (CONTRIBUTING.md) into tidy frames, and says which it had to leave out.

Nothing here writes. A run that is missing pieces, still going or damaged never stops the others: it
becomes a row of `Study.left_out` with the reason.
"""

import json
import os
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

# the files of a run directory
CONFIG, MANIFEST, METRICS = "config.yaml", "manifest.json", "metrics.csv"
RESULT, ERROR = "result.json", "error.txt"
EVAL, BENCH = "eval", "bench"
NOT_RUNS = {"report", "checkpoints", EVAL, BENCH}

SPEED = ["perf/tokens_per_s", "perf/mfu", "perf/peak_mem_bytes"]
METRICS_COLUMNS = [
    "step", "tokens", "time_s", "lr", "train/loss", "train/grad_norm", "val/loss", "val/bpb", *SPEED
]  # fmt: skip
SIZES = ["parameters/total", "parameters/non_embedding", "flops_per_token"]
NUMBERS = [
    *SIZES, "seed", "budget_tokens", "tokens", "flops", "time_s", "val/loss", "val/bpb",
    "data/xz_bpb", "ctx_len", "batch_size", "data/seed", "peak_lr", *SPEED,
]  # fmt: skip
TEXTS = ["suite", "model", "family", "family_label", "data/fingerprint", "data/tokenizer_hash"]
# how a run was trained; runs that differ here are no repeats of each other
CONDITIONS = ["recipe/optim", "recipe/schedule", "precision"]
DEVICE = ["device/type", "device/name", "device/n_threads", "precision", "backend"]
ABOUT = ["run", "model", "family", "parameters/total"]

# what reading a damaged file can raise
BROKEN = (OSError, ValueError, TypeError, KeyError, AttributeError)
# a build of PyYAML without libyaml has only the slower one
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Problems = list[tuple[str, str]]  # (run, reason) of what could not be read


class State(StrEnum):
    """What a run directory stands for: a mirror of `experiments.runs.state.State`. Files alone do
    not say whether a run is queued or held by a process: here it is waiting or interrupted."""

    DONE = "done"
    RUNNING = "running"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    QUEUED = "queued"
    WAITING = "waiting"
    DAMAGED = "damaged"


def load_runs(folder: str | Path) -> pd.DataFrame:
    """One row a run under a folder.

    Returns:
        Manifest and result flattened with "/" (`parameters/total`, `val/bpb`), and `path`, `run`,
        `variant` (the overrides without the seed), `peak_lr` (NaN where there is none or the run
        has not ended), `state`, `reason` and `converted`. A converted run has no losses; its
        `model` has the last part of its path too, for each is a model of its own.

    Raises:
        FileNotFoundError: if there is no run at all.
    """
    found = sorted(_run_dirs(folder))
    if not found:
        raise FileNotFoundError(f"no runs in {folder}: give a folder that holds run directories")
    runs = pd.DataFrame([_read_run(path) for path in found])
    missing = [c for c in (*NUMBERS, *TEXTS, *CONDITIONS, *DEVICE) if c not in runs]
    runs = runs.assign(**dict.fromkeys(missing))
    runs[NUMBERS] = runs[NUMBERS].apply(pd.to_numeric, errors="coerce")
    return runs.sort_values(["family", "parameters/total", "run"], ignore_index=True)


def load_curves(runs: pd.DataFrame) -> tuple[pd.DataFrame, Problems]:
    """The rows of every metrics.csv, tidy, with what each is of (ABOUT); of two rows of one step
    and kind (train or val) the later counts."""
    frames, problems = [], []
    for path, about in each_run(runs):
        try:
            rows, n_damaged = _read_metrics(path / METRICS)
        except BROKEN as error:
            problems.append((about["run"], f"{METRICS}: {one_line(error)}"))
            continue
        frames.append(rows.assign(**about))
        if n_damaged:
            problems.append((about["run"], f"{METRICS}: {n_damaged} damaged rows skipped"))
    if not frames:
        return pd.DataFrame(columns=[*METRICS_COLUMNS, *ABOUT]), problems
    return pd.concat(frames, ignore_index=True), problems


def each_run(runs: pd.DataFrame) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(folder, what it is of) for each row."""
    for path, *about in runs[["path", *ABOUT]].itertuples(index=False):
        yield Path(path), dict(zip(ABOUT, about, strict=True))


def read_each(
    runs: pd.DataFrame, pattern: str, read: Callable[[Path], list[dict[str, Any]]]
) -> tuple[list[dict[str, Any]], Problems]:
    """The rows that `read` finds in the files of every run that match `pattern`."""
    rows, problems = [], []
    for path, about in each_run(runs):
        for file in sorted(path.glob(pattern)):
            try:
                rows += [about | row for row in read(file)]
            except BROKEN as error:
                problems.append((about["run"], f"{file.relative_to(path)}: {one_line(error)}"))
    return rows, problems


def _run_dirs(root: str | Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in NOT_RUNS and not s.startswith(".")]
        if {CONFIG, MANIFEST, RESULT, ERROR} & set(files):
            subfolders.clear()
            yield Path(folder)


def _read_run(folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"path": str(folder), "run": "/".join(folder.parts[-3:])}
    row |= {"variant": "", "reason": "", "converted": False}
    try:
        if (folder / MANIFEST).exists():
            row |= _flat(read_json(folder / MANIFEST))
        if (folder / RESULT).exists():
            return row | _finished(row | _flat(read_json(folder / RESULT)), folder)
        if (folder / ERROR).exists():
            reason = (folder / ERROR).read_text().strip().partition("\n")[0]  # a traceback follows
            return row | {
                "state": State.FAILED, "reason": reason, "peak_lr": _peak_lr(folder)
            }  # fmt: skip
    except BROKEN as error:
        return row | {"state": State.DAMAGED, "reason": one_line(error)}
    return row | _unfinished(folder)


def _finished(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    row |= {"state": State.DONE, "run": row["name"]}
    last = row["name"].rpartition("/")[2]
    if not row["converted"]:
        row["variant"] = ",".join(o for o in last.split(",") if not o.startswith("seed="))
        return row | {"peak_lr": _peak_lr(folder)}
    tokens = row["converted/training_tokens"]
    tokens = np.nan if tokens is None else tokens
    flops = tokens * row["flops_per_token"]
    return row | {"model": f"{row['model']}/{last}", "tokens": tokens, "flops": flops}


def _peak_lr(folder: Path) -> float:
    return float(yaml.load((folder / CONFIG).read_text(), YAML_LOADER)["optim"]["peak_lr"])


def _unfinished(folder: Path) -> dict[str, Any]:
    """The state of a run without a result; whether a process holds it is not for us to know."""
    if not (folder / MANIFEST).exists():
        return {"state": State.WAITING, "reason": "training has not begun"}
    try:
        steps = _read_metrics(folder / METRICS)[0]["step"]
        reached = f"reached step {steps.max():.0f}" if len(steps) else "no metrics yet"
    except BROKEN:
        reached = f"no readable {METRICS}"
    return {"state": State.INTERRUPTED, "reason": f"no {RESULT} (or still running); {reached}"}


def _read_metrics(path: Path) -> tuple[pd.DataFrame, int]:
    """The rows, and how many were damaged."""
    raw = pd.read_csv(path, on_bad_lines="skip", index_col=False)
    frame = raw.apply(pd.to_numeric, errors="coerce").astype("float64")
    whole = ~(frame.isna() & raw.notna()).any(axis=1) & frame[["step", "tokens"]].notna().all(
        axis=1
    )
    frame = frame[whole]
    kinds = pd.DataFrame({"step": frame["step"], "is_val": frame["val/loss"].notna()})
    return frame[~kinds.duplicated(keep="last")], int((~whole).sum())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError in one line if it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # also a UnicodeDecodeError
        raise ValueError(f"{path.name} is not JSON: {one_line(error)}") from None


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat


def one_line(error: Exception) -> str:
    """An error as one line of at most 200 characters."""
    text = f"no {error}" if isinstance(error, KeyError) else str(error)
    return " ".join(text.split())[:200] or type(error).__name__
