"""The table of paired comparisons: each model with its matched GPT, on the same documents."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import formats as fmt
from analysis.evaluations import SHARES, document_values, load_documents
from analysis.scaling import partners, seed_gap
from analysis.significance import Differences, bootstrap, holm, mcnemar, sign_flip
from analysis.study import NothingToShowError, Study, best_variants, groups, protocol_columns
from analysis.table import Column, Table, cell

LOGARITHMS = ("perplexity", "byte_perplexity", "word_perplexity")
MEAN = "mean over tasks"
Seeds = tuple[pd.Series, pd.Series]  # of the model and of its reference: seed -> score


def comparisons(study: Study) -> Table:
    """Paired difference of every matched pair of models, per task and on average."""
    if study.scores.empty:
        raise NothingToShowError("no run has eval/*.json; run experiments.evaluate first")
    kept, notes = best_variants(study.runs)
    scores = study.scores[study.scores["headline"] & study.scores["run"].isin(kept["run"])]
    scores = scores.merge(kept[["run", "path", "seed"]], on="run")
    rows: list[dict[str, Any]] = []
    absent: dict[str, list[str]] = {}
    for model, partner in partners(kept).items():
        pair = {"model": model, "reference": partner}
        of_pair = scores[scores["model"].isin([model, partner])]
        pooled: list[tuple[dict[str, Any], Differences, Seeds]] = []
        for task, both in groups(of_pair, "task"):
            sides = [both[both["model"] == name] for name in (model, partner)]
            try:
                row, differences, seeds = _compare(str(task), *sides)
            except (ValueError, OSError) as error:
                absent.setdefault(str(error), []).append(f"{model} and {partner} on {task}")
                continue
            rows.append(pair | row | _over_seeds([seeds]))
            if row["metric"] in SHARES:
                pooled.append((row, differences, seeds))
        if len(pooled) > 1:
            rows.append(pair | _pool(pooled))
    if not rows:
        reason = next(iter(absent), "no model has scores and a GPT within 10 % that has them too")
        raise NothingToShowError(reason)
    frame = pd.DataFrame(rows)
    frame["p_holm"] = holm(frame["p"])
    for reason, whom in absent.items():
        more = f" and {len(whom) - 3} more" if len(whom) > 3 else ""
        notes.append(f"Left out: {'; '.join(whom[:3])}{more}: {reason}.")
    return Table("Paired comparisons", frame, _columns(frame), [*_notes(frame), *notes])


def _columns(frame: pd.DataFrame) -> list[Column]:
    several: list[Column] = [
        ("over seeds", lambda r: _ends(r["seeds_low"], r["seeds_high"], r["n_seeds"]))
    ]
    return [
        ("model", cell("model")),
        ("matched GPT", cell("reference")),
        ("task", cell("task")),
        ("metric", cell("metric")),
        ("docs", lambda r: fmt.documents(r["n_documents"], r["subset"])),
        ("scores", lambda r: f"{fmt.number(r['score'])} / {fmt.number(r['reference/score'])}"),
        (
            "difference [95 % interval]",
            lambda r: fmt.interval(r["difference"], r["low"], r["high"], 4, "+"),
        ),
        *(several if (frame["n_seeds"] > 1).any() else []),
        ("only one right", _discordant),
        ("test", cell("test")),
        ("p", cell("p", _p_value)),
        ("p, Holm", cell("p_holm", _p_value)),
        ("better", _better),
    ]


def _notes(frame: pd.DataFrame) -> list[str]:
    notes = [
        "Both models scored the same documents, matched by hash. Difference: model minus its GPT; "
        "interval: bootstrap over documents (within each task for the mean, all tasks counting "
        "alike), percentiles of 9999. McNemar: exact, on the documents only one model got right. "
        "Sign flip: 9999 draws in which the two models are swapped on each document at random.",
        f"Holm: corrected for all {len(frame)} tests of this table, the means among them. Better: "
        "where the corrected p is below 0.05, and, with several seeds, the interval over seeds is "
        "on one side of 0; no better one is not a proof that they are alike.",
    ]
    if (frame[["n_runs", "reference/n_runs"]] > 1).any(axis=None):
        notes.append(
            "Several seeds: each document's score is averaged over them first. Seeds are not "
            "resampled: the test is about these trained models. Over seeds: 95 % paired t interval "
            "of the difference over the seeds both have (in brackets), which is about training "
            "anew; not corrected."
        )
    if frame["subset"].any():
        notes.append("Subset: fewer documents than the official split.")
    if frame["metric"].isin(LOGARITHMS).any():
        notes.append("Perplexities are compared by their logarithm, in nats.")
    return notes


def _compare(
    task: str, mine: pd.DataFrame, theirs: pd.DataFrame
) -> tuple[dict[str, Any], Differences, Seeds]:
    """A row of the table, the differences of documents and both sides' scores by seed; ValueError
    or OSError where there can be none."""
    for name, side in (("the model", mine), ("its GPT", theirs)):
        if side.empty:
            raise ValueError(f"{name} has no score of it")
    both = pd.concat([mine, theirs])
    unlike = [c for c in protocol_columns(both) if both[c].nunique() > 1]
    if both["metric"].nunique() > 1 or unlike:
        names = ", ".join(c.removeprefix("protocol/") for c in unlike) or "metric"
        raise ValueError(f"scored in different ways ({names})")
    metric = both["metric"].iloc[0].removesuffix(",none")
    docs, ours, weights, our_seeds = _mean_documents(mine, task, metric)
    other_docs, others, other_weights, other_seeds = _mean_documents(theirs, task, metric)
    if len(docs) != len(other_docs) or (docs != other_docs).any():
        common = len(np.intersect1d(docs, other_docs))
        raise ValueError(
            f"not the same documents ({len(docs)} and {len(other_docs)}, {common} in common)"
        )
    if (weights != other_weights).any():
        raise ValueError("the documents have different lengths for the two models")
    differences = Differences(ours - others, weights)
    low, high = bootstrap([differences])
    row: dict[str, Any] = {
        "task": task,
        "metric": metric,
        "n_documents": len(docs),
        "subset": bool(both["subset"].eq(True).any()),
        "n_runs": len(mine),
        "reference/n_runs": len(theirs),
        "higher_is_better": bool(both["higher_is_better"].iloc[0]),
        "score": mine["score"].mean(),
        "reference/score": theirs["score"].mean(),
        "difference": differences.mean,
        "low": low,
        "high": high,
    }
    if np.isin(ours, (0, 1)).all() and np.isin(others, (0, 1)).all():
        only = int(np.sum(ours > others)), int(np.sum(ours < others))
        test = {"only_model": only[0], "only_reference": only[1], "test": "McNemar"}
        row |= test | {"p": mcnemar(*only)}
    else:
        row |= {"test": "sign flip", "p": sign_flip([differences])}
    return row, differences, (our_seeds, other_seeds)


def _over_seeds(tasks: Sequence[Seeds]) -> dict[str, Any]:
    """How many seeds both sides have, and the interval over them of the mean over tasks."""
    mine, theirs = (sum(side) / len(tasks) for side in zip(*tasks, strict=True))
    gap = seed_gap(mine, theirs)
    ends = {"seeds_low": gap["gap_low"], "seeds_high": gap["gap_high"]}
    return {"n_seeds": gap["n_seeds"]} | ends


def _pool(pooled: list[tuple[dict[str, Any], Differences, Seeds]]) -> dict[str, Any]:
    rows, tasks, seeds = zip(*pooled, strict=True)
    low, high = bootstrap(tasks)
    return {
        "task": MEAN,
        "metric": f"{len(tasks)} tasks",
        "higher_is_better": True,
        "n_documents": sum(len(task.values) for task in tasks),
        "subset": any(row["subset"] for row in rows),
        **{
            key: float(np.mean([row[key] for row in rows]))
            for key in ("score", "reference/score", "difference")
        },
        "low": low,
        "high": high,
        "test": "sign flip",
        "p": sign_flip(tasks),
        **_over_seeds(seeds),
    }


def _mean_documents(
    side: pd.DataFrame, task: str, metric: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, pd.Series]:
    """Hashes, values averaged over runs, and weights of a model's documents, sorted by hash (equal
    ones stay in order), and the score of each seed (none of a converted model)."""
    seeds = []
    for path, score in zip(side["path"], side["score"], strict=True):
        documents = load_documents(Path(path), task)
        values, weights = document_values(documents, metric)
        if metric in SHARES and abs(values.mean() - score) > 1e-6:
            raise ValueError(
                f"the mean {metric} of its documents is {values.mean():.6f}, its score {score:.6f}"
            )
        order = np.argsort(documents["doc"].to_numpy(str), kind="stable")
        seeds.append((documents["doc"].to_numpy(str)[order], values[order], weights[order]))
    docs, _, weights = seeds[0]
    if any(len(d) != len(docs) or (d != docs).any() or (w != weights).any() for d, _, w in seeds):
        raise ValueError("its seeds were not scored on the same documents")
    values = np.array([values for _, values, _ in seeds])
    by_seed = pd.Series(np.average(values, axis=1, weights=weights)).groupby(
        side["seed"].to_numpy()
    )
    return docs, values.mean(axis=0), weights, by_seed.mean()


def _discordant(row: pd.Series) -> str:
    if not row.get("only_model", np.nan) >= 0:
        return fmt.MISSING
    return f"{row['only_model']:.0f} / {row['only_reference']:.0f}"


def _ends(low: float, high: float, n: int) -> str:
    return f"[{low:+.4f}, {high:+.4f}] ({n})" if np.isfinite(low) else fmt.MISSING


def _p_value(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def _better(row: pd.Series) -> str:
    if (
        row["p_holm"] >= 0.05
        or row["difference"] == 0
        or row["seeds_low"] <= 0 <= row["seeds_high"]
    ):
        return fmt.MISSING
    return str(row["model" if (row["difference"] > 0) == row["higher_is_better"] else "reference"])
