"""Make one model the size of another by solving for the width of its feed-forward part.

`total` and `non_embedding` match parameters, `flops` the training FLOPs per token at ctx_len.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from models.gpt.model import GPT
from models.language_model import LanguageModel, count_parameters
from models.rwkv4.model import RWKV4

MEASURES: dict[str, Callable[[LanguageModel], int]] = {
    "total": lambda model: count_parameters(model)["total"],
    "non_embedding": lambda model: count_parameters(model)["non_embedding"],
    "flops": lambda model: model.flops_per_token(model.ctx_len),
}


def matched_sizes(
    architecture: Callable[..., LanguageModel],
    target: LanguageModel,
    by: str = "total",
    **sizes: Any,
) -> dict[str, Any]:
    """Arguments that make `architecture` the size of `target`, `n_ffn` solved for and rounded.

    Sizes not given (vocab_size, ctx_len, n_layer, n_embd) are the target's. Nothing is allocated.
    Raises ValueError when no n_ffn does it, or when the architecture cannot have these sizes.
    """
    if by not in MEASURES:
        raise ValueError(f"cannot match by {by!r}; choose one of {', '.join(MEASURES)}")
    shared = ("vocab_size", "ctx_len", "n_layer", "n_embd")
    sizes = {name: getattr(target, name) for name in shared} | sizes
    try:
        inspect.signature(architecture).bind(**sizes)
    except TypeError as error:
        raise ValueError(f"cannot match {_name(architecture)}: {error}") from None
    size, wanted = MEASURES[by], MEASURES[by](target)
    with torch.device("meta"):
        at_1, at_2 = (size(architecture(**sizes, n_ffn=n)) for n in (1, 2))
    per_channel = at_2 - at_1  # every measure is affine in n_ffn
    n_ffn = round(1 + (wanted - at_1) / per_channel)
    if n_ffn < 1:
        raise ValueError(
            f"{_name(architecture)} with n_layer={sizes['n_layer']} n_embd={sizes['n_embd']} has "
            f"{at_1:,} {by} at n_ffn=1, more than the {wanted:,} to match; make it smaller"
        )
    return sizes | {"n_ffn": n_ffn}


def _name(architecture: Callable[..., LanguageModel]) -> str:
    return getattr(architecture, "__name__", repr(architecture))


def matched_gpt(
    vocab_size: int, ctx_len: int, n_layer: int, n_embd: int, n_head: int, by: str = "total"
) -> GPT:
    """The GPT that is the size of RWKV-4 with these sizes.

    Raises ValueError when there is none.
    """
    with torch.device("meta"):
        rwkv = RWKV4(vocab_size, n_layer, n_embd, ctx_len)
    return GPT(**matched_sizes(GPT, rwkv, by, n_head=n_head))
