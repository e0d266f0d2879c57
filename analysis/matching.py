"""Which models are compared with which, and the loss gap of such matched pairs, with intervals."""

import numpy as np
import pandas as pd
from scipy.special import stdtrit  # the t quantile, without the seconds scipy.stats takes to import

from analysis import formats as fmt
from analysis.runs import CONDITIONS, SIZES
from analysis.scaling import LEVEL

TOLERANCE = 0.10
TOLERANCE_SAID = f"within {100 * TOLERANCE:.0f} % of total parameters"

Gap = dict[str, float | int | str]


def partners(runs: pd.DataFrame, reference: str) -> dict[str, str]:
    """Each model's partner: of the reference family's models, trained here or converted like the
    model itself, the nearest in total parameters, if it differs by 10 % at most."""
    found = {}
    for _, alike in runs.groupby("converted"):
        models = alike.drop_duplicates(["family", "model"]).set_index("model")
        is_reference = models["family"] == reference
        candidates = models.loc[is_reference, "parameters/total"]
        for model, size in models.loc[~is_reference, "parameters/total"].items():
            mismatch = (candidates / size - 1).abs()
            if len(candidates) and mismatch.min() <= TOLERANCE:
                found[str(model)] = str(mismatch.idxmin())
    return found


def matched_pairs(runs: pd.DataFrame, loss: str, reference: str) -> pd.DataFrame:
    """One row a pair of `partners`, with the loss gap, model minus reference.

    The interval is NaN for one seed, and where the two were trained differently (`note` says how):
    nothing but the model, and a peak learning rate that was chosen in the same way for both, may
    differ in a pair of runs.

    Returns:
        Both sides' sizes, tokens, peak rate, `n_variants` and mean `loss` (the reference's with
        the prefix `reference/`); `gap`, `gap_low`, `gap_high`: mean and 95 % t interval over the
        seeds they share, in the unit of the loss; `percent...`: the same of the reference's loss.
    """
    rows = []
    for model, partner in partners(runs, reference).items():
        ours, others = runs[runs["model"] == model], runs[runs["model"] == partner]
        row = {"family": ours["family"].iloc[0], "model": model, "reference": partner}
        for prefix, side in (("", ours), ("reference/", others)):
            for measure in (*SIZES, "tokens", "peak_lr", "n_variants"):
                row[prefix + measure] = side[measure].iloc[0]
            row[f"{prefix}loss"] = side[loss].mean()
        sides = [side.groupby("seed")[loss].mean() for side in (ours, others)]
        gap, ratio = seed_gap(*sides), seed_gap(*(np.log(side) for side in sides))
        for key in ("gap", "gap_low", "gap_high"):
            gap[key.replace("gap", "percent")] = 100 * float(np.expm1(ratio[key]))
        if unlike := _differences(ours.iloc[0], others.iloc[0]):
            ends = ("gap_low", "gap_high", "percent_low", "percent_high")
            gap |= dict.fromkeys(ends, np.nan)
            gap["note"] = f"not alike in {', '.join(unlike)}: no interval"
        rows.append(row | gap)
    return pd.DataFrame(rows)


def _differences(ours: pd.Series, others: pd.Series) -> list[str]:
    columns = [*CONDITIONS, "budget_tokens"]
    # the recipe may choose the rates, or the same search; else nobody knows what did
    if ours["variant"] != others["variant"] and ours["tried"] != others["tried"]:
        columns.append("peak_lr")
    sides = [(c.split("/")[-1], fmt.text(ours[c]), fmt.text(others[c])) for c in columns]
    return [f"{name} ({a} / {b})" for name, a, b in sides if a != b]


def seed_gap(ours: pd.Series, others: pd.Series) -> Gap:
    """`ours - others` over the seeds (index) both have: mean, 95 % paired t interval, note."""
    difference = (ours - others).dropna()
    n = len(difference)
    if n == 0:
        gap = float(ours.mean() - others.mean())
        return _gap(gap, np.nan, 0, "no seed in common: no interval")
    gap = float(difference.mean())
    if n == 1:
        return _gap(gap, np.nan, 1, "one seed: no interval")
    half = float(stdtrit(n - 1, 0.5 + LEVEL / 2) * difference.std(ddof=1) / np.sqrt(n))
    return _gap(gap, half, n, "one degree of freedom" if n == 2 else "")


def _gap(gap: float, half: float, n: int, note: str) -> Gap:
    return {"gap": gap, "gap_low": gap - half, "gap_high": gap + half, "n_seeds": n, "note": note}
