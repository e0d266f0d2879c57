"""A run directory: the only interface between training, evaluation, benchmarks and analysis.

Named by content (suite, model, overrides), never by the clock. CONTRIBUTING.md lists its files;
their names stand here alone.

Trust: your own run directories are trusted. One that may be from elsewhere is data, and is opened
by `open_external` or `find_runs`, which look at it before anything is built from it.
"""

import glob
import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
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
from experiments.system.locks import Holder, RunLocked, holder, holding

# the C ones read and write hundreds of runs in a fraction of the time
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class RunDir:
    """One run directory, finished or not.

    Args:
        path: the directory; it must hold a ``config.yaml``.

    Raises:
        ValueError: if it holds none.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.manifest_file = self.path / "manifest.json"
        self.metrics_file = self.path / "metrics.csv"
        self.tokenizer_file = self.path / "tokenizer.json"
        self.result_file = self.path / "result.json"
        self.error_file = self.path / "error.txt"
        self.log_file = self.path / "log.txt"
        self.queued_file = self.path / "queued.json"
        self.checkpoints = self.path / "checkpoints"
        self.scores = self.path / "eval"
        self.benchmarks = self.path / "bench"
        self.lock_file = self.path / ".lock"  # of the process that trains it
        self.launch_file = self.path / ".launch"  # of the launch that looks after that process
        if not self.config_file.is_file():
            raise ValueError(f"{self.path} is not a run directory: it has no config.yaml")

    @staticmethod
    def locate(config: DictConfig, overrides: Sequence[str]) -> tuple[Path, dict[str, Any]]:
        """The directory that a composed config belongs into, and the config as it is frozen.

        Raises:
            ValueError, OSError: as `complete`, and for names that are no folder's.
        """
        frozen = {key: value for key, value in complete(config).items() if key not in LAUNCH_KEYS}
        suite = folder_name(frozen["suite"], "suite")
        model = folder_name(model_name(frozen), "model.name")
        tag = run_tag(overrides, frozen["seed"])
        if frozen["continue_to"] is not None:
            others = [o for o in overrides if o.lstrip("+").partition("=")[0] != "continue_to"]
            frozen["continues"] = run_tag(others, frozen["seed"])
            if frozen["continues"] == tag:
                raise ValueError("continue_to names a directory: give it on the command line")
        return Path(frozen["paths"]["runs"]) / suite / model / tag, frozen

    @classmethod
    def freeze(cls, config: DictConfig, overrides: Sequence[str]) -> "RunDir":
        """Make or find the run directory of a composed config and store the config in it.

        Raises:
            ValueError, OSError: as `locate` and `store`.
        """
        return cls.store(*cls.locate(config, overrides))

    @classmethod
    def store(
        cls, path: Path, frozen: dict[str, Any], queued_by: Callable[[Path], str] = lambda path: ""
    ) -> "RunDir":
        """Make a run directory with a config, or find it.

        A run that is in training, or that another launch has in its queue, keeps its config.

        Args:
            queued_by: says who has a run in a queue; empty: nobody.

        Raises:
            ValueError: if the directory holds training of a different config, or another process
                is to train it with a different one; with the difference.
        """
        text = yaml_of(frozen)
        file = path / "config.yaml"
        if not file.is_file() and write_new(file, text):
            return cls(path)
        run = cls(path)
        if run.config_file.read_bytes() == text.encode():
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
        if queue := queued_by(path):
            if difference:
                raise ValueError(
                    f"{path} waits with another config ({difference}) {queue}: let that end, "
                    "stop it, or choose another suite=NAME"
                )
            return run
        try:
            with run.lock():
                write_text(run.config_file, text)
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
        """The frozen config; read once.

        Raises:
            ValueError: if it is damaged.
        """
        try:
            config = OmegaConf.create(yaml.load(self.config_file.read_bytes(), LOADER))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{self.config_file} is not readable YAML: {reason}") from None
        if not isinstance(config, DictConfig) or not config:
            raise ValueError(f"{self.config_file} is cut off, or no config of a run")
        return config

    @property
    def manifest(self) -> dict[str, Any]:
        """What was trained on what; empty before the first start."""
        return read_json(self.manifest_file) or {}

    @property
    def result(self) -> dict[str, Any] | None:
        """The outcome, or None while the run is not finished."""
        return read_json(self.result_file)

    @property
    def finished(self) -> bool:
        return self.result_file.is_file()

    @property
    def has_training(self) -> bool:
        """True if training left something that another config must not overwrite."""
        return self.finished or any(self.checkpoints.glob("*.ckpt"))

    @property
    def name(self) -> str:
        """suite/model/overrides."""
        return "/".join(self.path.resolve().parts[-3:])

    def checkpoint(self, which: str = "best") -> Path:
        """Path of the "best" or "last" checkpoint.

        Raises:
            FileNotFoundError: if there is none.
        """
        path = self.checkpoints / f"{which}.ckpt"
        if not path.exists():
            raise FileNotFoundError(f"{self.path} has no {which} checkpoint: train it first")
        return path

    def lock(self, wait: bool = False) -> AbstractContextManager[None]:
        """Hold the run, as whoever trains it does; a context manager.

        Args:
            wait: watch the lock of another machine until it is seen to be alive or dead.

        Raises:
            RunLocked: if another process holds the run.
        """
        return holding(self.lock_file, wait, working=True)

    def trainer(self) -> Holder | None:
        """Who trains the run."""
        return holder(self.lock_file)

    def holder(self) -> Holder | None:
        """Who trains the run, or is about to."""
        return self.trainer() or holder(self.launch_file)

    def error(self) -> str:
        """Why the last attempt failed, in a line; empty if it did not."""
        try:
            text = self.error_file.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""
        return text.partition("\n")[0] or "it failed"

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


def yaml_of(frozen: dict[str, Any]) -> str:
    """The text of a frozen config."""
    return yaml.dump(frozen, Dumper=DUMPER, sort_keys=False, allow_unicode=True)


def read_json(file: Path) -> dict[str, Any] | None:
    """A JSON file of a run, or None if it is not there.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise ValueError(f"{file} is not valid JSON: remove it") from None


def open_external(path: str | Path) -> RunDir:
    """A run directory that may be somebody else's, as data: nothing in it can run code.

    Its config may build only what this project defines, and no link may lead out of it.

    Raises:
        ValueError: if it is none, or reaches for more than a model and its data.
    """
    run = RunDir(path)
    inside = run.path.resolve()
    for folder in (run.path, run.checkpoints, run.scores, run.benchmarks):
        for entry in folder.iterdir() if folder.is_dir() else ():
            if entry.is_symlink() and not entry.resolve().is_relative_to(inside):
                raise ValueError(f"{entry} is a link out of its run directory: copy the file there")
    raw = OmegaConf.to_container(run.config, resolve=False)
    if "${" in json.dumps(raw, default=str):
        raise ValueError(f"{run.config_file} has a value with '${{': a frozen config has none")
    check_targets(raw, str(run.config_file))
    for key in ("suite", "model.name", "size.name", "data.name"):
        if (value := OmegaConf.select(run.config, key)) is not None:
            folder_name(value, f"{run.config_file}: {key}")
    return run


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
