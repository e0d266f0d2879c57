"""A search over peak learning rates: what each rate gave, the best, how flat it is around it.

The best rate is the one that `optim=searched` reads from the runs of this suite: of all finished
runs of a model the rate with the lowest final val/loss, averaged over seeds.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes

from analysis import formats as fmt
from analysis import style
from analysis.families import Families
from analysis.plots import subtitle
from analysis.study import NothingToShowError, Study, groups, loss_of, ways_of_training
from analysis.style import Plot
from analysis.table import Column, Table

COLUMNS = 3


def rates_of(runs: pd.DataFrame, loss: str) -> pd.DataFrame:
    """One row a peak rate of a model, ascending: `mean`, `min` and `max` of a loss over seeds, and
    `is_best`."""
    rates = runs.groupby("peak_lr")[loss].agg(["mean", "min", "max"]).reset_index()
    chosen = runs.groupby("peak_lr")["val/loss"].mean().idxmin()
    return rates.assign(is_best=rates["peak_lr"] == chosen)


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
        tried = rates_of(group, loss)
        rates, losses = tried["peak_lr"].to_numpy(float), tried["mean"].to_numpy(float)
        at = int(tried["is_best"].argmax())
        low, high = at == 0, at == len(rates) - 1
        rate, bottom = optimum(rates, losses)
        lost = sorted(set(failed.loc[failed["model"] == model, "peak_lr"]) - set(rates))
        notes = []
        if (low and not any(r < rates[at] for r in lost)) or (
            high and not any(r > rates[at] for r in lost)
        ):
            end = "lowest" if low else "highest"
            notes.append(f"best at the {end} rate tried: try beyond {rates[at]:g}")
        if lost:
            notes.append(f"failed at {', '.join(map(fmt.rate, lost))}")
        rows.append({
            "family": family, "model": model, "parameters/total": total,
            "tokens": group["tokens"].mean(), "n_runs": len(group),
            "tried": " ".join(map(fmt.rate, sorted([*rates, *lost]))),
            "peak_lr": rates[at], "loss": losses[at],
            "lower_by": np.nan if low else losses[at - 1] - losses[at],
            "higher_by": np.nan if high else losses[at + 1] - losses[at],
            "optimum": rate, "optimum_loss": bottom, "note": "; ".join(notes),
        })  # fmt: skip
    columns = [
        Column("model", "model"),
        Column("parameters", "parameters/total", fmt.short),
        Column("tokens", "tokens", fmt.short),
        Column("peak rates tried", "tried"),
        Column("best", "peak_lr", fmt.rate),
        Column(f"val {unit}", "loss", fmt.fixed4),
        Column("next lower", "lower_by", _worse),
        Column("next higher", "higher_by", _worse),
        Column("parabola", _bottom),
        Column("runs", "n_runs"),
        Column("note", "note", fmt.text),
    ]
    notes = [
        "Best: the lowest final val/loss, averaged over seeds; `optim=searched "
        f"optim.from={study.suite}` trains at this rate. Next lower, next higher: how much worse "
        "the neighbours of the best are. Parabola: rate and loss at its bottom, in log rate "
        "through the best and its neighbours. The best of several is a little too good: its loss "
        "is for choosing the rate, not for comparing.",
        *_unequal(study, runs, failed),
    ]
    return Table("Search over peak learning rates", pd.DataFrame(rows), columns, notes)


@rc_context(style.STYLE)
def learning_rates(study: Study) -> Plot:
    """Final validation loss against peak learning rate: a panel a size, the best of each marked."""
    runs, failed = _searched(study)
    loss, unit = loss_of(runs)
    sizes = list(_by_size(study, runs))
    title = f"{study.families.names(runs)}: validation loss against peak learning rate"
    about = subtitle(runs, "rings: best")
    grid = style.new_grid(title, about, len(sizes), COLUMNS, panel_width=3.9, min_width=8.0)
    span = style.margins(runs["peak_lr"], 0.06)
    for axes, group in zip(grid.panels, sizes, strict=True):
        for family, line in groups(group, "family"):
            _draw(axes, rates_of(line, loss), family, study.families)
        style.log_axis(axes, "x", span, fmt.rate)
        style.log_axis(axes, "y", style.margins(group[loss], 0.12), lambda v: f"{v:.3g}")
        of_panel = " / ".join(map(fmt.short, group["parameters/total"].unique()))
        style.title_panel(axes, f"{of_panel} parameters")
    for axes in grid.panels[:: grid.columns]:
        axes.set_ylabel(f"validation loss ({unit})")
    for axes in grid.bottom:
        axes.set_xlabel("peak learning rate")
    lines = [axes.get_legend_handles_labels() for axes in grid.panels]
    by_label = {label: handle for pair in lines for handle, label in zip(*pair, strict=True)}
    place = [*grid.spare, grid.panels[0]][0]
    place.legend(by_label.values(), by_label.keys(), loc="center" if grid.spare else "best")
    notes = ["Each panel has its own scale of losses, a logarithmic one."]
    return Plot(title, grid.figure, [*notes, *_unequal(study, runs, failed)])


def _searched(study: Study) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The runs of models that have more than one peak rate and differ in nothing else but seeds;
    and those of the same models that failed, as too high a rate makes them."""
    runs = study.trained
    runs = runs[runs["peak_lr"].notna()]
    runs = runs[runs.groupby("model")["peak_lr"].transform("nunique") > 1]
    if runs.empty:
        raise NothingToShowError("no model was trained with more than one optim.peak_lr")
    # more variants than rates: something else was varied too
    by_model = runs.assign(way=ways_of_training(runs)).groupby("model")
    mixed = by_model["way"].nunique() > by_model["peak_lr"].nunique()
    if mixed.any():
        names = ", ".join(mixed.index[mixed])
        raise NothingToShowError(f"runs of {names} differ in more than optim.peak_lr and seed")
    failed = study.failed[study.failed["model"].isin(runs["model"])]
    return runs.reset_index(drop=True), failed.dropna(subset=["peak_lr", "budget_tokens"])


