"""How figures look: titles, ticks on logarithmic axes, a colour per family, a shade per size."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from analysis import formats as fmt

DPI = 150
INK, MUTED, FAINT, GRID = "#222222", "#666666", "#9a9a9a", "#e4e4e4"
MARKERS = {"rwkv4": "o", "gpt": "s"}
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


def shade(family: str, rank: int, n: int) -> tuple[float, float, float]:
    """The family's colour, lighter for smaller sizes: `rank` 0 is the smallest of n."""
    weight = 1.0 if n == 1 else 0.35 + 0.65 * rank / (n - 1)
    red, green, blue = (1 - weight * (1 - c) for c in to_rgb(fmt.family_color(family)))
    return red, green, blue


def marker(family: str) -> str:
    """A family's marker, so that families differ in print without colour too."""
    return MARKERS.get(family, "D")


def log_axis(
    axes: Axes,
    which: str,
    low: float,
    high: float,
    write: Callable[[float], str],
    binary: bool = False,
    fewest: int = 4,
) -> None:
    """Make the "x" or "y" axis logarithmic from `low` to `high` with few, round ticks (powers
    of two if `binary`), `fewest` where the range allows."""
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(low, high)
    axis = getattr(axes, f"{which}axis")
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


def labels_at_ends(axes: Axes, ends: list[tuple[float, float, str]], gap: float = 0.06) -> None:
    """Name lines by small labels in a column right of their ends, (y, x, text) each, at least `gap`
    of the axis' height apart and within the axis, a hair from each to the end it names."""
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


def margins(values: Iterable[float], share: float = 0.06) -> tuple[float, float]:
    """Limits that leave `share` of the logarithmic range free on both sides, and at least 5 %."""
    logs = np.log(np.fromiter(values, float))
    pad = max(share * float(np.ptp(logs)), 0.05)
    return float(np.exp(logs.min() - pad)), float(np.exp(logs.max() + pad))


def power_of_ten(x: float) -> str:
    """A tick like 10^13 or 3 x 10^13."""
    power = int(np.floor(np.log10(x) + 1e-9))
    mantissa = x / 10**power
    head = "" if abs(mantissa - 1) < 1e-6 else rf"{mantissa:.3g}{{\times}}"
    return rf"${head}10^{{{power}}}$"
