"""Prepared folders: found again by content, whole or not there, made by one process."""

import json
import lzma
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.data.prepare import prepare

from .small_data import BPE, BYTES, IDS, ROOM, config, text, write_megatron

REPOSITORY = Path(__file__).parents[3]

# a source for processes that are to be disturbed, in documents of 1 MB, and what reads it
SLOW = """
import sys, time
from pathlib import Path
from omegaconf import OmegaConf
from experiments.data import prepare as module
from experiments.data.sources import Piece, TextSource

class Slow(TextSource):
    def identity(self):
        return {"kind": "slow"}
    def pieces(self, split):
        with Path("readings").open("a") as file:
            file.write(split + "\\n")
        if split == "val":
            yield Piece("held out " * 50, True)
            return
        time.sleep(0.3)
        for i in range(int(sys.argv[1])):
            if i == 8:
                Path("started").touch()  # tokens have been written
            yield Piece(f"{i} " + "some text " * 100_000, True)

ours = module.make
def make(node, *kinds, **how):  # a config cannot name what is not the project's
    return Slow() if node == {"slow": 1} else ours(node, *kinds, **how)
module.make = make

bytes_ = {"_target_": "experiments.data.tokenizer.BytesTokenizer", "vocab_size": 256}
cfg = {"name": "slow", "source": {"slow": 1}, "tokenizer": bytes_, "val_tokens": 200}
try:
    print(module.prepare(OmegaConf.create(cfg | {"vocab_size": 256}), "data").path, flush=True)
except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
"""


def visible(root: Path) -> list[str]:
    """What is in a root but for the locks, which stay."""
    return [p.name for p in root.glob("*") if not p.name.startswith(".lock-")]


def test_every_document_is_followed_by_a_separator(texts: Path, tmp_path: Path) -> None:
    data = prepare(text(texts, val_tokens=None), tmp_path / "data")
    contents = {p.read_bytes() for p in texts.iterdir()}
    parts = [bytes(tokens).split(b"\0") for tokens in (data.train, data.val)]
    assert [part[-1] for part in parts] == [b"", b""]
    assert {*parts[0][:-1], *parts[1][:-1]} == contents
    assert data.meta["dtype"] == "uint8"
    assert len(data.train) == data.meta["n_train_tokens"]


@pytest.mark.parametrize(("tokenizer", "limit"), [(BYTES, 4001), (BPE, 1501), (BYTES, None)])
def test_bits_per_byte_counts_exactly_the_held_out_text(
    texts: Path, tmp_path: Path, tokenizer: dict[str, Any], limit: int | None
) -> None:
    cfg = text(texts, tokenizer=tokenizer, val_tokens=limit, val_fraction=0.2)
    data = prepare(cfg, tmp_path / "data")
    assert limit is None or len(data.val) == limit
    assert data.tokenizer.eot_id in data.val
    exact = data.tokenizer.decode_bytes(data.val)
    assert data.meta["n_val_bytes"] == len(exact)
    whole = "".join(p.read_text(encoding="utf-8") for p in sorted(texts.iterdir()))
    assert exact[-100:].decode(errors="ignore") in whole
    packed = len(lzma.compress(exact, preset=9 | lzma.PRESET_EXTREME))
    assert data.meta["xz_bpb"] == pytest.approx(8 * packed / len(exact), rel=1e-12)


def test_prepared_data_is_found_again_by_content(texts: Path, tmp_path: Path) -> None:
    root, moved = tmp_path / "data", tmp_path / "elsewhere"
    first = prepare(text(texts), root).path
    stamp = (first / "meta.json").stat().st_mtime_ns
    texts.rename(moved)
    assert prepare(text(moved, seed=7), root).path == first
    assert (first / "meta.json").stat().st_mtime_ns == stamp
    others = {
        prepare(text(moved, val_tokens=400), root).path,
        prepare(text(moved, tokenizer=BPE), root).path,
    }
    (moved / "00.txt").write_text("changed")
    others.add(prepare(text(moved), root).path)
    assert len({first, *others}) == 4
    assert {p.parent for p in others} == {root}


