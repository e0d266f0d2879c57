"""Trials as jobs: what SLURM is told and asked, what a job does, what an ended one came to.

The programs of SLURM are stand-ins here; ``make slurm`` runs the real ones.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig

from experiments.config.entry import CONF_DIR, one_line
from experiments.runs.run_dir import RunDir
from experiments.runs.state import State
from experiments.sweeps import engines, slurm, trial
from experiments.sweeps.trial import COMMAND, Outcome
from experiments.system.files import write_json
from experiments.system.locks import lease

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def trials(tmp_path: Path) -> list[RunDir]:
    runs = []
    for name in ("a", "b", "c"):
        folder = tmp_path / "runs" / "s" / name / "seed=0"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("seed: 0\n")
        runs.append(RunDir(folder))
    return runs


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLL_S", "SQUEUE_S", "GONE_S"):
        monkeypatch.setattr(slurm, name, 0.02)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a shell script on the PATH; what it was called with goes into calls.txt."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def put(name: str, body: str) -> None:
        log = tmp_path / "calls.txt"
        (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >>{log}\n{body}\n')
        (folder / name).chmod(0o755)

    return put


def config(tmp_path: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        given = [f"paths.runs={tmp_path / 'runs'}", "suite=s", *overrides]
        composed = compose("train", overrides=given, return_hydra_config=True)
    composed.hydra.job.name = "train"  # hydra.main sets it
    return composed


def finish(run: RunDir) -> None:
    result = {"step": 1, "tokens": 2, "val/loss": 3.0, "val/bpb": None, "time_s": 1.0}
    write_json(run.path / "result.json", result | {"perf/tokens_per_s": 1.0})


def test_a_dry_run_prints_the_script_and_needs_no_slurm(
    tmp_path: Path, trials: list[RunDir], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    settings = ["gpus_per_node=2", "tasks_per_node=2", "timeout_min=90", "partition=long"]
    given = ["dry_run=true", "hydra/launcher=slurm", *(f"hydra.launcher.{s}" for s in settings)]
    outcomes = engines.launch(trials, config(tmp_path, *given))
    assert [outcome.state for outcome in outcomes] == [State.WAITING] * 3
    printed = capsys.readouterr().out
    for line in (
        "array=0-2%3",
        "time=90",
        "partition=long",
        "gpus-per-node=2",
        "ntasks-per-node=2",
        "requeue",
        "signal=USR2@120",
        "job-name=s",
    ):
        assert f"#SBATCH --{line}\n" in printed
    assert all(f"would submit {run.path}\n" in printed for run in trials)
    assert not any((run.path / "queued.json").exists() for run in trials)


def test_other_launchers_and_settings_are_refused_in_a_line(
    tmp_path: Path,
    trials: list[RunDir],
    program: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = config(tmp_path)
    other.hydra.launcher = {"_target_": "hydra_plugins.joblib.JoblibLauncher"}
    with pytest.raises(ValueError, match="JoblibLauncher is not supported: use slurm, ray"):
        engines.launch(trials, other)
    on_slurm = config(tmp_path, "hydra/launcher=slurm")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        with pytest.raises(ValueError, match="srun"):
            engines.launch(trials, on_slurm)
    program("squeue", "exit 0")
    program("srun", "exit 0")
    program("sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    with pytest.raises(ValueError, match=r"sbatch: .*invalid partition specified: x"):
        engines.launch(trials, on_slurm)


def test_a_launcher_whose_package_is_missing_is_a_line() -> None:
    with pytest.raises(HydraException) as caught:
        config(Path(), "hydra/launcher=submitit_none")
    assert "pip install -e '.[slurm]'" in one_line(caught.value)


@pytest.mark.usefixtures("_quick")
def test_trials_are_submitted_once_and_looked_after_by_every_launch(
    tmp_path: Path, trials: list[RunDir], program: Callable[[str, str], None]
) -> None:
    (trials[0].path / "error.txt").write_text("of the attempt before\n")
    (trials[2].path / "queued.json").write_text('{"job": ')  # damaged
    queue = tmp_path / "queue.txt"
    program("squeue", f"cat {queue}")
    program("srun", "exit 0")
    program("sbatch", f"printf '7_0\\n7_1\\n7_2\\n' >{queue}; echo Submitted batch job 7")

    class Killed(BaseException):
        """Our process dies while it waits."""

    def die(seconds: float) -> None:
        raise Killed

    queue.write_text("")
    given = config(tmp_path, "hydra/launcher=slurm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", die)
        with pytest.raises(Killed):
            engines.launch(trials, given)
    assert [slurm.queued_job(run) for run in trials] == ["7_0", "7_1", "7_2"]
    assert not (trials[0].path / "error.txt").exists()
    for run in trials:
        finish(run)
    outcomes = engines.launch(trials, given)
    assert [outcome.state for outcome in outcomes] == [State.DONE] * 3
    calls = (tmp_path / "calls.txt").read_text()
    assert calls.count("sbatch ") == 1
    assert not any((run.path / "queued.json").exists() for run in trials)


def test_a_trial_in_training_outside_the_queue_is_left_to_it(
    tmp_path: Path, trials: list[RunDir]
) -> None:
    with trials[0].lock():
        (outcome,) = engines.launch(trials[:1], config(tmp_path, "hydra/launcher=slurm"))
    assert outcome.state is State.RUNNING


def test_what_the_queue_says(program: Callable[[str, str], None]) -> None:
    jobs = {"7_0", "7_1", "9"}
    program("squeue", "printf '7_1\\n7_4\\n9\\n'")
    assert slurm.in_queue(jobs) == {"7_1", "9"}
    program("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert slurm.in_queue(jobs) == set()
    program("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm' >&2; exit 1")
    assert slurm.in_queue(jobs) == jobs


@pytest.mark.usefixtures("_quick")
def test_ended_jobs_are_judged_by_what_they_left(trials: list[RunDir]) -> None:
    done, bad, lost = trials
    finish(done)
    (bad.path / "error.txt").write_text("out of memory: halve it\n\nTraceback\n")
    cancelled: list[str] = []

    def alive(jobs: Collection[str]) -> set[str]:
        return {"3"} & set(jobs) - set(cancelled)

    ids: dict[str, str | None] = dict(zip((str(run.path) for run in trials), "123", strict=True))
    outcomes = slurm.wait(trials, ids, alive, cancelled.extend)
    assert [outcome.state for outcome in outcomes] == ["done", "failed", "interrupted"]
    assert outcomes[1].detail == "out of memory: halve it"
    assert cancelled == ["3"]
    with lost.lock():
        assert slurm.outcome_of(lost, "3").state is State.RUNNING


class Requeued(BaseException):
    """Stands for submitit's handler, which asks SLURM and ends the process."""


