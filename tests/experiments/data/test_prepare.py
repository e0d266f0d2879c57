import json
import lzma
import os
import shutil
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
import time
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

class Slow(Endless):
    """Counts how often it is read, and takes its time."""
    def pieces(self, split):
        with Path("readings").open("a") as file:
            file.write(split + "\\n")
        time.sleep(0.3)
        yield from super().pieces(split)
'''

RUN = """
import sys
import odd_sources
from experiments.data import prepare as module

ours = module.make
def make(node, *kinds, **how):  # a config cannot name what lies outside the project
    if "odd" in node:
        return getattr(odd_sources, node["odd"])(*map(int, sys.argv[2:]))
    return ours(node, *kinds, **how)
module.make = make

bytes_ = {"_target_": "experiments.data.tokenizer.BytesTokenizer", "vocab_size": 256}
cfg = {"name": "odd", "source": {"odd": sys.argv[1]}, "tokenizer": bytes_, "val_tokens": 200}
try:
    print(module.prepare(cfg, root="data"), flush=True)
except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
"""


def config(paths: Path | str, **changes: Any) -> dict[str, Any]:
    source = {"_target_": "experiments.data.sources.TextFiles", "paths": str(paths)}
    cfg = {"name": "small", "source": source, "tokenizer": BYTES, "val_tokens": 500}
    return cfg | {"vocab_size": cfg["tokenizer"]["vocab_size"]} | changes  # type: ignore[index]


def visible(root: Path) -> list[Path]:
    """What lies in a root but for the locks, which stay."""
    return [p for p in root.glob("*") if not p.name.startswith(".lock-")]


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
    single = text_files | {"paths": str(texts / "00.txt")}
    cases = [
        (config(texts, source=text_files | {"paths": "???"}), r"data\.source\.paths must be given"),
        (config(tmp_path / "nowhere"), "no data file at"),
        (config(tmp_path / "tiny.txt"), "has no .* text"),
        (config(texts, source=text_files | {"paths": str(texts), "pahts": 1}), "pahts"),
        (config(texts, source={"_target_": "experiments.data.sources.Nothing"}), "Nothing"),
        (config(texts, vocab_size=512), "data.vocab_size=512, but the tokenizer has 256"),
        (config(texts, val_tokens=1), "val_tokens=1"),
        (config(texts, val_tokens=0), "val_tokens=0 must be"),
        (config(texts, val_tokens=-5), "val_tokens=-5 must be"),
        (config(texts, val_tokens=100.5), "val_tokens=100.5 must be a whole number"),
        (config(texts, val_tokens="abc"), "val_tokens=abc must be a whole number"),
        (config(texts, source=single | {"split_bytes": [-9, 9]}), "split_bytes=.-9, 9. must be"),
        (config(texts, tokenizer=BYTES | {"vocab_size": 257}, vocab_size=257), "256 ids"),
        (config(texts, name="${nosuch}"), "nosuch"),
    ]
    for cfg, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            prepare(cfg, root=tmp_path / "data")
        assert "\n" not in str(caught.value), str(caught.value)
    assert visible(tmp_path / "data") == []


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


def hear_interrupts() -> None:
    """A process started in the background by a shell ignores SIGINT, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until_started(folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not (folder / "started").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    process = start(tmp_path, "Endless", preexec_fn=hear_interrupts)
    wait_until_started(tmp_path, process)
    assert len(visible(tmp_path / "data")) == 1
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert visible(tmp_path / "data") == []


def test_what_a_killed_process_left_is_cleared_by_the_next(tmp_path: Path, texts: Path) -> None:
    process = start(tmp_path, "Endless")
    wait_until_started(tmp_path, process)
    process.kill()
    process.communicate(timeout=60)
    (left,) = visible(tmp_path / "data")
    assert left.name.startswith(".tmp-")
    folder = prepare(config(texts), root=tmp_path / "data")
    assert visible(tmp_path / "data") == [folder]


def test_two_processes_share_the_work_on_the_same_data(tmp_path: Path) -> None:
    racers = [start(tmp_path, "Slow", "10") for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in racers]
    assert [process.returncode for process in racers] == [0, 0], outputs
    (folder,) = {out.strip() for out, _ in outputs}
    assert [p.name for p in visible(tmp_path / "data")] == [Path(folder).name]
    TokenData.open(tmp_path / folder)
    assert (tmp_path / "readings").read_text().split() == ["val", "train"]
    notice = f"another process prepares {folder}: waiting for it\n"
    assert sorted(err for _, err in outputs) in (["", ""], ["", notice])


def test_data_being_prepared_is_not_swept_away(tmp_path: Path, texts: Path) -> None:
    process = start(tmp_path, "Endless")
    wait_until_started(tmp_path, process)
    folder = prepare(config(texts), root=tmp_path / "data")
    (work,) = {*visible(tmp_path / "data")} - {folder}
    assert (work / "train.bin").is_file()
    process.kill()
    process.communicate(timeout=60)
    again = start(tmp_path, "Endless", "9")
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert {*visible(tmp_path / "data")} - {folder} == {tmp_path / out.strip()} - {work}


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
    assert visible(tmp_path / "data") == []


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_is_one_line(tmp_path: Path, texts: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OSError, match="check its permissions"):
            prepare(config(texts), root=tmp_path / "data")
    finally:
        tmp_path.chmod(0o755)


def test_a_changed_part_is_made_again_once_the_folder_is_gone(texts: Path, tmp_path: Path) -> None:
    for i, damage in enumerate((Path.unlink, lambda file: os.truncate(file, 10))):
        folder = prepare(config(texts), root=tmp_path / str(i))
        damage(folder / "train.bin")
        assert prepare(config(texts), root=tmp_path / str(i)) == folder
        with pytest.raises((ValueError, OSError), match=f"delete {folder} and prepare again"):
            TokenData.open(folder)
        shutil.rmtree(folder)
        TokenData.open(prepare(config(texts), root=tmp_path / str(i)))


class Bar:
    """Stands for a progress bar and keeps what it was told."""

    def __init__(self, total: int | None, **_: Any) -> None:
        self.total, self.n = total, 0
        BARS.append(self)

    def update(self, n: int) -> None:
        self.n += n

    def close(self) -> None:
        pass


BARS: list[Bar] = []


def test_progress_counts_bytes(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_stream, "tqdm", Bar)
    prepare(config(texts), root=tmp_path / "data")
    (train,) = [bar for bar in BARS if bar.total is not None]
    assert train.n == train.total


MEMORY = """
import resource, sys
from experiments.data.prepare import prepare
source = {"_target_": "experiments.data.records.Jsonl", "paths": sys.argv[1]}
bpe = {"_target_": "experiments.data.tokenizer.train_bpe", "_partial_": True,
       "vocab_size": 1200, "max_chars": 1_000_000}
print(prepare({"name": "big", "source": source, "tokenizer": bpe, "val_tokens": 50_000}, "data"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB there only")
def test_resident_memory_stays_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, n))) for n in rng.integers(4, 24, 100)]
    text = " ".join([words[i] for i in rng.integers(0, len(words), 4_200)])
    with (tmp_path / "big.jsonl").open("w") as file:
        for i in range(1000):  # documents of 60 kB
            file.write(json.dumps({"text": text[i:] + text[:i]}) + "\n")
    assert (tmp_path / "big.jsonl").stat().st_size > 60e6
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, "big.jsonl"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "RAYON_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    folder, peak_kib = done.stdout.split()
    assert TokenData.open(tmp_path / folder).meta["n_train_tokens"] > 5e6
    assert int(peak_kib) < 1 << 20


def test_quiet_without_a_terminal(texts: Path, tmp_path: Path, capfd: Any) -> None:
    prepare(config(texts), root=tmp_path / "data")
    assert capfd.readouterr() == ("", "")


def test_the_standard_library_holds_out_enough_varied_text(tmp_path: Path) -> None:
    source = {"_target_": "experiments.data.sources.Stdlib"}
    data = TokenData.open(prepare(config("", source=source, val_tokens=131072), root=tmp_path))
    assert data.meta["n_val_tokens"] == 131072
    assert (data.val == data.tokenizer.eot_id).sum() >= 10  # documents
    assert 1.5 < data.meta["xz_bpb"] < 3.0


def test_real_text_compresses_to_what_xz_gives(tmp_path: Path) -> None:
    path = REPOSITORY.parent / "shared" / "data" / "text" / "tinyshakespeare.txt"
    if not path.is_file():
        pytest.skip("no sample of real text beside the repository")
    folder = prepare(config(path, val_tokens=None), root=tmp_path)
    meta = TokenData.open(folder).meta
    assert meta["n_train_tokens"] + meta["n_val_tokens"] == path.stat().st_size + 2
    assert 2.5 < meta["xz_bpb"] < 4.0
