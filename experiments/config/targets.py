"""What a config may build, and reading the config of a run that may be somebody else's.

A ``_target_`` names a class or a function by module and name. It is built only if the name is
defined in a file of that module in models/ or experiments/, and is what the caller wants: a
subclass, or a function declared to return one. So a new file there can be named at once, and
nothing else can: not what a module imports, nor a function that is for something else.
"""

import functools
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.config.identity import folder_name, plain

ROOT = Path(__file__).resolve().parents[2]
DOTTED = re.compile(r"((?:models|experiments)(?:\.[a-z][a-z0-9_]*)+)\.([A-Za-z][A-Za-z0-9_]*)")
SPECIAL = re.compile(r"_[a-z]+_")  # keys that Hydra would take for instructions
# entries of a run directory that are read or written; a link in their place leads elsewhere
FOLDERS = (".", "checkpoints", "eval", "bench")


def check_targets(config: Any, where: str = "config") -> None:
    """Raise ValueError if a config names a target that is not defined in this project.

    The sources are looked at, nothing is imported. ``logger`` has no targets: see `loggers`.
    """
    for key, node in nodes(config):
        special = {k for k in node if isinstance(k, str) and SPECIAL.fullmatch(k)}
        if not special or key == "logger" or key.startswith("logger."):
            continue
        if "_target_" not in special or special - {"_target_", "_partial_"}:
            raise ValueError(f"{where}: {key or 'it'} has the keys {', '.join(sorted(special))}")
        split_target(node["_target_"], where)
        for inner, below in nodes(node):
            if inner and "_target_" in below:
                raise ValueError(f"{where}: {key}.{inner} is a target within a target")


def nodes(config: Any, key: str = "") -> Iterator[tuple[str, dict[Any, Any]]]:
    """Every mapping of a config with its dotted key."""
    if isinstance(config, dict):
        yield key, config
        for name, value in config.items():
            yield from nodes(value, f"{key}.{name}" if key else str(name))
    elif isinstance(config, list):
        for number, value in enumerate(config):
            yield from nodes(value, f"{key}.{number}" if key else str(number))


def split_target(target: Any, where: str = "config") -> tuple[str, str]:
    """Module and name of a target. Raises ValueError unless the name is defined there."""
    match = DOTTED.fullmatch(target) if isinstance(target, str) else None
    if match is None or match[2] not in defined(match[1]):
        raise ValueError(
            f"{where} wants to build {target!r}, which is no class or function that a file of "
            "models/ or experiments/ defines"
        )
    return match[1], match[2]


@functools.cache
def defined(module: str) -> frozenset[str]:
    """Classes and functions at the top level of a module of ours; none if it has no file."""
    file = ROOT / f"{module.replace('.', '/')}.py"
    if not file.is_file():
        return frozenset()
    return frozenset(
        re.findall(r"^(?:class|def) ([A-Za-z]\w*)", file.read_text(encoding="utf-8"), re.MULTILINE)
    )


def resolve(target: Any, *kinds: type | UnionType) -> Any:
    """The class or function behind a target.

    Args:
        kinds: what it must build one of.

    Raises:
        ValueError: if it is not allowed, or builds something else.
    """
    module, name = split_target(target)
    try:
        found = vars(importlib.import_module(module))[name]
    except (ImportError, KeyError) as error:
        raise ValueError(f"{target} cannot be had: {error}") from None
    made = found
    if inspect.isfunction(found):
        made = inspect.signature(found).return_annotation
        if isinstance(made, str):
            made = vars(importlib.import_module(module)).get(made)
    own = getattr(found, "__module__", None) == module
    if not own or not isinstance(made, type) or not any(issubclass(made, kind) for kind in kinds):
        wanted = " or ".join(str(getattr(kind, "__name__", kind)) for kind in kinds)
        raise ValueError(f"{target} makes no {wanted}")
    return found


def make(node: Any, *kinds: type | UnionType, partial: bool = False) -> Any:
    """Build what a config node names, from its other keys.

    Args:
        kinds: what it must be one of.
        partial: let the node ask, by ``_partial_``, to be called later with more.

    Raises:
        ValueError: if its target is not allowed, or cannot be built from these values.
        OSError: as the target raises.
    """
    settings = plain(node) if isinstance(node, DictConfig) else dict(node)
    check_targets(settings)
    target, later = settings.pop("_target_", None), settings.pop("_partial_", False) and partial
    build = resolve(target, *kinds)
    try:
        signature = inspect.signature(build)
        (signature.bind_partial if later else signature.bind)(**settings)
        if later:
            return functools.partial(build, **settings)
        return build(**settings)
    except (ValueError, OSError):
        raise
    except Exception as error:  # what odd values do to a constructor
        raise ValueError(f"{target}: {' '.join(str(error).split())}") from error


def read_config(folder: Path) -> DictConfig:
    """The config of a run directory, which may be somebody else's.

    Raises:
        ValueError: if it cannot be read, is not one that was frozen here, names a foreign target or
            a folder that is none, or if a link leads out of the directory.
    """
    file = folder / "config.yaml"
    check_links(folder)
    try:
        config = OmegaConf.load(file)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} is not readable YAML: {reason}") from None
    if not isinstance(config, DictConfig):
        raise ValueError(f"{file} is not a mapping")
    raw = OmegaConf.to_container(config, resolve=False)
    if "${" in json.dumps(raw, default=str):
        raise ValueError(f"{file} has a value with '${{': a frozen config refers to nothing")
    check_targets(raw, str(file))
    for key in ("suite", "model.name", "data.name"):
        value = OmegaConf.select(config, key)
        if value is not None:
            folder_name(value, f"{file}: {key}")
    return config


def check_links(folder: Path) -> None:
    """Raise ValueError if something that a run directory should hold is a link out of it."""
    inside = folder.resolve()
    for name in FOLDERS:
        if not (folder / name).is_dir():
            continue
        for path in (folder / name).iterdir():
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                raise ValueError(f"{path} is a link out of its run directory: copy the file there")
