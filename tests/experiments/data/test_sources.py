import gzip
import json
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.data import files, sources
from experiments.data.files import content_id, find_files, sampled_sha256
from experiments.data.records import HuggingFace, Jsonl
from experiments.data.sources import PIECE_CHARS, Piece, Stdlib, TextFiles, cut, cut_stream


def documents(pieces: Iterator[Piece]) -> list[str]:
    whole, part = [], ""
    for text, ends in pieces:
        part += text
        if ends:
            whole.append(part)
            part = ""
    assert part == ""
    return whole


def write_files(folder: Path, n: int) -> None:
    for i in range(n):
        path = folder / f"part{i % 3}" / f"doc{i:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document {i} é\n" * (i + 1), encoding="utf-8")


def test_stdlib_splits_by_file_without_tests_or_packages() -> None:
    source = Stdlib()
    assert {"abc.py", "json/decoder.py"} <= set(source.files)
    assert not any("test" in name.split("/") or "site-packages" in name for name in source.files)
    train, val = documents(source.pieces("train")), documents(source.pieces("val"))
    assert len(train) + len(val) == sum(p.stat().st_size > 0 for p in source.files.values())
    n_val = sum(len(text.encode()) for text in val)
    n_train = sum(len(text.encode()) for text in train)
    assert 131072 < n_val < 0.05 * n_train
    assert len(val) >= 15
    assert not set(val) & set(train)
    assert source.identity() == Stdlib().identity()


