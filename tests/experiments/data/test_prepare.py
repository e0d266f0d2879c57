import json
import lzma
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from experiments.data import token_stream
from experiments.data.prepare import prepare
from experiments.data.token_data import TokenData
from experiments.data.tokenizer import Tokenizer

REPOSITORY = Path(__file__).parents[3]
BYTES = {"_target_": "experiments.data.tokenizer.BytesTokenizer", "vocab_size": 256}
BPE = {
    "_target_": "experiments.data.tokenizer.train_bpe",
    "_partial_": True,
    "vocab_size": 300,
    "max_chars": 100_000,
}

# sources for processes that are to be disturbed; each yields documents of 1 MB
SOURCES = '''
import os, subprocess, sys, time
from pathlib import Path

class Endless:
    """Documents without end; creates `started` once tokens have been written."""
    def __init__(self, n=10**9):
        self.n = n
    def identity(self):
        return {"kind": "endless"}
    def size_hint(self):
        return None
    def pieces(self, split):
        if split == "val":
            yield "held out " * 50, True
            return
        for i in range(self.n):
            if i == 8:
                Path("started").touch()
            yield f"{i} " + "some text " * 100_000, True

class Overtaken(Endless):
    """While the first process reads, a second one prepares the same data to its end."""
    def pieces(self, split):
        if split == "train" and "SECOND" not in os.environ:
            environment = os.environ | {"SECOND": "1"}
            subprocess.run([sys.executable, *sys.argv], env=environment, check=True)
        yield from super().pieces(split)
'''

RUN = """
import sys
from experiments.data.prepare import prepare
bytes_ = {"_target_": "experiments.data.tokenizer.BytesTokenizer", "vocab_size": 256}
source = {"_target_": "odd_sources." + sys.argv[1]}
if len(sys.argv) > 2:
    source["n"] = int(sys.argv[2])
cfg = {"name": "odd", "source": source, "tokenizer": bytes_, "val_tokens": 200}
try:
    print(prepare(cfg, root="data"), flush=True)
except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
"""


def config(paths: Path | list[str], **changes: Any) -> dict[str, Any]:
    source = {"_target_": "experiments.data.sources.TextFiles", "paths": str(paths)}
    cfg = {"name": "small", "source": source, "tokenizer": BYTES, "val_tokens": 500}
    return cfg | {"vocab_size": cfg["tokenizer"]["vocab_size"]} | changes  # type: ignore[index]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(30):
        text = f"file {i}: " + "naïve 日本語 words and more words, " * (20 + i)
        (folder / f"{i:02d}.txt").write_text(text, encoding="utf-8")
    return folder


def test_every_document_is_followed_by_a_separator(texts: Path, tmp_path: Path) -> None:
    folder = prepare(config(texts, val_tokens=None), root=tmp_path / "data")
    data = TokenData.open(folder)
    contents = {p.read_bytes() for p in texts.iterdir()}
    parts = [bytes(tokens).split(b"\0") for tokens in (data.train, data.val)]
    assert [part[-1] for part in parts] == [b"", b""]
    assert {*parts[0][:-1], *parts[1][:-1]} == contents
    assert data.meta["dtype"] == "uint8"
    assert len(data.train) == data.meta["n_train_tokens"]
    data.verify()


def test_bits_per_byte_counts_exactly_the_held_out_text(texts: Path, tmp_path: Path) -> None:
    for tokenizer, limit in ((BYTES, 4001), (BPE, 1501), (BYTES, None)):
        cfg = config(texts, tokenizer=tokenizer, val_tokens=limit, vocab_size=None)
        cfg["source"]["val_fraction"] = 0.2
        data = TokenData.open(prepare(cfg, root=tmp_path / "data"))
        ids = data.val.tolist()
        assert limit is None or len(ids) == limit
        exact = data.tokenizer.decode_bytes(data.val)
        assert data.meta["n_val_bytes"] == len(exact)
        eot = data.tokenizer.eot_id
        assert eot in ids
        text = "".join(p.read_text(encoding="utf-8") for p in sorted(texts.iterdir()))
        assert exact[-100:].decode(errors="ignore") in text
        packed = len(lzma.compress(exact, preset=9 | lzma.PRESET_EXTREME))
        assert data.meta["xz_bpb"] == pytest.approx(8 * packed / len(exact), rel=1e-12)


def test_xz_reads_no_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_stream, "XZ_BYTES", 1000)
    tokenizer = Tokenizer.from_json('{"kind": "bytes", "vocab_size": 256}')
    ids = np.random.default_rng(0).integers(1, 256, 5000).astype(np.uint8)
    packed = len(lzma.compress(ids[:1000].tobytes(), preset=9 | lzma.PRESET_EXTREME))
    assert token_stream.xz_bits_per_byte(ids, tokenizer) == pytest.approx(8 * packed / 1000)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "int32"), (2**31, "int32")],
)
def test_smallest_dtype(vocab_size: int, dtype: str) -> None:
    assert token_stream.token_dtype(vocab_size) == dtype


def test_vocabulary_beyond_every_dtype() -> None:
    with pytest.raises(ValueError, match="does not fit into int32"):
        token_stream.token_dtype(2**31 + 1)


def test_bpe_is_trained_on_the_training_text(texts: Path, tmp_path: Path) -> None:
    cfg = config(texts, tokenizer=BPE, vocab_size=300)
    first = TokenData.open(prepare(cfg, root=tmp_path / "one"))
    second = TokenData.open(prepare(cfg, root=tmp_path / "two"))
    assert first.meta["dtype"] == "uint16"
    assert first.vocab_size == first.tokenizer.vocab_size == 300
    assert first.fingerprint == second.fingerprint
    documents = first.tokenizer.decode(first.train.tolist())
    assert documents.count("file ") == 29


