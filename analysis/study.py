"""A study is the finished runs of a suite that may stand in one table, and averages over them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import formats as fmt
from analysis.runs import (
    CONDITIONS,
    GENERATION_PROTOCOL,
    load_curves,
    load_generation,
    load_runs,
    load_scores,
)

SAME = {
    "data/fingerprint": "data fingerprint",
    "data/tokenizer_hash": "tokenizer",
    "budget_tokens": "token budget",
    "ctx_len": "context length",
    "batch_size": "batch size",
    "data/seed": "data seed",
}
CACHE_COPY = (
    "A step of the GPT measured here copies its KV cache once (torch.cat), on top of reading it: "
    "a cache allocated ahead would save that copy, not the reading, which also grows."
)


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

    ValueError when no run has finished or, unless `allow_mixed`, when finished runs differ in data
    and the order of it, tokenizer, token budget, batch, or how they were scored or timed."""
    runs = load_runs(path)
    done = runs[runs["status"] == "finished"].reset_index(drop=True)
    if done.empty:
        states = ", ".join(f"{n} {state}" for state, n in runs["status"].value_counts().items())
        raise ValueError(f"no finished run in {path} ({states}); train first, or wait")
    curves, bad_curves = load_curves(done)
    scores, bad_scores = load_scores(done)
    generation, bad_generation = load_generation(done)
    if not allow_mixed:
        _refuse_mixed(done, scores, generation)
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
    a line that says so: repeats differ in nothing but the seed. `n_variants` is how many the model
    has."""
    loss, _ = loss_of(runs)
    kept, notes = [], []
    for model, group in runs.groupby("model", sort=False):
        variant = group[["variant", *CONDITIONS]].fillna("").agg(tuple, axis=1)
        means = group.groupby(variant)[loss].mean()
        best = variant.iloc[int(variant.map(means).argmin())]
        if len(means) > 1:
            told = [at for at, c in enumerate(CONDITIONS, 1) if group[c].nunique(dropna=False) > 1]
            name = ", ".join([best[0] or "no overrides", *(best[at] for at in told)])
            notes.append(f"{model}: best of {len(means)} variants by {loss}: {name}.")
        kept.append(group[variant == best].assign(n_variants=len(means)))
    return pd.concat(kept, ignore_index=True), notes


def groups(frame: pd.DataFrame, *keys: str) -> Iterator[tuple[Any, pd.DataFrame]]:
    """The frame cut by `keys`, in order of appearance: (value or tuple of values, its rows)."""
    yield from frame.groupby(keys[0] if len(keys) == 1 else list(keys), sort=False)


def protocol_columns(scores: pd.DataFrame) -> list[str]:
    """The columns that must be equal for scores to stand in one row."""
    return [name for name in map(str, scores.columns) if name.startswith("protocol/")]


def mean_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """Scores averaged over the seeds of each task, metric, model and protocol: `score`, `stderr`
    (of one run, over documents), `seed_sd` (NaN for one seed), `n_runs`, `weights` of each."""
    keys = ["task", "metric", "headline", "family", "model", "parameters/total"]
    keys += protocol_columns(scores)
    order = scores.sort_values(["task", "headline", "metric"], ascending=[True, False, True])
    return (
        order.groupby(keys, sort=False)
        .agg(
            score=("score", "mean"),
            stderr=("stderr", lambda s: float(np.sqrt((s**2).mean()))),
            seed_sd=("score", "std"),
            n_runs=("score", "size"),
            chance=("chance", "first"),
            n_documents=("n_documents", "first"),
            weights=("weights", " ".join),
        )
        .reset_index()
    )


def mean_generation(study: Study) -> pd.DataFrame:
    """Generation cost per model and length, the median over runs; raises when none was measured, or
    not all in the same way."""
    if study.generation.empty:
        raise NothingToShowError("no run has bench/generate.json; run experiments.benchmark first")
    if len(study.generation[GENERATION_PROTOCOL].drop_duplicates()) > 1:
        raise NothingToShowError(
            f"measured in different ways ({generation_protocol(study)}); "
            "measure all with one experiments.benchmark bench=generate"
        )
    keys = ["family", "model", "parameters/total", "n_tokens"]
    return (
        study.generation.groupby(keys, sort=False)[["seconds", "state_bytes"]]
        .median()
        .reset_index()
    )


def generation_protocol(study: Study) -> str:
    """Batch, prompt, device and dtype of the measured generation, in words."""
    seen = study.generation[GENERATION_PROTOCOL].drop_duplicates()
    return "; ".join(
        f"batch {fmt.text(n)}, prompt {fmt.text(prompt)}, {fmt.text(device)}, "
        f"{fmt.text(threads)} thread{'' if threads == 1 else 's'}, {fmt.text(dtype)}"
        for n, threads, device, dtype, prompt in seen.to_numpy()
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


def _refuse_mixed(runs: pd.DataFrame, scores: pd.DataFrame, generation: pd.DataFrame) -> None:
    for column, name in SAME.items():
        _refuse(runs[runs[column].notna()], column, name)  # old manifests lack some
    for task, group in scores.groupby("task"):
        for column in protocol_columns(group):
            _refuse(group, column, f"{column.removeprefix('protocol/')} of {task}")
    for column in GENERATION_PROTOCOL:
        _refuse(generation, column, f"{column} of bench/generate.json")


def _refuse(frame: pd.DataFrame, column: str, name: str) -> None:
    runs_of = frame.groupby(frame[column].astype(str))["run"].unique()
    if len(runs_of) < 2:
        return
    common = runs_of.map(len).idxmax()
    sides = []
    for value in [common, *(v for v in runs_of.index if v != common)]:
        names = sorted(runs_of[value])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        sides.append(f"{value[:24]} ({', '.join(names[:3])}{more})")
    raise ValueError(
        f"runs differ in {name}: {' against '.join(sides)}; "
        "report them as separate suites, or set allow_mixed=true"
    )
