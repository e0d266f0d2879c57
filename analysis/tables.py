"""The tables of a report: each function takes a Study and returns a Table."""

from collections.abc import Callable

import pandas as pd

from analysis import formats as fmt
from analysis import scaling
from analysis.runs import CONDITIONS, SIZES, SPEED
from analysis.study import (
    NothingToShowError,
    Study,
    best_variants,
    budget_notes,
    groups,
    loss_of,
)
from analysis.table import Column, Table, cell

X_NAMES = {
    "parameters/total": "total parameters",
    "parameters/non_embedding": "non-embedding parameters",
    "flops": "training FLOPs",
}
LAST_STEP = "Losses are those of the last step, at the end of the token budget."


def runs_overview(study: Study) -> Table:
    """Every finished run: size, budget, loss, speed, memory, time."""
    runs = study.trained
    unit = {"val/loss": "nats/token", "val/bpb": "bits/byte"}
    columns: list[Column] = [
        ("run", lambda r: r["run"].removeprefix(f"{study.suite}/")),
        ("parameters", cell("parameters/total", fmt.short)),
        ("non-embedding", cell("parameters/non_embedding", fmt.short)),
        ("FLOPs/token", cell("flops_per_token", fmt.flops)),
        ("tokens (per non-emb.)", _tokens),
        *(
            (f"val {unit[key]}", cell(key, lambda x: fmt.fixed(x, 4)))
            for key in ("val/loss", "val/bpb")
            if runs[key].notna().any()
        ),
        ("tokens/s", cell("perf/tokens_per_s", fmt.short)),
        ("MFU", cell("perf/mfu", fmt.percent)),
        ("peak memory", cell("perf/peak_mem_bytes", fmt.size_bytes)),
        ("time", cell("time_s", fmt.seconds)),
        *([("peak lr", cell("peak_lr", _rate))] if runs["peak_lr"].notna().any() else []),
        *(
            (key.replace("recipe/", ""), cell(key, fmt.text))
            for key in CONDITIONS
            if runs[key].nunique(dropna=False) > 1
        ),
    ]
    keep = ["run", "model", "family", "variant", "seed", *SIZES, "tokens", "flops"]
    keep += ["val/loss", "val/bpb", *SPEED, "time_s", "peak_lr", *CONDITIONS]
    return Table("Runs", runs[keep], columns, [LAST_STEP])


