"""Who starts the processes of a run, gradients split over devices, checkpoints in parts."""

import pickle
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from omegaconf import DictConfig
from torch import nn

from experiments.config.entry import CONF_DIR
from experiments.runs.checkpoints.reading import read_checkpoint
from experiments.runs.checkpoints.sharded import rows_of
from experiments.system import ranks
from experiments.training.devices import Sharded, trainer_options
from experiments.training.loss import clip_gradients

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SRUN = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[017-018]",
}  # fmt: skip


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("train", overrides=["execution.trainer.accelerator=cpu", *overrides])


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", *TORCHRUN, *SRUN):
        monkeypatch.setenv(name, "")  # what is set on the way is taken back
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize("variables", [TORCHRUN, SRUN])
def test_processes_that_torchrun_or_srun_started_say_how_many(
    environment: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    assert ranks.started() == (4, 8)
    assert ranks.started_as() == 5
    numbers = ["execution.trainer.devices=4", "execution.trainer.num_nodes=2"]
    for given in (["trainer=ddp"], ["trainer=fsdp", *numbers]):
        options = trainer_options(config(*given))
        assert (options["devices"], options["num_nodes"]) == (4, 2)
        (plugin,) = options["plugins"]
        assert isinstance(plugin, TorchElasticEnvironment)
        assert (plugin.world_size(), plugin.global_rank(), plugin.local_rank()) == (8, 5, 1)
        if variables is SRUN:
            assert plugin.main_address == "gpu017"
            assert 15000 <= plugin.main_port < 30000
            assert plugin.node_rank() == 1
    with pytest.raises(ValueError, match=r"8 processes were started on 2 machines.*trainer=ddp"):
        trainer_options(config("trainer=cpu"))
    with pytest.raises(ValueError, match=r"trainer\.num_nodes=3"):
        trainer_options(config("trainer=ddp", "execution.trainer.num_nodes=3"))
    if variables is SRUN:
        environment.delenv("RANK")
        environment.setenv("SLURM_NTASKS", "7")
        with pytest.raises(ValueError, match="7 processes on 2 machines: give --ntasks-per-node"):
            ranks.started()


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},
        SRUN | {"SLURM_NTASKS": "1"},
    ],
)
def test_alone_also_in_a_batch_job(
    environment: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    """A batch script has the job's number of tasks, but was not started by srun."""
    for name, value in variables.items():
        environment.setenv(name, value)
    options = trainer_options(config("trainer=fsdp", "execution.trainer.devices=2"))
    assert (options["devices"], options["num_nodes"]) == (2, 1)
    assert isinstance(options["plugins"][0], LightningEnvironment)
    assert isinstance(options["strategy"], Sharded)
    with pytest.raises(ValueError, match="num_nodes=2: start a process for every device"):
        trainer_options(config("trainer=ddp", "execution.trainer.num_nodes=2"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["execution.trainer.strategy=deepspeed"], "'deepspeed': choose auto, ddp, fsdp"),
        (
            ["trainer=fsdp", "execution.trainer.accelerator=gpu", "precision=16-mixed"],
            "use bf16-mixed",
        ),
        (["precision=16-mixed"], "needs a GPU"),
    ],
)
def test_what_does_not_go_together_is_refused(given: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_options(config(*given))


def test_the_norm_of_gradients_is_exact_and_limits_them() -> None:
    model = nn.Linear(300, 1000)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = [p.grad.double().clone() for p in model.parameters()]
    expected = torch.cat([g.flatten() for g in before]).norm()
    norm = clip_gradients(model.parameters(), 2.0)
    assert norm.dtype == torch.float32
    assert norm == expected.float()
    for g, p in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, (g * (2 / expected)).float(), rtol=1e-5, atol=0)
    clip_gradients(model.parameters(), float("inf"))
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]).norm(),
                               torch.tensor(2.0))  # fmt: skip


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("n_rows", [0, 1, 5, 7, 16])
def test_rows_of_all_ranks_are_the_whole(n_ranks: int, n_rows: int) -> None:
    whole = torch.randn(n_rows, 3)
    parts = [rows_of(whole, rank, n_ranks) for rank in range(n_ranks)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A checkpoint of two processes."""
    path = tmp_path / "last.ckpt"
    path.mkdir()
    for rank in range(2):
        part = {"state_dict": {"w": torch.arange(4.0)[2 * rank : 2 * rank + 2]}}
        state = {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 0.1}]}
        content = {"global_step": 7, **part, "optimizer_states": [state]}
        torch.save(content, path / f"rank-{rank}-of-2.pt")
    return path


def test_shards_are_read_whole(shards: Path) -> None:
    checkpoint = read_checkpoint(shards)
    assert torch.equal(checkpoint["state_dict"]["w"], torch.arange(4.0))
    assert checkpoint["optimizer_states"][0]["state"][0]["step"] == 7
    assert checkpoint["optimizer_states"][0]["param_groups"] == [{"lr": 0.1}]
    assert checkpoint["global_step"] == 7
    (shards / "rank-1-of-2.pt").unlink()
    with pytest.raises(ValueError, match="lacks files: it has those of 1 ranks of 2"):
        read_checkpoint(shards)


class Attack:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return Path.touch, (self.canary,)


def test_no_code_of_an_external_shard_is_run(shards: Path) -> None:
    canary, shard = shards.parent / "canary", shards / "rank-1-of-2.pt"
    torch.save({"state_dict": Attack(canary)}, shard)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        read_checkpoint(shards)
    shard.write_bytes(pickle.dumps(Attack(canary)))
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        read_checkpoint(shards)
    assert not canary.exists()
