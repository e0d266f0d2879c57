"""A token through all layers by one call gives the layers' results, or is left to the layers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from models.gpt import model as gpt
from models.gpt.model import GPT
from models.language_model import LanguageModel, State, select_rows
from models.ops import cpu
from models.ops.linear import round_matrices
from models.rwkv4.model import RWKV4
from models.rwkv4.step import STEP

V, CTX = 61, 40

BUILDS: dict[str, Callable[[], LanguageModel]] = {
    "rwkv4": lambda: RWKV4(V, 3, 40, CTX),
    "rwkv4 odd": lambda: RWKV4(V, 2, 77, CTX, n_ffn=131),
    "gpt": lambda: GPT(V, 3, 40, 4, CTX, rotary_pct=0.4),
    "gpt large heads": lambda: GPT(V, 2, 160, 2, CTX, n_ffn=99),
    "gpt without positions": lambda: GPT(V, 1, 21, 3, CTX, rotary_pct=0.0),
}


@pytest.fixture(params=BUILDS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return build_random(request.param)


def build_random(name: str) -> LanguageModel:
    model = BUILDS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.5
            parameter.copy_(scale * torch.randn(parameter.shape))
    return model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by a name with each call of a step's kernel."""
    if STEP.missing() is not None:
        pytest.skip("no compiler")
    made: list[str] = []
    over_layers = cpu.Kernel.over_layers

    def counted(kernel: cpu.Kernel, *rest: Any) -> None:
        made.append(kernel.name)
        over_layers(kernel, *rest)

    monkeypatch.setattr(cpu.Kernel, "over_layers", counted)
    return made


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """No step can be had in one call."""
    real = cpu.missing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cpu,
            "missing",
            lambda source="wkv_cpu.cpp": real(source) if source == "wkv_cpu.cpp" else "none",
        )
        yield


def by_steps(model: LanguageModel, ids: Tensor, state: State) -> tuple[Tensor, State]:
    """Logits of single tokens, and the last state, which like `Generation` drops spent padding."""
    pieces = []
    for t in range(ids.shape[1]):
        logits, after = model(ids[:, t : t + 1], state)
        assert after is not None
        if model.family == "rwkv4" and "n_pad" in after and not after["n_pad"].any():
            after = {name: value for name, value in after.items() if name != "n_pad"}
        pieces, state = [*pieces, logits], after
    return torch.cat(pieces, 1), state


def assert_close(actual: Tensor, expected: Tensor, within: float = 1e-5) -> None:
    assert torch.isfinite(actual).all()
    assert (actual - expected).norm() <= within * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize(("tail", "n_threads"), [(128, 1), (3, 2)])
