"""A text, and small runs on it that nothing has trained yet."""

from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.runs.run_dir import RunDir

from ...small_runs import freeze_in


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(2000)))
    return path


@pytest.fixture
def freeze(tmp_path: Path, text: Path) -> Callable[..., RunDir]:
    def make(*overrides: str, runs: str = "runs") -> RunDir:
        return freeze_in(tmp_path / runs, text, *overrides)

    return make
