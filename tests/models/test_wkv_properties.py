"""WKV on inputs that hypothesis chooses: shapes, dtypes, strides, splits; and long sequences."""

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.ops import cpu
from models.ops.wkv import wkv

# relative RMS error to the exact result of the same inputs, outputs rounded to the dtype
BOUNDS = {
    torch.float64: 1e-10,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 4e-3,
}
WIDE = {torch.float64: torch.float64}  # of w, u and state; float32 for all others
many = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(params=["torch", "cpu", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param != "torch" and cpu.missing():
        pytest.skip(f"no C++ compiler: {cpu.missing()}")
    if request.param == "cuda":
        request.getfixturevalue("emulated_gpu")
    return "torch" if request.param == "torch" else "cpu"


def laid_out(x: Tensor, order: tuple[int, ...], gap: int) -> Tensor:
    """The same values with dimensions stored in another order, `gap` elements apart."""
    stored = x.permute(order).repeat_interleave(gap, dim=-1)[..., ::gap]
    return stored.permute([order.index(i) for i in range(x.dim())])


@st.composite
def problems(draw: Any, dtypes: tuple[torch.dtype, ...] = tuple(BOUNDS)) -> list[Tensor]:
    """w, u, k, v and a state or None, then gradients of y and of the last state."""
    B, T, C = draw(st.integers(1, 3)), draw(st.integers(1, 90)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from(dtypes))
    wide = WIDE.get(dtype, torch.float32)
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    w = -(10 ** (normal(C).clamp(-3, 1.2) * 2)).clamp(1e-6, 50)
    scale = draw(st.sampled_from([0.1, 1.0, 8.0]))
    order = draw(st.permutations(range(3)))
    gap = draw(st.integers(1, 2))
    k, v, gy = (laid_out((x * normal(B, T, C)).to(dtype), tuple(order), gap) for x in (scale, 1, 1))
    state = None
    if draw(st.booleans()):
        state = torch.stack((normal(B, C), normal(B, C).exp(), scale * normal(B, C)), 1).to(wide)
        state = laid_out(state, tuple(order), gap)
    return [w.to(wide), normal(C).to(wide), k, v, state, gy, normal(B, 3, C).to(wide)]


def outcome(problem: list[Tensor], backend: str, cuts: tuple[int, ...] = ()) -> list[Tensor]:
    """y, the last state and all gradients, of one call or of one for each part between cuts."""
    leaves = [x if x is None else x.detach().requires_grad_() for x in problem[:5]]
    w, u, k, v, state = leaves
    ys = []
    for k_part, v_part in zip(k.tensor_split(cuts, 1), v.tensor_split(cuts, 1), strict=True):
        y, state = wkv(w, u, k_part, v_part, state, backend=backend)
        ys.append(y)
    y = torch.cat(ys, 1)
    given_leaves = [x for x in leaves if x is not None]
    grads = torch.autograd.grad([y, state], given_leaves, problem[5:])
    return [x.detach().double() for x in (y, state, *grads)]


def errors(actual: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Relative RMS errors; of what is below 1e-3, where the others are about 1, relative to that.

    So small is a gradient of w where nothing is left of the step before.
    """
    return [
        float((a - e).square().mean().sqrt() / e.square().mean().sqrt().clamp_min(1e-3))
        for a, e in zip(actual, expected, strict=True)
    ]


def exact(problem: list[Tensor]) -> list[Tensor]:
    return outcome([x if x is None else x.double() for x in problem], "reference")


@many
@given(problem=problems())
def test_right_for_all(problem: list[Tensor], backend: str) -> None:
    # a float32 exponent of 8 x 4 standard deviations is itself only good to 2e-6
    dtype, steep = problem[2].dtype, float(problem[2].double().abs().max()) > 8
    bound = BOUNDS[dtype] * (6 if steep else 3 if dtype == torch.float32 else 1)
    found = errors(outcome(problem, backend), exact(problem))
    assert found[0] < bound
    assert max(found) < 2 * bound


@many
@given(problem=problems((torch.float64, torch.float32)), data=st.data())
def test_split_anywhere(problem: list[Tensor], data: Any, backend: str) -> None:
    T = problem[2].shape[1]
    cuts = data.draw(st.lists(st.integers(1, T - 1), max_size=4)) if T > 1 else []
    cuts = tuple(sorted(set(cuts)))
    found = errors(outcome(problem, backend, cuts), outcome(problem, backend))
    assert max(found) < (1e-10 if problem[2].dtype == torch.float64 else 1e-5)


@many
@given(problem=problems((torch.float64,)), shift=st.floats(-50, 50))
def test_only_differences_of_keys_count(problem: list[Tensor], shift: float, backend: str) -> None:
    """A constant added to all keys and the state's exponent changes no y and no gradient of v."""
    w, u, k, v, state, gy, _ = problem
    moved = None if state is None else torch.cat((state[:, :2], state[:, 2:] + shift), 1)
    ys = []
    for keys, first in ((k, state), (k + shift, moved)):
        values = v.detach().requires_grad_()
        y, _ = wkv(w, u, keys, values, first, backend=backend)
        ys.append([y.detach(), *torch.autograd.grad(y, values, gy)])
    assert max(errors(*ys)) < 1e-10


@cache
def long_problem(scale: float) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """T = 4097, decays of e^-1e-6 to e^-50, keys up to hundreds, one gradient far above others.

    Returns the problem, its results, and those of the problem rounded to float32.
    """
    g = torch.Generator().manual_seed(0)
    B, T, C = 1, 4097, 3
    w = -torch.tensor([1e-6, 0.02, 50.0], dtype=torch.float64)
    k = scale * torch.randn(B, T, C, generator=g, dtype=torch.float64)
    v, gy = (torch.randn(B, T, C, generator=g, dtype=torch.float64) for _ in range(2))
    gy[:, T // 3] *= 1e4
    state = torch.tensor([0.5, 1.5, 0.0], dtype=torch.float64).view(1, 3, 1).expand(B, 3, C)
    problem = [w, torch.randn(C, generator=g).double(), k, v, state, gy, torch.ones_like(state)]
    return problem, exact(problem), exact([x.float() for x in problem])


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_long(scale: float, backend: str) -> None:
    problem, expected, of_rounded = long_problem(scale)
    assert max(errors(outcome(problem, backend), expected)) < 1e-10
    found = errors(outcome([x.float() for x in problem], backend), of_rounded)
    # float32 holds an exponent of 400 to 3e-5, and gk and gw are what is left where terms as large
    # as the one far gradient cancel
    assert max(found) < (5e-6 if scale == 1 else 5e-3)
