"""A training that is killed at any moment and started again ends as one that was never killed."""

from collections import Counter
from collections.abc import Callable

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("model", ["rwkv4", "gpt"])
def test_killed_trainings_end_as_undisturbed_ones(
    kill: Callable[[str, int], Counter[str]], model: str
) -> None:
    counts = kill(model, 5)  # compares each with the undisturbed run
    assert counts.total() - counts["trainings"] == 5