def test_stdlib_split_otherwise_is_other_data(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Stdlib().identity()
    monkeypatch.setattr(sources, "_is_small", lambda path: path.stat().st_size < 9000)
    assert Stdlib().identity() != before


def test_stdlib_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no standard library sources"):
        Stdlib()


def test_folder_is_split_by_file(tmp_path: Path) -> None:
    write_files(tmp_path / "a", 20)
    (tmp_path / "a" / ".hidden").write_text("not data")
    (tmp_path / "a" / ".git").mkdir()
    (tmp_path / "a" / ".git" / "config").write_text("not data")
    source = TextFiles(str(tmp_path / "a"), val_fraction=0.1)
    train, val = documents(source.pieces("train")), documents(source.pieces("val"))
    assert (len(train), len(val)) == (18, 2)
    assert sorted(train + val) == sorted(f"document {i} é\n" * (i + 1) for i in range(20))
    identity = source.identity()
    moved = tmp_path / "b"
    (tmp_path / "a").rename(moved)
    assert TextFiles(str(moved), val_fraction=0.1).identity() == identity
    glob = TextFiles([str(moved / "part0" / "*.txt"), str(moved / "part1")], val_fraction=0.1)
    assert len(documents(glob.pieces("train"))) + len(documents(glob.pieces("val"))) == 14


def test_named_held_out_files_leave_training_whole(tmp_path: Path) -> None:
    write_files(tmp_path, 6)
    source = TextFiles(str(tmp_path / "part0"), val_paths=str(tmp_path / "part1"))
    assert len(documents(source.pieces("train"))) == len(documents(source.pieces("val"))) == 2


def test_folder_is_split_by_content_not_by_name(tmp_path: Path) -> None:
    for i in range(40):
        package = tmp_path / "code" / f"package{i:02d}"
        package.mkdir(parents=True)
        for name in ("init.py", "main.py"):
            (package / name).write_text(f"{name} of {i}\n")
        (package / "licence.txt").write_text("the same in every package\n")
    (tmp_path / "code" / "package00" / "empty.py").touch()
    source = TextFiles(str(tmp_path / "code"), val_fraction=0.2)
    train, val = documents(source.pieces("train")), documents(source.pieces("val"))
    assert len(train) + len(val) == 120
    assert not set(train) & set(val)
    assert {text.split()[0] for text in val} >= {"init.py", "main.py"}
    (tmp_path / "code").rename(tmp_path / "renamed")
    assert documents(TextFiles(str(tmp_path / "renamed"), val_fraction=0.2).pieces("val")) == val


def test_text_is_never_on_both_sides(tmp_path: Path) -> None:
    for name in ("train", "val"):
        jsonl(tmp_path / f"{name}.jsonl", [name])
    (tmp_path / "link").symlink_to(tmp_path / "val.jsonl")
    both, val, link = str(tmp_path / "*.jsonl"), str(tmp_path / "val.jsonl"), str(tmp_path / "link")
    cases: list[Callable[[], Any]] = [
        lambda: TextFiles(both, val_paths=val),
        lambda: TextFiles(str(tmp_path), val_paths=[val]),
        lambda: Jsonl(val, val_paths=val),
        lambda: Jsonl(link, val_paths=[val]),
        lambda: HuggingFace(both, split="validation", val_split="validation"),
    ]
    for make in cases:
        with pytest.raises(ValueError, match="is both training and held-out text") as caught:
            make()
        assert "\n" not in str(caught.value)


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    for name in "abc":
        jsonl(tmp_path / f"{name}.jsonl", [name])
    (tmp_path / "other").symlink_to(tmp_path, target_is_directory=True)
    paths = [str(tmp_path / "a.jsonl"), str(tmp_path / "*.jsonl"), str(tmp_path / "other" / "*.*")]
    source = Jsonl(paths, val_fraction=0.5)
    texts = documents(source.pieces("train")) + documents(source.pieces("val"))
    assert sorted(texts) == ["a", "b", "c"]


def test_empty_files_are_passed_over_unless_named(tmp_path: Path) -> None:
    write_files(tmp_path / "docs", 4)
    empty = tmp_path / "docs" / "part0" / "empty.txt"
    empty.touch()
    assert len(find_files(str(tmp_path / "docs"))) == 4
    assert len(find_files(str(tmp_path / "docs" / "part0" / "*"))) == 2
    (tmp_path / "void").mkdir()
    (tmp_path / "void" / "a").touch()
    for path in (empty, tmp_path / "void", tmp_path / "void" / "*"):
        with pytest.raises(ValueError, match="is empty: give files with content"):
            find_files([str(tmp_path / "docs"), str(path)])


def test_single_file_holds_out_its_end_at_a_character(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    text = "日本語のテキスト\n" * 400
    path.write_text(text, encoding="utf-8")
    size = len(text.encode())
    for fraction in (0.1, 0.1005, 0.101):
        source = TextFiles(str(path), val_fraction=fraction)
        (train,), (val,) = documents(source.pieces("train")), documents(source.pieces("val"))
        assert train + val == text
        assert 0 <= len(val.encode()) - round(fraction * size) <= 2


def test_explicit_byte_splits_leave_the_rest_unread(tmp_path: Path) -> None:
    path = tmp_path / "enwik.xml"
    data = bytes(range(32, 127)) * 20
    path.write_bytes(data + "é".encode() * 50)
    source = TextFiles(str(path), split_bytes=[1800, 100])
    assert documents(source.pieces("train")) == [data[:1800].decode()]
    assert documents(source.pieces("val")) == [data[1800:1900].decode()]
    with pytest.raises(ValueError, match="fewer than split_bytes=1990,100"):
        TextFiles(str(path), split_bytes=[1990, 100])
    with pytest.raises(ValueError, match="cuts a single file"):
        TextFiles(str(path), val_paths=__file__, split_bytes=[10, 10])
    for wrong in ([-5, 10], [10, -5], [0, 10], [10], ["a", 10], [1.5, 10]):
        with pytest.raises(ValueError, match="must be two positive numbers of bytes"):
            TextFiles(str(path), split_bytes=wrong)


def test_long_documents_come_in_pieces_that_end_at_newlines(tmp_path: Path) -> None:
    text = "".join(f"line {i} ééé\n" for i in range(200_000))
    path = tmp_path / "long.txt"
    path.write_text(text, encoding="utf-8")
    source = TextFiles(str(path), val_fraction=0.01)
    for pieces in (list(cut(text)), list(source.pieces("train"))):
        assert len(pieces) > 2
        assert all(piece.endswith("\n") for piece, _ in pieces[:-1])
        assert all(len(piece) <= 2 * PIECE_CHARS for piece, _ in pieces)
        assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
        assert text.startswith("".join(piece for piece, _ in pieces))
    assert list(cut("")) == []
    assert list(cut_stream(["no ", "newline"])) == [("no ", False), ("newline", True)]


def test_line_ends_are_kept(tmp_path: Path) -> None:
    (tmp_path / "dos.txt").write_bytes(b"a\r\nb\rc\n" * 100)
    (train,) = documents(TextFiles(str(tmp_path / "dos.txt")).pieces("train"))
    assert train.startswith("a\r\nb\rc\n")


def test_text_errors_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"x" * 50 + "é".encode("latin-1") + b"y" * 2000)
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no data file at .*nowhere"):
        TextFiles(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"no data file at .*folder"):
        TextFiles(str(tmp_path / "folder"))
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        TextFiles(str(tmp_path / "empty.txt"))
    with pytest.raises(ValueError, match="val_fraction=1"):
        TextFiles(str(tmp_path / "latin.txt"), val_fraction=1.0)
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 at byte 50"):
        list(TextFiles(str(tmp_path / "latin.txt")).pieces("train"))


def jsonl(path: Path, texts: list[str], field: str = "text") -> None:
    lines = "".join(json.dumps({"id": i, field: t}) + "\n" for i, t in enumerate(texts)).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_jsonl_holds_out_by_content(tmp_path: Path, name: str) -> None:
    texts = [f"story {i % 150} \x00 é" for i in range(200)]  # 50 of them twice
    jsonl(tmp_path / name, texts, field="body")
    source = Jsonl(str(tmp_path / name), field="body", val_fraction=0.2)
    train, val = documents(source.pieces("train")), documents(source.pieces("val"))
    assert sorted(train + val) == sorted(texts)
    assert 20 < len(val) < 60
    assert not set(train) & set(val)
    assert (source.size_hint() is None) == name.endswith(".gz")


def test_jsonl_with_named_held_out_file_and_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n\n{"text": ""}\n{"text": "b"}')
    jsonl(tmp_path / "val.jsonl", ["c"])
    source = Jsonl(str(tmp_path / "train.jsonl"), str(tmp_path / "val.jsonl"))
    assert documents(source.pieces("train")) == ["a", "b"]
    assert documents(source.pieces("val")) == ["c"]


def test_jsonl_identity_tells_whether_text_is_held_out_by_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        jsonl(tmp_path / f"{name}.jsonl", ["the same"])
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    assert Jsonl(a).identity() != Jsonl(a, val_paths=b).identity()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ('{"text": 1}', "no text under 'text'"),
        ('["text"]', "no text under 'text'"),
        ('{"body": "a"}', "no text under 'text'"),
    ],
)
def test_jsonl_errors_name_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"bad\.jsonl:2: {message}") as caught:
        list(Jsonl(str(path)).pieces("train"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["end", "magic", "middle", "checksum"])
def test_damaged_gzip_is_named(tmp_path: Path, place: str) -> None:
    path = tmp_path / "rows.jsonl.gz"
    jsonl(path, [f"{i}" * 50 for i in range(500)])
    data = bytearray(path.read_bytes())
    if place == "end":
        del data[-12:]
    else:
        at = {"magic": 0, "middle": 12, "checksum": -6}[place]
        data[at : at + 4] = b"\xff" * 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz is damaged"):
        list(Jsonl(str(path)).pieces("train"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()


@pytest.mark.usefixtures("offline")
def test_hugging_face_folder_of_json(tmp_path: Path) -> None:
    folder = tmp_path / "stories"
    folder.mkdir()
    jsonl(folder / "train.jsonl", [f"story {i}" for i in range(40)])
    jsonl(folder / "validation.jsonl", ["held out"])
    source = HuggingFace(str(folder), val_split="validation")
    assert documents(source.pieces("train")) == [f"story {i}" for i in range(40)]
    assert documents(source.pieces("val")) == ["held out"]
    by_hash = HuggingFace(str(folder), val_fraction=0.3)
    train, val = documents(by_hash.pieces("train")), documents(by_hash.pieces("val"))
    assert sorted(train + val) == sorted(f"story {i}" for i in range(40))
    assert len(val) > 3
    assert source.identity() != by_hash.identity()
    with pytest.raises(ValueError, match="no text in column 'body'"):
        list(HuggingFace(str(folder), column="body").pieces("train"))
    with pytest.raises(ValueError, match="cannot read dataset"):
        list(HuggingFace(str(folder), split="nosuch").pieces("train"))


@pytest.mark.usefixtures("offline")
def test_hugging_face_rows_of_one_document(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "wikitext"
    folder.mkdir()
    lines = ["", " = Title = \n", "", " Some text . \n"] * 50
    for split in ("train", "validation"):
        pyarrow.parquet.write_table(
            pyarrow.table({"text": lines}), folder / f"{split}-00000-of-00001.parquet"
        )
    source = HuggingFace(str(folder), val_split="validation", one_document=True)
    assert documents(source.pieces("train")) == ["".join(lines)]
    assert documents(source.pieces("val")) == ["".join(lines)]
    with pytest.raises(ValueError, match="name a val_split"):
        HuggingFace(str(folder), one_document=True)


@pytest.mark.usefixtures("offline")
def test_dataset_that_cannot_be_had_is_one_line() -> None:
    with pytest.raises(ValueError, match="cannot read dataset 'no-such/set'") as caught:
        list(HuggingFace("no-such/set").pieces("train"))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("offline")
def test_dataset_that_breaks_off_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": [f"{i} some text" * 40 for i in range(2000)]})
    path = tmp_path / "set" / "train.parquet"
    path.parent.mkdir()
    pyarrow.parquet.write_table(table, path, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[:1000] = bytes(1000)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"cannot read dataset .*'train': .") as caught:
        list(HuggingFace(str(path.parent)).pieces("train"))
    assert "\n" not in str(caught.value)

    def lost(*_: Any, **__: Any) -> Iterator[dict[str, str]]:
        yield {"text": "first"}
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", lost)
    with pytest.raises(ValueError, match=r"split 'train': ConnectionError$"):
        list(HuggingFace("some/set").pieces("train"))


def test_files_are_known_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, big = tmp_path / "small", tmp_path / "big"
    small.write_bytes(b"abc")
    before = content_id(small)
    small.write_bytes(b"abd")
    assert content_id(small) != before
    data = bytearray(5 << 20)
    big.write_bytes(data)
    before = content_id(big)
    os.utime(big, (0, 0))
    assert content_id(big) == before
    monkeypatch.setattr(files, "WHOLE_UP_TO", 4 << 20)
    before = content_id(big)
    assert before.startswith(str(5 << 20))
    data[-1] = 1
    big.write_bytes(data)
    assert content_id(big).rpartition("-")[2] != before.rpartition("-")[2]


@pytest.mark.parametrize("size", [1, 65536, 4 << 20])
def test_samples_cover_small_spans(tmp_path: Path, size: int) -> None:
    path = tmp_path / "data"
    data = bytearray(size + 20)
    path.write_bytes(data)
    whole = sampled_sha256(path, 10, size)
    for place in {10, 10 + size // 3, 10 + size // 2, 9 + size}:
        changed = bytearray(data)
        changed[place] = 1
        path.write_bytes(changed)
        assert sampled_sha256(path, 10, size) != whole
    for outside in (9, 10 + size):
        changed = bytearray(data)
        changed[outside] = 1
        path.write_bytes(changed)
        assert sampled_sha256(path, 10, size) == whole


@pytest.mark.skipif(sys.platform == "win32", reason="file names there have no case")
def test_files_come_sorted(tmp_path: Path) -> None:
    for name in ("b", "a", "C"):
        (tmp_path / name).write_text("x")
    assert [p.name for p in find_files(str(tmp_path))] == ["C", "a", "b"]
