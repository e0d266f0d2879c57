"""Small sources of every kind, and the configs that prepare them."""

import gzip
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from experiments.data.sources import Piece

ROOM = "experiments.data"
BYTES = {"_target_": f"{ROOM}.tokenizer.BytesTokenizer", "vocab_size": 256}
IDS = {"_target_": f"{ROOM}.tokenizer.IdsTokenizer", "vocab_size": 100}
BPE = {
    "_target_": f"{ROOM}.tokenizer.train_bpe",
    "_partial_": True,
    "vocab_size": 300,
    "max_chars": 100_000,
}
CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}  # Megatron's


def config(kind: str, tokenizer: dict[str, Any] = BYTES, **settings: Any) -> DictConfig:
    """A data config; settings of `kind` ("sources.TextFiles") and of the config itself."""
    top = {"name": "small", "vocab_size": None, "val_tokens": 500, "seed": 0}
    own = {key: settings.pop(key) for key in list(settings) if key in top}
    source = {"_target_": f"{ROOM}.{kind}", **settings}
    return OmegaConf.create(top | own | {"source": source, "tokenizer": tokenizer})


def text(paths: Path, **settings: Any) -> DictConfig:
    return config("sources.TextFiles", paths=str(paths), **settings)


def write_jsonl(path: Path, texts: Iterable[str], field: str = "text") -> None:
    lines = "".join(json.dumps({field: one}) + "\n" for one in texts).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


def write_megatron(prefix: Path, sizes: list[int], dtype: str = "uint16") -> np.ndarray:
    tokens = (np.arange(sum(sizes)) * 7 % 100).astype(dtype)
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    pointers = (np.cumsum([0, *sizes[:-1]]) * tokens.itemsize).astype("<i8")
    documents = np.arange(len(sizes) + 1, dtype="<i8")
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, CODES[dtype], len(sizes), len(documents))
    index = header + np.array(sizes, "<i4").tobytes() + pointers.tobytes() + documents.tobytes()
    Path(f"{prefix}.idx").write_bytes(index)
    return tokens


def documents(pieces: Iterable[Piece]) -> list[str]:
    """The documents that pieces make up."""
    whole, part = [], ""
    for piece in pieces:
        part += piece.text
        if piece.ends_document:
            whole.append(part)
            part = ""
    assert part == ""
    return whole