def matched_pairs(study: Study) -> Table:
    """Each model beside the GPT it is matched to, and the loss gap over the seeds they share."""
    runs, notes = best_variants(study.trained)
    loss, unit = loss_of(runs)
    pairs = scaling.matched_pairs(runs, loss)
    if pairs.empty:
        raise NothingToShowError("no model has a GPT within 10 % of its total parameters")
    unmatched = set(runs["model"]) - set(pairs["model"]) - set(pairs["reference"])
    if unmatched:
        names = ", ".join(sorted(unmatched))
        notes.append(f"Without a finished partner within 10 % of total parameters: {names}.")
    columns: list[Column] = [
        ("model", cell("model")),
        ("matched GPT", cell("reference")),
        ("parameters", lambda r: _both(r, "parameters/total", fmt.short)),
        ("non-embedding", lambda r: _both(r, "parameters/non_embedding", fmt.short)),
        ("FLOPs/token", lambda r: _both(r, "flops_per_token", fmt.flops)),
        ("tokens (per non-emb.)", _tokens),
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
    if pairs[["peak_lr", "reference/peak_lr"]].notna().any(axis=None):
        columns.insert(-3, ("peak lr", lambda r: _both(r, "peak_lr", _rate)))
    if (pairs["peak_lr"] != pairs["reference/peak_lr"])[pairs["peak_lr"].notna()].any():
        notes.append(
            "Peak learning rates differ within pairs: each model has the one that its recipe or "
            "the same search for both sides chose."
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
    runs, notes = best_variants(study.trained)
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
        ("family", cell("family", fmt.family_name)),
        ("x", cell("x")),
        ("form", cell("form")),
        ("exponent b [95 % interval]", lambda r: fmt.interval(r["b"], r["b_low"], r["b_high"])),
        ("a", lambda r: f"{r['a']:.4g}"),
        ("c", cell("c", lambda c: fmt.fixed(c) if c else fmt.MISSING)),
        ("R²", cell("r2", lambda x: fmt.fixed(x, 4))),
        ("sizes (runs)", lambda r: f"{r['n_sizes']} ({r['n_runs']})"),
        ("note", lambda r: r["note"] or fmt.MISSING),
    ]
    notes.append(
        f"Loss in {unit}. Least squares in log-log over size means (seeds averaged first); the t "
        "interval has as many degrees of freedom as sizes beyond the coefficients. Final losses "
        "at the budgets shown under Runs, not a compute-optimal frontier."
    )
    return Table("Scaling fits", pd.DataFrame(rows), columns, notes + budget_notes(runs))


def training_throughput(study: Study) -> Table:
    """Training speed and memory per model: median over runs, and the range of speeds."""
    runs = study.trained
    if runs["perf/tokens_per_s"].isna().all():
        raise NothingToShowError("no run recorded perf/tokens_per_s")
    for column in ("device/type", "device/name", "device/n_threads", "precision", "wkv_backend"):
        if column not in runs:
            runs = runs.assign(**{column: None})
    keys = ["family", "model", "parameters/total", "device/type", "device/name", "device/n_threads"]
    keys += ["precision", "wkv_backend"]
    numbers = ["flops_per_token", *SPEED]
    alike = runs.groupby(keys, dropna=False, sort=False)
    frame = alike[numbers].median()
    speeds = alike["perf/tokens_per_s"]
    frame = frame.assign(slowest=speeds.min(), fastest=speeds.max(), n_runs=alike.size())
    frame = frame.reset_index()
    columns: list[Column] = [
        ("model", cell("model")),
        ("parameters", cell("parameters/total", fmt.short)),
        ("FLOPs/token", cell("flops_per_token", fmt.flops)),
        ("tokens/s [range of runs]", _speed),
        ("FLOP/s", lambda r: fmt.flops(r["perf/tokens_per_s"] * r["flops_per_token"])),
        ("MFU", cell("perf/mfu", fmt.percent)),
        ("peak memory", cell("perf/peak_mem_bytes", fmt.size_bytes)),
        ("precision", cell("precision", fmt.text)),
        (
            "WKV",
            lambda r: fmt.text(r["wkv_backend"] if "rwkv" in r["family"] else None),
        ),
        ("device", _device),
    ]
    notes = [
        "Median over runs of each run's median; beside it the slowest and the fastest run. Peak "
        "memory: on a CPU of the whole process, PyTorch itself included. MFU: of the peak measured "
        "as each run began, so beside other work it tells little."
    ]
    return Table("Training throughput and memory", frame, columns, notes)


def left_out(study: Study) -> Table:
    """Runs and files that no table or figure of this report counts, and why."""
    if study.left_out.empty:
        raise NothingToShowError("every run found is in the report")
    columns: list[Column] = [(key, cell(key)) for key in study.left_out.columns]
    return Table("Left out", study.left_out, columns)


def _both(row: pd.Series, key: str, write: Callable[[float], str]) -> str:
    return f"{write(row[key])} / {write(row[f'reference/{key}'])}"


def _tokens(row: pd.Series) -> str:
    per = fmt.short(row["tokens"] / row["parameters/non_embedding"])
    return f"{fmt.short(row['tokens'])} ({per})"


def _rate(x: float) -> str:
    return f"{x:g}" if x > 0 else fmt.MISSING


def _speed(row: pd.Series) -> str:
    text, n = fmt.short(row["perf/tokens_per_s"]), row["n_runs"]
    if not n > 1:
        return text
    return f"{text} [{fmt.short(row['slowest'])}, {fmt.short(row['fastest'])}] ({n})"


def _device(row: pd.Series) -> str:
    n = row["device/n_threads"]
    threads = f", {n:.0f} thread{'' if n == 1 else 's'}" if row["device/type"] == "cpu" else ""
    return f"{fmt.text(row['device/name'] or row['device/type'])}{threads}"
