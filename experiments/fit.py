"""Train the run that a directory's frozen config describes: ``python -m experiments.fit RUN_DIR``.

``experiments.train`` starts this in a fresh process for every run; so do DDP's ranks and SLURM.
Nothing but the frozen config decides what happens here.
"""

import hashlib
import logging
import sys
import traceback
import warnings
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from experiments.callbacks import (
    AtomicCheckpointIO,
    LossNotFinite,
    RunLog,
    StopSignal,
    TokenBar,
    checkpoint_callbacks,
)
from experiments.data.prepare import prepare
from experiments.data.token_data import TokenData, TokenDataModule
from experiments.entry import RunFailed, one_line, one_line_errors
from experiments.lit_lm import LitLM
from experiments.manifest import PRECISIONS, manifest
from experiments.metrics import MetricsFile, summarise
from experiments.optim import make_optimizer
from experiments.run_dir import RunDir, make, plain, read_checkpoint, write_json, write_text
from models.language_model import LanguageModel


def fit(run: RunDir) -> None:
    """Train a run to its budget, from its last checkpoint if there is one, and write its result."""
    cfg = run.config
    quiet_lightning()
    if cfg.n_threads:
        torch.set_num_threads(cfg.n_threads)
    data = TokenData.open(prepare(cfg.data))
    n_steps = step_count(cfg)
    L.seed_everything(cfg.seed, verbose=False)
    model = make(cfg.model.net)
    check_model(model, cfg, data)
    trainer, module, datamodule = build(run, model, data, n_steps)

    last = run.path / "checkpoints" / "last.ckpt"
    if last.is_file():
        read_checkpoint(last)  # one clear line for a damaged one
    described = manifest(run, model, data, trainer)
    module.peak_flops = described["device"]["peak_flops"]
    if trainer.is_global_zero:
        write_json(run.path / "manifest.json", described)
        write_text(run.path / "tokenizer.json", data.tokenizer.to_json())
    trainer.fit(
        module, datamodule=datamodule, ckpt_path=last if last.is_file() else None, weights_only=True
    )
    trainer.save_checkpoint(last)
    if trainer.is_global_zero:
        result = summarise(
            MetricsFile(run.path / "metrics.csv"), model.flops_per_token(cfg.ctx_len)
        )
        write_json(run.path / "result.json", result)
        bits = "" if result["val/bpb"] is None else f" ({result['val/bpb']:.4f} bits/byte)"
        print(
            f"{run.name}: {result['step']} steps, {result['tokens']:,} tokens, "
            f"val/loss {result['val/loss']:.4f} nats/token{bits}, {result['time_s']:.0f} s, "
            f"{result['perf/tokens_per_s']:,.0f} tokens/s",
            flush=True,
        )


def build(
    run: RunDir, model: LanguageModel, data: TokenData, n_steps: int
) -> tuple[L.Trainer, LitLM, TokenDataModule]:
    """The three Lightning parts of a run: trainer, module, data."""
    cfg = run.config
    check_precision(cfg)
    tokens_per_step = cfg.batch_size * cfg.ctx_len
    flops = model.flops_per_token(cfg.ctx_len)
    checkpoints = run.path / "checkpoints"
    trainer = L.Trainer(
        **plain(cfg.trainer),
        precision=cfg.precision,
        max_steps=n_steps,
        max_epochs=-1,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        logger=make_loggers(cfg, run) or False,
        callbacks=[
            RunLog(MetricsFile(run.path / "metrics.csv"), tokens_per_step, flops, cfg.log_every),
            StopSignal(checkpoints / "last.ckpt"),
            TokenBar(run.name, tokens_per_step),
            *checkpoint_callbacks(checkpoints, cfg.checkpoint_every_min),
        ],
        plugins=[AtomicCheckpointIO()],
        use_distributed_sampler=False,  # our batches already know their rank
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run.path,
    )
    n_accumulated, rest = divmod(cfg.batch_size, cfg.micro_batch_size * trainer.world_size)
    if rest or n_accumulated < 1:
        raise ValueError(
            f"batch_size {cfg.batch_size} is not a multiple of micro_batch_size "
            f"{cfg.micro_batch_size} x {trainer.world_size} devices"
        )
    trainer.accumulate_grad_batches = n_accumulated
    trainer.val_check_interval = max(1, round(n_steps / cfg.n_validations)) * n_accumulated
    optim = {k: cfg.optim[k] for k in ("peak_lr", "betas", "eps", "weight_decay", "lr_scale")}
    # under float16 the scaler must see the gradients before the step, which a fused one hides
    optim["fused"] = cfg.precision != "16-mixed"
    token_bytes = data.tokenizer.token_bytes()
    module = LitLM(
        model,
        make_optimizer=lambda m: make_optimizer(m, **optim),
        schedule=make(cfg.schedule.function),
        total_steps=n_steps,
        loss=cfg.loss,
        penalty=cfg.optim.max_logit_penalty,
        grad_clip=cfg.optim.grad_clip,
        token_bytes=None if token_bytes is None else torch.as_tensor(token_bytes.astype("int64")),
    )
    if cfg.compile:
        for block in module.model.blocks:
            block.compile()  # in place: checkpoint keys stay; by block: one layer's compile time
    datamodule = TokenDataModule(
        data,
        ctx_len=cfg.ctx_len,
        batch_size=cfg.batch_size,
        micro_batch_size=cfg.micro_batch_size,
        seed=cfg.data.seed,
        num_workers=cfg.num_workers,
    )
    return trainer, module, datamodule


