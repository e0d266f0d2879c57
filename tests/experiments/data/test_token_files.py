import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.data import token_files
from experiments.data.prepare import prepare
from experiments.data.token_data import TokenData
from experiments.data.token_files import Megatron, NanoGpt
from experiments.data.tokenizer import train_bpe

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
IDS = {"_target_": "experiments.data.tokenizer.IdsTokenizer", "vocab_size": 100}


def write_megatron(prefix: Path, sizes: list[int], dtype: str = "uint16") -> np.ndarray:
    tokens = (np.arange(sum(sizes)) * 7 % 100).astype(dtype)
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    pointers = (np.cumsum([0, *sizes[:-1]]) * tokens.itemsize).astype("<i8")
    documents = np.arange(len(sizes) + 1, dtype="<i8")
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, CODES[dtype], len(sizes), len(documents))
    index = header + np.array(sizes, "<i4").tobytes() + pointers.tobytes() + documents.tobytes()
    Path(f"{prefix}.idx").write_bytes(index)
    return tokens


def megatron(prefix: Path, **changes: Any) -> dict[str, Any]:
    source = {"_target_": "experiments.data.token_files.Megatron", "prefix": str(prefix)}
    return {"name": "meg", "source": source, "tokenizer": IDS, "val_tokens": 100} | changes


@pytest.mark.parametrize("dtype", CODES)
def test_megatron_file_is_used_where_it_lies(tmp_path: Path, dtype: str) -> None:
    tokens = write_megatron(tmp_path / "doc", [300, 1, 499, 200], dtype)
    folder = prepare(megatron(tmp_path / "doc"), root=tmp_path / "data")
    data = TokenData.open(folder)
    assert np.array_equal(data.train, tokens[:900])
    assert np.array_equal(data.val, tokens[900:])
    assert data.meta["dtype"] == dtype
    assert (data.meta["n_val_bytes"], data.meta["xz_bpb"]) == (None, None)
    assert sorted(p.name for p in folder.iterdir()) == ["meta.json", "tokenizer.json"]


def test_many_sequences_are_checked_in_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 4, (1 << 20) + 1000).tolist()  # more than one block of the index
    write_megatron(tmp_path / "doc", sizes, "uint8")
    source = Megatron(str(tmp_path / "doc"))
    assert source.spans(100)["train"].n_tokens == sum(sizes) - 100


def test_held_out_file_of_its_own(tmp_path: Path) -> None:
    train, val = tmp_path / "train", tmp_path / "val"
    tokens = write_megatron(train, [500])
    held_out = write_megatron(val, [300])
    spans = Megatron(str(train), str(val)).spans(200)
    assert np.array_equal(spans["train"].array(), tokens)
    assert np.array_equal(spans["val"].array(), held_out[:200])
    assert Megatron(str(train), str(val)).spans(None)["val"].n_tokens == 300
    write_megatron(val, [300], "int32")
    with pytest.raises(ValueError, match="int32 tokens"):
        Megatron(str(train), str(val)).spans(200)


def test_tokens_are_never_on_both_sides(tmp_path: Path) -> None:
    write_megatron(tmp_path / "doc", [1000])
    (tmp_path / "link.bin").symlink_to(tmp_path / "doc.bin")
    with pytest.raises(ValueError, match="is both training and held-out text"):
        Megatron(str(tmp_path / "doc"), val_prefix=str(tmp_path / "doc"))
    with pytest.raises(ValueError, match="is both training and held-out text"):
        NanoGpt(str(tmp_path / "doc.bin"), val_path=str(tmp_path / "link.bin"))


