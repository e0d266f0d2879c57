"""Checks of a config's values, and the steps that its budget pays for."""

import math

from omegaconf import DictConfig, OmegaConf

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
LOSSES = ("full", "chunked")
BACKPROPS = ("full", "truncated")
# What conf/trainer may hand to Lightning's Trainer, none of which changes what is computed.
TRAINER_KEYS = (
    "accelerator",
    "devices",
    "num_nodes",
    "strategy",
    "detect_anomaly",
    "profiler",
)
# key: (type, least value, whether the least itself is allowed)
NUMBERS: dict[str, tuple[type, float, bool]] = {
    "seed": (int, 0, True),
    "ctx_len": (int, 1, True),
    "chunk_len": (int, 1, True),
    "batch_size": (int, 1, True),
    "micro_batch_size": (int, 1, True),
    "budget_tokens": (float, 0, False),
    "continue_to": (float, 0, False),
    "n_validations": (int, 1, True),
    "log_every": (int, 1, True),
    "checkpoint_every_min": (float, 0, False),
    "num_workers": (int, 0, True),
    "n_threads": (int, 1, True),
    "optim.peak_lr": (float, 0, False),
    "optim.eps": (float, 0, False),
    "optim.weight_decay": (float, 0, True),
    "optim.grad_clip": (float, 0, True),
    "optim.max_logit_penalty": (float, 0, True),
}
NULLABLE = ("chunk_len", "continue_to", "n_threads")


def check_config(cfg: DictConfig) -> None:
    """Raise ValueError for the first value that no run could be trained with."""
    for key, (kind, least, inclusive) in NUMBERS.items():
        value = OmegaConf.select(cfg, key)
        if key in NULLABLE and value is None:
            continue
        is_number = isinstance(value, int if kind is int else (int, float))
        if isinstance(value, bool) or not is_number or not math.isfinite(value):
            wanted = "a whole number" if kind is int else "a number"
            raise ValueError(f"{key} is {value!r}: it must be {wanted}")
        if value < least or (value == least and not inclusive):
            raise ValueError(
                f"{key} is {value}: it must be {'' if inclusive else 'above '}{least}"
                f"{' or more' if inclusive else ''}"
            )
    betas = cfg.optim.betas
    if (
        not OmegaConf.is_list(betas)
        or len(betas) != 2
        or not all(isinstance(b, float | int) and 0 <= b < 1 for b in betas)
    ):
        raise ValueError(f"optim.betas is {betas}: it must be two numbers from 0 to below 1")
    for key, allowed in (("precision", PRECISIONS), ("loss", LOSSES), ("backprop", BACKPROPS)):
        value = cfg.get(key, "full")  # runs of earlier versions have no backprop
        if value not in allowed:
            raise ValueError(f"{key} is {value!r}: choose {', '.join(allowed)}")
    unknown = [str(key) for key in cfg.trainer if key not in TRAINER_KEYS]
    if unknown:
        raise ValueError(f"trainer.{unknown[0]} is no key: choose {', '.join(TRAINER_KEYS)}")
    if cfg.get("backprop") == "truncated" and cfg.get("chunk_len") is None:
        raise ValueError("backprop=truncated cuts gradients between chunks: set chunk_len")
    if step_count(cfg) == cfg.budget_tokens // (cfg.batch_size * cfg.ctx_len) and continues(cfg):
        raise ValueError(
            f"continue_to={cfg.continue_to} is no step more than budget_tokens={cfg.budget_tokens}"
        )


def check_launch(config: DictConfig) -> None:
    """Raise ValueError for settings that no launch could go by."""
    jobs = config.jobs
    if jobs != "auto" and (not isinstance(jobs, int) or isinstance(jobs, bool) or jobs < 1):
        raise ValueError(f"jobs is {jobs!r}: it must be a whole number from 1, or auto")
    for key in ("fail_fast", "dry_run"):
        if not isinstance(config[key], bool):
            raise ValueError(f"{key} is {config[key]!r}: it must be true or false")


def continues(cfg: DictConfig) -> bool:
    """Whether a run goes on where a finished one ended."""
    return cfg.get("continue_to") is not None  # runs of earlier versions have no such key


def total_budget(cfg: DictConfig) -> float:
    """The tokens a run has been trained on at its end, those of a run it continues included."""
    return max(cfg.budget_tokens, cfg.continue_to) if continues(cfg) else cfg.budget_tokens


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
