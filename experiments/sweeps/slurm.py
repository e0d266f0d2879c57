"""The trials of a sweep as jobs of submitit: of SLURM, or processes of this machine.

A job gets one thing, the run directory that it trains. Everything else is in the frozen config,
so jobs need nothing of the process that submitted them, which may end at any time. The keys of
``hydra/launcher`` are those of Hydra's submitit launcher; its ``launch`` is not used, because
it forgets all other jobs at the first one that fails, and which jobs there are when it ends.
"""

import getpass
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from omegaconf import OmegaConf

from experiments.runs.run_dir import RunDir
from experiments.runs.state import RESUMES, State, state_of
from experiments.sweeps.trial import COMMAND, By, Outcome, train_when_free
from experiments.system.files import write_json
from experiments.system.signals import REQUEUE

POLL_S = 2.0  # between two looks at results
SQUEUE_S = 15.0  # between two questions to SLURM, which has other users
GONE_S = 5.0  # a job missing for as long has ended, and what it wrote can be seen here


class Job:
    """What a job of submitit runs: one trial to its end, from where it was."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self) -> None:
        if int(os.environ.get("SLURM_PROCID", "0")) > 0:  # another rank of the same run
            os.execv(COMMAND[0], [*COMMAND, self.path])
        run = RunDir(self.path)
        outcome = train_when_free(run)
        print(f"{self.path}: {outcome.state} {outcome.detail}", flush=True)
        if outcome.exit_code == REQUEUE:
            # submitit requeues in its handler of the signal: only now, when all is saved
            import submitit

            number = signal.Signals[f"SIG{submitit.JobEnvironment.USR_SIG}"]
            signal.getsignal(number)(number, None)  # type: ignore[operator, misc]
        if outcome.state is not State.RUNNING:  # else it may be another job's
            run.queued_file.unlink(missing_ok=True)
        if outcome.exit_code:
            sys.exit(outcome.exit_code)

    def checkpoint(self) -> Any:
        """What submitit's handler of the signal submits again: the same, for the run has saved."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def executor(cluster: str, launcher: dict[str, Any]) -> Any:
    """A submitit executor ("slurm" or "local") with the settings of a ``hydra/launcher``.

    Raises:
        ValueError: if submitit does not know one of them, or there is no SLURM.
    """
    import submitit
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

    settings = {key: value for key, value in launcher.items() if value is not None}
    folder = settings.pop("submitit_folder")
    timeouts = {f"{cluster}_{k}": settings.pop(k) for k in ["max_num_timeout"] if k in settings}
    shared = OmegaConf.structured(BaseQueueConf)
    try:
        made = submitit.AutoExecutor(folder, cluster=cluster, **timeouts)
        made.update_parameters(
            **{k if k in shared else f"{cluster}_{k}": value for k, value in settings.items()}
        )
    except (RuntimeError, NameError, AssertionError) as error:
        raise ValueError(f"hydra.launcher: {str(error).splitlines()[0]}") from None
    return made


