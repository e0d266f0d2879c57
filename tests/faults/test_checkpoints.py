"""Checkpoint files: whole or not there, known by their SHA-256, the one before kept."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments.runs.checkpoints.checksums import CHECKSUMS, digest, is_whole
from experiments.runs.checkpoints.files import (
    BEST,
    DAMAGED,
    LAST,
    PREVIOUS,
    AtomicCheckpointIO,
    checkpoint_to_resume,
    duplicate,
)
from experiments.runs.checkpoints.reading import read_checkpoint

from .fork_server import aim


def save(folder: Path, number: int) -> None:
    AtomicCheckpointIO().save_checkpoint({"n": number, "x": torch.full((999,), 1.0)}, folder / LAST)


def number(path: Path) -> int:
    return read_checkpoint(path)["n"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where 1 and then 2 was saved; the best is 1."""
    path = tmp_path / "run" / "checkpoints"
    path.parent.mkdir()
    save(path, 1)
    duplicate(path / LAST, path / BEST)
    save(path, 2)
    return path


def flip(path: Path) -> None:
    """Change one bit in the middle, which torch.load does not see."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def test_the_one_before_is_kept_and_all_are_known(folder: Path) -> None:
    assert [number(folder / name) for name in (LAST, PREVIOUS, BEST)] == [2, 1, 1]
    assert all(is_whole(folder / name) for name in (LAST, PREVIOUS, BEST))
    known = json.loads((folder / CHECKSUMS).read_text())
    assert known == {name: [digest(folder / name)] for name in (LAST, PREVIOUS, BEST)}
    assert checkpoint_to_resume(folder) == folder / LAST
    assert sorted(p.name for p in folder.iterdir()) == [BEST, CHECKSUMS, LAST, PREVIOUS]


@pytest.mark.parametrize("damage", [flip, cut, empty, Path.unlink])
def test_a_damaged_last_one_falls_back_to_the_one_before(
    folder: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder / LAST)
    assert checkpoint_to_resume(folder) == folder / PREVIOUS
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ")
    assert "resuming from previous.ckpt" in warning
    assert str(folder / LAST) in warning
    assert (folder / DAMAGED).exists() == (damage is not Path.unlink)
    save(folder, 3)  # what is good is not pushed out by what is damaged
    assert [number(folder / name) for name in (LAST, PREVIOUS)] == [3, 1]
    assert checkpoint_to_resume(folder) == folder / LAST


def test_none_that_is_whole_is_one_line(folder: Path) -> None:
    for name in (LAST, PREVIOUS):
        flip(folder / name)
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged: .*no whole previous\.ckpt") as e:
        checkpoint_to_resume(folder)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="damaged"):
        read_checkpoint(folder / LAST)
    assert checkpoint_to_resume(folder.parent / "nothing") is None


@pytest.mark.parametrize("text", [None, "{", '{"last.ckpt": 3}'])
def test_without_its_list_a_checkpoint_can_be_read(
    folder: Path, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is None:
        (folder / CHECKSUMS).unlink()
    else:
        (folder / CHECKSUMS).write_text(text)
    assert checkpoint_to_resume(folder) == folder / LAST
    assert number(folder / LAST) == 2
    warnings = capsys.readouterr().err
    assert ("cannot be checked" in warnings) == (text is not None)
    cut(folder / LAST)  # torch.load still finds what is cut
    assert checkpoint_to_resume(folder) == folder / PREVIOUS
    save(folder, 3)
    assert is_whole(folder / LAST)
    assert is_whole(folder / PREVIOUS) is None  # nothing is known of it


@pytest.mark.slow
def test_a_kill_before_any_operation_of_a_save_leaves_one_to_resume_from(folder: Path) -> None:
    """Each operation on files of a save of the last and a copy to the best, in a process each."""
    n_kills = 0
    while True:
        last = number(folder / LAST)
        child = os.fork()
        if not child:
            try:
                aim([str(folder)], n_kills + 1, signal.SIGKILL)
                save(folder, last + 1)
                duplicate(folder / LAST, folder / BEST)
            finally:
                os._exit(0)
        if not os.waitpid(child, 0)[1]:
            break
        n_kills += 1
        path = checkpoint_to_resume(folder)
        assert path is not None
        assert number(path) in (last, last + 1)
        assert number(folder / BEST) <= number(path)
        if (folder / PREVIOUS).exists():
            number(folder / PREVIOUS)
        if path.name == PREVIOUS:  # the moment between the two renames
            save(folder, last)
    assert n_kills > 15
    assert number(folder / LAST) == number(folder / BEST) == last + 1


def test_a_full_disk_keeps_the_last_checkpoint(folder: Path) -> None:
    import resource

    before = sorted(path.name for path in folder.iterdir())
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"cannot save .*last\.ckpt"):
            AtomicCheckpointIO().save_checkpoint({"x": torch.ones(100_000)}, folder / LAST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert number(folder / LAST) == 2
    assert sorted(path.name for path in folder.iterdir()) == before
