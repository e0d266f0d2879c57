"""Stopped, killed, robbed of its disk or data: a run ends as if never stopped, or says why not."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments.config.entry import RunFailed
from experiments.config.identity import plain
from experiments.runs.checkpoints.files import AtomicCheckpointIO
from experiments.runs.checkpoints.reading import read_checkpoint
from experiments.runs.run_dir import RunDir
from experiments.system.files import write_json
from experiments.system.signals import BUSY
from experiments.training.fit import attempt, fit
from experiments.training.run_log import RunLog

from ...small_runs import FAMILIES, close, freeze_in, rows, same, weights


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Callable[[str], RunDir]:
    """Each family's run of 20 steps, never stopped, validated after 10 and 20."""
    done: dict[str, RunDir] = {}

    def get(model: str) -> RunDir:
        if model not in done:
            torch.manual_seed(0)
            runs = tmp_path_factory.mktemp("undisturbed")
            done[model] = freeze_in(
                runs,
                text,
                f"model={model}",
                "execution.micro_batch_size=2",
                "execution.log_every=4",
            )
            fit(done[model])
        return done[model]

    return get


# a validation is due after 10 and 20; the micro-batch may change between the two starts
@pytest.mark.parametrize(
    ("model", "stop_at", "then"),
    [
        ("rwkv4", 13, 2),
        ("gpt", 10, 2),
        ("gpt", 20, 2),
        ("rwkv4", 13, 4),
    ],
)
def test_a_stopped_run_ends_as_if_never_stopped(
    freeze: Callable[..., RunDir],
    undisturbed: Callable[[str], RunDir],
    model: str,
    stop_at: int,
    then: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = undisturbed(model)
    parted = freeze(f"model={model}", "execution.micro_batch_size=2", "execution.log_every=4")
    original = RunLog.on_train_batch_end

    def stop(self, trainer, *args):  # type: ignore[no-untyped-def]
        original(self, trainer, *args)
        if trainer.global_step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "on_train_batch_end", stop)
        with pytest.raises(SystemExit) as left:
            fit(parted)
    assert left.value.code == 128 + signal.SIGTERM
    assert read_checkpoint(parted.checkpoint("last"))["global_step"] == stop_at
    assert not parted.finished
    parted = freeze(f"model={model}", f"execution.micro_batch_size={then}", "execution.log_every=4")
    fit(parted)
    if then == 2:
        assert same(weights(whole), weights(parted))
        assert rows(whole) == rows(parted)
    else:  # the same sums in another order
        assert close(weights(whole), weights(parted))
        assert [row["step"] for row in rows(whole)] == [row["step"] for row in rows(parted)]
    assert whole.result is not None
    assert parted.result is not None
    assert parted.result["best"]["step"] == whole.result["best"]["step"]
    best = read_checkpoint(parted.checkpoint("best"))
    assert best["global_step"] == parted.result["best"]["step"]


@pytest.mark.parametrize("model", FAMILIES)
def test_a_run_killed_right_after_any_save_ends_as_if_never_killed(
    freeze: Callable[..., RunDir],
    undisturbed: Callable[[str], RunDir],
    model: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Saves whenever it can, dies after the third one, five times over."""
    run = freeze(
        f"model={model}",
        "execution.micro_batch_size=2",
        "execution.log_every=4",
        "execution.checkpoint_every_min=1e-9",
    )
    original = AtomicCheckpointIO.save_checkpoint

    class Killed(BaseException):
        pass

    for _ in range(5):
        saves = []

        def save(self, *args, saves=saves, **kwargs):  # type: ignore[no-untyped-def]
            original(self, *args, **kwargs)
            saves.append(1)
            if len(saves) == 3:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(AtomicCheckpointIO, "save_checkpoint", save)
            with pytest.raises(Killed):
                fit(run)
    fit(run)
    assert same(weights(undisturbed(model)), weights(run))
    assert rows(undisturbed(model)) == rows(run)


def test_a_finished_run_trains_no_further(freeze: Callable[..., RunDir]) -> None:
    run = freeze()
    fit(run)
    before = weights(run)
    (run.path / "result.json").unlink()  # killed just before the last word
    attempt(RunDir(run.path))
    assert same(before, weights(run))
    assert run.finished


def test_other_data_than_it_was_started_on_is_refused(freeze: Callable[..., RunDir]) -> None:
    run = freeze()
    fit(run)
    (run.path / "result.json").unlink()
    manifest = run.manifest
    manifest["data"]["fingerprint"] = "another"
    write_json(run.manifest_file, manifest)
    with pytest.raises(RunFailed, match="trained on other data"):
        attempt(run)


def test_a_run_in_training_is_left_alone(freeze: Callable[..., RunDir]) -> None:
    run = freeze()
    with run.lock():
        freeze()  # the same config: there is nothing to write
        other = {**plain(run.config), "ctx_len": 32}
        with pytest.raises(ValueError, match=r"another process .* with another config \(ctx_len"):
            RunDir.store(run.path, other)
        with pytest.raises(SystemExit) as left:
            attempt(RunDir(run.path))
        assert left.value.code == BUSY
    assert [p.name for p in run.path.iterdir()] == ["config.yaml"]


def test_a_loss_that_turns_nan_stops_and_keeps_the_last_good_checkpoint(
    freeze: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = freeze("execution.checkpoint_every_min=1e-9", "execution.log_every=7")
    from experiments.training.module import LitLM

    original = LitLM.training_step

    def poisoned(self, batch, batch_idx):  # type: ignore[no-untyped-def]
        loss = original(self, batch, batch_idx)
        if self.global_step == 11:  # the twelfth step
            self.micro_losses[-1] = loss.detach() * float("nan")
            return loss * float("nan")
        return loss

    monkeypatch.setattr(LitLM, "training_step", poisoned)
    with pytest.raises(RunFailed, match=r"nan at step 12; checkpoint of step 11 kept; lower optim"):
        attempt(run)
    state = read_checkpoint(run.checkpoint("last"))
    assert state["global_step"] == 11
    assert all(v.isfinite().all() for v in state["state_dict"].values())
    assert "nan at step 12" in (run.path / "error.txt").read_text()
    assert not run.finished
