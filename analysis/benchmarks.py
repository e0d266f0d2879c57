"""Zero-shot scores: one table, and figures against parameters and training FLOPs."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes

from analysis import formats as fmt
from analysis import style
from analysis.evaluations import SHARES
from analysis.plots import Plot, family_names
from analysis.published import load_published, published_lines
from analysis.study import (
    NothingToShowError,
    Study,
    best_variants,
    groups,
    mean_scores,
    protocol_columns,
)
from analysis.table import Column, Table, cell

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
THEIRS = "; thin grey: published"
NEAR = 3.0  # published sizes are drawn up to this factor beyond ours
X_AXES: dict[str, tuple[str, str, str, Callable[[float], str]]] = {
    # of published rows, on the axis, in the title, ticks
    "parameters/total": ("parameters", "parameters (total)", "parameters", fmt.short),
    "flops": ("flops", "training FLOPs", "training FLOPs", style.power_of_ten),
}


def benchmark_scores(study: Study) -> Table:
    """Zero-shot scores per task, metric and model, averaged over seeds."""
    frame, notes = _scores(study)
    frame["protocol"], shared = _protocols(frame)
    columns: list[Column] = [
        ("task", cell("task")),
        ("metric", lambda r: r["metric"].removesuffix(",none")),
        ("model", cell("model")),
        ("parameters", cell("parameters/total", fmt.short)),
        ("score ± s.e.", lambda r: fmt.fixed(r["score"], 4) + _plus_minus(r["stderr"])),
        ("s.d. of seeds", cell("seed_sd", lambda x: fmt.fixed(x, 4))),
        ("runs", cell("n_runs")),
        ("chance", cell("chance", lambda x: fmt.fixed(x, 2))),
        ("docs", lambda r: fmt.documents(r["n_documents"], r["subset"])),
        ("weights", cell("weights")),
        ("protocol", cell("protocol")),
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
    return Table("Zero-shot benchmarks", frame, columns, notes)


def benchmarks_by_parameters(study: Study) -> Plot:
    """The headline metric of every task against total parameters."""
    return _by_task(study, "parameters/total")


def benchmarks_by_flops(study: Study) -> Plot:
    """The headline metric of every task against training FLOPs."""
    return _by_task(study, "flops")


@rc_context(style.STYLE)
def benchmarks_mean(study: Study) -> Plot:
    """The mean over the tasks that all models have, against parameters and training FLOPs."""
    frame, notes = _headlines(study)
    frame["metric"] = frame["metric"].str.removesuffix(",none")
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
    xs = [x for x in X_AXES if means[x].notna().any()]
    drawn = {x: _near(means, x, metrics, len(tasks)) for x in xs}
    others = pd.concat([lines for lines, _, _ in drawn.values()])
    title = f"{family_names(means)}: mean accuracy over {len(tasks)} zero-shot tasks"
    about = "bars: one standard error over documents" + (THEIRS if len(others) else "")
    figure, panels = style.new_figure(title, about, columns=len(xs), width=1 + 4.6 * len(xs))
    for axes, (x, limits) in zip(panels, drawn.items(), strict=True):
        _our_lines(axes, means, x)
        _their_lines(axes, x, *limits)
        axes.set_xlabel(X_AXES[x][1])
    panels[0].set_ylabel("mean accuracy")
    panels[0].legend(loc="upper left")
    notes.append(f"Unweighted mean over {', '.join(_told(t, metrics[t]) for t in tasks)}.")
    if left:
        notes.append(f"Without tasks that not all models have: {', '.join(left)}.")
    if others.empty:
        notes.append("No published family near these sizes has all of these tasks and metrics.")
    return Plot(title, figure, [*notes, *_unknown_flops(means), *_sources(others, metrics)])


@rc_context(style.STYLE)
def _by_task(study: Study, x: str) -> Plot:
    frame, notes = _headlines(study)
    frame["metric"] = frame["metric"].str.removesuffix(",none")
    known = frame[frame[x].notna()]
    if known.empty:
        raise NothingToShowError("the tokens that converted models were trained on are not known")
    metrics = dict(zip(known["task"], known["metric"], strict=True))
    others, low, high = _near(known, x, metrics)
    tasks = _ordered(known["task"])
    columns = min(len(tasks), 4 if len(tasks) > 4 else 3)
    rows = -(-len(tasks) // columns)
    title = f"{family_names(known)}: zero-shot benchmarks against {X_AXES[x][2]}"
    about = "mean over seeds; bars: one standard error over documents; dashed: chance"
    about += THEIRS if len(others) else ""
    figure, panels = style.new_figure(
        title, about, rows, columns, width=max(6.4, 3.4 * columns), height=0.9 + 3.0 * rows
    )
    for place, (axes, task) in enumerate(zip(panels, tasks, strict=False)):
        group = known[known["task"] == task]
        _our_lines(axes, group, x)
        chance = group["chance"].iloc[0]
        if np.isfinite(chance):
            axes.axhline(chance, color=style.MUTED, ls="--", lw=1.2)
        _their_lines(axes, x, others[others["task"] == task], low, high)
        axes.set_title(TASKS.get(task, task), size=10.5, loc="left", color=style.INK)
        axes.set_ylabel(metrics[task].replace("_", " "))
        if place + columns >= len(tasks):
            axes.set_xlabel(X_AXES[x][1])
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    if columns == 4:  # room beside the title
        figure.legend(*panels[0].get_legend_handles_labels(), loc="upper right", ncols=4)
    else:
        panels[0].legend(loc="best")
    return Plot(title, figure, [*notes, *_unknown_flops(frame), *_sources(others, metrics)])


def _scores(study: Study) -> tuple[pd.DataFrame, list[str]]:
    if study.scores.empty:
        raise NothingToShowError("no run has eval/*.json; run experiments.evaluate first")
    kept, notes = best_variants(study.runs)
    return mean_scores(study.scores[study.scores["run"].isin(kept["run"])]), notes


def _headlines(study: Study) -> tuple[pd.DataFrame, list[str]]:
    """Mean scores of the metric that stands for a task, with `flops` of each model's training."""
    frame, notes = _scores(study)
    flops = study.runs.groupby("model")["flops"].mean()
    frame = frame[frame["headline"]].reset_index(drop=True)
    return frame.assign(flops=frame["model"].map(flops)), notes


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


