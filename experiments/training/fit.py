"""Train the run that a directory's frozen config describes; nothing else decides what happens."""

import logging
import sys
import traceback
import warnings
from contextlib import nullcontext, suppress

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from experiments.config.checks import check_config, step_count
from experiments.config.entry import REPORTED, RunFailed, one_line
from experiments.config.targets import make
from experiments.data.data_module import TokenDataModule
from experiments.data.prepare import prepare
from experiments.data.token_data import TokenData
from experiments.runs.checkpoints.files import BEST, LAST, BackgroundCheckpointIO
from experiments.runs.checkpoints.reading import read_checkpoint
from experiments.runs.checkpoints.sharded import make_whole
from experiments.runs.continuation import continued_run, starting_point
from experiments.runs.metrics import MetricsFile, summarise
from experiments.runs.run_dir import RunDir
from experiments.system.files import remove, write_json, write_text
from experiments.system.locks import RunLocked
from experiments.system.signals import BUSY, StopRequest
from experiments.training.checkpointing import Checkpoints
from experiments.training.devices import is_lost_peer, trainer_options
from experiments.training.loggers import make_loggers
from experiments.training.manifest import manifest
from experiments.training.module import LitLM
from experiments.training.optimizer import Schedule, make_optimizer
from experiments.training.progress import TokenBar
from experiments.training.run_log import LossNotFinite, RunLog
from models.language_model import LanguageModel


def attempt(run: RunDir) -> None:
    """``fit`` with the run locked; a failure leaves its reason in ``error.txt``.

    Raises:
        RunFailed: if training failed.
        SystemExit: `BUSY`, if another process holds the run.
        ValueError, OSError: for bad input, found before training began.
    """
    try:
        with run.lock(wait=True) if is_first() else nullcontext():
            if run.finished:  # by another process, after who started this one looked
                print(f"{run.name}: finished already", flush=True)
            else:
                attempt_locked(run)
    except RunLocked as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(BUSY) from None


def is_first() -> bool:
    """Whether this process is the first of a run's, before Lightning knows them."""
    return getattr(rank_zero_only, "rank", 0) == 0


def attempt_locked(run: RunDir) -> None:
    if is_first():
        run.error_file.unlink(missing_ok=True)
    try:
        fit(run)
    except Exception as error:
        reason = explain(error, run)
        lost = is_lost_peer(error)
        with suppress(OSError):  # a full disk: the reason is printed
            if not (lost and run.error_file.is_file()):  # the one that was lost says why
                write_text(run.error_file, f"{reason}\n\n{traceback.format_exc()}")
        if isinstance(error, ValueError | OSError | ImportError) and not run.manifest:
            raise  # bad input: nothing was trained
        if lost or isinstance(error, (*REPORTED, LossNotFinite, torch.OutOfMemoryError)):
            raise RunFailed(reason) from error
        raise


def explain(error: Exception, run: RunDir) -> str:
    """One line: what went wrong, and what to do about it."""
    cfg = run.config
    if isinstance(error, LossNotFinite):
        last = run.checkpoints / LAST
        kept = ""
        if last.exists():
            kept = f"checkpoint of step {read_checkpoint(last)['global_step']} kept; "
        return f"{error}; {kept}lower optim.peak_lr={cfg.optim.peak_lr} or use precision=32-true"
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "out of memory: halve execution.micro_batch_size="
            f"{cfg.execution.micro_batch_size}, set execution.loss=chunked, execution.chunk_len="
            f"{max(1, cfg.ctx_len // 4)} or execution.grad_checkpoint=true"
        )
    if is_lost_peer(error):
        return (
            "another process of this run ended or cannot be reached: see what it printed; the same "
            "command resumes from the last checkpoint"
        )
    return one_line(error)


def fit(run: RunDir) -> None:
    """Train a run to its budget, from its last checkpoint if there is one, and write its result.

    SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 make it save and raise SystemExit.
    """
    with StopRequest() as stop:
        train(run, stop)


