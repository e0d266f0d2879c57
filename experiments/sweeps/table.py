"""The table of a suite's runs: how far each is, and the time left."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence

from tabulate import tabulate

from experiments.runs.state import Progress, State

OPEN = (State.RUNNING, State.INTERRUPTED, State.QUEUED, State.WAITING)  # there is time left


def seconds_left(runs: Sequence[Progress]) -> list[float | None]:
    """Seconds of training left for each run; None where its model's speed was never measured."""
    speeds = defaultdict(list)
    for run in runs:
        if run.tokens_per_s:
            speeds[run.model].append(run.tokens_per_s)
    left: list[float | None] = []
    for run in runs:
        known = speeds.get(run.model)
        speed = run.tokens_per_s or (statistics.median(known) if known else None)
        tokens = run.tokens_left
        left.append(0.0 if tokens == 0 else tokens / speed if tokens and speed else None)
    return left


def duration(seconds: float | None) -> str:
    """Seconds in words: 40 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if seconds is None:
        return "?"
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def table(runs: Sequence[Progress]) -> str:
    """One line a run."""
    rows = []
    for run, left in zip(runs, seconds_left(runs), strict=True):
        steps = f"{run.step}/{'?' if run.n_steps is None else run.n_steps}"
        speed = "" if not run.tokens_per_s else f"{run.tokens_per_s:,.0f}"
        time_left = duration(left) if run.state in (*OPEN, State.FAILED) else ""
        detail = run.detail if len(run.detail) <= 100 else run.detail[:99] + "…"
        rows.append([run.run, run.state, steps, speed, time_left, detail])
    headers = ["run", "state", "steps", "tokens/s", "left", ""]
    aligned = ("left", "left", "right", "right", "right", "left")
    return tabulate(rows, headers, disable_numparse=True, colalign=aligned)


def total(runs: Sequence[Progress]) -> str:
    """Counts of all states, and the time left for what is running or will be."""
    counts = Counter(run.state for run in runs)
    text = ", ".join(f"{counts[state]} {state}" for state in State if counts[state])
    pairs = zip(runs, seconds_left(runs), strict=True)
    left = [seconds for run, seconds in pairs if run.state in OPEN]
    known = [seconds for seconds in left if seconds is not None]
    if not left:
        return f"{len(runs)} runs: {text}"
    if not known:
        return f"{len(runs)} runs: {text}; time left not known yet"
    at_once = max(1, counts[State.RUNNING])
    words = f"time left {duration(sum(known) / at_once)} with {at_once} at once"
    if len(known) < len(left):
        words += f", not counting {len(left) - len(known)} whose speed is not known yet"
    return f"{len(runs)} runs: {text}; {words}"
