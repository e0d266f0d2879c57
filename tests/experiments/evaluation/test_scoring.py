"""The prefix tree, and scores against each request run whole and alone."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from experiments.evaluation.prefix_tree import NOTHING, Segment, Tokens, plan
from experiments.evaluation.scoring import SMALL_PASS, Scorer, batched
from models.gpt.model import GPT
from models.language_model import LanguageModel
from models.rwkv4.model import RWKV4

V, CTX = 32, 40
Pair = tuple[Tokens, Tokens]


def build(family: str) -> LanguageModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "n_layer": 2, "n_embd": 16, "ctx_len": CTX}
    model = RWKV4(**sizes) if family == "rwkv4" else GPT(**sizes, n_head=2)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    nn.init.normal_(model.head.weight, std=0.5)
    return model.eval()


MODELS = {family: build(family) for family in ("rwkv4", "gpt")}


def ids(rng: random.Random, n: int, largest: int = V - 1) -> Tokens:
    return tuple(rng.randint(0, largest) for _ in range(n))


def exam(seed: int = 0) -> list[Pair]:
    """Worked examples that questions share, passages, answers with words in common, equal ones."""
    rng = random.Random(seed)
    examples, passage = ids(rng, 14), ids(rng, 6)
    pairs: list[Pair] = []
    for _ in range(8):
        context = rng.choice([examples, examples + passage, ()]) + ids(rng, rng.randint(1, 5))
        stem = ids(rng, rng.choice([0, 4]))
        pairs += [(context, stem + ids(rng, rng.randint(1, 4), 2)) for _ in range(3)]
    long = ids(rng, CTX - 3)
    pairs += [(long, ids(rng, 4)), (long[:-6], ids(rng, 10))]  # to the last position of the GPT
    pairs += [((1,), (2,)), ((1,), (2, 3)), ((1,), (2, 3, 4, 5, 6)), ((1,), (2, 3, 4, 5, 6, 7))]
    return [*pairs, pairs[0]]


@torch.no_grad()
def alone(model: LanguageModel, context: Tokens, answer: Tokens) -> tuple[float, bool]:
    logits, _ = model(torch.tensor([context + answer])[:, :-1])
    logp = logits[0].double().log_softmax(-1)[len(context) - 1 :]
    total = sum(logp[i, token].item() for i, token in enumerate(answer))
    return total, logp.argmax(-1).tolist() == list(answer)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("batch_tokens", [1, 30, 100, 10_000])
def test_scores_are_those_of_each_request_alone(family: str, batch_tokens: int) -> None:
    model, pairs = MODELS[family], exam()
    done: list[int] = []
    answers = Scorer(model, batch_tokens).score(pairs, lambda new: done.extend(new))
    assert sorted(done) == list(range(len(pairs)))
    for (context, answer), (score, greedy) in zip(pairs, answers, strict=True):
        want, want_greedy = alone(model, context, answer)
        assert score == pytest.approx(want, abs=1e-4)
        assert greedy == want_greedy


def test_logits_that_are_no_numbers_are_no_score() -> None:
    model = build("rwkv4")
    model.head.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match=r"logits are not finite: try dtype=float32"):
        Scorer(model).score([((1, 2), (4,))])


def paths(
    roots: list[Segment], before: tuple[Tokens, Tokens] = ((), ())
) -> dict[int, tuple[Tokens, Tokens]]:
    """What each request is fed and asked, put together from its way down."""
    found: dict[int, tuple[Tokens, Tokens]] = {}
    for segment in roots:
        fed = before[0] + tuple(segment.inputs)
        asked = before[1] + tuple(segment.targets)
        if not segment.children:
            assert segment.last == segment.first + 1
            found[segment.first] = (fed, asked)
            continue
        below = paths(segment.children, (fed, asked))
        assert sorted(below) == list(range(segment.first, segment.last))
        assert segment.reach == max(len(way) for way, _ in below.values()) - len(before[0])
        found |= below
    return found


few_ids = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(few_ids, few_ids), max_size=12))
def test_the_tree_holds_every_request_once(pairs: list[Pair]) -> None:
    places, roots = plan(pairs)
    ways = paths(roots)
    assert sorted(place for group in places for place in group) == list(range(len(pairs)))
    assert sorted(ways) == list(range(len(places)))
    for number, group in enumerate(places):
        for place in group:
            context, answer = pairs[place]
            asked = (NOTHING,) * (len(context) - 1) + answer
            assert ways[number] == (context + answer[:-1], asked)


def n_run(roots: list[Segment]) -> int:
    return sum(len(one.inputs) + n_run(one.children) for one in roots)


def test_what_requests_share_is_run_once() -> None:
    examples, question, stem = tuple(range(20)), (21, 22, 23, 24, 25), (26, 27, 28, 29)
    answers = [(*stem, i, i) for i in range(4)]
    pairs = [(examples + question, answer) for answer in answers]
    pairs += [(examples + question[::-1], answer) for answer in answers]
    # examples; twice: question and stem up to where answers part, then an id of each answer
    assert n_run(plan(pairs)[1]) == 20 + 2 * (5 + 4 - 1 + 4 * (1 + 1))


def test_batches_keep_to_the_limit_and_are_not_mostly_padding() -> None:
    lengths = [150, *[30] * 100, *[5] * 400]
    batches = list(batched(lengths, lambda n: n, 1000))
    assert [n for batch in batches for n in batch] == sorted(lengths, reverse=True)
    for batch in batches:
        padded = len(batch) * batch[0]
        assert padded <= 1000
        assert padded - sum(batch) <= SMALL_PASS + sum(batch) / 4
    assert len(batches) < 12
    held = list(batched([5] * 10, lambda n: n, 100, held=45))
    assert [len(batch) for batch in held] == [2] * 5
