"""`make faults`: as test_kills.py, with fifty kills for each family."""

from collections import Counter
from collections.abc import Callable

import pytest


@pytest.mark.parametrize("model", ["rwkv4", "gpt"])
def test_fifty_kills(kill: Callable[[str, int], Counter[str]], model: str) -> None:
    counts = kill(model, 50)
    print(f"{model}: {dict(counts)}")
    assert counts.total() - counts["trainings"] == 50
