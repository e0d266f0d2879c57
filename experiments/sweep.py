"""What a sweep knows of its jobs: how each ended, told when all have."""

import sys
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from experiments.cell import Outcome


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
