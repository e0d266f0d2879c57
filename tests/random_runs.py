"""Finished run directories of random weights, of every family."""

import inspect
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from experiments.data.tokenizer import BytesTokenizer
from experiments.runs.run_dir import RunDir
from experiments.system.files import write_json, write_text
from models.families import families

FAMILIES = list(families())
GROWING = [  # those whose state grows with what it has read
    name
    for name, family in families().items()
    if family.toy().state_bytes(1, 9) > family.toy().state_bytes(1, 8)
]


def net(family: str, **changes: Any) -> dict[str, Any]:
    """A config's model.net: two layers of 32 channels for bytes, with a context of 64."""
    model = families()[family].model
    sizes = {"vocab_size": 256, "n_layer": 2, "n_embd": 32, "ctx_len": 64, "n_head": 2} | changes
    known = inspect.signature(model).parameters
    target = {"_target_": f"{model.__module__}.{model.__qualname__}"}
    return target | {key: value for key, value in sizes.items() if key in known}


def random_run(root: Path, family: str, seed: int = 0, **changes: Any) -> RunDir:
    """A run whose model predicts something lively; `changes` are of its sizes."""
    torch.manual_seed(seed)
    path = root / "suite" / family / f"seed={seed},of=two"
    (path / "checkpoints").mkdir(parents=True)
    settings = net(family, **changes)
    config = {"ctx_len": settings["ctx_len"], "model": {"name": family, "net": settings}}
    OmegaConf.save(OmegaConf.create(config), path / "config.yaml")
    model = families()[family].model(**{k: v for k, v in settings.items() if k != "_target_"})
    weights = {
        f"model.{name}": torch.randn(value.shape) * (0.3 if value.dim() == 2 else 1)
        for name, value in model.state_dict().items()
    }
    torch.save({"state_dict": weights}, path / "checkpoints" / "last.ckpt")
    write_text(path / "tokenizer.json", BytesTokenizer().to_json())
    write_json(path / "result.json", {})
    return RunDir(path)