def script(n_trials: int, launcher: dict[str, Any]) -> str:
    """The script that sbatch would get for so many trials, made without asking SLURM."""
    import submitit

    class Printer(submitit.SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 1

    made = Printer(launcher["submitit_folder"])
    settings = {k: v for k, v in launcher.items() if v is not None}
    for key in ("submitit_folder", "max_num_timeout"):
        settings.pop(key, None)
    made.update_parameters(**made._convert_parameters(settings))
    if n_trials > 1:
        made.parameters["map_count"] = n_trials
    return made._make_submission_file_text(made._submitit_command_str, "dry_run")


def on_slurm(runs: Sequence[RunDir], launcher: dict[str, Any], fail_fast: bool) -> list[Outcome]:
    """Submit the runs that are not in the queue yet as one array, and wait for all."""
    jobs = {str(run.path): queued_job(run) for run in runs}
    alive = in_queue([job for job in jobs.values() if job])
    new = [run for run in runs if not jobs[str(run.path)] or jobs[str(run.path)] not in alive]
    if len(new) < len(runs):
        print(f"sweep: {len(runs) - len(new)} trials are in SLURM's queue already", flush=True)
    if new:
        for run, job in zip(new, submit("slurm", new, launcher), strict=True):
            jobs[str(run.path)] = job.job_id
            run.error_file.unlink(missing_ok=True)  # of the attempt before
            write_json(
                run.queued_file,
                {
                    "engine": "slurm",
                    "job": job.job_id,
                    "host": platform.node(),
                    "user": getpass.getuser(),
                    "time": time.strftime("%Y-%m-%d %H:%M:%S"),
                },
            )
    try:
        return wait(runs, jobs, in_queue, cancel if fail_fast else None)
    except KeyboardInterrupt:
        print(
            "sweep: the jobs continue without this process; the same command looks after them "
            "again, and scancel ends them",
            file=sys.stderr,
        )
        raise


def on_this_machine(
    runs: Sequence[RunDir], launcher: dict[str, Any], fail_fast: bool
) -> list[Outcome]:
    """All runs at once, as submitit's local processes."""
    jobs = {job.job_id: job for job in submit("local", runs, launcher)}

    def alive(some: Collection[str]) -> set[str]:
        return {job for job in some if not jobs[job].done()}

    def stop(some: Collection[str]) -> None:
        for job in some:
            jobs[job].cancel()

    ids: dict[str, str | None] = dict(zip([str(run.path) for run in runs], jobs, strict=True))
    return wait(runs, ids, alive, stop if fail_fast else None)


def submit(cluster: str, runs: Sequence[RunDir], launcher: dict[str, Any]) -> list[Any]:
    """One job a trial; on SLURM an array.

    Raises:
        ValueError: if the cluster refuses them.
    """
    import submitit

    queue = executor(cluster, launcher)
    try:
        with queue.batch():
            jobs = [queue.submit(Job(str(run.path))) for run in runs]
    except submitit.core.utils.FailedJobError as error:
        raise ValueError(f"sbatch: {' '.join(str(error).split())}") from None
    first = jobs[0].job_id.partition("_")[0]
    print(f"sweep: {len(jobs)} trials submitted, job {first}; logs: {jobs[0].paths.folder.parent}")
    sys.stdout.flush()
    return jobs


def queued_job(run: RunDir) -> str | None:
    """The SLURM job that a run was last submitted as, or None."""
    try:
        return str(json.loads(run.queued_file.read_text(encoding="utf-8"))["job"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None  # damaged: it is submitted again, and of two jobs the lock stops one


def in_queue(jobs: Collection[str]) -> set[str]:
    """Those of the jobs that SLURM has: waiting, running, or between two starts.

    If SLURM does not answer, all of them: nothing is known to have ended.
    """
    if not jobs:
        return set()
    numbers = sorted({job.partition("_")[0] for job in jobs})
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={','.join(numbers)}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return set(jobs)
    if answer.returncode:
        gone = "Invalid job id" in answer.stderr  # so it says if it knows none of them any more
        return set() if gone else set(jobs)
    return set(answer.stdout.split()) & set(jobs)


def cancel(jobs: Collection[str]) -> None:
    """End jobs; a running one saves first."""
    subprocess.run(["scancel", "--quiet", *jobs], timeout=60)


def wait(
    runs: Sequence[RunDir],
    jobs: dict[str, str | None],
    alive: Callable[[Collection[str]], set[str]],
    cancel_others: Callable[[Collection[str]], None] | None = None,
) -> list[Outcome]:
    """Look after jobs until each of their runs has an outcome; in the order of the runs.

    Args:
        jobs: the job of each run, by its path.
        alive: which of some jobs have not ended.
        cancel_others: what is done with the jobs that are left when a trial fails.
    """
    outcomes: dict[str, Outcome] = {}
    missing_since: dict[str, float] = {}
    asked = float("-inf")
    while True:
        left = [run for run in runs if str(run.path) not in outcomes]
        if time.monotonic() - asked >= (GONE_S if missing_since else SQUEUE_S):
            living = alive([job for run in left if (job := jobs[str(run.path)])])
            asked = time.monotonic()
            missing = [str(run.path) for run in left if jobs[str(run.path)] not in living]
            missing_since = {path: missing_since.get(path, asked) for path in missing}
        for run in left:
            path = str(run.path)
            if not run.finished and asked - missing_since.get(path, asked) < GONE_S:
                continue
            outcomes[path] = outcome = outcome_of(run, jobs[path])
            print(f"{run.name}: {outcome.state} {outcome.detail}".rstrip(), flush=True)
            if outcome.state is State.FAILED and cancel_others and len(outcomes) < len(runs):
                cancel_others([job for p, job in jobs.items() if p not in outcomes and job])
                cancel_others = None
        if len(outcomes) == len(runs):
            return [outcomes[str(run.path)] for run in runs]
        time.sleep(POLL_S)


def outcome_of(run: RunDir, job: str | None) -> Outcome:
    """What a trial whose job has ended came to, by what is in its directory."""
    path = str(run.path)
    state, detail = state_of(run)
    if state is State.DONE:
        run.queued_file.unlink(missing_ok=True)
        return Outcome(path, state, detail)
    if state is State.RUNNING:
        return Outcome(path, state, f"another process is at {path} ({detail})", by=By.OTHERS)
    if state is State.FAILED:
        return Outcome(path, state, detail, 1)
    return Outcome(path, State.INTERRUPTED, f"job {job} ended before it; {RESUMES}", 1)
