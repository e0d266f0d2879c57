"""The data module that serves a run its batches, step by step, to each of its processes."""

import signal
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader, Dataset

from experiments.data.order import MicroBatches, TrainWindows, ValWindows
from experiments.data.token_data import TokenData
from experiments.system.signals import CODES


class TokenDataModule(lightning.pytorch.LightningDataModule):
    """Serves batches of batch_size sequences, micro-batch by micro-batch, from the global step on.

    Needs `Trainer(use_distributed_sampler=False)`. Without a trainer: one device, step 0.

    Raises:
        ValueError: if ctx_len does not fit the data, or the batch not the micro-batches.
    """

    def __init__(
        self,
        data: TokenData,
        ctx_len: int,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.data, self.ctx_len, self.num_workers = data, ctx_len, num_workers
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.train_windows = TrainWindows(data, ctx_len, seed)
        self.val_windows = ValWindows(data, ctx_len)
        self.accumulate(1)

    def accumulate(self, world_size: int) -> int:
        """Micro-batches per device and optimizer step; ValueError if they do not fit the batch."""
        per_pass = self.micro_batch_size * world_size
        if self.batch_size % per_pass:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of"
                f" micro_batch_size={self.micro_batch_size} x {world_size} devices: change either"
            )
        return self.batch_size // per_pass

    def _position(self) -> tuple[int, int, int]:
        """Rank, number of ranks, and step."""
        if self.trainer is None:
            return 0, 1, 0
        return self.trainer.global_rank, self.trainer.world_size, self.trainer.global_step

    def train_dataloader(self) -> DataLoader:
        rank, world_size, step = self._position()
        self.accumulate(world_size)
        order = MicroBatches(self.batch_size, self.micro_batch_size, rank, world_size, step)
        return self._loader(self.train_windows, order)

    def val_dataloader(self) -> DataLoader:
        rank, world_size, _ = self._position()
        n, size = len(self.val_windows), self.micro_batch_size
        # whole batches are shared, so that sums are the same on any number of devices
        batches = [list(range(i, min(i + size, n))) for i in range(0, n, size)]
        batches += [[n]] * (-len(batches) % world_size)  # all ranks work as often
        return self._loader(self.val_windows, batches[rank::world_size])

    def _loader(self, windows: Dataset, batches: Any) -> DataLoader:
        return DataLoader(
            windows,
            batch_sampler=batches,
            num_workers=self.num_workers,
            generator=torch.Generator(),  # it would take its workers' seed from the run's own
            worker_init_fn=leave_signals_to_the_run,
            pin_memory=torch.cuda.is_available(),
        )


def leave_signals_to_the_run(worker: int) -> None:
    """In a worker: ignore what asks the run to stop, which tells all of its processes."""
    for number in CODES:
        signal.signal(number, signal.SIG_IGN)
