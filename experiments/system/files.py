"""Files that are whole or not there: written under a temporary name, then renamed."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A temporary name beside a file or folder; what is still there at the end is removed."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield temporary
    finally:
        remove(temporary)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary name beside a file or folder, which takes its place if all goes well.

    Raises:
        OSError: if it cannot be written, with the name of the target.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with beside(target) as temporary:
        try:
            yield temporary
            replace(temporary, target)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(target)) from None


def write_json(path: Path, obj: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    write_text(path, json.dumps(obj, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text, to the disk, so that the file is either the old one or the whole new one."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_new(path: Path, text: str) -> bool:
    """Write a file that does not exist yet; False, and nothing is done, if another process has."""
    with beside(path) as temporary:
        write_text(temporary, text)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            os.replace(temporary, path)
    return True


def replace(source: Path, target: Path) -> None:
    """Rename a file or folder, whatever stood in its place."""
    aside = target.with_name(f".{target.name}.old")
    if target.exists() and (target.is_dir() or source.is_dir()):
        remove(aside)
        os.replace(target, aside)  # a folder replaces nothing by itself, and takes long to remove
    os.replace(source, target)
    remove(aside)


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """SHA-256 of a file, as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
