"""The tables of a report: each function takes a Study and returns a Table."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from analysis import formats as fmt
from analysis import scaling
from analysis.runs import CONDITIONS, SIZES, SPEED
from analysis.study import (
    CACHE_COPY,
    NothingToShowError,
    Study,
    best_variants,
    crossing,
    generation_protocol,
    groups,
    loss_of,
    mean_generation,
    mean_scores,
    protocol_columns,
)
from analysis.table import Column, Table

X_NAMES = {
    "parameters/total": "total parameters",
    "parameters/non_embedding": "non-embedding parameters",
    "flops": "training FLOPs",
}
LAST_STEP = "Losses are those of the last step, at the end of the token budget."
PROTOCOL_SAID = {
    "n_shot": "{}-shot",
    "checkpoint": "{} checkpoint",
    "version": "v{}",
    "dtype": "{}",
    "prefix": "prefix {}",
    "rolling_ctx": "window {}",
    "limit": "limit {}",
    "lm_eval": "lm-eval {}",
}
PROTOCOL_OF_A_ROW = ("n_shot", "checkpoint", "version")


def runs_overview(study: Study) -> Table:
    """Every finished run: size, budget, loss, speed, memory, time."""
    unit = {"val/loss": "nats/token", "val/bpb": "bits/byte"}
    columns: list[Column] = [
        ("run", lambda r: r["run"].removeprefix(f"{study.suite}/")),
        ("parameters", _of("parameters/total", fmt.short)),
        ("non-embedding", _of("parameters/non_embedding", fmt.short)),
        ("FLOPs/token", _of("flops_per_token", fmt.flops)),
        ("tokens", _of("tokens", fmt.short)),
        *(
            (f"val {unit[key]}", _of(key, lambda x: fmt.fixed(x, 4)))
            for key in ("val/loss", "val/bpb")
            if study.runs[key].notna().any()
        ),
        ("tokens/s", _of("perf/tokens_per_s", fmt.short)),
        ("MFU", _of("perf/mfu", fmt.percent)),
        ("peak memory", _of("perf/peak_mem_bytes", fmt.size_bytes)),
        ("time", _of("time_s", fmt.seconds)),
        *(
            (key.replace("recipe/", ""), _of(key, fmt.text))
            for key in CONDITIONS
            if study.runs[key].nunique(dropna=False) > 1
        ),
    ]
    keep = ["run", "model", "family", "variant", "seed", *SIZES, "tokens", "flops"]
    keep += ["val/loss", "val/bpb", *SPEED, "time_s", *CONDITIONS]
    return Table("Runs", study.runs[keep], columns, [LAST_STEP])


def matched_pairs(study: Study) -> Table:
    """Each model beside the GPT it is matched to, and the loss gap over the seeds they share."""
    runs, notes = best_variants(study.runs)
    loss, unit = loss_of(runs)
    pairs = scaling.matched_pairs(runs, loss)
    if pairs.empty:
        raise NothingToShowError("no model has a GPT within 10 % of its total parameters")
    unmatched = set(runs["model"]) - set(pairs["model"]) - set(pairs["reference"])
    if unmatched:
        names = ", ".join(sorted(unmatched))
        notes.append(f"Without a partner within 10 % of total parameters: {names}.")
    columns: list[Column] = [
        ("model", _of("model")),
        ("matched GPT", _of("reference")),
        ("parameters", lambda r: _both(r, "parameters/total", fmt.short)),
        ("non-embedding", lambda r: _both(r, "parameters/non_embedding", fmt.short)),
        ("FLOPs/token", lambda r: _both(r, "flops_per_token", fmt.flops)),
        (f"val {unit}", lambda r: _both(r, "loss", lambda x: fmt.fixed(x, 4))),
        (
            "gap [95 % interval]",
            lambda r: fmt.interval(r["gap"], r["gap_low"], r["gap_high"], 4, "+"),
        ),
        ("seeds", lambda r: f"{r['n_seeds']}" + (f" ({r['note']})" if r["note"] else "")),
    ]
    tried = pairs[["n_variants", "reference/n_variants"]]
    if (tried > 1).any(axis=None):
        columns.insert(-1, ("variants tried", lambda r: _both(r, "n_variants", str)))
        notes.append(
            "Of the variants tried the best is shown, chosen by this same loss: the gap favours "
            "the side with more of them."
        )
    notes.append(
        "Left and right of each slash: the model and the GPT nearest in total parameters, within "
        "10 %. Gap: model minus GPT, negative when the model is better; paired t interval over "
        "the seeds both have. Seeds change the initialisation only: all see the same batches."
    )
    notes.append(LAST_STEP)
    return Table(f"Matched pairs: gap in {unit}", pairs, columns, notes)


def scaling_fits(study: Study) -> Table:
    """Power law of final validation loss per family, against parameters and training FLOPs."""
    runs, notes = best_variants(study.runs)
    loss, unit = loss_of(runs)
    rows = []
    for family, group in groups(runs, "family"):
        for x, name in X_NAMES.items():
            n_sizes = group[x].nunique()
            forms = [False] * (n_sizes >= 2) + [True] * (n_sizes >= scaling.MIN_SIZES_IRREDUCIBLE)
            for irreducible in forms:
                law = scaling.fit_power_law(group[x], group[loss], irreducible)
                row = {
                    "family": family,
                    "x": name,
                    "form": "c + a x^-b" if irreducible else "a x^-b",
                }
                keys = ("a", "b", "b_low", "b_high", "c", "r2", "n_sizes", "n_runs", "note")
                rows.append(row | {key: getattr(law, key) for key in keys})
    if not rows:
        raise NothingToShowError("no family has two sizes")
    columns: list[Column] = [
        ("family", _of("family", fmt.family_name)),
        ("x", _of("x")),
        ("form", _of("form")),
        ("exponent b [95 % interval]", lambda r: fmt.interval(r["b"], r["b_low"], r["b_high"])),
        ("a", lambda r: f"{r['a']:.4g}"),
        ("c", _of("c", lambda c: fmt.fixed(c) if c else fmt.MISSING)),
        ("R²", _of("r2", lambda x: fmt.fixed(x, 4))),
        ("sizes (runs)", lambda r: f"{r['n_sizes']} ({r['n_runs']})"),
        ("note", lambda r: r["note"] or fmt.MISSING),
    ]
    notes.append(
        f"Loss in {unit}. Least squares in log-log over size means (seeds averaged first); the t "
        "interval has as many degrees of freedom as sizes beyond the coefficients. Final losses "
        "at the budgets shown under Runs, not a compute-optimal frontier."
    )
    return Table("Scaling fits", pd.DataFrame(rows), columns, notes)


def benchmark_scores(study: Study) -> Table:
    """Zero-shot scores per task, metric and model, averaged over seeds."""
    if study.scores.empty:
        raise NothingToShowError("no run has eval/*.json; run experiments.evaluate first")
    kept, notes = best_variants(study.runs)
    frame = mean_scores(study.scores[study.scores["run"].isin(kept["run"])])
    frame["protocol"], shared = _protocols(frame)
    columns: list[Column] = [
        ("task", _of("task")),
        ("metric", lambda r: r["metric"].removesuffix(",none")),
        ("model", _of("model")),
        ("parameters", _of("parameters/total", fmt.short)),
        ("score ± s.e.", lambda r: f"{r['score']:.4f}" + _plus_minus(r["stderr"])),
        ("s.d. of seeds", _of("seed_sd", lambda x: fmt.fixed(x, 4))),
        ("seeds", lambda r: str(r["n_runs"])),
        ("chance", _of("chance", lambda x: fmt.fixed(x, 2))),
        ("docs", lambda r: f"{r['n_documents']:.0f}" if r["n_documents"] > 0 else fmt.MISSING),
        ("protocol", _of("protocol")),
    ]
    notes.append(
        "Score: mean over seeds; s.e.: over documents, of one run. All seeds see the same "
        "documents, so more seeds do not shrink it. The figure draws the first metric of a task. "
        "Scores are of the checkpoint named under protocol; tables of losses are of the last step."
    )
    if shared:
        notes.append(f"All rows: {shared}.")
    return Table("Zero-shot benchmarks", frame, columns, notes)


def training_throughput(study: Study) -> Table:
    """Training speed and memory per model: median over runs."""
    runs = study.runs
    if runs["perf/tokens_per_s"].isna().all():
        raise NothingToShowError("no run recorded perf/tokens_per_s")
    for column in ("device/type", "device/name", "device/n_threads", "precision", "wkv_backend"):
        if column not in runs:
            runs = runs.assign(**{column: None})
    keys = ["family", "model", "parameters/total", "device/type", "device/name", "device/n_threads"]
    keys += ["precision", "wkv_backend"]
    numbers = ["flops_per_token", *SPEED]
    frame = runs.groupby(keys, dropna=False, sort=False)[numbers].median().reset_index()
    columns: list[Column] = [
        ("model", _of("model")),
        ("parameters", _of("parameters/total", fmt.short)),
        ("FLOPs/token", _of("flops_per_token", fmt.flops)),
        ("tokens/s", _of("perf/tokens_per_s", fmt.short)),
        ("FLOP/s", lambda r: fmt.flops(r["perf/tokens_per_s"] * r["flops_per_token"])),
        ("MFU", _of("perf/mfu", fmt.percent)),
        ("peak memory", _of("perf/peak_mem_bytes", fmt.size_bytes)),
        ("precision", _of("precision", fmt.text)),
        (
            "WKV",
            lambda r: fmt.text(r["wkv_backend"] if "rwkv" in r["family"] else None),
        ),
        ("device", _device),
    ]
    return Table("Training throughput", frame, columns, ["Median over runs of each run's median."])


def generation_cost(study: Study) -> Table:
    """Seconds and state bytes at a few lengths, and from where on it beats its GPT."""
    costs = mean_generation(study)
    lengths = sorted(costs["n_tokens"].unique())
    lengths = [
        lengths[i] for i in np.unique(np.linspace(0, len(lengths) - 1, 4).round().astype(int))
    ]
    kept, _ = best_variants(study.runs)
    pairs = scaling.matched_pairs(kept, loss_of(kept)[0])
    partners = dict(pairs[["model", "reference"]].to_numpy()) if len(pairs) else {}
    by_model = {model: group.set_index("n_tokens") for model, group in costs.groupby("model")}
    rows = []
    for model, group in costs.groupby("model", sort=False):
        row = {key: group[key].iloc[0] for key in ("family", "model", "parameters/total")}
        for n in lengths:
            at = group[group["n_tokens"] == n]
            row[f"seconds@{n}"] = at["seconds"].iloc[0] if len(at) else np.nan
            row[f"state_bytes@{n}"] = at["state_bytes"].iloc[0] if len(at) else np.nan
        partner = by_model.get(partners.get(model, ""))
        for key in ("seconds", "state_bytes"):
            mine = by_model[model][key]
            row[f"cheaper_{key}"] = fmt.MISSING if partner is None else crossing(mine, partner[key])
        rows.append(row)
    columns: list[Column] = [
        ("model", _of("model")),
        ("parameters", _of("parameters/total", fmt.short)),
        *((f"time, {n} tokens", _of(f"seconds@{n}", fmt.seconds)) for n in lengths),
        *(
            (f"state, {n}", _of(f"state_bytes@{n}", fmt.size_bytes))
            for n in (lengths[0], lengths[-1])
        ),
        ("faster than its GPT", _of("cheaper_seconds")),
        ("smaller state", _of("cheaper_state_bytes")),
    ]
    notes = [
        "Cumulative seconds for generating that many tokens (median over repeats and runs); state: "
        "bytes of recurrent state or KV cache, computed, float32.",
        f"Measured with {generation_protocol(study)}.",
        CACHE_COPY,
    ]
    return Table("Generation cost", pd.DataFrame(rows), columns, notes)


def left_out(study: Study) -> Table:
    """Runs and files that no table or figure of this report counts, and why."""
    if study.left_out.empty:
        raise NothingToShowError("every run found is in the report")
    columns: list[Column] = [(key, _of(key)) for key in study.left_out.columns]
    return Table("Left out", study.left_out, columns)


def _of(key: str, write: Callable[[Any], str] = str) -> Callable[[pd.Series], str]:
    return lambda row: write(row[key])


def _both(row: pd.Series, key: str, write: Callable[[float], str]) -> str:
    return f"{write(row[key])} / {write(row[f'reference/{key}'])}"


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
        texts = columns[key].map(lambda value, write=write: write.format(value))
        if key in PROTOCOL_OF_A_ROW or texts.nunique() > 1:
            own.append(texts)
        elif columns[key].iloc[0] != fmt.MISSING:
            shared.append(texts.iloc[0])
    return [", ".join(row) for row in zip(*own, strict=True)], ", ".join(shared)


def _plus_minus(stderr: float) -> str:
    return f" ± {stderr:.4f}" if np.isfinite(stderr) else ""


def _device(row: pd.Series) -> str:
    threads = f", {row['device/n_threads']:.0f} threads" if row["device/type"] == "cpu" else ""
    return f"{fmt.text(row['device/name'] or row['device/type'])}{threads}"
