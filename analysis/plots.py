"""The figures of losses and speed: each function takes a Study and returns a Plot."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes

from analysis import formats as fmt
from analysis import scaling as laws
from analysis import style
from analysis.study import Losses, NothingToShowError, Study, budget_notes, groups
from analysis.style import Plot

MIN_SIZES_BAND = 4


def loss_curves(study: Study) -> Plot:
    """Validation loss against training tokens: one line a model (mean over seeds, range shaded)."""
    return _curves(study, "tokens", "training tokens", fmt.short)


def loss_against_compute(study: Study) -> Plot:
    """The same against training FLOPs: which size is lowest at which compute."""
    plot = _curves(study, "flops", "training FLOPs", fmt.power_of_ten)
    plot.notes.append(
        "Marks: the ends of runs. The lowest line at some FLOPs tells which size would be best "
        "there, but only marks are losses of that budget: on the way the learning rate is still "
        "high, and a run that ends there would be lower than a line that passes."
    )
    return plot


@rc_context(style.STYLE)
def _curves(study: Study, x: str, name: str, write: Callable[[float], str]) -> Plot:
    losses, families = study.losses, study.families
    runs, loss = losses.runs, losses.column
    curves = study.curves.merge(runs[["run", "flops_per_token"]], on="run")
    curves["flops"] = curves["tokens"] * curves["flops_per_token"]
    curves = curves[curves[loss].notna() & (curves["tokens"] > 0)]
    if curves.empty:
        raise NothingToShowError(f"no metrics.csv has {loss}")
    title = f"{families.names(runs)}: validation loss against {name}"
    about = ["mean over seeds, range shaded"] if runs["seed"].nunique() > 1 else []
    figure, (axes,) = style.new_figure(title, subtitle(runs, *about))
    lines = curves.groupby(["family", "model", "parameters/total", x], sort=False)[loss]
    means = lines.agg(["mean", "min", "max"]).reset_index()
    for (family, model, total), line in groups(means, "family", "model", "parameters/total"):
        style.shaded_line(
            axes, line.sort_values(x), x, color=families.shade(runs, family, model),
            ls=families.dashes(family), markevery=[-1],
            marker=families.marker(family) if x == "flops" or len(line) == 1 else None,
            label=f"{families.label(family)} {fmt.short(total)}",
        )  # fmt: skip
    style.log_axis(axes, "x", style.margins(curves[x], 0.02), write)
    _loss_axis(axes, losses, curves[loss])
    axes.set_xlabel(name)
    axes.legend(
        loc="center left", bbox_to_anchor=(1.01, 0.5), ncols=1 + (runs["model"].nunique() > 16)
    )
    return Plot(title, figure, losses.notes)


@rc_context(style.STYLE)
def scaling(study: Study) -> Plot:
    """Final validation loss against parameters and training FLOPs, a power law per family."""
    losses, families = study.losses, study.families
    runs, loss = losses.runs, losses.column
    title = f"{families.names(runs)}: validation loss against parameters and training compute"
    banded = runs.groupby("family")["parameters/total"].nunique().max() >= MIN_SIZES_BAND
    more = ["shaded: 95 % prediction band"] if banded else []
    figure, panels = style.new_figure(title, subtitle(runs, *more), columns=2, height=4.9)
    axes_of = (
        ("parameters/total", "parameters (total)", "N", fmt.short),
        ("flops", "training FLOPs", "F", fmt.power_of_ten),
    )
    for axes, (key, name, symbol, write) in zip(panels, axes_of, strict=True):
        limits = style.margins(runs[key], 0.08)
        for family, group in groups(runs, "family"):
            color, label = families.color(family), families.label(family)
            if group[key].nunique() > 1:
                law = laws.fit_power_law(group[key], group[loss])
                x = np.geomspace(*limits, 60)
                y, band_low, band_high = law.predict(x)
                axes.plot(x, y, color=color, lw=1.6)
                if law.n_sizes >= MIN_SIZES_BAND:
                    axes.fill_between(x, band_low, band_high, color=color, alpha=0.13, lw=0)
                exponent = fmt.interval(-law.b, -law.b_high, -law.b_low).replace("-", "−")
                label += rf"  $\propto {symbol}^{{\,b}}$, b = {exponent}"
            axes.plot(group[key], group[loss], "o", color=color, ms=3.5, alpha=0.45, mew=0)
            means = group.groupby(key)[loss].mean()
            point = families.marker(family)
            axes.plot(means.index, means, point, color=color, ms=7.5, mec="white", label=label)
        style.log_axis(axes, "x", limits, write)
        _loss_axis(axes, losses, runs[loss], label=axes is panels[0])
        axes.set_xlabel(name)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.03, 1.0))
    note = (
        "Large marks: mean over seeds; small marks: single runs; lines: least squares in log-log; "
        "shaded: 95 % prediction band for the mean of one more size (cut at the frame; drawn from "
        f"{MIN_SIZES_BAND} sizes up, with fewer it fills the panel). Exponents: 95 % intervals."
    )
    return Plot(title, figure, [*losses.notes, note, *budget_notes(runs)])


@rc_context(style.STYLE)
def training_throughput(study: Study) -> Plot:
    """Training tokens per second against parameters, the median over runs with their range."""
    runs, families = study.trained, study.families
    runs = runs[runs["perf/tokens_per_s"] > 0]
    if runs.empty:
        raise NothingToShowError("no run recorded perf/tokens_per_s")
    title = f"{families.names(runs)}: training throughput"
    # a speed is of one way of training alone
    machines = runs[["device/name", "device/n_threads", "precision"]].to_numpy()
    way = [f"{fmt.text(name)}, {fmt.threads(n)}, {fmt.text(bits)}" for name, n, bits in machines]
    ways = list(dict.fromkeys(way))
    about = "median over runs, bars: range" + (f" · {ways[0]}" if len(ways) == 1 else "")
    figure, (axes,) = style.new_figure(title, about, width=7.2)
    for (family, how), group in groups(runs.assign(way=way), "family", "way"):
        speed = group.groupby("parameters/total")["perf/tokens_per_s"].agg(["median", "min", "max"])
        spread = [speed["median"] - speed["min"], speed["max"] - speed["median"]]
        axes.errorbar(
            speed.index, speed["median"], spread, color=families.color(family),
            marker=families.marker(family), mec="white", capsize=2.5, elinewidth=1.2,
            ls=("-", "--", ":", "-.")[ways.index(how) % 4],
            label=families.label(family) + (f", {how}" if len(ways) > 1 else ""),
        )  # fmt: skip
    style.log_axis(axes, "x", style.margins(runs["parameters/total"], 0.08), fmt.short)
    style.log_axis(axes, "y", style.margins(runs["perf/tokens_per_s"], 0.08), fmt.short)
    axes.set_xlabel("parameters (total)")
    axes.set_ylabel("training tokens per second")
    axes.legend(loc="best")
    return Plot(title, figure)


def subtitle(runs: pd.DataFrame, *more: str) -> str:
    """Data, budget and seeds that every run of the figure shares, or their range."""
    budgets, seeds = runs["tokens"], runs.groupby("model")["seed"].nunique()
    data = runs[["data/name", "data/tokenizer"]].drop_duplicates().agg(", ".join, axis=1)
    tokens = _span(fmt.short(budgets.min()), fmt.short(budgets.max()))
    n_seeds = _span(str(seeds.min()), str(seeds.max()))
    return " · ".join([
        f"data: {'; '.join(data)}",
        f"{tokens} training tokens a run",
        f"{n_seeds} seed{'' if n_seeds == '1' else 's'} a size",
        *more,
    ])  # fmt: skip


def _span(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _loss_axis(axes: Axes, losses: Losses, values: pd.Series, label: bool = True) -> None:
    """A logarithmic loss axis that also holds the xz reference line, where there is one."""
    in_bits = losses.column == "val/bpb"
    xz = losses.runs["data/xz_bpb"].dropna().unique() if in_bits else np.array([])
    style.log_axis(axes, "y", style.margins([*values, *xz]), lambda v: f"{v:.3g}")
    for level in xz:
        axes.axhline(level, color=style.MUTED, ls=":", lw=1.4)
        style.text_at_line(axes, level, f"xz on the same text: {level:.2f}", x=0.01)
    if label:
        axes.set_ylabel(f"validation loss ({losses.unit})")
