"""The Lightning module: one loss, one optimizer and one validation for every architecture."""

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from experiments.training.devices import shard
from experiments.training.lightning_internals import end_after_last_step, set_counters
from experiments.training.loss import (
    IGNORE,
    bits_per_byte,
    clip_gradients,
    cross_entropy,
    max_logit_penalty,
)
from models.language_model import LanguageModel, State


class LitLM(L.LightningModule):
    """Trains and validates a language model.

    Args:
        model: any LanguageModel.
        make_optimizer: model -> optimizer, its groups' "lr" being peak rates.
        schedule: (step, total steps) -> fraction of the peak rate.
        total_steps: optimizer steps of the whole run.
        loss: "full" or "chunked".
        penalty: weight of the max-logit penalty (0: none).
        grad_clip: largest gradient norm (0: no clipping).
        token_bytes: (V,) bytes each token stands for; None if unknown.
        chunk_len: tokens of a sequence whose activations are held at once; None: all of them.
        truncated: cut the gradient between chunks, instead of letting it flow through the state.
    """

    def __init__(
        self,
        model: LanguageModel,
        make_optimizer: Callable[[LanguageModel], torch.optim.Optimizer],
        schedule: Callable[[int, int], float],
        total_steps: int,
        loss: str = "full",
        penalty: float = 0.0,
        grad_clip: float = 1.0,
        token_bytes: Tensor | None = None,
        chunk_len: int | None = None,
        truncated: bool = False,
    ) -> None:
        super().__init__()
        if loss not in ("full", "chunked"):
            raise ValueError(f"loss is {loss!r}: choose full or chunked")
        self.model = model
        self.make_optimizer = make_optimizer
        self.schedule = schedule
        self.total_steps = total_steps
        self.loss = loss
        self.penalty = penalty
        self.grad_clip = grad_clip
        self.chunk_len = chunk_len
        self.truncated = truncated
        self.micro_losses: list[
            Tensor
        ] = []  # of the optimizer step at hand; the run log empties it
        self.grad_norm = torch.tensor(math.nan)
        self.lr = math.nan  # of the optimizer step at hand
        self.peak_flops = math.nan  # FLOP/s one device can do at most; set by whoever measures it
        self.register_buffer("token_bytes", token_bytes, persistent=False)
        self.token_bytes: Tensor | None

    def configure_model(self) -> None:
        if self.device_mesh is not None:  # trainer=fsdp
            mesh = self.device_mesh["data_parallel"]
            shard(self, self.model.blocks, mesh, "training_step", "validation_step")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        ids, targets = batch  # (B, T) both
        nats, squares = (self.in_chunks if self.is_long(ids) else self.at_once)(ids, targets)
        self.micro_losses.append(nats.detach())
        return nats if squares is None else nats + self.penalty * squares

    def is_long(self, ids: Tensor) -> bool:
        """Whether ids (B, T) are to be read in chunks."""
        return self.chunk_len is not None and ids.shape[1] > self.chunk_len

    def at_once(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean nats over the targets (B, T), and the max-logit penalty if it has a weight."""
        x, _ = self.model.features(ids)
        nats, logits = cross_entropy(x, self.model.head, targets, self.loss)
        return nats, max_logit_penalty(x, self.model.head, logits) if self.penalty else None

    def in_chunks(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `at_once`, holding the states between chunks and the activations of one chunk.

        Each chunk is run again in the backward pass, from the state that it started with.
        """
        state: State | None = self.model.init_state(len(ids))
        parts = []
        for chunk in zip(*(x.split(self.chunk_len, 1) for x in (ids, targets)), strict=True):
            assert state is not None
            if self.truncated:
                state = {name: value.detach() for name, value in state.items()}
            # nothing in a model draws random numbers, so their state need not be kept
            *sums, state = checkpoint(
                self.sums, *chunk, state, use_reentrant=False, preserve_rng_state=False
            )
            parts.append(torch.stack(sums))
        nats, *squares = torch.stack(parts).sum(0)
        n_targets = (targets != IGNORE).sum()
        return nats / n_targets, squares[0] / ids.numel() if squares else None

    def sums(self, ids: Tensor, targets: Tensor, state: State) -> tuple[Tensor | State | None, ...]:
        """Of one chunk: nats, with a penalty its sum over positions, and the state after it."""
        x, after = self.model.features(ids, state)
        nats, logits = cross_entropy(x, self.model.head, targets, self.loss, "sum")
        if not self.penalty:
            return nats, after
        squares = max_logit_penalty(x, self.model.head, logits) * ids.numel()
        return nats, squares, after

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        self.lr = optimizer.param_groups[0]["lr"]
        self.grad_norm = clip_gradients(self.model.parameters(), self.grad_clip or math.inf)

    def on_train_start(self) -> None:
        # the rate of the next step, stored by a run of a smaller budget, is of this budget now
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
        fraction = self.schedule(self.trainer.global_step, self.total_steps)
        groups = scheduler.optimizer.param_groups
        for group, peak in zip(groups, scheduler.base_lrs, strict=True):
            group["lr"] = peak * fraction

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        end_after_last_step(self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        set_counters(checkpoint, self.trainer.accumulate_grad_batches)

    def on_validation_epoch_start(self) -> None:
        self.val_sums = [0.0, 0.0, 0.0]  # nats, targets, bytes; Python's floats are float64

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        ids, targets = batch  # (B, T) both
        counted = targets[targets != IGNORE]
        state = self.model.init_state(len(ids)) if self.is_long(ids) else None
        length = ids.shape[1] if state is None else self.chunk_len
        for part, wanted in zip(ids.split(length, 1), targets.split(length, 1), strict=True):
            x, state = self.model.features(part, state)
            nats, _ = cross_entropy(x, self.model.head, wanted, self.loss, "sum")
            self.val_sums[0] += float(nats)
        self.val_sums[1] += counted.numel()
        if self.token_bytes is not None:
            self.val_sums[2] += int(self.token_bytes[counted].sum())

    def on_validation_epoch_end(self) -> None:
        sums = self.val_sums
        if self.trainer.world_size > 1:  # not for one: Apple's GPUs have no float64
            local = torch.tensor(sums, dtype=torch.float64, device=self.device)
            sums = self.trainer.strategy.reduce(local, reduce_op="sum").tolist()
        nats, n_tokens, n_bytes = sums
        self.val_loss = nats / n_tokens
        self.val_bpb = bits_per_byte(nats, n_bytes)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.model)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.schedule(step, self.total_steps)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }
