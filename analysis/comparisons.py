"""The table of paired comparisons: each model with its match in the reference family, on the same
documents."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis import formats as fmt
from analysis.evaluations import SHARES, document_values, load_documents
from analysis.matching import TOLERANCE_SAID, seed_gap
from analysis.significance import RESAMPLES, Differences, bootstrap, holm, mcnemar, sign_flip
from analysis.study import NothingToShowError, Study, groups, protocol_columns
from analysis.table import Column, Table, interval_column, pair_column

LOGARITHMS = ("perplexity", "byte_perplexity", "word_perplexity")
MEAN = "mean over tasks"


@dataclass(frozen=True)
class Documents:
    """What a model got on the documents of a task, sorted by hash (equal ones stay in order).

    Attributes:
        hashes, values, weights: (n,), the values averaged over runs.
        by_seed: the score of each seed (none of a converted model).
    """

    hashes: npt.NDArray[np.str_]
    values: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64]
    by_seed: pd.Series


@dataclass(frozen=True)
class Comparison:
    """Two models on one task: the row of the table, the differences of documents, and the scores of
    both (columns) by seed."""

    row: dict[str, Any]
    differences: Differences
    seeds: pd.DataFrame


def comparisons(study: Study) -> Table:
    """Paired difference of every matched pair of models, per task and on average."""
    kept, scores, notes = study.scored()
    label = study.families.reference_label
    scores = scores[scores["headline"]].merge(kept[["run", "path", "seed"]], on="run")
    rows: list[dict[str, Any]] = []
    absent: dict[str, list[str]] = {}
    for model, partner in study.partners(kept).items():
        pair = {"model": model, "reference": partner}
        pooled = []
        for task, both in groups(scores[scores["model"].isin([model, partner])], "task"):
            try:
                for name in (model, partner):
                    if name not in set(both["model"]):
                        raise ValueError(f"{name} has no score of it")
                compared = _compare(
                    task, both[both["model"] == model], both[both["model"] == partner]
                )
            except (ValueError, OSError) as error:
                absent.setdefault(str(error), []).append(f"{model} and {partner} on {task}")
                continue
            rows.append(pair | compared.row | _over_seeds([compared]))
            if compared.row["metric"] in SHARES:
                pooled.append(compared)
        if len(pooled) > 1:
            rows.append(pair | _pool(pooled))
    if not rows:
        nothing = f"no model has scores and a {label} {TOLERANCE_SAID} that has them too"
        raise NothingToShowError(next(iter(absent), nothing))
    frame = pd.DataFrame(rows)
    frame["p_holm"] = holm(frame["p"])
    for reason, pairs in absent.items():
        more = f" and {len(pairs) - 3} more" if len(pairs) > 3 else ""
        notes.append(f"Left out: {'; '.join(pairs[:3])}{more}: {reason}.")
    notes = [*_notes(frame, label), *notes]
    return Table("Paired comparisons", frame, _columns(frame, label), notes)


def _columns(frame: pd.DataFrame, label: str) -> list[Column]:
    several = [Column("over seeds", _ends)] if (frame["n_seeds"] > 1).any() else []
    return [
        Column("model", "model"),
        Column(f"matched {label}", "reference"),
        Column("task", "task"),
        Column("metric", "metric"),
        Column("docs", lambda r: fmt.documents(r["n_documents"], r["subset"])),
        pair_column("scores", "score", fmt.number),
        interval_column("difference [95 % interval]", "difference", "low", "high", 4, "+"),
        *several,
        Column("only one right", _discordant),
        Column("test", "test"),
        Column("p", "p", _p_value),
        Column("p, Holm", "p_holm", _p_value),
        Column("better", _better),
    ]


def _notes(frame: pd.DataFrame, label: str) -> list[str]:
    notes = [
        "Both models scored the same documents, matched by hash. Difference: model minus its "
        f"{label}; interval: bootstrap over documents (within each task for the mean, all tasks "
        f"counting alike), percentiles of {RESAMPLES}. McNemar: exact, on the documents only one "
        f"model got right. Sign flip: {RESAMPLES} draws in which the two models are swapped on "
        "each document at random.",
        f"Holm: corrected for all {len(frame)} tests of this table, the means among them. Better: "
        "where the corrected p is below 0.05, and, with several seeds, the interval over seeds is "
        "on one side of 0; no better one is not a proof that they are alike.",
    ]
    if (frame[["n_runs", "reference/n_runs"]] > 1).any(axis=None):
        notes.append(
            "Several seeds: each document's score is averaged over them first. Seeds are not "
            "resampled: the test is about these trained models. Over seeds: 95 % paired t interval "
            "of the difference over the seeds both have (in brackets), which is about training "
            "again; not corrected."
        )
    if frame["subset"].any():
        notes.append("Subset: fewer documents than the official split.")
    if frame["metric"].isin(LOGARITHMS).any():
        notes.append("Perplexities are compared by their logarithm, in nats.")
    return notes


def _compare(task: str, ours: pd.DataFrame, others: pd.DataFrame) -> Comparison:
    """Compare the scores of a model's runs and of its reference's.

    Raises:
        ValueError, OSError: where there can be no comparison.
    """
    both = pd.concat([ours, others])
    unlike = [c for c in protocol_columns(both) if both[c].nunique() > 1]
    if both["metric"].nunique() > 1 or unlike:
        names = ", ".join(c.removeprefix("protocol/") for c in unlike) or "metric"
        raise ValueError(f"scored in different ways ({names})")
    metric = both["metric"].iloc[0].removesuffix(",none")
    first, second = (_mean_documents(side, task, metric) for side in (ours, others))
    if not np.array_equal(first.hashes, second.hashes):
        n, m = len(first.hashes), len(second.hashes)
        common = len(np.intersect1d(first.hashes, second.hashes))
        raise ValueError(f"not the same documents ({n} and {m}, {common} in common)")
    if (first.weights != second.weights).any():
        raise ValueError("the documents have different lengths for the two models")
    differences = Differences(first.values - second.values, first.weights)
    low, high = bootstrap([differences])
    row: dict[str, Any] = {
        "task": task,
        "metric": metric,
        "n_documents": len(first.hashes),
        "subset": bool(both["subset"].eq(True).any()),
        "n_runs": len(ours),
        "reference/n_runs": len(others),
        "higher_is_better": bool(both["higher_is_better"].iloc[0]),
        "score": ours["score"].mean(),
        "reference/score": others["score"].mean(),
        "difference": differences.mean,
        "low": low,
        "high": high,
    }
    if all(np.isin(side.values, (0, 1)).all() for side in (first, second)):
        only = int(np.sum(differences.values > 0)), int(np.sum(differences.values < 0))
        test = {"only_model": only[0], "only_reference": only[1], "test": "McNemar"}
        row |= test | {"p": mcnemar(*only)}
    else:
        row |= {"test": "sign flip", "p": sign_flip([differences])}
    seeds = pd.DataFrame({"model": first.by_seed, "reference": second.by_seed})
    return Comparison(row, differences, seeds)


def _over_seeds(tasks: Sequence[Comparison]) -> dict[str, Any]:
    """How many seeds both sides have, and the interval over them of the mean over tasks."""
    total = tasks[0].seeds
    for task in tasks[1:]:
        total = total + task.seeds
    gap = seed_gap(total["model"] / len(tasks), total["reference"] / len(tasks))
    ends = {"seeds_low": gap["gap_low"], "seeds_high": gap["gap_high"]}
    return {"n_seeds": gap["n_seeds"]} | ends


def _pool(pooled: Sequence[Comparison]) -> dict[str, Any]:
    tasks = [task.differences for task in pooled]
    rows = pd.DataFrame([task.row for task in pooled])
    low, high = bootstrap(tasks)
    return {
        "task": MEAN,
        "metric": f"{len(tasks)} tasks",
        "higher_is_better": True,
        "n_documents": int(rows["n_documents"].sum()),
        "subset": bool(rows["subset"].any()),
        **rows[["score", "reference/score", "difference"]].mean(),
        "low": low,
        "high": high,
        "test": "sign flip",
        "p": sign_flip(tasks),
        **_over_seeds(pooled),
    }


def _mean_documents(side: pd.DataFrame, task: str, metric: str) -> Documents:
    seeds = []
    for path, score in zip(side["path"], side["score"], strict=True):
        documents = load_documents(Path(path), task)
        values, weights = document_values(documents, metric)
        if metric in SHARES and abs(values.mean() - score) > 1e-6:
            raise ValueError(
                f"the mean {metric} of its documents is {values.mean():.6f}, its score {score:.6f}"
            )
        hashes = documents["doc"].to_numpy(str)
        order = np.argsort(hashes, kind="stable")
        seeds.append((hashes[order], values[order], weights[order]))
    hashes, _, weights = seeds[0]
    if any(not np.array_equal(h, hashes) or (w != weights).any() for h, _, w in seeds):
        raise ValueError("its seeds were not scored on the same documents")
    all_values = np.array([values for _, values, _ in seeds])
    of_run = pd.Series(np.average(all_values, axis=1, weights=weights))
    by_seed = of_run.groupby(side["seed"].to_numpy()).mean()
    return Documents(hashes, all_values.mean(axis=0), weights, by_seed)


def _discordant(row: pd.Series) -> str:
    if not row.get("only_model", np.nan) >= 0:
        return fmt.MISSING
    return f"{row['only_model']:.0f} / {row['only_reference']:.0f}"


def _ends(row: pd.Series) -> str:
    low, high, n = row["seeds_low"], row["seeds_high"], row["n_seeds"]
    return f"[{low:+.4f}, {high:+.4f}] ({n})" if np.isfinite(low) else fmt.MISSING


def _p_value(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def _better(row: pd.Series) -> str:
    within_seeds = row["seeds_low"] <= 0 <= row["seeds_high"]
    if row["p_holm"] >= 0.05 or row["difference"] == 0 or within_seeds:
        return fmt.MISSING
    return str(row["model" if (row["difference"] > 0) == row["higher_is_better"] else "reference"])
