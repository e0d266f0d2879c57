"""A table of a report: raw numbers for programs, text for readers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from tabulate import tabulate

from analysis import formats as fmt


@dataclass(frozen=True)
class Column:
    """A column for readers: `of` is a column of the frame, or a function of a row."""

    heading: str
    of: str | Callable[[pd.Series], str]
    write: Callable[[Any], str] = str

    def text(self, row: pd.Series) -> str:
        """The cell of a row."""
        return self.write(row[self.of]) if isinstance(self.of, str) else self.of(row)


def interval_column(
    heading: str, key: str, low: str, high: str, digits: int = 3, sign: str = ""
) -> Column:
    """A value and its interval."""
    return Column(heading, lambda r: fmt.interval(r[key], r[low], r[high], digits, sign))


def pair_column(heading: str, key: str, write: Callable[[Any], str]) -> Column:
    """A value of the model and of its reference."""
    return Column(heading, lambda r: f"{write(r[key])} / {write(r[f'reference/{key}'])}")


@dataclass(frozen=True)
class Table:
    """`frame` has the raw numbers (CSV), `columns` are what readers see."""

    title: str
    frame: pd.DataFrame
    columns: list[Column]
    notes: list[str] = field(default_factory=list)

    def texts(self) -> tuple[list[str], list[list[str]]]:
        """Headings and rows as text."""
        rows = [[column.text(row) for column in self.columns] for _, row in self.frame.iterrows()]
        return [column.heading for column in self.columns], rows

    def markdown(self) -> str:
        """A pipe table, its columns padded so that it reads well in a terminal too."""
        heads, rows = self.texts()
        rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        table = tabulate(rows, heads, tablefmt="github", disable_numparse=True)
        return "\n".join([table, *(f"\n{note}" for note in self.notes)]) + "\n"

    def latex(self) -> str:
        """A tabular with booktabs rules, the notes as comments above it."""
        heads, rows = self.texts()
        table = tabulate(rows, heads, tablefmt="latex_booktabs", disable_numparse=True)
        return "\n".join([*(f"% {note}" for note in [self.title, *self.notes]), table]) + "\n"
