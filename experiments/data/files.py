"""Data files: which ones a source means, and what identifies their content wherever they are."""

import glob
import hashlib
from pathlib import Path

from experiments.system.files import sha256

WHOLE_UP_TO = 256 << 20  # bytes; larger files are identified by samples


def find_files(paths: str | list[str]) -> list[Path]:
    """Find the files that paths, folders (all below, hidden names excluded) and globs name.

    Returns:
        Each file once, sorted within a path; empty files are left out.

    Raises:
        FileNotFoundError: if a path names nothing, or nothing but empty files.
    """
    files: dict[Path, Path] = {}  # by real path, so that links do not repeat a file
    for pattern in [paths] if isinstance(paths, str) else paths:
        path = Path(pattern).expanduser()
        names = [str(path)] if path.exists() else sorted(glob.glob(str(path), recursive=True))
        found = [file for name in names for file in _files_below(Path(name))]
        filled = [file for file in found if file.stat().st_size]
        if not filled:
            raise FileNotFoundError(f"no data at {path}: no file, or nothing in it")
        for file in filled:
            files.setdefault(file.resolve(), file)
    return list(files.values())


def find_splits(
    paths: str | list[str], val_paths: str | list[str] | None
) -> tuple[list[Path], list[Path]]:
    """Find the training files and the held-out files (none without val_paths).

    Raises:
        FileNotFoundError, ValueError: as `find_files`, or if a file is on both sides.
    """
    train, val = find_files(paths), find_files(val_paths or [])
    real = {file.resolve() for file in train}
    for file in val:
        if file.resolve() in real:
            raise ValueError(f"{file} is both training and held-out text: name it on one side only")
    return train, val


def _files_below(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    inside = ((p, p.relative_to(path).parts) for p in sorted(path.rglob("*")))
    return [p for p, parts in inside if p.is_file() and not any(n.startswith(".") for n in parts)]


def content_id(path: Path) -> str:
    """Identify a file by SHA-256; above 256 MiB by size, time of change and samples.

    The time is included because samples alone would miss an edit that keeps the size. A copy of
    such a file therefore counts as another one unless its time was kept.
    """
    stat = path.stat()
    if stat.st_size <= WHOLE_UP_TO:
        return sha256(path)
    return f"{stat.st_size}-{stat.st_mtime_ns}-{sampled_sha256(path, 0, stat.st_size)}"


def sampled_sha256(path: Path, start: int, size: int, n_blocks: int = 64) -> str:
    """SHA-256 of evenly spaced blocks of 64 KiB of bytes [start, start + size) of a file.

    The blocks cover all of a span of up to n_blocks x 64 KiB.
    """
    block = 65536
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(n_blocks):
            at = max(0, size - block) * i // (n_blocks - 1)
            file.seek(start + at)
            digest.update(file.read(min(block, size - at)))
    return digest.hexdigest()
