"""Checks of values: each command states what its keys may be, and one function holds them to it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf


class Rule(Protocol):
    """What a value may be."""

    def fault(self, value: Any) -> str:
        """What it must be instead, in words; empty if it is."""


@dataclass(frozen=True)
class Number:
    """A finite number of at least (or above) a bound.

    Attributes:
        least: the smallest value allowed.
        above: the bound itself is not allowed.
        whole: it must be an int.
        most: the largest value allowed.
    """

    least: float = -math.inf
    above: bool = False
    whole: bool = False
    most: float = math.inf

    def fault(self, value: Any) -> str:
        kinds: Any = int if self.whole else (int, float)
        right = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
        if right and self.least <= value <= self.most and not (self.above and value == self.least):
            return ""
        words = "a whole number" if self.whole else "a number"
        if self.most < math.inf:
            return f"{words} from {self.least} to {self.most}"
        if self.least == -math.inf:
            return words
        return f"{words} above {self.least}" if self.above else f"{words}, {self.least} or more"


class OneOf:
    """One of some values."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def fault(self, value: Any) -> str:
        # by kind too: 1 is not true
        if any(value == one and type(value) is type(one) for one in self.values):
            return ""
        shown = (
            "null" if v is None else str(v).lower() if isinstance(v, bool) else str(v)
            for v in self.values
        )
        return f"one of {', '.join(shown)}"


class Flag:
    """true or false."""

    def fault(self, value: Any) -> str:
        return "" if isinstance(value, bool) else "true or false"


@dataclass(frozen=True)
class Optional:
    """null, or what another rule allows."""

    rule: Rule

    def fault(self, value: Any) -> str:
        return "" if value is None else self.rule.fault(value)


class Betas:
    """Two numbers from 0 to below 1."""

    def fault(self, value: Any) -> str:
        is_pair = OmegaConf.is_list(value) and len(value) == 2
        right = is_pair and all(isinstance(b, float | int) and 0 <= b < 1 for b in value)
        return "" if right else "two numbers from 0 to below 1"


def check_values(config: DictConfig | Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Raise ValueError for the first value that is not what its rule allows.

    Args:
        rules: by dotted key; a key that is missing counts as null.
    """
    nested = config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
    for key, rule in rules.items():
        value = OmegaConf.select(nested, key)
        if fault := rule.fault(value):
            raise ValueError(f"{key} is {value!r}: it must be {fault}")


TOKENS = Number(0, above=True)
TRAINING: dict[str, Rule] = {
    "seed": Number(0, whole=True),
    "ctx_len": Number(1, whole=True),
    "batch_size": Number(1, whole=True),
    "budget_tokens": TOKENS,
    "continue_to": Optional(TOKENS),
    "truncate": Optional(Number(1, whole=True)),
    "n_validations": Number(1, whole=True),
    "precision": OneOf("32-true", "bf16-mixed", "16-mixed"),
    "match": Optional(OneOf("non_embedding", "total", "flops")),
    "match_tolerance": Number(0),
    "optim.peak_lr": Number(0, above=True),
    "optim.betas": Betas(),
    "optim.eps": Number(0, above=True),
    "optim.weight_decay": Number(0),
    "optim.grad_clip": Number(0),
    "optim.max_logit_penalty": Number(0),
    "execution.micro_batch_size": Number(1, whole=True),
    "execution.chunk_len": Optional(Number(1, whole=True)),
    "execution.loss": OneOf("full", "chunked"),
    "execution.grad_checkpoint": Flag(),
    "execution.compile": Flag(),
    "execution.n_threads": Optional(Number(1, whole=True)),
    "execution.num_workers": Number(0, whole=True),
    "execution.log_every": Number(1, whole=True),
    "execution.checkpoint_every_min": Number(0, above=True),
}
# What conf/trainer may hand to Lightning's Trainer, none of which changes what is computed.
TRAINER_KEYS = ("accelerator", "devices", "num_nodes", "strategy", "detect_anomaly", "profiler")


def check_config(cfg: DictConfig) -> None:
    """Raise ValueError for the first value that no run could be trained with."""
    check_values(cfg, TRAINING)
    unknown = [str(key) for key in cfg.execution.trainer if key not in TRAINER_KEYS]
    if unknown:
        raise ValueError(
            f"execution.trainer.{unknown[0]} is no key: choose {', '.join(TRAINER_KEYS)}"
        )
    if cfg.truncate is not None and cfg.execution.chunk_len not in (None, cfg.truncate):
        raise ValueError(
            f"truncate={cfg.truncate} runs chunks of so many tokens: leave out "
            f"execution.chunk_len={cfg.execution.chunk_len}"
        )
    if step_count(cfg) == cfg.budget_tokens // (cfg.batch_size * cfg.ctx_len) and cfg.continue_to:
        raise ValueError(
            f"continue_to={cfg.continue_to} is no step more than budget_tokens={cfg.budget_tokens}"
        )


def check_launch(config: DictConfig) -> None:
    """Raise ValueError for settings that no launch could go by."""
    if config.jobs != "auto" and (fault := Number(1, whole=True).fault(config.jobs)):
        raise ValueError(f"jobs is {config.jobs!r}: it must be {fault}, or auto")
    check_values(config, {"fail_fast": Flag(), "dry_run": Flag()})


def total_budget(cfg: DictConfig) -> float:
    """The tokens a run has been trained on at its end, those of a run it continues included."""
    return max(cfg.budget_tokens, cfg.continue_to or 0)


def step_count(cfg: DictConfig) -> int:
    """Optimizer steps within the budget.

    Raises:
        ValueError: if the budget does not pay for one.
    """
    tokens_per_step = cfg.batch_size * cfg.ctx_len
    if cfg.budget_tokens < tokens_per_step:
        raise ValueError(
            f"budget_tokens {cfg.budget_tokens} is less than one step "
            f"(batch_size {cfg.batch_size} x ctx_len {cfg.ctx_len} = {tokens_per_step} tokens)"
        )
    return int(total_budget(cfg)) // tokens_per_step
