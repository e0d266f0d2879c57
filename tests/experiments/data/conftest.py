from pathlib import Path

import pytest


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of 30 files."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(30):
        text = f"file {i}: " + "naïve 日本語 words and more words, " * (20 + i)
        (folder / f"{i:02d}.txt").write_text(text, encoding="utf-8")
    return folder
