"""A run that was stopped, killed or robbed of files ends as if nothing had happened to it."""

import os
import random
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from experiments.runs.checkpoints.reading import read_checkpoint
from experiments.runs.metrics import MetricsFile
from experiments.runs.run_dir import RunDir
from experiments.system.signals import StopRequest
from experiments.training import checkpointing as checkpoints
from experiments.training import run_log as callbacks
from experiments.training.checkpointing import Checkpoints, rng_state, set_rng_state
from experiments.training.fit import fit
from experiments.training.module import LitLM

Freeze = Callable[..., RunDir]
Undisturbed = Callable[[str], tuple[RunDir, float]]
SameEnd = Callable[[RunDir, RunDir], None]


class Killed(BaseException):
    """Nothing of the program's own catches it."""


def before(
    monkeypatch: pytest.MonkeyPatch, where: type, method: str, action: Callable[[Any], None]
) -> None:
    """Do something at the start of each call of a method; its `self` is given."""
    original = getattr(where, method)

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        action(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(where, method, patched)


# validations are due after 6, 12, 18 and 24 steps, the last
@pytest.mark.parametrize(("model", "step"), [("rwkv4", 24), ("gpt", 6)])
def test_a_validation_is_left_at_once_and_done_at_the_next_start(
    freeze: Freeze, undisturbed: Undisturbed, same_end: SameEnd, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, model: str, step: int,
) -> None:  # fmt: skip
    run = freeze(tmp_path, model=model)
    batches = []

    def stop(module: LitLM) -> None:
        if module.trainer.global_step == step:
            batches.append(step)
            if len(batches) == 2:
                os.kill(os.getpid(), signal.SIGUSR2)

    with monkeypatch.context() as patch:
        before(patch, LitLM, "validation_step", stop)
        with pytest.raises(SystemExit) as left:
            fit(run)
    assert left.value.code == 75
    assert len(batches) == 2  # of five
    assert not MetricsFile(run.path / "metrics.csv").column("val/loss")[step // 6 - 1 :]
    assert read_checkpoint(run.checkpoint("last"))["global_step"] == step
    fit(RunDir(run.path))
    same_end(undisturbed(model)[0], run)


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ([signal.SIGINT], 130),
        ([signal.SIGUSR2, signal.SIGTERM], 75),  # the cluster's warning, then its end
        ([signal.SIGTERM, signal.SIGTERM], 143),  # one request that came two ways
    ],
)
def test_signals_are_noted_in_training(numbers: list[signal.Signals], code: int) -> None:
    handlers = [signal.getsignal(number) for number in numbers]
    with StopRequest() as stop:
        stop.training = True
        for number in numbers:
            os.kill(os.getpid(), number)
        assert stop.code == code
    assert [signal.getsignal(number) for number in numbers] == handlers


def test_a_second_signal_means_now_and_so_does_one_before_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with StopRequest(), pytest.raises(SystemExit) as left:
        os.kill(os.getpid(), signal.SIGUSR1)
    assert left.value.code == 75
    monkeypatch.setattr("experiments.system.signals.TWICE_S", -1.0)  # all are apart
    with StopRequest() as stop:
        stop.training = True
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.code == 130
        with pytest.raises(SystemExit) as left:
            os.kill(os.getpid(), signal.SIGINT)
    assert left.value.code == 130


def test_random_numbers_continue_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[Any]:
        return [random.random(), np.random.rand(), torch.rand(3).tolist(), np.random.randn()]

    draw()
    torch.save(rng_state(), tmp_path / "state.pt")
    drawn = draw()
    draw()
    set_rng_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == drawn


