"""A study is the finished runs of a suite that may stand in one table, and averages over them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import formats as fmt
from analysis.evaluations import GENERATION_PROTOCOL, load_generation, load_scores
from analysis.families import Families
from analysis.matching import TOLERANCE_SAID, matched_pairs, partners
from analysis.runs import CONDITIONS, State, load_curves, load_runs

SAME = {
    "data/fingerprint": "data fingerprint",
    "data/tokenizer_hash": "tokenizer",
    "ctx_len": "context length",
    "batch_size": "batch size",
    "data/seed": "data seed",
}


class NothingToShowError(Exception):
    """A table or figure has no data in this study; the text says which file is missing."""


@dataclass(frozen=True)
class Losses:
    """Trained runs whose losses may be compared, of each model the best variant only (`notes` says
    which), and the column to compare: bits per byte where all have it, else nats per token."""

    runs: pd.DataFrame
    column: str
    unit: str
    notes: list[str]


@dataclass(frozen=True)
class Study:
    """What a report is made of.

    Attributes:
        runs: finished and converted runs only, one a row; those of the reference come last.
        left_out: columns run, state, reason.
        failed: as `runs`; without losses.
    """

    suite: str
    families: Families
    runs: pd.DataFrame
    curves: pd.DataFrame
    scores: pd.DataFrame
    generation: pd.DataFrame
    left_out: pd.DataFrame
    failed: pd.DataFrame

    @property
    def trained(self) -> pd.DataFrame:
        """The runs that have losses; raises NothingToShowError if all were converted."""
        trained = self.runs[~self.runs["converted"]].reset_index(drop=True)
        if trained.empty:
            raise NothingToShowError("no run of this suite was trained here, all are converted")
        return trained

    @property
    def losses(self) -> Losses:
        """The trained runs to compare; raises NothingToShowError if all were converted."""
        runs, notes = best_variants(self.trained)
        return Losses(runs, *loss_of(runs), notes)

    def partners(self, runs: pd.DataFrame) -> dict[str, str]:
        """The model of the reference family that each model is compared with."""
        return partners(runs, self.families.reference)

    def pairs(self, losses: Losses) -> pd.DataFrame:
        """The matched pairs; raises NothingToShowError if there is none."""
        pairs = matched_pairs(losses.runs, losses.column, self.families.reference)
        if pairs.empty:
            label = self.families.reference_label
            raise NothingToShowError(f"no model has a {label} {TOLERANCE_SAID}")
        return pairs

    def scored(self) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
        """The runs to compare, their scores, and which variants were chosen; raises
        NothingToShowError if nothing was scored."""
        if self.scores.empty:
            raise NothingToShowError("no run has eval/*.json; run experiments.evaluate first")
        kept, notes = best_variants(self.runs)
        return kept, self.scores[self.scores["run"].isin(kept["run"])], notes


def load_study(path: str | Path, reference: str, allow_mixed: bool = False) -> Study:
    """Read everything under a suite's folder or a glob.

    Args:
        reference: the family that the others are compared with.
        allow_mixed: put runs into one table that do not belong there.

    Raises:
        ValueError: if no run has finished or, unless `allow_mixed`, if trained runs differ in data
            and the order of it, tokenizer or batch, those of a matched pair in token budget, or any
            runs in how they were scored or timed.
    """
    runs = load_runs(path)
    # a stable sort: the reference after the others
    runs = runs.sort_values("family", kind="stable", key=lambda family: family == reference)
    is_done = runs["state"] == State.DONE
    done = runs[is_done].reset_index(drop=True)
    if done.empty:
        states = ", ".join(f"{n} {state}" for state, n in runs["state"].value_counts().items())
        raise ValueError(f"no finished run in {path} ({states}); train first, or wait")
    trained = done[~done["converted"]].reset_index(drop=True)
    curves, bad_curves = load_curves(trained)
    scores, bad_scores = load_scores(done)
    generation, bad_generation = load_generation(done)
    if not allow_mixed:
        _refuse_mixed(trained, reference, scores, generation)
    rest = runs.loc[~is_done, ["run", "state", "reason"]]
    bad = [(run, State.DONE, why) for run, why in bad_curves + bad_scores + bad_generation]
    return Study(
        suite=str(done["suite"].iloc[0]),
        families=Families.of(done, reference),
        runs=done,
        curves=curves,
        scores=scores,
        generation=generation,
        left_out=pd.concat([rest, pd.DataFrame(bad, columns=rest.columns)], ignore_index=True),
        failed=runs[runs["state"] == State.FAILED].reset_index(drop=True),
    )


def loss_of(runs: pd.DataFrame) -> tuple[str, str]:
    """The column to compare and its unit: bits/byte where all trained runs have it, else
    nats/token."""
    if runs.loc[~runs["converted"], "val/bpb"].notna().all():
        return "val/bpb", "bits/byte"
    return "val/loss", "nats/token"


def ways_of_training(runs: pd.DataFrame) -> pd.Series:
    """The variant and conditions of each run, as a tuple: runs of a model that differ here are no
    repeats of each other."""
    return runs[["variant", *CONDITIONS]].fillna("").agg(tuple, axis=1)


def best_variants(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Of a model whose runs differ in more than the seed, only the variant of lowest mean loss.

    Returns:
        The runs, with `tried` (the variants the model has) and `n_variants` (how many); and a line
        for each model that has more than one.
    """
    loss, _ = loss_of(runs)
    kept, notes = [], []
    for model, group in runs.groupby("model", sort=False):
        variant = ways_of_training(group)
        means = group.groupby(variant)[loss].mean()
        of_loss = variant.map(means)  # converted: no loss, and no second variant
        best = variant.iloc[int(of_loss.argmin()) if of_loss.notna().any() else 0]
        if len(means) > 1:
            said = [at for at, c in enumerate(CONDITIONS, 1) if group[c].nunique(dropna=False) > 1]
            name = ", ".join([best[0] or "no overrides", *(best[at] for at in said)])
            notes.append(f"{model}: best of {len(means)} variants by {loss}: {name}.")
        tried = "; ".join(sorted(",".join(v) for v in means.index))
        kept.append(group[variant == best].assign(n_variants=len(means), tried=tried))
    return pd.concat(kept, ignore_index=True), notes


