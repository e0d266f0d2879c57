"""When a run saves: now and then, when it is asked to stop, and when its loss is the best yet."""

import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import distributed

from experiments.runs.checkpoints.files import BEST, LAST, BackgroundCheckpointIO, duplicate
from experiments.runs.metrics import format_cell
from experiments.system import ranks
from experiments.system.signals import StopRequest
from experiments.training.lightning_internals import stay_for_validation, validate
from experiments.training.module import LitLM
from experiments.training.run_log import RunLog


class Checkpoints(Callback):
    """last.ckpt now and then and when asked to stop; best.ckpt is a copy of it by validation loss.

    Always at the end of a step, so that a run that resumes has lost nothing. A run that is asked to
    stop does not wait for a validation: the next start begins with it. Every rank takes the same
    decisions. Each rank continues its random numbers if there are as many ranks again.

    Args:
        folder: of the checkpoints.
        run_log: its clock stands while a state is copied, and its rows are safe before it is.
        val_every: steps between validations.
        every_min: minutes between saves of last.ckpt.
        stop: what signals ask for.
    """

    def __init__(
        self, folder: Path, run_log: RunLog, val_every: int, every_min: float, stop: StopRequest
    ) -> None:
        self.folder = folder
        self.run_log = run_log
        self.val_every = val_every
        self.every_s = 60 * every_min
        self.stop = stop
        self.best_loss = math.inf
        self.unvalidated = False  # at a step whose validation is still to come
        self.restored_rng: list[dict[str, Any]] = []  # of each rank

    def state_dict(self) -> dict[str, Any]:
        states: list[Any] = [rng_state()]
        if distributed.is_available() and distributed.is_initialized():
            states = [None] * distributed.get_world_size()
            distributed.all_gather_object(states, rng_state())
        return {"unvalidated": self.unvalidated, "rng": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.unvalidated = state_dict["unvalidated"]
        self.restored_rng = state_dict["rng"]

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if checkpoint["callbacks"][self.state_key]["unvalidated"]:
            stay_for_validation(trainer, checkpoint["global_step"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LitLM)
        self.stop.install()  # Lightning's own would stop in the middle of a validation, unsaved
        self.stop.training = True
        self.saved_at = time.monotonic()
        # from the file, rewound to the step at hand: it and best.ckpt can never disagree
        losses = self.run_log.metrics.column("val/loss")
        self.best_loss = min((loss for _, loss in losses), default=math.inf)
        if len(self.restored_rng) == trainer.world_size:
            set_rng_state(self.restored_rng[trainer.global_rank])
        if self.unvalidated:
            validate(trainer, pl_module.total_steps)
        elif losses and losses[-1] == (trainer.global_step, self.best_loss):
            assert trainer.ckpt_path is not None
            self.copy_best(trainer, Path(trainer.ckpt_path))  # killed between the two files?

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        self.unvalidated = step % self.val_every == 0 or step >= trainer.max_steps
        self.save_if_due(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self.save_if_due(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LitLM)
        self.unvalidated = False
        loss = float(format_cell(pl_module.val_loss))  # as a resumed run will read it
        if loss < self.best_loss:
            self.best_loss = loss
            self.save(trainer)
            self.copy_best(trainer, self.folder / LAST)
        self.save_if_due(trainer)

    def save_if_due(self, trainer: L.Trainer) -> None:
        """Save if it is time, and not just before a validation; save and leave if asked to."""
        waited = time.monotonic() - self.saved_at
        due = not 0 <= waited <= self.every_s  # less than nothing: somebody set the clock back
        code, due = self.agreed(trainer, self.stop.code, due and not self.unvalidated)
        if self.io(trainer).has_failed():  # known to the rank that writes alone: it ends, so do all
            self.io(trainer).teardown()
        if code or due:
            self.save(trainer)
        if code:
            self.io(trainer).teardown()
            trainer.strategy.barrier()  # only one of them writes
            if trainer.is_global_zero:
                print(
                    f"stopped at step {trainer.global_step} and saved; the same command resumes it",
                    file=sys.stderr,
                    flush=True,
                )
            # Lightning kills the first process it started others from when one leaves with an error
            counts = trainer.is_global_zero or ranks.started()
            raise SystemExit(code if counts else 0)

    def agreed(self, trainer: L.Trainer, code: int, due: bool) -> tuple[int, bool]:
        """The same on every rank: any rank's signal or clock counts for all."""
        if trainer.world_size == 1:
            return code, due
        here = torch.tensor([code, int(due)], device=trainer.strategy.root_device)
        code, is_due = trainer.strategy.reduce(here, reduce_op="max").tolist()
        return code, bool(is_due)

    def save(self, trainer: L.Trainer) -> None:
        with self.run_log.paused():
            self.run_log.metrics.sync()
            trainer.save_checkpoint(self.folder / LAST)
        self.saved_at = time.monotonic()

    def io(self, trainer: L.Trainer) -> BackgroundCheckpointIO:
        io = trainer.strategy.checkpoint_io
        assert isinstance(io, BackgroundCheckpointIO)
        return io

    def copy_best(self, trainer: L.Trainer, checkpoint: Path) -> None:
        with self.run_log.paused():
            self.io(trainer).teardown()
            if trainer.is_global_zero:
                duplicate(checkpoint, self.folder / BEST)
            trainer.strategy.barrier()


def rng_state() -> dict[str, Any]:
    """Where this process's random numbers are, as values that load without running code."""
    name, words, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, [int(word) for word in words], *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Continue from a `rng_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
