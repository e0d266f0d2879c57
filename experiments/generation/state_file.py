"""States on disk: one row of a model's state, with the ids it belongs to, as safetensors.

Metadata says whose state it is; `sha256` is over all the rest, so that damage is noticed.
"""

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.runs.trained_model import weights_hash
from models.generation import Past

if TYPE_CHECKING:
    from torch import Tensor

    from models.language_model import LanguageModel

FORMAT = "recurrent state 1"
IDS = "ids"  # beside the state's own tensors


def save_state(path: Path, past: Past, unread: list[int], model: "LanguageModel") -> None:
    """Write a state of one row, and the ids drawn after it that it has not read yet.

    Raises:
        ValueError: if there is another kind of file, which is left alone.
    """
    import torch
    from safetensors.torch import save_file

    check_writable(path)
    (ids,) = past.ids
    tensors = {f"state.{name}": value.cpu().clone() for name, value in past.state.items()}
    tensors[IDS] = torch.tensor(ids + unread, dtype=torch.int64)
    metadata = {"format": FORMAT, **identity(model), "n_read": str(len(ids))}
    metadata["sha256"] = digest(tensors, metadata["n_read"])
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata)
        os.chmod(temporary, 0o644)  # it is made a private file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_state(path: Path, model: "LanguageModel") -> tuple[Past, list[int]]:
    """A saved state on the model's device, and the ids that it has not read yet.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, no state, or that of another model.
    """
    tensors, metadata = _read(path)
    device = model.emb.weight.device
    for name, mine in identity(model).items():
        if metadata.get(name) != mine:
            raise ValueError(
                f"{path} is the state of another model: its {name} is {metadata.get(name)}, this "
                f"model's {mine} (weights differ by checkpoint and by dtype too)"
            )
    if IDS not in tensors or metadata.get("sha256") != digest(tensors, metadata.get("n_read")):
        raise ValueError(f"{path} is damaged: its content is not what was saved; make it again")
    ids, n_read = tensors.pop(IDS).tolist(), int(metadata["n_read"])
    state = {name.removeprefix("state."): value.to(device) for name, value in tensors.items()}
    return Past(state, [ids[:n_read]]), ids[n_read:]


def check_writable(path: Path) -> None:
    """Raise ValueError or FileNotFoundError if no state can be written there."""
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to save a state in: make it")
    if path.exists():
        try:
            _read(path)
        except (ValueError, OSError):
            raise ValueError(
                f"{path} exists and is not a saved state: choose another name, or remove it"
            ) from None


def identity(model: "LanguageModel") -> dict[str, str]:
    """What must agree for a state to fit a model."""
    sizes = {name: str(getattr(model, name)) for name in ("n_layer", "n_embd", "vocab_size")}
    return {"family": model.family, **sizes, "weights": weights_hash(model)}


def digest(tensors: "dict[str, Tensor]", n_read: str | None) -> str:
    """Hex SHA-256 of names, types, shapes and values, and of how many ids were read."""
    import torch

    total = hashlib.sha256(f"{n_read};".encode())
    for name, value in sorted(tensors.items()):
        total.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        total.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _read(path: Path) -> "tuple[dict[str, Tensor], dict[str, Any]]":
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"there is no saved state {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no saved state ({error})") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not a saved state of this suite")
    return tensors, metadata
