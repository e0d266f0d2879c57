"""A text, and small runs on it that nothing has trained yet."""

from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.runs.run_dir import RunDir

from ...small_runs import freeze_in, text_in


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_in(tmp_path_factory.mktemp("text"))


@pytest.fixture
def freeze(tmp_path: Path, text: Path) -> Callable[..., RunDir]:
    def make(*overrides: str, runs: str = "runs") -> RunDir:
        return freeze_in(tmp_path / runs, text, *overrides)

    return make
