"""Do the families' power laws differ, and does a law predict the size it has not seen?"""

import numpy as np
import pandas as pd

from analysis import formats as fmt
from analysis import scaling
from analysis.families import Families
from analysis.study import NothingToShowError, Study, budget_notes, groups
from analysis.table import Column, Table, interval_column
from analysis.tables import X_NAMES

MIN_SIZES = 3  # of a fit with an interval


def exponents(study: Study) -> Table:
    """The difference of each family's exponent from that of the reference over matched sizes, with
    its interval."""
    losses, families = study.losses, study.families
    runs, partner = losses.runs, study.partners(losses.runs)
    rows = []
    means = runs.groupby("model")[[*X_NAMES]].mean()
    means["loss"] = np.exp(np.log(runs[losses.column]).groupby(runs["model"]).mean())
    for family, group in groups(runs[runs["model"].isin(list(partner))], "family"):
        ours = means.loc[group["model"].unique()]
        others = means.loc[[partner[model] for model in ours.index]]
        for x, name in X_NAMES.items():
            if min(side[x].nunique() for side in (ours, others)) < MIN_SIZES:
                continue
            laws = [scaling.fit_power_law(side[x], side["loss"]) for side in (ours, others)]
            difference, low, high = scaling.exponent_difference(
                ours[x], ours["loss"], others[x], others["loss"]
            )
            rows.append({
                "family": family, "x": name, "b": laws[0].b, "reference/b": laws[1].b,
                "n_sizes": len(ours), "difference": difference, "low": low, "high": high,
            })  # fmt: skip
    if not rows:
        label = families.reference_label
        raise NothingToShowError(f"no family has {MIN_SIZES} sizes with a matched {label}")
    columns = [
        Column("family", "family", families.label),
        Column("x", "x"),
        Column("b", "b", fmt.fixed),
        Column(f"b of the {families.reference_label}", "reference/b", fmt.fixed),
        interval_column("difference [95 % interval]", "difference", "low", "high", 3, "+"),
        Column("matched sizes", "n_sizes"),
        Column("falls faster with x", lambda r: _faster(r, families)),
    ]
    note = (
        f"Loss in {losses.unit}, a x^-b over the means of sizes that both have. Difference of b: t "
        "interval from the scatter of sizes around both laws, less what matched sizes have in "
        "common. Where one law bends and the other does not, it is about these sizes only."
    )
    notes = [*losses.notes, note, *budget_notes(runs)]
    return Table("Exponents compared", pd.DataFrame(rows), columns, notes)


def held_out_size(study: Study) -> Table:
    """Each family's largest size beside what the law of its smaller sizes predicts for it."""
    losses = study.losses
    rows = []
    for family, group in groups(losses.runs, "family"):
        largest = group["parameters/total"] == group["parameters/total"].max()
        for x, name in X_NAMES.items():
            seen, held_out = group[~largest], group[largest]
            if seen[x].nunique() < MIN_SIZES:
                continue
            law = scaling.fit_power_law(seen[x], seen[losses.column])
            predicted, low, high = (float(v) for v in law.predict(held_out[x].mean()))
            rows.append({
                "family": family, "x": name, "model": held_out["model"].iloc[0],
                "n_sizes": law.n_sizes, "n_runs": len(held_out), "note": law.note,
                "predicted": predicted, "low": low, "high": high,
                "measured": float(held_out[losses.column].mean()),
            })  # fmt: skip
    if not rows:
        raise NothingToShowError(f"no family has {MIN_SIZES + 1} sizes")
    frame = pd.DataFrame(rows)
    frame["inside"] = frame["measured"].between(frame["low"], frame["high"])
    columns = [
        Column("family", "family", study.families.label),
        Column("held out", "model"),
        Column("x", "x"),
        Column("fitted to", "n_sizes", "{} smaller sizes".format),
        interval_column("predicted [95 % band]", "predicted", "low", "high", 4),
        Column(
            "measured",
            lambda r: f"{r['measured']:.4f} ({r['n_runs']} run{'s' * (r['n_runs'] > 1)})",
        ),
        Column(
            "measured / predicted",
            lambda r: f"{100 * (r['measured'] / r['predicted'] - 1):+.2f} %",
        ),
        Column("within the band", "inside", lambda inside: "yes" if inside else "no"),
        Column("note", "note", fmt.text),
    ]
    note = (
        f"Loss in {losses.unit}. The largest size of a family is left out, a x^-b is fitted to the "
        "means of the others, and the band is where one more size's mean should fall. A wide band "
        "holds much: within it is no proof of the law, outside it speaks against it."
    )
    notes = [*losses.notes, note, *budget_notes(losses.runs)]
    return Table("The largest size, predicted by the smaller ones", frame, columns, notes)


def _faster(row: pd.Series, families: Families) -> str:
    if not (row["low"] > 0 or row["high"] < 0):
        return "not told apart"
    return families.label(row["family"] if row["difference"] > 0 else families.reference)


def _measured(row: pd.Series) -> str:
    n = row["n_runs"]
    return f"{row['measured']:.4f} ({n} run{'s' * (n > 1)})"
