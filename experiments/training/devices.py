"""Where a run trains: what conf/trainer means, and who starts the processes.

Three ways lead to several processes: Lightning starts this machine's by itself; torchrun or srun
start them all, on one machine or many.
"""

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from omegaconf import DictConfig
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from experiments.config.identity import plain
from experiments.runs.checkpoints.checksums import folder_digest
from experiments.runs.checkpoints.files import put, saving
from experiments.runs.checkpoints.reading import SHARDED, map_tensors, read_shards
from experiments.runs.checkpoints.sharded import rows_of, write_shard
from experiments.system import ranks
from experiments.system.files import remove

STRATEGIES = ("auto", "ddp", "fsdp")
TIMEOUT = timedelta(minutes=30)  # of waiting for each other: data may be prepared meanwhile


def trainer_options(cfg: DictConfig) -> dict[str, Any]:
    """Arguments of Lightning's Trainer: where, on how many devices, and who starts the processes.

    Raises:
        ValueError: for a precision that the device cannot train in, an unknown strategy, or other
            numbers of devices and machines than torchrun or srun started processes.
    """
    options = plain(cfg.execution.trainer)
    if options["accelerator"] == "auto":  # Lightning's own would take Apple's GPUs, untested here
        options["accelerator"] = "gpu" if torch.cuda.is_available() else "cpu"
    if options["strategy"] not in STRATEGIES:
        raise ValueError(
            f"trainer.strategy is {options['strategy']!r}: choose {', '.join(STRATEGIES)}"
        )
    if cfg.precision == "16-mixed" and options["accelerator"] == "cpu":
        raise ValueError("precision=16-mixed needs a GPU: on a CPU use bf16-mixed or 32-true")
    if cfg.precision == "16-mixed" and options["strategy"] == "fsdp":
        raise ValueError("precision=16-mixed does not go with trainer=fsdp: use bf16-mixed")
    return options | devices_and_nodes(options) | {"strategy": make_strategy(options["strategy"])}


def devices_and_nodes(options: dict[str, Any]) -> dict[str, Any]:
    """Devices of each machine, machines, and the plugin that knows who starts their processes."""
    devices, n_nodes = options["devices"], options["num_nodes"]
    started = ranks.started()
    if started is None:
        if n_nodes not in ("auto", 1):
            raise ValueError(
                f"trainer.num_nodes={n_nodes}: start a process for every device with torchrun or "
                "srun, and leave num_nodes out"
            )
        return {"devices": devices, "num_nodes": 1, "plugins": [LightningEnvironment()]}
    n_local, n_all = started
    given = {"devices": n_local, "num_nodes": n_all // n_local}
    if any(options[key] not in ("auto", given[key]) for key in given):
        raise ValueError(
            f"{n_all} processes were started on {given['num_nodes']} machines, but the config has "
            f"trainer.devices={devices} trainer.num_nodes={n_nodes}: add trainer=ddp or "
            "trainer=fsdp, and leave both out"
        )
    return given | {"plugins": [TorchElasticEnvironment()]}


def make_strategy(name: str) -> str | Strategy:
    """The strategy object of a name in STRATEGIES."""
    if name == "ddp":
        return DDPStrategy(
            gradient_as_bucket_view=True, forward_sync_buffers=False, timeout=TIMEOUT
        )
    return Sharded() if name == "fsdp" else name


def is_lost_peer(error: BaseException) -> bool:
    """True if a process failed because another one did."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    gloo = isinstance(error, RuntimeError) and re.search("[Pp]eer|remote worker", str(error))
    return isinstance(error, distributed.DistError) or bool(gloo)


class Sharded(ModelParallelStrategy):
    """FSDP2 over all processes; checkpoints are folders with a file of each process.

    Weights, gradients and optimizer states have the same names and numbers as on one device, so a
    run resumes from any other strategy's checkpoint.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, timeout=TIMEOUT)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        super(ModelParallelStrategy, self).load_model_state_dict(checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        super(ModelParallelStrategy, self).load_optimizer_state_dict(checkpoint)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        target = Path(filepath)
        new = target.with_name(f".{target.name}.shards")
        if self.is_global_zero:
            remove(new)  # of a process killed while it saved
            new.mkdir(parents=True)
        self.barrier()
        with saving(target):
            written = write_shard(checkpoint, new, self.global_rank, self.world_size)
        digests = ranks.gather(written)
        if self.is_global_zero:
            put(new, target, folder_digest(dict(digests)))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Any checkpoint, with this process's rows of each tensor of weights and optimizer."""
        path = Path(checkpoint_path)
        if path.is_dir():
            return read_shards(path, self.local_rows)
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return checkpoint | {
            key: map_tensors(self.local_rows, [checkpoint[key]]) for key in SHARDED
        }

    def local_rows(self, whole: Tensor) -> Tensor:
        """This process's part of a tensor, as fully_shard has it; numbers stay as they are."""
        if not whole.dim():
            return whole
        rows = rows_of(whole, self.global_rank, self.world_size).clone().to(self.root_device)
        return DTensor.from_local(
            rows,
            self.device_mesh["data_parallel"],
            [Shard(0)],
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )


def shard(module: nn.Module, blocks: nn.ModuleList, mesh: DeviceMesh, *methods: str) -> None:
    """Split the parameters of a module's blocks, one by one, and the rest of it, over a mesh.

    Args:
        methods: the module's methods that run it; no others may.
    """
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for method in methods:
        register_fsdp_forward_method(module, method)
