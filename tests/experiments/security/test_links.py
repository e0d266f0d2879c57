"""Links that lead out of a run directory are refused; those within are fine."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.runs.run_dir import RunDir
from experiments.sweeps.local import Pool
from experiments.sweeps.trial import Stops, train_cell

from .conftest import ENTRIES, Entry, generate, refused

FILES = (
    "checkpoints/last.ckpt", "checkpoints/.last.ckpt.1", "checkpoints/checksums.json",
    "metrics.csv", "manifest.json", "tokenizer.json", ".lock", ".claim.1", "error.txt",
    "log.txt", "eval/cloze.json", "bench/generate.json", "tensorboard", "wandb",
)  # fmt: skip


def links(run: Path, outside: Path, files: tuple[str, ...]) -> Iterator[str]:
    """Files and folders of a run, one after the other a link to elsewhere."""
    victim = outside / "last.ckpt"
    for name in files:
        link = run / name
        link.parent.mkdir(exist_ok=True)
        kept = link.read_bytes() if link.is_file() else None
        for target in (victim, outside / "new", Path("../../../../../outside/last.ckpt")):
            link.unlink(missing_ok=True)
            link.symlink_to(target)
            yield name
        link.unlink()
        if kept is not None:
            link.write_bytes(kept)
    for name in ("checkpoints", "eval", "bench"):
        (run / name).mkdir(exist_ok=True)
        shutil.move(run / name, run / "aside")
        (run / name).symlink_to(outside, target_is_directory=True)
        yield name
        (run / name).unlink()
        shutil.move(run / "aside", run / name)


@pytest.fixture
def outside(run: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder that holds one file before and after."""
    folder = tmp_path / "outside"
    folder.mkdir()
    shutil.copy(run / "checkpoints" / "last.ckpt", folder)
    before = (folder / "last.ckpt").read_bytes()
    yield folder
    assert (folder / "last.ckpt").read_bytes() == before
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]


def test_links_out_of_the_directory_are_seen(run: Path, outside: Path) -> None:
    for name in links(run, outside, FILES):
        with pytest.raises(ValueError, match=f"{name}.* is a link out of its run directory"):
            _ = RunDir(run).config
        with pytest.raises(ValueError, match=f"{name}.* is a link out of its run directory"):
            RunDir(run).claim()


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES)
def test_links_out_of_the_directory_are_refused(
    run: Path, outside: Path, entry: Entry, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in links(run, outside, ("checkpoints/last.ckpt", "metrics.csv")):
        refused(entry, run, capsys, name)


def test_links_within_the_directory_are_fine(run: Path) -> None:
    (run / "checkpoints" / "other.ckpt").symlink_to("last.ckpt")
    (run / "best").symlink_to(run / "checkpoints")
    generate(run)


def test_a_launcher_follows_no_link(run: Path, outside: Path) -> None:
    (run / "result.json").unlink()
    for _ in links(run, outside, (".lock", ".claim.1", "log.txt", "error.txt")):
        (pooled,) = Pool([RunDir(run)], [{}, {}], False, Stops()).train()
        for outcome in (pooled, train_cell(RunDir(run))):
            assert outcome.status == "failed"
            assert "is a link out of its run directory" in outcome.detail