def test_a_model_that_draws_random_numbers_resumes_exactly(
    freeze: Freeze, same_end: SameEnd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It draws from all three generators; killed before its first save, and after some; stopped in
    a validation, and again in the same one."""
    original = LitLM.training_step

    def drawing(self: LitLM, batch: Any, batch_idx: int) -> torch.Tensor:
        share = 0.1 * (torch.rand(()) + random.random() + np.random.rand())
        return original(self, batch, batch_idx) * (1 - share)

    monkeypatch.setattr(LitLM, "training_step", drawing)
    whole, run = freeze(tmp_path / "whole"), freeze(tmp_path / "run")
    fit(whole)
    for kill_at in (1, 7):
        with monkeypatch.context() as patch:
            before(patch, LitLM, "configure_gradient_clipping", kill_in(kill_at))
            with pytest.raises(Killed):
                fit(RunDir(run.path))
        assert (run.path / "checkpoints" / "last.ckpt").is_file() == (kill_at > 1)
    for _ in range(2):
        with monkeypatch.context() as patch:
            before(patch, LitLM, "validation_step", stop_at_12)
            with pytest.raises(SystemExit):
                fit(RunDir(run.path))
        assert read_checkpoint(run.checkpoint("last"))["global_step"] == 12
    fit(RunDir(run.path))
    same_end(whole, run)


def stop_at_12(module: LitLM) -> None:
    if module.trainer.global_step == 12:
        os.kill(os.getpid(), signal.SIGUSR2)


def kill_in(step: int) -> Callable[[LitLM], None]:
    def kill(module: LitLM) -> None:
        if module.trainer.global_step == step - 1:
            raise Killed

    return kill


def test_files_removed_under_a_running_job(
    freeze: Freeze, undisturbed: Undisturbed, same_end: SameEnd, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = freeze(tmp_path)
    files = {5: "metrics.csv", 8: "checkpoints/last.ckpt", 11: "checkpoints", 16: "metrics.csv"}

    def remove_or_kill(module: LitLM) -> None:
        step = module.trainer.global_step
        if step in files:
            # by one rename, and perhaps in vain: a save may be writing at this moment
            with suppress(FileNotFoundError):
                (run.path / files[step]).rename(tmp_path / f"removed at step {step}")
        kill_in(18)(module)

    with monkeypatch.context() as patch:
        before(patch, LitLM, "configure_gradient_clipping", remove_or_kill)
        with pytest.raises(Killed):
            fit(run)
    fit(RunDir(run.path))
    same_end(undisturbed("rwkv4")[0], run)


@pytest.fixture
def half_done(freeze: Freeze, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run that was killed after 12 of its 24 steps, before its second best was copied."""
    run = freeze(tmp_path)
    copied = []

    def kill_at_second(checkpoints: Checkpoints) -> None:
        copied.append(1)
        if len(copied) == 2:
            raise Killed

    with monkeypatch.context() as patch:
        before(patch, Checkpoints, "copy_best", kill_at_second)
        with pytest.raises(Killed):
            fit(run)
    return run


def test_the_best_checkpoint_is_restored_if_the_kill_came_before_its_copy(
    half_done: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = half_done
    assert read_checkpoint(run.checkpoint("best"))["global_step"] == 6
    assert read_checkpoint(run.checkpoint("last"))["global_step"] == 12
    with monkeypatch.context() as patch:
        patch.setattr(LitLM, "on_train_start", lambda self: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            fit(RunDir(run.path))
    assert read_checkpoint(run.checkpoint("best"))["global_step"] == 12


def test_a_clock_that_is_set_back(
    freeze: Freeze, undisturbed: Undisturbed, same_end: SameEnd, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By an hour at each look: the run is saved, and no row has a negative time or speed."""
    run = freeze(tmp_path, "execution.checkpoint_every_min=5")
    now = [1e6]

    def back() -> float:
        now[0] -= 3600
        return now[0]

    clock = SimpleNamespace(perf_counter=back, monotonic=back, time=back)
    monkeypatch.setattr(callbacks, "time", clock)
    monkeypatch.setattr(checkpoints, "time", clock)
    saves = []
    before(monkeypatch, Checkpoints, "save", lambda self: saves.append(1))
    fit(run)
    assert len(saves) > 20
    same_end(undisturbed("rwkv4")[0], run)
    table = MetricsFile(run.path / "metrics.csv").rows()
    assert {float(row["time_s"]) for row in table} == {0.0}
    assert not [row for row in table if row["perf/tokens_per_s"]]


def test_a_damaged_checkpoint_and_metrics_file_cost_no_more_than_some_steps(
    half_done: RunDir, undisturbed: Undisturbed, same_end: SameEnd,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = half_done
    last = run.checkpoint("last")
    last.write_bytes(last.read_bytes()[:5000])
    (run.path / "metrics.csv").write_bytes(b"step,tok\x00\n1,2,3")
    fit(RunDir(run.path))
    assert "warning: " in capsys.readouterr().err
    (run.path / "checkpoints" / "damaged.ckpt").unlink()
    same_end(undisturbed("rwkv4")[0], run)


def test_metrics_lost_after_the_last_step_come_back(
    freeze: Freeze, undisturbed: Undisturbed, same_end: SameEnd, tmp_path: Path
) -> None:
    run = freeze(tmp_path)
    fit(run)
    for name in ("metrics.csv", "result.json"):
        (run.path / name).unlink()
    fit(RunDir(run.path))
    same_end(undisturbed("rwkv4")[0], run)
