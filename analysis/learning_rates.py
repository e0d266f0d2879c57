"""A search over peak learning rates: what each rate gave, the best, how flat it is around it."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes

from analysis import formats as fmt
from analysis import style
from analysis.plots import Plot, family_names, subtitle
from analysis.runs import CONDITIONS
from analysis.scaling import partners
from analysis.study import NothingToShowError, Study, groups, loss_of
from analysis.table import Column, Table, cell

COLUMNS = 3


def optimum(rates: npt.ArrayLike, losses: npt.ArrayLike) -> tuple[float, float]:
    """Rate and loss at the bottom of the parabola, in log rate, through the lowest loss and its
    two neighbours (rates ascending); NaN when the lowest is at an end or the three are equal."""
    rates, losses = np.asarray(rates, float), np.asarray(losses, float)
    best = int(losses.argmin())
    if best in (0, len(losses) - 1):
        return np.nan, np.nan
    three = slice(best - 1, best + 2)
    u = np.log(rates[three] / rates[best])
    curve, slope, at_best = np.polyfit(u, losses[three], 2)
    if curve <= 0:
        return np.nan, np.nan
    bottom = -slope / (2 * curve)
    return float(rates[best] * np.exp(bottom)), float(at_best + slope * bottom / 2)


def learning_rate_search(study: Study) -> Table:
    """The best peak learning rate of each model, its loss, how much worse its neighbours are, where
    a parabola has its bottom, and whether both sides of a pair were searched alike."""
    runs, failed = _searched(study)
    loss, unit = loss_of(runs)
    rows = []
    for (family, model, total), group in groups(runs, "family", "model", "parameters/total"):
        tried = group.groupby("peak_lr")[loss].mean()
        rates, losses = tried.index.to_numpy(float), tried.to_numpy(float)
        at = int(losses.argmin())
        low, high = at == 0, at == len(rates) - 1
        rate, bottom = optimum(rates, losses)
        lost = sorted(set(failed.loc[failed["model"] == model, "peak_lr"]) - set(rates))
        beyond = [r for r in lost if (low and r < rates[at]) or (high and r > rates[at])]
        rows.append({
            "family": family, "model": model, "parameters/total": total,
            "tokens": group["tokens"].mean(), "n_runs": len(group),
            "tried": " ".join(f"{r:g}" for r in sorted([*rates, *lost])),
            "peak_lr": rates[at], "loss": losses[at],
            "lower_by": np.nan if low else losses[at - 1] - losses[at],
            "higher_by": np.nan if high else losses[at + 1] - losses[at],
            "optimum": rate, "optimum_loss": bottom,
            "note": "; ".join([*_edge((low or high) and not beyond, low, rates[at]), *_lost(lost)]),
        })  # fmt: skip
    columns: list[Column] = [
        ("model", cell("model")),
        ("parameters", cell("parameters/total", fmt.short)),
        ("tokens", cell("tokens", fmt.short)),
        ("peak rates tried", cell("tried")),
        ("best", cell("peak_lr", lambda x: f"{x:g}")),
        (f"val {unit}", cell("loss", lambda x: fmt.fixed(x, 4))),
        ("next lower", cell("lower_by", _worse)),
        ("next higher", cell("higher_by", _worse)),
        ("parabola", lambda r: _bottom(r["optimum"], r["optimum_loss"])),
        ("runs", cell("n_runs")),
        ("note", lambda r: r["note"] or fmt.MISSING),
    ]
    notes = [
        "Next lower, next higher: how much worse the neighbours of the best are. Parabola: rate "
        "and loss at its bottom, in log rate through the best and its neighbours. The best of "
        "several is a little too good: its loss is for choosing the rate, not for comparing.",
        *_unequal(runs, failed),
    ]
    return Table("Search over peak learning rates", pd.DataFrame(rows), columns, notes)


@rc_context(style.STYLE)
def learning_rates(study: Study) -> Plot:
    """Final validation loss against peak learning rate: a panel a size, the best of each marked."""
    runs, failed = _searched(study)
    loss, unit = loss_of(runs)
    panels_of = list(_by_size(runs))
    columns = min(COLUMNS, len(panels_of))
    rows = -(-len(panels_of) // columns)
    title = f"{family_names(runs)}: validation loss against peak learning rate"
    about = subtitle(runs, "rings: best")
    width, height = max(8.0, 1.0 + 3.6 * columns), 0.9 + 3.0 * rows
    figure, panels = style.new_figure(title, about, rows, columns, width, height)
    span = style.margins(runs["peak_lr"], 0.06)
    for place, (axes, group) in enumerate(zip(panels, panels_of, strict=False)):
        for family, line in groups(group, "family"):
            _draw(axes, line, family, loss)
        style.log_axis(axes, "x", *span, lambda v: f"{v:g}")
        style.log_axis(axes, "y", *style.margins(group[loss], 0.12), lambda v: f"{v:.3g}")
        sizes = " / ".join(map(fmt.short, group["parameters/total"].unique()))
        axes.set_title(f"{sizes} parameters", size=10.5, loc="left", color=style.INK)
        if place % columns == 0:
            axes.set_ylabel(f"validation loss ({unit})")
        if place + columns >= len(panels_of):
            axes.set_xlabel("peak learning rate")
    for axes in panels[len(panels_of) :]:
        axes.set_axis_off()
    _legend(panels, len(panels_of))
    notes = ["Each panel has its own scale of losses, a logarithmic one.", *_unequal(runs, failed)]
    return Plot(title, figure, notes)


def _searched(study: Study) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The runs of models that have more than one peak rate and differ in nothing else but seeds;
    and those of the same models that failed, as too high a rate makes them."""
    runs = study.trained
    runs = runs[runs["peak_lr"].notna()]
    runs = runs[runs.groupby("model")["peak_lr"].transform("nunique") > 1]
    if runs.empty:
        raise NothingToShowError("no model was trained with more than one optim.peak_lr")
    # more variants than rates: something else was varied too
    ways = runs[["variant", *CONDITIONS]].fillna("").agg(tuple, axis=1)
    by_model = runs.assign(way=ways).groupby("model")
    mixed = by_model["way"].nunique() > by_model["peak_lr"].nunique()
    if mixed.any():
        names = ", ".join(mixed.index[mixed])
        raise NothingToShowError(f"runs of {names} differ in more than optim.peak_lr and seed")
    failed = study.failed[study.failed["model"].isin(runs["model"])]
    return runs.reset_index(drop=True), failed.dropna(subset=["peak_lr", "budget_tokens"])