def test_equals_the_layers(
    model: LanguageModel, tail: int, n_threads: int, calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(gpt, "TAIL", tail)
    for B in (1, 3, 8):
        ids = torch.randint(V, (B, 17))
        _, state = model(ids[:, :4], model.init_state(B))
        torch.set_num_threads(n_threads)
        logits, last = by_steps(model, ids[:, 4:], state)
        torch.set_num_threads(1)
        n_calls = len(calls)
        with layer_by_layer():
            expected, expected_state = by_steps(model, ids[:, 4:], state)
        assert n_calls == len(calls) > 0
        whole, _ = model(ids)
        assert_close(logits, expected)
        assert_close(logits, whole[:, 4:])
        assert last.keys() == expected_state.keys() or tail == 3  # joined a token sooner or later
        if model.family == "rwkv4" or tail == 128:
            for name, value in expected_state.items():
                assert last[name].shape == value.shape
                assert last[name].dtype == value.dtype
                assert_close(last[name], value)
        more, _ = model(ids[:, :5], last)  # several tokens after the single ones
        assert_close(more, model(torch.cat([ids, ids[:, :5]], 1))[0][:, -5:])
        calls.clear()


@torch.no_grad()
@pytest.mark.parametrize("tail", [3, 128])
@pytest.mark.parametrize("read", [0, 6])
def test_padding_leaves_no_trace(
    model: LanguageModel, tail: int, read: int, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where steps begin within the padding."""
    monkeypatch.setattr(gpt, "TAIL", tail)
    n_pad = torch.tensor([0, 3, 9, 5])
    ids = torch.randint(V, (4, 16))
    state = model.init_state(4, n_pad)
    if read:
        _, state = model(ids[:, :read], state)
    logits, _ = by_steps(model, ids[:, read:], state)
    for row, pad in enumerate(n_pad.tolist()):
        alone, _ = model(ids[row : row + 1, pad:])
        n = 16 - max(pad, read)
        assert_close(logits[row, -n:], alone[0, -n:])
    assert calls


@torch.no_grad()
@pytest.mark.parametrize("tail", [3, 128])
def test_a_state_is_a_value(
    model: LanguageModel, tail: int, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpt, "TAIL", tail)
    ids = torch.randint(V, (2, 12))
    for read in (1, 4, 8):
        _, state = model(ids[:, :1], model.init_state(2))
        _, state = by_steps(model, ids[:, 1:read], state) if read > 1 else (None, state)
        copy = {name: value.clone() for name, value in state.items()}
        first, after = by_steps(model, ids[:, read:], state)
        kept = {name: value.clone() for name, value in after.items()}
        other, _ = by_steps(model, (ids[:, read:] + 1) % V, state)
        again, _ = by_steps(model, ids[:, read:], state)
        torch.testing.assert_close(state, copy, rtol=0, atol=0)
        torch.testing.assert_close(after, kept, rtol=0, atol=0)
        torch.testing.assert_close(again, first, rtol=0, atol=0)
        assert (other != first).any()
        rows = torch.tensor([1, 0, 1])
        forked, _ = by_steps(model, ids[rows, read:], select_rows(state, rows))
        assert_close(forked, first[rows])
    assert calls


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_matrices(model: LanguageModel, dtype: torch.dtype, calls: list[str]) -> None:
    """A step's sums are float32: those of the float32 model that has the same, rounded matrices."""
    round_matrices(model, dtype)
    ids = torch.randint(V, (2, 9))
    rounded, _ = by_steps(model, ids, model.init_state(2))
    assert calls
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    exact, _ = model(ids)
    assert_close(rounded, exact)


@torch.no_grad()
def test_what_is_not_finite_is_not_hidden(calls: list[str]) -> None:
    for name in BUILDS:
        model = build_random(name)
        block = model.blocks[0]
        matrix = block.ffn.key if model.family == "rwkv4" else block.ffn.up
        matrix.weight[3, 5] = torch.nan
        logits, _ = by_steps(model, torch.randint(V, (1, 2)), model.init_state(1))
        assert not logits.isfinite().any()
    assert calls


@pytest.mark.parametrize("name", ["rwkv4", "gpt"])
def test_left_to_the_layers(name: str, calls: list[str]) -> None:
    model, ids = build_random(name), torch.randint(V, (2, 6))
    with torch.no_grad():
        _, state = model(ids[:, :5], model.init_state(2))
        assert state is not None
        with layer_by_layer():
            expected, _ = model(ids[:, 5:], state)
    logits, _ = model(ids[:, 5:], state)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.blocks.parameters())
    assert_close(logits, expected)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low, _ = model(ids[:, 5:], state)
        assert (low - expected).norm() < 5e-2 * expected.norm()
        nine = torch.arange(9) % 2
        many, _ = model(ids[nine, 5:], select_rows(state, nine))
        assert_close(many, expected[nine])
        seen: list[object] = []
        with model.blocks[1].register_forward_hook(lambda *inputs: seen.append(inputs)):
            assert_close(model(ids[:, 5:], state)[0], expected)
        assert len(seen) == 1
        compiled, _ = torch.compile(model, backend="eager")(ids[:, 5:], state)
        assert_close(compiled, expected)
        assert model.to("meta")(ids[:, 5:].to("meta"), model.init_state(2))[0].is_meta
    assert not calls


@torch.no_grad()
def test_a_state_that_does_not_fit_is_refused(calls: list[str]) -> None:
    """The kernel reads by addresses: PyTorch must be the one to complain."""
    for name in ("rwkv4", "gpt"):
        model, ids = build_random(name), torch.zeros(2, 1, dtype=torch.int64)
        _, state = model(ids, model.init_state(2))
        assert state is not None
        assert len(calls) == 1
        for key in state:
            cut = state | {key: state[key][..., 1:]}
            with pytest.raises((RuntimeError, ValueError)):
                model(ids, cut)
        with pytest.raises((RuntimeError, ValueError)):
            model(ids, select_rows(state, torch.tensor([0, 1, 1])))
        assert len(calls) == 1
        calls.clear()


@torch.no_grad()
def test_the_backend_asked_for_is_the_one_that_runs(calls: list[str]) -> None:
    model = RWKV4(V, 2, 16, CTX)
    model.backend = "torch"
    model(torch.zeros(1, 1, dtype=torch.int64), model.init_state(1))
    assert not calls
