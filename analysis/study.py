"""A study is the finished runs of a suite that may stand in one table, and averages over them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import formats as fmt
from analysis.runs import (
    GENERATION_PROTOCOL,
    PROTOCOL,
    load_curves,
    load_generation,
    load_runs,
    load_scores,
)

SAME = {
    "data/fingerprint": "data fingerprint",
    "data/tokenizer_hash": "tokenizer",
    "budget_tokens": "token budget",
}


class NothingToShowError(Exception):
    """A table or figure has no data in this study; the text says which file is missing."""


@dataclass(frozen=True)
class Study:
    """What a report is made of: `runs` has finished runs only, one a row."""

    suite: str
    runs: pd.DataFrame
    curves: pd.DataFrame
    scores: pd.DataFrame
    generation: pd.DataFrame
    left_out: pd.DataFrame  # columns run, status, reason


def load_study(path: str | Path, allow_mixed: bool = False) -> Study:
    """Everything under `path` (a suite's folder or a glob).

    ValueError when no run has finished or, unless `allow_mixed`, when finished runs differ in data,
    tokenizer, token budget or scoring protocol."""
    runs = load_runs(path)
    done = runs[runs["status"] == "finished"].reset_index(drop=True)
    if done.empty:
        states = ", ".join(f"{n} {state}" for state, n in runs["status"].value_counts().items())
        raise ValueError(f"no finished run in {path} ({states}); train first, or wait")
    curves, bad_curves = load_curves(done)
    scores, bad_scores = load_scores(done)
    generation, bad_generation = load_generation(done)
    if not allow_mixed:
        _refuse_mixed(done, scores)
    rest = runs.loc[runs["status"] != "finished", ["run", "status", "reason"]]
    partly = [(run, "finished", why) for run, why in bad_curves + bad_scores + bad_generation]
    left_out = pd.concat([rest, pd.DataFrame(partly, columns=rest.columns)], ignore_index=True)
    return Study(str(done["suite"].iloc[0]), done, curves, scores, generation, left_out)


def loss_of(runs: pd.DataFrame) -> tuple[str, str]:
    """The column to compare and its unit: bits/byte where all runs have it, else nats/token."""
    if runs["val/bpb"].notna().all():
        return "val/bpb", "bits/byte"
    return "val/loss", "nats/token"


def best_variants(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Of a model whose runs differ in more than the seed, only the variant of lowest mean loss, and
    a line that says so: repeats differ in nothing but the seed."""
    loss, _ = loss_of(runs)
    kept, notes = [], []
    for model, group in runs.groupby("model", sort=False):
        means = group.groupby("variant")[loss].mean()
        best = means.idxmin()
        if len(means) > 1:
            notes.append(
                f"{model}: best of {len(means)} variants by {loss}: {best or 'no overrides'}."
            )
        kept.append(group[group["variant"] == best])
    return pd.concat(kept, ignore_index=True), notes


def groups(frame: pd.DataFrame, *keys: str) -> Iterator[tuple[Any, pd.DataFrame]]:
    """The frame cut by `keys`, in order of appearance: (value or tuple of values, its rows)."""
    yield from frame.groupby(keys[0] if len(keys) == 1 else list(keys), sort=False)


def mean_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """Scores averaged over the seeds of each task, metric and model: `score`, `stderr` (of one run,
    over documents), `seed_sd` (NaN for one seed), `n_runs`."""
    keys = ["task", "metric", "headline", "family", "model", "parameters/total"]
    order = scores.sort_values(["task", "headline", "metric"], ascending=[True, False, True])
    by_model = order.groupby(keys, sort=False)
    frame = by_model.agg(
        score=("score", "mean"),
        stderr=("stderr", lambda s: float(np.sqrt((s**2).mean()))),
        seed_sd=("score", "std"),
        n_runs=("score", "size"),
        chance=("chance", "first"),
        n_documents=("n_documents", "first"),
    ).reset_index()
    first = by_model.first().reset_index()
    frame["protocol"] = [
        f"{fmt.text(r['n_shot'])}-shot, {fmt.text(r['dtype'])}, prefix {fmt.text(r['prefix'])}, "
        f"v{fmt.text(r['version'])}, lm-eval {fmt.text(r['lm_eval'])}"
        for _, r in first.iterrows()
    ]
    return frame


def mean_generation(study: Study) -> pd.DataFrame:
    """Generation cost per model and length, the median over runs; raises when none was measured."""
    if study.generation.empty:
        raise NothingToShowError("no run has bench/generate.json; run experiments.benchmark first")
    keys = ["family", "model", "parameters/total", "n_tokens"]
    return (
        study.generation.groupby(keys, sort=False)[["seconds", "state_bytes"]]
        .median()
        .reset_index()
    )


def generation_protocol(study: Study) -> str:
    """Batch, device and dtype of the measured generation, in words."""
    seen = study.generation[list(GENERATION_PROTOCOL)].drop_duplicates()
    return "; ".join(
        f"batch {fmt.text(n)}, {fmt.text(device)}, {fmt.text(threads)} threads, {fmt.text(dtype)}"
        for n, threads, device, dtype in seen.to_numpy()
    )


def crossing(mine: pd.Series, theirs: pd.Series) -> str:
    """From which length (the index) `mine` stays below `theirs`, in words, interpolated between the
    lengths measured."""
    shared = mine.index.intersection(theirs.index).sort_values()
    if shared.empty:
        return fmt.MISSING
    difference = (mine[shared] - theirs[shared]).to_numpy(float)
    above = np.flatnonzero(difference >= 0)
    if not len(above):
        return f"from the first length ({shared[0]})"
    last = int(above[-1])
    if last == len(shared) - 1:
        return f"not within {shared[-1]}"
    share = difference[last] / (difference[last] - difference[last + 1])
    return f"from about {shared[last] + share * (shared[last + 1] - shared[last]):.0f}"


def _refuse_mixed(runs: pd.DataFrame, scores: pd.DataFrame) -> None:
    for column, name in SAME.items():
        _refuse(runs, column, name)
    for task, group in scores.groupby("task"):
        for column in PROTOCOL:
            _refuse(group, column, f"{column.replace('_', ' ')} of {task}")


def _refuse(frame: pd.DataFrame, column: str, name: str) -> None:
    runs_of = frame.groupby(frame[column].astype(str))["run"].unique()
    if len(runs_of) < 2:
        return
    common = runs_of.map(len).idxmax()
    sides = []
    for value in [common, *(v for v in runs_of.index if v != common)]:
        names = sorted(runs_of[value])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        sides.append(f"{value[:12]} ({', '.join(names[:3])}{more})")
    raise ValueError(
        f"runs differ in {name}: {' against '.join(sides)}; "
        "report them as separate suites, or set allow_mixed=true"
    )
