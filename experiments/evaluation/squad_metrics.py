"""Exact match and token F1 between short answers, as SQuAD defines them (arXiv 1606.05250, 6.1).

Several of lm-eval's task files (ReCoRD's among them) take them from transformers, which has dropped
them in its version 5. `stand_in` lets such a file be imported without.
"""

import re
import string
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

PACKAGES = ("transformers", "transformers.data", "transformers.data.metrics")
MODULE = "transformers.data.metrics.squad_metrics"
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation and the words a, an, the; one space between words."""
    without_punctuation = text.lower().translate(PUNCTUATION)
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", without_punctuation).split())


def compute_exact(gold: str, predicted: str) -> int:
    """1 if the two answers are the same once normalized, else 0."""
    return int(normalize_answer(gold) == normalize_answer(predicted))


def compute_f1(gold: str, predicted: str) -> float:
    """Harmonic mean of precision and recall of the normalized words, in [0, 1].

    A word counts as often as it occurs. If an answer has no words left, F1 is 1 where both have
    none, else 0.
    """
    gold_words = Counter(normalize_answer(gold).split())
    predicted_words = Counter(normalize_answer(predicted).split())
    if not gold_words or not predicted_words:
        return float(gold_words == predicted_words)
    n_common = (gold_words & predicted_words).total()
    return 2 * n_common / (gold_words.total() + predicted_words.total())


@contextmanager
def stand_in() -> Iterator[None]:
    """Within it, `import transformers.data.metrics.squad_metrics` finds the functions above.

    For the import of one task file. Afterwards `sys.modules` is what it was, because other code
    would take the empty `transformers` for the real one.
    """
    metrics = ModuleType(MODULE)
    for function in (normalize_answer, compute_exact, compute_f1):
        setattr(metrics, function.__name__, function)
    before = {name: sys.modules.get(name) for name in (*PACKAGES, MODULE)}
    sys.modules.update({name: ModuleType(name) for name in PACKAGES} | {MODULE: metrics})
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module
