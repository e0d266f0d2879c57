"""What a run trained, read from its directory: checkpoint, weights, model and tokenizer."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.config.targets import make
from experiments.runs.checkpoints.reading import read_checkpoint
from experiments.runs.run_dir import RunDir, open_external

if TYPE_CHECKING:
    from experiments.data.token_data import TokenData
    from experiments.data.tokenizer import Tokenizer
    from models.language_model import LanguageModel

DTYPES = ("float32", "bfloat16", "float16")  # of a model's matrices


def model_weights(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """The language model's own state dict out of a Lightning checkpoint."""
    weights = {
        key.removeprefix("model."): value
        for key, value in checkpoint.get("state_dict", {}).items()
        if key.startswith("model.")
    }
    if not weights:
        raise ValueError(f"{path} holds no model weights")
    return weights


def load_model(
    run: RunDir,
    checkpoint: str = "best",
    device: str = "cpu",
    dtype: str = "float32",
    ctx_len: int = 0,
) -> "LanguageModel":
    """Build a run's model from its frozen config and load its weights, in evaluation mode.

    Args:
        dtype: what matrices are kept in; vectors, norms, activations and states are float32.
        ctx_len: the context it must at least be opened with, whatever it was trained with.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it is damaged or does not fit the config, or for another dtype.
    """
    import torch

    from models.language_model import LanguageModel
    from models.ops.linear import round_matrices

    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    config, path = open_external(run.path).config, run.checkpoint(checkpoint)
    weights = model_weights(read_checkpoint(path), path)
    config.model.net.ctx_len = max(config.model.net.ctx_len, ctx_len)
    with torch.device("meta"):  # no time spent on an initialisation that is overwritten
        model = make(config.model.net, LanguageModel)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit its config: {' '.join(str(error).split())[:300]}"
        ) from None
    return round_matrices(model.float(), getattr(torch, dtype)).to(device).eval()


def load_tokenizer(run: RunDir) -> "Tokenizer":
    """The tokenizer a run was trained with.

    Raises:
        FileNotFoundError: if the run directory has none.
        ValueError: if it is damaged.
    """
    from experiments.data.tokenizer import Tokenizer

    file = run.tokenizer_file
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing, so text cannot be turned into tokens: convert the checkpoint "
            "again with tokenizer_file=FILE, or copy that file of a run with the same tokenizer"
        )
    return Tokenizer.from_json(file.read_text(encoding="utf-8"))


def weights_hash(model: "LanguageModel") -> str:
    """Hash of names, types, shapes and values of all weights, 16 hex digits."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def held_out(run: RunDir) -> "TokenData":
    """The data a run was trained on, prepared again where it is no longer there.

    Raises:
        FileNotFoundError, ValueError: if its source is gone, or no longer gives the same tokens.
    """
    from experiments.data.prepare import prepare

    trained_on = run.manifest.get("data", {}).get("fingerprint")
    if trained_on is None:
        raise ValueError("the run names no data it was trained on, so there is no held-out text")
    config = open_external(run.path).config
    data = prepare(config.data, config.paths.data)
    if data.fingerprint != trained_on:
        raise ValueError(
            f"the source of data={config.data.name} is no longer what it was trained on: "
            f"{data.path} has the fingerprint {data.fingerprint[:12]}, not {trained_on[:12]}"
        )
    return data
