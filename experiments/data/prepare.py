"""Turns a source of text or of ids into a folder of tokens, once, and finds it again.

`prepare` streams: documents are tokenized in batches a few ahead of the writer, so memory does not
grow with the input. The cores are kept busy by the tokenizers library, whose threads work outside
Python's lock: there are no worker processes to start, to feed, or to leave behind. All is written
under a temporary name and renamed at the end.
"""

from __future__ import annotations

import errno
import hashlib
import json
import lzma
import os
import shutil
import socket
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from experiments.data.sources import Piece, TextSource
from experiments.data.tokenizer import Tokenizer

FORMAT = 1  # raised when the same settings would give other tokens
BATCH_CHARS = 1 << 20
XZ_BYTES = 16 << 20
TOKEN_DTYPES = ("uint8", "uint16", "int32")


def prepare(
    cfg: DictConfig | Mapping[str, Any], root: str | os.PathLike[str] | None = None
) -> Path:
    """The folder with the tokens of a `data` config, made below `root` (cfg.root) if need be.

    Raises ValueError or FileNotFoundError in one line for bad input, OSError in one line for a full
    disk; nothing half-made is left behind.
    """
    settings = _settings(cfg)
    source, tokenizer = _build(settings["source"]), _build(settings["tokenizer"])
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
    if (final / "meta.json").is_file():
        return final
    with _work_folder(final) as work:
        if not isinstance(tokenizer, Tokenizer):  # a recipe that wants the training text
            tokenizer = tokenizer(text for text, _ in source.pieces("train"))
        meta = _write_text(source, tokenizer, settings, work)
        tokens = {split: meta[split]["sha256"] for split in ("train", "val")}
        meta["fingerprint"] = _digest(
            {**tokens, "dtype": meta["dtype"], "tokenizer": tokenizer.hash}
        )
        (work / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        (work / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    return final


def token_dtype(vocab_size: int) -> str:
    """The smallest type of TOKEN_DTYPES that holds ids below vocab_size."""
    for dtype in TOKEN_DTYPES:
        if vocab_size - 1 <= np.iinfo(dtype).max:
            return dtype
    raise ValueError(f"vocab_size={vocab_size} does not fit into {TOKEN_DTYPES[-1]}")


def _settings(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    node = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(dict(cfg))
    try:
        missing = sorted(OmegaConf.missing_keys(node))
        if missing:
            raise ValueError(
                f"data config: {', '.join(missing)} must be given (data.{missing[0]}=...)"
            )
        settings = OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"data config: {str(error).splitlines()[0]}") from None
    assert isinstance(settings, dict)
    val_tokens = settings["val_tokens"]
    if val_tokens is not None and val_tokens < 2:
        raise ValueError(f"data.val_tokens={val_tokens}: held-out text needs at least 2 tokens")
    return {str(key): value for key, value in settings.items()}


def _build(node: Any) -> Any:
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ValueError | OSError):
            raise cause from None
        raise ValueError(" ".join(str(error).split())) from None


def _tokenizer_identity(node: Mapping[str, Any]) -> dict[str, Any]:
    identity = dict(node)
    if "path" in identity:  # the content counts, not the place
        path = Path(identity.pop("path")).expanduser()
        identity["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return identity


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextmanager
def _work_folder(final: Path) -> Iterator[Path]:
    """A folder that becomes `final` when the block succeeds and vanishes when it does not."""
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _sweep(final.parent)
        work = final.parent / f".tmp-{final.name}-{socket.gethostname()}-{os.getpid()}"
        work.mkdir()
    except OSError as error:
        raise _disk_error(error, final.parent) from None
    try:
        yield work
        try:
            work.rename(final)
        except OSError:
            if not (final / "meta.json").is_file():  # else another process was first: same content
                raise
    except OSError as error:
        raise _disk_error(error, final.parent) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sweep(root: Path) -> None:
    """Removes what a killed process of this machine left."""
    for work in root.glob(f".tmp-*-{socket.gethostname()}-*"):
        pid = work.name.rpartition("-")[2]
        if pid == str(os.getpid()) or not psutil.pid_exists(int(pid)):
            shutil.rmtree(work, ignore_errors=True)


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
    dtype = token_dtype(tokenizer.vocab_size)
    label = settings["name"]
    arrays = {
        "val": _tokens(source.pieces("val"), tokenizer, dtype, f"{label}: held-out text", None),
        "train": _tokens(source.pieces("train"), tokenizer, dtype, label, source.size_hint()),
    }
    files = {
        "val": _write_tokens(work / "val.bin", arrays["val"], settings["val_tokens"]),
        "train": _write_tokens(work / "train.bin", arrays["train"], None),
    }
    for split, file in files.items():
        if file["n_tokens"] < 2:
            raise ValueError(f"data {label!r} has no {split} text: check its source")
    val = np.memmap(work / "val.bin", dtype=dtype, mode="r")
    return {
        "format": FORMAT,
        "name": label,
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.kind,
        "tokenizer_hash": tokenizer.hash,
        "n_train_tokens": files["train"]["n_tokens"],
        "n_val_tokens": files["val"]["n_tokens"],
        "n_val_bytes": count_bytes(val, tokenizer),
        "xz_bpb": xz_bits_per_byte(val, tokenizer),
        "train": files["train"],
        "val": files["val"],
        "source": settings["source"],
    }


def _tokens(
    pieces: Iterable[Piece], tokenizer: Tokenizer, dtype: str, label: str, total: int | None
) -> Iterator[np.ndarray]:
    """Token arrays in the order of the documents; at most three batches wait for the writer."""

    def encode(batch: list[Piece]) -> np.ndarray:
        eot = np.array([tokenizer.eot_id])
        parts: list[np.ndarray] = []
        for (_, ends), ids in zip(
            batch, tokenizer.encode_arrays([text for text, _ in batch]), strict=True
        ):
            parts += [ids, eot] if ends else [ids]
        return np.concatenate(parts).astype(dtype)

    waiting: deque[tuple[Future[np.ndarray], int]] = deque()
    bar = tqdm(desc=label, total=total, unit="B", unit_scale=True, disable=None, leave=False)
    pool = ThreadPoolExecutor(2)  # one turns ids into arrays while the other tokenizes
    try:
        for batch in _batches(pieces):
            n_chars = sum(len(text) for text, _ in batch)
            waiting.append((pool.submit(encode, batch), n_chars))
            if len(waiting) == 3:
                future, n_done = waiting.popleft()
                yield future.result()
                bar.update(n_done)
        for future, n_done in waiting:
            yield future.result()
            bar.update(n_done)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        bar.close()


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    n_chars = 0
    for piece in pieces:
        batch.append(piece)
        n_chars += len(piece[0])
        if n_chars >= BATCH_CHARS:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch


def _write_tokens(path: Path, arrays: Iterable[np.ndarray], limit: int | None) -> dict[str, Any]:
    digest, n_tokens = hashlib.sha256(), 0
    with path.open("wb") as file:
        for ids in arrays:
            ids = ids[: None if limit is None else limit - n_tokens]
            file.write(ids.data)
            digest.update(ids.data)
            n_tokens += len(ids)
            if n_tokens == limit:
                break
    return {"path": path.name, "offset": 0, "n_tokens": n_tokens, "sha256": digest.hexdigest()}


def count_bytes(ids: np.ndarray, tokenizer: Tokenizer) -> int | None:
    """UTF-8 bytes that ids decode to, separators excluded; None when the tokenizer cannot tell."""
    sizes = tokenizer.token_bytes()
    if sizes is None:
        return None
    return sum(int(sizes[part].sum()) for part in _blocks(ids))


def xz_bits_per_byte(ids: np.ndarray, tokenizer: Tokenizer) -> float | None:
    """Bits per byte of xz (preset 9e) over the text of ids, 16 MiB at most; None without text."""
    if tokenizer.kind == "ids":
        return None
    text = bytearray()
    for part in _blocks(ids):
        text += tokenizer.decode_bytes(part)
        if len(text) >= XZ_BYTES:
            break
    if not text:
        return None
    packed = lzma.compress(bytes(text[:XZ_BYTES]), preset=9 | lzma.PRESET_EXTREME)
    return 8 * len(packed) / min(len(text), XZ_BYTES)


def _blocks(ids: np.ndarray, size: int = 1 << 20) -> Iterator[np.ndarray]:
    for start in range(0, len(ids), size):
        yield np.asarray(ids[start : start + size])
