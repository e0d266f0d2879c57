"""``metrics.csv`` of a run and its summary in ``result.json`` (columns: CONTRIBUTING.md)."""

import csv
import statistics
from pathlib import Path
from typing import Any

from experiments.run_dir import write_text

COLUMNS = (
    "step",
    "tokens",
    "time_s",
    "lr",
    "train/loss",
    "train/grad_norm",
    "val/loss",
    "val/bpb",
    "perf/tokens_per_s",
    "perf/mfu",
    "perf/peak_mem_bytes",
)


class MetricsFile:
    """``metrics.csv``: append-only, one flushed line a row, the source of truth of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> None:
        """Drop rows after ``step`` (a resume trains them again) and a last line cut by a crash."""
        kept = [row for row in self.rows() if int(row["step"]) <= step]
        lines = [",".join(COLUMNS), *(",".join(row[c] for c in COLUMNS) for row in kept)]
        write_text(self.path, "\n".join(lines) + "\n")

    def append(self, row: dict[str, Any]) -> None:
        assert row.keys() <= set(COLUMNS)
        cells = ["" if row.get(c) is None else format_cell(row[c]) for c in COLUMNS]
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(",".join(cells) + "\n")

    def rows(self) -> list[dict[str, str]]:
        """Complete rows, as text."""
        if not self.path.is_file():
            return []
        with open(self.path, encoding="utf-8", newline="") as file:
            whole = (line for line in file if line.endswith("\n"))
            return [
                row for row in csv.DictReader(whole) if all(row[c] is not None for c in COLUMNS)
            ]

    def column(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of every row where ``name`` was measured."""
        return [(int(row["step"]), float(row[name])) for row in self.rows() if row[name]]


def format_cell(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.8g}"


def summarise(metrics: MetricsFile, flops_per_token: int) -> dict[str, Any]:
    """``result.json`` out of metrics.csv: the last values, the best validation, median speeds."""
    rows = metrics.rows()
    losses = metrics.column("val/loss")
    bits = dict(metrics.column("val/bpb"))
    train = metrics.column("train/loss")
    speeds = [value for _, value in metrics.column("perf/tokens_per_s")]
    utilisations = [value for _, value in metrics.column("perf/mfu")]
    peaks = [value for _, value in metrics.column("perf/peak_mem_bytes")]
    if losses[-1][0] != int(rows[-1]["step"]):
        raise ValueError(f"{metrics.path} has no validation of its last step: train it again")
    best_step, best_loss = min(losses, key=lambda pair: pair[1])
    tokens = int(rows[-1]["tokens"])
    return {
        "step": int(rows[-1]["step"]),
        "tokens": tokens,
        "flops": tokens * flops_per_token,
        "time_s": float(rows[-1]["time_s"]),
        "train/loss": train[-1][1],
        "val/loss": losses[-1][1],
        "val/bpb": bits.get(losses[-1][0]),
        "best": {"step": best_step, "val/loss": best_loss, "val/bpb": bits.get(best_step)},
        "perf/tokens_per_s": statistics.median(speeds),
        "perf/mfu": statistics.median(utilisations) if utilisations else None,
        "perf/peak_mem_bytes": int(max(peaks)),
    }
