"""The figures of a report: each function takes a Study and returns a Plot."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import formats as fmt
from analysis import scaling as laws
from analysis import style
from analysis.study import (
    NothingToShowError,
    Study,
    best_variants,
    budget_notes,
    groups,
    loss_of,
)

MIN_SIZES_BAND = 4


@dataclass(frozen=True)
class Plot:
    """A figure, its title, and what a reader must know beside it."""

    title: str
    figure: Figure
    notes: list[str] = field(default_factory=list)


def loss_curves(study: Study) -> Plot:
    """Validation loss against training tokens: one line a model (mean over seeds, range shaded)."""
    return _curves(study, "tokens", "training tokens", fmt.short)[0]


def loss_against_compute(study: Study) -> Plot:
    """The same against training FLOPs: which size is lowest at which compute."""
    plot, means = _curves(study, "flops", "training FLOPs", style.power_of_ten)
    plot.notes.append(
        "Marks: the ends of runs. The lowest line at some FLOPs tells which size would be best "
        "there, but only marks are losses of that budget: on the way the learning rate is still "
        "high, and a run that ends there would be lower than a line that passes."
    )
    overtaken = _overtaken(means, "flops")
    if overtaken:
        plot.notes.append(
            f"A larger size of the family is lower already where these end: {', '.join(overtaken)}."
            " The same FLOPs were better spent on that size and fewer tokens."
        )
    return plot


def _overtaken(means: pd.DataFrame, x: str) -> list[str]:
    """The models whose end lies above the line of a larger one of their family, and that one."""
    found = []
    for _, family in groups(means.sort_values(x), "family"):
        logs = {m: np.log(line[[x, "mean"]].to_numpy()).T for m, line in groups(family, "model")}
        sizes = dict(zip(family["model"], family["parameters/total"], strict=True))
        for model, (xs, ys) in logs.items():
            for other, (at, losses) in logs.items():
                covers = sizes[other] > sizes[model] and at[0] <= xs[-1] <= at[-1]
                if covers and np.interp(xs[-1], at, losses) < ys[-1]:
                    found.append(f"{model} ({other})")
                    break
    return found


@rc_context(style.STYLE)
def _curves(
    study: Study, x: str, name: str, write: Callable[[float], str]
) -> tuple[Plot, pd.DataFrame]:
    """The figure, and the mean losses that it draws."""
    runs, notes = best_variants(study.trained)
    loss, unit = loss_of(runs)
    curves = study.curves.merge(runs[["run", "flops_per_token"]], on="run")
    curves["flops"] = curves["tokens"] * curves["flops_per_token"]
    curves = curves[curves[loss].notna() & (curves["tokens"] > 0)]
    if curves.empty:
        raise NothingToShowError(f"no metrics.csv has {loss}")
    title = f"{family_names(runs)}: validation loss against {name}"
    about = ["mean over seeds, range shaded"] if runs["seed"].nunique() > 1 else []
    figure, (axes,) = style.new_figure(title, subtitle(runs, *about))
    lines = curves.groupby(["family", "model", "parameters/total", x], sort=False)[loss]
    means = lines.agg(["mean", "min", "max"]).reset_index()
    for (family, model, total), line in groups(means, "family", "model", "parameters/total"):
        line = line.sort_values(x)
        at, color = line[x], model_shade(runs, family, model)
        label = f"{fmt.family_name(family)} {fmt.short(total)}"
        dashes = "-" if family != "gpt" else (0, (5, 1.5))
        point = style.marker(family) if x == "flops" or len(line) == 1 else None
        axes.plot(
            at, line["mean"], color=color, ls=dashes, marker=point, markevery=[-1], label=label
        )
        if (line["max"] > line["min"]).any():
            axes.fill_between(at, line["min"], line["max"], color=color, alpha=0.2, lw=0)
    style.log_axis(axes, "x", *style.margins(curves[x], 0.02), write)
    _loss_axis(axes, runs, curves[loss], unit)
    axes.set_xlabel(name)
    axes.legend(
        loc="center left", bbox_to_anchor=(1.01, 0.5), ncols=1 + (runs["model"].nunique() > 16)
    )
    return Plot(title, figure, notes), means


@rc_context(style.STYLE)
def scaling(study: Study) -> Plot:
    """Final validation loss against parameters and training FLOPs, a power law per family."""
    runs, notes = best_variants(study.trained)
    loss, unit = loss_of(runs)
    title = f"{family_names(runs)}: validation loss against parameters and training compute"
    banded = runs.groupby("family")["parameters/total"].nunique().max() >= MIN_SIZES_BAND
    more = ["shaded: 95 % prediction band"] if banded else []
    figure, panels = style.new_figure(title, subtitle(runs, *more), columns=2, height=4.9)
    axes_of = (
        ("parameters/total", "parameters (total)", "N", fmt.short),
        ("flops", "training FLOPs", "F", style.power_of_ten),
    )
    for axes, (key, name, symbol, write) in zip(panels, axes_of, strict=True):
        low, high = style.margins(runs[key], 0.08)
        for family, group in groups(runs, "family"):
            color, label = fmt.family_color(family), fmt.family_name(family)
            if group[key].nunique() > 1:
                law = laws.fit_power_law(group[key], group[loss])
                x = np.geomspace(low, high, 60)
                y, band_low, band_high = law.predict(x)
                axes.plot(x, y, color=color, lw=1.6)
                if law.n_sizes >= MIN_SIZES_BAND:
                    axes.fill_between(x, band_low, band_high, color=color, alpha=0.13, lw=0)
                exponent = fmt.interval(-law.b, -law.b_high, -law.b_low).replace("-", "−")
                label += rf"  $\propto {symbol}^{{\,b}}$, b = {exponent}"
            axes.plot(group[key], group[loss], "o", color=color, ms=3.5, alpha=0.45, mew=0)
            means = group.groupby(key)[loss].mean()
            point = style.marker(family)
            axes.plot(means.index, means, point, color=color, ms=7.5, mec="white", label=label)
        style.log_axis(axes, "x", low, high, write)
        _loss_axis(axes, runs, runs[loss], unit, label=axes is panels[0])
        axes.set_xlabel(name)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.03, 1.0))
    notes.append(
        "Large marks: mean over seeds; small marks: single runs; lines: least squares in log-log; "
        "shaded: 95 % prediction band for the mean of one more size (cut at the frame; drawn from "
        f"{MIN_SIZES_BAND} sizes up, with fewer it fills the panel). Exponents: 95 % intervals."
    )
    return Plot(title, figure, notes + budget_notes(runs))


@rc_context(style.STYLE)
def training_throughput(study: Study) -> Plot:
    """Training tokens per second against parameters, the median over runs with their range."""
    runs = study.trained[study.trained["perf/tokens_per_s"] > 0]
    if runs.empty:
        raise NothingToShowError("no run recorded perf/tokens_per_s")
    title = f"{family_names(runs)}: training throughput"
    machine = runs.reindex(columns=["device/name", "device/n_threads", "precision"])
    # a speed is of one way of training alone
    said = ["{}, {} threads, {}".format(*map(fmt.text, row)) for row in machine.to_numpy()]
    way = [text.replace(" 1 threads", " 1 thread") for text in said]
    ways = list(dict.fromkeys(way))
    about = "median over runs, bars: range" + (f" · {ways[0]}" if len(ways) == 1 else "")
    figure, (axes,) = style.new_figure(title, about, width=7.2)
    for (family, how), group in groups(runs.assign(way=way), "family", "way"):
        speed = group.groupby("parameters/total")["perf/tokens_per_s"].agg(["median", "min", "max"])
        spread = [speed["median"] - speed["min"], speed["max"] - speed["median"]]
        axes.errorbar(
            speed.index,
            speed["median"],
            spread,
            color=fmt.family_color(family),
            marker=style.marker(family),
            mec="white",
            ls=("-", "--", ":", "-.")[ways.index(how) % 4],
            capsize=2.5,
            elinewidth=1.2,
            label=fmt.family_name(family) + (f", {how}" if len(ways) > 1 else ""),
        )
    style.log_axis(axes, "x", *style.margins(runs["parameters/total"], 0.08), fmt.short)
    style.log_axis(axes, "y", *style.margins(runs["perf/tokens_per_s"], 0.08), fmt.short)
    axes.set_xlabel("parameters (total)")
    axes.set_ylabel("training tokens per second")
    axes.legend(loc="best")
    return Plot(title, figure)


def family_names(runs: pd.DataFrame) -> str:
    """The families of some runs, as a title says them."""
    names = [fmt.family_name(family) for family in runs["family"].unique()]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def subtitle(runs: pd.DataFrame, *more: str) -> str:
    """Data, budget and seeds that every run of the figure shares, or their range."""
    budgets, seeds = runs["tokens"], runs.groupby("model")["seed"].nunique()
    known = [c for c in ("data/name", "data/tokenizer") if c in runs]
    data = runs[known].drop_duplicates().astype(str).agg(", ".join, axis=1)
    tokens = _span(fmt.short(budgets.min()), fmt.short(budgets.max()))
    n_seeds = _span(str(seeds.min()), str(seeds.max()))
    one = "" if n_seeds == "1" else "s"
    parts = [
        f"data: {'; '.join(data)}",
        f"{tokens} training tokens a run",
        f"{n_seeds} seed{one} a size",
        *more,
    ]
    return " · ".join(parts)


def _span(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def model_shade(runs: pd.DataFrame, family: str, model: str) -> tuple[float, float, float]:
    """A model's colour: its family's, lighter the smaller it is among the family's models."""
    mine = runs[runs["family"] == family].drop_duplicates("model").sort_values("parameters/total")
    models = list(mine["model"])
    return style.shade(family, models.index(model), len(models))


def _loss_axis(
    axes: Axes, runs: pd.DataFrame, values: pd.Series, unit: str, label: bool = True
) -> None:
    """A logarithmic loss axis that also holds the xz reference line, where there is one."""
    xz = runs["data/xz_bpb"].dropna().unique() if unit == "bits/byte" else np.array([])
    style.log_axis(axes, "y", *style.margins([*values, *xz]), lambda v: f"{v:.3g}")
    for level in xz:
        axes.axhline(level, color=style.MUTED, ls=":", lw=1.4)
        text, place = f"xz on the same text: {level:.2f}", axes.get_yaxis_transform()
        ground = {"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1.0}  # over lines and bands
        axes.annotate(
            text, (0.01, level), (0, 3), xycoords=place, textcoords="offset points",
            va="bottom", size=8.5, color=style.MUTED, bbox=ground,
        )  # fmt: skip
    if label:
        axes.set_ylabel(f"validation loss ({unit})")
