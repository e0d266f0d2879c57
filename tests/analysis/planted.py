"""Writes run directories as CONTRIBUTING.md describes them, with numbers chosen by the test.

Run as a script it prints how long a report over 200 recorded runs takes.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HEADER = (
    "step,tokens,time_s,lr,train/loss,train/grad_norm,val/loss,val/bpb,"
    "perf/tokens_per_s,perf/mfu,perf/peak_mem_bytes"
)
# model: family, layers, width, total, non-embedding, planted bits/byte
MODELS: dict[str, tuple[str, int, int, int, int, float]] = {
    "rwkv4_nano": ("rwkv4", 3, 64, 200_000, 167_000, 2.90),
    "rwkv4_micro": ("rwkv4", 4, 128, 930_000, 865_000, 2.50),
    "rwkv4_tiny": ("rwkv4", 6, 256, 5_300_000, 5_150_000, 2.12),
    "gpt_nano": ("gpt", 3, 64, 199_000, 166_000, 2.98),
    "gpt_micro": ("gpt", 4, 128, 931_000, 866_000, 2.47),
    "gpt_tiny": ("gpt", 6, 256, 5_310_000, 5_160_000, 2.15),
}
TOKENS = 1_000_000


def write_run(
    root: Path,
    suite: str = "demo",
    model: str = "rwkv4_nano",
    seed: int = 0,
    bpb: float | None = None,
    overrides: str = "",
    data: dict[str, Any] | None = None,
    n_rows: int = 20,
    accuracy: float = 0.4,
    about: dict[str, Any] | None = None,
) -> Path:
    """One finished run with evaluation and generation cost; its last validation loss is `bpb`.
    `data` and `about` replace entries of the manifest's data and of the manifest."""
    family, n_layer, n_embd, total, non_embedding, planted = MODELS[model]
    bpb = planted if bpb is None else bpb
    tag = f"seed={seed}" + (f",{overrides}" if overrides else "")
    run = root / suite / model / tag
    run.mkdir(parents=True)
    flops_per_token = 6 * non_embedding + (0 if family == "rwkv4" else 12 * n_layer * n_embd * 128)
    speed = 4e10 / flops_per_token
    (run / "config.yaml").write_text(f"seed: {seed}\n")
    about_data = {
        "name": "stdlib", "path": "data/stdlib-1a2b3c4d", "fingerprint": "f" * 16,
        "tokenizer": "bytes", "tokenizer_hash": "a" * 16, "vocab_size": 256,
        "n_train_tokens": 20_000_000, "n_val_tokens": 500_000, "n_val_bytes": 500_000,
        "xz_bpb": 1.87, "seed": 0,
    }  # fmt: skip
    manifest = {
        "suite": suite, "model": model, "family": family, "name": f"{suite}/{model}/{tag}",
        "seed": seed, "config_hash": f"{seed:x}", "created": "2026-01-01T00:00:00",
        "data": about_data | (data or {}),
        "parameters": {"total": total, "non_embedding": non_embedding},
        "n_layer": n_layer, "n_embd": n_embd, "ctx_len": 256, "batch_size": 16,
        "budget_tokens": TOKENS,
        "flops_per_token": flops_per_token,
        "recipe": {"optim": "shared", "schedule": "shared"}, "precision": "32-true",
        "wkv_backend": "cpu", "versions": {"python": "3.11", "torch": "2.13", "lightning": "2.6"},
        "git": {"commit": None, "dirty": None},
        "device": {"type": "cpu", "name": "Some CPU", "n_devices": 1, "n_threads": 2,
                   "peak_flops": 1e11, "peak_source": "measured"},
    }  # fmt: skip
    write_json(run / "manifest.json", manifest | (about or {}))
    lines = [HEADER]
    for i in range(1, n_rows + 1):
        tokens = TOKENS * i // n_rows
        loss = bpb + 1.6 * (1 - i / n_rows) / (0.15 + i / n_rows)
        head = f"{i * 10},{tokens},{tokens / speed:.3f},0.001"
        lines.append(f"{head},{(loss + 0.05) * math.log(2):.5f},0.8,,,{speed:.1f},0.4,200000000")
        lines.append(f"{head},,,{loss * math.log(2):.5f},{loss:.5f},,,")
    (run / "metrics.csv").write_text("\n".join(lines) + "\n")
    nats = bpb * math.log(2)
    best = {"step": n_rows * 10, "val/loss": nats, "val/bpb": bpb}
    result = {
        "step": n_rows * 10, "tokens": TOKENS, "flops": TOKENS * flops_per_token,
        "time_s": TOKENS / speed, "train/loss": nats, "val/loss": nats, "val/bpb": bpb,
        "best": best, "perf/tokens_per_s": speed, "perf/mfu": 0.4,
        "perf/peak_mem_bytes": 200_000_000 + 16 * total,
    }  # fmt: skip
    write_eval(run, "cloze", {"acc,none": accuracy, "acc_stderr,none": 0.01}, 0.25)
    write_eval(
        run, "bits_per_byte", {"bits_per_byte,none": bpb, "bits_per_byte_stderr,none": "N/A"}
    )
    write_generation(run, family, n_layer * n_embd, total)
    write_json(run / "result.json", result)
    return run


