"""The tables of runs, pairs, fits and speed: each function takes a Study and returns a Table."""

import pandas as pd

from analysis import formats as fmt
from analysis import scaling
from analysis.matching import TOLERANCE_SAID
from analysis.runs import CONDITIONS, DEVICE, SIZES, SPEED
from analysis.study import NothingToShowError, Study, budget_notes, groups
from analysis.table import Column, Table, interval_column, pair_column

X_NAMES = {
    "parameters/total": "total parameters",
    "parameters/non_embedding": "non-embedding parameters",
    "flops": "training FLOPs",
}
LAST_STEP = "Losses are those of the last step, at the end of the token budget."


def runs_overview(study: Study) -> Table:
    """Every finished run: size, budget, loss, speed, memory, time."""
    runs = study.trained
    columns = [
        Column("run", lambda r: r["run"].removeprefix(f"{study.suite}/")),
        Column("parameters", "parameters/total", fmt.short),
        Column("non-embedding", "parameters/non_embedding", fmt.short),
        Column("FLOPs/token", "flops_per_token", fmt.flops),
        Column("tokens (per non-emb.)", _tokens),
        Column("val nats/token", "val/loss", fmt.fixed4),
        Column("val bits/byte", "val/bpb", fmt.fixed4),
        Column("tokens/s", "perf/tokens_per_s", fmt.short),
        Column("MFU", "perf/mfu", fmt.percent),
        Column("peak memory", "perf/peak_mem_bytes", fmt.size_bytes),
        Column("time", "time_s", fmt.seconds),
        Column("peak lr", "peak_lr", fmt.rate),
    ]
    columns = [c for c in columns if not isinstance(c.of, str) or runs[c.of].notna().any()]
    columns += [
        Column(key.removeprefix("recipe/"), key, fmt.text)
        for key in CONDITIONS
        if runs[key].nunique(dropna=False) > 1
    ]
    keep = ["run", "model", "family", "variant", "seed", *SIZES, "tokens", "flops"]
    keep += ["val/loss", "val/bpb", *SPEED, "time_s", "peak_lr", *CONDITIONS]
    return Table("Runs", runs[keep], columns, [LAST_STEP])


def matched_pairs(study: Study) -> Table:
    """Each model beside the one of the reference family that it is matched to, and the loss gap
    over the seeds they share."""
    losses, label = study.losses, study.families.reference_label
    pairs, notes = study.pairs(losses), losses.notes
    unmatched = set(losses.runs["model"]) - set(pairs["model"]) - set(pairs["reference"])
    if unmatched:
        names = ", ".join(sorted(unmatched))
        notes.append(f"Without a finished partner {TOLERANCE_SAID}: {names}.")
    columns = [
        Column("model", "model"),
        Column(f"matched {label}", "reference"),
        pair_column("parameters", "parameters/total", fmt.short),
        pair_column("non-embedding", "parameters/non_embedding", fmt.short),
        pair_column("FLOPs/token", "flops_per_token", fmt.flops),
        Column("tokens (per non-emb.)", _tokens),
        pair_column(f"val {losses.unit}", "loss", fmt.fixed4),
        interval_column("gap [95 % interval]", "gap", "gap_low", "gap_high", 4, "+"),
        Column("seeds", lambda r: f"{r['n_seeds']}" + (f" ({r['note']})" if r["note"] else "")),
    ]
    if (pairs[["n_variants", "reference/n_variants"]] > 1).any(axis=None):
        columns.insert(-1, pair_column("variants tried", "n_variants", str))
        notes.append(
            "Of the variants tried the best is shown, chosen by this same loss: the gap favours "
            "the side with more of them."
        )
    if pairs[["peak_lr", "reference/peak_lr"]].notna().any(axis=None):
        columns.insert(-3, pair_column("peak lr", "peak_lr", fmt.rate))
    if (pairs["peak_lr"] != pairs["reference/peak_lr"])[pairs["peak_lr"].notna()].any():
        notes.append(
            "Peak learning rates differ within pairs: each model has the one that its recipe or "
            "the same search for both sides chose."
        )
    notes += [
        f"Left and right of each slash: the model and the {label} nearest in total parameters, "
        f"within 10 %. Gap: model minus {label}, negative when the model is better; paired t "
        "interval over the seeds both have. Seeds change the initialisation only: all see the "
        "same batches.",
        LAST_STEP,
    ]
    return Table(f"Matched pairs: gap in {losses.unit}", pairs, columns, notes)


