"""Tasks made from the held-out text of the corpus a model was trained on; nothing is downloaded.

`cloze`: which of four continuations follows? All four are real held-out text, cut at a space, of
the same length, and about equally predictable by their spelling alone (character trigrams), so
that only the context tells them apart. Chance is 25 %.
`bits_per_byte`: log-likelihood of held-out passages, in bits per UTF-8 byte. It differs from the
trainer's `val/bpb` by what a window does not see: each passage starts behind the prefix token
instead of the text before it, and windows are counted from its start.

The functions return what lm-eval's `ConfigurableTask` takes, without knowing lm-eval.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from experiments.data.token_data import TokenData

N_CLOZE, N_CHOICES = 256, 4
CLOZE_CONTEXT, CLOZE_ANSWER, CLOZE_STRETCH = 96, 32, 256  # characters; of one document in all
N_PASSAGES, PASSAGE = 64, 1024  # documents, characters
FEWEST = 8  # documents without which a score means nothing


def cloze(data: TokenData, seed: int) -> dict[str, Any]:
    """Task config of `cloze`; the seed decides the order of documents and of choices."""
    texts = list(stretches(data, N_CLOZE, CLOZE_STRETCH))
    cuts = [cut for text in texts if len(cut := cut_at_spaces(text)) > 1]
    right = {cut[0][1]: cut[0] for cut in cuts}  # a text that occurs twice counts once
    wrong = [b for b in dict.fromkeys(b for cut in cuts for _, b in cut[1:]) if b not in right]
    n = min(len(right), len(wrong) // (N_CHOICES - 1))
    surprisal = spelling_surprisal(texts)
    asked = sorted(list(right.values())[:n], key=lambda pair: surprisal(pair[1]))
    others = sorted(wrong[: n * (N_CHOICES - 1)], key=surprisal)  # equal ranks, equal surprisal
    rng = random.Random(seed)
    documents = []
    for i, (context, answer) in enumerate(asked):
        choices = [answer, *others[i * (N_CHOICES - 1) : (i + 1) * (N_CHOICES - 1)]]
        rng.shuffle(choices)
        documents.append({"context": context, "choices": choices, "answer": choices.index(answer)})
    rng.shuffle(documents)  # a limit takes a fair part
    return {
        "task": "cloze",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": VERSIONS["cloze"], "chance": 1 / N_CHOICES},
        **_documents(documents, data, "cloze", CLOZE_STRETCH),
    }


def bits_per_byte(data: TokenData, seed: int) -> dict[str, Any]:
    """Task config of `bits_per_byte`; nothing in it is drawn."""
    documents = [{"text": text[:PASSAGE]} for text in stretches(data, N_PASSAGES, PASSAGE)]
    return {
        "task": "bits_per_byte",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [
            {
                "metric": "bits_per_byte",
                "aggregation": "bits_per_byte",
                "higher_is_better": False,
            }
        ],
        "metadata": {"version": VERSIONS["bits_per_byte"]},
        **_documents(documents, data, "bits_per_byte", PASSAGE),
    }


# Raise a version when documents or scoring change: results of different versions do not compare.
VERSIONS = {"cloze": 1, "bits_per_byte": 1}
OWN_TASKS: dict[str, Callable[[TokenData, int], dict[str, Any]]] = {
    "cloze": cloze,
    "bits_per_byte": bits_per_byte,
}


def stretches(data: TokenData, n: int, length: int) -> Iterator[str]:
    """At most n pieces of held-out text that do not overlap, evenly spread, each of one document.

    Each is the longest piece of a document near its position, of up to 2 x length characters; where
    the text has no room for n, there are fewer. Bytes that are not UTF-8 are left out.
    """
    tokens, decode = data.val, data.tokenizer.decode_bytes
    head = np.asarray(tokens[: 4 * length])
    rate = len(decode(head).decode("utf-8", "ignore")) / max(1, len(head))  # characters a token
    n = min(n, int(len(tokens) * rate / (1.25 * length)))
    for i in range(n):
        start, stop = i * len(tokens) // n, (i + 1) * len(tokens) // n
        part = np.asarray(tokens[start : min(stop, start + math.ceil(2 * length / rate))])
        ends = np.flatnonzero(part == data.tokenizer.eot_id)
        pieces = (decode(piece).decode("utf-8", "ignore") for piece in np.split(part, ends))
        longest = max(pieces, key=len)
        if longest.strip():
            yield longest[: 2 * length]


def cut_at_spaces(text: str) -> list[tuple[str, str]]:
    """Up to N_CHOICES (context, continuation) that do not overlap; only the first has its context.

    A continuation starts with a space behind a word: there every tokenizer cuts too, so no token
    spans the border.
    """
    cuts: list[tuple[str, str]] = []
    start = CLOZE_CONTEXT
    for i in range(start, len(text) - CLOZE_ANSWER + 1):
        if i >= start and text[i].isspace() and not text[i - 1].isspace():
            context = "" if cuts else text[i - CLOZE_CONTEXT : i]
            cuts.append((context, text[i : i + CLOZE_ANSWER]))
            start = i + CLOZE_ANSWER
            if len(cuts) == N_CHOICES:
                break
    return cuts


def spelling_surprisal(texts: list[str]) -> Callable[[str], float]:
    """How surprising the spelling of a text is: -log P of its character trigrams in `texts`."""
    threes: Counter[str] = Counter()
    twos: Counter[str] = Counter()
    for text in texts:
        threes.update(text[i : i + 3] for i in range(len(text) - 2))
        twos.update(text[i : i + 2] for i in range(len(text) - 2))

    def surprisal(text: str) -> float:
        grams = (text[i : i + 3] for i in range(len(text) - 2))
        return -sum(math.log(threes[gram] / twos[gram[:2]]) for gram in grams)

    return surprisal


def _documents(
    documents: list[dict[str, Any]], data: TokenData, task: str, length: int
) -> dict[str, Any]:
    """The part of a task config that holds the documents."""
    if len(documents) < FEWEST:
        raise ValueError(
            f"{task}: the held-out text of {data.path} gives {len(documents)} documents of "
            f"{length} characters, fewer than {FEWEST}: raise data.val_tokens and train on it"
        )

    def load(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(documents)}

    return {"test_split": "test", "custom_dataset": load, "num_fewshot": 0}
