"""A table of a report: raw numbers for programs, text for readers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

Column = tuple[str, Callable[[pd.Series], str]]
TEX = str.maketrans(
    {c: "\\" + c for c in "%&#_{}$"}
    | {"\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\~{}"}
    | {"²": "$^2$", "±": r"$\pm$", "–": "--"}
)


@dataclass(frozen=True)
class Table:
    """`frame` has the raw numbers (CSV); `columns` are (heading, row -> text) for readers."""

    title: str
    frame: pd.DataFrame
    columns: list[Column]
    notes: list[str] = field(default_factory=list)

    def texts(self) -> tuple[list[str], list[list[str]]]:
        """Headings and rows as text."""
        rows = [[write(row) for _, write in self.columns] for _, row in self.frame.iterrows()]
        return [heading for heading, _ in self.columns], rows

    def markdown(self) -> str:
        """A pipe table, its columns padded so that it reads well in a terminal too."""
        heads, rows = self.texts()
        rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        lines = [
            "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
            for line in [heads, ["-" * w for w in widths], *rows]
        ]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"

    def latex(self) -> str:
        """A tabular with booktabs rules, the notes as comments above it."""
        heads, rows = self.texts()
        body = [
            " & ".join(cell.translate(TEX) for cell in line) + r" \\" for line in [heads, *rows]
        ]
        notes = [f"% {note}" for note in [self.title, *self.notes]]
        begin = rf"\begin{{tabular}}{{{'l' * len(heads)}}}"
        lines = [*notes, begin, r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule"]
        return "\n".join([*lines, r"\end{tabular}"]) + "\n"


def cell(key: str, write: Callable[[Any], str] = str) -> Callable[[pd.Series], str]:
    """A column's cells: one value of the row, written."""
    return lambda row: write(row[key])
