"""What a run is: the data, the model, the code and the machine, for ``manifest.json``."""

import os
import platform
import subprocess
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops

from experiments.config import config_hash, plain, total_budget
from experiments.continuation import continued_run
from experiments.data.token_data import TokenData
from experiments.run_dir import RunDir
from models.language_model import LanguageModel, count_parameters
from models.ops.wkv import live_backend

PRECISIONS = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """FLOP/s one device can do at most, and where the figure is from.

    A GPU's is the vendor's for dense matrix products of that precision, where Lightning's table
    knows the card; else (and on a CPU) it is measured: the best of ten products of matrices of
    1024 x 1024, on a GPU 8192 x 8192.
    """
    dtype = PRECISIONS[precision]
    if device.type == "cuda":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            known = get_available_flops(device, dtype)
        if known:
            return float(known), "vendor"
    return measured_flops(device, dtype), "measured"


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of ten matrix products in a dtype."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        (a @ a).flatten()[0].item()  # reading a value waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds[2:])


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
        "model": cfg.model.name,
        "family": model.family,
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
        "n_layer": model.n_layer,
        "n_embd": model.n_embd,
        "ctx_len": cfg.ctx_len,
        "batch_size": cfg.batch_size,
        "budget_tokens": total_budget(cfg),
        **({"continued": continued} if continued else {}),
        "flops_per_token": model.flops_per_token(cfg.ctx_len),
        "recipe": {"optim": cfg.optim.name, "schedule": cfg.schedule.name},
        "precision": cfg.precision,
        "wkv_backend": (
            live_backend(device, cfg.model.net.get("wkv_backend", "auto"))
            if model.family == "rwkv4"
            else None
        ),
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


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: allocated on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far.

    Linux: from /proc, because there getrusage also counts what the parent held when it forked.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def device_name(device: torch.device) -> str:
    """The card's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_state() -> dict[str, Any]:
    """Commit of the code, and whether tracked files differ from it; None where git cannot tell."""
    root = Path(__file__).resolve().parent.parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}
