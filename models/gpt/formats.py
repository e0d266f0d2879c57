"""The GPT as Hugging Face's GPTNeoXForCausalLM, which Pythia's folders hold."""

import math
import re
from collections.abc import Mapping
from typing import Any

from models.formats import SIZES, Format, check_fields, shared_config, whole_field
from models.gpt.model import GPT, ROTARY_BASE

FIXED = {
    "use_parallel_residual": True,
    "rotary_emb_base": ROTARY_BASE,
    "rope_theta": ROTARY_BASE,
    "rope_scaling": None,
    "hidden_act": "gelu",
    "tie_word_embeddings": False,
    "layer_norm_eps": 1e-5,
    "attention_bias": True,
}


def settings(config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """ctx_len, n_head and rotary_pct out of a config.json.

    Raises:
        ValueError: naming the field that is missing, contradicts the tensors' `sizes`, or has a
            value that this GPT cannot follow.
    """
    config = with_rope(config)
    check_fields(config, FIXED, {theirs: sizes[ours] for ours, theirs in SIZES.items()})
    share = config.get("rotary_pct", 0.25)
    if not isinstance(share, int | float) or not 0 <= share <= 1:
        raise ValueError(f"config.json has rotary_pct={share!r}: a number from 0 to 1 is needed")
    return {
        "ctx_len": whole_field(config, "max_position_embeddings", 2048),
        "n_head": whole_field(config, "num_attention_heads"),
        "rotary_pct": float(share),
    }


def with_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with its newer `rope_parameters` spelt as the older fields."""
    flat = dict(config)
    rope = flat.pop("rope_parameters", None) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json has rope_parameters={rope!r}: an object is needed")
    rope = dict(rope)
    for new, old in {"partial_rotary_factor": "rotary_pct", "rope_theta": "rope_theta"}.items():
        if new in rope:
            flat[old] = rope.pop(new)
    if rope.pop("rope_type", "default") != "default" or rope:
        flat["rope_scaling"] = config["rope_parameters"]
    return flat


def config(model: GPT, eot_id: int, dtype: str) -> dict[str, Any]:
    """The config.json of a model. `dtype` is that of its weights, "float32" for one."""
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "num_attention_heads": model.n_head,
        "max_position_embeddings": model.ctx_len,
        "hidden_act": "gelu",
        "rotary_pct": rotary_share(model),
        "rotary_emb_base": int(ROTARY_BASE),
        "use_parallel_residual": True,
        "layer_norm_eps": 1e-5,
        "attention_bias": True,
        **shared_config(model, eot_id, dtype),
    }


def rotary_share(model: GPT) -> float:
    """The share of a head's channels that are rotated, such that it rounds to their number."""
    head_size = model.n_embd // model.n_head
    share = model.n_rotary / head_size
    while int(head_size * share) < model.n_rotary:  # 49 * (1 / 49) is below 1
        share = math.nextafter(share, 1)
    return share


FORMATS = (
    Format(
        name="hf_gpt_neox",
        ffn="ffn.up.weight",
        model_type="gpt_neox",
        names={
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
        aliases={"lm_head.weight": "embed_out.weight"},
        buffers=re.compile(r"attention\.(bias|masked_bias)$|rotary_emb\.inv_freq$"),
        settings=settings,
        config=config,
    ),
)