def _by_size(study: Study, runs: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Each matched pair, and each model that has no partner, the smallest first."""
    leaders = {partner: model for model, partner in study.partners(runs).items()}
    leader = runs["model"].map(leaders).fillna(runs["model"])
    size = runs["parameters/total"].groupby(leader).transform("min")
    for _, group in groups(runs.assign(size=size, leader=leader).sort_values("size"), "leader"):
        yield group.sort_values(["family", "peak_lr"], ascending=[False, True])


def _unequal(study: Study, runs: pd.DataFrame, failed: pd.DataFrame) -> list[str]:
    """A line for each pair whose sides were not searched alike: rates, tokens and seeds."""
    keys = ["model", "peak_lr", "budget_tokens", "seed"]
    searches = {
        model: set(group[keys[1:]].itertuples(index=False, name=None))
        for model, group in groups(pd.concat([runs[keys], failed[keys]]), "model")
    }
    notes, pairs = [], study.partners(runs)
    for model, partner in pairs.items():
        for one, other in ((model, partner), (partner, model)):
            if extra := sorted(searches[one] - searches[other]):
                said = ", ".join(
                    f"{rate:g} ({fmt.short(n)} tokens, seed {seed:.0f})" for rate, n, seed in extra
                )
                notes.append(f"NOT AN EQUAL SEARCH: {one} was tried at {said}, {other} was not.")
    if alone := sorted(set(searches) - set(pairs) - set(pairs.values())):
        notes.append(f"Without a matched model that was searched too: {', '.join(alone)}.")
    return notes or ["Both models of each pair: the same rates, tokens and seeds."]


def _draw(axes: Axes, rates: pd.DataFrame, family: str, families: Families) -> None:
    style.shaded_line(
        axes, rates, "peak_lr", color=families.color(family), marker=families.marker(family),
        mec="white", label=families.label(family),
    )  # fmt: skip
    best = rates[rates["is_best"]]
    axes.plot(best["peak_lr"], best["mean"], **style.RING, ls="", ms=12, zorder=4)


def _worse(x: float) -> str:
    return fmt.fixed(x, 4, "+")


def _bottom(row: pd.Series) -> str:
    rate, loss = row["optimum"], row["optimum_loss"]
    return f"{rate:.2g}: {loss:.4f}" if np.isfinite(rate) else fmt.MISSING
