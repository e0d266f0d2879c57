"""What a config may build: a class or function defined in a module of `models` or `experiments`.

``hydra.utils.instantiate`` is not used: it resolves attributes through modules, so that a target
with one of our prefixes reaches whatever a module imports (models.ops.build.subprocess.run).
"""

import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from types import UnionType
from typing import Any

from omegaconf import DictConfig

from experiments.config.identity import plain

DOTTED = re.compile(r"((?:models|experiments)(?:\.[a-z][a-z0-9_]*)+)\.([A-Za-z][A-Za-z0-9_]*)")


def check_targets(config: Any, where: str) -> None:
    """Raise ValueError if a config from elsewhere names a target that is not this project's."""
    for node in nodes(config):
        special = {key for key in node if isinstance(key, str) and re.fullmatch(r"_[a-z]+_", key)}
        if special - {"_target_", "_partial_"}:
            raise ValueError(f"{where} has the keys {', '.join(sorted(special))}")
        if "_target_" in special:
            try:
                resolve(node["_target_"], object)
            except ValueError as error:
                raise ValueError(f"{where} may not be built: {error}") from None


def nodes(config: Any) -> Iterator[dict[Any, Any]]:
    """Every mapping of a config."""
    if isinstance(config, dict):
        yield config
        config = list(config.values())
    if isinstance(config, list):
        for value in config:
            yield from nodes(value)


def resolve(target: Any, *kinds: type | UnionType) -> Any:
    """The class or function behind a target.

    Args:
        kinds: what it must build one of: a subclass, or a function declared to return one.

    Raises:
        ValueError: if it is not defined in a module of this project, or builds something else.
    """
    match = DOTTED.fullmatch(target) if isinstance(target, str) else None
    try:
        module = importlib.import_module(match[1]) if match else None
    except ImportError as error:
        raise ValueError(f"{target} cannot be imported: {error}") from None
    found = vars(module).get(match[2]) if match and module else None
    if not callable(found) or getattr(found, "__module__", None) != getattr(module, "__name__", ""):
        raise ValueError(f"{target!r} is no class or function that a file of this project defines")
    made = found
    if inspect.isfunction(found):
        made = inspect.signature(found, eval_str=True).return_annotation
    if not isinstance(made, type) or not any(issubclass(made, kind) for kind in kinds):
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
    target, later = settings.pop("_target_", None), settings.pop("_partial_", False) and partial
    build = resolve(target, *kinds)
    try:
        signature = inspect.signature(build)
        (signature.bind_partial if later else signature.bind)(**settings)
        return functools.partial(build, **settings) if later else build(**settings)
    except (ValueError, OSError):
        raise
    except Exception as error:  # what odd values do to a constructor
        raise ValueError(f"{target}: {' '.join(str(error).split())}") from error
