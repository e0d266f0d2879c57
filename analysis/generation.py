"""What generating text costs at a context length: a table and a figure of bench/generate.json."""

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes

from analysis import formats as fmt
from analysis import style
from analysis.evaluations import COSTS, GENERATION_PROTOCOL, PEAK
from analysis.matching import TOLERANCE_SAID
from analysis.study import NothingToShowError, Study, best_variants, groups
from analysis.style import Plot
from analysis.table import Column, Table

N_LENGTHS = 4
CROSSED = ("decode_s", "state_bytes")


def generation_cost(study: Study) -> Table:
    """Prefill and decode speed and state bytes at a few lengths, and from where on a model beats
    its match in the reference family."""
    costs, label = mean_generation(study), study.families.reference_label
    lengths = sorted(costs["n_tokens"].unique())
    chosen = np.unique(np.linspace(0, len(lengths) - 1, N_LENGTHS).round().astype(int))
    lengths = [lengths[i] for i in chosen]
    crossings = _crossings(study, costs).set_index("model")
    rows = []
    for (family, model, total), line in groups(costs, "family", "model", "parameters/total"):
        row = {"family": family, "model": model, "parameters/total": total}
        at = line.set_index("n_tokens").reindex(lengths)
        for n in lengths:
            row[f"prefill_tokens_per_s@{n}"] = n / at.loc[n, "prefill_s"]
            row |= {f"{key}@{n}": at.loc[n, key] for key in ("decode_s", "state_bytes", PEAK)}
        crossed = crossings.reindex([model]).iloc[0]
        row["reference"] = crossed["reference"]
        row |= {f"cheaper_{key}": crossed[key] for key in CROSSED}
        rows.append(row)
    first, last = lengths[0], lengths[-1]
    ends = list(dict.fromkeys((first, last)))
    columns = [
        Column("model", "model"),
        Column("parameters", "parameters/total", fmt.short),
        *(Column(f"prefill tokens/s, {n}", f"prefill_tokens_per_s@{n}", fmt.short) for n in ends),
        *(Column(f"decode ms/token, {n}", f"decode_s@{n}", _milliseconds) for n in lengths),
        *(Column(f"state, {n}", f"state_bytes@{n}", fmt.size_bytes) for n in ends),
        Column(
            f"decodes faster than its {label}", "cheaper_decode_s", lambda n: _since(n, first, last)
        ),
        Column("smaller state", "cheaper_state_bytes", lambda n: _since(n, first, last)),
    ]
    notes = [
        "At a context of that many tokens: prefill reads it, in chunks; decode is one token more. "
        "State: bytes of recurrent state or KV cache, computed; the figure marks the measured peak "
        f"too. Its {label}: the nearest, {TOLERANCE_SAID}.",
        f"Median over repeats and runs, measured with {_protocol(study)}. Lengths may exceed the "
        f"context that a model was trained at: the cost there is right, its text may not be.",
    ]
    return Table("Generation cost", pd.DataFrame(rows), columns, notes)


@rc_context(style.STYLE)
def generation(study: Study) -> Plot:
    """Prefill seconds, decode time per token and bytes of state or cache, against the length."""
    costs, families = mean_generation(study), study.families
    costs["decode_ms"] = costs["decode_s"] * 1000
    crossings = _crossings(study, costs)
    title = f"{families.names(costs)}: cost of generating text"
    measured = costs[PEAK].fillna(0) > 0
    about = f"{_protocol(study)} · rings: from there on below its matched "
    about += families.reference_label + " · hollow: measured peak" * bool(measured.any())
    figure, panels = style.new_figure(title, about, columns=3, width=13.5)
    of_panel = (
        ("prefill_s", "time to read the context (s)", _plain, None),
        ("decode_ms", "time of one more token (ms)", _plain, "decode_s"),
        ("state_bytes", "recurrent state or KV cache", fmt.size_bytes, "state_bytes"),
    )
    for axes, (key, name, write, crossed) in zip(panels, of_panel, strict=True):
        shown = costs[costs[key] > 0]
        for (family, model, total), line in groups(shown, "family", "model", "parameters/total"):
            color, point = families.shade(study.runs, family, model), families.marker(family)
            label = f"{families.label(family)} {fmt.short(total)}"
            axes.plot(line["n_tokens"], line[key], color=color, marker=point, ms=4, label=label)
            if key == "state_bytes":
                peaks = line[measured[line.index]]
                axes.plot(peaks["n_tokens"], peaks[PEAK], point, mfc="none", mec=color, ms=5)
            for length in crossings.loc[crossings["model"] == model, crossed] if crossed else []:
                _mark(axes, line, key, length)
        values = shown[key]
        if key == "state_bytes":
            values = pd.concat([values, costs.loc[measured, PEAK]])
        style.log_axis(axes, "x", style.margins(shown["n_tokens"], 0.04), _length, binary=True)
        style.log_axis(axes, "y", style.margins(values), write, binary=key == "state_bytes")
        axes.set_xlabel("context (tokens; 1k = 1024)")
        axes.set_ylabel(name)
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    notes = [
        "Median over repeats and runs. Rings: from there on a model stays below its matched "
        f"{families.reference_label} ({TOLERANCE_SAID})."
    ]
    if measured.any():
        notes.append(
            "Bytes: lines and filled marks are computed, hollow marks are the peak measured beyond "
            "the weights, which holds activations and logits too."
        )
    return Plot(title, figure, notes)


