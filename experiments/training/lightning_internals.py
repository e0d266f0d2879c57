"""Everything that leans on what Lightning keeps to itself; written for Lightning 2.6.

Lightning counts micro-batches, ends at once after the last step, and validates only between steps
of one start. Our runs are saved at the end of an optimizer step, sometimes before the validation
due there, and resume with micro-batches of another size: so its counters are put right here.
"""

from typing import Any

import lightning.pytorch as L


def set_counters(checkpoint: dict[str, Any], n_accumulated: int) -> None:
    """Make a checkpoint's loops stand at the end of its optimizer step.

    Args:
        checkpoint: of Lightning, about to be loaded; changed in place.
        n_accumulated: micro-batches of a step from now on, which may be of another number.
    """
    n = checkpoint["global_step"] * n_accumulated
    loops = checkpoint["loops"]["fit_loop"]
    for part in ("total", "current"):
        loops["epoch_loop.batch_progress"][part].update(
            ready=n, started=n, processed=n, completed=n - 1
        )
        loops["epoch_loop.val_loop.batch_progress"][part].update(
            ready=0, started=0, processed=0, completed=0
        )


def stay_for_validation(trainer: L.Trainer, step: int) -> None:
    """Let a run that was stopped after its last step begin, for the validation that is due."""
    if step == trainer.max_steps:
        trainer.fit_loop.epoch_loop.max_steps += 1


def validate(trainer: L.Trainer, n_steps: int) -> None:
    """Run the validation that was due when the run was stopped; undo `stay_for_validation`."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True
    trainer.fit_loop.epoch_loop.max_steps = n_steps


def end_after_last_step(trainer: L.Trainer) -> None:
    """Say that training stops at the last step: only then is it validated."""
    trainer.should_stop = trainer.global_step >= trainer.max_steps
