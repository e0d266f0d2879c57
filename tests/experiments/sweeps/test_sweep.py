"""Sweeps: what is skipped, retried, refused, shared and stopped. A stand-in trains the trials."""

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments import train
from experiments.config.entry import CONF_DIR
from experiments.config.identity import plain
from experiments.runs.run_dir import RunDir, find_runs
from experiments.runs.state import State
from experiments.sweeps import trial
from experiments.sweeps.local import Report
from experiments.sweeps.slots import device_slots
from experiments.sweeps.trial import Outcome
from experiments.system import locks
from experiments.system.machine import gpu_names

ROOT = Path(__file__).resolve().parents[3]
FAKE = [sys.executable, str(Path(__file__).parent / "fake_fit.py")]
LAUNCH = (
    f"from experiments.sweeps import trial; trial.COMMAND = {FAKE!r}; "
    "from experiments.train import main; main()"
)
TWO = ["model=gpt", "seed=0,1"]
FOUR = ["seed=0,1,2,3"]


class Suite:
    """A suite in a temporary folder, its launches, and the log of what was started."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.runs, self.log, self.capsys = folder / "runs", folder / "log", capsys
        self.log.touch()
        self.out = self.err = ""

    def arguments(self, *given: str) -> list[str]:
        return ["size=pico", *given, "suite=s", f"paths.runs={self.runs}", "trainer=cpu"]

    def launch(self, *given: str, deeds: dict[str, object] | None = None) -> int:
        """Launch in this process; the exit code."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train", "-m", *self.arguments(*given)])
            patch.setenv("FAKE_LOG", str(self.log))
            patch.setenv("FAKE_DEEDS", json.dumps(deeds or {}))
            patch.setenv("PYTHONPATH", str(ROOT))
            patch.setattr(trial, "COMMAND", FAKE)
            with pytest.raises(SystemExit) as left:
                train.main()
        self.out, self.err = self.capsys.readouterr()
        return left.value.code or 0  # type: ignore[return-value]

    def start(self, *given: str, deeds: dict[str, object] | None = None) -> subprocess.Popen[str]:
        """Launch in a process of its own."""
        environment = {"FAKE_LOG": str(self.log), "FAKE_DEEDS": json.dumps(deeds or {})}
        return subprocess.Popen(
            [sys.executable, "-c", LAUNCH, "-m", *self.arguments(*given)],
            env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def events(self, kind: str) -> list[str]:
        """The runs of the log's lines of one kind, in their order."""
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return [run for event, run, _ in lines if event == kind]

    def wait_for(self, kind: str, count: int) -> None:
        deadline = time.monotonic() + 60
        while len(self.events(kind)) < count:
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def run(self, name: str) -> RunDir:
        return RunDir(self.runs / "s" / name)


@pytest.fixture
def suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Suite:
    return Suite(tmp_path, capsys)


def test_the_same_command_skips_what_is_done_and_a_longer_one_adds(suite: Suite) -> None:
    both = "model=rwkv4,gpt"
    assert suite.launch(both, "seed=0,1", "jobs=3") == 0
    assert "4 trained, 0 finished before, 0 failed" in suite.out
    assert sorted(suite.events("start")) == sorted(
        f"{model}/seed={seed}" for model in ("rwkv4_pico", "gpt_pico") for seed in range(2)
    )
    assert "working on seed=0" in (suite.run("gpt_pico/seed=0").path / "log.txt").read_text()
    assert suite.launch(both, "seed=0,1") == 0
    assert "0 trained, 4 finished before, 0 failed" in suite.out
    assert suite.launch(both, "seed=range(3)") == 0
    assert "2 trained, 4 finished before, 0 failed" in suite.out
    assert len(suite.events("start")) == 6
    assert not list(suite.runs.glob("s/.launches/*"))


def test_failures_are_counted_kept_and_tried_again(suite: Suite) -> None:
    deeds = {"seed=0": "fail", "seed=1": "kill", "seed=2": "exit", "seed=3": "bad"}
    deeds |= {"seed=5": "remove", "seed=6": "late"}
    assert suite.launch("seed=range(7)", "jobs=2", deeds=deeds) == 5
    assert "2 trained, 0 finished before, 5 failed" in suite.out
    assert "seed=5 was removed while it was in training" in suite.err
    reasons = ("it went wrong", "killed by signal 9", "exit code 3", "bad input")
    for seed, reason in enumerate(reasons):
        text = (suite.run(f"rwkv4_pico/seed={seed}").path / "error.txt").read_text()
        assert reason in text.partition("\n")[0]
        assert reason in suite.err
        assert seed not in (1, 2) or "working on" in text  # the end of its output
    assert suite.launch("seed=range(5)") == 0
    assert "4 trained, 1 finished before, 0 failed" in suite.out
    assert not list(suite.runs.glob("*/*/*/error.txt"))


def test_fail_fast_starts_no_other_and_lets_those_in_training_save(suite: Suite) -> None:
    deeds = {"rwkv4_pico/seed=0": "fail", "rwkv4_pico/seed=1": 60}
    assert suite.launch(*FOUR, "jobs=2", "fail_fast=true", deeds=deeds) == 2
    assert "1 failed, 1 interrupted, 2 waiting" in suite.out
    assert suite.launch(*FOUR, "fail_fast=true") == 0
    assert "4 trained" in suite.out


@pytest.mark.parametrize(
    ("number", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR2", 75), ("SIGHUP", 129)]
)
def test_a_signal_makes_all_save_and_loses_no_list(suite: Suite, number: str, code: int) -> None:
    def interrupt() -> None:
        suite.wait_for("start", 3)
        os.kill(os.getpid(), getattr(signal, number))

    thread = threading.Thread(target=interrupt)
    thread.start()
    deeds = {"rwkv4_pico/seed=0": "fail", "": 60}
    assert suite.launch(*FOUR, "jobs=2", deeds=deeds) == code
    thread.join()
    assert len(suite.events("stopped")) == 2
    assert "0 trained, 0 finished before, 1 failed" in suite.out
    assert "1 waiting" in suite.out
    assert "it went wrong" in suite.err


@pytest.mark.slow
def test_a_second_interrupt_ends_all_at_once(suite: Suite) -> None:
    slow = suite.start("seed=0,1", "jobs=2", deeds={"": "deaf"})
    try:
        suite.wait_for("start", 2)
        slow.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert slow.poll() is None
        slow.send_signal(signal.SIGINT)
        slow.communicate(timeout=20)
    finally:
        slow.kill()
    assert slow.returncode == 130


def test_a_trial_that_cannot_be_composed_or_frozen_has_failed(suite: Suite) -> None:
    assert suite.launch("model=rwkv4,nosuch", "batch_size=0,4") == 3
    assert "1 trained, 0 finished before, 3 failed" in suite.out
    assert (
        "error: model=nosuch batch_size=4: In 'train': Could not find 'model/nosuch'" in suite.err
    )
    assert "model=rwkv4 batch_size=0: batch_size is 0" in suite.err


def test_other_sweepers_and_bad_settings_are_one_line(suite: Suite) -> None:
    for given, message in (
        (["seed=interval(0,1)"], "does not support sweep type"),
        (["seed=0,1", "jobs=0"], "jobs is 0: it must be a whole number, 1 or more, or auto"),
        (["seed=0,1", "jobs=2", "execution.trainer.devices=99"], "set it to how many a trial"),
        (["seed=0,1", "hydra.sweeper._target_=a.b.OtherSweeper"], "OtherSweeper cannot be resumed"),
        (["seed=0,(1"], "Error parsing override 'seed=0,(1'"),
        (["seed=0,1", "dry_run=flase"], "dry_run is 'flase': it must be true or false"),
    ):
        assert suite.launch(*given) == 2
        assert suite.err.startswith("error: ")
        assert message in suite.err
        assert suite.err.count("\n") == 1
    assert not suite.events("start")


def test_two_points_of_one_directory_are_not_one_trial(suite: Suite) -> None:
    for n_done, losses in enumerate(("full,chunked", "chunked,full")):
        assert suite.launch("seed=0", f"execution.loss={losses}") == 1
        assert f"{1 - n_done} trained, {n_done} finished before, 1 failed" in suite.out
        assert "differ in execution.loss, which no directory is named by" in suite.err


def test_duplicates_are_trained_once(suite: Suite) -> None:
    assert suite.launch("seed=1,1,1", "budget_tokens=5e5,500000") == 0
    assert len(suite.events("start")) == 1
    assert "1 trained" in suite.out


@pytest.mark.slow
def test_an_edited_config_does_not_reach_a_trial_that_waits_in_a_live_launch(suite: Suite) -> None:
    slow = suite.start("seed=0,1", deeds={"seed=0": 60})
    try:
        suite.wait_for("start", 1)
        waiting = suite.run("rwkv4_pico/seed=1")
        frozen = (waiting.path / "config.yaml").read_text()
        edited = frozen.replace("ctx_len: 256", "ctx_len: 128")
        (waiting.path / "config.yaml").write_text(edited)  # as if it was frozen from another yaml
        assert suite.launch("seed=1") == 1
        assert "seed=1 waits with another config (ctx_len: 128 -> 256" in suite.err
        assert "in the launch by" in suite.err
        assert (waiting.path / "config.yaml").read_text() == edited
    finally:
        slow.kill()
        slow.communicate()
    suite.wait_for("stopped", 1)  # told by the system that its launcher is gone
    assert suite.launch("seed=0,1") == 0  # that launch is dead
    assert (waiting.path / "config.yaml").read_text() == frozen
    assert "2 trained" in suite.out


def test_damaged_entries_cost_their_own_trial_one_line(suite: Suite) -> None:
    assert suite.launch(*FOUR) == 0
    paths = [suite.run(f"rwkv4_pico/seed={seed}").path for seed in range(4)]
    (paths[0] / "result.json").write_text('{"val/lo')
    config = (paths[1] / "config.yaml").read_bytes()
    (paths[1] / "config.yaml").write_bytes(b"\xff\x00[" + config[:50])
    for path in paths[2:]:
        (path / "result.json").unlink()
    (paths[2] / "config.yaml").write_bytes(config[: len(config) // 2])  # never trained: made again
    assert suite.launch(*FOUR) == 2
    lines = [line for line in suite.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2
    assert "result.json is not valid JSON: remove it" in " ".join(lines)
    assert "config.yaml is not readable YAML" in " ".join(lines)
    assert "2 trained, 0 finished before, 2 failed" in suite.out


@pytest.mark.slow
def test_a_trial_in_training_elsewhere_is_waited_for_and_not_trained_again(suite: Suite) -> None:
    first = suite.start("seed=0,1,2", deeds={"seed=0": "linger"})

    def let_it_end() -> None:
        suite.wait_for("done", 2)  # which the second launch has trained
        (suite.run("rwkv4_pico/seed=0").path / "end").touch()

    thread = threading.Thread(target=let_it_end)
    thread.start()
    try:
        suite.wait_for("start", 1)
        assert suite.launch("seed=0,1,2") == 0
        _, err = first.communicate(timeout=60)
    finally:
        thread.join()
        first.kill()
    assert first.returncode == 0, err
    assert sorted(suite.events("start")) == [f"rwkv4_pico/seed={seed}" for seed in range(3)]
    assert "2 trained, 0 finished before, 0 failed, 1 trained by other launches" in suite.out
    assert "done: s/rwkv4_pico/seed=0" in suite.out


def test_a_launch_that_died_with_its_machine_holds_no_trial_for_long(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert suite.launch("seed=0", "dry_run=true") == 0
    monkeypatch.setattr(locks, "LEASE_S", 3.0)
    for file in (".launch", ".lock"):
        far = "filelock/2\npid=7\nhost=far\nmode=lease\ntoken=ab\nduration=3.0\nstart=1\n"
        (suite.run("rwkv4_pico/seed=0").path / file).write_text(far)
    assert suite.launch("seed=0,1", deeds={"": 0.1}) == 0
    assert suite.events("start")[0] == "rwkv4_pico/seed=1"
    assert "waiting for 1 in training elsewhere: s/rwkv4_pico/seed=0 (far, process 7)" in suite.out
    assert "2 trained" in suite.out


def test_a_killed_trial_that_another_process_took_over_at_once_has_not_failed(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the death of the process and the look of the launch that had started it."""
    judge, seen = trial.judge, list[State]()

    def slower(run: RunDir, code: int) -> Outcome:
        with run.lock():
            outcome = judge(run, code)
        seen.append(outcome.state)
        run.result_file.write_text("{}")
        return outcome

    monkeypatch.setattr(trial, "judge", slower)
    assert suite.launch("seed=0", deeds={"": "kill"}) == 0
    assert seen == [State.RUNNING]
    assert "0 trained, 0 finished before, 0 failed, 1 trained by other launches" in suite.out
    assert not list(suite.runs.glob("*/*/*/error.txt"))


def test_what_failed_in_another_launch_is_reported_and_not_tried_again(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert suite.launch("seed=0", deeds={"": "fail"}) == 1
    run = suite.run("rwkv4_pico/seed=0")
    held = run.lock()
    held.__enter__()
    original = Report.say

    def fail_there(report: Report, line: str) -> None:
        original(report, line)
        if line.startswith("waiting for"):
            run.error_file.write_text("failed there\n")
            held.__exit__(None, None, None)

    monkeypatch.setattr(Report, "say", fail_there)
    assert suite.launch("seed=0") == 1
    here = f"{platform.node()}, process {os.getpid()}"
    assert f"waiting for 1 in training elsewhere: s/rwkv4_pico/seed=0 ({here})" in suite.out
    assert "failed there" in suite.err
    assert len(suite.events("start")) == 1
    assert suite.launch("seed=0") == 0  # another launch tries it again


def test_composing_many_trials_gives_what_hydra_gives(suite: Suite) -> None:
    assert (
        suite.launch("model=rwkv4,gpt", "seed=range(250)", "optim.peak_lr=1e-3", "dry_run=true")
        == 0
    )
    assert suite.out.count("would train") == 500
    for model in ("rwkv4", "gpt"):
        given = suite.arguments(f"model={model}", "seed=19", "optim.peak_lr=1e-3")
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            _, frozen = RunDir.locate(compose("train", overrides=given), given)
        run = suite.run(f"{model}_pico/seed=19,optim.peak_lr=0.001")
        assert plain(run.config) == frozen


def test_a_dry_run_trains_nothing(suite: Suite) -> None:
    assert suite.launch(*TWO, "jobs=2", "dry_run=true") == 0
    assert suite.out.count("would train") == 2
    assert not suite.events("start")
    assert len(find_runs(str(suite.runs / "s" / "*" / "*"))) == 2


def test_each_job_gets_its_own_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(jobs: int | str, gpus: str, **trainer: object) -> list[dict[str, str]]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        given = {"accelerator": "auto", "devices": 1} | trainer
        return device_slots(jobs, OmegaConf.create(given))

    def gpus(*args: object, **kwargs: object) -> list[str]:
        return [slot["CUDA_VISIBLE_DEVICES"] for slot in chosen(*args, **kwargs)]  # type: ignore[arg-type]

    assert gpus("auto", "0,1,2,3") == ["0", "1", "2", "3"]
    assert gpus("auto", "0,1,2,3", devices=2) == ["0,1", "2,3"]
    assert gpus(5, "3,7") == ["3", "7", "3", "7", "3"]
    assert gpus(2, "0,1", devices="auto") == ["0,1", "0,1"]
    assert chosen(1, "0,1") == [{}]
    monkeypatch.setattr("experiments.sweeps.slots.n_cores", lambda: 8)
    for threads, slots in (("1", chosen("auto", "")), ("4", chosen(2, "0", accelerator="cpu"))):
        assert {slot["OMP_NUM_THREADS"] for slot in slots} == {threads}
        assert len(slots) == 8 // int(threads)
    listing = (
        "GPU 0: NVIDIA H100 (UUID: GPU-a)\n  MIG 1g.10gb Device 0: (UUID: MIG-b)\n"
        "  MIG 1g.10gb Device 1: (UUID: MIG-c)\nGPU 1: NVIDIA H100 (UUID: GPU-d)\n"
    )
    assert gpu_names(listing) == ["MIG-b", "MIG-c", "GPU-d"]