def test_prepared_data_is_found_again_by_content(texts: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    first = prepare(OmegaConf.create(config(texts)), root=root)
    stamp = (first / "meta.json").stat().st_mtime_ns
    moved = tmp_path / "elsewhere"
    texts.rename(moved)
    assert prepare(config(moved, seed=7), root=root) == first
    assert (first / "meta.json").stat().st_mtime_ns == stamp
    others = {
        prepare(config(moved, val_tokens=400), root=root),
        prepare(config(moved, tokenizer=BPE, vocab_size=300), root=root),
    }
    (moved / "00.txt").write_text("changed")
    others.add(prepare(config(moved), root=root))
    assert len({first, *others}) == 4
    assert {p.parent for p in others} == {root}


def test_a_file_tokenizer_counts_by_content(texts: Path, tmp_path: Path) -> None:
    made = TokenData.open(prepare(config(texts, tokenizer=BPE, vocab_size=300), tmp_path / "data"))
    engine = json.loads(made.tokenizer.to_json())["tokenizer"]
    folders = []
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(engine))
        read = {
            "_target_": "experiments.data.tokenizer.read_tokenizer",
            "path": str(tmp_path / name),
        }
        folders.append(prepare(config(texts, tokenizer=read, vocab_size=None), tmp_path / "data"))
    assert folders[0] == folders[1]
    assert TokenData.open(folders[0]).fingerprint == made.fingerprint


def test_bad_input_is_one_line_and_leaves_nothing(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.txt").write_text("x")
    text_files = {"_target_": "experiments.data.sources.TextFiles"}
    cases = [
        (config(texts, source=text_files | {"paths": "???"}), r"data\.source\.paths must be given"),
        (config(tmp_path / "nowhere"), "no data file at"),
        (config(tmp_path / "tiny.txt"), "has no .* text"),
        (config(texts, source=text_files | {"paths": str(texts), "pahts": 1}), "pahts"),
        (config(texts, source={"_target_": "experiments.data.sources.Nothing"}), "Nothing"),
        (config(texts, vocab_size=512), "data.vocab_size=512, but the tokenizer has 256"),
        (config(texts, val_tokens=1), "val_tokens=1"),
        (config(texts, tokenizer=BYTES | {"vocab_size": 257}, vocab_size=257), "256 ids"),
        (config(texts, name="${nosuch}"), "nosuch"),
    ]
    for cfg, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            prepare(cfg, root=tmp_path / "data")
        assert "\n" not in str(caught.value), str(caught.value)
    data = tmp_path / "data"
    assert not data.exists() or not list(data.iterdir())


def test_incomplete_folder_is_not_taken_for_data(texts: Path, tmp_path: Path) -> None:
    folder = prepare(config(texts), root=tmp_path)
    (folder / "meta.json").unlink()
    with pytest.raises(ValueError, match="not complete"):
        prepare(config(texts), root=tmp_path)


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    path = tmp_path / "big.txt"
    with path.open("wb") as file:
        for i in range(48):
            file.write(f"block {i}\n".encode() + b"0123456789abcde\n" * 65536)
    tracemalloc.start()
    folder = prepare(config(path), root=tmp_path / "data")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    n_tokens = TokenData.open(folder).meta["n_train_tokens"]
    assert n_tokens > 48e6
    assert peak < 24e6


def start(folder: Path, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    (folder / "odd_sources.py").write_text(SOURCES)
    (folder / "run.py").write_text(RUN)
    path = os.pathsep.join([str(REPOSITORY), str(folder)])
    return subprocess.Popen(
        [sys.executable, "run.py", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_until_started(folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not (folder / "started").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    process = start(tmp_path, "Endless")
    wait_until_started(tmp_path, process)
    assert len(list((tmp_path / "data").iterdir())) == 1
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert list((tmp_path / "data").iterdir()) == []


def test_what_a_killed_process_left_is_cleared_by_the_next(tmp_path: Path, texts: Path) -> None:
    process = start(tmp_path, "Endless")
    wait_until_started(tmp_path, process)
    process.kill()
    process.communicate(timeout=60)
    (left,) = (tmp_path / "data").iterdir()
    assert left.name.startswith(".tmp-")
    folder = prepare(config(texts), root=tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == [folder]


def test_two_processes_may_prepare_the_same_data(tmp_path: Path) -> None:
    process = start(tmp_path, "Overtaken", "10")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    first, second = out.split()
    assert first == second
    assert [p.name for p in (tmp_path / "data").iterdir()] == [Path(first).name]
    TokenData.open(tmp_path / first).verify()


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    import resource

    limit = 3 << 20
    process = start(
        tmp_path,
        "Endless",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.splitlines() == [
        "error: disk full while preparing data in data: free space or set data.root"
    ]
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_is_one_line(tmp_path: Path, texts: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OSError, match="check its permissions"):
            prepare(config(texts), root=tmp_path / "data")
    finally:
        tmp_path.chmod(0o755)


def test_quiet_without_a_terminal(texts: Path, tmp_path: Path, capfd: Any) -> None:
    prepare(config(texts), root=tmp_path / "data")
    assert capfd.readouterr() == ("", "")


def test_real_text_compresses_to_what_xz_gives(tmp_path: Path) -> None:
    path = REPOSITORY.parent / "shared" / "data" / "text" / "tinyshakespeare.txt"
    if not path.is_file():
        pytest.skip("no sample of real text beside the repository")
    folder = prepare(config(path, val_tokens=None), root=tmp_path)
    meta = TokenData.open(folder).meta
    assert meta["n_train_tokens"] + meta["n_val_tokens"] == path.stat().st_size + 2
    assert 2.5 < meta["xz_bpb"] < 4.0
