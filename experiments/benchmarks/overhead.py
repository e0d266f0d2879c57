"""bench=overhead: what Lightning, the data module and the run log cost over a bare loop.

Both train the same model on the same batches to the same weights; only what is around the maths
differs.
"""

import math
import tempfile
import time
from collections.abc import Callable

import lightning.pytorch as L
import torch
from hydra import compose
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import default_collate

from experiments.benchmarks.measure import Report, check_counts, interleaved
from experiments.config.identity import model_name
from experiments.config.targets import make
from experiments.data.data_module import TokenDataModule
from experiments.data.prepare import prepare
from experiments.data.token_data import TokenData
from experiments.runs.run_dir import RunDir
from experiments.system.signals import StopRequest
from experiments.training.fit import build, quiet_lightning
from experiments.training.loss import clip_gradients
from experiments.training.module import LitLM
from models.language_model import LanguageModel

UNTIMED = 2  # first steps of each loop, in which memory is allocated


def overhead(train: list[str], n_steps: int, repeats: int) -> Report:
    """Seconds a step of ``n_steps`` under Lightning and in a bare loop; ``train`` overrides
    conf/train.yaml. Validation and checkpoints are not part of it."""
    check_counts(repeats=repeats)
    if n_steps <= UNTIMED:
        raise ValueError(f"n_steps is {n_steps}: the first {UNTIMED} are not timed, give more")
    with tempfile.TemporaryDirectory() as folder:
        loops = Loops(train, n_steps, folder)
        seconds = interleaved({"bare": loops.bare, "lightning": loops.lightning}, repeats, warmup=1)
        cfg = loops.run.config
    tokens = cfg.batch_size * cfg.ctx_len
    rows = []
    for name in seconds:
        step_s = seconds.median(name) / (n_steps - UNTIMED)
        row = {"loop": name, "step_s": step_s, "tokens_per_s": tokens / step_s}
        rows.append(row | {"time over bare": seconds.ratio(name, "bare")})
    title = f"{model_name(cfg)}, batch {cfg.batch_size} x {cfg.ctx_len}, {cfg.precision}"
    notes = [
        f"{repeats} rounds of {n_steps} steps, the first {UNTIMED} untimed, the loops in turn; "
        "the ratio is the median over rounds. The bare loop finds its batches in memory.",
    ]
    return Report({title: rows}, notes)


class Loops:
    """One training run, executed by Lightning or bare; each call starts from the same weights.

    Hydra must stand on conf/, as it does in an entry point.
    """

    def __init__(self, train: list[str], n_steps: int, folder: str) -> None:
        quiet_lightning()
        fixed = ["suite=bench", f"paths.runs='{folder}'", "n_validations=1", "trainer=cpu"]
        fixed += ["execution.micro_batch_size=${batch_size}"]  # no accumulation
        self.run = RunDir.freeze(compose("train", overrides=[*train, *fixed]), [])
        self.data = TokenData.open(prepare(self.run.config.data))
        self.n_steps = n_steps
        self.stop = StopRequest()
        self.model: LanguageModel  # of the last call, trained
        self.batches = self.load_batches()

    def parts(self) -> tuple[L.Trainer, LitLM, TokenDataModule]:
        """What `fit` would train with, the model freshly initialised."""
        torch.manual_seed(self.run.config.seed)
        self.model = make(self.run.config.model.net, LanguageModel)
        trainer, module, datamodule = build(
            self.run, self.model, self.data, self.n_steps, self.stop
        )
        module.peak_flops = math.inf  # utilisation is logged, and of no interest
        trainer.limit_val_batches = 1  # so is validation
        return trainer, module, datamodule

    def load_batches(self) -> list[list[Tensor]]:
        """The run's batches of ids and targets, (B, T) each."""
        size = self.run.config.batch_size
        windows = self.parts()[2].train_windows
        return [
            default_collate([windows[n] for n in range(step * size, (step + 1) * size)])
            for step in range(self.n_steps)
        ]

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
        step = self.bare_step(module, optimizer)
        self.model.train()
        start = 0.0
        for number, (ids, targets) in enumerate(self.batches):
            if number == UNTIMED:
                start = time.perf_counter()
            fraction = module.schedule(number, self.n_steps)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * fraction
            step(ids, targets)
        return time.perf_counter() - start

    def bare_step(
        self, module: LitLM, optimizer: torch.optim.Optimizer
    ) -> Callable[[Tensor, Tensor], None]:
        """The maths of one step, as the module does it."""
        mixed = self.run.config.precision != "32-true"
        limit = module.grad_clip or math.inf

        def step(ids: Tensor, targets: Tensor) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                nats = module.training_step((ids, targets), 0)  # Lightning has no part in it
            optimizer.zero_grad()
            nats.backward()
            clip_gradients(module.model.parameters(), limit)
            optimizer.step()
            module.micro_losses.clear()

        return step


class Stopwatch(Callback):
    """Seconds from the start of the first timed step to the end of the last, all callbacks in."""

    def __init__(self, n_steps: int) -> None:
        self.n_steps = n_steps
        self.start = 0.0
        self.seconds = math.nan

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        if trainer.global_step == UNTIMED:
            self.start = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        if trainer.global_step == self.n_steps:
            self.seconds = time.perf_counter() - self.start
