"""chunk_len: a sequence read in chunks gives the loss and the gradients of the whole sequence."""

import ctypes
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import Tensor

from experiments.config.entry import CONF_DIR
from experiments.config.identity import (
    config_difference,
    config_hash,
    plain,
    run_tag,
)
from experiments.training.loss import IGNORE
from experiments.training.module import LitLM
from models.gpt.model import GPT
from models.language_model import LanguageModel
from models.rwkv4.model import RWKV4

V, B, T = 17, 3, 23  # 23 tokens in chunks of 8: the last one is shorter

BUILD: dict[str, Callable[..., LanguageModel]] = {
    "rwkv4": lambda **more: RWKV4(V, n_layer=2, n_embd=12, ctx_len=64, **more),
    "gpt": lambda **more: GPT(V, n_layer=2, n_embd=16, n_head=2, ctx_len=64, **more),
}


def lit(model: LanguageModel, **options: Any) -> LitLM:
    return LitLM(model, make_optimizer=None, schedule=None, total_steps=1, **options)  # type: ignore[arg-type]


def build(family: str, dtype: torch.dtype = torch.float64, **more: Any) -> LanguageModel:
    """A model whose every weight is random, none of them zero."""
    model = BUILD[family](**more)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.5
            parameter.copy_(scale * torch.randn(parameter.shape))
    return model.to(dtype).train()


def batch(length: int = T) -> tuple[Tensor, Tensor]:
    ids, targets = torch.randint(V, (2, B, length))
    targets[0, :9] = targets[2, -3:] = IGNORE  # a chunk of row 0 has no target at all
    return ids, targets


