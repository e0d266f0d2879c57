"""Products of few rows: right in every dtype and shape, and left to PyTorch where it must be."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from models.gpt.model import GPT
from models.language_model import LanguageModel
from models.ops import cpu
from models.ops.linear import linear, round_matrices
from models.rwkv4.model import RWKV4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 2e-6  # relative, of sums in float32


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each call of the kernel."""
    if cpu.missing("linear_cpu.cpp") is not None:
        pytest.skip("no compiler")
    made: list[int] = []
    right = cpu.linear

    def counted(x: Tensor, *rest: Tensor) -> Tensor:
        made.append(x.numel())
        return right(x, *rest)

    monkeypatch.setattr(cpu, "linear", counted)
    return made


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.detach().double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_threads", [1, 2])
def test_against_float64(dtype: torch.dtype, n_threads: int, calls: list[int]) -> None:
    torch.set_num_threads(n_threads)
    sizes = [(64, 128), (100, 331), (17, 1001), (1, 9000), (9001, 1), (768, 129)]
    cases = list(itertools.product(sizes, range(1, 9)))
    for (n_in, n_out), n_rows in cases:
        x, weight = torch.randn(n_rows, n_in), torch.randn(n_out, n_in).to(dtype)
        bias = torch.randn(n_out) if n_rows % 2 else None
        with torch.no_grad():
            y = linear(x, weight, bias)
        exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        assert y.dtype == torch.float32
        size = x.double().abs() @ weight.double().abs().T
        assert ((y - exact).abs() <= EPS * (size + 1)).all(), (n_in, n_out, n_rows)
    assert len(calls) == len(cases)


@torch.no_grad()
def test_nothing_is_read_or_written_out_of_bounds(calls: list[int]) -> None:
    around = torch.full((5, 700), torch.nan)
    x, weight = around[1, :33], torch.randn(300, 33)
    x.copy_(torch.randn(33))
    assert error(linear(x, weight), weight.double() @ x.double()) < EPS
    assert int(around.isnan().sum()) == around.numel() - 33


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_what_is_not_finite_stays_so(dtype: torch.dtype, calls: list[int]) -> None:
    weight = torch.zeros(300, 40)
    weight[0, 3], weight[1, 39], weight[2, 0] = torch.inf, -torch.inf, torch.nan
    y = linear(torch.ones(1, 40), weight.to(dtype))[0]
    assert y[:2].tolist() == [torch.inf, -torch.inf]
    assert y[2].isnan()
    assert not y[3:].any()
    assert calls


def test_left_to_pytorch(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(4, 128), torch.randn(256, 128)
    exact = x.double() @ weight.double().T

    def check(made: Callable[[], Tensor], dtype: torch.dtype, within: float) -> None:
        y = made()
        assert y.dtype == dtype
        assert error(y, exact[: len(y)]) < within

    leaf = weight.clone().requires_grad_()
    check(lambda: linear(x, leaf), torch.float32, EPS)
    linear(x, leaf).sum().backward()
    assert error(leaf.grad, x.double().sum(0).expand_as(weight)) < EPS
    with torch.no_grad():
        many = x.repeat(3, 1)
        assert error(linear(many, weight), exact.repeat(3, 1)) < EPS
        check(lambda: linear(x.double(), weight.double()), torch.float64, 1e-12)
        check(lambda: linear(x.bfloat16(), weight.bfloat16()), torch.bfloat16, 1e-2)
        check(lambda: linear(x, weight.T.contiguous().T), torch.float32, EPS)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            check(lambda: linear(x, weight), torch.bfloat16, 1e-2)
        assert linear(x.to("meta"), weight.to("meta")).shape == (4, 256)
        assert not calls
        check(lambda: linear(x, weight), torch.float32, EPS)
        assert len(calls) == 1
        monkeypatch.setattr(cpu, "missing", lambda source: "no C++ compiler")
        check(lambda: linear(x, weight), torch.float32, EPS)
        check(lambda: linear(x, weight.bfloat16(), torch.zeros(256)), torch.float32, 1e-2)
    assert len(calls) == 1


def test_round_matrices() -> None:
    model = round_matrices(GPT(vocab_size=9, n_layer=1, n_embd=16, n_head=2, ctx_len=5), DTYPES[1])
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() == 2
        assert parameter.dtype == (torch.bfloat16 if matrix else torch.float32), name
        assert isinstance(parameter, nn.Parameter)
    state = model.init_state(1)
    assert {value.dtype for value in state.values()} == {torch.float32}


def random_model(family: str) -> LanguageModel:
    if family == "rwkv4":
        model: LanguageModel = RWKV4(vocab_size=211, n_layer=3, n_embd=96, ctx_len=32)
    else:
        model = GPT(vocab_size=211, n_layer=3, n_embd=96, n_head=4, ctx_len=32, rotary_pct=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.3
            parameter.copy_(scale * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("family", ["rwkv4", "gpt"])
@pytest.mark.parametrize(("dtype", "within"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@torch.no_grad()
def test_a_model_of_16_bit_matrices(family: str, dtype: torch.dtype, within: float) -> None:
    """Near the float32 model as a whole and by steps; few rows of it at rounded weights exactly."""
    model, ids = random_model(family), torch.randint(211, (2, 12))
    full, _ = model(ids)
    rounded = random_model(family)
    rounded.load_state_dict(model.state_dict())
    round_matrices(rounded, dtype)
    whole, _ = rounded(ids)
    state = rounded.init_state(2)
    steps = []
    for t in range(12):
        logits, state = rounded(ids[:, t : t + 1], state)
        steps.append(logits)
    assert whole.dtype == torch.float32
    assert 0 < error(whole, full.double()) < within
    assert error(torch.cat(steps, 1), full.double()) < within
    assert error(torch.cat(steps, 1), whole.double()) < within
    for parameter in rounded.parameters():
        parameter.data = parameter.data.float()
    exact, _ = rounded(ids)
    if cpu.missing("linear_cpu.cpp") is None:
        assert error(torch.cat(steps, 1), exact.double()) < 1e-5
