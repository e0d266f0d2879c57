"""GPT-NeoX's own: initialisation, the limit of its context, and head sizes that cannot be."""

import math

import pytest
import torch

from models.gpt.model import GPT


def test_initialisation() -> None:
    L, C = 2, 256
    model = GPT(vocab_size=500, n_layer=L, n_embd=C, n_head=4, ctx_len=8)
    small, wang = math.sqrt(2 / (5 * C)), 2 / (L * math.sqrt(C))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "ln" in name:
            assert (parameter == 1).all(), name
        else:
            expected = wang if name.split(".")[-2] in ("output", "down") else small
            assert parameter.std().item() == pytest.approx(expected, rel=0.02), name
            assert abs(parameter.mean().item()) < 0.02 * expected, name


def test_ends_at_its_context() -> None:
    model = GPT(vocab_size=9, n_layer=1, n_embd=16, n_head=2, ctx_len=5)
    ids = torch.zeros(1, 5, dtype=torch.int64)
    _, state = model(ids, model.init_state(1))
    with pytest.raises(ValueError, match="6 tokens is longer than this GPT's context of 5"):
        model(ids[:, :1], state)
    with pytest.raises(ValueError, match="longer than this GPT's context of 5"):
        model(torch.zeros(1, 6, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 3}, "n_head must divide n_embd: 16 / 3 is not whole"),
        ({"n_head": 4}, "rotary_pct 0.25 of head size 4 is 1 channels; it must be an even number"),
        ({"rotary_pct": 1.5}, "rotary_pct 1.5"),
        ({"n_layer": 0}, "n_layer must be at least 1, got 0"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict, message: str) -> None:
    sizes = {"vocab_size": 9, "n_layer": 1, "n_embd": 16, "n_head": 2, "ctx_len": 5}
    with pytest.raises(ValueError, match=message) as caught:
        GPT(**sizes | changes)
    assert "\n" not in str(caught.value)


def test_no_rotary_channels_means_no_positions() -> None:
    model = GPT(vocab_size=9, n_layer=1, n_embd=16, n_head=2, ctx_len=5, rotary_pct=0.0)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        swapped = model(ids[:, [1, 0, 2, 3]])[0]
        torch.testing.assert_close(model(ids)[0][:, 2:], swapped[:, 2:])
