"""What a user can get wrong is one line that names it, and nothing is left in the data folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.data.order import TrainWindows
from experiments.data.prepare import prepare

from .small_data import BPE, BYTES, IDS, ROOM, config, write_jsonl, write_megatron

TEXT, JSONL, HF = "sources.TextFiles", "records.Jsonl", "records.HuggingFace"
MEGATRON, NANOGPT = "token_files.Megatron", "token_files.NanoGpt"
FILE = {"_target_": f"{ROOM}.tokenizer.read_tokenizer", "path": "tokenizer.json"}

CASES: list[tuple[str, dict[str, Any], str]] = [
    # values of the config
    (TEXT, {"paths": "???"}, "source.paths must be given: source.paths=..."),
    (TEXT, {"paths": "texts", "pahts": 1}, "pahts"),
    ("sources.Nothing", {}, "Nothing"),
    (TEXT, {"paths": "texts", "name": "../up"}, "data.name '../up' cannot name a folder"),
    (TEXT, {"paths": "texts", "vocab_size": 512}, "vocab_size=512, but the tokenizer has 256"),
    (TEXT, {"paths": "texts", "val_tokens": 1}, "val_tokens is 1: it must be a whole number"),
    (TEXT, {"paths": "texts", "val_tokens": "abc"}, "val_tokens is 'abc': it must be"),
    # text
    (TEXT, {"paths": "nowhere"}, "no data at nowhere"),
    (TEXT, {"paths": "empty.txt"}, "no data at empty.txt"),
    (TEXT, {"paths": "tiny.txt"}, "has no val text"),
    (TEXT, {"paths": "latin.txt"}, "latin.txt is not UTF-8 at byte 50"),
    (TEXT, {"paths": "texts", "val_fraction": 1.0}, "val_fraction=1.0 must lie"),
    (TEXT, {"paths": "texts", "val_paths": "texts/00.txt"}, "both training and held-out text"),
    (TEXT, {"paths": "texts", "val_paths": "link.txt"}, "both training and held-out text"),
    (TEXT, {"paths": "latin.txt", "split_bytes": [2050, 9]}, r"split_bytes=\[2050, 9\]"),
    (TEXT, {"paths": "latin.txt", "split_bytes": [-5, 9]}, "two positive numbers of bytes"),
    (TEXT, {"paths": "texts", "split_bytes": [9, 9]}, "cuts a single file"),
    # records
    (JSONL, {"paths": "bad.jsonl"}, "bad.jsonl:2: not JSON"),
    (JSONL, {"paths": "good.jsonl", "field": "body"}, "good.jsonl:1: no text under 'body'"),
    (JSONL, {"paths": "cut.jsonl.gz"}, "cut.jsonl.gz is damaged"),
    (HF, {"path": "set", "column": "body"}, r"no text in column 'body' \(it has: text\)"),
    (HF, {"path": "set", "split": "nosuch"}, "cannot read dataset 'set', split 'nosuch'"),
    (HF, {"path": "no-such/set"}, "cannot read dataset 'no-such/set'"),
    (HF, {"path": "set", "val_split": "train"}, "both training and held-out text"),
    (HF, {"path": "set", "one_document": True}, "name a val_split"),
    # tokens
    (MEGATRON, {"prefix": "nowhere", "tokenizer": IDS}, "no token file"),
    (MEGATRON, {"prefix": "doc", "val_prefix": "doc", "tokenizer": IDS}, "both training and held"),
    (MEGATRON, {"prefix": "doc", "val_prefix": "wide", "tokenizer": IDS}, "int32 tokens"),
    (MEGATRON, {"prefix": "doc", "val_tokens": 1000, "tokenizer": IDS}, "hold out val_tokens=1000"),
    (MEGATRON, {"prefix": "doc", "val_tokens": None, "tokenizer": IDS}, "hold out val_tokens=None"),
    (MEGATRON, {"prefix": "doc", "tokenizer": IDS | {"vocab_size": 99}}, "ids from 0 to 99"),
    (MEGATRON, {"prefix": "doc", "tokenizer": BPE}, "none can be trained"),
    (NANOGPT, {"path": "tiny.txt", "tokenizer": IDS}, "1 bytes, not a positive multiple of 2"),
    # tokenizers
    (TEXT, {"paths": "texts", "tokenizer": FILE}, "no tokenizer file"),
    (TEXT, {"paths": "texts", "tokenizer": FILE | {"path": "bad.jsonl"}}, "bad.jsonl: "),
    (TEXT, {"paths": "texts", "tokenizer": FILE | {"path": "odd.json"}}, "not a tokenizer.json"),
    (TEXT, {"paths": "texts", "tokenizer": BYTES | {"vocab_size": 512}}, "256 ids, not"),
    (TEXT, {"paths": "texts", "tokenizer": BPE | {"vocab_size": 256}}, "257 or more"),
    (TEXT, {"paths": "texts", "tokenizer": BPE | {"vocab_size": 4000}}, "yields only"),
    (TEXT, {"paths": "texts", "tokenizer": IDS}, "came as ids"),
]


@pytest.fixture
def inputs(texts: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the cases name files in; it is the working directory."""
    folder = texts.parent
    monkeypatch.chdir(folder)
    (folder / "empty.txt").touch()
    (folder / "tiny.txt").write_text("x")
    (folder / "latin.txt").write_bytes(b"x" * 50 + "é".encode("latin-1") + b"y" * 2000)
    (folder / "link.txt").symlink_to(texts / "00.txt")
    (folder / "odd.json").write_text('{"model": 1}')
    (folder / "bad.jsonl").write_text('{"text": "good"}\n{\n')
    write_jsonl(folder / "good.jsonl", ["text"])
    write_jsonl(folder / "cut.jsonl.gz", [str(i) for i in range(500)])
    (folder / "cut.jsonl.gz").write_bytes((folder / "cut.jsonl.gz").read_bytes()[:-12])
    (folder / "set").mkdir()
    write_jsonl(folder / "set" / "train.jsonl", ["text"] * 20)
    write_megatron(folder / "doc", [400, 600])
    write_megatron(folder / "wide", [300], "int32")
    return folder


