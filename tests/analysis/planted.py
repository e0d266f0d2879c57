"""Writes run directories as CONTRIBUTING.md describes them, with numbers chosen by the test."""

import json
import math
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
LABELS = {"rwkv4": "RWKV-4", "gpt": "GPT"}
TOKENS = 1_000_000
PROTOCOL_HASH = "c0ffee"
# the paper's tasks: headline metric, official number of documents, chance (0 where unknown)
PAPER = {
    "arc_challenge": ("acc_norm", 1172, 0.25), "arc_easy": ("acc", 2376, 0.25),
    "boolq": ("acc", 3270, 0.5), "copa": ("acc", 100, 0.5), "headqa_en": ("acc_norm", 2742, 0.25),
    "hellaswag": ("acc_norm", 10042, 0.25), "lambada_openai": ("acc", 5153, 0.0),
    "openbookqa": ("acc_norm", 500, 0.25), "piqa": ("acc", 1838, 0.5),
    "record": ("em", 10000, 0.0), "sciq": ("acc", 1000, 0.25), "winogrande": ("acc", 1267, 0.5),
}  # fmt: skip
# model: family, parameters, training FLOPs a token
EXTERNAL: dict[str, tuple[str, int, int]] = {
    "rwkv4_169m": ("rwkv4", 169_342_464, 784_802_304),
    "rwkv4_430m": ("rwkv4", 430_397_440, 2_274_637_824),
    "rwkv4_1b5": ("rwkv4", 1_515_106_304, 8_475_144_192),
    "pythia_160m": ("gpt", 162_322_944, 856_964_664),
    "pythia_410m": ("gpt", 405_334_016, 2_429_156_160),
    "pythia_1b4": ("gpt", 1_414_647_808, 8_476_289_856),
    "mamba_370m": ("mamba", 371_516_416, 2_000_000_000),
    "mamba_1b4": ("mamba", 1_372_178_432, 7_500_000_000),
}


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
    peak_lr: float = 1e-3,
) -> Path:
    """One finished run with evaluation and generation cost; its last validation loss is `bpb`.
    `data` and `about` replace entries of the manifest's data and of the manifest; a budget is
    trained to its end, and an override of the peak rate is in the config."""
    family, n_layer, n_embd, total, non_embedding, planted = MODELS[model]
    bpb = planted if bpb is None else bpb
    tag = f"seed={seed}" + (f",{overrides}" if overrides else "")
    run = root / suite / model / tag
    run.mkdir(parents=True)
    flops_per_token = 6 * non_embedding + (0 if family == "rwkv4" else 12 * n_layer * n_embd * 128)
    speed = 4e10 / flops_per_token
    rate = overrides.partition("optim.peak_lr=")[2].partition(",")[0] or peak_lr
    (run / "config.yaml").write_text(f"optim:\n  peak_lr: {rate}\nseed: {seed}\n")
    about_data = {
        "name": "stdlib", "path": "data/stdlib-1a2b3c4d", "fingerprint": "f" * 16,
        "tokenizer": "bytes", "tokenizer_hash": "a" * 16, "vocab_size": 256,
        "n_train_tokens": 20_000_000, "n_val_tokens": 500_000, "n_val_bytes": 500_000,
        "xz_bpb": 1.87, "seed": 0,
    }  # fmt: skip
    manifest = {
        "suite": suite, "model": model, "family": family, "name": f"{suite}/{model}/{tag}",
        "family_label": LABELS.get(family, family), "seed": seed,

        "config_hash": f"{seed:x}", "created": "2026-01-01T00:00:00",
        "data": about_data | (data or {}),
        "parameters": {"total": total, "non_embedding": non_embedding},
        "n_layer": n_layer, "n_embd": n_embd, "ctx_len": 256, "batch_size": 16,
        "budget_tokens": TOKENS,
        "flops_per_token": flops_per_token,
        "recipe": {"optim": "shared", "schedule": "shared"}, "precision": "32-true",
        "backend": "cpu", "versions": {"python": "3.11", "torch": "2.13", "lightning": "2.6"},
        "git": {"commit": None, "dirty": None},
        "device": {"type": "cpu", "name": "Some CPU", "n_devices": 1, "n_threads": 2,
                   "peak_flops": 1e11, "peak_source": "measured"},
    }  # fmt: skip
    manifest |= about or {}
    budget = manifest["budget_tokens"]
    write_json(run / "manifest.json", manifest)
    lines = [HEADER]
    for i in range(1, n_rows + 1):
        tokens = budget * i // n_rows
        loss = bpb + 1.6 * (1 - i / n_rows) / (0.15 + i / n_rows)
        head = f"{i * 10},{tokens},{tokens / speed:.3f},0.001"
        lines.append(f"{head},{(loss + 0.05) * math.log(2):.5f},0.8,,,{speed:.1f},0.4,200000000")
        lines.append(f"{head},,,{loss * math.log(2):.5f},{loss:.5f},,,")
    (run / "metrics.csv").write_text("\n".join(lines) + "\n")
    nats = bpb * math.log(2)
    best = {"step": n_rows * 10, "val/loss": nats, "val/bpb": bpb}
    result = {
        "step": n_rows * 10, "tokens": budget, "flops": budget * flops_per_token,
        "time_s": budget / speed, "train/loss": nats, "val/loss": nats, "val/bpb": bpb,
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
        "protocol": {
            "lm_eval": "0.4.13", "checkpoint": "last", "weights": run.name[:6] + "0" * 10,
            "prefix": "none", "dtype": "float32", "device": "cpu", "max_ctx": None,
            "rolling_ctx": 256, "num_fewshot": 0, "limit": None, "gen_kwargs": None,
            "bootstrap_iters": 1000, "seed": 0, "data": "f" * 16, "task_version": 1,
            "n_truncated": 0, "time_s": 0.5, "n_documents": 500, "subset": None,
        } | protocol,
    }  # fmt: skip
    write_json(run / "eval" / f"{task}.json", content)


