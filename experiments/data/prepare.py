"""Turns a source of text or of ids into a folder of tokens, once, and finds it again.

The folder's name ends in a hash of what determines its content: identity of the source, tokenizer,
settings. It is written under a temporary name and renamed at the end, so a folder that is there is
complete, and trusted.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig

from experiments.config.checks import Number, Optional, check_values
from experiments.config.identity import folder_name, plain
from experiments.config.targets import make
from experiments.data.sources import TextSource
from experiments.data.token_data import TokenData
from experiments.data.token_files import TokenSource, TokenSpan, checked_ids
from experiments.data.token_stream import count_bytes, token_dtype, write_tokens, xz_bits_per_byte
from experiments.data.tokenizer import Tokenizer
from experiments.system.files import remove, replacing, sha256

FORMAT = 1  # raised when the same settings would give other tokens


def prepare(config: DictConfig, root: str | Path) -> TokenData:
    """Open the tokens of a `data` config, made below `root` if they are not there.

    To find them, each call reads the source's files again, those above 256 MiB in samples: about a
    second for a gigabyte of smaller ones. While another process makes them, the call waits.

    Raises:
        ValueError, OSError: for bad input or a full disk; nothing half-made is left behind.
    """
    settings = plain(config)
    check(settings)
    source = make(settings["source"], TextSource, TokenSource)
    tokenizer = make(settings["tokenizer"], Tokenizer, partial=True)
    determines = {
        "format": FORMAT,
        "source": source.identity(),
        "tokenizer": _tokenizer_identity(settings["tokenizer"]),
        "val_tokens": settings["val_tokens"],
    }
    folder = Path(root, f"{settings['name']}-{_digest(determines)[:12]}")
    if not folder.is_dir():
        with _alone(folder):
            if not folder.is_dir():  # another process may have made it meanwhile
                with replacing(folder) as work:
                    work.mkdir()
                    _fill(work, source, tokenizer, settings)
    return TokenData(folder)


def check(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for values that no data could be prepared with."""
    folder_name(settings["name"], "data.name")
    check_values({"data": settings}, {"data.val_tokens": Optional(Number(2, whole=True))})
    size, ids = settings["vocab_size"], settings["tokenizer"].get("vocab_size")
    if size is not None and ids is not None and size != ids:
        raise ValueError(f"data.vocab_size={size}, but the tokenizer has {ids} ids")


def _tokenizer_identity(node: Mapping[str, Any]) -> dict[str, Any]:
    identity = dict(node)
    if "path" in identity:  # its content counts, not its name
        identity["sha256"] = sha256(Path(identity.pop("path")).expanduser())
    return identity


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time into the block, after removing what a killed one left behind."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".lock-{folder.name}"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process prepares {folder}: waiting for it", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        for left in folder.parent.glob(f".{folder.name}.*"):
            remove(left)
        yield
    finally:
        lock.release()


def _fill(
    work: Path,
    source: TextSource | TokenSource,
    tokenizer: Tokenizer | partial[Tokenizer],
    settings: Mapping[str, Any],
) -> None:
    if isinstance(tokenizer, partial):  # to be trained
        if isinstance(source, TokenSource):
            raise ValueError("data that came as ids has its tokenizer already: none can be trained")
        tokenizer = tokenizer(piece.text for piece in source.pieces("train"))
    if isinstance(source, TokenSource):
        parts = _refer_to_tokens(source, tokenizer, settings["val_tokens"])
    else:
        parts = _write_text(work, source, tokenizer, settings)
    dtype, train, val = parts["dtype"], parts["train"], parts["val"]
    held_out = TokenSpan(work / val["path"], dtype, val["offset"], val["n_tokens"]).array()
    hashes = {"train": train["sha256"], "val": val["sha256"], "tokenizer": tokenizer.hash}
    meta = {
        "name": settings["name"],
        "vocab_size": tokenizer.vocab_size,
        "n_train_tokens": train["n_tokens"],
        "n_val_tokens": val["n_tokens"],
        "n_val_bytes": count_bytes(held_out, tokenizer),
        "xz_bpb": xz_bits_per_byte(held_out, tokenizer),
        "fingerprint": _digest(hashes | {"dtype": dtype}),
        **parts,
        "settings": settings,
    }
    (work / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    (work / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _write_text(
    work: Path, source: TextSource, tokenizer: Tokenizer, settings: Mapping[str, Any]
) -> dict[str, Any]:
    name, n_val = settings["name"], settings["val_tokens"]
    val = write_tokens(
        work / "val.bin", source.pieces("val"), tokenizer, n_val, f"{name}: held out"
    )
    train = write_tokens(
        work / "train.bin", source.pieces("train"), tokenizer, None, name, source.size_hint()
    )
    parts = {"train": train, "val": val}
    for split, part in parts.items():
        if part["n_tokens"] < 2:
            raise ValueError(f"data {name!r} has no {split} text: check data.source")
    return {"dtype": token_dtype(tokenizer.vocab_size), **parts}


def _refer_to_tokens(
    source: TokenSource, tokenizer: Tokenizer, val_tokens: int | None
) -> dict[str, Any]:
    source.check()
    spans = source.spans(val_tokens)
    checked_ids(spans["val"].array(), tokenizer.vocab_size, spans["val"].path)
    return {"dtype": source.train.dtype} | {split: span.meta() for split, span in spans.items()}
