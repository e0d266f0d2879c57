"""A run directory: the only interface between training, evaluation, benchmarks and analysis.

Named by content (suite, model, overrides), never by the clock. CONTRIBUTING.md lists its files.
"""

import glob
import json
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.config.identity import (
    LAUNCH_KEYS,
    config_difference,
    folder_name,
    model_name,
    plain,
    run_tag,
)
from experiments.config.targets import check_targets
from experiments.runs.freezing import complete
from experiments.system.files import write_new, write_text
from experiments.system.locks import Claim, RunLocked


class RunDir:
    """One run directory, finished or not.

    Args:
        path: the directory; it must hold a ``config.yaml``.

    Raises:
        ValueError: if it holds none, or one that cannot be read or names a foreign target.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "config.yaml").is_file():
            raise ValueError(f"{self.path} is not a run directory: it has no config.yaml")

    @staticmethod
    def locate(config: DictConfig, overrides: Sequence[str]) -> tuple[Path, dict[str, Any]]:
        """The directory that a composed config belongs into, and the config as it is frozen.

        Raises:
            ValueError: for names that are no folder's, and for foreign targets.
        """
        frozen = {key: value for key, value in complete(config).items() if key not in LAUNCH_KEYS}
        suite = folder_name(frozen["suite"], "suite")
        model = folder_name(model_name(frozen), "model.name")
        tag = run_tag(overrides, frozen["seed"])
        if frozen.get("continue_to") is not None:
            others = [o for o in overrides if o.lstrip("+").partition("=")[0] != "continue_to"]
            frozen["continues"] = run_tag(others, frozen["seed"])
            if frozen["continues"] == tag:
                raise ValueError("continue_to names a directory: give it on the command line")
        path = Path(frozen["paths"]["runs"]) / suite / model / tag
        return path, frozen

    @classmethod
    def freeze(cls, config: DictConfig, overrides: Sequence[str]) -> "RunDir":
        """Make or find the run directory of a composed config and store the config in it.

        Raises:
            ValueError: as `store` and `locate`.
        """
        return cls.store(*cls.locate(config, overrides))

    @classmethod
    def store(
        cls, path: Path, frozen: dict[str, Any], queued_by: Callable[[Path], str] = lambda path: ""
    ) -> "RunDir":
        """Make a run directory with a config, or find it.

        A run that is in training, or that another launch has in its queue, keeps its config.

        Args:
            queued_by: tells who has a run in a queue; empty: nobody.

        Raises:
            ValueError: if the directory holds training of a different config, or another process
                is to train it with a different one; with the difference.
        """
        text = OmegaConf.to_yaml(OmegaConf.create(frozen))
        file = path / "config.yaml"
        if not file.is_file() and write_new(file, text):
            return cls(path)
        run = cls(path)
        if file.read_bytes() == text.encode():
            return run
        try:
            difference = run.differs(frozen)
        except ValueError as error:  # damaged
            if run.has_training:
                raise
            difference = str(error)
        if difference and run.has_training:
            raise ValueError(
                f"{path} belongs to another config ({difference}): choose another suite=NAME, "
                "or remove that folder to train again"
            )
        if run.finished:  # it keeps the config it ran with
            return run
        queue = queued_by(path)
        try:
            with nullcontext() if queue else run.claim():
                if difference and queue:
                    raise ValueError(
                        f"{path} waits with another config ({difference}) {queue}: let that end, "
                        "stop it, or choose another suite=NAME"
                    )
                if not queue:
                    write_text(file, text)
        except RunLocked as error:
            if difference:
                raise ValueError(f"{error} with another config ({difference})") from None
        return cls(path)

    def differs(self, frozen: dict[str, Any]) -> str:
        """How a config differs from the run's own in what is computed; empty: not at all."""
        difference = config_difference(plain(self.config), frozen)
        return "; ".join(difference[:5]) + ("; ..." if len(difference) > 5 else "")

    @cached_property
    def config(self) -> DictConfig:
        """The frozen config; read once, and checked: it may be somebody else's."""
        return read_config(self.path)

    def _read_json(self, name: str) -> dict[str, Any] | None:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            raise ValueError(f"{self.path / name} is not valid JSON: remove it") from None

    @property
    def manifest(self) -> dict[str, Any]:
        """What was trained on what; empty before the first start."""
        return self._read_json("manifest.json") or {}

    @property
    def result(self) -> dict[str, Any] | None:
        """The outcome, or None while the run is not finished."""
        return self._read_json("result.json")

    @property
    def finished(self) -> bool:
        return (self.path / "result.json").is_file()

    @property
    def has_training(self) -> bool:
        """True if training left something that another config must not overwrite."""
        return self.finished or any((self.path / "checkpoints").glob("*.ckpt"))

    @property
    def name(self) -> str:
        """suite/model/overrides."""
        return "/".join(self.path.resolve().parts[-3:])

    def checkpoint(self, which: str = "best") -> Path:
        """Path of the "best" or "last" checkpoint.

        Raises:
            FileNotFoundError: if there is none.
        """
        path = self.path / "checkpoints" / f"{which}.ckpt"
        if not path.exists():
            raise FileNotFoundError(f"{self.path} has no {which} checkpoint: train it first")
        return path

    def claim(self, wait: bool = False, training: bool = True) -> Claim:
        """Hold the run for this process; a context manager.

        A claim that the process which started this one took for it is taken over. `wait` and
        `training` as in `Claim.take`.

        Raises:
            RunLocked: if another process holds the run.
            ValueError: if a link leads out of the directory.
        """
        check_links(self.path)
        return Claim.inherited(self.path) or Claim.take(self.path, wait, training)

    def summary(self) -> str:
        """A finished run's result in a few words; empty if there is none, or one of another kind.

        Raises:
            ValueError: if ``result.json`` is damaged.
        """
        result = self.result or {}
        if "val/loss" not in result:
            return ""
        bits = "" if result["val/bpb"] is None else f" ({result['val/bpb']:.4f} bits/byte)"
        return (
            f"{result['step']} steps, {result['tokens']:,} tokens, val/loss "
            f"{result['val/loss']:.4f} nats/token{bits}, {result['time_s']:.0f} s, "
            f"{result['perf/tokens_per_s']:,.0f} tokens/s"
        )


def find_runs(pattern: str | Path | Sequence[str]) -> list[RunDir]:
    """Run directories that match a path, a glob or a list of them, sorted by path.

    Raises:
        FileNotFoundError: if none matches.
    """
    patterns = [pattern] if isinstance(pattern, (str, Path)) else list(pattern)
    found = sorted(
        {
            Path(path).resolve()
            for one in patterns
            for path in glob.glob(str(one))
            if (Path(path) / "config.yaml").is_file()
        }
    )
    if not found:
        raise FileNotFoundError(f"no run directory matches {', '.join(map(str, patterns))}")
    return [RunDir(os.path.relpath(path)) for path in found]


# entries of a run directory that are read or written; a link in their place leads elsewhere
FOLDERS = (".", "checkpoints", "eval", "bench")


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
