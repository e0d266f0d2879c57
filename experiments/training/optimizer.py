"""Optimizer and learning-rate schedules: the shared recipe and each family's own.

Sources: RWKV paper (arXiv 2305.13048) appendix G and its training code; Pythia's published configs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from models.language_model import LanguageModel


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up, then half a cosine from the peak to ``final_ratio`` of it."""

    warmup_fraction: float
    final_ratio: float

    def __call__(self, step: int, total_steps: int) -> float:
        """Learning rate of optimizer step ``step`` (0-based), as a fraction of the peak."""
        warmup = max(1, round(self.warmup_fraction * total_steps))
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.final_ratio + (1 - self.final_ratio) * cosine


@dataclass(frozen=True)
class ConstantThenExponential:
    """Constant, then ``peak * (final / peak) ** progress``: the schedule of RWKV-4's trainer."""

    constant_fraction: float
    peak_lr: float
    final_lr: float | None  # None: a tenth of the peak

    def __call__(self, step: int, total_steps: int) -> float:
        """Learning rate of optimizer step ``step`` (0-based), as a fraction of the peak."""
        constant = self.constant_fraction * total_steps
        progress = min(1.0, max(0.0, (step - constant) / max(1.0, total_steps - constant)))
        final_lr = self.peak_lr / 10 if self.final_lr is None else self.final_lr
        return (final_lr / self.peak_lr) ** progress


Schedule = WarmupCosine | ConstantThenExponential


def make_optimizer(
    model: LanguageModel,
    *,
    peak_lr: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    lr_scale: bool,
    fused: bool = True,
) -> torch.optim.AdamW:
    """AdamW over the model's own parameter groups; with ``weight_decay=0`` this is Adam.

    Args:
        lr_scale: multiply the learning rate of each group by the multiplier its model states.
    """
    groups = [
        {
            "params": group["params"],
            "weight_decay": group["weight_decay"],
            "lr": peak_lr * (group["lr_scale"] if lr_scale else 1.0),
        }
        for group in model.param_groups(weight_decay)
    ]
    return torch.optim.AdamW(groups, lr=peak_lr, betas=(betas[0], betas[1]), eps=eps, fused=fused)
