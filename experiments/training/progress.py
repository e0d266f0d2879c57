"""The progress bar of a run."""

import sys
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from experiments.training.module import LitLM


class TokenBar(Callback):
    """A progress bar in tokens; silent when nobody watches.

    Args:
        name: of the run.
        tokens_per_step: training tokens of one optimizer step.
    """

    def __init__(self, name: str, tokens_per_step: int) -> None:
        self.name = name
        self.tokens_per_step = tokens_per_step

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.bar = tqdm(
            total=trainer.max_steps * self.tokens_per_step,
            initial=trainer.global_step * self.tokens_per_step,
            desc=self.name,
            unit="tok",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not (trainer.is_global_zero and sys.stderr.isatty()),
        )

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.bar.update(trainer.global_step * self.tokens_per_step - self.bar.n)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LitLM)
        bits = "" if pl_module.val_bpb is None else f", {pl_module.val_bpb:.3f} bits/byte"
        self.bar.set_postfix_str(f"val {pl_module.val_loss:.3f} nats/token{bits}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.bar.close()
