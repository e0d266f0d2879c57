"""The loss, its penalty and bits per byte, against values worked out another way."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.lit_lm import bits_per_byte, cross_entropy, max_logit_penalty


def problem(B: int = 3, T: int = 5, C: int = 8, V: int = 11) -> tuple:
    x = torch.randn(B, T, C, requires_grad=True)
    head = nn.Linear(C, V, bias=False)
    targets = torch.randint(V, (B, T))
    targets[0, :2] = -100
    return x, head, targets


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["full", "chunked"])
def test_cross_entropy_is_the_plain_one(loss: str, reduction: str) -> None:
    x, head, targets = problem(B=4, T=64, C=16, V=300)
    ours = cross_entropy(x, head, targets, loss, reduction)
    kept = targets != -100
    plain = F.cross_entropy(head(x)[kept], targets[kept], reduction=reduction)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(
        torch.autograd.grad(ours, [x, head.weight]),
        torch.autograd.grad(plain, [x, head.weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("loss", ["full", "chunked"])
def test_cross_entropy_under_bf16_autocast(loss: str) -> None:
    x, head, targets = problem(B=4, T=64, C=16, V=300)
    exact = cross_entropy(x, head, targets, "full")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = cross_entropy(x, head, targets, loss)
    assert low.dtype == torch.float32
    assert abs(low - exact) < 1e-2 * exact


def test_penalty_has_the_gradient_of_the_official_trainer() -> None:
    """Its backward adds z_max * 1e-4 / (B*T) to the gradient of each largest logit."""
    x, head, _ = problem()
    B, T, _ = x.shape
    (5e-5 * max_logit_penalty(x, head, chunk=4)).backward()
    logits = head(x).detach()
    z_max, largest = logits.max(-1, keepdim=True)
    d_logits = torch.zeros_like(logits).scatter_(-1, largest, z_max * 1e-4 / (B * T))
    torch.testing.assert_close(x.grad, d_logits @ head.weight.detach())
    torch.testing.assert_close(
        head.weight.grad, d_logits.flatten(0, 1).T @ x.detach().flatten(0, 1)
    )


def test_penalty_accumulates_like_a_loss() -> None:
    """Two halves, each weighted by a half, are the whole: the official one would count twice."""
    x, head, _ = problem(B=4)
    whole = torch.autograd.grad(max_logit_penalty(x, head), head.weight)[0]
    halves = [
        torch.autograd.grad(max_logit_penalty(h, head) / 2, head.weight)[0] for h in x.split(2)
    ]
    torch.testing.assert_close(whole, halves[0] + halves[1])


def test_bits_per_byte() -> None:
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2.0)
    assert bits_per_byte(1.0, 0) is None