def step_count(cfg: DictConfig) -> int:
    """Optimizer steps within the budget.

    Raises:
        ValueError: if the budget does not pay for one, or a size is impossible.
    """
    for key in ("ctx_len", "batch_size", "micro_batch_size", "n_validations", "log_every"):
        if not isinstance(cfg[key], int) or cfg[key] < 1:
            raise ValueError(f"{key} is {cfg[key]!r}: it must be a whole number of at least 1")
    tokens_per_step = cfg.batch_size * cfg.ctx_len
    if cfg.budget_tokens < tokens_per_step:
        raise ValueError(
            f"budget_tokens {cfg.budget_tokens} is less than one step "
            f"(batch_size {cfg.batch_size} x ctx_len {cfg.ctx_len} = {tokens_per_step} tokens)"
        )
    return int(cfg.budget_tokens) // tokens_per_step


def check_precision(cfg: DictConfig) -> None:
    """Raise ValueError for a precision that is unknown, or that the device cannot train in."""
    if cfg.precision not in PRECISIONS:
        raise ValueError(f"precision is {cfg.precision!r}: choose {', '.join(PRECISIONS)}")
    on_cpu = cfg.trainer.accelerator == "cpu" or not torch.cuda.is_available()
    if cfg.precision == "16-mixed" and on_cpu:
        raise ValueError("precision=16-mixed needs a GPU: on a CPU use bf16-mixed or 32-true")


def check_model(model: LanguageModel, cfg: DictConfig, data: TokenData) -> None:
    """Raise ValueError if the model cannot read the data it is given."""
    if model.vocab_size < data.meta["vocab_size"]:
        raise ValueError(
            f"the model's vocabulary of {model.vocab_size} is smaller than the data's "
            f"{data.meta['vocab_size']}: set model.net.vocab_size=${{data.vocab_size}}"
        )
    if model.max_ctx is not None and model.max_ctx < cfg.ctx_len:
        raise ValueError(f"ctx_len {cfg.ctx_len} is longer than the model's {model.max_ctx}")


def make_loggers(cfg: DictConfig, run: RunDir) -> list[Any]:
    """The loggers of the config beside metrics.csv; each keeps one identity over resumes."""
    identity = hashlib.sha256(str(run.path.resolve()).encode()).hexdigest()[:12]
    extra: dict[str, dict[str, Any]] = {
        "tensorboard": {},
        "wandb": {"id": identity, "name": run.name},
        "mlflow": {"run_name": run.name},
    }
    loggers = []
    for key, node in cfg.logger.items():
        logger = make(node, save_dir=str(run.path), **extra.get(key, {}))
        logger.log_hyperparams(plain(cfg))
        loggers.append(logger)
    return loggers


def quiet_lightning() -> None:
    """Silence Lightning's chatter about things this suite decides by itself."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*your dataloader is not resumable.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*treespec.*",
    ):
        warnings.filterwarnings("ignore", message)


def attempt(run: RunDir) -> None:
    """``fit`` under the run's lock; a failure leaves its reason in ``error.txt``."""
    error_file = run.path / "error.txt"
    try:
        with run.lock() if getattr(rank_zero_only, "rank", 0) == 0 else nullcontext():
            fit(run)
        error_file.unlink(missing_ok=True)
    except LossNotFinite as error:
        last = run.path / "checkpoints" / "last.ckpt"
        kept = (
            f"checkpoint of step {read_checkpoint(last)['global_step']} kept; "
            if last.is_file()
            else ""
        )
        reason = f"{error}; {kept}lower optim.peak_lr={run.config.optim.peak_lr} or use 32-true"
        write_text(error_file, f"{reason}\n\n{traceback.format_exc()}")
        raise RunFailed(reason) from error
    except torch.OutOfMemoryError as error:
        reason = (
            f"out of memory: halve micro_batch_size={run.config.micro_batch_size}, "
            "or set loss=chunked"
        )
        write_text(error_file, f"{reason}\n\n{traceback.format_exc()}")
        raise RunFailed(reason) from error
    except Exception as error:
        write_text(error_file, f"{one_line(error)}\n\n{traceback.format_exc()}")
        raise


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m experiments.fit RUN_DIR")
    with one_line_errors():
        attempt(RunDir(sys.argv[1]))


if __name__ == "__main__":
    main()
