"""The families of models: every folder of `models/` that holds a `FAMILY` is one.

A family's folder holds all there is to it: the model, its fused step, the formats of its external
checkpoints, a toy. Nothing outside of it names the family; what needs all of them loops over here.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import models
from models.formats import Format
from models.language_model import LanguageModel


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
        name: its folder's, which manifests and run directories carry.
        label: as tables, figures and messages call it.
        model: its class.
        toy: makes a model of a few thousand parameters, for self-tests.
        formats: those of its external checkpoints.
    """

    name: str
    label: str
    model: type[LanguageModel]
    toy: Callable[[], LanguageModel]
    formats: tuple[Format, ...] = ()


@cache
def families() -> dict[str, Family]:
    """Every family by name, in the order of names."""
    found = {}
    for module in pkgutil.iter_modules(models.__path__):
        if module.ispkg:
            family = getattr(importlib.import_module(f"models.{module.name}"), "FAMILY", None)
            if family is not None:
                found[family.name] = family
    return dict(sorted(found.items()))


def formats() -> dict[str, tuple[Family, Format]]:
    """Every external checkpoint format, by name, and the family whose models it holds."""
    return {one.name: (family, one) for family in families().values() for one in family.formats}
