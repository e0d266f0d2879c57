"""Twelve trials, two launchers, kills of both: with a stand-in for training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FAKE = Path(__file__).resolve().parents[2] / "experiments" / "sweeps" / "fake_fit.py"


@pytest.mark.slow
def test_no_trial_is_lost_or_trained_twice(storm: Callable[..., Any]) -> None:
    twelve = storm(FAKE)
    counts = twelve.blow(n_kills=12, pause_s=0.5)
    twelve.check()
    assert counts.total() >= 4