def test_only_tokens_and_tokenizer_make_the_fingerprint(texts: Path, tmp_path: Path) -> None:
    made = prepare(text(texts, tokenizer=BPE), tmp_path / "one")
    assert prepare(text(texts, tokenizer=BPE), tmp_path / "two").fingerprint == made.fingerprint
    paths = set()
    for name in ("a.json", "b.json"):  # the tokenizer that was trained, out of a file
        (tmp_path / name).write_text(json.dumps(made.tokenizer.description()["tokenizer"]))
        read = {"_target_": f"{ROOM}.tokenizer.read_tokenizer", "path": str(tmp_path / name)}
        data = prepare(text(texts, tokenizer=read), tmp_path / "data")
        paths.add(data.path)
        assert data.fingerprint == made.fingerprint
    assert len(paths) == 1
    assert made.tokenizer.decode(made.train.tolist()).count("file ") == 29


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
def test_token_files_are_used_where_they_are(tmp_path: Path, dtype: str) -> None:
    tokens = write_megatron(tmp_path / "doc", [300, 1, 499, 200], dtype)
    held_out = write_megatron(tmp_path / "val", [300], dtype)
    cfg = config("token_files.Megatron", IDS, prefix=str(tmp_path / "doc"), val_tokens=100)
    data = prepare(cfg, tmp_path / "data")
    assert np.array_equal(data.train, tokens[:900])
    assert np.array_equal(data.val, tokens[900:])
    assert data.meta["dtype"] == dtype
    assert (data.meta["n_val_bytes"], data.meta["xz_bpb"]) == (None, None)
    assert sorted(p.name for p in data.path.iterdir()) == ["meta.json", "tokenizer.json"]
    cfg.source.val_prefix = str(tmp_path / "val")
    data = prepare(cfg, tmp_path / "data")
    assert np.array_equal(data.train, tokens)
    assert np.array_equal(data.val, held_out[:100])


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    path = tmp_path / "big.txt"
    with path.open("wb") as file:
        for i in range(48):
            file.write(f"block {i}\n".encode() + b"0123456789abcde\n" * 65536)
    tracemalloc.start()
    data = prepare(text(path), tmp_path / "data")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert data.meta["n_train_tokens"] > 48e6
    assert peak < 24e6


def start(folder: Path, n_documents: int, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, str(n_documents)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def start_without_end(folder: Path) -> subprocess.Popen[str]:
    process = start(folder, 10**9)
    deadline = time.monotonic() + 60
    while not (folder / "started").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_what_a_killed_process_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    process = start_without_end(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    (left,) = visible(tmp_path / "data")
    assert left.startswith(".slow-")
    out, err = start(tmp_path, 10).communicate(timeout=60)
    assert visible(tmp_path / "data") == [Path(out.strip()).name], err


def test_two_processes_share_the_work_on_the_same_data(tmp_path: Path) -> None:
    racers = [start(tmp_path, 10) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in racers]
    assert [process.returncode for process in racers] == [0, 0], outputs
    (folder,) = {out.strip() for out, _ in outputs}
    assert visible(tmp_path / "data") == [Path(folder).name]
    assert (tmp_path / "readings").read_text().split() == ["val", "train"]
    notice = f"another process prepares {folder}: waiting for it\n"
    assert sorted(err for _, err in outputs) in (["", ""], ["", notice])


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    import resource

    limits = (3 << 20, 3 << 20)
    process = start(
        tmp_path, 20, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = err.splitlines()
    assert "File too large: 'data/slow-" in line
    assert visible(tmp_path / "data") == []


def test_quiet_without_a_terminal(texts: Path, tmp_path: Path, capfd: Any) -> None:
    prepare(text(texts), tmp_path / "data")
    assert capfd.readouterr() == ("", "")