def gradients(module: LitLM, ids_and_targets: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The loss, what is logged as such, and the gradient of every parameter."""
    module.micro_losses.clear()
    module.zero_grad()
    loss = module.training_step(ids_and_targets, 0)
    loss.backward()
    found = [p.grad for p in module.model.parameters()]
    assert all(g is not None for g in found)
    return [loss.detach(), *module.micro_losses, *(g.clone() for g in found if g is not None)]


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("options", [{}, {"loss": "chunked"}, {"penalty": 0.1}], ids=str)
@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("family", BUILD)
def test_gradients_are_those_of_the_whole_sequence(
    family: str, grad_checkpoint: bool, options: dict[str, Any]
) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model, given = build(family, dtype), batch()
        model.grad_checkpoint = grad_checkpoint
        whole = gradients(lit(model, **options), given)
        for chunk_len in (8, 1, T):
            parts = gradients(lit(model, chunk_len=chunk_len, **options), given)
            worst = max(relative(a, b) for a, b in zip(parts, whole, strict=True))
            assert worst < tolerance, (dtype, chunk_len)


@pytest.mark.parametrize("family", BUILD)
def test_gradients_under_autocast(family: str) -> None:
    """bfloat16 rounds the same values in both; what differs is the order of a few sums."""
    model, given = build(family, torch.float32), batch()
    exact = gradients(lit(model), given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = gradients(lit(model), given)
        parts = gradients(lit(model, chunk_len=8), given)
    assert parts[0].dtype == torch.float32
    for part, one, true in zip(parts, whole, exact, strict=True):
        assert relative(part, true) < 0.01 + 2 * relative(one, true)


@pytest.mark.parametrize("family", BUILD)
def test_truncated_is_the_gradient_with_the_state_detached(family: str) -> None:
    model, (ids, targets) = build(family), batch()
    cut = gradients(lit(model, chunk_len=8, truncated=True), (ids, targets))
    model.zero_grad()
    state, nats = model.init_state(B), torch.zeros((), dtype=torch.float64)
    for part, wanted in zip(ids.split(8, 1), targets.split(8, 1), strict=True):
        x, after = model.features(part, {k: v.detach() for k, v in state.items()})
        assert after is not None
        state = after
        logits = model.head(x).flatten(0, 1)
        nats = nats + F.cross_entropy(
            logits, wanted.flatten(), reduction="sum", ignore_index=IGNORE
        )
    (nats / (targets != IGNORE).sum()).backward()
    for a, p in zip(cut[2:], model.parameters(), strict=True):
        assert p.grad is not None
        assert relative(a, p.grad) < 1e-10
    whole = gradients(lit(model, chunk_len=8), (ids, targets))
    assert relative(cut[0], whole[0]) < 1e-12  # the same loss
    assert max(relative(a, b) for a, b in zip(cut[2:], whole[2:], strict=True)) > 1e-3


@pytest.mark.parametrize("loss", ["full", "chunked"])
@pytest.mark.parametrize("family", BUILD)
def test_validation_is_that_of_the_whole_sequence(family: str, loss: str) -> None:
    model, given = build(family), batch()
    lengths, sums = [], []
    original = model.features

    def spy(ids: Tensor, state: Any = None) -> Any:
        lengths.append(ids.shape[1])
        return original(ids, state)

    model.features = spy  # type: ignore[method-assign]
    for chunk_len in (None, 8):
        module = lit(model, loss=loss, chunk_len=chunk_len, token_bytes=torch.arange(V))
        module.on_validation_epoch_start()
        with torch.no_grad():
            module.validation_step(given, 0)
        sums.append(module.val_sums)
    assert lengths == [T, 8, 8, 7]
    assert sums[1] == pytest.approx(sums[0], rel=1e-12)
    assert sums[0][1] == (given[1] != IGNORE).sum()


PEAK = """
import ctypes, sys, torch
from experiments.benchmarks.measure import M_MMAP_THRESHOLD
from experiments.training.module import LitLM
from experiments.system.machine import peak_resident_bytes
from models.rwkv4.model import RWKV4
ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
torch.set_num_threads(1)
T, chunk_len = int(sys.argv[1]), int(sys.argv[2]) or None
model = RWKV4(32, n_layer=2, n_embd=64, ctx_len=T, n_ffn=256)
module = LitLM(model, None, None, 1, chunk_len=chunk_len)
def step(T):
    ids, targets = torch.randint(32, (2, 1, T))
    module.training_step((ids, targets), 0).backward()
    module.on_validation_epoch_start()
    with torch.no_grad():
        module.validation_step((ids, targets), 0)
step(256)
before = peak_resident_bytes()
step(T)
print(peak_resident_bytes() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="tells glibc what to do")
def test_peak_memory_does_not_grow_with_the_sequence() -> None:
    """Above a short step, in fresh processes: activations are about 14 kB a token here.

    Freed blocks return to the system at once, or holes in the heap would count as well.
    """

    def peak(length: int, chunk_len: int) -> int:
        args = [sys.executable, "-c", PEAK, str(length), str(chunk_len)]
        return int(subprocess.run(args, capture_output=True, text=True, check=True).stdout)

    short, long, whole = peak(1024, 512), peak(8192, 512), peak(8192, 0)
    assert whole > 75e6  # else this test measures nothing
    assert long < short + 0.05 * whole


def composed(*overrides: str) -> Any:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def test_chunks_count_as_another_config_only_where_they_change_the_gradients() -> None:
    whole, parts, cut, finer = (
        plain(composed(*overrides))
        for overrides in ([], ["execution.chunk_len=64"], ["truncate=64"], ["truncate=32"])
    )
    assert config_hash(whole) == config_hash(parts)
    assert len({config_hash(config) for config in (whole, cut, finer)}) == 3
    assert config_difference(parts, cut) == ["truncate: None -> 64"]
    assert run_tag(["execution.chunk_len=64", "truncate=64"], 0) == "seed=0,truncate=64"


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONF_DIR / "data").glob("*.yaml")))
def test_every_data_config_holds_out_enough_for_a_long_context(name: str) -> None:
    assert composed(f"data={name}").data.val_tokens > 65536
