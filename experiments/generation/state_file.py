"""Generation states on disk: one row of a model's state, with the ids it belongs to.

A safetensors file, whose metadata says which model the state is of.
"""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from experiments.runs.trained_model import weights_hash
from models.generation import Past
from models.language_model import LanguageModel

IDS = "ids"  # beside the state's own tensors
N_READ = "n_read"  # in the metadata: how many of the ids the state has read


def save_state(path: Path, past: Past, unread: list[int], model: LanguageModel) -> None:
    """Write a state of one row, and the ids drawn after it that it has not read yet."""
    (ids,) = past.ids
    tensors = {name: value.cpu().contiguous() for name, value in past.state.items()}
    tensors[IDS] = torch.tensor(ids + unread, dtype=torch.int64)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, {**identity(model), N_READ: str(len(ids))})
        os.chmod(temporary, 0o644)  # it is made a private file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_state(path: Path, model: LanguageModel) -> tuple[Past, list[int]]:
    """A saved state on the model's device, and the ids that it has not read yet.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, no state, or that of another model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no saved state {path}")
    try:
        with safe_open(path, "pt", device=str(model.emb.weight.device)) as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no saved state ({error})") from None
    if IDS not in state or N_READ not in metadata:
        raise ValueError(f"{path} is not a saved state of this suite")
    for name, value in identity(model).items():
        if metadata.get(name) != value:
            raise ValueError(
                f"{path} is the state of another model: its {name} is {metadata.get(name)}, this "
                f"model's {value} (weights differ by checkpoint and by dtype too)"
            )
    ids, n_read = state.pop(IDS).tolist(), int(metadata[N_READ])
    return Past(state, [ids[:n_read]]), ids[n_read:]


def identity(model: LanguageModel) -> dict[str, str]:
    """What must agree for a state to fit a model."""
    sizes = {name: str(getattr(model, name)) for name in ("n_layer", "n_embd", "vocab_size")}
    return {"family": model.family, **sizes, "weights": weights_hash(model)}
