"""RWKV-4's fused step of one token (`step.cpp`).

B rows, L layers, C n_embd, F n_ffn.
"""

from pathlib import Path

import torch
from torch import Tensor

from models.ops.cpu import Kernel
from models.ops.step import Weights, names

STEP = Kernel(Path(__file__).with_name("step.cpp"), "rwkv4_step", n_sizes=4, n_arrays=8)
STEP_NAMES = names(
    "ln1.weight ln1.bias ln2.weight ln2.bias att.time_decay att.time_first att.time_mix_k "
    "att.time_mix_v att.time_mix_r ffn.time_mix_k ffn.time_mix_r",
    "att.key.weight att.value.weight att.receptance.weight att.output.weight "
    "ffn.key.weight ffn.receptance.weight ffn.value.weight",
)


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
    STEP.over_layers(
        weights[0][1][0].dtype, (B, L, C, F), pointers,
        x, *old, *(new[name] for name in names),
    )  # fmt: skip
    return x, new
