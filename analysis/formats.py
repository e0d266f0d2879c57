"""How numbers are written, in tables and on axes."""

import math
from collections.abc import Callable

import numpy as np

MISSING = "–"


def short(x: float, units: str = " k M B T", base: float = 1000.0, digits: int = 3) -> str:
    """A count as a reader would say it: 1234567 -> 1.23M."""
    if not math.isfinite(x):
        return MISSING
    names = units.split(" ")
    power = 0
    while power < len(names) - 1 and abs(x) / base**power >= base - 0.5:
        power += 1
    value = x / base**power
    text = f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"
    return text + names[power]


def flops(x: float) -> str:
    """FLOPs with an SI prefix: 3.2e13 -> 32T."""
    return short(x, " k M G T P E")


def size_bytes(x: float) -> str:
    """Bytes with a binary prefix: 1536 -> 1.5 KiB."""
    text = short(x, " Ki Mi Gi Ti", 1024.0)
    digits = text.rstrip("KMGTi")
    return text if text == MISSING else f"{digits} {text[len(digits) :]}B"


def seconds(x: float) -> str:
    """A duration: 0.012 s, 34 s, 12 min, 3.4 h."""
    if not math.isfinite(x):
        return MISSING
    if x < 120:
        return f"{x:.3g} s"
    return f"{x / 60:.3g} min" if x < 7200 else f"{x / 3600:.3g} h"


def fixed(x: float, digits: int = 3, sign: str = "") -> str:
    """A number with a fixed number of decimals, or a dash."""
    return f"{x:{sign}.{digits}f}" if math.isfinite(x) else MISSING


def fixed4(x: float) -> str:
    """A loss or score: four decimals, or a dash."""
    return fixed(x, 4)


def number(x: float) -> str:
    """A score: four decimals, two for what is ten or more (a perplexity)."""
    return fixed(x, 4 if abs(x) < 10 else 2)


def rate(x: float) -> str:
    """A learning rate, or a dash."""
    return f"{x:g}" if x > 0 else MISSING


def documents(n: float, is_subset: object) -> str:
    """How many documents a score is over, and whether the official split has more."""
    return f"{n:.0f}" + (" (subset)" if is_subset in {True} else "") if n > 0 else MISSING


def percent(x: float) -> str:
    """A share in per cent."""
    return f"{100 * x:.1f} %" if math.isfinite(x) else MISSING


def interval(x: float, low: float, high: float, digits: int = 3, sign: str = "") -> str:
    """A value and its interval; the value alone where there is none."""
    text = f"{x:{sign}.{digits}f}"
    if math.isfinite(low) and math.isfinite(high):
        text += f" [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"
    return text


def plus_minus(x: float, error: float, write: Callable[[float], str]) -> str:
    """A value and its standard error; the value alone where there is none."""
    return write(x) + (f" ± {write(error)}" if math.isfinite(error) else "")


def text(value: object) -> str:
    """A value as it is, or a dash for none."""
    return MISSING if value in {None, ""} or value != value else str(value)


def threads(n: float) -> str:
    """A number of threads."""
    return f"{text(n)} thread{'' if n == 1 else 's'}"


def power_of_ten(x: float) -> str:
    """A tick like 10^13 or 3 x 10^13."""
    power = int(np.floor(np.log10(x) + 1e-9))
    mantissa = x / 10**power
    head = "" if abs(mantissa - 1) < 1e-6 else rf"{mantissa:.3g}{{\times}}"
    return rf"${head}10^{{{power}}}$"
