"""What the sources of text hold out, and that nothing is on both sides."""

from pathlib import Path

import pytest

from experiments.data.files import find_files, sampled_sha256
from experiments.data.records import HuggingFace, Jsonl
from experiments.data.sources import PIECE_CHARS, Piece, Stdlib, TextFiles, cut, cut_stream

from .small_data import documents, write_jsonl


def split(source: TextFiles | Jsonl | HuggingFace | Stdlib) -> tuple[list[str], list[str]]:
    """Training and held-out documents, none of which is on both sides."""
    train, val = documents(source.pieces("train")), documents(source.pieces("val"))
    assert not set(train) & set(val)
    return train, val


def test_stdlib_splits_by_file_without_tests_or_packages() -> None:
    source = Stdlib()
    assert {"abc.py", "json/decoder.py"} <= set(source.files)
    assert not any("test" in name.split("/") or "site-packages" in name for name in source.files)
    train, val = split(source)
    assert len(train) + len(val) == sum(p.stat().st_size > 0 for p in source.files.values())
    n_val, n_train = (sum(len(text.encode()) for text in side) for side in (val, train))
    assert 131072 < n_val < 0.05 * n_train
    assert source.identity() == Stdlib().identity()


def test_a_folder_is_split_by_content_not_by_name(tmp_path: Path) -> None:
    for i in range(40):
        package = tmp_path / "code" / f"package{i:02d}"
        package.mkdir(parents=True)
        for name in ("init.py", "main.py"):
            (package / name).write_text(f"{name} of {i}\n")
        (package / "licence.txt").write_text("the same in every package\n")
    (tmp_path / "code" / "package00" / "empty.py").touch()
    (tmp_path / "code" / ".git").mkdir()
    (tmp_path / "code" / ".git" / "config").write_text("hidden, so not data")
    source = TextFiles(str(tmp_path / "code"), val_fraction=0.2)
    train, val = split(source)
    assert len(train) + len(val) == 120
    assert {text.split()[0] for text in val} >= {"init.py", "main.py"}
    (tmp_path / "code").rename(tmp_path / "renamed")
    moved = TextFiles(str(tmp_path / "renamed"), val_fraction=0.2)
    assert split(moved) == (train, val)
    assert moved.identity() == source.identity()


@pytest.mark.parametrize("fraction", [0.1, 0.1005, 0.101])
def test_a_single_file_holds_out_its_end_at_a_character(tmp_path: Path, fraction: float) -> None:
    text = "日本語のテキスト\r\n" * 400  # line ends are kept
    (tmp_path / "one.txt").write_bytes(text.encode())
    (train,), (val,) = split(TextFiles(str(tmp_path / "one.txt"), val_fraction=fraction))
    assert train + val == text
    assert 0 <= len(val.encode()) - round(fraction * len(text.encode())) <= 2


def test_named_parts_are_held_out_and_the_rest_is_unread(tmp_path: Path) -> None:
    data = bytes(range(32, 127)) * 20
    (tmp_path / "a").write_bytes(data + "é".encode() * 50)
    (tmp_path / "b").write_text("held out")
    by_bytes = TextFiles(str(tmp_path / "a"), split_bytes=[1800, 100])
    assert split(by_bytes) == ([data[:1800].decode()], [data[1800:1900].decode()])
    by_name = TextFiles(str(tmp_path / "a"), val_paths=str(tmp_path / "b"))
    assert split(by_name) == ([(tmp_path / "a").read_text()], ["held out"])


def test_a_file_named_twice_is_read_once_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    for name in ("b", "a", "C"):
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "empty.txt").touch()
    link = tmp_path / "other"
    link.symlink_to(tmp_path, target_is_directory=True)
    assert [p.name for p in find_files(str(tmp_path))] == ["C.txt", "a.txt", "b.txt"]
    found = find_files([str(tmp_path / "b.txt"), str(tmp_path / "*.txt"), str(link / "*.*")])
    assert [p.name for p in found] == ["b.txt", "C.txt", "a.txt"]


def test_long_documents_come_in_pieces_that_end_at_newlines(tmp_path: Path) -> None:
    text = "".join(f"line {i} ééé\n" for i in range(200_000))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    source = TextFiles(str(tmp_path / "long.txt"), val_fraction=0.01)
    for pieces in (list(cut(text)), list(source.pieces("train"))):
        assert len(pieces) > 2
        assert all(piece.text.endswith("\n") for piece in pieces[:-1])
        assert all(len(piece.text) <= 2 * PIECE_CHARS for piece in pieces)
        assert text.startswith(*documents(pieces))
    assert list(cut("")) == []
    assert list(cut_stream(["no ", "line"])) == [Piece("no ", False), Piece("line", True)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_jsonl_holds_out_by_content(tmp_path: Path, name: str) -> None:
    texts = [f"story {i % 150} \x00 é" for i in range(200)]  # 50 of them twice
    write_jsonl(tmp_path / name, texts, field="body")
    source = Jsonl(str(tmp_path / name), field="body", val_fraction=0.2)
    train, val = split(source)
    assert sorted(train + val) == sorted(texts)
    assert 20 < len(val) < 60
    assert (source.size_hint() is None) == name.endswith(".gz")


def test_jsonl_with_a_named_held_out_file_and_blank_lines(tmp_path: Path) -> None:
    train, val = tmp_path / "train.jsonl", tmp_path / "val.jsonl"
    train.write_text('{"text": "a"}\n\n{"text": ""}\n{"text": "b"}')
    write_jsonl(val, ["c"])
    source = Jsonl(str(train), str(val))
    assert split(source) == (["a", "b"], ["c"])
    assert source.identity() != Jsonl([str(train), str(val)]).identity()


def test_hugging_face_splits_and_rows_of_one_document(tmp_path: Path) -> None:
    stories, lines = [f"story {i}" for i in range(40)], ["", " = Title = \n", "", " Text . \n"]
    write_jsonl(tmp_path / "train.jsonl", stories)
    write_jsonl(tmp_path / "validation.jsonl", lines)
    folder = str(tmp_path)
    assert split(HuggingFace(folder, val_split="validation")) == (stories, [x for x in lines if x])
    train, val = split(HuggingFace(folder, val_fraction=0.3))
    assert sorted(train + val) == sorted(stories)
    assert len(val) > 3
    joined = HuggingFace(folder, val_split="validation", one_document=True)
    assert split(joined) == (["".join(stories)], ["".join(lines)])


@pytest.mark.parametrize("size", [1, 65536, 4 << 20])
def test_samples_cover_small_spans_and_no_more(tmp_path: Path, size: int) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(size + 20))
    whole = sampled_sha256(path, 10, size)
    for place in (9, 10, 10 + size // 3, 10 + size // 2, 9 + size, 10 + size):
        changed = bytearray(size + 20)
        changed[place] = 1
        path.write_bytes(changed)
        assert (sampled_sha256(path, 10, size) != whole) == (10 <= place < 10 + size)
