"""What stands beside a score: the weights, the data and the file it is kept in."""

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.run_dir import RunDir

if TYPE_CHECKING:
    from experiments.data.token_data import TokenData
    from models.language_model import LanguageModel


def weights_hash(model: "LanguageModel") -> str:
    """Hash of names, types, shapes and values of all weights, 16 hex digits."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def held_out(run: RunDir) -> "TokenData":
    """The data a run was trained on, prepared anew where it is no longer there.

    Raises:
        FileNotFoundError, ValueError: if its source is gone, or no longer gives the same tokens.
    """
    from experiments.data.prepare import prepare
    from experiments.data.token_data import TokenData

    trained_on = run.manifest.get("data", {}).get("fingerprint")
    if trained_on is None:
        raise ValueError("the run names no data it was trained on, so there is no held-out text")
    data = TokenData.open(prepare(run.config.data))
    if data.fingerprint != trained_on:
        raise ValueError(
            f"the source of data={run.config.data.name} is no longer what it was trained on: "
            f"{data.path} has the fingerprint {data.fingerprint[:12]}, not {trained_on[:12]}"
        )
    return data


def result_file(run: RunDir, task: str) -> Path:
    """Where the result of a task is kept."""
    if not re.fullmatch(r"[A-Za-z0-9_.+:-]*[A-Za-z0-9_]", task):
        raise ValueError(f"{task!r} cannot name a result file: use letters, digits, '_', '-', '.'")
    return run.path / "eval" / f"{task}.json"


def read_scored(file: Path, protocol: dict[str, Any]) -> dict[str, Any] | None:
    """A result file's content, if it was made under exactly this protocol."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        stored = content["protocol"]
        return content if all(stored[k] == v for k, v in protocol.items()) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
