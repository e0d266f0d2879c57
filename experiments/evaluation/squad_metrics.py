"""Exact match and token F1 between short answers, as SQuAD defines them (arXiv 1606.05250, 6.1).

Several of lm-eval's task files (ReCoRD's among them) take them from transformers, which has dropped
them in its version 5. `stand_in` lets such a file be read without.
"""

import importlib
import re
import string
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

MISSING = "transformers.data.metrics.squad_metrics"
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation and the words a, an, the; one space between words."""
    bare = text.lower().translate(PUNCTUATION)
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", bare).split())


def compute_exact(gold: str, predicted: str) -> int:
    """1 if the two answers are the same once normalized, else 0."""
    return int(normalize_answer(gold) == normalize_answer(predicted))


def compute_f1(gold: str, predicted: str) -> float:
    """Harmonic mean of precision and recall of the normalized words, in [0, 1].

    Words count as often as they occur. Where an answer has no words left, it is 1 if both have
    none, else 0.
    """
    a, b = Counter(normalize_answer(gold).split()), Counter(normalize_answer(predicted).split())
    if not a or not b:
        return float(a == b)
    return 2 * (a & b).total() / (a.total() + b.total())


@contextmanager
def stand_in() -> Iterator[None]:
    """Within it, `import transformers.data.metrics.squad_metrics` works; then all is as before.

    Only what is missing of that path is made up. To be held for the import of a task file alone:
    other code takes a made-up `transformers` for the real one.
    """
    before: dict[str, ModuleType | None] = {}
    parts = MISSING.split(".")
    try:
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            try:
                importlib.import_module(name)
            except ImportError:
                before[name] = sys.modules.get(name)
                sys.modules[name] = ModuleType(name)
        if before:
            module = sys.modules[MISSING]
            for function in (normalize_answer, compute_exact, compute_f1):
                setattr(module, function.__name__, function)
        yield
    finally:
        for name, old in before.items():
            del sys.modules[name]
            if old is not None:
                sys.modules[name] = old