def _our_lines(axes: Axes, frame: pd.DataFrame, x: str) -> None:
    for family, line in groups(frame, "family"):
        line = line.sort_values(x)
        axes.errorbar(
            line[x],
            line["score"],
            line["stderr"].fillna(0),
            color=fmt.family_color(family),
            marker=style.marker(family),
            mec="white",
            capsize=2.5,
            elinewidth=1.2,
            label=fmt.family_name(family),
            zorder=3,
        )


def _near(
    frame: pd.DataFrame, x: str, metrics: dict[str, str], mean_of: int = 0
) -> tuple[pd.DataFrame, float, float]:
    """The published lines about as large as ours, and limits of an axis that holds all; with
    `mean_of`, of the sizes that have so many tasks the mean over them."""
    low, high = style.margins(frame[x].dropna(), 0.08)
    key = X_AXES[x][0]
    others = published_lines(key, low / NEAR, high * NEAR, metrics)
    if mean_of:
        of_size = others.groupby(["family", key], sort=False)["value"]
        others = of_size.mean()[of_size.size() == mean_of].reset_index()
    if len(others):
        low, high = min(low, others[key].min() / 1.2), max(high, others[key].max() * 1.2)
        high *= (high / low) ** 0.25  # room for the labels
    return others, low, high


def _their_lines(axes: Axes, x: str, frame: pd.DataFrame, low: float, high: float) -> None:
    """Published families as thin lines, named at their ends."""
    key, write = X_AXES[x][0], X_AXES[x][3]
    ends = []
    for family, line in groups(frame, "family"):
        axes.plot(line[key], line["value"], ".-", color=style.FAINT, lw=1, ms=3, zorder=2)
        ends.append((float(line["value"].iloc[-1]), float(line[key].iloc[-1]), str(family)))
    style.log_axis(axes, "x", low, high, write, fewest=3)
    style.labels_at_ends(axes, ends)


def _unknown_flops(frame: pd.DataFrame) -> list[str]:
    without = sorted(frame.loc[frame["flops"].isna(), "model"].unique())
    return [f"Training tokens, so FLOPs, not known: {', '.join(without)}."] if without else []


def _sources(drawn: pd.DataFrame, metrics: dict[str, str]) -> list[str]:
    if drawn.empty:
        return []
    families = set(drawn["family"])
    frame = load_published()
    frame = frame[frame["family"].isin(families) & (frame["task"].map(metrics) == frame["metric"])]
    sources = sorted({source.split(",")[0].split(": evals")[0] for source in frame["source"]})
    notes = [
        "Published: the same task and metric, not always the same prompts and prefix; from "
        f"{'; '.join(sources)}. Sizes whose training tokens are not known have no FLOPs. FLOPs of "
        "all lines: matrix products and mixing over time, forward and backward."
    ]
    if "RWKV-4" in families:
        notes.append("The paper's RWKV-4 3B and 14B were tuned at contexts of 4096 and 8192.")
    return notes


def _told(task: str, metric: str) -> str:
    return f"{TASKS.get(task, task)} ({metric})"


def _protocols(frame: pd.DataFrame) -> tuple[list[str], str]:
    """How each row was scored, and what all rows share besides, in words."""
    columns = {c.removeprefix("protocol/"): frame[c] for c in protocol_columns(frame)}
    by_metric = frame.groupby(["task", "metric"])
    mixed = [k for k in columns if (by_metric[f"protocol/{k}"].nunique() > 1).any()]
    told = PROTOCOL_SAID | {k: f"{k} {{}}" for k in mixed if k not in PROTOCOL_SAID}
    own, shared = [], []
    for key, write in told.items():
        if key not in columns:
            continue
        texts = columns[key].map(lambda v, write=write: "" if v == fmt.MISSING else write.format(v))
        if key in PROTOCOL_OF_A_ROW or texts.nunique() > 1:
            own.append(texts)
        elif texts.iloc[0]:
            shared.append(texts.iloc[0])
    rows = [", ".join(filter(None, row)) for row in zip(*own, strict=True)]
    return rows, ", ".join(shared)


def _plus_minus(stderr: float) -> str:
    return f" ± {stderr:.4f}" if np.isfinite(stderr) else ""
