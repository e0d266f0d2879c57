"""What training/lightning_internals.py leans on is still there, and means what it did."""

import lightning.pytorch as L
import pytest

from experiments.training.lightning_internals import (
    end_after_last_step,
    set_counters,
    stay_for_validation,
    validate,
)


@pytest.fixture
def trainer() -> L.Trainer:
    return L.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def test_counters_of_a_checkpoint_are_those_that_the_loops_load(trainer: L.Trainer) -> None:
    checkpoint = {"global_step": 3, "loops": {"fit_loop": trainer.fit_loop.state_dict()}}
    set_counters(checkpoint, 2)
    trainer.fit_loop.load_state_dict(checkpoint["loops"]["fit_loop"])
    loop = trainer.fit_loop.epoch_loop
    for progress in (loop.batch_progress.total, loop.batch_progress.current):
        counts = (progress.ready, progress.started, progress.processed, progress.completed)
        assert counts == (6, 6, 6, 5)
    assert loop.val_loop.batch_progress.total.ready == 0


def test_a_validation_that_is_due_is_run_after_the_last_step(
    trainer: L.Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = trainer.fit_loop.epoch_loop
    stay_for_validation(trainer, 2)
    assert trainer.max_steps == 3  # there are steps left to train
    stay_for_validation(trainer, 3)
    assert trainer.max_steps == 4
    seen = []
    monkeypatch.setattr(
        loop.val_loop, "run", lambda: seen.append((trainer.validating, loop.val_loop.restarting))
    )
    validate(trainer, 3)
    assert seen == [(True, False)]
    assert trainer.training
    assert trainer.max_steps == 3


def test_training_ends_at_its_last_step_alone(trainer: L.Trainer) -> None:
    end_after_last_step(trainer)
    assert not trainer.should_stop
    trainer.fit_loop.epoch_loop.max_steps = 0
    end_after_last_step(trainer)
    assert trainer.should_stop
