"""Answers to requests, on disk as soon as there are any: a killed evaluation resumes from there."""

import hashlib
import json
from pathlib import Path
from typing import Any, TextIO


class Journal:
    """An append-only file of one evaluation and process, beside those of its other processes.

    Args:
        folder: where the files are, or None to keep answers in memory alone.
        task: the task's name; files are `<task>.partial-<hash>-<rank>.jsonl`.
        protocol: everything that decides an answer, the task aside.
        rank: this process's number; the files of all are read.
    """

    def __init__(
        self,
        folder: Path | None = None,
        task: str = "",
        protocol: dict[str, Any] | None = None,
        rank: int = 0,
    ) -> None:
        self.answers: dict[str, Any] = {}
        self._folder, self._task, self._rank = folder, task, rank
        self._hash = protocol_hash(protocol or {})
        self._file: TextIO | None = None
        if folder is not None:
            for path in sorted(folder.glob(f"{task}.partial-{self._hash[:12]}-*.jsonl")):
                self.answers |= _read(path)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *failure: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def add(self, answers: dict[str, Any]) -> None:
        """Keep answers by the key of their request; they are on disk when this returns."""
        self.answers |= answers
        if self._folder is None or not answers:
            return
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            name = f"{self._task}.partial-{self._hash[:12]}-{self._rank}.jsonl"
            self._file = open(self._folder / name, "a+", encoding="utf-8")  # noqa: SIM115
            self._file.write("\n")  # a line that a kill cut short ends here
        lines = (json.dumps([key, answer]) for key, answer in answers.items())
        self._file.write("\n".join([*lines, ""]))
        self._file.flush()

    def discard(self) -> None:
        """Remove the files of this task, of every process and protocol: its result is written."""
        assert self._folder is not None
        for path in self._folder.glob(f"{self._task}.partial-*-*.jsonl"):
            path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    answers = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            key, answer = json.loads(line)
        except (ValueError, TypeError):
            continue  # empty, or cut short
        answers[key] = answer
    return answers


def protocol_hash(protocol: dict[str, Any]) -> str:
    """Hash of a protocol, 64 hex digits."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()


def request_key(*parts: Any) -> str:
    """A short name for a request, equal for equal ones alone."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=12).hexdigest()
