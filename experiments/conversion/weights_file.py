"""External files of weights, read as data: tensors by name, memory-mapped, none of their code.

Every way in which such a file can be bad raises a ValueError (or FileNotFoundError) of one line.
"""

import json
import os
import pickle
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.families import formats

SINGLE = ("model.safetensors", "pytorch_model.bin")  # in a folder, in order of preference


class Source(NamedTuple):
    """An external checkpoint: format, files of weights, tensors in them, config.json if any."""

    kind: str
    files: list[Path]
    tensors: dict[str, Tensor]
    config: dict[str, Any]


def read_source(path: Path) -> Source:
    """Open a `.pth` file, a `.safetensors` file or a folder in Hugging Face's format.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if it is none of these, is damaged, or holds more than tensors.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no source={path}")
    for name, (_, form) in formats().items():
        if path.suffix and path.suffix == form.suffix:
            read = read_safetensors if path.suffix == ".safetensors" else read_pickle
            return Source(name, [path], read(path), {})
    raise ValueError(f"source={path} is no .pth file, no .safetensors file and no folder")


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors by name out of a file that torch.save wrote, without running any code of it."""
    state = load_pickle(path)
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise ValueError(f"{path} is not a plain dictionary of tensors")
    for name, value in state.items():
        if value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{path} holds {name} sparse or without values: save it dense")
    return {name: value.detach() for name, value in state.items()}


def load_pickle(path: Path) -> Any:
    """What torch.save wrote, weights only, its tensors memory-mapped where the file allows it."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles that are refused all the same
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged files raise all kinds
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and wanted:
            raise ValueError(
                f"{path} wants to run code ({wanted[1]}): only files of tensors are read"
            ) from None
        raise ValueError(f"{path} is damaged, or holds more than tensors") from None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name out of a `.safetensors` file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, AttributeError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a readable safetensors file ({reason})") from None


def _read_folder(path: Path) -> Source:
    config = read_json(path / "config.json")
    types = {form.model_type: name for name, (_, form) in formats().items() if form.model_type}
    kind = types.get(str(config.get("model_type")))
    if kind is None:
        raise ValueError(
            f"{path / 'config.json'} has model_type={config.get('model_type')!r}: "
            f"{' and '.join(sorted(types))} can be read"
        )
    files = _weight_files(path)
    tensors: dict[str, Tensor] = {}
    for file in files:
        part = read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)
        twice = sorted(tensors.keys() & part.keys())
        if twice:
            raise ValueError(f"{file} holds tensor {twice[0]}, which an earlier file holds too")
        tensors |= part
    return Source(kind, files, tensors, config)


def _weight_files(path: Path) -> list[Path]:
    for name in SINGLE:
        if (path / name).is_file():
            return [path / name]
        if (path / f"{name}.index.json").is_file():
            index = path / f"{name}.index.json"
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise ValueError(f"{index} has no weight_map")
            files = [path / str(shard) for shard in sorted({str(s) for s in shards.values()})]
            for file in files:
                if file.parent != path or file.suffix not in (".safetensors", ".bin"):
                    raise ValueError(f"{index} names {file.name!r}, which is no file beside it")
                if not file.is_file():
                    raise FileNotFoundError(f"{file} is missing, which {index.name} names")
            return files
    raise FileNotFoundError(f"{path} has none of {', '.join(SINGLE)}, whole or in parts")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; FileNotFoundError or ValueError in one line."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} has no {path.name}") from None
    except ValueError:
        raise ValueError(f"{path} is not valid JSON") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name: with torch.save, or as safetensors if the name ends so.

    A tensor that is a part of a larger storage is written without the rest of it.
    """
    whole = {
        name: value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
        for name, value in tensors.items()
    }
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in whole.items()}, path, metadata={"format": "pt"})
        path.chmod(0o644)  # it is made private; results are for everybody
    else:
        torch.save(whole, path)


@contextmanager
def new_target(target: Path, is_file: bool) -> Iterator[Path]:
    """A path of the same name, in a folder beside `target`, that is renamed to it in the end.

    If anything goes wrong, nothing is left. Raises ValueError if the target is there by then.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    made = folder / target.name
    if not is_file:
        made.mkdir()
    try:
        yield made
        if target.exists():
            raise ValueError(f"target={target} exists: choose another name, or remove it")
        os.rename(made, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
