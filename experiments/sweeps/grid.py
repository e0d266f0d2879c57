"""The trials of a sweep: which they are, and their configs."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from experiments.config.identity import LAUNCH_KEYS, flatten


def expand(config: DictConfig) -> list[list[str]]:
    """The overrides of each trial of a multirun, as Hydra's basic sweeper has them, each once.

    An override of the command line replaces the experiment's of the same key.

    Raises:
        ValueError: if another sweeper was chosen.
        HydraException: if an override cannot be parsed or swept over.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    sweeper = config.hydra.sweeper
    if not sweeper._target_.endswith(".BasicSweeper"):
        raise ValueError(
            f"hydra/sweeper {sweeper._target_} cannot be resumed: give the points as a grid, "
            "key=value,value"
        )
    params = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    parsed = parser().parse_overrides([*params, *config.hydra.overrides.task])
    parsed = [o for o in parsed if o.get_key_element() not in LAUNCH_KEYS]
    (trials,) = BasicSweeper.split_arguments(parsed, None)
    return [list(trial) for trial in dict.fromkeys(map(tuple, trials))]


def parser() -> OverridesParser:
    return OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())


class Composer:
    """Composes the configs of trials; what trials with the same yaml files share, once.

    Args:
        config: of the multirun.
    """

    def __init__(self, config: DictConfig) -> None:
        self.name = config.hydra.job.config_name
        self.paths = [o for o in config.hydra.overrides.hydra if o.startswith("hydra.searchpath")]
        self.parser = parser()
        self.bases: dict[tuple[str, ...], DictConfig] = {}

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """The config of one trial.

        Raises:
            HydraException: if it cannot be composed.
        """
        from hydra._internal.config_loader_impl import ConfigLoaderImpl

        repository = GlobalHydra.instance().config_loader().repository  # type: ignore[attr-defined]
        values = [
            override
            for override in self.parser.parse_overrides(list(overrides))
            if not repository.group_exists(override.key_or_group)
        ]
        texts = {override.input_line for override in values}
        groups = tuple(override for override in overrides if override not in texts)
        if groups not in self.bases:
            self.bases[groups] = hydra.compose(self.name, [*self.paths, *groups])
        config = copy.deepcopy(self.bases[groups])
        ConfigLoaderImpl._apply_overrides_to_config(values, config)
        return config


def check_same(path: Path, one: dict[str, Any], other: dict[str, Any]) -> None:
    """Raise ValueError if two trials with one run directory do not have one config."""
    a, b = flatten(one), flatten(other)
    keys = sorted(key for key in {*a, *b} if a.get(key) != b.get(key))
    if keys:
        raise ValueError(
            f"another trial of this sweep has the directory {path} too; they differ in "
            f"{', '.join(keys)}, which no directory is named by: take a suite= for each value"
        )
