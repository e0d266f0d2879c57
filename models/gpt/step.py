"""The GPT's fused step of one token (`step.cpp`).

B rows, L layers, H heads, K head size, F n_ffn, R rotary size.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from models.ops.cpu import Kernel
from models.ops.step import Weights, names

STEP = Kernel(Path(__file__).with_name("step.cpp"), "gpt_step", n_sizes=9, n_arrays=5)
STEP_NAMES = names(
    "ln1.weight ln1.bias ln2.weight ln2.bias att.qkv.bias att.output.bias ffn.up.bias "
    "ffn.down.bias",
    "att.qkv.weight att.output.weight ffn.up.weight ffn.down.weight",
)


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
    STEP.over_layers(
        weights[0][1][0].dtype, (*sizes, angles.shape[1], len(angles)), pointers,
        x, n_pad, angles.cos(), angles.sin(),
    )  # fmt: skip
    return x, new
