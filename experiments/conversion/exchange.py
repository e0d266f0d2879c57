"""Checkpoints in and out: an external file becomes a run directory, a run an external file.

What is written is made under a temporary name beside the target, checked against the library it is
from or for, and renamed.
"""

import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.config.targets import make
from experiments.conversion.external import compare
from experiments.conversion.weights_file import (
    Source,
    load_pickle,
    new_target,
    read_json,
    read_source,
    write_weights,
)
from experiments.data.tokenizer import END_OF_TEXT, JsonTokenizer, Tokenizer, read_tokenizer
from experiments.runs.run_dir import RunDir, open_external, yaml_of
from experiments.runs.trained_model import model_weights
from experiments.system.files import sha256, write_json, write_text
from models.families import families, formats
from models.formats import DTYPES, Format, same_dtype
from models.language_model import LanguageModel, count_parameters
from models.sizing import build_empty

CTX_LEN = 1024  # what the released RWKV-4 files were first trained at; a `.pth` does not say


def import_checkpoint(
    source: Path,
    target: Path,
    tokenizer_file: Path | None = None,
    ctx_len: int | None = None,
    training_tokens: int | None = None,
    dtype: str | None = None,
    rescaled: bool | None = None,
    check: bool = True,
) -> None:
    """Make the run directory `target` of an external checkpoint (keys: conf/convert.yaml).

    Raises:
        FileNotFoundError, ValueError: if the source cannot be read or represented, with the reason,
            or if its library computes other logits. Nothing is left behind.
    """
    found = read_source(source)
    weights, model, net = represent(found, ctx_len, rescaled)
    kept = checked_values(weights, dtype)
    described = find_tokenizer(source, tokenizer_file, model.vocab_size)
    parts = target.resolve().parts[-3:]
    if len(parts) < 3:
        raise ValueError(f"target={target} must end in SUITE/MODEL/LABEL: a run is named by these")
    suite, name, _ = parts
    converted = {
        "format": found.kind,
        "file": source.resolve().name,
        "sha256": {file.name: sha256(file) for file in found.files},
        "training_tokens": training_tokens,
    }
    manifest = {"suite": suite, "model": name, "name": "/".join(parts)}
    manifest |= describe(model) | {"converted": converted}
    config = {
        "suite": suite,
        "seed": 0,
        "ctx_len": model.ctx_len,
        "model": {"name": name, "net": net},
        "paths": {"runs": "runs"},
    }
    with new_target(target, is_file=False) as folder:
        write_text(folder / "config.yaml", yaml_of(config))
        write_json(folder / "manifest.json", manifest)
        if described is not None:
            write_text(folder / "tokenizer.json", described.to_json() + "\n")
        (folder / "checkpoints").mkdir()
        state = {"state_dict": {f"model.{key}": value for key, value in kept.items()}}
        torch.save(state, folder / "checkpoints" / "last.ckpt")
        if check:
            compare(model, weights, formats()[found.kind][1], source, folder, rescaled is True)
        write_json(folder / "result.json", {"converted": True})
    print(f"{target}: {summary(model, kept)}")
    if described is None:
        print("no tokenizer was found, so only ids can go in: tokenizer_file=FILE gives one")


