"""Prepared tokens, mapped from their files."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.token_files import TokenSpan
from experiments.data.tokenizer import Tokenizer


class TokenData:
    """A folder that `prepare` made.

    Attributes:
        path: the folder.
        meta: the content of its meta.json.
        fingerprint: hash of tokens and tokenizer, 64 hex digits.
        vocab_size: ids of the tokenizer.
        tokenizer: what made the tokens.
        train: ids, mapped read-only.
        val: ids held out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.meta: dict[str, Any] = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        self.fingerprint: str = self.meta["fingerprint"]
        self.vocab_size: int = self.meta["vocab_size"]
        self.tokenizer = Tokenizer.from_json((path / "tokenizer.json").read_text(encoding="utf-8"))
        self.train, self.val = self._tokens("train"), self._tokens("val")

    def __reduce__(self) -> tuple[type["TokenData"], tuple[Path]]:
        return TokenData, (self.path,)  # a worker maps the files itself

    def _tokens(self, split: str) -> np.ndarray:
        part = self.meta[split]
        file = self.path / part["path"]  # an absolute path stands for itself
        return TokenSpan(file, self.meta["dtype"], part["offset"], part["n_tokens"]).array()
