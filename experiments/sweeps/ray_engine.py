"""The trials of a sweep as tasks of Ray: on this machine, or on a cluster that shares the folders.

Hydra has a Ray launcher. It is not used: it forgets all other trials when one worker dies, and it
wants boto3 and an older cloudpickle.
"""

import os
from collections.abc import Sequence
from typing import Any

from experiments.runs.run_dir import RunDir
from experiments.runs.state import State
from experiments.sweeps.trial import Outcome, train_when_free


def launch(trials: Sequence[RunDir], launcher: dict[str, Any], fail_fast: bool) -> list[Outcome]:
    """Train trials as tasks of Ray and wait for them; the outcomes in the order of the trials.

    A task whose worker dies is tried again by Ray, from the last checkpoint. If this process ends,
    Ray ends its tasks, which save first.

    Args:
        launcher: under ``ray``, the arguments of ``ray.init`` and ``ray.remote``; `num_gpus` null
            is one where there is any.
        fail_fast: if a trial fails, the others are asked to save and stop.

    Raises:
        ValueError: if Ray is not installed, not to be reached, or has not what a task asks for.
    """
    init, remote = launcher["ray"]["init"], launcher["ray"]["remote"]
    try:
        import ray
    except ImportError:
        raise ValueError("hydra/launcher=ray needs Ray: pip install -e '.[ray]'") from None
    try:
        ray.init(**init)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"Ray cannot be reached with {init}: {str(error).splitlines()[0]}"
        ) from None
    try:
        has = ray.cluster_resources()
        if remote.get("num_gpus") is None:
            remote = {**remote, "num_gpus": 1 if has.get("GPU") else 0}
        for name, key in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
            if (remote.get(key) or 0) > has.get(name, 0):
                raise ValueError(
                    f"hydra.launcher.ray.remote.{key} is {remote[key]}, but the cluster has "
                    f"{has.get(name, 0):g}"
                )
        task = ray.remote(**remote)(train)
        folder = os.getcwd()
        tasks = {task.remote(folder, str(run.path)): run for run in trials}
        return collect(tasks, fail_fast)
    finally:
        ray.shutdown()


def train(folder: str, path: str) -> Outcome:
    """What a worker runs: one trial, with paths as where the sweep was started."""
    os.chdir(folder)
    return train_when_free(RunDir(path))


def collect(tasks: dict[Any, RunDir], fail_fast: bool) -> list[Outcome]:
    """Wait for all tasks; one that Ray gave up is a failed trial."""
    import ray

    outcomes: dict[Any, Outcome] = {}
    left = list(tasks)
    while left:
        ended, left = ray.wait(left)
        for one in ended:
            run = tasks[one]
            try:
                outcome = ray.get(one)
            except ray.exceptions.TaskCancelledError:
                outcome = Outcome(str(run.path), State.INTERRUPTED, "fail_fast: never started", 1)
            except ray.exceptions.RayError as error:
                outcome = Outcome(
                    str(run.path), State.FAILED, f"Ray: {str(error).splitlines()[0]}", 1
                )
            outcomes[one] = outcome
            print(f"{run.name}: {outcome.state} {outcome.detail}".rstrip(), flush=True)
            if outcome.state is State.FAILED and fail_fast:
                for other in left:
                    ray.cancel(other)
    return [outcomes[one] for one in tasks]
