"""RWKV-4's own: initialisation by the official code's formulas, checkpoint names, its operators."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from models.ops.shift import GatedLinear, ShiftLinear, SquaredReLU
from models.rwkv4.model import RWKV4

V, L, C = 300, 3, 48


@pytest.fixture(scope="module")
def model() -> RWKV4:
    torch.manual_seed(0)
    return RWKV4(vocab_size=V, n_layer=L, n_embd=C, ctx_len=8)


def test_state_dict_has_the_names_and_shapes_of_official_checkpoints(model: RWKV4) -> None:
    vector, mix, square = (C,), (1, 1, C), (C, C)
    block = {
        **{f"{norm}.{part}": vector for norm in ("ln1", "ln2") for part in ("weight", "bias")},
        **{f"att.{name}": vector for name in ("time_decay", "time_first")},
        **{f"att.time_mix_{name}": mix for name in "kvr"},
        **{f"att.{name}.weight": square for name in ("key", "value", "receptance", "output")},
        **{f"ffn.time_mix_{name}": mix for name in "kr"},
        "ffn.key.weight": (4 * C, C),
        "ffn.receptance.weight": square,
        "ffn.value.weight": (C, 4 * C),
    }
    expected = {f"blocks.{l}.{name}": shape for l in range(L) for name, shape in block.items()}
    expected |= {"blocks.0.ln0.weight": vector, "blocks.0.ln0.bias": vector}
    expected |= {"emb.weight": (V, C), "head.weight": (V, C)}
    expected |= {"ln_out.weight": vector, "ln_out.bias": vector}
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == expected
    assert len(expected) == 18 * L + 6


@pytest.mark.parametrize("layer", range(L))
def test_vectors_start_as_in_the_official_code(model: RWKV4, layer: int) -> None:
    att, ffn = model.blocks[layer].att, model.blocks[layer].ffn
    rho0, rho1 = layer / (L - 1), 1 - layer / L
    for i in range(C):
        mix = (i / C) ** rho1
        expected = {
            "time_decay": -5 + 8 * (i / (C - 1)) ** (0.7 + 1.3 * rho0),
            "time_first": math.log(0.3) + 0.5 * ((i + 1) % 3 - 1),
            "time_mix_k": mix,
            "time_mix_v": mix + 0.3 * rho0,
            "time_mix_r": (i / C) ** (0.5 * rho1),
        }
        for name, value in expected.items():
            assert getattr(att, name).flatten()[i].item() == pytest.approx(value, abs=1e-6), name
        assert ffn.time_mix_k.flatten()[i].item() == pytest.approx(mix, abs=1e-6)
        assert ffn.time_mix_r.flatten()[i].item() == pytest.approx(mix, abs=1e-6)


def test_matrices_start_as_in_the_official_code(model: RWKV4) -> None:
    eye = torch.eye(C)
    for block in model.blocks:
        for zero in (block.att.key, block.att.receptance, block.att.output):
            assert not zero.weight.any()
        assert not block.ffn.receptance.weight.any()
        assert not block.ffn.value.weight.any()
        value, key = block.att.value.weight, block.ffn.key.weight
        torch.testing.assert_close(value @ value.T, eye, atol=1e-5, rtol=0)
        torch.testing.assert_close(key.T @ key, 4 * eye, atol=1e-5, rtol=0)  # gain 2
        for norm in (block.ln1, block.ln2):
            assert (norm.weight == 1).all()
            assert (norm.bias == 0).all()
    head, emb = model.head.weight, model.emb.weight
    torch.testing.assert_close(head.T @ head, 0.25 * V / C * eye, atol=1e-4, rtol=0)
    assert emb.abs().max() <= 1e-4
    assert emb.std().item() == pytest.approx(1e-4 / math.sqrt(3), rel=0.02)
    assert emb.abs().max() > 0.99e-4


def test_runs_past_its_trained_context(model: RWKV4) -> None:
    assert model.max_ctx is None
    with torch.no_grad():
        logits, _ = model(torch.randint(V, (1, 50)))
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("T", [1, 2, 5])
def test_shift_linear(T: int) -> None:
    x = torch.randn(2, T, 3, dtype=torch.float64, requires_grad=True)
    previous = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    mixes = [torch.randn(1, 1, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    weights = [torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (3, 5)]
    outs = ShiftLinear.apply(x, previous, 2, *mixes, *weights)
    for mix, weight, out in zip(mixes, weights, outs, strict=True):
        for t in range(T):
            before = x[:, t - 1] if t else previous
            mixed = mix[0] * x[:, t] + (1 - mix[0]) * before
            torch.testing.assert_close(out[:, t], mixed @ weight.T)
    assert torch.autograd.gradcheck(ShiftLinear.apply, (x, previous, 2, *mixes, *weights))


def test_gated_linear() -> None:
    gate, y = (torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    out = GatedLinear.apply(gate, y, weight)
    torch.testing.assert_close(out, F.linear(gate.sigmoid() * y, weight))
    assert torch.autograd.gradcheck(GatedLinear.apply, (gate, y, weight))
    leaves = [t.detach().float().requires_grad_() for t in (gate, y, weight)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = GatedLinear.apply(*leaves)
    assert low.dtype == torch.bfloat16
    exact = torch.autograd.grad(out.square().sum(), (gate, y, weight))
    for ours, true in zip(
        torch.autograd.grad(low.float().square().sum(), leaves), exact, strict=True
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), true, rtol=5e-2, atol=2e-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_squared_relu_is_right_to_a_rounding(dtype: torch.dtype) -> None:
    """It comes from the root of the result, which gives the positive part back."""
    x = torch.randn(10_000).to(dtype).requires_grad_()
    SquaredReLU.apply(x).sum().backward()
    exact = 2 * torch.relu(x.detach())
    torch.testing.assert_close(x.grad, exact, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("name", ["vocab_size", "n_layer", "n_embd", "ctx_len", "n_ffn"])
def test_impossible_sizes_are_refused(name: str) -> None:
    sizes = {"vocab_size": 9, "n_layer": 1, "n_embd": 8, "ctx_len": 8, "n_ffn": 16}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        RWKV4(**sizes | {name: 0})


@pytest.mark.parametrize("n_pad", [torch.zeros(3, dtype=torch.int64), torch.zeros(2)])
def test_n_pad_must_fit_the_batch(model: RWKV4, n_pad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=re.escape("n_pad must be int64 of shape (2,)")):
        model.init_state(2, n_pad)
