"""The loss gap of matched pairs against size: a figure, and a straight line that describes it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from scipy.special import stdtrit  # the t quantile, without the seconds scipy.stats takes to import

from analysis import formats as fmt
from analysis import style
from analysis.families import Families
from analysis.plots import subtitle
from analysis.scaling import LEVEL
from analysis.study import Study, budget_notes, groups
from analysis.style import Plot

MIN_SIZES_TREND = 4
SIZE = "parameters/non_embedding"

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Trend:
    """A straight line of a gap against log10 of size.

    Attributes:
        slope: per tenfold size; `low` and `high` are its 95 % t interval.
        line: sizes -> gap.
        half: sizes -> half the width of the line's 95 % band.
    """

    slope: float
    low: float
    high: float
    line: Callable[[Array], Array]
    half: Callable[[Array], Array]


def gap_trend(x: npt.ArrayLike, gap: npt.ArrayLike) -> Trend | None:
    """Least squares of `gap` over log10 of the sizes `x`, one point a size, all weighing alike; the
    scatter of the sizes around the line makes the intervals. None for fewer than 4 sizes."""
    u, gap = np.log10(np.asarray(x, float)), np.asarray(gap, float)
    n = len(u)
    if len(np.unique(u)) < MIN_SIZES_TREND:
        return None
    center, mean = u.mean(), gap.mean()
    spread = ((u - center) ** 2).sum()
    slope = float(((u - center) @ gap) / spread)
    rest = gap - mean - slope * (u - center)
    t, sd = stdtrit(n - 2, 0.5 + LEVEL / 2), np.sqrt(rest @ rest / (n - 2))
    half = float(t * sd / np.sqrt(spread))
    return Trend(
        slope,
        slope - half,
        slope + half,
        lambda at: mean + slope * (np.log10(at) - center),
        lambda at: t * sd * np.sqrt(1 / n + (np.log10(at) - center) ** 2 / spread),
    )


@rc_context(style.STYLE)
def loss_gap(study: Study) -> Plot:
    """Loss of each model minus that of its match in the reference family against size, with
    intervals over seeds, in the unit of the loss and in per cent; from 4 sizes on a line that
    describes how it goes."""
    losses, families = study.losses, study.families
    pairs = study.pairs(losses)
    names, reference = families.names(pairs), families.reference_label
    title = f"{names} minus {reference}: gap in validation loss against size"
    has_interval = bool(pairs["gap_low"].notna().any())
    shown = "bars: 95 % interval over seeds" if has_interval else "no intervals"
    figure, panels = style.new_figure(title, subtitle(losses.runs, shown), columns=2, width=10.5)
    trends = []
    keys = {"gap": f"gap ({losses.unit})", "percent": f"gap (% of the {reference}'s loss)"}
    for axes, (key, name) in zip(panels, keys.items(), strict=True):
        for family, group in groups(pairs.sort_values(SIZE), "family"):
            trend = _draw(axes, group, family, families, key)
            if trend is not None and key == "gap":
                slope = fmt.interval(trend.slope, trend.low, trend.high, 3, "+")
                trends.append(f"{families.label(family)} {slope} {losses.unit} for tenfold size")
        _zero_line(axes, names, reference)
        style.log_axis(axes, "x", style.margins(pairs[SIZE], 0.1), fmt.short)
        axes.set_xlabel("non-embedding parameters")
        axes.set_ylabel(name)
    if pairs["family"].nunique() > 1 or trends:
        panels[0].legend(loc="best")
    notes = [*losses.notes, *_notes(reference, has_interval, trends)]
    unlike = pairs[pairs["note"] != ""]
    notes += [f"{row.model} and {row.reference}: {row.note}." for row in unlike.itertuples()]
    return Plot(title, figure, [*notes, *budget_notes(losses.runs)])


def _draw(
    axes: Axes, group: pd.DataFrame, family: str, families: Families, key: str
) -> Trend | None:
    color, gap = families.color(family), group[key]
    ends = np.abs(group[[f"{key}_low", f"{key}_high"]].to_numpy(float).T - gap.to_numpy())
    axes.errorbar(
        group[SIZE], gap, ends, color=color, marker=families.marker(family), ls="",
        ms=5.5, capsize=4, elinewidth=1.4, zorder=3, label=families.label(family),
    )  # fmt: skip
    trend = gap_trend(group[SIZE], gap)
    if trend is not None:
        at = np.geomspace(group[SIZE].min(), group[SIZE].max(), 50)
        line, half = trend.line(at), trend.half(at)
        axes.plot(at, line, color=color, lw=1.2, ls="--", label="straight line, 95 % band")
        axes.fill_between(at, line - half, line + half, color=color, alpha=0.12, lw=0)
    return trend


def _zero_line(axes: Axes, names: str, reference: str) -> None:
    """The line of equal losses, within the axis, and which side is better above and below it."""
    low, high = axes.get_ylim()
    pad = 0.12 * max(high, 0.0) - 0.12 * min(low, 0.0)
    axes.set_ylim(min(low, 0.0) - pad, max(high, 0.0) + pad)
    axes.axhline(0, color=style.INK, lw=1.2)
    style.text_at_line(axes, 0, f"above 0: {reference} is better")
    style.text_at_line(axes, 0, f"below 0: {names} is better", above=False)


def _notes(reference: str, has_interval: bool, trends: list[str]) -> list[str]:
    notes = [
        f"Gap: the model's loss minus that of the {reference} nearest in total parameters; per "
        "cent: of ratios of losses, averaged as logarithms."
    ]
    if has_interval:
        notes.append(
            "Bars: paired t over the seeds both have; each size for itself, not corrected for "
            "their number."
        )
    if trends:
        notes.append(
            f"Straight line over log size, each size one point: {'; '.join(trends)} (95 % "
            "interval from the scatter of sizes). It describes these sizes at these budgets and "
            "says nothing about larger ones."
        )
    return notes