def train(run: RunDir, stop: StopRequest) -> None:
    """As `fit`, within which a signal is noted in ``stop``."""
    cfg = run.config
    quiet_lightning()
    check_config(cfg)
    if cfg.execution.n_threads:
        torch.set_num_threads(cfg.execution.n_threads)
    data = prepare(cfg.data, cfg.paths.data)
    L.seed_everything(cfg.seed, verbose=False)
    model = make_model(cfg, data)
    trainer, module, batches = build(run, model, data, step_count(cfg), stop)

    checkpoint = starting_point(run, trainer.is_global_zero)
    if checkpoint is not None:
        check_data(run, data)
    described = manifest(run, model, data, trainer)
    module.peak_flops = described["device"]["peak_flops"]
    if trainer.is_global_zero:
        remove_leftovers(run)
        write_json(run.manifest_file, described)
        write_text(run.tokenizer_file, data.tokenizer.to_json())
    # again: what was drawn since depends on what an earlier start left; a checkpoint has its own
    L.seed_everything(cfg.seed + trainer.global_rank, verbose=False)
    trainer.fit(module, datamodule=batches, ckpt_path=checkpoint, weights_only=True)
    finish(run, trainer, model)


def make_model(cfg: DictConfig, data: TokenData) -> LanguageModel:
    """A model with new weights.

    Raises:
        ValueError: if it cannot read the data it is given.
    """
    model = make(cfg.model.net, LanguageModel)
    model.backend = cfg.execution.backend
    model.grad_checkpoint = cfg.execution.grad_checkpoint
    padded = -(-data.vocab_size // 512) * 512  # as Pythia's, for the sake of fast matmuls
    if not data.vocab_size <= model.vocab_size <= padded:
        raise ValueError(
            f"the model's vocabulary of {model.vocab_size} is not that of the data, "
            f"{data.vocab_size} (or padded, up to {padded}): "
            "leave model.net.vocab_size out"
        )
    if model.max_ctx is not None and model.max_ctx < cfg.ctx_len:
        raise ValueError(f"ctx_len {cfg.ctx_len} is longer than the model's {model.max_ctx}")
    return model


def build(
    run: RunDir, model: LanguageModel, data: TokenData, n_steps: int, stop: StopRequest
) -> tuple[L.Trainer, LitLM, TokenDataModule]:
    """The three Lightning parts of a run: trainer, module, data."""
    cfg = run.config
    batches = TokenDataModule(
        data,
        ctx_len=cfg.ctx_len,
        batch_size=cfg.batch_size,
        micro_batch_size=cfg.execution.micro_batch_size,
        seed=cfg.data.seed,
        num_workers=cfg.execution.num_workers,
    )
    return make_trainer(run, model, n_steps, stop), make_module(cfg, model, data, n_steps), batches


def make_trainer(run: RunDir, model: LanguageModel, n_steps: int, stop: StopRequest) -> L.Trainer:
    """Lightning's trainer with our callbacks.

    Raises:
        ValueError: if its devices are not there, or cannot share a batch evenly.
    """
    cfg, execution = run.config, run.config.execution
    tokens_per_step = cfg.batch_size * cfg.ctx_len
    val_every = max(1, round(n_steps / cfg.n_validations))
    flops = model.flops_per_token(cfg.ctx_len)
    run_log = RunLog(MetricsFile(run.metrics_file), tokens_per_step, flops, execution.log_every)
    every_min = execution.checkpoint_every_min
    options = trainer_options(cfg)
    options["plugins"] = [*options["plugins"], BackgroundCheckpointIO()]
    try:
        trainer = L.Trainer(
            **options,
            precision=cfg.precision,
            max_steps=n_steps,
            max_epochs=-1,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=None,
            logger=make_loggers(cfg, run) or False,
            callbacks=[
                run_log,
                TokenBar(run.name, tokens_per_step),
                Checkpoints(run.checkpoints, run_log, val_every, every_min, stop),
            ],
            use_distributed_sampler=False,  # our batches already know their rank
            enable_checkpointing=False,  # by Lightning itself, beside ours
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=run.path,
        )
    except MisconfigurationException as error:  # devices that are not there
        raise ValueError(one_line(error)) from None
    n_accumulated, rest = divmod(cfg.batch_size, execution.micro_batch_size * trainer.world_size)
    if rest or n_accumulated < 1:
        raise ValueError(
            f"batch_size {cfg.batch_size} is not a multiple of micro_batch_size "
            f"{execution.micro_batch_size} x {trainer.world_size} devices"
        )
    trainer.accumulate_grad_batches = n_accumulated
    trainer.val_check_interval = val_every * n_accumulated
    return trainer


def make_module(cfg: DictConfig, model: LanguageModel, data: TokenData, n_steps: int) -> LitLM:
    """How the model is trained: loss, optimizer and schedule."""
    optim = {k: cfg.optim[k] for k in ("peak_lr", "betas", "eps", "weight_decay", "lr_scale")}
    # under float16 the scaler must see the gradients before the step, which a fused one hides
    optim["fused"] = cfg.precision != "16-mixed"
    token_bytes = data.tokenizer.token_bytes()
    if cfg.execution.compile:
        for block in model.blocks:
            block.compile()  # in place: checkpoint keys stay; by block: one layer's compile time
    return LitLM(
        model,
        make_optimizer=lambda m: make_optimizer(m, **optim),
        schedule=make(cfg.schedule.function, Schedule),
        total_steps=n_steps,
        loss=cfg.execution.loss,
        penalty=cfg.optim.max_logit_penalty,
        grad_clip=cfg.optim.grad_clip,
        token_bytes=None if token_bytes is None else torch.as_tensor(token_bytes.astype("int64")),
        chunk_len=cfg.truncate or cfg.execution.chunk_len,
        truncated=cfg.truncate is not None,
    )


def check_data(run: RunDir, data: TokenData) -> None:
    """Raise ValueError if the run, or the one that it continues, was trained on other data."""
    before = run.manifest or getattr(continued_run(run), "manifest", {})
    if before.get("data", {}).get("fingerprint", data.fingerprint) != data.fingerprint:
        raise ValueError(
            f"{run.path} was trained on other data than {data.path} now holds: "
            "choose another suite=NAME, or remove that folder to train again"
        )


def remove_leftovers(run: RunDir) -> None:
    """Remove what a process that was killed while it wrote left under temporary names."""
    written = (run.manifest_file, run.tokenizer_file, run.metrics_file, run.result_file)
    for file in (*written, run.error_file):
        for leftover in run.path.glob(f".{file.name}.*"):
            remove(leftover)
    for leftover in run.checkpoints.glob(".*"):
        remove(leftover)


def finish(run: RunDir, trainer: L.Trainer, model: LanguageModel) -> None:
    """Save a last time and write the result."""
    trainer.save_checkpoint(run.checkpoints / LAST)
    trainer.strategy.checkpoint_io.teardown()  # waits until it is written
    if trainer.is_global_zero:
        for name in (BEST, LAST):
            make_whole(run.checkpoints / name)
        flops = model.flops_per_token(run.config.ctx_len)
        write_json(run.result_file, summarise(MetricsFile(run.metrics_file), flops))
        print(f"{run.name}: {run.summary()}", flush=True)


def quiet_lightning() -> None:
    """Silence Lightning's chatter about things this suite decides by itself."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*your dataloader is not resumable.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*treespec.*",
        ".*`srun` command is available.*",  # processes of one machine start each other
        ".*FSDP2-wrapped module .* returned a view.*",  # which nothing changes in place
    ):
        warnings.filterwarnings("ignore", message)