def scaling_fits(study: Study) -> Table:
    """Power law of final validation loss per family, against parameters and training FLOPs."""
    losses = study.losses
    rows = []
    for family, group in groups(losses.runs, "family"):
        for x, name in X_NAMES.items():
            n_sizes = group[x].nunique()
            forms = [False] * (n_sizes >= 2) + [True] * (n_sizes >= scaling.MIN_SIZES_IRREDUCIBLE)
            for irreducible in forms:
                law = scaling.fit_power_law(group[x], group[losses.column], irreducible)
                form = "c + a x^-b" if irreducible else "a x^-b"
                keys = ("a", "b", "b_low", "b_high", "c", "r2", "n_sizes", "n_runs", "note")
                row = {"family": family, "x": name, "form": form}
                rows.append(row | {key: getattr(law, key) for key in keys})
    if not rows:
        raise NothingToShowError("no family has two sizes")
    columns = [
        Column("family", "family", study.families.label),
        Column("x", "x"),
        Column("form", "form"),
        interval_column("exponent b [95 % interval]", "b", "b_low", "b_high"),
        Column("a", "a", lambda a: f"{a:.4g}"),
        Column("c", "c", lambda c: fmt.fixed(c) if c else fmt.MISSING),
        Column("R²", "r2", fmt.fixed4),
        Column("sizes (runs)", lambda r: f"{r['n_sizes']} ({r['n_runs']})"),
        Column("note", "note", fmt.text),
    ]
    note = (
        f"Loss in {losses.unit}. Least squares in log-log over size means (seeds averaged first); "
        "the t interval has as many degrees of freedom as sizes beyond the coefficients. Final "
        "losses at the budgets shown under Runs, not a compute-optimal frontier."
    )
    notes = [*losses.notes, note, *budget_notes(losses.runs)]
    return Table("Scaling fits", pd.DataFrame(rows), columns, notes)


def training_throughput(study: Study) -> Table:
    """Training speed and memory per model: median over runs, and the range of speeds."""
    runs = study.trained
    if runs["perf/tokens_per_s"].isna().all():
        raise NothingToShowError("no run recorded perf/tokens_per_s")
    keys = ["family", "model", "parameters/total", *DEVICE]
    alike = runs.groupby(keys, dropna=False, sort=False)
    speeds = alike["perf/tokens_per_s"]
    frame = alike[["flops_per_token", *SPEED]].median()
    frame = frame.assign(slowest=speeds.min(), fastest=speeds.max(), n_runs=alike.size())
    columns = [
        Column("model", "model"),
        Column("parameters", "parameters/total", fmt.short),
        Column("FLOPs/token", "flops_per_token", fmt.flops),
        Column("tokens/s [range of runs]", _speed),
        Column("FLOP/s", lambda r: fmt.flops(r["perf/tokens_per_s"] * r["flops_per_token"])),
        Column("MFU", "perf/mfu", fmt.percent),
        Column("peak memory", "perf/peak_mem_bytes", fmt.size_bytes),
        Column("precision", "precision", fmt.text),
        Column("backend", "backend", fmt.text),
        Column("device", _device),
    ]
    notes = [
        "Median over runs of each run's median; beside it the slowest and the fastest run. Peak "
        "memory: on a CPU of the whole process, PyTorch itself included. MFU: of the peak measured "
        "as each run began, so beside other work it tells little."
    ]
    return Table("Training throughput and memory", frame.reset_index(), columns, notes)


def left_out(study: Study) -> Table:
    """Runs and files that no table or figure of this report counts, and why."""
    if study.left_out.empty:
        raise NothingToShowError("every run found is in the report")
    columns = [Column(key, key) for key in ("run", "state", "reason")]
    return Table("Left out", study.left_out, columns)


def _tokens(row: pd.Series) -> str:
    per = fmt.short(row["tokens"] / row["parameters/non_embedding"])
    return f"{fmt.short(row['tokens'])} ({per})"


def _speed(row: pd.Series) -> str:
    text, n = fmt.short(row["perf/tokens_per_s"]), row["n_runs"]
    if n == 1:
        return text
    return f"{text} [{fmt.short(row['slowest'])}, {fmt.short(row['fastest'])}] ({n})"


def _device(row: pd.Series) -> str:
    threads = f", {fmt.threads(row['device/n_threads'])}" if row["device/type"] == "cpu" else ""
    return f"{fmt.text(row['device/name'])}{threads}"