def describe(model: LanguageModel) -> dict[str, Any]:
    """What a manifest says of a model that was not trained here."""
    return {
        "family": model.family,
        "seed": None,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "parameters": count_parameters(model),
        "n_layer": model.n_layer,
        "n_embd": model.n_embd,
        "ctx_len": model.ctx_len,
        "flops_per_token": model.flops_per_token(model.ctx_len),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def represent(
    source: Source, ctx_len: int | None, rescaled: bool | None
) -> tuple[dict[str, Tensor], LanguageModel, dict[str, Any]]:
    """A source's weights under our names, the empty model that they fit, and its `net` settings.

    Raises:
        ValueError: if tensors or settings are not those of a model of ours.
    """
    family, form = formats()[source.kind]
    tensors: dict[str, Tensor] = {}
    for name, value in source.tensors.items():
        plain = form.file_name(name)
        if plain in tensors:
            raise ValueError(f"tensor {plain} is there twice, once as {name}")
        if plain is not None:
            tensors[plain] = value
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    sizes = form.infer_sizes(shapes)
    settings: dict[str, Any] = {"ctx_len": CTX_LEN, **form.settings(source.config, sizes)}
    if ctx_len is not None:
        settings["ctx_len"] = ctx_len
    model = build_empty(family.model, sizes | settings)
    names = form.match(shapes, model)
    ours = model.state_dict()
    weights = {name: tensors[given].reshape(ours[name].shape) for name, given in names.items()}
    weights = form.restore(source.config, weights, rescaled)
    target = f"{family.model.__module__}.{family.model.__name__}"
    return weights, model, {"_target_": target, **sizes, **settings}


def checked_values(weights: dict[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    """The weights in `dtype` (None: as they are), all of them finite.

    Raises:
        ValueError: naming the first tensor that holds a NaN or an infinity, or an unknown dtype.
    """
    same_dtype(weights.values())
    kept = {}
    for name, value in weights.items():
        kept[name] = value if dtype is None else value.to(DTYPES[dtype])
        # a NaN anywhere makes the extremes NaN; asking each value takes 50 times as long
        if not all(extreme.isfinite() for extreme in torch.aminmax(kept[name])):
            raise ValueError(f"tensor {name} holds NaN or infinity (as {kept[name].dtype})")
    return kept


def find_tokenizer(source: Path, given: Path | None, vocab_size: int) -> Tokenizer | None:
    """The tokenizer in the file given, or else in the source folder's tokenizer.json, if any.

    A file may be of the `tokenizers` library or of a run directory. Raises ValueError or
    FileNotFoundError if it cannot be read or has more ids than the model.
    """
    file = given
    if file is None:
        if not (source / "tokenizer.json").is_file():
            return None
        file = source / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"there is no tokenizer_file={file}")
    if "kind" in read_json(file):  # a run's description
        found = Tokenizer.from_json(file.read_text(encoding="utf-8"))
        if found.vocab_size > vocab_size:
            raise ValueError(
                f"{file} has {found.vocab_size} ids, the model {vocab_size}: it is of another model"
            )
        return found
    return read_tokenizer(str(file), end_of_text(file.parent), vocab_size)


def end_of_text(folder: Path) -> str:
    """The end-of-text token that a tokenizer's neighbour tokenizer_config.json names."""
    if not (folder / "tokenizer_config.json").is_file():
        return END_OF_TEXT
    token = read_json(folder / "tokenizer_config.json").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else END_OF_TEXT


def export_checkpoint(
    source: Path,
    target: Path,
    checkpoint: str = "last",
    dtype: str | None = None,
    check: bool = True,
) -> None:
    """Write a run's weights as `target`: `.pth`, `.safetensors` or a Hugging Face folder.

    Raises:
        FileNotFoundError, ValueError: if the run cannot be read, its model does not exist in the
            format, or the other library computes other logits. Nothing is left behind.
    """
    run = open_external(source)
    path = run.checkpoint(checkpoint)
    with torch.device("meta"):
        model = make(run.config.model.net, LanguageModel)
    form = format_of(model, target, source)
    loaded = load_pickle(path)
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds no model weights")
    weights = model_weights(loaded, path)
    weights = checked_values({name: weights[name] for name in model.state_dict()}, dtype)
    tensors = {form.external_name(name): value for name, value in weights.items()}
    with new_target(target, is_file=bool(form.suffix)) as made:
        if form.suffix:
            write_weights(made, tensors)
        else:
            write_folder(made, run, model, form, tensors)
        if check:
            compare(model, weights, form, made, made.parent)
    print(f"{target}: {summary(model, weights)}")


def format_of(model: LanguageModel, target: Path, source: Path) -> Format:
    """The format of a model's family that a target's ending asks for.

    Raises:
        ValueError: if there is none.
    """
    family = families()[model.family]
    suffix = target.suffix if target.suffix in (".pth", ".safetensors") else ""
    for form in family.formats:
        if form.suffix == suffix:
            return form
    if not family.formats:
        raise ValueError(f"{source} is a {family.label}, which no external format is for")
    raise ValueError(f"a {family.label} has no {suffix} files: it is exported to a folder")


def write_folder(
    folder: Path, run: RunDir, model: LanguageModel, form: Format, tensors: dict[str, Tensor]
) -> None:
    """config.json, model.safetensors and, of a `json` tokenizer, Hugging Face's three files."""
    file = run.tokenizer_file
    tokenizer = Tokenizer.from_json(file.read_text(encoding="utf-8")) if file.is_file() else None
    eot_id = 0 if tokenizer is None else tokenizer.eot_id
    assert form.config is not None
    write_json(folder / "config.json", form.config(model, eot_id, same_dtype(tensors.values())))
    write_weights(folder / "model.safetensors", tensors)
    if not isinstance(tokenizer, JsonTokenizer):
        has = "no" if tokenizer is None else f"a {tokenizer.kind}"
        print(f"the run has {has} tokenizer, so none is exported: ids in, ids out")
        return
    described = tokenizer.description()
    text = json.dumps(described["tokenizer"], ensure_ascii=False)
    write_text(folder / "tokenizer.json", text + "\n")
    special = {f"{role}_token": described["eot"] for role in ("bos", "eos", "pad")}
    write_json(folder / "special_tokens_map.json", special)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.ctx_len,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings | special)


def summary(model: LanguageModel, weights: dict[str, Tensor]) -> str:
    """What was converted, in one line."""
    return (
        f"{model.family}, {model.n_layer} layers of {model.n_embd}, vocabulary "
        f"{model.vocab_size}, ctx_len {model.ctx_len}, {same_dtype(weights.values())}"
    )
