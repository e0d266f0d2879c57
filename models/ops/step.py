"""One token through all layers of a model by one call into C++: what every family shares.

What PyTorch spends on starting a step's few hundred small operations is a third of the time that
a CPU needs to read the weights of a small model. Results are those of the layers' own code, to
rounding; modules within a block are not called.

B rows, L layers, C n_embd.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from models.ops import cpu
from models.ops.linear import MOST_ROWS, WEIGHTS

Names = tuple[tuple[tuple[str, ...], ...], ...]
Weights = tuple[list[Tensor], list[Tensor]]  # vectors and matrices of a layer


def names(vectors: str, matrices: str) -> Names:
    """Of a block's parameters, in the order of the struct of its step."""
    return tuple(
        tuple(tuple(one.split(".")) for one in some.split()) for some in (vectors, matrices)
    )


def step_weights(
    kernel: cpu.Kernel, x: Tensor, blocks: nn.ModuleList, names: Names, state: Iterable[Tensor]
) -> list[Weights] | None:
    """What a step reads of each block; None where x (B, T, C) and `state` must go layer by layer.

    That is: more than a token, many rows, gradients, autocast, compilation, hooks, another device,
    a dtype of x, state or vectors that is not float32, or no compiler.
    """
    if not (
        x.shape[1] == 1
        and 0 < x.shape[0] <= MOST_ROWS
        and type(x) is Tensor
        and x.is_cpu
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and kernel.missing() is None
        and not any(block._forward_hooks or block._forward_pre_hooks for block in blocks)
    ):
        return None
    try:
        weights = [_weights(block, names) for block in blocks]
    except KeyError:  # a parametrised weight, or a module of another kind in the place of ours
        return None
    vectors = [x for layer in weights for x in layer[0]]
    matrices = [x for layer in weights for x in layer[1]]
    plain = (
        matrices[0].dtype in WEIGHTS
        and {x.dtype for x in matrices} == {matrices[0].dtype}
        and {x.dtype for x in (*vectors, *state)} == {torch.float32}
        and all(x.is_contiguous() for x in (*vectors, *matrices))
        and all(x.is_cpu for x in state)
    )
    return weights if plain else None


def _weights(block: nn.Module, names: Names) -> Weights:
    # past nn.Module's way of finding attributes, which would take most of a step's overhead
    found: Weights = ([], [])
    for part, group in zip(found, names, strict=True):
        for *modules, name in group:
            owner: Any = block
            for module in modules:
                owner = owner._modules[module]
            part.append(owner._parameters[name])
    return found
