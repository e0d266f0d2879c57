"""Finding data files and telling whether they are the same as before, wherever they lie."""

from __future__ import annotations

import glob
import hashlib
from pathlib import Path

SAMPLED_FROM = 4 << 20  # bytes; larger files are identified by samples


def find_files(paths: str | list[str]) -> list[Path]:
    """Files named by paths, folders (all below but hidden names) and globs, sorted by name.

    Raises FileNotFoundError for a path that names nothing and ValueError for a file without
    content.
    """
    files: list[Path] = []
    for pattern in [paths] if isinstance(paths, str) else paths:
        path = Path(pattern).expanduser()
        matches = (
            [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        )
        found = [file for match in matches for file in _below(match)]
        if not found:
            raise FileNotFoundError(f"no data file at {path}")
        files += found
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"data file {file} is empty")
    return files


def _below(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    inside = ((p, p.relative_to(path).parts) for p in sorted(path.rglob("*")))
    return [p for p, parts in inside if p.is_file() and not any(n.startswith(".") for n in parts)]


def content_id(path: Path) -> str:
    """Identifies a file wherever it lies: SHA-256, or above 4 MiB size, time and samples."""
    stat = path.stat()
    if stat.st_size <= SAMPLED_FROM:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{stat.st_size}-{stat.st_mtime_ns}-{sampled_sha256(path, 0, stat.st_size)}"


def sampled_sha256(path: Path, start: int, size: int, n_blocks: int = 64) -> str:
    """SHA-256 of n_blocks evenly spaced blocks of 64 KiB of bytes [start, start + size) of a file.

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