@pytest.mark.parametrize(("kind", "settings", "message"), CASES)
def test_bad_input_is_one_line(
    inputs: Path, kind: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, OSError), match=message) as caught:
        prepare(config(kind, **settings), "data")
    assert "\n" not in str(caught.value)
    left = [p.name for p in (inputs / "data").glob("*") if not p.name.startswith(".lock-")]
    assert left == []


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"X", "not a Megatron index"),
        (9, b"\x02", "version 2"),
        (17, b"\x06", "dtype code 6"),
        (18, b"\x09", "truncated or damaged"),
        (34, b"\x05", "back to back"),
        (34 + 8 + 8, b"\x02", "back to back"),
        (34 + 4, b"\x05", r"doc\.bin has 2000 bytes, but doc\.idx says"),
    ],
)
def test_damaged_index(inputs: Path, at: int, value: bytes, message: str) -> None:
    index = bytearray((inputs / "doc.idx").read_bytes())
    index[at : at + 1] = value
    (inputs / "doc.idx").write_bytes(index)
    with pytest.raises(ValueError, match=message):
        prepare(config(MEGATRON, IDS, prefix="doc", val_tokens=100), "data")


def test_a_later_id_of_another_tokenizer_is_caught_when_it_is_read(inputs: Path) -> None:
    ids = write_megatron(inputs / "doc", [1000])
    ids[10] = 100
    ids.tofile(inputs / "doc.bin")
    data = prepare(config(MEGATRON, IDS, prefix="doc", val_tokens=100), "data")
    with pytest.raises(ValueError, match="to 100, outside vocab_size=100"):
        TrainWindows(data, 899, 0)[0]


def test_a_dataset_that_breaks_off_is_one_line(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def rows(*_: Any, **__: Any) -> Any:
        yield json.loads('{"text": "first"}')
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", rows)
    with pytest.raises(ValueError, match=r"split 'train': ConnectionError$"):
        prepare(config(HF, path="some/set"), "data")