def _by_size(runs: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Each matched pair, and each model that has no partner, the smallest first."""
    of = partners(runs)
    leader = runs["model"].map({theirs: mine for mine, theirs in of.items()}).fillna(runs["model"])
    size = runs["parameters/total"].groupby(leader).transform("min")
    for _, group in groups(runs.assign(size=size, leader=leader).sort_values("size"), "leader"):
        yield group.sort_values(["family", "peak_lr"], ascending=[False, True])


def _unequal(runs: pd.DataFrame, failed: pd.DataFrame) -> list[str]:
    """A line for each pair whose sides were not searched alike: rates, tokens and seeds."""
    keys = ["model", "peak_lr", "budget_tokens", "seed"]
    searches = {
        model: set(group[keys[1:]].itertuples(index=False, name=None))
        for model, group in groups(pd.concat([runs[keys], failed[keys]]), "model")
    }
    notes = []
    for model, partner in partners(runs).items():
        for one, other in ((model, partner), (partner, model)):
            extra = sorted(searches[one] - searches[other])
            if extra:
                told = ", ".join(
                    f"{rate:g} ({fmt.short(n)} tokens, seed {seed:.0f})" for rate, n, seed in extra
                )
                notes.append(f"NOT AN EQUAL SEARCH: {one} was tried at {told}, {other} was not.")
    searched, of = set(searches), partners(runs)
    alone = sorted(searched - set(of) - set(of.values()))
    if alone:
        notes.append(f"Without a matched model that was searched too: {', '.join(alone)}.")
    return notes or ["Both models of each pair: the same rates, tokens and seeds."]


def _draw(axes: Axes, line: pd.DataFrame, family: str, loss: str) -> None:
    color, point = fmt.family_color(family), style.marker(family)
    of_rate = line.groupby("peak_lr")[loss].agg(["mean", "min", "max"])
    label = fmt.family_name(family)
    axes.plot(of_rate.index, of_rate["mean"], color=color, marker=point, mec="white", label=label)
    if (of_rate["max"] > of_rate["min"]).any():
        axes.fill_between(
            of_rate.index, of_rate["min"], of_rate["max"], color=color, alpha=0.2, lw=0
        )
    best = of_rate[of_rate["mean"] == of_rate["mean"].min()]
    axes.plot(best.index, best["mean"], "o", mfc="none", mec=style.INK, ms=12, mew=1.4, zorder=4)


def _legend(panels: list[Axes], n: int) -> None:
    """In the empty place of the grid if there is one, else in the first panel."""
    found = dict(
        pair[::-1]
        for axes in panels[:n]
        for pair in zip(*axes.get_legend_handles_labels(), strict=True)
    )
    place = panels[n] if n < len(panels) else panels[0]
    place.legend(found.values(), found.keys(), loc="center" if n < len(panels) else "best")


def _edge(at_end: bool, low: bool, best: float) -> list[str]:
    end = "lowest" if low else "highest"
    return [f"best at the {end} rate tried: try beyond {best:g}"] * at_end


def _lost(rates: list[float]) -> list[str]:
    return [f"failed at {', '.join(f'{rate:g}' for rate in rates)}"] * bool(rates)


def _worse(x: float) -> str:
    return f"{x:+.4f}" if np.isfinite(x) else fmt.MISSING


def _bottom(rate: float, loss: float) -> str:
    return f"{rate:.2g}: {loss:.4f}" if np.isfinite(rate) else fmt.MISSING
