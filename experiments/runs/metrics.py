"""``metrics.csv`` of a run and its summary in ``result.json`` (columns: CONTRIBUTING.md)."""

import csv
import os
import statistics
from pathlib import Path
from typing import Any

from experiments.system.files import write_text

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
    """``metrics.csv``: append-only, one flushed line a row, the source of truth of a run.

    A checkpoint carries its `text`: if the file is lost or damaged, a resume puts it back, and a
    running job does at its next row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = ""  # what the file holds, as far as this process or its checkpoint knows

    def rewind(self, step: int) -> None:
        """Make the file hold the rows up to ``step`` and no others: a resume trains those again.

        They are those that the checkpoint brought; or the file's, if it brought none.
        """
        rows = [row for row in parse(self.text) or self.rows() if int(row["step"]) <= step]
        lines = [",".join(COLUMNS), *(",".join(row[c] for c in COLUMNS) for row in rows)]
        self.text = "\n".join(lines) + "\n"
        write_text(self.path, self.text)

    def append(self, row: dict[str, Any]) -> None:
        """Add a row.

        Raises:
            OSError: if it cannot be written, with the file's name.
        """
        assert row.keys() <= set(COLUMNS)
        line = ",".join("" if row.get(c) is None else format_cell(row[c]) for c in COLUMNS) + "\n"
        self.text += line
        try:
            if self.path.is_file():
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(line)
            else:  # somebody removed it
                write_text(self.path, self.text)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def sync(self) -> None:
        """Wait until the rows would survive a power cut."""
        if self.path.is_file():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def rows(self) -> list[dict[str, str]]:
        """Complete rows of the file, as text."""
        if not self.path.is_file():
            return []
        return parse(self.path.read_text(encoding="utf-8", errors="replace"))  # may be damaged

    def column(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of every row where ``name`` was measured."""
        return [(int(row["step"]), float(row[name])) for row in self.rows() if row[name]]


def parse(text: str) -> list[dict[str, str]]:
    """The complete rows of a table that starts with the names of its columns."""
    whole = (line for line in text.splitlines(keepends=True) if line.endswith("\n"))
    return [row for row in csv.DictReader(whole) if all(row.get(c) is not None for c in COLUMNS)]


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
    if not train or not losses or losses[-1][0] != int(rows[-1]["step"]):
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
        "perf/tokens_per_s": statistics.median(speeds or [0.0]),  # no speed if the clock stood
        "perf/mfu": statistics.median(utilisations) if utilisations else None,
        "perf/peak_mem_bytes": int(max(peaks)),
    }
