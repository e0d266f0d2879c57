"""A disk that is full, or can only be read: one clear line, and everything before it is kept."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.config.entry import RunFailed
from experiments.runs.checkpoints.files import checkpoint_to_resume
from experiments.runs.run_dir import RunDir
from experiments.training.fit import attempt
from experiments.training.module import LitLM

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="mounting a small disk takes root on Linux"
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", path], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def at_step_12(monkeypatch: pytest.MonkeyPatch, action: Callable[[], Any]) -> None:
    original = LitLM.configure_gradient_clipping

    def patched(self: LitLM, *args: Any, **kwargs: Any) -> None:
        if self.trainer.global_step == 11:
            self.trainer.strategy.checkpoint_io.teardown()  # nothing is being written
            action()
        original(self, *args, **kwargs)

    monkeypatch.setattr(LitLM, "configure_gradient_clipping", patched)


def fill(disk: Path) -> None:
    with open(disk / "full", "wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass


def make_readonly(folder: Path) -> None:
    for options in (["--bind", folder], ["-o", "remount,bind,ro"]):
        subprocess.run(["mount", *options, folder], check=True)


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_fails_under_a_running_job(
    freeze: Callable[..., RunDir], undisturbed: Callable[[str], tuple[RunDir, float]],
    same_end: Callable[[RunDir, RunDir], None], disk: Path, monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:  # fmt: skip
    run = freeze(disk)
    folder = run.path / "checkpoints"
    with monkeypatch.context() as patch:
        at_step_12(patch, lambda: fill(disk) if fault == "full" else make_readonly(folder))
        with pytest.raises(RunFailed) as failure:
            attempt(run)
    message = str(failure.value)
    assert "\n" not in message
    assert ("No space left on device" if fault == "full" else "Read-only file system") in message
    assert str(run.path) in message
    assert checkpoint_to_resume(folder) == folder / "last.ckpt"
    with pytest.raises((RunFailed, OSError), match=re.escape(str(run.path))):  # still
        attempt(RunDir(run.path))
    if fault == "full":
        (disk / "full").unlink()
    else:
        subprocess.run(["umount", folder], check=True)
    attempt(RunDir(run.path))
    same_end(undisturbed("rwkv4")[0], run)


def test_a_disk_that_can_only_be_read_from_the_start(
    freeze: Callable[..., RunDir], disk: Path
) -> None:
    run = freeze(disk)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises((OSError, ValueError), match="Read-only file system"):
        attempt(run)
