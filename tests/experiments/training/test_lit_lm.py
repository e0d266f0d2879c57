"""The loss and its penalty, against values worked out another way."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.training.loss import cross_entropy, max_logit_penalty


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
    ours, _ = cross_entropy(x, head, targets, loss, reduction)
    kept = targets != -100
    plain = F.cross_entropy(head(x)[kept], targets[kept], reduction=reduction)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(
        torch.autograd.grad(ours, [x, head.weight]),
        torch.autograd.grad(plain, [x, head.weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["full", "chunked"])
def test_cross_entropy_adds_up_in_float32_under_autocast(loss: str, reduction: str) -> None:
    """A sum of thousands of losses in bfloat16 would be off by up to 1 %."""
    x, head, targets = problem(B=8, T=512, C=16, V=300)
    exact, _ = cross_entropy(x, head, targets, "full", reduction)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, _ = cross_entropy(x, head, targets, loss, reduction)
    assert low.dtype == torch.float32
    assert float(low.detach()) == pytest.approx(float(exact.detach()), rel=2e-4)


@pytest.mark.slow
def test_chunked_never_holds_the_logits() -> None:
    """Peak memory of a 50k vocabulary in fresh processes: full holds (N, V) float32 thrice over."""
    code = (
        "import sys, torch\n"
        "from experiments.training.loss import cross_entropy\n"
        "from experiments.system.machine import peak_resident_bytes\n"
        "torch.set_num_threads(1)\n"
        "x = torch.randn(1, 2048, 64, requires_grad=True)\n"
        "head = torch.nn.Linear(64, 50277, bias=False)\n"
        "small = torch.nn.Linear(64, 8, bias=False)\n"  # what PyTorch loads at first use
        "cross_entropy(x[:, :300], small, torch.zeros(1, 300).long(), sys.argv[1])[0].backward()\n"
        "before = peak_resident_bytes()\n"
        "cross_entropy(x, head, torch.zeros(1, 2048).long(), sys.argv[1])[0].backward()\n"
        "print(peak_resident_bytes() - before)"
    )
    peak = {}
    for loss in ("full", "chunked"):
        args = [sys.executable, "-c", code, loss]
        peak[loss] = int(subprocess.run(args, capture_output=True, text=True, check=True).stdout)
    logits = 2048 * 50277 * 4
    assert peak["full"] > 1.5 * logits
    assert peak["chunked"] < 0.6 * logits


@pytest.mark.parametrize("held", [True, False])
def test_penalty_has_the_gradient_of_the_official_trainer(held: bool) -> None:
    """Its backward adds z_max * 1e-4 / (B*T) to the gradient of each largest logit."""
    x, head, _ = problem()
    B, T, _ = x.shape
    held_logits = head(x.flatten(0, 1)) if held else None
    (5e-5 * max_logit_penalty(x, head, held_logits)).backward()
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
    whole = torch.autograd.grad(max_logit_penalty(x, head, None), head.weight)[0]
    halves = [
        torch.autograd.grad(max_logit_penalty(half, head, None) / 2, head.weight)[0]
        for half in x.split(2)
    ]
    torch.testing.assert_close(whole, halves[0] + halves[1])
