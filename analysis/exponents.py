"""Do the families' power laws differ, and does a law foretell the size it has not seen?"""

import numpy as np
import pandas as pd

from analysis import formats as fmt
from analysis import scaling
from analysis.runs import REFERENCE
from analysis.study import NothingToShowError, Study, best_variants, budget_notes, groups, loss_of
from analysis.table import Column, Table, cell
from analysis.tables import X_NAMES

MIN_SIZES = 3  # of a fit with an interval


def exponents(study: Study) -> Table:
    """The difference of each family's exponent from the GPT's over matched sizes, with its
    interval."""
    runs, notes = best_variants(study.trained)
    loss, unit = loss_of(runs)
    partner = scaling.partners(runs)
    rows = []
    means = runs.groupby("model")[[*X_NAMES]].mean()
    means["loss"] = np.exp(np.log(runs[loss]).groupby(runs["model"]).mean())
    for family, group in groups(runs[runs["model"].isin(list(partner))], "family"):
        mine = means.loc[group["model"].unique()]
        theirs = means.loc[[partner[model] for model in mine.index]]
        for x, name in X_NAMES.items():
            if min(side[x].nunique() for side in (mine, theirs)) < MIN_SIZES:
                continue
            laws = [scaling.fit_power_law(side[x], side["loss"]) for side in (mine, theirs)]
            difference, low, high = scaling.exponent_difference(
                mine[x], mine["loss"], theirs[x], theirs["loss"]
            )
            about = {"family": family, "x": name, "b": laws[0].b, "reference/b": laws[1].b}
            about |= {"n_sizes": len(mine)}
            rows.append(about | {"difference": difference, "low": low, "high": high})
    if not rows:
        raise NothingToShowError(f"no family has {MIN_SIZES} sizes with a matched GPT")
    columns: list[Column] = [
        ("family", cell("family", fmt.family_name)),
        ("x", cell("x")),
        ("b", cell("b", fmt.fixed)),
        ("b of the GPT", cell("reference/b", fmt.fixed)),
        (
            "difference [95 % interval]",
            lambda r: fmt.interval(r["difference"], r["low"], r["high"], 3, "+"),
        ),
        ("matched sizes", cell("n_sizes")),
        ("falls faster with x", _faster),
    ]
    notes.append(
        f"Loss in {unit}, a x^-b over the means of sizes that both have. Difference of b: t "
        "interval from the scatter of sizes around both laws, less what matched sizes have in "
        "common. Where the laws bend otherwise than alike, it is about these sizes only."
    )
    return Table("Exponents compared", pd.DataFrame(rows), columns, notes + budget_notes(runs))


def held_out_size(study: Study) -> Table:
    """Each family's largest size beside what the law of its smaller sizes foretells for it."""
    runs, notes = best_variants(study.trained)
    loss, unit = loss_of(runs)
    rows = []
    for family, group in groups(runs, "family"):
        largest = group["parameters/total"] == group["parameters/total"].max()
        for x, name in X_NAMES.items():
            seen, held_out = group[~largest], group[largest]
            if seen[x].nunique() < MIN_SIZES:
                continue
            law = scaling.fit_power_law(seen[x], seen[loss])
            predicted, low, high = (float(v) for v in law.predict(held_out[x].mean()))
            about = {"family": family, "x": name, "model": held_out["model"].iloc[0]}
            about |= {"n_sizes": law.n_sizes, "n_runs": len(held_out), "note": law.note}
            about |= {"predicted": predicted, "low": low, "high": high}
            rows.append(about | {"measured": float(held_out[loss].mean())})
    if not rows:
        raise NothingToShowError(f"no family has {MIN_SIZES + 1} sizes")
    frame = pd.DataFrame(rows)
    frame["inside"] = frame["measured"].between(frame["low"], frame["high"])
    columns: list[Column] = [
        ("family", cell("family", fmt.family_name)),
        ("held out", cell("model")),
        ("x", cell("x")),
        ("fitted to", lambda r: f"{r['n_sizes']} smaller sizes"),
        (
            "foretold [95 % band]",
            lambda r: fmt.interval(r["predicted"], r["low"], r["high"], 4),
        ),
        ("measured", lambda r: f"{r['measured']:.4f} ({r['n_runs']} run{'s' * (r['n_runs'] > 1)})"),
        ("measured / foretold", lambda r: f"{100 * (r['measured'] / r['predicted'] - 1):+.2f} %"),
        ("within the band", lambda r: "yes" if r["inside"] else "no"),
        ("note", lambda r: r["note"] or fmt.MISSING),
    ]
    notes.append(
        f"Loss in {unit}. The largest size of a family is left out, a x^-b is fitted to the means "
        "of the others, and the band is where one more size's mean should fall. A wide band holds "
        "much: within it is no proof of the law, outside it speaks against it."
    )
    title = "The largest size, foretold by the smaller ones"
    return Table(title, frame, columns, notes + budget_notes(runs))


def _faster(row: pd.Series) -> str:
    if not (row["low"] > 0 or row["high"] < 0):
        return "not told apart"
    return fmt.family_name(row["family"] if row["difference"] > 0 else REFERENCE)
