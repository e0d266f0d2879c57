"""External checkpoint formats: the names, shapes and settings in which they hold a family's model.

A family lists its formats beside its model; here is what all of them share. Reading and writing
files is the business of `experiments/conversion`.

C n_embd, F n_ffn, V vocabulary, L layers.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from models.language_model import LanguageModel

Shapes = Mapping[str, Sequence[int]]
Weights = dict[str, Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# what Hugging Face's config.json calls the sizes that all families have
SIZES = {
    "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_ffn": "intermediate_size",
}


def no_settings(config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Of a bare file, which says nothing but its tensors."""
    return {}


def as_they_are(config: Mapping[str, Any], weights: Weights, rescaled: bool | None) -> Weights:
    """The weights, of a format that never holds anything else."""
    if rescaled is not None:
        raise ValueError(
            "rescaled= is for weights divided by rescale_every above 0: here are none; leave it out"
        )
    return weights


def nothing_to_set(model: Any, divided: bool) -> None:
    """The external library's model computes plainly as it is."""


@dataclass(frozen=True)
class Format:
    """An external checkpoint format of a family.

    Attributes:
        name: as manifests and messages call it.
        ffn: the matrix (F, C) of a block that says how wide the feed-forward part is.
        suffix: of its file; empty: a folder in Hugging Face's format.
        model_type: what a folder's config.json says of the family.
        names: our parts of a tensor's name and the format's; what is not here is called the same.
        aliases: what some writers call the same tensor.
        buffers: names of tensors in old files that are no weights.
        settings: (config.json, sizes) -> the constructor's settings besides sizes; ValueError for
            what our model cannot be.
        config: (model, end-of-text id, dtype) -> the content of config.json.
        restore: (config.json, weights, `rescaled` of conf/convert.yaml) -> the weights as trained.
        before_check: (the external library's model, divided) -> None: make it compute plainly.
    """

    name: str
    ffn: str
    suffix: str = ""
    model_type: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    buffers: re.Pattern[str] | None = None
    settings: Callable[[Mapping[str, Any], Mapping[str, int]], dict[str, Any]] = no_settings
    config: Callable[[Any, int, str], dict[str, Any]] | None = None
    restore: Callable[[Mapping[str, Any], Weights, bool | None], Weights] = as_they_are
    before_check: Callable[[Any, bool], None] = nothing_to_set

    @property
    def library(self) -> str:
        """The library that reads the format, to check against."""
        return "rwkv" if self.suffix else "transformers"

    def external_name(self, name: str) -> str:
        """What the format calls our tensor `name`."""
        return ".".join(self.names.get(part, part) for part in name.split("."))

    def file_name(self, name: str) -> str | None:
        """A tensor's name in a file without a trainer's prefix or an alias; None: no weight."""
        name = name.removeprefix("_forward_module.")
        if self.buffers and self.buffers.search(name):
            return None
        return self.aliases.get(name, name)

    def infer_sizes(self, shapes: Shapes) -> dict[str, int]:
        """V, L, C and F of a checkpoint, from the shapes of its tensors under the format's names.

        Raises:
            ValueError: if a tensor that says so is missing, or is no matrix.
        """
        V, C = self._matrix(shapes, "emb.weight")
        F = self._matrix(shapes, f"blocks.0.{self.ffn}")[0]
        pattern = re.compile(re.escape(self.external_name("blocks")) + r"\.(\d+)\.")
        layers = {found[1] for found in map(pattern.match, shapes) if found}
        return {"vocab_size": V, "n_layer": len(layers), "n_embd": C, "n_ffn": F}

    def _matrix(self, shapes: Shapes, name: str) -> Sequence[int]:
        name = self.external_name(name)
        if name not in shapes:
            raise ValueError(f"tensor {name} is missing: not a whole checkpoint of this format")
        if len(shapes[name]) != 2:
            raise ValueError(f"tensor {name} has shape {tuple(shapes[name])}: no matrix")
        return shapes[name]

    def match(self, shapes: Shapes, model: LanguageModel) -> dict[str, str]:
        """Our name -> the format's for every tensor of the model, all there, of the right shape.

        A vector may come as (C) or as (1, 1, C).

        Raises:
            ValueError: naming the first tensor that is one too many, missing or of another shape.
        """
        ours = model.state_dict()
        names = {name: self.external_name(name) for name in ours}
        for external in shapes.keys() - set(names.values()):
            raise ValueError(f"tensor {external} is not one of a {model.family} in this format")
        for name, external in names.items():
            if external not in shapes:
                raise ValueError(f"tensor {external} is missing")
            wanted, found = list(ours[name].shape), list(shapes[external])
            if found != wanted and not (_is_vector(wanted) and _is_vector(found, wanted[-1])):
                raise ValueError(
                    f"tensor {external} has shape {tuple(found)}, not {tuple(wanted)} as the "
                    "others imply"
                )
        return names


def _is_vector(shape: Sequence[int], size: int | None = None) -> bool:
    return (not shape[:-1] or set(shape[:-1]) == {1}) and size in (None, *shape[-1:])


def check_fields(
    config: Mapping[str, Any], fixed: Mapping[str, Any], sizes: Mapping[str, int]
) -> None:
    """Raise ValueError for a field of config.json that our model cannot follow.

    Args:
        fixed: fields whose only value that our model has is this; absent means the same.
        sizes: by field, what the tensors say.
    """
    for name, value in fixed.items():
        if name in config and config[name] != value:
            raise ValueError(
                f"config.json has {name}={config[name]!r}: only {value!r} can be represented here"
            )
    for name, size in sizes.items():
        if config.get(name, size) not in (size, None):
            raise ValueError(f"config.json has {name}={config[name]!r}, its tensors have {size}")


def whole_field(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A whole number above 0 out of config.json. Raises ValueError for anything else."""
    value = config.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json has {name}={value!r}: a whole number above 0 is needed")
    return value


def shared_config(model: Any, eot_id: int, dtype: str) -> dict[str, Any]:
    """The fields of config.json that all families write."""
    sizes = {theirs: getattr(model, ours) for ours, theirs in SIZES.items()}
    ends = {"bos_token_id": eot_id, "eos_token_id": eot_id}
    return sizes | ends | {"tie_word_embeddings": False, "torch_dtype": dtype}


def same_dtype(tensors: Iterable[Tensor]) -> str:
    """The dtype of most values, "bfloat16" for one.

    Raises:
        ValueError: if a tensor has one that weights are not kept in.
    """
    counts: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.dtype not in DTYPES.values():
            raise ValueError(f"weights of {tensor.dtype} cannot be used: {', '.join(DTYPES)} can")
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return str(max(counts, key=lambda dtype: counts[dtype])).removeprefix("torch.")
