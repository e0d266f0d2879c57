"""What names a run and tells it from others: the part of its config that decides what is computed.

Where a key stands says which part it belongs to. Below ``execution`` and ``paths`` stands how and
where a run is executed, which may change at every start; `LAUNCH_KEYS` are about a sweep and are
never frozen. All else is what is computed.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

LAUNCH_KEYS = ("jobs", "fail_fast", "dry_run")
EXECUTION = ("execution", "paths")
# Overrides that do not appear in the last part of a run's path: what the parts before it say, and
# the groups that go below `execution`.
NOT_IN_TAG = ("suite", "model", "size", "experiment", "seed", "trainer", "logger")


def model_name(config: Any) -> str:
    """The name of a model of a size, as directories, manifests and tables have it: rwkv4_tiny."""
    return f"{config['model']['name']}_{config['size']['name']}"


def run_tag(overrides: Sequence[str], seed: int) -> str:
    """The last part of a run's path: the seed and every override that changes what is computed."""
    kept = {}
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        first = key.partition(".")[0].partition("/")[0]
        if key not in NOT_IN_TAG and first not in ("hydra", *EXECUTION, *LAUNCH_KEYS):
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


def folder_name(name: Any, what: str) -> str:
    """The name, if a folder of that name stays where it is put.

    Raises:
        ValueError: if it does not; `what` says whose name it is.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*", str(name)):
        raise ValueError(
            f"{what} {str(name)!r} cannot name a folder: use letters, digits, '_', '-', '.'"
        )
    return str(name)


def plain(config: DictConfig) -> dict[str, Any]:
    """A config as plain Python values, resolved.

    Raises:
        ValueError: if one that the user must give is still ``???``.
    """
    try:
        container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ValueError(f"{error.full_key} must be given: {error.full_key}=...") from None
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """A nested config as ``{"a.b.c": value}``."""
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    rows: dict[str, Any] = {}
    for key, value in node.items():
        rows.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return rows


def computed(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config computes: all of it but `EXECUTION`, flattened."""
    return flatten({key: value for key, value in config.items() if key not in EXECUTION})


def config_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines ``key: old -> new`` for what two configs compute differently."""
    a, b = computed(old), computed(new)
    return [
        f"{key}: {a.get(key)} -> {b.get(key)}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]


def config_hash(config: Mapping[str, Any]) -> str:
    """Hash of what a config computes, 16 hex digits."""
    text = json.dumps(computed(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
