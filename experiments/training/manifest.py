"""What a run is: the data, the model, the code and the machine, for ``manifest.json``."""

import os
import platform
from datetime import UTC, datetime
from typing import Any

import lightning.pytorch as L
import torch

from experiments.config.checks import total_budget
from experiments.config.identity import config_hash, model_name, plain
from experiments.data.token_data import TokenData
from experiments.runs.continuation import continued_run
from experiments.runs.run_dir import RunDir
from experiments.system.machine import device_name, git_state, peak_flops
from models.families import families
from models.language_model import LanguageModel, count_parameters


def manifest(
    run: RunDir, model: LanguageModel, data: TokenData, trainer: L.Trainer
) -> dict[str, Any]:
    """What is trained on what, with which code, where (fields: CONTRIBUTING.md)."""
    cfg, meta = run.config, data.meta
    device = trainer.strategy.root_device
    name, earlier = device_name(device), run.manifest
    if earlier and (earlier["device"]["name"], earlier["precision"]) == (name, cfg.precision):
        # one denominator for all of a run's MFU, measured once
        peak, source = earlier["device"]["peak_flops"], earlier["device"]["peak_source"]
    else:
        peak, source = peak_flops(device, cfg.precision)
    continued = earlier.get("continued")
    if not earlier and (before := continued_run(run)):  # it may be gone at a later start
        continued = {"run": before.name, "step": step_of(before)}
    kept = ("name", "vocab_size", "n_train_tokens", "n_val_tokens", "n_val_bytes", "xz_bpb")
    return {
        "suite": cfg.suite,
        "model": model_name(cfg),
        "family": model.family,
        "family_label": families()[model.family].label,
        "name": run.name,
        "seed": cfg.seed,
        "config_hash": config_hash(plain(cfg)),
        "created": run.manifest.get("created") or datetime.now(UTC).isoformat(timespec="seconds"),
        "data": {
            **{key: meta[key] for key in kept},
            "path": os.path.relpath(data.path),
            "seed": cfg.data.seed,
            "fingerprint": data.fingerprint,
            "tokenizer": data.tokenizer.kind,
            "tokenizer_hash": data.tokenizer.hash,
        },
        "parameters": count_parameters(model),
        "match": None if cfg.model.get("match") is None else plain(cfg.model.match),
        "n_layer": model.n_layer,
        "n_embd": model.n_embd,
        "ctx_len": cfg.ctx_len,
        "batch_size": cfg.batch_size,
        "budget_tokens": total_budget(cfg),
        **({"continued": continued} if continued else {}),
        "flops_per_token": model.flops_per_token(cfg.ctx_len),
        "recipe": {"optim": cfg.optim.name, "schedule": cfg.schedule.name},
        "precision": cfg.precision,
        "backend": model.live_backend(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": L.__version__,
        },
        "git": git_state(),
        "device": {
            "type": device.type,
            "name": name,
            "n_devices": trainer.world_size,
            "n_threads": torch.get_num_threads(),
            "peak_flops": peak,
            "peak_source": source,
        },
    }


def step_of(run: RunDir) -> int:
    """The last step of a finished run."""
    assert run.result is not None
    return run.result["step"]