def write_documents(run: Path, task: str, metric: str, values: list[Any], **head: Any) -> None:
    """eval/<task>.documents.jsonl: one metric of documents d0, d1, ..., in order."""
    lines = [{"task": task, "protocol_hash": PROTOCOL_HASH} | head]
    lines += [{"doc": f"d{i}", metric: value} for i, value in enumerate(values)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "eval" / f"{task}.documents.jsonl").write_text(text)


def write_scored_documents(
    run: Path, task: str, metric: str, right: list[Any], **protocol: Any
) -> None:
    """A score of 0/1 documents, and the documents; `protocol` as in `write_eval`."""
    score, n = float(np.mean(right)), len(right)
    metrics = {f"{metric},none": score}
    metrics |= {f"{metric}_stderr,none": math.sqrt(score * (1 - score) / n)}
    about = {"protocol_hash": PROTOCOL_HASH, "n_documents": n, "subset": False, "pack": None}
    write_eval(run, task, metrics, None, **(about | protocol))
    write_documents(run, task, metric, right)


def write_converted(
    root: Path, suite: str, model: str, last: str = "official", tokens: int | None = 300_000_000_000
) -> Path:
    """A run made from an external checkpoint: no losses, no data."""
    family, total, flops = EXTERNAL[model]
    run = root / suite / model / last
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 0\n")
    manifest = {
        "suite": suite, "model": model, "family": family, "name": f"{suite}/{model}/{last}",
        "family_label": LABELS.get(family, family),
        "seed": None, "created": "2026-01-01T00:00:00",
        "parameters": {"total": total, "non_embedding": total // 2}, "n_layer": 12, "n_embd": 768,
        "ctx_len": 1024 if family == "rwkv4" else 2048, "flops_per_token": flops,
        "converted": {"format": "rwkv_pth", "file": f"{model}.pth", "sha256": "ab" * 32,
                      "training_tokens": tokens},
        "versions": {"python": "3.11", "torch": "2.13"},
    }  # fmt: skip
    write_json(run / "manifest.json", manifest)
    write_json(run / "result.json", {"converted": True})
    return run


def write_paper_suite(root: Path, suite: str = "official", share: float = 1.0) -> None:
    """Converted runs scored on the twelve tasks (of `share` of the documents), three families."""
    rng = np.random.default_rng(0)
    hard = {task: rng.random(int(n * share)) for task, (_, n, _) in PAPER.items()}
    for model, (family, total, _) in EXTERNAL.items():
        run = write_converted(root, suite, model)
        write_generation(run, family, 12 * 768, total)
        for task, (metric, _, chance) in PAPER.items():
            skill = chance + (0.85 - chance) * (0.1 + 0.25 * math.log10(total / 5e7))
            noise = 0.1 * rng.standard_normal(len(hard[task]))
            right = (hard[task] + noise < skill + 0.05 * (family == "rwkv4")).astype(int)
            write_scored_documents(run, task, metric, right.tolist(), subset=share < 1)


def write_generation(run: Path, family: str, width: int, total: int) -> None:
    """bench/generate.json: flat decoding for RWKV, a growing cache for a GPT."""
    rows = []
    for n in (64, 256, 1024, 4096, 16384, 65536):
        token = 2e-4 + total * 2e-10
        decode = 1.1 * token if family != "gpt" else token * (1 + n / 4096)
        state = 5 * width * 4 if family != "gpt" else 2 * width * 4 * n
        rows.append({"n_tokens": n, "prefill_s": n * token / 8, "decode_s": decode,
                     "state_bytes": state, "peak_mem_bytes": 2 * state + 4_000_000})  # fmt: skip
    protocol = {"batch_size": 1, "n_threads": 2, "dtype": "float32", "device": "cpu",
                "chunk_len": 512, "repeats": 3, "checkpoint": "last"}  # fmt: skip
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
