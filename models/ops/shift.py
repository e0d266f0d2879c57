"""RWKV's projections and activation, which keep less for the gradient than autograd would.

B batch, T time, C channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.ops.linear import linear


class ShiftLinear(torch.autograd.Function):
    """Projections of mixes of each token with the one before it: W (m x_t + (1 - m) x_{t-1}).

    Autograd would keep every mix for the gradient of its W; here they are made again from x, which
    takes one cheap pass each. Its own backward would also touch memory nearly twice as often.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, previous: Tensor, mixes: int, *mixes_and_weights: Tensor
    ) -> tuple[Tensor, ...]:
        """x (B, T, C), `previous` (B, C) before its first token; `mixes` times (1, 1, C), then as
        many weights (out, C) -> that many (B, T, out).
        """
        ctx.save_for_backward(x, previous, *mixes_and_weights)
        ctx.n = mixes
        before = shifted(x, previous)
        pairs = zip(mixes_and_weights[:mixes], mixes_and_weights[mixes:], strict=True)
        out = tuple(linear(torch.lerp(before, x, mix), weight) for mix, weight in pairs)
        ctx.dtype = out[0].dtype  # autocast's, where it is on
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, of `previous`, of each mix and of each weight."""
        x, previous, *rest = ctx.saved_tensors
        mixes, weights = rest[: ctx.n], rest[ctx.n :]
        before = shifted(x, previous)
        step = x - before
        of_mixes, of_weights = [], []
        of_x, of_both = torch.zeros_like(x), torch.zeros_like(x)
        for grad, mix, weight in zip(grads, mixes, weights, strict=True):
            rows = grad.flatten(0, 1).to(ctx.dtype)  # (B T, out)
            mixed = torch.lerp(before, x, mix).flatten(0, 1).to(ctx.dtype)
            of_weights.append((rows.T @ mixed).to(weight.dtype))
            of_mixed = (rows @ weight.to(ctx.dtype)).view_as(x).to(x.dtype)
            of_mixes.append((of_mixed * step).sum((0, 1), keepdim=True))
            of_both += of_mixed
            of_x.addcmul_(of_mixed, mix)
        of_before = of_both.sub_(of_x)
        of_x[:, :-1] += of_before[:, 1:]
        return of_x, of_before[:, 0], None, *of_mixes, *of_weights


def shifted(x: Tensor, previous: Tensor) -> Tensor:
    """x (B, T, C) one step later in time, starting with `previous` (B, C)."""
    return torch.cat([previous.unsqueeze(1), x[:, :-1]], dim=1)


class GatedLinear(torch.autograd.Function):
    """W (sigmoid(gate) y): keeps gate and y, and makes the gated product again for W's gradient."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """gate and y (B, T, C), weight (out, C) -> (B, T, out)."""
        ctx.save_for_backward(gate, y, weight)
        out = linear(torch.sigmoid(gate) * y, weight)
        ctx.dtype = out.dtype  # autocast's, where it is on
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of gate, y and weight."""
        gate, y, weight = ctx.saved_tensors
        opening = torch.sigmoid(gate)
        rows = grad.flatten(0, 1).to(ctx.dtype)  # (B T, out)
        gated = (opening * y).flatten(0, 1).to(ctx.dtype)
        of_weight = (rows.T @ gated).to(weight.dtype)
        of_gated = (rows @ weight.to(ctx.dtype)).view_as(y)
        of_gate = of_gated * y * opening * (1 - opening)
        return of_gate.to(gate.dtype), (of_gated * opening).to(y.dtype), of_weight


class SquaredReLU(torch.autograd.Function):
    """max(x, 0)^2, saving nothing but its result: F is the model's widest, and the next matrix
    product saves that anyway. The root of a square is right to the last bit or next to it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """x of any shape -> the same shape."""
        squared = torch.relu(x).square_()
        ctx.save_for_backward(squared)
        return squared

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """2 max(x, 0) grad."""
        (squared,) = ctx.saved_tensors
        return squared.sqrt().mul_(grad).mul_(2)


# What the functions above compute, without the cost of a node of autograd where there is none.


def shift_linear(
    x: Tensor, previous: Tensor, mixes: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """`ShiftLinear`; of one token without gradients, its mixes in one pass (weights alike)."""
    previous = previous.to(x.dtype)
    if torch.is_grad_enabled() or x.shape[1] > 1:
        return ShiftLinear.apply(x, previous, len(mixes), *mixes, *weights)
    mixed = torch.lerp(previous.unsqueeze(1), x, torch.stack(tuple(mixes)))  # (mixes, B, 1, C)
    return tuple(linear(one, weight) for one, weight in zip(mixed, weights, strict=True))


def gated_linear(gate: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """`GatedLinear`."""
    if torch.is_grad_enabled():
        return GatedLinear.apply(gate, y, weight)
    return linear(torch.sigmoid(gate) * y, weight)


def squared_relu(x: Tensor) -> Tensor:
    """`SquaredReLU`."""
    return SquaredReLU.apply(x) if torch.is_grad_enabled() else torch.relu(x).square_()
