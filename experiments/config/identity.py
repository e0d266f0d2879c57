"""What a config means: its checks, its name as a folder, its differences, what it may build."""

import hashlib
import json
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
