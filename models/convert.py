"""Outside checkpoints: the names, shapes and settings in which they tell the same model.

Formats: ``rwkv_pth`` and ``rwkv_safetensors`` (the names of the official RWKV-4 files, which are
ours), ``hf_rwkv`` and ``hf_gpt_neox`` (folders of Hugging Face's RwkvForCausalLM and
GPTNeoXForCausalLM). Reading and writing files is the business of `experiments/exchange.py`.

C n_embd, F n_ffn, V vocabulary, L layers.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.gpt.model import GPT, ROTARY_BASE
from models.language_model import LanguageModel
from models.rwkv4.model import RWKV4

Shapes = Mapping[str, Sequence[int]]

FAMILIES: dict[str, type[RWKV4] | type[GPT]] = {
    "rwkv_pth": RWKV4,
    "rwkv_safetensors": RWKV4,
    "hf_rwkv": RWKV4,
    "hf_gpt_neox": GPT,
}
MODEL_TYPES = {"rwkv": "hf_rwkv", "gpt_neox": "hf_gpt_neox"}  # of Hugging Face's config.json

# Our parts of a name and theirs, in the files; what is not here is called the same.
NAMES: dict[str, dict[str, str]] = {
    "rwkv_pth": {},
    "rwkv_safetensors": {},
    "hf_rwkv": {
        "emb": "rwkv.embeddings",
        "blocks": "rwkv.blocks",
        "ln_out": "rwkv.ln_out",
        "ln0": "pre_ln",
        "att": "attention",
        "ffn": "feed_forward",
        "time_mix_k": "time_mix_key",
        "time_mix_v": "time_mix_value",
        "time_mix_r": "time_mix_receptance",
    },
    "hf_gpt_neox": {
        "emb": "gpt_neox.embed_in",
        "blocks": "gpt_neox.layers",
        "ln_out": "gpt_neox.final_layer_norm",
        "head": "embed_out",
        "ln1": "input_layernorm",
        "ln2": "post_attention_layernorm",
        "att": "attention",
        "qkv": "query_key_value",
        "output": "dense",
        "ffn": "mlp",
        "up": "dense_h_to_4h",
        "down": "dense_4h_to_h",
    },
}
# What some writers call the same tensor, and buffers in old files that are no weights.
ALIASES = {"hf_gpt_neox": {"lm_head.weight": "embed_out.weight"}}
BUFFERS = re.compile(r"attention\.(bias|masked_bias)$|rotary_emb\.inv_freq$")

# Fields of config.json whose only value that our models have is this; absent means the same.
FIXED: dict[str, dict[str, Any]] = {
    "hf_rwkv": {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": False},
    "hf_gpt_neox": {
        "use_parallel_residual": True,
        "rotary_emb_base": ROTARY_BASE,
        "rope_theta": ROTARY_BASE,
        "rope_scaling": None,
        "hidden_act": "gelu",
        "tie_word_embeddings": False,
        "layer_norm_eps": 1e-5,
        "attention_bias": True,
    },
}
SIZES = {
    "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_ffn": "intermediate_size",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def outside_name(name: str, kind: str) -> str:
    """What a format calls our tensor `name`."""
    return ".".join(NAMES[kind].get(part, part) for part in name.split("."))


def file_name(name: str, kind: str) -> str | None:
    """A tensor's name in a file without a trainer's prefix or another name; None: no weight."""
    name = name.removeprefix("_forward_module.")
    if kind == "hf_gpt_neox" and BUFFERS.search(name):
        return None
    return ALIASES.get(kind, {}).get(name, name)


def infer_sizes(shapes: Shapes, kind: str) -> dict[str, int]:
    """V, L, C and F of a checkpoint, from the shapes of its tensors under the format's names.

    Raises:
        ValueError: if a tensor that tells them is missing, or is no matrix.
    """
    first = "ffn.key.weight" if FAMILIES[kind] is RWKV4 else "ffn.up.weight"

    def matrix(name: str) -> Sequence[int]:
        theirs = outside_name(name, kind)
        if theirs not in shapes:
            raise ValueError(f"tensor {theirs} is missing: not a whole checkpoint of this format")
        if len(shapes[theirs]) != 2:
            raise ValueError(f"tensor {theirs} has shape {tuple(shapes[theirs])}: no matrix")
        return shapes[theirs]

    V, C = matrix("emb.weight")
    F = matrix(f"blocks.0.{first}")[0]
    pattern = re.compile(re.escape(outside_name("blocks", kind)) + r"\.(\d+)\.")
    layers = {found[1] for found in map(pattern.match, shapes) if found}
    return {"vocab_size": V, "n_layer": len(layers), "n_embd": C, "n_ffn": F}


def empty_model(net: Mapping[str, Any], kind: str) -> LanguageModel:
    """A model of these settings whose tensors have shapes but no memory.

    Raises:
        ValueError: for settings that no model of the family can have.
    """
    with torch.device("meta"):
        return FAMILIES[kind](**net)


def match(shapes: Shapes, model: LanguageModel, kind: str) -> dict[str, str]:
    """Our name -> theirs for every tensor of the model, all present and of the right shape.

    A vector may come as (C) or as (1, 1, C).

    Raises:
        ValueError: naming the first tensor that is one too many, missing or of another shape.
    """
    ours = model.state_dict()
    names = {name: outside_name(name, kind) for name in ours}
    for theirs in shapes:
        if theirs not in set(names.values()):
            raise ValueError(f"tensor {theirs} is not one of a {model.family} in this format")
    for name, theirs in names.items():
        if theirs not in shapes:
            raise ValueError(f"tensor {theirs} is missing")
        wanted, found = list(ours[name].shape), list(shapes[theirs])
        if found != wanted and not (_is_vector(wanted) and _is_vector(found, wanted[-1])):
            raise ValueError(
                f"tensor {theirs} has shape {tuple(found)}, not {tuple(wanted)} as the others imply"
            )
    return names


def _is_vector(shape: Sequence[int], size: int | None = None) -> bool:
    return (not shape[:-1] or set(shape[:-1]) == {1}) and size in (None, *shape[-1:])


def hf_settings(config: Mapping[str, Any], sizes: Mapping[str, int], kind: str) -> dict[str, Any]:
    """ctx_len, and for a GPT n_head and rotary_pct, out of a config.json.

    Raises:
        ValueError: naming the field that is missing, contradicts the tensors' `sizes`, or has a
            value that our models cannot follow.
    """
    config = _with_rope(config) if kind == "hf_gpt_neox" else config
    for field, value in FIXED[kind].items():
        if field in config and config[field] != value:
            raise ValueError(
                f"config.json has {field}={config[field]!r}: only {value!r} can be represented here"
            )
    known = {theirs: sizes[ours] for ours, theirs in SIZES.items()}
    if kind == "hf_rwkv":
        known["attention_hidden_size"] = sizes["n_embd"]
    for field, size in known.items():
        if config.get(field, size) not in (size, None):
            raise ValueError(f"config.json has {field}={config[field]!r}, its tensors have {size}")
    if kind == "hf_rwkv":
        return {"ctx_len": _whole(config, "context_length", 1024)}
    share = config.get("rotary_pct", 0.25)
    if not isinstance(share, int | float) or not 0 <= share <= 1:
        raise ValueError(f"config.json has rotary_pct={share!r}: a number from 0 to 1 is needed")
    return {
        "ctx_len": _whole(config, "max_position_embeddings", 2048),
        "n_head": _whole(config, "num_attention_heads"),
        "rotary_pct": float(share),
    }


def _with_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with its newer `rope_parameters` spelt as the older fields."""
    flat = dict(config)
    rope = flat.pop("rope_parameters", None) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json has rope_parameters={rope!r}: an object is needed")
    rope = dict(rope)
    renamed = {"partial_rotary_factor": "rotary_pct", "rope_theta": "rope_theta"}
    for new, old in renamed.items():
        if new in rope:
            flat[old] = rope.pop(new)
    if rope.pop("rope_type", "default") != "default" or rope:
        flat["rope_scaling"] = config["rope_parameters"]
    return flat


