"""What a config means: its checks, its name as a folder, its differences, what it may build."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

# How a launch goes about its cells; no part of a run's config.
LAUNCH_KEYS = ("jobs", "fail_fast", "dry_run")
# How a run is executed, not what it computes: these may change between a start and its resume.
EXECUTION_KEYS = (
    *LAUNCH_KEYS,
    "micro_batch_size",
    "num_workers",
    "n_threads",
    "checkpoint_every_min",
    "log_every",
    "loss",
    "compile",
    "trainer",
    "logger",
    "paths",
    "data.root",
    "model.net.grad_checkpoint",
    "model.net.wkv_backend",
)
# So may these, as long as gradients flow from chunk to chunk; cut off, they are others.
CHUNK_KEYS = ("chunk_len", "backprop")
# Chosen by the directory itself, so they do not appear in the last part of its name.
NAMED_BY_PATH = ("suite", "model", "experiment", "seed")

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
LOSSES = ("full", "chunked")
BACKPROPS = ("full", "truncated")
# What conf/trainer may hand to Lightning's Trainer, none of which changes what is computed.
TRAINER_KEYS = (
    "accelerator",
    "devices",
    "num_nodes",
    "strategy",
    "detect_anomaly",
    "profiler",
)
# key: (type, least value, whether the least itself is allowed)
NUMBERS: dict[str, tuple[type, float, bool]] = {
    "seed": (int, 0, True),
    "ctx_len": (int, 1, True),
    "chunk_len": (int, 1, True),
    "batch_size": (int, 1, True),
    "micro_batch_size": (int, 1, True),
    "budget_tokens": (float, 0, False),
    "continue_to": (float, 0, False),
    "n_validations": (int, 1, True),
    "log_every": (int, 1, True),
    "checkpoint_every_min": (float, 0, False),
    "num_workers": (int, 0, True),
    "n_threads": (int, 1, True),
    "optim.peak_lr": (float, 0, False),
    "optim.eps": (float, 0, False),
    "optim.weight_decay": (float, 0, True),
    "optim.grad_clip": (float, 0, True),
    "optim.max_logit_penalty": (float, 0, True),
}
NULLABLE = ("chunk_len", "continue_to", "n_threads")


def check_config(cfg: DictConfig) -> None:
    """Raise ValueError for the first value that no run could be trained with."""
    for key, (kind, least, inclusive) in NUMBERS.items():
        value = OmegaConf.select(cfg, key)
        if key in NULLABLE and value is None:
            continue
        is_number = isinstance(value, int if kind is int else (int, float))
        if isinstance(value, bool) or not is_number or not math.isfinite(value):
            wanted = "a whole number" if kind is int else "a number"
            raise ValueError(f"{key} is {value!r}: it must be {wanted}")
        if value < least or (value == least and not inclusive):
            raise ValueError(
                f"{key} is {value}: it must be {'' if inclusive else 'above '}{least}"
                f"{' or more' if inclusive else ''}"
            )
    betas = cfg.optim.betas
    if (
        not OmegaConf.is_list(betas)
        or len(betas) != 2
        or not all(isinstance(b, float | int) and 0 <= b < 1 for b in betas)
    ):
        raise ValueError(f"optim.betas is {betas}: it must be two numbers from 0 to below 1")
    for key, allowed in (("precision", PRECISIONS), ("loss", LOSSES), ("backprop", BACKPROPS)):
        value = cfg.get(key, "full")  # runs of earlier versions have no backprop
        if value not in allowed:
            raise ValueError(f"{key} is {value!r}: choose {', '.join(allowed)}")
    unknown = [str(key) for key in cfg.trainer if key not in TRAINER_KEYS]
    if unknown:
        raise ValueError(f"trainer.{unknown[0]} is no key: choose {', '.join(TRAINER_KEYS)}")
    if cfg.get("backprop") == "truncated" and cfg.get("chunk_len") is None:
        raise ValueError("backprop=truncated cuts gradients between chunks: set chunk_len")
    if step_count(cfg) == cfg.budget_tokens // (cfg.batch_size * cfg.ctx_len) and continues(cfg):
        raise ValueError(
            f"continue_to={cfg.continue_to} is no step more than budget_tokens={cfg.budget_tokens}"
        )


def check_launch(config: DictConfig) -> None:
    """Raise ValueError for settings that no launch could go by."""
    jobs = config.jobs
    if jobs != "auto" and (not isinstance(jobs, int) or isinstance(jobs, bool) or jobs < 1):
        raise ValueError(f"jobs is {jobs!r}: it must be a whole number from 1, or auto")
    for key in ("fail_fast", "dry_run"):
        if not isinstance(config[key], bool):
            raise ValueError(f"{key} is {config[key]!r}: it must be true or false")


def continues(cfg: DictConfig) -> bool:
    """Whether a run goes on where a finished one ended."""
    return cfg.get("continue_to") is not None  # runs of earlier versions have no such key


def total_budget(cfg: DictConfig) -> float:
    """The tokens a run has been trained on at its end, those of a run it continues included."""
    return max(cfg.budget_tokens, cfg.continue_to) if continues(cfg) else cfg.budget_tokens


def step_count(cfg: DictConfig) -> int:
    """Optimizer steps within the budget.

    Raises:
        ValueError: if the budget does not pay for one.
    """
    tokens_per_step = cfg.batch_size * cfg.ctx_len
    if cfg.budget_tokens < tokens_per_step:
        raise ValueError(
            f"budget_tokens {cfg.budget_tokens} is less than one step "
            f"(batch_size {cfg.batch_size} x ctx_len {cfg.ctx_len} = {tokens_per_step} tokens)"
        )
    return int(total_budget(cfg)) // tokens_per_step


def folder_name(name: Any, what: str) -> str:
    """The name, if a folder of that name stays where it is put; else ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*", str(name)):
        raise ValueError(
            f"{what} {str(name)!r} cannot name a folder: use letters, digits, '_', '-', '.'"
        )
    return str(name)