def budget_notes(runs: pd.DataFrame) -> list[str]:
    """A line for what compares sizes, when they were not trained on equally many tokens."""
    low, high = runs["tokens"].min(), runs["tokens"].max()
    if fmt.short(low) == fmt.short(high):
        return []
    return [
        f"Token budgets differ between sizes ({fmt.short(low)} to {fmt.short(high)}), not within a "
        "pair: what is fitted across sizes holds along this path of sizes and budgets."
    ]


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
            subset=("subset", "first"),
            weights=("weights", " ".join),
        )
        .reset_index()
    )


def _refuse_mixed(
    trained: pd.DataFrame, reference: str, scores: pd.DataFrame, generation: pd.DataFrame
) -> None:
    for column, name in SAME.items():
        _refuse(trained, column, name)
    partner = partners(trained, reference)
    for model in trained["model"].unique():
        pair = list(dict.fromkeys((model, partner.get(model, model))))
        name = f"token budget of {' and '.join(pair)}"
        _refuse(trained[trained["model"].isin(pair)], "budget_tokens", name)
    for task, group in scores.groupby("task"):
        for column in protocol_columns(group):
            _refuse(group, column, f"{column.removeprefix('protocol/')} of {task}")
    for column in GENERATION_PROTOCOL:
        _refuse(generation, column, f"{column} of bench/generate.json")


def _refuse(frame: pd.DataFrame, column: str, name: str) -> None:
    values = frame[column].astype(str).replace(fmt.MISSING, "none")
    runs_of = frame.groupby(values)["run"].unique()
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
