"""bench=overhead: what Lightning, the data module and the run log cost over a bare loop.

Both train the same model on the same batches to the same weights; only what is around the maths
differs.
"""

import math
import tempfile
import time
from typing import Any

import lightning.pytorch as L
import torch
from hydra import compose
from lightning.pytorch.callbacks import Callback
from torch.utils.data import default_collate

from experiments.benchmarks.measure import Report, check_counts, interleaved
from experiments.config.identity import model_name
from experiments.config.targets import make
from experiments.data.data_module import TokenDataModule
from experiments.data.prepare import prepare
from experiments.runs.run_dir import RunDir
from experiments.system.signals import StopRequest
from experiments.training.fit import build, quiet_lightning
from experiments.training.loss import clip_gradients
from experiments.training.module import LitLM
from models.language_model import LanguageModel

UNTIMED = 2  # first steps of each loop, in which memory is allocated


def overhead(train: list[str], n_steps: int, repeats: int) -> Report:
    """Seconds a step under Lightning and in a bare loop, without validation and checkpoints.

    Args:
        train: overrides of conf/train.yaml.
    """
    check_counts(repeats=repeats)
    if n_steps <= UNTIMED:
        raise ValueError(f"n_steps is {n_steps}: the first {UNTIMED} are not timed, give more")
    with tempfile.TemporaryDirectory() as folder:
        loops = Loops(train, n_steps, folder)
        seconds = interleaved({"bare": loops.bare, "lightning": loops.lightning}, repeats)
        cfg = loops.run.config
    rows = []
    for name in seconds:
        step_s = seconds.median(name) / (n_steps - UNTIMED)
        row = {"loop": name, "step_s": step_s}
        row |= {"tokens_per_s": cfg.batch_size * cfg.ctx_len / step_s}
        rows.append(row | {"time over bare": seconds.ratio(name, "bare")})
    title = f"{model_name(cfg)}, batch {cfg.batch_size} x {cfg.ctx_len}, {cfg.precision}"
    note = (
        f"{repeats} rounds of {n_steps} steps, the first {UNTIMED} untimed, the loops in turn; the "
        "ratio is the median over rounds. The bare loop finds its batches in memory."
    )
    return Report({title: rows}, [note])


class Loops:
    """One training run, executed by Lightning or bare; each call starts from the same weights.

    Hydra must stand on conf/, as it does in a command.
    """

    def __init__(self, train: list[str], n_steps: int, folder: str) -> None:
        quiet_lightning()
        fixed = ["suite=bench", f"paths.runs='{folder}'", "n_validations=1", "trainer=cpu"]
        fixed += ["execution.micro_batch_size=${batch_size}"]  # no accumulation
        self.run = RunDir.freeze(compose("train", overrides=[*train, *fixed]), [])
        self.data = prepare(self.run.config.data, self.run.config.paths.data)
        self.n_steps = n_steps
        self.stop = StopRequest()
        self.model: LanguageModel  # of the last call, trained
        size, windows = self.run.config.batch_size, self.parts()[2].train_windows
        samples = [[windows[i * size + j] for j in range(size)] for i in range(n_steps)]
        self.batches = [default_collate(one) for one in samples]  # ids and targets, (B, T) each

    def parts(self) -> tuple[L.Trainer, LitLM, TokenDataModule]:
        """What `fit` would train with, the model newly initialised."""
        torch.manual_seed(self.run.config.seed)
        self.model = make(self.run.config.model.net, LanguageModel)
        parts = build(self.run, self.model, self.data, self.n_steps, self.stop)
        parts[1].peak_flops = math.inf  # utilisation is logged, and of no interest
        parts[0].limit_val_batches = 1  # so is validation
        return parts

    def lightning(self) -> float:
        """Seconds of the timed steps under the trainer."""
        trainer, module, datamodule = self.parts()
        watch = Stopwatch(self.n_steps)
        trainer.callbacks.append(watch)  # type: ignore[attr-defined]  # Lightning's mixin sets it
        with self.stop:  # the run takes the signals over
            trainer.fit(module, datamodule=datamodule)
        return watch.seconds

    def bare(self) -> float:
        """Seconds of the timed steps in a plain loop."""
        module = self.parts()[1]
        optimizer = module.make_optimizer(self.model)
        peaks = [group["lr"] for group in optimizer.param_groups]
        mixed = self.run.config.precision != "32-true"
        self.model.train()
        start = 0.0
        for number, (ids, targets) in enumerate(self.batches):
            if number == UNTIMED:
                start = time.perf_counter()
            fraction = module.schedule(number, self.n_steps)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * fraction
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                nats = module.training_step((ids, targets), 0)  # Lightning has no part in it
            optimizer.zero_grad()
            nats.backward()
            clip_gradients(self.model.parameters(), module.grad_clip or math.inf)
            optimizer.step()
            module.micro_losses.clear()
        return time.perf_counter() - start


class Stopwatch(Callback):
    """Seconds from the start of the first timed step to the end of the last, all callbacks in."""

    def __init__(self, n_steps: int) -> None:
        self.n_steps = n_steps
        self.start = self.seconds = math.nan

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == UNTIMED:
            self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self.n_steps:
            self.seconds = time.perf_counter() - self.start
