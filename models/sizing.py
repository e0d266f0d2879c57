"""Sizes: any family is made as large as a reference by solving for one width.

A size names a family and a shape; the parameters (or FLOPs) of that model are what every other
family is solved to, at the same n_layer and n_embd. Nothing is allocated.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from models.language_model import LanguageModel, count_parameters

MEASURES: dict[str, Callable[[LanguageModel], int]] = {
    "non_embedding": lambda model: count_parameters(model)["non_embedding"],
    "total": lambda model: count_parameters(model)["total"],
    "flops": lambda model: model.flops_per_token(model.ctx_len),
}
SHARED = ("vocab_size", "ctx_len", "n_layer", "n_embd")  # sizes that every family has


@dataclass(frozen=True)
class Match:
    """A width that was solved for, and how near it comes.

    Attributes:
        by: the measure, one of `MEASURES`.
        n_ffn: the width of the feed-forward part.
        wanted: the measure of the reference.
        found: the measure of the model with this width.
    """

    by: str
    n_ffn: int
    wanted: int
    found: int

    @property
    def deviation(self) -> float:
        """By how much the model is larger than the reference, as a fraction of it."""
        return self.found / self.wanted - 1


def build_empty(architecture: type[LanguageModel], sizes: Mapping[str, Any]) -> LanguageModel:
    """A model without memory, of those of the sizes that its architecture has."""
    known = inspect.signature(architecture).parameters
    with torch.device("meta"):
        return architecture(**{name: value for name, value in sizes.items() if name in known})


def solve(
    architecture: type[LanguageModel],
    settings: Mapping[str, Any],
    reference: LanguageModel,
    by: str,
) -> Match:
    """The n_ffn that makes an architecture the size of a reference.

    It is rounded to a multiple of 8, of 64 from n_embd 256 on, as fast matrix products like it.

    Args:
        settings: arguments of the architecture; n_ffn among them is ignored, sizes that are not
            there (vocab_size, ctx_len, n_layer, n_embd) are the reference's.
        by: non_embedding or total (parameters), or flops (of a training token at ctx_len).

    Raises:
        ValueError: if no width does it, or the architecture cannot have these settings.
    """
    if by not in MEASURES:
        raise ValueError(f"match is {by!r}: choose {', '.join(MEASURES)}")
    sizes = {name: getattr(reference, name) for name in SHARED} | dict(settings)
    measure, wanted = MEASURES[by], MEASURES[by](reference)

    def at(n_ffn: int) -> int:
        with torch.device("meta"):
            return measure(architecture(**sizes | {"n_ffn": n_ffn}))

    step = 64 if sizes["n_embd"] >= 256 else 8
    smallest = at(step)
    per_step = at(2 * step) - smallest  # every measure is affine in n_ffn
    n_ffn = step * round(1 + (wanted - smallest) / per_step)
    if n_ffn < step:
        raise ValueError(
            f"{architecture.__name__} with n_layer={sizes['n_layer']} n_embd={sizes['n_embd']} has "
            f"{smallest:,} {by} at n_ffn={step}, more than the {wanted:,} to match: make it smaller"
        )
    return Match(by, n_ffn, wanted, at(n_ffn))
