"""Cross-entropy over any language model's features, and what else is added to it."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # targets that do not count
CHUNK = 256  # positions whose logits loss=chunked holds at once: 50 MB at a vocabulary of 50k


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 if its dtype is a narrower one."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cross_entropy(
    x: Tensor, head: nn.Linear, targets: Tensor, loss: str, reduction: str = "mean"
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of ``head(x)`` in nats, over the targets that are not ``IGNORE``.

    Args:
        x: (B, T, C) features. targets: (B, T) int64.
        loss: "full" holds the (B*T, V) logits; "chunked" never holds them whole.
        reduction: "mean" or "sum".

    Returns:
        The loss, float32 (float64 where the features are); and the logits (B*T, V), None where
        they are not held.
    """
    x, targets = x.flatten(0, 1), targets.flatten()
    if loss == "full":
        logits = head(x)
        nats = F.cross_entropy(
            at_least_float32(logits), targets, reduction=reduction, ignore_index=IGNORE
        )
        return nats, logits

    def part(x: Tensor, targets: Tensor) -> Tensor:
        logits = at_least_float32(head(x))
        return F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE)

    # each chunk's logits are made again in the backward pass
    parts = [
        checkpoint(part, *pair, use_reentrant=False)
        for pair in zip(x.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    nats = torch.stack(parts).sum()
    return nats if reduction == "sum" else nats / (targets != IGNORE).sum(), None


def max_logit_penalty(x: Tensor, head: nn.Linear, logits: Tensor | None) -> Tensor:
    """Mean over positions of the squared largest logit, whose gradient reaches that logit alone.

    RWKV-4's trainer adds ``z_max * 1e-4 / (B*T)`` to the gradient of each position's largest logit;
    5e-5 times this value has that gradient, and as an ordinary loss term it is scaled and
    accumulated like one.

    Args:
        x: (B, T, C) features.
        logits: (B*T, V), or None: then found again, in chunks.
    """
    if logits is not None:
        largest_logits = logits.max(-1).values  # of equal ones, one gets all of the gradient
        return at_least_float32(largest_logits).square().mean()
    x = x.flatten(0, 1)
    with torch.no_grad():
        largest = torch.cat([head(part).argmax(-1) for part in x.split(CHUNK)])  # (B*T,)
    z_max = (at_least_float32(x) * at_least_float32(head.weight[largest])).sum(-1)
    return z_max.square().mean()


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients down to a norm of at most ``limit``; their norm before that, float32.

    Squares are added up in float64, so that the sum is the same however they are split over
    devices; a float32 sum over 40M of them can be off by 1e-5.
    """
    parameters = list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    total = torch.stack(torch._foreach_norm(local, 2, dtype=torch.float64)).square().sum()
    if any(isinstance(g, DTensor) for g in gradients):  # each process has its rows of all
        distributed.all_reduce(total)
    norm = total.sqrt().float()
    nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def bits_per_byte(nats: float, n_bytes: float) -> float | None:
    """Bits per UTF-8 byte of a text that cost ``nats``; None if its bytes are unknown."""
    return nats / math.log(2) / n_bytes if n_bytes else None
