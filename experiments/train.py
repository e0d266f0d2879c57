"""Train one run, or with ``-m`` (or an experiment's own grid) many.

Every run is frozen into its directory first and trained in a fresh process from there. The same
command again skips what is finished, goes on with what is not, and refuses what differs.
"""

import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments.entry import entry, one_line
from experiments.run_dir import RunDir


@dataclass
class Outcome:
    """How one job of a sweep ended."""

    run: str
    status: str  # done, skipped, failed
    detail: str = ""
    exit_code: int = 0


def train(cfg: DictConfig, overrides: Sequence[str]) -> Outcome:
    """Bring one run to its end, in a process of its own.

    Raises:
        ValueError: if the run cannot be frozen, or its folder belongs to another config.
        KeyboardInterrupt: if it was stopped by a signal.
    """
    run = RunDir.freeze(cfg, overrides)
    if run.finished:
        print(f"{run.name}: finished already", flush=True)
        return Outcome(str(run.path), "skipped")
    code = run_child([sys.executable, "-m", "experiments.fit", str(run.path)])
    if code == 0:
        return Outcome(str(run.path), "done")
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise KeyboardInterrupt
    reason = f"training ended with exit code {code}"
    error_file = run.path / "error.txt"
    if error_file.is_file():  # its first line; the process has printed it too
        reason = error_file.read_text(encoding="utf-8").partition("\n")[0]
    if code == 2 and not run.has_training:
        shutil.rmtree(run.path)  # bad input, nothing trained: leave nothing behind
    return Outcome(str(run.path), "failed", reason, code)


def run_child(command: list[str]) -> int:
    """Run a command to its end and return its exit code; it is told of our SIGTERM."""
    child = subprocess.Popen(command)
    previous = signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(number))
    try:
        return child.wait()
    except KeyboardInterrupt:  # the terminal told the child too; it saves and leaves
        return child.wait()
    finally:
        signal.signal(signal.SIGTERM, previous)


class SweepReport(Callback):
    """Lists how the jobs of a multirun ended; leaves with exit code 1 if one failed."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if job_return.status == JobStatus.COMPLETED and isinstance(
            job_return.return_value, Outcome
        ):
            self.outcomes.append(job_return.return_value)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        counts = {s: [o for o in self.outcomes if o.status == s] for s in ("done", "skipped")}
        failed = [o for o in self.outcomes if o.status == "failed"]
        print(
            f"sweep: {len(counts['done'])} trained, {len(counts['skipped'])} finished before, "
            f"{len(failed)} failed"
        )
        for outcome in failed:
            print(f"  failed: {outcome.run}: {outcome.detail}", file=sys.stderr)
        if failed:
            sys.exit(1)


@entry("train")
def main(cfg: DictConfig) -> Outcome:
    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    if hydra.mode == RunMode.MULTIRUN:
        try:
            return train(cfg, overrides)
        except (ValueError, OSError) as error:  # the other jobs go on
            label = ",".join(overrides)
            print(f"error: {label}: {one_line(error)}", file=sys.stderr, flush=True)
            return Outcome(label, "failed", one_line(error))
    outcome = train(cfg, overrides)
    if outcome.exit_code:
        sys.exit(outcome.exit_code)
    return outcome


if __name__ == "__main__":
    main()