def test_a_job_asks_for_its_requeue_when_the_run_has_saved(
    trials: list[RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(trials[0].path)
    ends = [
        Outcome(path, State.RUNNING),
        Outcome(path, State.INTERRUPTED, exit_code=75),
        Outcome(path, State.INTERRUPTED, exit_code=143),
        Outcome(path, State.FAILED, exit_code=1),
        Outcome(path, State.DONE),
    ]
    monkeypatch.setattr(trial, "train_trial", lambda run, stops, **kwargs: ends.pop(0))
    queued = trials[0].path / "queued.json"
    queued.write_text("{}")

    def submitits(number: int, frame: object) -> None:
        raise Requeued

    previous = signal.signal(signal.SIGUSR2, submitits)
    try:
        with pytest.raises(Requeued):  # after another job of it let go
            slurm.Job(path)()
    finally:
        signal.signal(signal.SIGUSR2, previous)
    assert queued.exists()
    for code in (143, 1):
        with pytest.raises(SystemExit) as end:
            slurm.Job(path)()
        assert end.value.code == code
    assert not queued.exists()
    slurm.Job(path)()
    assert slurm.Job(path).checkpoint().function.path == path


def test_other_ranks_of_a_job_become_the_run(
    trials: list[RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    became: list[list[str]] = []
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setattr(os, "execv", lambda program, words: became.append(words))
    monkeypatch.setattr(slurm, "train_when_free", lambda run: Outcome(str(run.path), State.DONE))
    slurm.Job(str(trials[0].path))()
    assert became == [[*COMMAND, str(trials[0].path)]]


def test_ray_that_is_not_there_is_a_line(
    tmp_path: Path, trials: list[RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[ray\]'"):
        engines.launch(trials, config(tmp_path, "hydra/launcher=ray"))


@pytest.mark.slow
def test_a_sweep_through_submitit_survives_a_preemption(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(2000)))
    given = [
        "data=text",
        "debug=smoke",
        "trainer=cpu",
        "execution.n_threads=1",
        f"data.source.paths={text}",
        "data.val_tokens=500",
        f"paths.runs={tmp_path / 'runs'}",
        f"paths.data={tmp_path / 'data'}",
        "model=rwkv4,gpt",
        "size=pico",
        "budget_tokens=60000",
    ]
    command = [sys.executable, "-m", "experiments.train", "-m", "hydra/launcher=submitit_local"]
    sweep = subprocess.Popen([*command, *given], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    submitted = tmp_path / "runs" / "debug" / ".submitit"
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("runs/debug/rwkv4_pico/*/metrics.csv")):
            assert time.monotonic() < deadline
            assert sweep.poll() is None
            time.sleep(0.05)
        (lock,) = tmp_path.glob("runs/debug/rwkv4_pico/*/.lock")
        pid = lease(lock).pid
        assert pid is not None
        os.kill(pid, signal.SIGUSR2)
        printed, _ = sweep.communicate(timeout=200)
    finally:
        sweep.kill()
    assert sweep.returncode == 0, printed
    assert "2 trained" in printed
    logs = "".join(log.read_text() for log in submitted.glob("*/*_log.out"))
    assert logs.count("interrupted stopped") == 1
    assert len(list(tmp_path.glob("runs/debug/*/*/result.json"))) == 2
