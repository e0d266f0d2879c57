"""The log of a run: its losses and speed, and the end at a loss that is not finite."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import distributed

from experiments.runs.metrics import MetricsFile
from experiments.system.machine import peak_memory_bytes
from experiments.training.module import LitLM


class LossNotFinite(ArithmeticError):
    """The loss or gradient became NaN or infinite."""


class RunLog(Callback):
    """Writes metrics.csv (and other loggers), measures speed, stops when the loss is not finite.

    Args:
        metrics: the file to append to.
        tokens_per_step: training tokens of one optimizer step, over all devices.
        flops_per_token: training FLOPs of one token.
        log_every: steps between training rows.
    """

    def __init__(
        self,
        metrics: MetricsFile,
        tokens_per_step: int,
        flops_per_token: int,
        log_every: int,
    ) -> None:
        self.metrics = metrics
        self.tokens_per_step = tokens_per_step
        self.flops_per_token = flops_per_token
        self.log_every = log_every
        self.pending: list[torch.Tensor] = []  # losses of the steps since the last training row
        self.restored: list[float] = []  # those a checkpoint brought, not yet on the device
        self.time_s = 0.0  # spent training, over all starts of the run
        self.logged_time_s = 0.0  # time_s at the last training row
        self.clock: float | None = None  # running since; None while it stands

    def state_dict(self) -> dict[str, Any]:
        self.tick()
        self.pending = over_devices(self.pending)
        return {
            "pending": self.restored + [float(loss) for loss in self.pending],
            "time_s": self.time_s,
            "logged_time_s": self.logged_time_s,
            "metrics": self.metrics.text,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.restored = state_dict["pending"]  # to be put where the next ones are
        self.time_s = state_dict["time_s"]
        self.logged_time_s = state_dict["logged_time_s"]
        self.metrics.text = state_dict["metrics"]

    def tick(self) -> None:
        """Bring ``time_s`` up to now."""
        if self.clock is not None:
            now = time.perf_counter()
            self.time_s += max(0.0, now - self.clock)
            self.clock = now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it no training time passes."""
        self.tick()
        running, self.clock = self.clock is not None, None
        yield
        if running:
            self.clock = time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self.metrics.rewind(trainer.global_step)
        trainer.strategy.barrier()  # the other ranks read it too
        self.clock = time.perf_counter()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.clock is None and trainer.is_global_zero:  # nothing was left to train
            self.metrics.rewind(trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, LitLM)
        if len(pl_module.micro_losses) < trainer.accumulate_grad_batches:
            return
        loss = torch.stack(pl_module.micro_losses).double().mean()  # the same in any order
        self.pending += [loss.new_tensor(value) for value in self.restored]
        self.restored = []
        self.pending.append(loss)
        pl_module.micro_losses.clear()
        if trainer.global_step % self.log_every == 0 or trainer.global_step == trainer.max_steps:
            self.write_training_row(trainer, pl_module)

    def write_training_row(self, trainer: L.Trainer, module: LitLM) -> None:
        self.check_finite(trainer, module)
        loss = torch.stack(self.pending).mean()
        peak_memory = torch.tensor(peak_memory_bytes(module.device), device=module.device)
        self.tick()
        n_tokens = len(self.pending) * self.tokens_per_step
        elapsed = self.time_s - self.logged_time_s
        tokens_per_s = n_tokens / elapsed if elapsed else None  # None: a clock that stood
        self.logged_time_s = self.time_s
        self.pending.clear()
        peak_flops = module.peak_flops * trainer.world_size
        self.write(
            trainer,
            {
                "lr": module.lr,
                "train/loss": float(loss),
                "train/grad_norm": float(module.grad_norm),
                "perf/tokens_per_s": tokens_per_s,
                "perf/mfu": tokens_per_s and tokens_per_s * self.flops_per_token / peak_flops,
                "perf/peak_mem_bytes": int(trainer.strategy.reduce(peak_memory, reduce_op="max")),
            },
        )

    def check_finite(self, trainer: L.Trainer, module: LitLM) -> None:
        self.pending = over_devices(self.pending)  # all stop, or none
        first = trainer.global_step - len(self.pending) + 1
        losses = torch.stack(self.pending).tolist() if self.pending else []
        for step, loss in enumerate(losses, first):
            if not math.isfinite(loss):
                raise LossNotFinite(f"the loss became {loss} at step {step}")
        # under float16 an infinite gradient is normal: the scaler skips that step
        if trainer.precision != "16-mixed" and not math.isfinite(module.grad_norm) and losses:
            raise LossNotFinite(
                f"the gradient norm became {float(module.grad_norm)} at step {step}"
            )

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        assert isinstance(pl_module, LitLM)
        self.check_finite(trainer, pl_module)  # a bad state never replaces a good checkpoint

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.tick()
        self.clock = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LitLM)
        if not math.isfinite(pl_module.val_loss):
            raise LossNotFinite(
                f"the validation loss became {pl_module.val_loss} at step {trainer.global_step}"
            )
        self.write(trainer, {"val/loss": pl_module.val_loss, "val/bpb": pl_module.val_bpb})
        self.clock = time.perf_counter()

    def write(self, trainer: L.Trainer, values: dict[str, Any]) -> None:
        step = trainer.global_step
        row = {"step": step, "tokens": step * self.tokens_per_step, "time_s": self.time_s, **values}
        if trainer.is_global_zero:
            self.metrics.append(row)
            for logger in trainer.loggers:
                logger.log_metrics({k: v for k, v in row.items() if v is not None}, step=step)


def over_devices(losses: list[torch.Tensor]) -> list[torch.Tensor]:
    """The mean of each over all processes, which must call this together; again changes nothing."""
    if not losses or not (distributed.is_available() and distributed.is_initialized()):
        return losses
    total = torch.stack(losses)
    distributed.all_reduce(total)
    return list((total / distributed.get_world_size()).unbind())
