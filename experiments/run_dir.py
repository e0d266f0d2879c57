"""A run directory: the only interface between training, evaluation, benchmarks and analysis.

Named by content (suite, model, overrides), never by the clock. CONTRIBUTING.md lists its files.
"""

import fcntl
import glob
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from models.language_model import LanguageModel

# A run directory may come from somebody else: its config instantiates nothing but these.
ALLOWED_TARGETS = ("models.", "experiments.", "lightning.pytorch.loggers.")

# How a run is executed, not what it computes: these may change between a start and its resume.
EXECUTION_KEYS = (
    "micro_batch_size",
    "num_workers",
    "checkpoint_every_min",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "logger",
    "paths",
    "data.root",
    "model.net.grad_checkpoint",
)
# Chosen by the directory itself, so they do not appear in the last part of its name.
NAMED_BY_PATH = ("suite", "model", "experiment", "seed")


def write_json(path: Path, obj: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    write_text(path, json.dumps(obj, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text under a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes private files; results are for everybody
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def run_tag(overrides: Sequence[str], seed: int) -> str:
    """The last part of a run's path: the seed and every override that changes what is computed."""
    kept = []
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key in NAMED_BY_PATH or key.startswith("hydra") or covers(EXECUTION_KEYS, key):
            continue
        kept.append(f"{key}={value}")
    tag = ",".join(sorted(kept))
    safe = re.sub(r"[^A-Za-z0-9=.,_+-]+", "-", tag)
    if safe != tag or len(safe) > 80:  # two different tags must never share a directory
        safe = f"{safe[:64]}-{hashlib.sha256(tag.encode()).hexdigest()[:8]}"
    return f"seed={seed},{safe}" if safe else f"seed={seed}"


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
    """Lines ``key: old -> new`` for what differs between two configs, execution keys left out."""
    a, b = flatten(old), flatten(new)
    return [
        f"{key}: {a.get(key, '(none)')} -> {b.get(key, '(none)')}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and not covers(EXECUTION_KEYS, key)
    ]


def config_hash(config: dict[str, Any]) -> str:
    """Hash of what a config computes (execution keys left out), 16 hex digits."""
    rows = {k: v for k, v in flatten(config).items() if not covers(EXECUTION_KEYS, k)}
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def check_targets(node: Any, where: str = "config") -> None:
    """Raise ValueError if a config would instantiate anything outside ALLOWED_TARGETS."""
    if isinstance(node, dict):
        target = node.get("_target_")
        if target is not None and not str(target).startswith(ALLOWED_TARGETS):
            raise ValueError(
                f"{where} wants to instantiate {target!r}; allowed are targets that start with "
                f"{', '.join(ALLOWED_TARGETS)}"
            )
        for value in node.values():
            check_targets(value, where)
    elif isinstance(node, list):
        for value in node:
            check_targets(value, where)


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

    @classmethod
    def freeze(cls, config: DictConfig, overrides: Sequence[str]) -> "RunDir":
        """Make or find the run directory of a composed config and store the config in it.

        Raises:
            ValueError: if the directory holds training of a different config, with the difference.
        """
        frozen = plain(config)
        check_targets(frozen)
        for part in (str(frozen["suite"]), str(frozen["model"]["name"])):
            if not re.fullmatch(r"[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*", part):
                raise ValueError(
                    f"{part!r} cannot name a folder: use letters, digits, '_', '-', '.'"
                )
        path = (
            Path(frozen["paths"]["runs"])
            / frozen["suite"]
            / frozen["model"]["name"]
            / run_tag(overrides, frozen["seed"])
        )
        if (path / "config.yaml").is_file():
            run = cls(path)
            difference = config_difference(plain(run.config), frozen)
            if difference and run.has_training:
                shown = "; ".join(difference[:5]) + ("; ..." if len(difference) > 5 else "")
                raise ValueError(
                    f"{path} belongs to another config ({shown}): choose another suite=NAME, "
                    "or remove that folder to train again"
                )
        if not (path / "result.json").is_file():  # a finished run keeps the config it ran with
            write_text(path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(frozen)))
        return cls(path)

    @cached_property
    def config(self) -> DictConfig:
        """The frozen config; read once, checked against the allow-list of targets."""
        try:
            config = OmegaConf.load(self.path / "config.yaml")
        except Exception as error:
            raise ValueError(f"{self.path / 'config.yaml'} is not readable YAML: {error}") from None
        if not isinstance(config, DictConfig):
            raise ValueError(f"{self.path / 'config.yaml'} is not a mapping")
        check_targets(plain(config), str(self.path / "config.yaml"))
        return config

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
        if not path.is_file():
            raise FileNotFoundError(f"{self.path} has no {which} checkpoint: train it first")
        return path

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; the operating system lets go when the process ends.

        Raises:
            ValueError: if another process holds it.
        """
        with open(self.path / ".lock", "w", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"another process is training {self.path}") from None
            yield


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


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint without running any code of it.

    Raises:
        ValueError: if the file is damaged or wants more than tensors.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} is not a readable checkpoint ({reason[:120]})") from None


def model_weights(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """The language model's own state dict out of a Lightning checkpoint."""
    weights = {
        key.removeprefix("model."): value
        for key, value in checkpoint.get("state_dict", {}).items()
        if key.startswith("model.")
    }
    if not weights:
        raise ValueError(f"{path} holds no model weights")
    return weights


def make(node: DictConfig, **kwargs: Any) -> Any:
    """Instantiate a config node whose target is allowed.

    Raises:
        ValueError: if its target cannot be built from these values, with the target's own reason.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    check_targets(plain(node))
    try:
        return instantiate(node, **kwargs)
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise ValueError(" ".join(str(cause).split())) from error


def load_model(run: RunDir, checkpoint: str = "best", device: str = "cpu") -> "LanguageModel":
    """Build a run's model from its frozen config and load its weights, in evaluation mode.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it is damaged or does not fit the config.
    """
    path = run.checkpoint(checkpoint)
    model = make(run.config.model.net)
    try:
        model.load_state_dict(model_weights(read_checkpoint(path), path))
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit its config: {' '.join(str(error).split())[:300]}"
        ) from None
    return model.to(device).eval()