def mean_generation(study: Study) -> pd.DataFrame:
    """Generation cost per model and length, the median over runs.

    Raises:
        NothingToShowError: if none was measured, or not all in the same way.
    """
    measured = study.generation[study.generation["n_tokens"] > 0]
    if measured.empty:
        raise NothingToShowError("no run has bench/generate.json; run experiments.benchmark first")
    if len(study.generation[GENERATION_PROTOCOL].drop_duplicates()) > 1:
        raise NothingToShowError(
            f"measured in different ways ({_protocol(study)}); "
            "measure all with one experiments.benchmark bench=generate"
        )
    keys = ["family", "model", "parameters/total", "n_tokens"]
    costs = measured.groupby(keys, sort=False)[[*COSTS[1:], PEAK]].median()
    return costs.reset_index().sort_values("n_tokens", kind="stable", ignore_index=True)


def crossing(ours: pd.Series, others: pd.Series) -> float:
    """From which length (the index) on `ours` stays below `others`, on the straight line in log-log
    between the lengths measured; the first length if it is there already, infinity if not at the
    last, NaN when they share none."""
    shared = ours.index.intersection(others.index).sort_values()
    if shared.empty:
        return np.nan
    difference = np.log((ours[shared] / others[shared]).to_numpy(float))
    above = np.flatnonzero(~(difference < 0))
    if not len(above):
        return float(shared[0])
    last = int(above[-1])
    if last == len(shared) - 1:
        return np.inf
    share = difference[last] / (difference[last] - difference[last + 1])
    return float(shared[last] * (shared[last + 1] / shared[last]) ** share)


def _crossings(study: Study, costs: pd.DataFrame) -> pd.DataFrame:
    """A row a pair: model, reference, and the crossing of each of CROSSED."""
    kept, _ = best_variants(study.runs)
    by_model = {model: line.set_index("n_tokens") for model, line in costs.groupby("model")}
    rows = [
        {"model": model, "reference": partner}
        | {key: crossing(by_model[model][key], by_model[partner][key]) for key in CROSSED}
        for model, partner in study.partners(kept).items()
        if model in by_model and partner in by_model
    ]
    return pd.DataFrame(rows, columns=["model", "reference", *CROSSED])


def _mark(axes: Axes, line: pd.DataFrame, key: str, length: float) -> None:
    """A ring on a model's line, at a length between the first and the last."""
    x = np.log(line["n_tokens"].to_numpy(float))
    if np.isfinite(length) and x[0] < np.log(length) <= x[-1]:
        height = np.exp(np.interp(np.log(length), x, np.log(line[key].to_numpy(float))))
        axes.plot([length], [height], **style.RING, ms=11, zorder=5)


def _since(length: float, first: int, last: int) -> str:
    if np.isnan(length):
        return fmt.MISSING
    if length <= first:  # shorter ones were not measured
        return f"at {first} tokens already"
    return f"not within {last} tokens" if np.isinf(length) else f"from {length:.0f} tokens"


def _milliseconds(x: float) -> str:
    return _plain(1000 * x) if np.isfinite(x) else fmt.MISSING


def _plain(x: float) -> str:
    return f"{x:.3g}" if x < 1000 else f"{x:,.0f}"


def _length(x: float) -> str:
    return f"{x:.0f}" if x < 1024 else f"{x / 1024:.3g}k"


def _protocol(study: Study) -> str:
    """Batch, chunk, device and dtype of the measured generation, in words."""
    seen = study.generation[GENERATION_PROTOCOL].drop_duplicates()
    return "; ".join(
        f"batch {fmt.text(n)}, chunks of {fmt.text(chunk)}, {fmt.text(device)}, "
        f"{fmt.threads(threads)}, {fmt.text(dtype)}"
        for n, threads, device, dtype, chunk in seen.to_numpy()
    )
