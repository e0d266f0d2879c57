"""Generation equals running the whole text again for every new token, for both families."""

import pytest
import torch

from models.generation import (
    Generation,
    Past,
    Sampling,
    _likeliest,
    generate,
    pad_left,
    prefill,
    reset_rows,
    sample,
)
from models.gpt.model import GPT
from models.language_model import LanguageModel, select_rows
from models.rwkv4.model import RWKV4

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
    drawn = sample(rows, Sampling(**settings), torch.Generator().manual_seed(0))
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
    certain = torch.eye(4)[int(torch.tensor(logits).argmax())]
    assert torch.equal(frequencies(logits, temperature=1e-310), certain)
    assert frequencies(logits)[1] == 1  # greedy


@pytest.mark.parametrize("top_p", [0.2, 0.9])
def test_top_p_of_a_large_vocabulary(top_p: float) -> None:
    p = torch.rand(2, 5000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p = p / p.sum(-1, keepdim=True)  # flat: 0.9 takes more than are looked at first
    kept = _likeliest(p, None, top_p) > 0
    for row in range(2):
        ordered, n = p[row].sort(descending=True).values, int(kept[row].sum())
        assert kept[row].equal(p[row] >= ordered[n - 1])
        assert ordered[: n - 1].sum() < top_p <= ordered[:n].sum()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature must be a number from 0 on, got -1.0"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"top_k": 0}, "top_k must be a whole number of at least 1, got 0"),
        ({"top_k": 5.0}, "top_k must be"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_a_penalty_makes_what_was_seen_less_likely() -> None:
    logits = torch.tensor([[2.0, -1.0, 1.5, -3.0]])
    seen = torch.tensor([[True, True, False, False]])
    how = Sampling(temperature=1.0, repetition_penalty=2.0)
    rows, marks = logits.expand(20000, -1), seen.expand(20000, -1)
    drawn = sample(rows, how, torch.Generator().manual_seed(0), marks)
    expected = torch.tensor([1.0, -2.0, 1.5, -3.0]).softmax(-1)  # by hand: 2 / 2, -1 * 2
    torch.testing.assert_close(
        torch.bincount(drawn, minlength=4) / 20000, expected, atol=0.015, rtol=0
    )
    assert sample(logits, Sampling(), None, seen).item() == 0
    assert sample(logits, Sampling(repetition_penalty=2.0), None, seen).item() == 2


def test_the_penalty_counts_prompt_and_new_ids(model: LanguageModel) -> None:
    new = generate(model, PROMPTS, 12, repetition_penalty=1e6)
    for prompt, row in zip(PROMPTS, new, strict=True):
        assert len({*prompt, *row}) == len(prompt) + 12  # never one again
    # with the prompt's start in a state, it counts as well
    _, state = read(model, [PROMPTS[0][:4]])
    rest = Generation(
        model,
        [PROMPTS[0][4:]],
        Sampling(repetition_penalty=1e6),
        past=Past(state, [PROMPTS[0][:4]]),
    )
    assert [rest.step()[0][1] for _ in range(12)] == new[0]


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 9}, {"top_p": 0.8, "repetition_penalty": 1.3}], ids=str
)
def test_a_row_in_a_batch_gets_what_it_gets_alone(model: LanguageModel, settings: dict) -> None:
    settings = settings | {"temperature": 1.0}
    free = generate(model, PROMPTS, 20, generator=generators(7, 8, 9, 10), **settings)
    settings["eot_id"] = free[0][5]
    together = generate(model, PROMPTS, 20, generator=generators(7, 8, 9, 10), **settings)
    for prompt, seed, row in zip(PROMPTS, (7, 8, 9, 10), together, strict=True):
        assert generate(model, [prompt], 20, generator=generators(seed), **settings) == [row]
    assert len({len(row) for row in together}) > 1  # rows ended apart
    same = generate(model, [PROMPTS[3]] * 3, 20, generator=generators(4, 5, 4), **settings)
    assert same[0] == same[2] != same[1]


@torch.no_grad()
def read(model: LanguageModel, prompts: list[list[int]], chunk_len: int = 512) -> tuple:
    ids, n_pad = pad_left(prompts, torch.device("cpu"))
    return prefill(model, ids, model.init_state(len(prompts), n_pad), chunk_len)


@torch.no_grad()
def test_ragged_rows_have_the_logits_they_have_alone(model: LanguageModel) -> None:
    for chunk_len in (512, 3, 1):
        x, state = read(model, PROMPTS, chunk_len)
        for row, prompt in enumerate(PROMPTS):
            logits, _ = model(torch.tensor([[*prompt, 1, 2]]))
            torch.testing.assert_close(
                model.head(x[row]), logits[0, len(prompt) - 1], atol=1e-5, rtol=1e-5
            )
            after, _ = model(torch.tensor([[1, 2]] * len(PROMPTS)), state)
            torch.testing.assert_close(after[row], logits[0, -2:], atol=1e-5, rtol=1e-5)


def test_a_state_forks_and_goes_on(model: LanguageModel) -> None:
    _, state = read(model, [PROMPTS[0][:3]])
    before = {name: value.clone() for name, value in state.items()}
    forks = select_rows(state, torch.tensor([0, 0]))
    going = Generation(
        model, [PROMPTS[0][3:], [9, 9, 9, 9]], Sampling(), past=Past(forks, [PROMPTS[0][:3]] * 2)
    )
    new: list[list[int]] = [[], []]
    for _ in range(6):
        for row, token in going.step():
            new[row].append(token)
    assert new == generate(model, [PROMPTS[0], [*PROMPTS[0][:3], 9, 9, 9, 9]], 6)
    assert going.n_read == 3 + 4 + 5
    assert all(torch.equal(state[name], value) for name, value in before.items())
    with pytest.raises(ValueError, match="one prompt for each of its rows, all of one length"):
        Generation(model, [[1], [2, 3]], Sampling(), past=Past(forks, [[1], [1]]))


@pytest.mark.parametrize("prompts", [PROMPTS[2:], PROMPTS], ids=["equal", "ragged"])
@torch.no_grad()
def test_a_reset_row_starts_anew_and_the_others_stay(
    model: LanguageModel, prompts: list[list[int]]
) -> None:
    _, state = read(model, prompts)
    n_read = max(map(len, prompts))
    new = reset_rows(model, state, torch.tensor([1]), n_read)
    ids = torch.tensor([[4, 5, 6]] * len(prompts))
    logits, after = model(ids, new)
    expected, _ = model(ids, state)
    expected[1] = model(ids[:1])[0][0]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    again, _ = model(ids, reset_rows(model, after, torch.arange(len(prompts)), n_read + 3))
    torch.testing.assert_close(again, model(ids)[0], atol=1e-5, rtol=1e-5)


def test_logits_that_are_not_finite_are_refused(model: LanguageModel) -> None:
    with torch.no_grad():
        model.head.weight[3] = float("inf")
    with pytest.raises(ValueError, match="logits are not finite"):
        generate(model, PROMPTS, 3)
