"""Launches of a suite that are alive, and the trials that each of them has in its queue.

A launch is a file ``runs/<suite>/.launches/<name>.json`` beside a lease that it holds: one whose
process has died counts no more.
"""

import json
import os
import platform
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from experiments.system.files import write_json
from experiments.system.locks import holder, holding

FOLDER = ".launches"


@contextmanager
def announced(paths: Collection[Path]) -> Iterator[None]:
    """Within it, other launches leave the configs of our waiting trials as they are.

    Args:
        paths: the run directories of the trials, which need not exist yet.
    """
    with ExitStack() as stack:
        for suite in sorted({path.parents[1] for path in paths}):
            folder = suite / FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("*.json"):  # of processes that were killed
                if holder(old.with_suffix(".lock")) is None:
                    old.unlink(missing_ok=True)
            name = folder / f"{platform.node()}-{os.getpid()}.json"
            stack.enter_context(holding(name.with_suffix(".lock")))
            write_json(name, [os.path.relpath(path, suite) for path in paths])
            stack.callback(name.unlink, missing_ok=True)
        yield


def queued_by(path: Path) -> str:
    """Which other launch has a run in its queue, in words; empty if none."""
    suite = path.parents[1]
    for file in sorted((suite / FOLDER).glob("*.json")):
        try:
            trials = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            continue
        if file.stem == f"{platform.node()}-{os.getpid()}":
            continue
        if os.path.relpath(path, suite) in trials and (who := holder(file.with_suffix(".lock"))):
            return f"in the launch by {who}"
    return ""
