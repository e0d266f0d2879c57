"""Our own tasks: where their documents come from, and what they measure."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval.evaluator
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from torch import nn

from experiments.data.order import IGNORED, ValWindows
from experiments.data.tokenizer import BytesTokenizer, IdsTokenizer
from experiments.evaluation.adapter import LanguageModelLM
from experiments.evaluation.held_out_tasks import (
    CLOZE_ANSWER,
    CLOZE_CONTEXT,
    N_CLOZE,
    OWN_TASKS,
    cloze,
    stretches,
)
from models.gpt.model import GPT
from models.rwkv4.model import RWKV4

# every word occurs once, so that a piece of this text says where it is from
NUMBERED = " ".join(f"word{i:06d}" for i in range(12_000))


def data(text: bytes | str, tokenizer: Any = None) -> Any:
    """Held-out text as `TokenData` has it."""
    raw = text.encode() if isinstance(text, str) else text
    return SimpleNamespace(
        val=np.frombuffer(raw, dtype=np.uint8),
        tokenizer=tokenizer or BytesTokenizer(),
        path=Path("data/some"),
    )


def documents(config: dict[str, Any]) -> list[dict[str, Any]]:
    return list(config["custom_dataset"](**config["metadata"])["test"])


def run(config: dict[str, Any], model: Any, **options: Any) -> dict[str, Any]:
    task = ConfigurableTask(config=config)
    lm = LanguageModelLM(model, BytesTokenizer(), **options)
    return lm_eval.evaluator.evaluate(lm, {"tasks": {config["task"]: task}}, log_samples=False)


def test_cloze_is_a_function_of_the_seed() -> None:
    first, again, other = (documents(cloze(data(NUMBERED), seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert {d["context"] for d in first} == {d["context"] for d in other}


def test_cloze_documents_do_not_overlap_and_have_one_right_answer() -> None:
    docs = documents(cloze(data(NUMBERED), 0))
    assert len(docs) == N_CLOZE
    places = []
    for doc in docs:
        assert len(set(doc["choices"])) == 4
        assert {len(choice) for choice in doc["choices"]} == {CLOZE_ANSWER}
        assert len(doc["context"]) == CLOZE_CONTEXT
        follows = [doc["context"] + choice in NUMBERED for choice in doc["choices"]]
        assert follows == [i == doc["answer"] for i in range(4)]
        assert all(choice[0] == " " for choice in doc["choices"])
        for piece in (doc["context"], *doc["choices"]):
            places.append((start := NUMBERED.index(piece), start + len(piece)))
    places.sort()
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))
    counts = np.bincount([d["answer"] for d in docs], minlength=4)
    assert counts.min() > N_CLOZE / 8  # the right answer is anywhere


def test_a_model_that_knows_nothing_scores_at_chance() -> None:
    model = GPT(256, n_layer=1, n_embd=8, n_head=1, ctx_len=256, rotary_pct=0.5).eval()
    nn.init.normal_(model.head.weight)
    results = run(cloze(data(NUMBERED), 0), model)
    accuracy = results["results"]["cloze"]["acc,none"]
    stderr = results["results"]["cloze"]["acc_stderr,none"]
    assert stderr == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / (N_CLOZE - 1)))
    assert abs(accuracy - 0.25) < 4 * stderr
    assert results["configs"]["cloze"]["metadata"]["chance"] == 0.25
    assert results["versions"]["cloze"] == 1
    assert results["n-samples"]["cloze"]["effective"] == N_CLOZE


class Copies(GPT):
    """Predicts what stood one word earlier: right but for the digits that count up."""

    def __init__(self) -> None:
        super().__init__(256, n_layer=1, n_embd=8, n_head=1, ctx_len=256, rotary_pct=0.5)
        self.max_ctx = None
        self.head = nn.Linear(256, 256, bias=False)
        self.head.weight.data = 5 * torch.eye(256)

    def features(self, ids, state=None):
        past = ids[:, :0] if state is None else state["past"]
        whole = torch.cat([past, ids], 1)
        # the next byte is the one a word and its space, eleven bytes, before it
        shifted = F.pad(whole, (10, 0))[:, -ids.shape[1] - 10 : -10]
        return F.one_hot(shifted, 256).float(), {"past": whole} if state is not None else None

    def init_state(self, batch_size, n_pad=None):
        return {"past": torch.zeros(batch_size, 0, dtype=torch.int64)}


def test_a_model_that_uses_the_context_scores_above_chance() -> None:
    results = run(cloze(data(NUMBERED), 0), Copies().eval())
    assert results["results"]["cloze"]["acc,none"] > 0.6


def test_passages_stay_within_one_document_and_are_text() -> None:
    files = [f"file {i} " * 40 for i in range(300)]
    raw = "\0".join(files).encode() + b"\0\xff\xfe" + "ü".encode()[:1]
    for text in stretches(data(raw), 40, 100):
        assert "\0" not in text
        numbers = set(text.split()) - {"file", "fil", "fi", "f", "ile", "le", "e"}
        assert sum(number.isdigit() and len(number) > 2 for number in numbers) <= 1
    chinese = "文字與書" * 9000
    for text in stretches(data(chinese), 40, 100):
        assert set(text) <= set("文字與書")
        assert len(text) >= 100


def test_short_text_gives_fewer_documents_or_one_clear_line() -> None:
    assert 8 <= len(documents(cloze(data(NUMBERED[:8000]), 0))) < N_CLOZE
    for task in OWN_TASKS.values():
        with pytest.raises(ValueError, match=r"data/some gives 0 documents .* data\.val_tokens"):
            task(data(NUMBERED[:100]), 0)
    with pytest.raises(ValueError, match="came as ids"):
        cloze(data(NUMBERED, IdsTokenizer(256)), 0)


@pytest.mark.parametrize("family", ["rwkv4", "gpt"])
def test_bits_per_byte_is_the_trainers_definition(family) -> None:
    """Same text, same windows: equal when the text starts behind the prefix and fills windows."""
    ctx_len = 32
    if family == "gpt":
        model = GPT(256, n_layer=1, n_embd=16, n_head=1, ctx_len=ctx_len, rotary_pct=0.5)
    else:
        model = RWKV4(256, n_layer=1, n_embd=16, ctx_len=ctx_len)
    nn.init.normal_(model.emb.weight)
    model.eval()
    text = NUMBERED[: 8 * ctx_len]
    windows = ValWindows(data(b"\0" + text.encode()), ctx_len)  # type: ignore[arg-type]
    windows.data.vocab_size = 256
    nats = 0.0
    with torch.no_grad():
        for i in range(len(windows)):
            inputs, targets = windows[i]
            logits = model(inputs[None])[0][0].double()
            nats += F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum").item()
    lm = LanguageModelLM(model, BytesTokenizer())
    (got,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    assert got == pytest.approx(-nats, rel=1e-6)
