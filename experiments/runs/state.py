"""The one state of a run, as its files say it: for sweeps, engines, status and (mirrored) analysis.

Nothing in a run directory is changed or kept from changing.
"""

from dataclasses import dataclass
from enum import StrEnum

from experiments.config.checks import step_count
from experiments.config.entry import one_line
from experiments.runs.metrics import MetricsFile
from experiments.runs.run_dir import RunDir, read_json


class State(StrEnum):
    """What a run directory stands for."""

    DONE = "done"
    RUNNING = "running"  # a process holds it
    FAILED = "failed"
    INTERRUPTED = "interrupted"  # training began, and the same command resumes it
    QUEUED = "queued"  # a job of a cluster will train it
    WAITING = "waiting"  # only frozen
    DAMAGED = "damaged"


RESUMES = "the same command resumes it"


def state_of(run: RunDir, launching: bool = False) -> tuple[State, str]:
    """The state of a run, and its result, its reason or who is at it in words.

    Args:
        launching: we hold its launch file ourselves, so only a process that trains it counts.

    Raises:
        ValueError: if a file that says so is damaged.
    """
    if run.finished:
        return State.DONE, run.summary()
    if who := run.trainer() if launching else run.holder():
        return State.RUNNING, str(who)
    if reason := run.error():
        return State.FAILED, reason
    if run.has_training or run.manifest:
        return State.INTERRUPTED, RESUMES
    if queued := read_json(run.queued_file):
        return State.QUEUED, f"SLURM job {queued.get('job')}"
    return State.WAITING, ""


@dataclass
class Progress:
    """A run's state and how far it is.

    Attributes:
        step, n_steps: optimizer steps trained, and those of the whole run; None: not known.
        step_tokens: tokens of a step.
        tokens_per_s: the speed measured last; None: never.
        detail: the result, the reason, or who is at it.
    """

    run: str
    model: str
    state: State
    step: int = 0
    n_steps: int | None = None
    step_tokens: int = 0
    tokens_per_s: float | None = None
    detail: str = ""

    @property
    def tokens_left(self) -> float | None:
        """Tokens still to be trained; None: not known."""
        if self.state is State.DONE:
            return 0.0
        return None if self.n_steps is None else (self.n_steps - self.step) * self.step_tokens


def progress_of(run: RunDir) -> Progress:
    """Read how far one run is; damaged files are reported in its detail."""
    found = Progress(run.name.partition("/")[2], run.path.resolve().parent.name, State.DAMAGED)
    try:
        found.state, found.detail = state_of(run)
        if found.state is State.DONE:
            result = run.result or {}
            found.step = int(result.get("step") or 0)
            found.n_steps = None if result.get("step") is None else found.step
            speed = result.get("perf/tokens_per_s")
            found.tokens_per_s = None if speed is None else float(speed)
            found.detail = ", ".join(found.detail.split(", ")[2:-1])  # what no other column says
            return found
        config = run.config
        found.n_steps = step_count(config)
        found.step_tokens = config.batch_size * config.ctx_len
        rows = MetricsFile(run.metrics_file).rows()
        found.step = int(rows[-1]["step"]) if rows else 0
        speeds = [float(row["perf/tokens_per_s"]) for row in rows if row["perf/tokens_per_s"]]
        found.tokens_per_s = speeds[-1] if speeds else None
    except (ValueError, ArithmeticError, KeyError, TypeError, AttributeError, OSError) as error:
        found.state = State.DAMAGED
        found.detail = one_line(error).replace(f"{run.path}/", "")
    return found
