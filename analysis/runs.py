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
import yaml

REFERENCE = "gpt"  # the family that the others are compared with, and come before
MARKS = ("config.yaml", "manifest.json", "metrics.csv", "result.json", "error.txt")
NOT_RUNS = {"report", "checkpoints", "eval", "bench"}
SPEED = ["perf/tokens_per_s", "perf/mfu", "perf/peak_mem_bytes"]
METRICS = ["step", "tokens", "time_s", "lr", "train/loss", "train/grad_norm"]
METRICS += ["val/loss", "val/bpb", *SPEED]
SIZES = ["parameters/total", "parameters/non_embedding", "flops_per_token"]
# what a finished run must have, and may not leave empty, for any table to be right
TEXTS = ("suite", "model", "family", "name")
TRAINED_TEXTS = ("data/fingerprint", "data/tokenizer_hash")
TRAINED = ["seed", "budget_tokens", "step", "tokens", "flops", "time_s", "val/loss"]
OPTIONAL = ["val/bpb", "train/loss", "data/xz_bpb", "ctx_len", "batch_size", "data/seed", *SPEED]
# how a run was trained; runs that differ here are no repeats of each other
CONDITIONS = ["recipe/optim", "recipe/schedule", "precision"]
ABOUT = ["run", "model", "family", "parameters/total"]

# what reading a damaged or foreign file can raise
BROKEN = (OSError, ValueError, TypeError, KeyError, AttributeError)
# a build of PyYAML without libyaml has only the slower one
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_runs(path_or_glob: str | Path) -> pd.DataFrame:
    """One row a run: manifest and result flattened with "/" (`parameters/total`, `val/bpb`), and
    `path`, `run`, `variant` (the overrides without the seed), `peak_lr` (of config.yaml, NaN where
    it has none or the run has not ended), `status` (finished, converted, running-or-interrupted,
    failed, unreadable) and `reason`. A converted run has no losses; its `model` has the last part
    of its path too, for each is a model of its own.

    FileNotFoundError when there is no run at all."""
    text = str(path_or_glob)
    roots = sorted(glob.glob(text)) if glob.has_magic(text) else [text]
    found = sorted({run for root in roots for run in _run_dirs(root)})
    if not found:
        raise FileNotFoundError(
            f"no runs in {text}: give a folder (or glob) that holds run directories"
        )
    runs = pd.DataFrame([_read_run(path) for path in found])
    for column in (*SIZES, *TRAINED, *OPTIONAL, "peak_lr"):
        if column not in runs:
            runs[column] = np.nan
        runs[column] = pd.to_numeric(runs[column], errors="coerce")
    for column in (*TEXTS, *TRAINED_TEXTS, *CONDITIONS):
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
    abouts = list(each_run(runs))
    for i, (path, about) in enumerate(abouts):
        try:
            frames[i], dropped = _read_metrics(path / "metrics.csv")
        except BROKEN as error:
            problems.append((about["run"], f"metrics.csv: {one_line(error)}"))
            continue
        if dropped:
            problems.append((about["run"], f"metrics.csv: {dropped} damaged rows skipped"))
    if not frames:
        return pd.DataFrame(columns=[*METRICS, *ABOUT]), problems
    curves = pd.concat(frames)
    owners = runs[ABOUT].take(curves.index.get_level_values(0).to_numpy()).reset_index(drop=True)
    return pd.concat([curves.reset_index(drop=True), owners], axis=1), problems


def each_run(runs: pd.DataFrame) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(folder, what it is of) for each row."""
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
            row |= _flat(read_json(manifest))
        if result.exists():
            row |= _flat(read_json(result))
            converted = row.get("converted") is True
            _check_finished(row, converted)
            row["run"] = row["name"]
            last = row["name"].rsplit("/", 1)[-1]
            if converted:
                return row | _converted(row, last)
            row["variant"] = ",".join(o for o in last.split(",") if not o.startswith("seed="))
            return row | {"status": "finished", "peak_lr": _peak_lr(folder / "config.yaml")}
    except (OSError, ValueError) as error:
        return row | {"status": "unreadable", "reason": one_line(error)}
    if (folder / "error.txt").exists():
        lines = (folder / "error.txt").read_text(errors="replace").strip().splitlines()
        return row | {
            "status": "failed",
            "peak_lr": _peak_lr(folder / "config.yaml"),
            "reason": (lines or ["error.txt is empty"])[0].strip()[:200],  # a traceback follows
        }
    return row | {"status": "running-or-interrupted", "reason": _progress(folder / "metrics.csv")}


def _check_finished(row: dict[str, Any], converted: bool) -> None:
    for key in TEXTS if converted else (*TEXTS, *TRAINED_TEXTS):
        if not isinstance(row.get(key), str):
            raise ValueError(f"manifest.json lacks {key}")
    for key in SIZES if converted else [*SIZES, *TRAINED]:
        value = row.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise ValueError(f"manifest.json and result.json have {key}={value!r}, not a number")


def _peak_lr(config: Path) -> float:
    try:
        return float(yaml.load(config.read_text(), YAML_LOADER)["optim"]["peak_lr"])
    except (*BROKEN, yaml.YAMLError):
        return np.nan


def _converted(row: dict[str, Any], last: str) -> dict[str, Any]:
    tokens = row.get("converted/training_tokens")
    tokens = tokens if isinstance(tokens, int | float) else np.nan
    about = {"status": "converted", "model": f"{row['model']}/{last}", "tokens": tokens}
    return about | {"flops": tokens * row["flops_per_token"]}


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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError in one line when it holds none."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:  # also a UnicodeDecodeError
        raise ValueError(f"{path.name} is not JSON: {one_line(error)}") from None
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


def one_line(error: Exception) -> str:
    """An error as one line of at most 200 characters."""
    text = f"no {error}" if isinstance(error, KeyError) else str(error)
    return " ".join(text.split())[:200] or type(error).__name__
