"""Checkpoints on disk: whole or not there, checked when read, the last one and the one before.

``last.ckpt`` and ``best.ckpt`` are written beside their place and renamed into it; what was
``last.ckpt`` becomes ``previous.ckpt``. A kill between any two of these steps leaves a checkpoint
to resume from, and ``checksums.json`` knows it.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from experiments.runs.checkpoints.checksums import CHECKSUMS, digest, is_whole, known_digests
from experiments.runs.checkpoints.reading import read_checkpoint
from experiments.system.files import beside, replace, sync, write_json

LAST, PREVIOUS, BEST, DAMAGED = "last.ckpt", "previous.ckpt", "best.ckpt", "damaged.ckpt"


class HashedFile:
    """What torch.save writes into: a file whose SHA-256 is known when it is done."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "wb")  # noqa: SIM115  # closed by whoever closes this
        self.sha256 = hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def write(checkpoint: dict[str, Any], path: Path) -> str:
    """Write a file with torch.save, to the disk; return its SHA-256."""
    file = HashedFile(path)
    try:
        torch.save(checkpoint, file)  # type: ignore[arg-type]  # write and flush suffice
        file.flush()
    finally:
        file.close()
    return file.sha256.hexdigest()


@contextmanager
def saving(target: Path) -> Iterator[None]:
    """Within it, what keeps a checkpoint from being written is an OSError with its name."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise OSError(
                cause.errno, f"cannot save {target} ({cause.strerror}); what was saved is kept"
            ) from None
        raise


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's way to files, through `put`: a kill or a full disk leaves what was there."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None
    ) -> None:
        target = Path(path)
        with saving(target), beside(target) as new:
            try:
                write_and_put(checkpoint, new, target)
            except FileNotFoundError:  # somebody removed the folder meanwhile
                write_and_put(checkpoint, new, target)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))  # on any device, without its code, whatever is asked


class BackgroundCheckpointIO(AtomicCheckpointIO):
    """Writes in a thread, one file at a time, what was copied to main memory before.

    Lightning's AsyncCheckpointIO copies within the device's memory, and lets copies pile up if
    saves come faster than they are written.
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[None] | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None
    ) -> None:
        """Copy a checkpoint and have it written, once the one before is.

        Raises:
            OSError: if the one before could not be written.
        """
        self.teardown()
        copy = apply_to_collection(checkpoint, Tensor, lambda x: x.detach().to("cpu", copy=True))
        self.writing = self.thread.submit(super().save_checkpoint, copy, path)

    def has_failed(self) -> bool:
        """Whether the last file could not be written; `teardown` raises why."""
        return self.writing is not None and self.writing.done() and bool(self.writing.exception())

    def teardown(self) -> None:
        """Wait until all is written; raise what went wrong, once."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()


def write_and_put(checkpoint: dict[str, Any], new: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    put(new, target, write(checkpoint, new))


def put(new: Path, target: Path, sha256: str) -> None:
    """Rename a whole new checkpoint, a file or a folder beside its target, into its place."""
    folder, known = target.parent, known_digests(target.parent)
    meanwhile = {**known, target.name: [sha256, *known.get(target.name, [])]}
    after = {**known, target.name: [sha256]}
    rotates = target.name == LAST and target.exists()
    if rotates:
        after[PREVIOUS] = known.get(LAST, [])  # empty if nothing is known of it
        both = [*known.get(LAST, []), *known.get(PREVIOUS, [])]
        meanwhile[PREVIOUS] = both if known.get(LAST) else []
    write_json(folder / CHECKSUMS, meanwhile)
    if rotates:
        replace(target, folder / PREVIOUS)
    replace(new, target)
    sync(folder)
    write_json(folder / CHECKSUMS, after)


def duplicate(source: Path, target: Path) -> None:
    """Make a checkpoint a copy of another one."""
    with beside(target) as new:
        if source.is_dir():
            shutil.copytree(source, new)
        else:
            shutil.copyfile(source, new)
        for path in [new, *(new.iterdir() if new.is_dir() else ())]:
            sync(path)
        put(new, target, digest(new))


def checkpoint_to_resume(folder: Path) -> Path | None:
    """The checkpoint of a folder that a run resumes from, or None if there is none.

    The last one if it is whole; else, with a warning, the one before. A damaged last one is
    renamed, lest it takes the place of the good one at the next save.

    Raises:
        ValueError: if no checkpoint that is there is whole.
    """
    damage = ""
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            check(path)
        except ValueError as error:
            damage = damage or str(error)
            continue
        if path.name == PREVIOUS:
            rank_zero_only(fall_back)(folder, damage)
        return path
    if damage:
        raise ValueError(
            f"{damage}, and there is no whole {PREVIOUS} either: remove {folder.parent} to train "
            "again"
        )
    return None


def fall_back(folder: Path, damage: str) -> None:
    """Warn that a run resumes from the checkpoint before the last; put the last one aside."""
    reason = damage or f"{folder / LAST} is missing"
    print(f"warning: {reason}; resuming from {PREVIOUS}", file=sys.stderr, flush=True)
    if (folder / LAST).exists():
        replace(folder / LAST, folder / DAMAGED)


def check(path: Path) -> None:
    """Raise ValueError if a checkpoint is damaged."""
    if not is_whole(path):  # read_checkpoint says why, or finds that nothing is known against it
        read_checkpoint(path)
