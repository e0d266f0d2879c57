"""y = x W^T + b, also where only W is in a 16-bit type, and at the speed of memory for few rows.

Decoding one token is a pass over every weight; what a CPU library does with a matrix of one row
reaches a third of the memory's rate. `csrc/linear_cpu.cpp` takes such calls of both families.

N rows, I inputs, O outputs.
"""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.ops import cpu

Model = TypeVar("Model", bound=nn.Module)

MOST_ROWS = 8  # beyond, the library's matrix product is as fast
FEWEST_WEIGHTS = 2**13  # below, a call of ours costs more than it saves
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., I), weight (O, I), bias (O,) -> (..., O) in the dtype of x.

    weight may be bfloat16 or float16 where x is float32. Few rows on a CPU then multiply as float32
    all the same; many rows, or any on another device, are rounded to the type of weight. Under
    autocast the result is autocast's. Differentiable where weight and x share a dtype.
    """
    if _few_rows(x, weight):
        return cpu.linear(x.contiguous(), weight, bias)
    if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    y = F.linear(x.to(weight.dtype), weight).to(x.dtype)
    return y if bias is None else y + bias


def _few_rows(x: Tensor, weight: Tensor) -> bool:
    # the likeliest to fail and the cheapest to ask first: a step of a model asks a hundred times
    return (
        x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and 0 < x.numel() <= MOST_ROWS * weight.shape[1]
        and (weight.numel() >= FEWEST_WEIGHTS or weight.dtype != x.dtype)
        and x.is_cpu
        and weight.dtype in WEIGHTS
        and weight.is_contiguous()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and cpu.missing("linear_cpu.cpp") is None
    )


class Linear(nn.Linear):
    """`nn.Linear` that multiplies by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) -> (..., O)."""
        return linear(x, self.weight, self.bias)


def round_matrices(model: Model, dtype: torch.dtype) -> Model:
    """Keep a model's matrices and embeddings in dtype; vectors, norms and states stay as they are.

    For inference: in memory and in what a token reads, a model of bfloat16 or float16 weights,
    whose activations are float32.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            weight = module.weight.detach().to(dtype)
            module.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
    return model
