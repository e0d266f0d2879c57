"""Turns a source of text or of ids into a folder of tokens, once, and finds it again.

The folder's name ends in a hash of what determines its content: identity of the source, tokenizer,
settings. Everything is written under a temporary name and renamed at the end, so a folder that is
there is complete. Who makes it holds a lock of the operating system, which ends with its process;
the empty file `.lock-...` that bears the lock stays and means nothing by itself.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config.identity import folder_name
from experiments.config.targets import make
from experiments.data.sources import TextSource
from experiments.data.token_files import TokenSource, check_ids
from experiments.data.token_stream import (
    count_bytes,
    token_arrays,
    token_dtype,
    write_tokens,
    xz_bits_per_byte,
)
from experiments.data.tokenizer import Tokenizer

FORMAT = 1  # raised when the same settings would give other tokens
WORK = ".tmp-"  # how names of unfinished folders start


def prepare(
    cfg: DictConfig | Mapping[str, Any], root: str | os.PathLike[str] | None = None
) -> Path:
    """The folder with the tokens of a `data` config, made below `root` (cfg.root) if need be.

    To find it, each call reads the source's files again, those above 256 MiB in samples: about a
    second for a gigabyte of smaller ones. While another process makes it, the call waits.

    Raises ValueError or FileNotFoundError in one line for bad input, OSError in one line for a full
    disk; nothing half-made is left behind.
    """
    settings = _settings(cfg)
    source = make(settings["source"], TextSource, TokenSource)
    tokenizer = make(settings["tokenizer"], Tokenizer, partial=True)
    _check_vocabulary(settings.get("vocab_size"), tokenizer)
    key = _digest(
        {
            "format": FORMAT,
            "source": source.identity(),
            "tokenizer": _tokenizer_identity(settings["tokenizer"]),
            "val_tokens": settings["val_tokens"],
        }
    )
    root = Path(root or settings["root"])
    final = root / f"{settings['name']}-{key[:12]}"
    if _is_made(final):
        return final
    with _disk_errors(root), _locked(final):
        if _is_made(final):  # by another process, meanwhile
            return final
        with _work_folder(final) as work:
            _fill(work, source, tokenizer, settings)
    return final


def _is_made(final: Path) -> bool:
    if (final / "meta.json").is_file():
        return True
    if final.exists():
        raise ValueError(f"{final} is not complete (no meta.json): delete it")
    return False


def _fill(
    work: Path,
    source: TextSource | TokenSource,
    tokenizer: Tokenizer | partial[Tokenizer],
    settings: Mapping[str, Any],
) -> None:
    is_text = hasattr(source, "pieces")
    if isinstance(tokenizer, partial):  # a recipe that wants the training text
        if not is_text:
            raise ValueError("data that came as ids has its tokenizer already: none can be trained")
        tokenizer = tokenizer(text for text, _ in cast(TextSource, source).pieces("train"))
    if is_text:
        parts = _write_text(cast(TextSource, source), tokenizer, settings, work)
    else:
        parts = _refer_to_tokens(cast(TokenSource, source), tokenizer, settings)
    meta = _complete(parts, tokenizer, settings)
    (work / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    (work / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _settings(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    node = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(dict(cfg))
    missing = _missing(OmegaConf.to_container(node), "data")
    if missing:
        raise ValueError(f"data config: {', '.join(missing)} must be given ({missing[0]}=...)")
    try:
        settings = OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"data config: {str(error).splitlines()[0]}") from None
    assert isinstance(settings, dict)
    folder_name(settings["name"], "data.name")
    val_tokens = settings["val_tokens"]
    if val_tokens is not None and not (isinstance(val_tokens, int) and val_tokens >= 2):
        raise ValueError(f"data.val_tokens={val_tokens} must be a whole number, 2 or more")
    return {str(key): value for key, value in settings.items()}


def _missing(node: Any, name: str) -> list[str]:
    if isinstance(node, dict):
        return [key for k, v in node.items() for key in _missing(v, f"{name}.{k}")]
    return [name] if node == "???" else []


def _check_vocabulary(size: int | None, tokenizer: Tokenizer | partial[Tokenizer]) -> None:
    """The model's vocabulary follows data.vocab_size; null leaves it to what is prepared."""
    if isinstance(tokenizer, partial):
        actual = tokenizer.keywords["vocab_size"]
    else:
        actual = tokenizer.vocab_size
    if size not in (None, actual):
        raise ValueError(f"data.vocab_size={size}, but the tokenizer has {actual} ids")


