"""Generation equals running the whole text again for every new token, for both families."""

import pytest
import torch

from models.generation import generate, sample
from models.gpt import GPT
from models.language_model import LanguageModel
from models.rwkv4 import RWKV4

V = 37
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11], [12, 13, 14]]


@pytest.fixture(params=["rwkv4", "gpt"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    model: LanguageModel = (
        RWKV4(vocab_size=V, n_layer=2, n_embd=32, ctx_len=32)
        if request.param == "rwkv4"
        else GPT(vocab_size=V, n_layer=2, n_embd=32, n_head=2, ctx_len=32)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.dim() == 2 else 1))
    return model


@torch.no_grad()
def continue_alone(model: LanguageModel, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        logits, _ = model(torch.tensor([ids]))
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_equals_the_whole_text_run_again(model: LanguageModel) -> None:
    expected = [continue_alone(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(row) for row in expected}) > 1
    assert generate(model, PROMPTS, 12) == expected
    assert generate(model, PROMPTS[2:], 12) == expected[2:]  # equal lengths: no padding


def test_rows_end_apart(model: LanguageModel) -> None:
    free = generate(model, PROMPTS, 12)
    eot = free[0][5]
    ended = [row[: row.index(eot)] if eot in row else row for row in free]
    assert generate(model, PROMPTS, 12, eot_id=eot) == ended
    seen: list[tuple[int, int]] = []

    def stop(row: int, new: list[int]) -> bool:
        seen.append((row, len(new)))
        return len(new) == row + 1

    assert generate(model, PROMPTS, 12, stop=stop) == [row[: i + 1] for i, row in enumerate(free)]
    # Called once for each new token, in step with the others, and never after a row's end.
    assert seen == [(row, n) for n in range(1, 5) for row in range(4) if n <= row + 1]


def test_sampling_is_decided_by_its_generator(model: LanguageModel) -> None:
    first, second, other = (
        generate(model, PROMPTS, 12, temperature=1.0, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert first == second != other
    assert generate(model, PROMPTS, 12, temperature=1.0, top_k=1) == generate(model, PROMPTS, 12)


def test_ids_the_tokenizer_lacks_are_never_drawn(model: LanguageModel) -> None:
    with torch.no_grad():
        model.head.weight[30:] *= 100  # nothing is as likely, or unlikely, as these
    settings = {"temperature": 5.0, "generator": torch.Generator().manual_seed(0)}
    assert max(map(max, generate(model, PROMPTS, 12, **settings))) >= 30
    for draw in ({}, settings):
        assert max(map(max, generate(model, PROMPTS, 12, vocab_size=30, **draw))) < 30


def test_nothing_to_do(model: LanguageModel) -> None:
    assert generate(model, [], 5) == []
    assert generate(model, PROMPTS, 0) == [[], [], [], []]


def test_bad_prompts_are_refused(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(model, [[1], []], 3)
    with pytest.raises(ValueError, match=r"prompt 0 has ids from 1 to 37; .* 0 to 36"):
        generate(model, [[1, V]], 3)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 0"):
        generate(model, [[1]], -1)


def test_a_gpt_ends_at_its_context_and_rwkv_does_not(model: LanguageModel) -> None:
    assert len(generate(model, [[1] * 20], 13)[0]) == 13
    if model.family == "rwkv4":
        assert len(generate(model, [[1] * 20], 40)[0]) == 40
    else:
        with pytest.raises(ValueError, match="33 positions; this gpt model ends at 32"):
            generate(model, [[1] * 20], 14)


def frequencies(logits: list[float], **settings: float) -> torch.Tensor:
    rows = torch.tensor(logits).expand(20000, -1)
    drawn = sample(rows, generator=torch.Generator().manual_seed(0), **settings)
    return torch.bincount(drawn, minlength=len(logits)) / len(rows)


def test_sampling_frequencies() -> None:
    p = torch.tensor([0.1, 0.4, 0.3, 0.2])
    logits = p.log().tolist()
    expected = {
        (): p,
        (("top_k", 2),): torch.tensor([0, 4, 3, 0]) / 7,
        (("top_p", 0.6),): torch.tensor([0, 4, 3, 0]) / 7,  # 0.4 does not reach 0.6, 0.7 does
        (("top_p", 0.39),): torch.tensor([0.0, 1, 0, 0]),
        (("top_p", 1.0),): p,
        (("top_k", 3), ("top_p", 0.5)): torch.tensor([0, 4, 3, 0]) / 7,  # 0.4 / 0.9 < 0.5
    }
    for settings, q in expected.items():
        drawn = frequencies(logits, temperature=1.0, **dict(settings))
        torch.testing.assert_close(drawn, q, atol=0.015, rtol=0)
    sharper = (p**2) / (p**2).sum()
    torch.testing.assert_close(frequencies(logits, temperature=0.5), sharper, atol=0.015, rtol=0)
    assert frequencies(logits)[1] == 1  # greedy


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"temperature": -1.0}, "temperature"), ({"top_k": 0}, "top_k"), ({"top_p": 0.0}, "top_p")],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(torch.zeros(1, 3), **{"temperature": 1.0} | settings)