def write_eval(
    run: Path,
    task: str,
    metrics: dict[str, Any],
    chance: float | None = None,
    **protocol: Any,
) -> None:
    """eval/<task>.json as lm-eval writes it, with our protocol, of which some is replaced."""
    content = {
        "results": {task: {"alias": task, "sample_len": 500, **metrics}},
        "versions": {task: 1.0}, "n-shot": {task: 0},
        "config": {task: {"task": task, "metadata": {} if chance is None else {"chance": chance}}},
        "n-samples": {task: {"original": 500, "effective": 500}},
        "protocol": {
            "lm_eval": "0.4.13", "checkpoint": "last", "weights": run.name[:6] + "0" * 10,
            "prefix": "none", "dtype": "float32", "device": "cpu", "max_ctx": None,
            "rolling_ctx": 256, "num_fewshot": 0, "limit": None, "gen_kwargs": None,
            "bootstrap_iters": 1000, "seed": 0, "data": "f" * 16, "task_version": 1,
            "n_truncated": 0, "time_s": 0.5,
        } | protocol,
    }  # fmt: skip
    write_json(run / "eval" / f"{task}.json", content)


def write_generation(run: Path, family: str, width: int, total: int) -> None:
    """bench/generate.json: linear time for RWKV, a growing cache for a GPT."""
    rows = []
    for n in (64, 128, 256, 512, 1024, 2048):
        per_token = 2e-4 + total * 2e-10
        growth = 0 if family == "rwkv4" else 1.5e-7 * n
        state = 5 * width * 4 if family == "rwkv4" else 2 * width * 4 * n
        seconds = n * (per_token * (1.1 if family == "rwkv4" else 1) + growth)
        rows.append({"n_tokens": n, "seconds": seconds, "state_bytes": state, "peak_mem_bytes": 1})
    protocol = {"batch_size": 1, "n_threads": 2, "dtype": "float32", "device": "cpu",
                "prompt_tokens": 16, "repeats": 3, "checkpoint": "last"}  # fmt: skip
    write_json(run / "bench" / "generate.json", {"protocol": protocol, "rows": rows})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """JSON, its folder made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_suite(root: Path, suite: str = "demo", seeds: int = 2, noise: float = 0.01) -> None:
    """Every model of MODELS with `seeds` seeds, its planted loss plus a little noise."""
    generator = np.random.default_rng(0)
    for model, (_, _, _, total, _, planted) in MODELS.items():
        for seed in range(seeds):
            write_run(
                root, suite, model, seed, bpb=planted + noise * generator.normal(),
                accuracy=0.25 + 0.05 * math.log10(total / 2e4) + 0.01 * model.startswith("gpt"),
            )  # fmt: skip


def benchmark(n_seeds: int = 34, n_rows: int = 1000) -> float:
    """Seconds for a report over 6 x n_seeds runs of 2 x n_rows metric rows, with start-up."""
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS:
            for seed in range(n_seeds):
                write_run(Path(folder), model=model, seed=seed, n_rows=n_rows)
        command = [sys.executable, "-m", "analysis.report", "suite=demo", f"paths.runs={folder}"]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start


if __name__ == "__main__":
    print(f"report over {6 * 34} runs: {benchmark():.1f} s")
