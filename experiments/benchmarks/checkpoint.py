"""bench=checkpoint: what saves cost of training time, and how long a run takes to find its place.

A save copies weights and optimizer state while training stands; a thread then serialises, hashes
and writes the copy, waits for the disk, and renames the file.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose
from omegaconf import DictConfig

from experiments.benchmarks.measure import Report, Row, check_counts, interleaved
from experiments.config.identity import model_name
from experiments.config.targets import make
from experiments.data.order import TrainWindows
from experiments.data.prepare import prepare
from experiments.runs.checkpoints.files import (
    BEST,
    LAST,
    AtomicCheckpointIO,
    BackgroundCheckpointIO,
    check,
    duplicate,
)
from experiments.runs.freezing import complete
from experiments.training.optimizer import make_optimizer
from models.language_model import LanguageModel

FAR = 10**9  # steps


def checkpoint(models: list[str], folder: str, repeats: int) -> Report:
    """Seconds of a save's parts, of its copy as the best, of the check before a resume, of a seek.

    Args:
        models: each the overrides of conf/train.yaml that make one, with spaces between.
        folder: on the disk that is to be measured; nothing is left in it.
    """
    check_counts(repeats=repeats)
    Path(folder).mkdir(exist_ok=True)
    rows = []
    for overrides in models:
        cfg = compose("train", overrides=[*overrides.split(), "trainer=cpu"])
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            row = {"model": model_name(cfg)} | saving(cfg, Path(scratch), repeats)
        cost_s = row["stands_s"] + row["write_cpu_s"]
        rows.append(row | {"share": cost_s / (60 * cfg.execution.checkpoint_every_min)})
    seek_s = interleaved({"seek": lambda: seek(cfg)}, repeats).median("seek")
    minutes = cfg.execution.checkpoint_every_min
    title = f"A save of weights and AdamW's state, float32, every {minutes} min"
    note = (
        f"Medians of {repeats}. Training stands for stands_s; write_s pass in a thread, of which "
        "write_cpu_s on a core. share: as if training had wanted that core. A new best validation "
        "loss waits for write_s and copy_s. A resume takes check_s before it loads."
    )
    found = [{"step": FAR, "seconds": seek_s}]
    return Report({title: rows, "Finding the batch of a step": found}, [note])


def saving(cfg: DictConfig, folder: Path, repeats: int) -> Row:
    """Bytes of a model's checkpoint, and seconds of what is done with it."""
    content, target, io = trained(cfg), folder / LAST, BackgroundCheckpointIO()
    cpu_s = []

    def stand() -> float:
        start = time.perf_counter()
        io.save_checkpoint(content, target)
        seconds = time.perf_counter() - start
        io.teardown()
        return seconds

    def write() -> None:
        start = time.process_time()
        AtomicCheckpointIO().save_checkpoint(content, target)
        cpu_s.append(time.process_time() - start)

    stand()
    seconds = interleaved(
        {
            "stands_s": stand,
            "write_s": write,
            "copy_s": lambda: duplicate(target, folder / BEST),
            "check_s": lambda: check(target),
        },
        repeats,
    )
    medians = {name: seconds.median(name) for name in seconds}
    medians["write_cpu_s"] = statistics.median(cpu_s)
    return {"file_bytes": target.stat().st_size} | medians


def trained(cfg: DictConfig) -> dict[str, Any]:
    """A checkpoint's large parts, after a step with gradients of zero."""
    model = make(complete(cfg)["model"]["net"], LanguageModel)
    keys = ("peak_lr", "betas", "eps", "weight_decay", "lr_scale")
    optimizer = make_optimizer(model, **{key: cfg.optim[key] for key in keys})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}


def seek(cfg: DictConfig) -> float:
    """Seconds to the batch of a far step."""
    windows = TrainWindows(prepare(cfg.data, cfg.paths.data), cfg.ctx_len, cfg.data.seed)
    start = time.perf_counter()
    for row in range(cfg.batch_size):
        windows[FAR * cfg.batch_size + row]
    return time.perf_counter() - start
