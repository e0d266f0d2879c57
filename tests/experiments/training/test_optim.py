"""Schedules and parameter groups against values worked out by hand."""

import math

import pytest
import torch

from experiments.training.optimizer import ConstantThenExponential, WarmupCosine, make_optimizer
from models.rwkv4.model import RWKV4

RECIPE = {"betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1, "lr_scale": False}


def test_warmup_cosine() -> None:
    factor = WarmupCosine(warmup_fraction=0.1, final_ratio=0.1)
    assert [factor(step, 100) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert factor(10, 100) == 1.0
    assert factor(55, 100) == pytest.approx(0.55)  # half way down: mean of 1 and 0.1
    assert factor(100, 100) == factor(1000, 100) == pytest.approx(0.1)
    assert factor(0, 1) == 1.0


def test_constant_then_exponential() -> None:
    """RWKV-4's trainer: lr = init * (final / init) ** progress after the constant phase."""
    factor = ConstantThenExponential(constant_fraction=0.2, peak_lr=6e-4, final_lr=1e-5)
    assert factor(0, 100) == factor(20, 100) == 1.0
    assert 6e-4 * factor(60, 100) == pytest.approx(math.sqrt(6e-4 * 1e-5))
    assert 6e-4 * factor(100, 100) == pytest.approx(1e-5)


def model() -> RWKV4:
    return RWKV4(vocab_size=16, n_layer=2, n_embd=8, ctx_len=8)


def test_groups_cover_every_parameter_once_and_only_matrices_decay() -> None:
    net = model()
    optimizer = make_optimizer(net, peak_lr=1e-3, **RECIPE)
    seen = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, seen)) == sorted(map(id, net.parameters()))
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(p) for p in net.parameters() if p.dim() == 2}


def test_multipliers_of_the_rwkv_trainer() -> None:
    net = model()
    optimizer = make_optimizer(net, peak_lr=1e-3, **(RECIPE | {"lr_scale": True}))
    lr = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    att = net.blocks[1].att
    assert lr[id(att.time_decay)] == pytest.approx(2e-3)
    assert lr[id(att.time_first)] == pytest.approx(3e-3)
    assert lr[id(att.time_mix_k)] == lr[id(att.key.weight)] == pytest.approx(1e-3)
    assert lr[id(net.emb.weight)] == optimizer.param_groups[0]["lr"]  # the rate that is logged


def test_adam_with_no_decay_is_adam() -> None:
    nets = []
    for make in (
        lambda m: make_optimizer(m, peak_lr=1e-2, **(RECIPE | {"weight_decay": 0.0})),
        lambda m: torch.optim.Adam(m.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-8),
    ):
        torch.manual_seed(0)
        net = model()
        optimizer = make(net)
        for _ in range(3):
            net(torch.arange(8).view(1, 8))[0].square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        nets.append(net)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # updates are about 1e-2