def test_only_the_first_start_reads_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_megatron(tmp_path / "doc", [1000])
    folder = prepare(megatron(tmp_path / "doc"), root=tmp_path / "data")

    def read_again(_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(token_files, "_check_contiguous", read_again)
    assert prepare(megatron(tmp_path / "doc"), root=tmp_path / "data") == folder


def test_nanogpt_files(tmp_path: Path) -> None:
    tokens = (np.arange(1000) % 100).astype("<u2")
    tokens.tofile(tmp_path / "train.bin")
    tokens[:300].tofile(tmp_path / "val.bin")
    source = {
        "_target_": "experiments.data.token_files.NanoGpt",
        "path": str(tmp_path / "train.bin"),
        "val_path": str(tmp_path / "val.bin"),
    }
    cfg = {"name": "nano", "source": source, "tokenizer": IDS, "val_tokens": None}
    data = TokenData.open(prepare(cfg, root=tmp_path / "data"))
    assert np.array_equal(data.train, tokens)
    assert np.array_equal(data.val, tokens[:300])
    (tmp_path / "odd.bin").write_bytes(b"abc")
    for path, message in ((tmp_path / "odd.bin", "3 bytes"), (tmp_path / "no.bin", "no token")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            NanoGpt(str(path))


def test_tokenizer_at_hand_gives_text_and_bytes(tmp_path: Path) -> None:
    text = "".join(f"the cat number {i * i} sat on the mat. " for i in range(300))
    tokenizer = train_bpe(iter([text]), 280, 10**6)
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(json.loads(tokenizer.to_json())["tokenizer"])
    )
    np.array(tokenizer.encode(text), dtype="<u2").tofile(tmp_path / "t.bin")
    cfg = {
        "name": "nano",
        "source": {
            "_target_": "experiments.data.token_files.NanoGpt",
            "path": str(tmp_path / "t.bin"),
        },
        "tokenizer": {
            "_target_": "experiments.data.tokenizer.read_tokenizer",
            "path": str(tmp_path / "tokenizer.json"),
        },
        "val_tokens": 50,
    }
    data = TokenData.open(prepare(cfg, root=tmp_path / "data"))
    held_out = data.tokenizer.decode(data.val.tolist())
    assert text.endswith(held_out)
    assert data.meta["n_val_bytes"] == len(held_out)
    assert data.meta["xz_bpb"] > 0


def test_changed_or_moved_file_is_noticed(tmp_path: Path) -> None:
    write_megatron(tmp_path / "doc", [1000])
    folder = prepare(megatron(tmp_path / "doc"), root=tmp_path / "data")
    TokenData.open(folder)
    content = bytearray((tmp_path / "doc.bin").read_bytes())
    content[77] ^= 1
    (tmp_path / "doc.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"doc\.bin was changed: delete .* and prepare again"):
        TokenData.open(folder)
    (tmp_path / "doc.bin").write_bytes(content[:-2])
    with pytest.raises(ValueError, match="1998 bytes instead of 2000"):
        TokenData.open(folder)
    (tmp_path / "doc.bin").rename(tmp_path / "moved.bin")
    with pytest.raises(FileNotFoundError, match=r"doc\.bin is missing"):
        TokenData.open(folder)


def test_only_the_tokens_make_the_fingerprint(tmp_path: Path) -> None:
    prints = []
    for name in ("a", "b"):
        write_megatron(tmp_path / name, [500, 500])
        folder = prepare(megatron(tmp_path / name), root=tmp_path / "data")
        prints.append(TokenData.open(folder).fingerprint)
    assert prints[0] == prints[1]
    folder = prepare(megatron(tmp_path / "a", val_tokens=101), root=tmp_path / "data")
    assert TokenData.open(folder).fingerprint != prints[0]


def damage(prefix: Path, at: int, value: bytes) -> None:
    path = Path(f"{prefix}.idx")
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)


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
def test_damaged_index(tmp_path: Path, at: int, value: bytes, message: str) -> None:
    write_megatron(tmp_path / "doc", [400, 600])
    damage(tmp_path / "doc", at, value)
    with pytest.raises(ValueError, match=message) as caught:
        Megatron(str(tmp_path / "doc")).spans(100)
    assert "\n" not in str(caught.value)


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    write_megatron(tmp_path / "doc", [1000])
    write_megatron(tmp_path / "short", [1000])
    Path(tmp_path / "short.bin").write_bytes(bytes(1990))
    bpe = {
        "_target_": "experiments.data.tokenizer.train_bpe",
        "_partial_": True,
        "vocab_size": 300,
        "max_chars": 1000,
    }
    cases = [
        (megatron(tmp_path / "nowhere"), "no token file"),
        (megatron(tmp_path / "short"), "1990 bytes"),
        (megatron(tmp_path / "doc", tokenizer=IDS | {"vocab_size": 99}), "holds id 99"),
        (
            megatron(tmp_path / "doc", tokenizer=IDS | {"vocab_size": 70000}),
            "larger than the uint16",
        ),
        (megatron(tmp_path / "doc", val_tokens=1000), "cannot hold out val_tokens=1000"),
        (megatron(tmp_path / "doc", val_tokens=None), "cannot hold out val_tokens=None"),
        (megatron(tmp_path / "doc", tokenizer=bpe), "none can be trained"),
    ]
    for cfg, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            prepare(cfg, root=tmp_path / "data")
        assert "\n" not in str(caught.value)
    assert [p.name for p in (tmp_path / "data").glob("*") if not p.name.startswith(".lock-")] == []


def test_foreign_ids_are_found_in_samples_of_a_long_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_files, "CHECKED_BLOCK", 1000)
    tokens = np.zeros(1_000_000, dtype="<u2")
    for place in (0, 499_000, 999_999):
        tokens[:] = 0
        tokens[max(0, place - 9000) : place + 9000] = 200
        tokens.tofile(tmp_path / "long.bin")
        span = NanoGpt(str(tmp_path / "long.bin")).train
        with pytest.raises(ValueError, match="holds id 200"):
            token_files.check_ids(span, 100)