def _whole(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = config.get(field, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json has {field}={value!r}: a whole number above 0 is needed")
    return value


def hf_config(model: LanguageModel, eot_id: int, dtype: str) -> dict[str, Any]:
    """The config.json of a model. `dtype` is that of its weights, "float32" for one.

    RWKV's `rescale_every` is 0: with another value Hugging Face's class changes the weights when it
    runs, and saves the changed ones. Only float16 needs it.

    Raises:
        ValueError: for an RWKV of one layer, which Hugging Face's class cannot be.
    """
    if isinstance(model, RWKV4) and model.n_layer == 1:  # it divides by n_layer - 1
        raise ValueError("Hugging Face's RWKV has two layers or more: this model has one")
    shared = {
        "vocab_size": model.vocab_size,
        "num_hidden_layers": model.n_layer,
        "hidden_size": model.n_embd,
        "intermediate_size": model.n_ffn,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }
    if isinstance(model, RWKV4):
        return {
            "architectures": ["RwkvForCausalLM"],
            "model_type": "rwkv",
            "attention_hidden_size": model.n_embd,
            "context_length": model.ctx_len,
            "layer_norm_epsilon": 1e-5,
            "rescale_every": 0,
            **shared,
        }
    assert isinstance(model, GPT)
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "num_attention_heads": model.n_head,
        "max_position_embeddings": model.ctx_len,
        "hidden_act": "gelu",
        "rotary_pct": _rotary_pct(model),
        "rotary_emb_base": int(ROTARY_BASE),
        "use_parallel_residual": True,
        "layer_norm_eps": 1e-5,
        "attention_bias": True,
        **shared,
    }


def _rotary_pct(model: GPT) -> float:
    head_size = model.n_embd // model.n_head
    share = model.n_rotary / head_size
    while int(head_size * share) < model.n_rotary:  # 49 * (1 / 49) is below 1
        share = math.nextafter(share, 1)
    return share


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
