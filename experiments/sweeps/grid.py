"""The cells of a sweep: which they are, their configs, and which are frozen already."""

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from experiments.config.identity import LAUNCH_KEYS, flatten
from experiments.runs.run_dir import RunDir
from experiments.system.files import write_text

HERE = Path(__file__).parents[1]
# what decides about a cell besides its config


def expand(config: DictConfig) -> list[list[str]]:
    """The overrides of each cell of a multirun, as Hydra's basic sweeper has them, each cell once.

    An override of the command line replaces the experiment's of the same key.

    Raises:
        ValueError: if another sweeper was chosen.
        HydraException: if an override cannot be parsed or swept over.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    sweeper = config.hydra.sweeper
    if not sweeper._target_.endswith(".BasicSweeper"):
        raise ValueError(
            f"hydra/sweeper {sweeper._target_} cannot be continued: give the points as a grid, "
            "key=value,value"
        )
    params = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    parsed = parser.parse_overrides([*params, *config.hydra.overrides.task])
    parsed = [o for o in parsed if o.get_key_element() not in LAUNCH_KEYS]
    (cells,) = BasicSweeper.split_arguments(parsed, None)
    return [list(cell) for cell in dict.fromkeys(map(tuple, cells))]


def compose(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The config of one cell of a multirun.

    Raises:
        HydraException: if it cannot be composed.
    """
    paths = [o for o in config.hydra.overrides.hydra if o.startswith("hydra.searchpath")]
    return hydra.compose(config.hydra.job.config_name, [*paths, *overrides])


def locate(config: DictConfig, overrides: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """Check a cell's config and complete it; its run directory, and what is frozen there.

    Raises:
        ValueError, OSError: if nothing could be trained with it.
    """
    return RunDir.locate(config, overrides)


def check_same(path: Path, one: dict[str, Any], other: dict[str, Any]) -> None:
    """Raise ValueError if two cells with one run directory do not have one config."""
    a, b = flatten(one), flatten(other)
    keys = sorted(key for key in {*a, *b} if a.get(key) != b.get(key))
    if keys:
        raise ValueError(
            f"another cell of this sweep has the directory {path} too; they differ in "
            f"{', '.join(keys)}, which no directory is named by: take a suite= for each value"
        )


class Remembered:
    """Where cells that were composed before have their run directories: ``.cells.json``.

    Composing takes a tenth of a second a cell. An entry counts only while neither ``conf/``, nor
    what names a run, nor any file it depends on has changed; without one a cell is composed.
    """

    def __init__(self, config: DictConfig) -> None:
        self.file = Path(config.paths.runs) / config.suite / ".cells.json"
        self.key = config_key(config)
        self.cells: dict[str, Any] = {}
        try:
            stored = json.loads(self.file.read_text(encoding="utf-8"))
            if self.key and stored["key"] == self.key:
                self.cells = dict(stored["cells"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # missing or damaged: every cell is composed anew

    def known(self, overrides: Sequence[str]) -> RunDir | None:
        """The run of a cell that was frozen before, if freezing it again would change nothing."""
        try:
            path, files = self.cells[name(overrides)]
            known = all(stamp(file) == then for file, then in files.items())
            return RunDir(path) if known else None
        except (KeyError, ValueError, TypeError, AttributeError, OSError):
            return None

    def note(self, overrides: Sequence[str], run: RunDir, frozen: dict[str, Any]) -> None:
        """Remember where a cell is."""
        files = [str(run.path / "config.yaml")]
        tokenizer = frozen["data"].get("tokenizer")
        if isinstance(tokenizer, dict) and tokenizer.get("path"):
            files.append(str(tokenizer["path"]))
        self.cells[name(overrides)] = [str(run.path), {file: stamp(file) for file in files}]

    def save(self) -> None:
        """Write what is remembered, if it may be."""
        if self.key and self.cells:
            write_text(self.file, json.dumps({"key": self.key, "cells": self.cells}))


def name(overrides: Sequence[str]) -> str:
    return "\n".join(overrides)


def stamp(file: str) -> list[int]:
    """Changes whenever a file does.

    Raises:
        OSError: if there is none.
    """
    status = Path(file).stat()
    return [status.st_mtime_ns, status.st_size, status.st_ino]


def config_key(config: DictConfig) -> str:
    """A hash of all that a cell's config and directory depend on besides its overrides.

    Empty if that is not known: a config may depend on the environment.
    """
    digest = hashlib.sha256(version("hydra-core").encode() + version("omegaconf").encode())
    for source in config.hydra.runtime.config_sources:
        if source.schema != "file":
            digest.update(f"{source.schema}:{source.path}".encode())
            continue
        for file in sorted(Path(source.path).rglob("*.yaml")):
            content = file.read_bytes()
            if b"oc.env" in content:
                return ""
            digest.update(f"{file}:{len(content)}:".encode() + content)
    for module in NAMING:
        digest.update((HERE / module).read_bytes())
    given = OmegaConf.to_container(config.hydra.overrides)
    return "" if "oc.env" in str(given) else digest.hexdigest()


NAMING = (
    "config/identity.py",
    "config/checks.py",
    "runs/run_dir.py",
    "sweeps/grid.py",
)
