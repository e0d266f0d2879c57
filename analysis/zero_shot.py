"""Zero-shot scores: one table, and figures against parameters and training FLOPs."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes

from analysis import formats as fmt
from analysis import style
from analysis.evaluations import SHARES
from analysis.families import Families
from analysis.published import load_published, published_lines, published_notes
from analysis.study import NothingToShowError, Study, groups, mean_scores, protocol_columns
from analysis.style import Plot
from analysis.table import Column, Table

# the paper's order; other tasks come after these
TASKS = {
    "arc_challenge": "ARC-Challenge", "arc_easy": "ARC-Easy", "boolq": "BoolQ", "copa": "COPA",
    "headqa_en": "HeadQA", "hellaswag": "HellaSwag", "lambada_openai": "LAMBADA",
    "openbookqa": "OpenBookQA", "piqa": "PIQA", "record": "ReCoRD", "sciq": "SciQ",
    "winogrande": "WinoGrande",
}  # fmt: skip
PROTOCOL_SAID = {
    "n_shot": "{}-shot",
    "checkpoint": "{} checkpoint",
    "version": "v{}",
    "dtype": "{}",
    "prefix": "prefix {}",
    "rolling_ctx": "window {}",
    "limit": "limit {}",
    "pack": "pack {:.8}",
    "lm_eval": "lm-eval {}",
}
PROTOCOL_OF_A_ROW = ("n_shot", "checkpoint", "version")
PUBLISHED_SAID = "; thin grey: published"
NEAR = 3.0  # published sizes are drawn up to this factor beyond ours


@dataclass(frozen=True)
class XAxis:
    """What scores are drawn against.

    Attributes:
        key, published: the column of our models, and of the published ones.
        label, title: its name on the axis and in a title.
        write: how ticks are written.
    """

    key: str
    published: str
    label: str
    title: str
    write: Callable[[float], str]


PARAMETERS = XAxis("parameters/total", "parameters", "parameters (total)", "parameters", fmt.short)
FLOPS = XAxis("flops", "flops", "training FLOPs", "training FLOPs", fmt.power_of_ten)


def zero_shot_scores(study: Study) -> Table:
    """Zero-shot scores per task, metric and model, averaged over seeds."""
    _, scores, notes = study.scored()
    frame = mean_scores(scores)
    frame["protocol"], shared = _protocols(frame)
    columns = [
        Column("task", "task"),
        Column("metric", lambda r: r["metric"].removesuffix(",none")),
        Column("model", "model"),
        Column("parameters", "parameters/total", fmt.short),
        Column("score ± s.e.", lambda r: fmt.plus_minus(r["score"], r["stderr"], fmt.fixed4)),
        Column("s.d. of seeds", "seed_sd", fmt.fixed4),
        Column("runs", "n_runs"),
        Column("chance", "chance", lambda x: fmt.fixed(x, 2)),
        Column("docs", lambda r: fmt.documents(r["n_documents"], r["subset"])),
        Column("weights", "weights"),
        Column("protocol", "protocol"),
    ]
    notes.append(
        "Score: mean over seeds; s.e.: over documents, of one run. All seeds see the same "
        "documents, so more seeds do not shrink it. The figures draw the first metric of a task. "
        "Weights: the first digits of their hash, of each run. Scores are of the checkpoint named "
        "under protocol; tables of losses are of the last step."
    )
    if frame["subset"].eq(True).any():
        notes.append("Subset: fewer documents than the official split; not a published score.")
    if shared:
        notes.append(f"All rows: {shared}.")
    return Table("Zero-shot scores", frame, columns, notes)


def zero_shot_by_parameters(study: Study) -> Plot:
    """The headline metric of every task against total parameters."""
    return _by_task(study, PARAMETERS)


def zero_shot_by_flops(study: Study) -> Plot:
    """The headline metric of every task against training FLOPs."""
    return _by_task(study, FLOPS)


@rc_context(style.STYLE)
def zero_shot_mean(study: Study) -> Plot:
    """The mean over the tasks that all models have, against parameters and training FLOPs."""
    frame, notes = _headlines(study)
    frame = frame[frame["metric"].isin(SHARES)]
    if frame.duplicated(["model", "task"]).any():
        raise NothingToShowError("a model has scores of one task under different protocols")
    n_models = frame["model"].nunique()
    n_of = frame.groupby("task")["model"].transform("size")
    left = _ordered(frame.loc[n_of < n_models, "task"])
    frame = frame[n_of == n_models]
    tasks = _ordered(frame["task"])
    if len(tasks) < 2:
        raise NothingToShowError("fewer than two tasks of accuracy that all scored models have")
    means = _mean_over_tasks(frame)
    metrics = dict(zip(frame["task"], frame["metric"], strict=True))
    xs = [x for x in (PARAMETERS, FLOPS) if means[x.key].notna().any()]
    near = [_neighbours(means, x, metrics, mean_of=len(tasks)) for x in xs]
    published = pd.concat([lines for lines, _ in near])
    title = f"{study.families.names(means)}: mean accuracy over {len(tasks)} zero-shot tasks"
    about = "bars: one standard error over documents" + PUBLISHED_SAID * (len(published) > 0)
    figure, panels = style.new_figure(title, about, columns=len(xs), width=1 + 4.6 * len(xs))
    for axes, x, (lines, limits) in zip(panels, xs, near, strict=True):
        _our_lines(axes, means, x, study.families)
        _published_lines(axes, x, lines, limits)
        axes.set_xlabel(x.label)
    panels[0].set_ylabel("mean accuracy")
    panels[0].legend(loc="upper left")
    said = [f"{TASKS.get(task, task)} ({metrics[task]})" for task in tasks]
    notes.append(f"Unweighted mean over {', '.join(said)}.")
    if left:
        notes.append(f"Without tasks that not all models have: {', '.join(left)}.")
    if published.empty:
        notes.append("No published family near these sizes has all of these tasks and metrics.")
    return Plot(title, figure, [*notes, *_unknown_flops(means), *_sources(published, metrics)])


@rc_context(style.STYLE)
def _by_task(study: Study, x: XAxis) -> Plot:
    frame, notes = _headlines(study)
    known = frame[frame[x.key].notna()]
    if known.empty:
        raise NothingToShowError("the tokens that converted models were trained on are not known")
    metrics = dict(zip(known["task"], known["metric"], strict=True))
    published, limits = _neighbours(known, x, metrics)
    tasks = _ordered(known["task"])
    title = f"{study.families.names(known)}: zero-shot scores against {x.title}"
    about = "mean over seeds; bars: one standard error over documents; dashed: chance"
    about += PUBLISHED_SAID * (len(published) > 0)
    grid = style.new_grid(
        title, about, len(tasks), columns=4 if len(tasks) > 4 else 3, panel_width=3.4, min_width=6.4
    )
    for axes, task in zip(grid.panels, tasks, strict=True):
        group = known[known["task"] == task]
        _our_lines(axes, group, x, study.families)
        chance = group["chance"].iloc[0]
        if np.isfinite(chance):
            axes.axhline(chance, color=style.MUTED, ls="--", lw=1.2)
        _published_lines(axes, x, published[published["task"] == task], limits)
        style.title_panel(axes, TASKS.get(task, task))
        axes.set_ylabel(metrics[task].replace("_", " "))
    for axes in grid.bottom:
        axes.set_xlabel(x.label)
    first = grid.panels[0]
    if grid.columns == 4:  # room beside the title
        grid.figure.legend(*first.get_legend_handles_labels(), loc="upper right", ncols=4)
    else:
        first.legend(loc="best")
    notes += [*_unknown_flops(frame), *_sources(published, metrics)]
    return Plot(title, grid.figure, notes)


def _headlines(study: Study) -> tuple[pd.DataFrame, list[str]]:
    """Mean scores of the metric that stands for a task, with `flops` of each model's training."""
    _, scores, notes = study.scored()
    frame = mean_scores(scores[scores["headline"]])
    flops = study.runs.groupby("model")["flops"].mean()
    metric = frame["metric"].str.removesuffix(",none")
    return frame.assign(flops=frame["model"].map(flops), metric=metric), notes