def _tokenizer_identity(node: Mapping[str, Any]) -> dict[str, Any]:
    identity = dict(node)
    if "path" in identity:  # the content counts, not the place
        path = Path(identity.pop("path")).expanduser()
        identity["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return identity


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextmanager
def _locked(final: Path) -> Iterator[None]:
    """Lets one process at a time into the block; the others wait."""
    final.parent.mkdir(parents=True, exist_ok=True)
    with _lock_file(final.parent, final.name) as lock:
        if not _acquire(lock):
            print(f"another process prepares {final}: waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _lock_file(root: Path, name: str) -> IO[bytes]:
    return (root / f".lock-{name}").open("ab")


def _acquire(lock: IO[bytes]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _work_folder(final: Path) -> Iterator[Path]:
    """A folder that becomes `final` when the block succeeds and vanishes when it does not."""
    _sweep(final.parent)
    work = final.parent / f"{WORK}{final.name}"
    shutil.rmtree(work, ignore_errors=True)  # ours, of a process that was killed
    work.mkdir()
    try:
        yield work
        work.rename(final)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sweep(root: Path) -> None:
    """Removes what killed processes left: work folders whose lock nobody holds."""
    for work in root.glob(f"{WORK}*"):
        name = work.name.removeprefix(WORK)
        if not (root / f".lock-{name}").is_file():
            continue  # somebody else's folder
        with _lock_file(root, name) as lock:
            if _acquire(lock):
                shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _disk_error(error, root) from None


def _disk_error(error: OSError, root: Path) -> OSError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return _one_line(
            error, f"disk full while preparing data in {root}: free space or set data.root"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename is not None:
        return _one_line(
            error, f"cannot use {error.filename} ({error.strerror}): check its permissions"
        )
    return error


def _one_line(error: OSError, message: str) -> OSError:
    clear = OSError(message)
    clear.errno = error.errno
    return clear


def _write_text(
    source: TextSource, tokenizer: Tokenizer, settings: Mapping[str, Any], work: Path
) -> dict[str, Any]:
    dtype, name = token_dtype(tokenizer.vocab_size), settings["name"]
    val = token_arrays(source.pieces("val"), tokenizer, dtype, f"{name}: held out", None)
    train = token_arrays(source.pieces("train"), tokenizer, dtype, name, source.size_hint())
    meta: dict[str, Any] = {
        "dtype": dtype,
        "val": write_tokens(work / "val.bin", val, settings["val_tokens"]),
        "train": write_tokens(work / "train.bin", train, None),
    }
    for split in ("train", "val"):
        if meta[split]["n_tokens"] < 2:
            raise ValueError(f"data {name!r} has no {split} text: check data.source")
    return meta | _measure(np.memmap(work / "val.bin", dtype, mode="r"), tokenizer)


def _refer_to_tokens(
    source: TokenSource, tokenizer: Tokenizer, settings: Mapping[str, Any]
) -> dict[str, Any]:
    spans = source.spans(settings["val_tokens"])
    dtype = spans["train"].dtype
    if tokenizer.vocab_size - 1 > np.iinfo(dtype).max:
        raise ValueError(
            f"vocab_size={tokenizer.vocab_size} is larger than the {dtype} tokens of"
            f" {spans['train'].path} can say: wrong tokenizer or wrong file"
        )
    for span in spans.values():
        check_ids(span, tokenizer.vocab_size)
    meta = {split: span.meta() for split, span in spans.items()}
    return {"dtype": dtype, **meta, **_measure(spans["val"].array(), tokenizer)}


def _measure(val: np.ndarray, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "n_val_bytes": count_bytes(val, tokenizer),
        "xz_bpb": xz_bits_per_byte(val, tokenizer),
    }


def _complete(
    parts: dict[str, Any], tokenizer: Tokenizer, settings: Mapping[str, Any]
) -> dict[str, Any]:
    hashes = {k: parts[k].get("sha256", parts[k].get("sampled_sha256")) for k in ("train", "val")}
    return {
        "format": FORMAT,
        "name": settings["name"],
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.kind,
        "tokenizer_hash": tokenizer.hash,
        "n_train_tokens": parts["train"]["n_tokens"],
        "n_val_tokens": parts["val"]["n_tokens"],
        "fingerprint": _digest({**hashes, "dtype": parts["dtype"], "tokenizer": tokenizer.hash}),
        **parts,
        "settings": settings,
    }
