"""One token through all layers of a model by one call into C++ (`csrc/step_cpu.cpp`), for both.

What PyTorch spends on starting a step's few hundred small operations is a third of the time that
a CPU needs to read the weights of a small model. Results are those of the layers' own code, to
rounding; modules within a block are not called.

B rows, L layers, C n_embd, H heads, K head size, R rotary size.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.ops import cpu
from models.ops.linear import MOST_ROWS, WEIGHTS

Names = tuple[tuple[tuple[str, ...], ...], ...]
Weights = tuple[list[Tensor], list[Tensor]]  # vectors and matrices of a layer


def names(vectors: str, matrices: str) -> Names:
    """Of a block's parameters, in the order of the struct in `step_cpu.cpp`."""
    return tuple(
        tuple(tuple(one.split(".")) for one in some.split()) for some in (vectors, matrices)
    )


def step_weights(
    x: Tensor, blocks: nn.ModuleList, names: Names, state: Iterable[Tensor]
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
        and cpu.missing("step_cpu.cpp") is None
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


def rwkv4_step(
    x: Tensor, state: dict[str, Tensor], weights: list[Weights]
) -> tuple[Tensor, dict[str, Tensor]]:
    """x (B, 1, C) after ln0 through all layers: (B, 1, C), and the state after (see `RWKV4`)."""
    x, new = x.clone(), {name: torch.empty_like(value) for name, value in state.items()}
    names = ("att_shift", "ffn_shift", "wkv")
    old = [state[name].contiguous() for name in names]
    pointers: list[int | None] = [x.data_ptr() for layer in weights for part in layer for x in part]
    B, L, C = new["att_shift"].shape
    F = len(weights[0][1][4])  # outputs of ffn.key
    cpu.step(
        "rwkv4_step", weights[0][1][0].dtype, (B, L, C, F), pointers,
        x, *old, *(new[name] for name in names),
    )  # fmt: skip
    return x, new


def gpt_step(
    x: Tensor,
    weights: list[Weights],
    still: Sequence[Tensor],
    old: Sequence[Tensor],
    angles: Tensor,
    n_pad: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x (B, 1, C) through all layers, with keys and values of tokens before: (B, 1, C), and `new`.

    `still`, `old` and `new` are k0, v0, k1, ...: each (B, H, t, K), `still` may be without any.
    What is attended to is `still` and then `new`, which is `old` with this token; angles
    (B or 1, R / 2) are its own, and the first n_pad[b] tokens of row b are passed over.
    """
    B, H, grown, K = old[0].shape
    F = len(weights[0][1][2])  # outputs of ffn.up
    new = x.new_empty(len(old), B, H, grown + 1, K).unbind(0)
    x = x.clone()
    cache = [part.contiguous() for part in old]
    before = [part.contiguous() for part in still]
    pointers: list[int | None] = []
    for l, layer in enumerate(weights):
        pointers += [one.data_ptr() for part in layer for one in part]
        pair = slice(2 * l, 2 * l + 2)
        pointers += [one.data_ptr() for one in before[pair]] or [None, None]
        pointers += [one.data_ptr() for one in (*cache[pair], *new[pair])]
    sizes = (B, len(weights), H * K, F, H, before[0].shape[2] if before else 0, grown)
    cpu.step(
        "gpt_step", weights[0][1][0].dtype, (*sizes, angles.shape[1], len(angles)), pointers,
        x, n_pad, angles.cos(), angles.sin(),
    )  # fmt: skip
    return x, new
