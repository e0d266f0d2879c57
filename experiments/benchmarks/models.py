"""The models that are measured: every family at one size, and its external implementations.

An external implementation is found by the formats of a family's checkpoints: transformers builds
the format's config.json, the `rwkv` package reads the official files.
"""

import inspect
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from models.families import families
from models.formats import Format
from models.language_model import LanguageModel
from models.sizing import build_empty, solve


def at_size(size: dict[str, Any], vocab_size: int, ctx_len: int) -> dict[str, dict[str, Any]]:
    """Arguments that make every family as large, in parameters, as the size's reference.

    Args:
        size: the keys of a yaml of conf/size.
    """
    shape = {key: value for key, value in size.items() if key.startswith("n_")}
    sizes = {"vocab_size": vocab_size, "ctx_len": ctx_len, **shape}
    reference = build_empty(families()[size["reference"]].model, sizes)
    arguments = {}
    for name, family in families().items():
        known = inspect.signature(family.model).parameters
        given = {key: value for key, value in sizes.items() if key in known}
        width = solve(family.model, given, reference, "non_embedding").n_ffn
        arguments[name] = given | {"n_ffn": width}
    return arguments


def with_random_weights(family: str, arguments: dict[str, Any]) -> LanguageModel:
    """A model whose predictions differ from token to token, as those of a new one do not."""
    torch.manual_seed(0)
    model = families()[family].model(**arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model.eval()


def has_package(model: LanguageModel) -> bool:
    """Whether the `rwkv` package is installed and reads a format of the model's family."""
    forms = families()[model.family].formats
    return find_spec("rwkv") is not None and any(form.library == "rwkv" for form in forms)


def hugging_face(model: LanguageModel, eot_id: int = 0) -> nn.Module | None:
    """Transformers' model of the same architecture and sizes, newly initialised.

    Returns:
        None if transformers is not installed, or the family has no format of it.
    """
    form = _hugging_face_format(model)
    if find_spec("transformers") is None or form is None or form.config is None:
        return None
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = form.config(model, eot_id, "float32")
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))


def _hugging_face_format(model: LanguageModel) -> Format | None:
    forms = families()[model.family].formats
    return next((form for form in forms if form.library == "transformers"), None)


def copy_weights(model: LanguageModel, external: nn.Module) -> None:
    """Give a model of `hugging_face` the weights of ours."""
    form = _hugging_face_format(model)
    assert form is not None
    newest = {older: newer for newer, older in form.aliases.items()}
    names = {name: form.external_name(name) for name in model.state_dict()}
    weights = {newest.get(names[k], names[k]): v for k, v in model.state_dict().items()}
    missing, unexpected = external.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not [name for name in missing if form.file_name(name)]
