"""What CONTRIBUTING.md promises of every model, for every architecture at its smaller sizes.

That all sizes build, with their counted size, is in test_sizing.py.
"""

import pytest
import torch
from torch import Tensor

from experiments.config.targets import resolve
from models.language_model import LanguageModel, State, select_rows

from ..presets import MODELS, net

V, CTX = 61, 24
SMALL = [(model, size) for model in MODELS for size in ("pico", "nano", "micro", "tiny")]


@pytest.fixture(params=SMALL)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return build(*request.param)


def build(name: str, size: str, **changes: object) -> LanguageModel:
    """The preset with every weight random, none of them zero."""
    settings = net(name, size, V, CTX) | changes
    model = resolve(settings.pop("_target_"), LanguageModel)(**settings)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.5
            parameter.copy_(scale * torch.randn(parameter.shape))
    return model


def tokens(B: int, T: int) -> Tensor:
    return torch.randint(V, (B, T))


def feed(
    model: LanguageModel, ids: Tensor, cuts: list[int], n_pad: Tensor | None = None
) -> tuple[Tensor, State]:
    """Logits of ids given in pieces that end at `cuts` and at the end; and the last state."""
    state: State | None = model.init_state(len(ids), n_pad)
    pieces = []
    for start, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        logits, state = model(ids[:, start:end], state)
        pieces.append(logits)
    assert state is not None
    return torch.cat(pieces, dim=1), state


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert torch.isfinite(actual).all()
    error = ((actual - expected).norm() / expected.norm()).item()
    assert error < tolerance, error


@torch.no_grad()
def test_whole_equals_two_pieces_equals_single_tokens(model: LanguageModel) -> None:
    ids = tokens(3, 13)
    whole, nothing = model(ids)
    assert nothing is None
    for cuts in ([], [1], [5], [12], list(range(1, 13))):
        logits, _ = feed(model, ids, cuts)
        assert_close(logits, whole)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[], [3], [9], list(range(1, 13))])
def test_padding_leaves_no_trace(model: LanguageModel, cuts: list[int]) -> None:
    ids = tokens(4, 13)
    n_pad = torch.tensor([0, 2, 7, 12])
    logits, state = feed(model, ids, cuts, n_pad)
    for row, pad in enumerate(n_pad.tolist()):
        alone, state_alone = feed(model, ids[row : row + 1, pad:], [])
        assert_close(logits[row, pad:], alone[0])
        more = tokens(1, 2)
        next_alone, _ = model(more, state_alone)
        next_here, _ = model(more, select_rows(state, torch.tensor([row])))
        assert_close(next_here, next_alone)
    others = torch.where(torch.arange(13) < n_pad[:, None], (ids + 1) % V, ids)
    again, _ = feed(model, others, cuts, n_pad)
    for row, pad in enumerate(n_pad.tolist()):
        torch.testing.assert_close(again[row, pad:], logits[row, pad:], rtol=0, atol=0)


@torch.no_grad()
def test_causality(model: LanguageModel) -> None:
    ids = tokens(2, 13)
    before, _ = model(ids)
    ids[:, 6] = (ids[:, 6] + 1) % V
    after, _ = model(ids)
    assert_close(after[:, :6], before[:, :6])
    assert ((after - before)[:, 6:].abs().amax(dim=(0, 2)) > 1e-4).all()  # each later one sees it


@torch.no_grad()
def test_a_state_is_a_value(model: LanguageModel) -> None:
    ids = tokens(2, 9)
    _, state = feed(model, ids[:, :4], [])
    copy = {name: value.clone() for name, value in state.items()}
    first, _ = model(ids[:, 4:], state)
    second, _ = model(ids[:, 4:], state)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(state, copy, rtol=0, atol=0)
    rows = torch.tensor([1, 0, 1])  # forking and gathering
    forked, _ = model(ids[rows, 4:], select_rows(state, rows))
    assert_close(forked, first[rows])


@torch.no_grad()
def test_state_bytes_and_dtype(model: LanguageModel) -> None:
    _, state = feed(model, tokens(3, 11), [])
    assert all(value.shape[0] == 3 for value in state.values())
    assert all(value.dtype == torch.float32 for value in state.values())
    assert sum(value.nbytes for value in state.values()) == model.state_bytes(3, 11)


def gradients(model: LanguageModel, logits: Tensor, weight: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    values = torch.autograd.grad((logits * weight).sum(), parameters)
    return dict(zip(names, values, strict=True))


def test_gradients_reach_every_parameter_and_through_the_state(model: LanguageModel) -> None:
    ids, weight = tokens(2, 11), torch.randn(2, 11, V)
    whole = gradients(model, model(ids)[0], weight)
    pieces = gradients(model, feed(model, ids, [4])[0], weight)
    for name, gradient in whole.items():
        assert gradient.abs().max() > 0, name
        assert_close(pieces[name], gradient, 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_activation_checkpointing_changes_nothing(name: str) -> None:
    plain, saving = build(name, "nano"), build(name, "nano")
    saving.grad_checkpoint = True
    saving.load_state_dict(plain.state_dict())
    ids, weight = tokens(2, 11), torch.randn(2, 11, V)
    expected = gradients(plain, plain(ids)[0], weight)
    for key, gradient in gradients(saving, saving(ids)[0], weight).items():
        torch.testing.assert_close(gradient, expected[key])


@pytest.mark.parametrize("name", MODELS)
def test_one_layer_and_one_token(name: str) -> None:
    model = build(name, "nano", n_layer=1)
    logits, _ = model(tokens(1, 1))
    logits.sum().backward()
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_low_precision(model: LanguageModel) -> None:
    ids = tokens(2, 11)
    expected, _ = model(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, state = feed(model, ids, [4])
    assert_close(actual.float(), expected, 2e-2)
    if model.family == "rwkv4":
        assert all(value.dtype == torch.float32 for value in state.values())
    assert_close(model.bfloat16()(ids)[0].float(), expected, 4e-2)


def test_param_groups_hold_each_parameter_once(model: LanguageModel) -> None:
    groups = model.param_groups(0.1)
    held = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(held)
    assert len(held) == len(list(model.parameters()))
    multipliers = {"time_decay": 2.0, "time_first": 3.0}
    for name, parameter in model.named_parameters():
        group = held[id(parameter)]
        assert group["weight_decay"] == (0.1 if parameter.dim() == 2 else 0.0), name
        assert group["lr_scale"] == multipliers.get(name.split(".")[-1], 1.0), name


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_compiling_in_place_keeps_the_keys(name: str) -> None:
    model = build(name, "nano")
    ids, weight = tokens(2, 11), torch.randn(2, 11, V)
    keys = list(model.state_dict())
    expected, expected_gradients = model(ids)[0], gradients(model, model(ids)[0], weight)
    model.compile(backend="aot_eager")
    assert list(model.state_dict()) == keys
    assert_close(model(ids)[0], expected)
    for key, gradient in gradients(model, model(ids)[0], weight).items():
        assert_close(gradient, expected_gradients[key], 1e-4)
