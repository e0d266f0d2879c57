"""The state of a run, as its files tell it."""

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate

from experiments.config.checks import step_count
from experiments.config.entry import one_line
from experiments.runs.metrics import MetricsFile
from experiments.runs.run_dir import RunDir
from experiments.system.locks import holder

STATES = ("done", "running", "failed", "interrupted", "waiting", "damaged")


@dataclass
class State:
    """A run as its files tell it.

    Attributes:
        state: one of STATES.
        step, n_steps: optimizer steps trained, and those of the whole run; None: not known.
        step_tokens: tokens of a step.
        tokens_per_s: the speed measured last; None: never.
        detail: the result, the reason, or who is at it.
    """

    run: str
    model: str
    state: str
    step: int = 0
    n_steps: int | None = None
    step_tokens: int = 0
    tokens_per_s: float | None = None
    detail: str = ""


def state(run: RunDir) -> State:
    """Read the state of one run; damaged files are told in its detail."""
    name, model = run.name.partition("/")[2], run.path.resolve().parent.name
    try:
        result = run.result
        if result is not None:
            n = None if result.get("step") is None else int(result["step"])
            speed = result.get("perf/tokens_per_s")
            speed = None if speed is None else float(speed)
            words = ", ".join(run.summary().split(", ")[2:-1])  # what no other column says
            return State(name, model, "done", n or 0, n, 0, speed, words)
        config = quick_config(run)
        found = State(name, model, "waiting", 0, step_count(config))
        found.step_tokens = config.batch_size * config.ctx_len
        rows = MetricsFile(run.path / "metrics.csv").rows()
        found.step = int(rows[-1]["step"]) if rows else 0
        speeds = [float(row["perf/tokens_per_s"]) for row in rows if row["perf/tokens_per_s"]]
        found.tokens_per_s = speeds[-1] if speeds else None
        found.state, found.detail = unfinished(run)
    except (ValueError, ArithmeticError, KeyError, TypeError, AttributeError, OSError) as error:
        return State(name, model, "damaged", detail=one_line(error).replace(f"{run.path}/", ""))
    return found


def unfinished(run: RunDir) -> tuple[str, str]:
    """State and detail of a run without a result."""
    if who := holder(run.path):
        return "running", str(who)
    error_file = run.path / "error.txt"
    if error_file.is_file():
        text = error_file.read_text(encoding="utf-8", errors="replace")
        return "failed", text.partition("\n")[0]
    if run.has_training or run.manifest:
        return "interrupted", "the same command goes on"
    try:
        queued = json.loads((run.path / "queued.json").read_text(encoding="utf-8"))
        return "waiting", f"SLURM job {queued['job']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "waiting", ""


def quick_config(run: RunDir) -> DictConfig:
    """A frozen config, with the fast loader; it is resolved, so values are all there is.

    Raises:
        ValueError: if it is damaged.
    """
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    file = run.path / "config.yaml"
    try:
        config = OmegaConf.create(yaml.load(file.read_bytes(), loader))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not readable YAML: {error}") from None
    if not isinstance(config, DictConfig) or "budget_tokens" not in config:
        raise ValueError(f"{file} is cut off, or no config of a training")
    return config


def seconds_left(states: Sequence[State]) -> list[float | None]:
    """Seconds of training left for each run; None where its model's speed was never measured."""
    speeds: dict[str, list[float]] = {}
    for one in states:
        if one.tokens_per_s:
            speeds.setdefault(one.model, []).append(one.tokens_per_s)
    left: list[float | None] = []
    for one in states:
        typical = speeds.get(one.model)
        speed = one.tokens_per_s or (statistics.median(typical) if typical else None)
        if one.state == "done":
            left.append(0.0)
        elif speed is None or one.n_steps is None:
            left.append(None)
        else:
            left.append((one.n_steps - one.step) * one.step_tokens / speed)
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


def table(states: Sequence[State]) -> str:
    """One line a run."""
    rows = []
    for one, left in zip(states, seconds_left(states), strict=True):
        steps = f"{one.step}/{'?' if one.n_steps is None else one.n_steps}"
        speed = "" if not one.tokens_per_s else f"{one.tokens_per_s:,.0f}"
        time_left = "" if one.state in ("done", "damaged") else duration(left)
        detail = one.detail if len(one.detail) <= 100 else one.detail[:99] + "…"
        rows.append([one.run, one.state, steps, speed, time_left, detail])
    headers = ["run", "state", "steps", "tokens/s", "left", ""]
    aligned = ("left", "left", "right", "right", "right", "left")
    return tabulate(rows, headers, disable_numparse=True, colalign=aligned)


def total(states: Sequence[State]) -> str:
    """Counts of all states, and the time left for what is running or will be."""
    counts = Counter(one.state for one in states)
    text = ", ".join(f"{counts[name]} {name}" for name in STATES if counts[name])
    pairs = list(zip(states, seconds_left(states), strict=True))
    left = [s for one, s in pairs if one.state in ("running", "interrupted", "waiting")]
    if not left:
        return f"{len(states)} runs: {text}"
    known = [seconds for seconds in left if seconds is not None]
    at_once = max(1, counts["running"])
    if not known:
        return f"{len(states)} runs: {text}; time left not known yet"
    words = f"time left {duration(sum(known) / at_once)} with {at_once} at once"
    if len(known) < len(left):
        words += f", not counting {len(left) - len(known)} whose speed is not known yet"
    return f"{len(states)} runs: {text}; {words}"
