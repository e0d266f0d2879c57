"""RWKV-4 as its authors' files hold it, under our names, and as Hugging Face's RwkvForCausalLM."""

from collections.abc import Mapping
from typing import Any

from models.formats import SIZES, Format, Weights, check_fields, shared_config, whole_field
from models.formats import as_they_are as refuse_rescaled
from models.rwkv4 import rescale
from models.rwkv4.model import RWKV4

FFN = "ffn.key.weight"


def settings(config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """ctx_len out of a config.json.

    Raises:
        ValueError: naming the field that contradicts the tensors' `sizes`, or has a value that this
            RWKV cannot follow.
    """
    known = {theirs: sizes[ours] for ours, theirs in SIZES.items()}
    known["attention_hidden_size"] = sizes["n_embd"]
    check_fields(config, {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": False}, known)
    return {"ctx_len": whole_field(config, "context_length", 1024)}


def config(model: RWKV4, eot_id: int, dtype: str) -> dict[str, Any]:
    """The config.json of a model. `dtype` is that of its weights, "float32" for one.

    `rescale_every` is 0: with another value Hugging Face's class changes the weights when it runs,
    and saves the changed ones. Only float16 needs it.

    Raises:
        ValueError: for an RWKV of one layer, which Hugging Face's class cannot be.
    """
    if model.n_layer == 1:  # it divides by n_layer - 1
        raise ValueError("Hugging Face's RWKV has two layers or more: this model has one")
    return {
        "architectures": ["RwkvForCausalLM"],
        "model_type": "rwkv",
        "attention_hidden_size": model.n_embd,
        "context_length": model.ctx_len,
        "layer_norm_epsilon": 1e-5,
        "rescale_every": 0,
        **shared_config(model, eot_id, dtype),
    }


def restore(config: Mapping[str, Any], weights: Weights, rescaled: bool | None) -> Weights:
    """The weights as they were trained, where the folder may have been saved divided.

    Raises:
        ValueError: if they look divided and the user has not said whether they are.
    """
    every = rescale.halving_period(config)
    if every <= 0:
        return refuse_rescaled(config, weights, rescaled)
    if rescaled is None:
        step = rescale.step_height(weights, every)
        if step is not None and step < rescale.SUSPICIOUS:
            raise ValueError(
                f"attention.output and feed_forward.value fall by 2^{step:.2f} every {every} "
                "layers, as if the folder was saved after the model had run in inference mode, "
                "which halves them: say rescaled=true to multiply them back, or rescaled=false to "
                "take them as they are"
            )
    if not rescaled:
        return weights
    shifts = {name: rescale.shift(name, every) for name in weights}
    # only what is to change is copied into memory
    return {name: w * 2 ** shifts[name] if shifts[name] else w for name, w in weights.items()}


def before_check(model: Any, divided: bool) -> None:
    """Let Hugging Face's model take its matrices as they lie in the folder.

    Left alone it would halve as it runs, exact but for its norms' epsilon.
    """
    if divided:
        model.rwkv.layers_are_rescaled = True
    else:
        model.config.rescale_every = 0


FORMATS = (
    Format(name="rwkv_pth", ffn=FFN, suffix=".pth"),
    Format(name="rwkv_safetensors", ffn=FFN, suffix=".safetensors"),
    Format(
        name="hf_rwkv",
        ffn=FFN,
        model_type="rwkv",
        names={
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
        settings=settings,
        config=config,
        restore=restore,
        before_check=before_check,
    ),
)
