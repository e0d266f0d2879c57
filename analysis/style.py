"""How figures look: titles, grids of panels, ticks on logarithmic axes, labels at ends of lines."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

DPI = 150
INK, MUTED, FAINT, GRID = "#222222", "#666666", "#9a9a9a", "#e4e4e4"
RING: dict[str, Any] = {"marker": "o", "mfc": "none", "mec": INK, "mew": 1.4}
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
}


@dataclass(frozen=True)
class Plot:
    """A figure, its title, and what a reader must know beside it."""

    title: str
    figure: Figure
    notes: list[str] = field(default_factory=list)


def new_figure(
    title: str,
    subtitle: str,
    rows: int = 1,
    columns: int = 1,
    width: float = 9.6,
    height: float = 4.6,
) -> tuple[Figure, list[Axes]]:
    """A figure (inches) with a title, a second line that says what went in, and its panels in
    reading order."""
    head = 0.62 / height  # inches for the two lines of text
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - head), w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
    left = 0.08 / width
    figure.text(left, 1 - 0.08 / height, title, va="top", size=13, weight="bold", color=INK)
    figure.text(left, 1 - 0.36 / height, subtitle, va="top", size=9.5, color=MUTED)
    return figure, list(np.ravel(figure.subplots(rows, columns, squeeze=False)))


@dataclass(frozen=True)
class Grid:
    """A figure of panels of one kind, in reading order, and the empty places at its end."""

    figure: Figure
    panels: list[Axes]
    spare: list[Axes]
    columns: int

    @property
    def bottom(self) -> list[Axes]:
        """The panels with none below them."""
        return self.panels[-self.columns :]


def new_grid(
    title: str, subtitle: str, n: int, columns: int, panel_width: float, min_width: float
) -> Grid:
    """A figure of `n` panels of 3 inches in height, at most `columns` side by side."""
    columns = min(n, columns)
    rows = -(-n // columns)
    width, height = max(min_width, panel_width * columns), 0.9 + 3.0 * rows
    figure, panels = new_figure(title, subtitle, rows, columns, width, height)
    for axes in panels[n:]:
        axes.set_axis_off()
    return Grid(figure, panels[:n], panels[n:], columns)


def title_panel(axes: Axes, title: str) -> None:
    """A small title at the left of a panel."""
    axes.set_title(title, size=10.5, loc="left", color=INK)


def shaded_line(axes: Axes, line: pd.DataFrame, x: str, **look: Any) -> None:
    """The column `mean` against `x`, with the range from `min` to `max` shaded if there is one."""
    axes.plot(line[x], line["mean"], **look)
    if (line["max"] > line["min"]).any():
        axes.fill_between(line[x], line["min"], line["max"], color=look["color"], alpha=0.2, lw=0)


def log_axis(
    axes: Axes,
    which: str,
    limits: tuple[float, float],
    write: Callable[[float], str],
    binary: bool = False,
    fewest: int = 4,
) -> None:
    """Make an axis logarithmic, with few, round ticks.

    Args:
        which: "x" or "y".
        binary: powers of two as ticks.
        fewest: how many ticks there are at least, where the range allows.
    """
    low, high = limits
    axes.set(**{f"{which}scale": "log", f"{which}lim": limits})
    axis = axes.xaxis if which == "x" else axes.yaxis
    ticks = binary_ticks(low, high) if binary else log_ticks(low, high, fewest)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FixedFormatter([write(tick) for tick in ticks]))
    axis.set_minor_locator(NullLocator())


def log_ticks(low: float, high: float, fewest: int = 4) -> list[float]:
    """Round values between low and high, 3 to 8 of them where the range allows."""
    if high / low < 4:
        values: Iterable[float] = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        return [v for v in values if low <= v <= high]
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7)):
        ticks = [m * 10.0**d for d in decades for m in mantissas if low <= m * 10.0**d <= high]
        if len(ticks) >= fewest:
            break
    return ticks[:: -(-len(ticks) // 8)]


def binary_ticks(low: float, high: float) -> list[float]:
    """Powers of two between low and high, at most 8."""
    exponents = range(int(np.ceil(np.log2(low))), int(np.floor(np.log2(high))) + 1)
    return [2.0**e for e in exponents if e % -(-len(exponents) // 8) == 0]


def margins(values: Iterable[float], share: float = 0.06) -> tuple[float, float]:
    """Limits that leave `share` of the logarithmic range free on both sides, and at least 5 %."""
    logs = np.log(np.fromiter(values, float))
    pad = max(share * float(np.ptp(logs)), 0.05)
    return float(np.exp(logs.min() - pad)), float(np.exp(logs.max() + pad))


def labels_at_ends(axes: Axes, ends: list[tuple[float, float, str]], gap: float = 0.06) -> None:
    """Name lines by small labels in a column right of their ends.

    Args:
        ends: (y, x, text) of each line; x is logarithmic.
        gap: the least distance between labels, as a share of the height of the axis.
    """
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    ends = sorted(ends)
    wanted = np.array([(y - low) / (high - low) for y, _, _ in ends])
    steps = gap * np.arange(len(ends))
    heights = np.maximum.accumulate(wanted - steps) + steps  # up, until none is too close
    heights -= np.mean(heights - wanted) if ends else 0.0
    heights = np.minimum(np.maximum(heights, steps), 1 - steps[::-1])
    for height, (y, x, text) in zip(heights, ends, strict=True):
        column = max(x for _, x, _ in ends) * (axes.get_xlim()[1] / axes.get_xlim()[0]) ** 0.04
        axes.annotate(
            text, (x, y), (column, low + height * (high - low)), va="center", size=7,
            color=MUTED, arrowprops={"arrowstyle": "-", "lw": 0.5, "color": FAINT, "shrinkA": 0},
        )  # fmt: skip


def text_at_line(axes: Axes, y: float, text: str, x: float = 0.985, above: bool = True) -> None:
    """Small text above or below a horizontal line; `x` is a share of the width of the axis, which
    the text ends at, or begins at in the left half."""
    axes.annotate(
        text, (x, y), (0, 3 if above else -3), xycoords=axes.get_yaxis_transform(),
        textcoords="offset points", ha="right" if x > 0.5 else "left",
        va="bottom" if above else "top", size=8.5, color=MUTED,
        bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1.0},  # over lines and bands
    )  # fmt: skip