def execution_keys(config: Mapping[Any, Any]) -> tuple[str, ...]:
    """The keys of a config that do not change what is computed, but for rounding."""
    truncated = config.get("backprop", "full") == "truncated"
    return EXECUTION_KEYS if truncated else (*EXECUTION_KEYS, *CHUNK_KEYS)


def run_tag(overrides: Sequence[str], seed: int, execution: Sequence[str] = EXECUTION_KEYS) -> str:
    """The last part of a run's path: the seed and every override that changes what is computed.

    Args:
        execution: the config's `execution_keys`.
    """
    kept = {}
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key in NAMED_BY_PATH or key.startswith("hydra") or covers(execution, key):
            continue
        kept[key] = f"{key}={canonical(value)}"  # of several the last counts, as for Hydra
    tag = ",".join(sorted(kept.values()))
    safe = re.sub(r"[^A-Za-z0-9=.,_+-]+", "-", tag)
    if safe != tag or len(safe) > 80:  # two different tags must never share a directory
        safe = f"{safe[:64]}-{hashlib.sha256(tag.encode()).hexdigest()[:8]}"
    return f"seed={seed},{safe}" if safe else f"seed={seed}"


def canonical(value: str) -> str:
    """One spelling for a number: 5e6, 5_000_000 and 5000000 are the same override."""
    try:
        number = float(value.replace("_", ""))
    except ValueError:
        return value
    return str(int(number)) if number.is_integer() else repr(number)


def plain(config: DictConfig) -> dict[str, Any]:
    """A config as plain Python values, resolved.

    Raises:
        MissingMandatoryValue: if one that the user must give is still ``???``.
    """
    container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def covers(keys: Sequence[str], key: str) -> bool:
    """True if ``key`` is one of ``keys`` or lies below one of them."""
    return any(key == k or key.startswith(k + ".") for k in keys)


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """A nested config as ``{"a.b.c": value}``."""
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    rows: dict[str, Any] = {}
    for key, value in node.items():
        rows.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return rows


def config_difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines ``key: old -> new`` for what differs between two configs, execution keys left out.

    A key that only one of them has is of another version of this suite, and no difference.
    """
    a, b = flatten(old), flatten(new)
    execution = set(execution_keys(old)) & set(execution_keys(new))
    return [
        f"{key}: {a[key]} -> {b[key]}"
        for key in sorted(a.keys() & b.keys())
        if a[key] != b[key] and not covers(tuple(execution), key)
    ]


def config_hash(config: dict[str, Any]) -> str:
    """Hash of what a config computes (execution keys left out), 16 hex digits."""
    execution = execution_keys(config)
    rows = {k: v for k, v in flatten(config).items() if not covers(execution, k)}
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]
