"""Launches of a suite that are alive, and the cells that each of them has in its queue.

A launch is a folder ``runs/<suite>/.launches/<name>/`` which it claims as runs are claimed, so one
whose process has died counts no more.
"""

import json
import os
import platform
import shutil
from collections.abc import Collection
from pathlib import Path

from experiments.runs.run_dir import RunDir
from experiments.system.files import write_json
from experiments.system.locks import Claim, holder


class Launch:
    """Within it, other launches leave the configs of its waiting cells as they are.

    Args:
        paths: the run directories of its cells, which need not exist yet.
    """

    def __init__(self, paths: Collection[Path]) -> None:
        self.claims: list[Claim] = []
        for suite in sorted({path.parents[1] for path in paths}):
            folder = suite / ".launches" / f"{platform.node()}-{os.getpid()}"
            for old in suite.glob(".launches/*/"):  # of processes that were killed
                if (old / "cells.json").is_file() and holder(old) is None:
                    shutil.rmtree(old, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            self.claims.append(Claim.take(folder, training=False))
            cells = [os.path.relpath(path, suite) for path in paths if path.parents[1] == suite]
            write_json(folder / "cells.json", cells)

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *error: object) -> None:
        for claim in self.claims:
            claim.release()
            shutil.rmtree(claim.folder, ignore_errors=True)

    def queued_by(self, path: Path) -> str:
        """Who else has a run in a queue, in words; empty if nobody."""
        suite = path.parents[1]
        mine = [claim.folder for claim in self.claims]
        for folder in sorted(suite.glob(".launches/*/")):
            try:
                cells = json.loads((folder / "cells.json").read_text(encoding="utf-8"))
            except (FileNotFoundError, ValueError):
                continue
            if folder in mine or os.path.relpath(path, suite) not in cells:
                continue
            if who := holder(folder):
                return f"in the launch by {who}"
        if (path / "queued.json").is_file():
            from experiments.sweeps.cluster import in_queue, queued_job

            job = queued_job(RunDir(path))
            if job and job in in_queue([job]):
                return f"in SLURM's queue as job {job}"
        return ""
