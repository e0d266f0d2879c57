"""Sweeps on a real SLURM of one node: ``make slurm``, as root, with Debian's packages.

Time limits, preemption, cancelled jobs and killed launchers change no bit of any weight.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.sweeps.slurm import in_queue, queued_job

from .conftest import ROOT, Sweep, assert_same, wait_for

HERE = Path(__file__).parent
N_TOKENS = 5_000_000  # of a trial: more than fits into a minute, the shortest limit that SLURM has


@pytest.fixture(scope="module", autouse=True)
def _slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([HERE / "slurm_up", folder], check=True, timeout=60)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        yield
    finally:
        subprocess.run([HERE / "slurm_down", folder], check=True, timeout=60)
        del os.environ["SLURM_CONF"]


@pytest.fixture(scope="module")
def limit_min() -> int:
    """A time limit in which a run starts, but does not end. SLURM has none below a minute."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", "import experiments.fit"], check=True, cwd=ROOT)
    return 1 if time.monotonic() - start < 10 else 3


def requeues(sweep: Sweep, suite: str) -> int:
    logs = sweep.folder.glob(f"runs/{suite}/.submitit/*/*_log.out")
    return sum(log.read_text().count("Requeued job") for log in logs)


def test_a_time_limit_requeues_trials_until_they_are_done(sweep: Sweep, limit_min: int) -> None:
    start = time.monotonic()
    limit = [f"hydra.launcher.timeout_min={limit_min}", "hydra.launcher.signal_delay_s=15"]
    code = sweep.run("limited", "hydra/launcher=slurm", *limit)
    n = requeues(sweep, "limited")
    print(f"\nlimit of {limit_min} min: {time.monotonic() - start:.0f} s, {n} requeues")
    assert code == 0, sweep.printed("limited")
    assert n > 0
    assert "4 trained" in sweep.printed("limited")
    assert_same(sweep.trials("limited"), sweep.trials("quiet"))


def test_killed_launcher_preempted_and_cancelled_jobs(sweep: Sweep) -> None:
    start = time.monotonic()
    first = sweep.start("hurt", "hydra/launcher=slurm")

    def training() -> list[str]:
        return [
            str(queued_job(r)) for r in sweep.trials("hurt") if (r.path / "metrics.csv").exists()
        ]

    try:
        wait_for(lambda: len(training()) == 2)
    finally:
        first.kill()
        first.wait()
    preempted, cancelled = training()
    subprocess.run(["scontrol", "requeue", preempted], check=True)
    again = sweep.start("hurt", "hydra/launcher=slurm")
    try:
        wait_for(lambda: "4 trials are in SLURM's queue already" in sweep.printed("hurt"))
        subprocess.run(["scancel", cancelled], check=True)
        code = again.wait(timeout=3600)
    finally:
        again.kill()
    assert code == 1, sweep.printed("hurt")
    assert "3 trained" in sweep.printed("hurt")
    assert "1 interrupted" in sweep.printed("hurt")
    assert in_queue([cancelled]) == set()
    assert sweep.run("hurt", "hydra/launcher=slurm") == 0, sweep.printed("hurt")
    assert "1 trained, 3 finished before" in sweep.printed("hurt")
    assert_same(sweep.trials("hurt"), sweep.trials("quiet"))
    print(f"\nkilled launcher, requeue, scancel: {time.monotonic() - start:.0f} s")


def test_sbatch_alone_with_two_processes_of_srun(sweep: Sweep, limit_min: int) -> None:
    train = [sys.executable, "-m", "experiments.train", "size=pico", "execution.micro_batch_size=2"]
    small = "budget_tokens=1e6"  # two processes are slower than one here
    subprocess.run(
        [*train, "suite=alone", *sweep.shared, small], check=True, cwd=ROOT, timeout=3600
    )
    shared = [word for word in sweep.shared if word != "trainer=cpu"]
    given = [
        "suite=plain",
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "dry_run=true",
        *shared,
        small,
    ]
    subprocess.run([*train, *given], check=True, cwd=ROOT, timeout=120)
    (run,) = sweep.trials("plain")
    start = time.monotonic()
    options = [f"--time={limit_min}", "--signal=USR1@15", "--ntasks=2", "--ntasks-per-node=2"]
    options += [f"--output={sweep.folder}/plain.log"]
    said = subprocess.run(
        ["sbatch", *options, "docs/fit.sbatch", str(run.path)],
        check=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
    ).stdout
    job = said.split()[-1]
    wait_for(lambda: run.finished or not in_queue([job]), 3600)
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    (restarts,) = re.findall(r"Restarts=(\d+)", shown)
    print(f"\nsbatch, two ranks: {time.monotonic() - start:.0f} s, {restarts} requeues")
    assert run.finished, sweep.printed("plain")
    assert int(restarts) > 0
    assert_same([run], sweep.trials("alone"))
