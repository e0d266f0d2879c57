"""Whether a checkpoint on disk is the one that was written: ``checkpoints/checksums.json``.

It lists, by file name, the SHA-256 of every version that may be on disk: while a file is replaced
those of the old and of the new one.
"""

import hashlib
import json
import sys
from pathlib import Path

from experiments.system.files import sha256

CHECKSUMS = "checksums.json"


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and SHA-256s of a folder's files, as 64 hex digits."""
    if path.is_dir():
        files = [file for file in path.iterdir() if file.is_file()]
        return folder_digest({file.name: digest(file) for file in files})
    return sha256(path)


def folder_digest(digests: dict[str, str]) -> str:
    """`digest` of a folder with files of these names and SHA-256s."""
    lines = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def known_digests(folder: Path) -> dict[str, list[str]]:
    """By file name, what a checkpoint folder may hold; of a damaged list nothing (warned)."""
    path = folder / CHECKSUMS
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): [str(one) for one in digests] for name, digests in known.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError):
        print(
            f"warning: {path} is damaged, so the checkpoints beside it cannot be checked",
            file=sys.stderr,
            flush=True,
        )
        return {}


def is_whole(path: Path) -> bool | None:
    """Whether a checkpoint is as it was written; None if nothing is known of it."""
    known = known_digests(path.parent).get(path.name)
    return digest(path) in known if known else None
