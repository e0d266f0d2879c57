"""How numbers and names are written, in tables and on axes; one fixed colour per family."""

import math

FAMILY_NAMES = {"rwkv4": "RWKV-4", "gpt": "GPT"}
# Okabe and Ito's colours, told apart with any colour vision
FAMILY_COLORS = {"rwkv4": "#0072B2", "gpt": "#D55E00"}
SPARE_COLORS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MISSING = "–"


def family_name(family: str) -> str:
    """The name readers know; a family without one keeps its own."""
    return FAMILY_NAMES.get(family, family)


def family_color(family: str) -> str:
    """A family's colour, the same in every figure and every report."""
    if family in FAMILY_COLORS:
        return FAMILY_COLORS[family]
    return SPARE_COLORS[sum(family.encode()) % len(SPARE_COLORS)]


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


def fixed(x: float, digits: int = 3) -> str:
    """A number with a fixed number of decimals, or a dash."""
    return f"{x:.{digits}f}" if math.isfinite(x) else MISSING


def number(x: float) -> str:
    """A score: four decimals, two for what is ten or more (a perplexity)."""
    return fixed(x, 4 if abs(x) < 10 else 2)


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


def text(value: object) -> str:
    """A value as it is, or a dash for none."""
    return MISSING if value is None or value != value else str(value)