def _ordered(tasks: pd.Series) -> list[str]:
    found = set(tasks)
    return [t for t in TASKS if t in found] + sorted(found - set(TASKS))


def _mean_over_tasks(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a model: errors of tasks are independent, for their documents are different."""
    keys = ["family", "model", "parameters/total"]
    by_model = frame.groupby(keys, sort=False)
    means = by_model[["score", "flops"]].mean()
    means["stderr"] = by_model["stderr"].agg(lambda s: np.sqrt((s**2).sum(skipna=False)) / len(s))
    return means.reset_index()


def _neighbours(
    frame: pd.DataFrame, x: XAxis, metrics: dict[str, str], mean_of: int = 0
) -> tuple[pd.DataFrame, tuple[float, float]]:
    """Published lines about as large as ours, and limits of an axis that holds all; with `mean_of`,
    of the sizes that have so many tasks the mean over them."""
    low, high = style.margins(frame[x.key].dropna(), 0.08)
    lines = published_lines(x.published, low / NEAR, high * NEAR, metrics)
    if mean_of:
        of_size = lines.groupby(["family", x.published], sort=False)["value"]
        lines = of_size.mean()[of_size.size() == mean_of].reset_index()
    if len(lines):
        sizes = lines[x.published]
        low, high = min(low, sizes.min() / 1.2), max(high, sizes.max() * 1.2)
        high *= (high / low) ** 0.25  # room for the labels
    return lines, (low, high)


def _our_lines(axes: Axes, frame: pd.DataFrame, x: XAxis, families: Families) -> None:
    for family, line in groups(frame, "family"):
        line = line.sort_values(x.key)
        axes.errorbar(
            line[x.key], line["score"], line["stderr"].fillna(0), color=families.color(family),
            marker=families.marker(family), mec="white", capsize=2.5, elinewidth=1.2, zorder=3,
            label=families.label(family),
        )  # fmt: skip


def _published_lines(
    axes: Axes, x: XAxis, frame: pd.DataFrame, limits: tuple[float, float]
) -> None:
    """Published families as thin lines, named at their ends."""
    ends = []
    for family, line in groups(frame, "family"):
        at = line[x.published]
        axes.plot(at, line["value"], ".-", color=style.FAINT, lw=1, ms=3, zorder=2)
        ends.append((float(line["value"].iloc[-1]), float(at.iloc[-1]), str(family)))
    style.log_axis(axes, "x", limits, x.write, fewest=3)
    style.labels_at_ends(axes, ends)


def _unknown_flops(frame: pd.DataFrame) -> list[str]:
    without = sorted(frame.loc[frame["flops"].isna(), "model"].unique())
    return [f"Training tokens, so FLOPs, not known: {', '.join(without)}."] if without else []


def _sources(drawn: pd.DataFrame, metrics: dict[str, str]) -> list[str]:
    if drawn.empty:
        return []
    frame = load_published()
    frame = frame[frame["family"].isin(drawn["family"])]
    frame = frame[frame["task"].map(metrics) == frame["metric"]]
    sources = sorted({source.split(",")[0].split(": evals")[0] for source in frame["source"]})
    return [
        "Published: the same task and metric, not always the same prompts and prefix; from "
        f"{'; '.join(sources)}. Sizes whose training tokens are not known have no FLOPs. FLOPs of "
        "all lines: matrix products and mixing over time, forward and backward.",
        *published_notes(drawn),
    ]


def _protocols(frame: pd.DataFrame) -> tuple[list[str], str]:
    """How each row was scored, and what all rows share besides, in words."""
    columns = {c.removeprefix("protocol/"): frame[c] for c in protocol_columns(frame)}
    by_metric = frame.groupby(["task", "metric"])
    mixed = [k for k in columns if (by_metric[f"protocol/{k}"].nunique() > 1).any()]
    said = {f"{k}": f"{k} {{}}" for k in mixed} | PROTOCOL_SAID
    of_row, shared = [], []
    for key in [*PROTOCOL_SAID, *(k for k in mixed if k not in PROTOCOL_SAID)]:
        if key not in columns:
            continue
        write = said[key].format
        texts = [write(value) if value != fmt.MISSING else "" for value in columns[key]]
        if key in PROTOCOL_OF_A_ROW or len(set(texts)) > 1:
            of_row.append(texts)
        elif texts[0]:
            shared.append(texts[0])
    rows = [", ".join(filter(None, row)) for row in zip(*of_row, strict=True)]
    return rows, ", ".join(shared)
