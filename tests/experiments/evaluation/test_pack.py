"""Packs on disk: what goes in comes out, and what was changed since is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value

from experiments.evaluation.pack import Pack, content_hash, file_hash, read_rows, write_rows


@pytest.fixture
def pack(tmp_path: Path, paper_pack: Path) -> Path:
    return Path(shutil.copytree(paper_pack, tmp_path / "pack"))


def rewrite(pack: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a pack.json as somebody would who knows how its hash is made."""
    content = json.loads((pack / "pack.json").read_text())
    change(content)
    del content["hash"]
    content["hash"] = content_hash(content)
    (pack / "pack.json").write_text(json.dumps(content))


def test_rows_come_out_as_they_went_in(paper_pack: Path, paper_rows: Path) -> None:
    pack = Pack(paper_pack)
    assert len(pack.tasks) == 12
    for task, entry in pack.tasks.items():
        rows = pack.dataset(task)
        assert list(rows) == [entry["scored"]]
        lines = (paper_rows / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
        assert list(rows[entry["scored"]]) == [json.loads(line) for line in lines]
        assert entry["splits"][entry["scored"]]["rows"] == len(lines)
    assert pack.tasks["arc_easy"]["scored"] == "test"
    assert pack.tasks["piqa"]["scored"] == "validation"
    assert pack.tasks["piqa"]["version"] == 1.0
    assert pack.groups == {"ai2_arc": ["arc_challenge", "arc_easy"]}
    assert pack.tokenizer is None


def test_definitions_are_plain_data(paper_pack: Path) -> None:
    pack = Pack(paper_pack)
    record = pack.definition("record")
    assert record["process_results"] == "!function super_glue/record/util.process_results"
    assert "include" not in pack.definition("arc_challenge")  # what it includes stands in it
    text = (paper_pack / "tasks" / "record.yaml").read_text()
    assert str(Path(json.__file__).parents[1]) not in text  # no path of this machine


def test_column_types_survive_and_nothing_is_cached(tmp_path: Path, monkeypatch) -> None:
    features = Features({"label": ClassLabel(names=["no", "yes"]), "text": Value("string")})
    rows = Dataset.from_dict({"label": [0, 1, 1], "text": ["a", "b", "ü"]}, features=features)
    monkeypatch.chdir(tmp_path)
    first = write_rows(rows, tmp_path / "rows.parquet")
    back = read_rows(tmp_path / "rows.parquet")
    assert back.features == features
    assert list(back) == list(rows)
    assert back.map(lambda row: {"n": len(row["text"])}).cache_files == []
    again = write_rows(rows.select([0, 1, 2]), tmp_path / "again.parquet")
    other = write_rows(rows.select([0, 2, 1]), tmp_path / "other.parquet")
    assert first == again != other
    assert file_hash(tmp_path / "rows.parquet") == file_hash(tmp_path / "again.parquet")
    assert {path.suffix for path in tmp_path.iterdir()} == {".parquet"}


def test_a_task_has_a_hash_of_its_own(pack: Path, paper_pack: Path) -> None:
    rewrite(pack, lambda content: content["tasks"].pop("copa"))
    less, whole = Pack(pack), Pack(paper_pack)
    assert less.hash != whole.hash
    assert less.task_hash("piqa") == whole.task_hash("piqa") != whole.task_hash("sciq")


@pytest.mark.parametrize("name", ["data/piqa/validation.parquet", "tasks/sciq.yaml"])
def test_a_flipped_byte_names_its_file(pack: Path, name: str) -> None:
    content = bytearray((pack / name).read_bytes())
    content[len(content) // 2] ^= 1
    (pack / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is damaged: its hash is off"):
        Pack(pack)


def test_a_changed_index_is_refused(pack: Path) -> None:
    index = pack / "pack.json"
    text = index.read_text()
    index.write_text(text.replace('"official": 1838', '"official": 6'))
    with pytest.raises(ValueError, match=r"pack\.json is damaged: its hash is off"):
        Pack(pack)
    broken_ones = ("[]", "{}", '{"format": 1, "hash": "x"}', "\udcff", "[" * 100_000)
    for broken in (text[:-40], *broken_ones):
        index.write_text(broken, errors="surrogateescape")
        with pytest.raises(ValueError, match=r"pack\.json is damaged"):
            Pack(pack)


@pytest.mark.parametrize("key", ["scored", "subset", "splits"])
def test_an_index_that_lacks_a_part_is_refused(pack: Path, key: str) -> None:
    rewrite(pack, lambda content: content["tasks"]["copa"].pop(key))
    with pytest.raises(ValueError, match=r"pack\.json is damaged"):
        Pack(pack)


@pytest.mark.parametrize("groups", [[], {"pair": 5}, {"pair": [["copa"]]}, {"pair": ["coppa"]}])
def test_groups_of_what_is_not_there_are_refused(pack: Path, groups: Any) -> None:
    rewrite(pack, lambda content: content.update(groups=groups))
    with pytest.raises(ValueError, match=r"pack\.json is damaged"):
        Pack(pack)


def test_what_is_no_pack_or_lacks_a_file_is_told(pack: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a task pack"):
        Pack(tmp_path)
    (pack / "data" / "copa" / "validation.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"copa/validation\.parquet is missing"):
        Pack(pack)


def test_another_format_is_refused(pack: Path) -> None:
    rewrite(pack, lambda content: content.update(format=2))
    with pytest.raises(ValueError, match="has format 2, this version reads 1"):
        Pack(pack)


@pytest.mark.parametrize("path", ["../secret", "/etc/hostname", "data/../../secret", "a\\b"])
def test_a_path_that_leaves_the_pack_is_refused(pack: Path, path: str) -> None:
    secret = pack.parent / "secret"
    secret.write_text("x")

    def lead_out(content: dict[str, Any]) -> None:
        entry = content["tasks"]["piqa"]["splits"]["validation"]
        entry.update(file=path, sha256=file_hash(secret))

    rewrite(pack, lead_out)
    with pytest.raises(ValueError, match="names a file outside its folder"):
        Pack(pack)
    rewrite(pack, lambda content: content["tasks"]["copa"].update(source=f"{path}.yaml"))
    with pytest.raises(ValueError, match="names a file outside its folder"):
        Pack(pack)


def test_a_link_that_leaves_the_pack_is_refused(pack: Path) -> None:
    file = pack / "data" / "piqa" / "validation.parquet"
    shutil.move(file, pack.parent / "elsewhere")
    file.symlink_to(pack.parent / "elsewhere")
    with pytest.raises(ValueError, match="leads out of the pack"):
        Pack(pack)


def test_columns_that_open_files_are_refused(pack: Path, tmp_path: Path) -> None:
    features = Features({"picture": Image()})
    rows = Dataset.from_dict({"picture": [{"path": "/etc/hostname", "bytes": None}]}, features)
    with pytest.raises(ValueError, match="column of type 'Image'"):
        write_rows(rows, tmp_path / "rows.parquet")
    rows.to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="column of type 'Image'"):
        read_rows(tmp_path / "rows.parquet")
    (tmp_path / "rows.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match="holds no rows of a task"):
        read_rows(tmp_path / "rows.parquet")


def test_a_definition_is_never_executed(pack: Path, tmp_path: Path) -> None:
    file = pack / "tasks" / "piqa.yaml"
    file.write_text(f"doc_to_text: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")

    def accept(content: dict[str, Any]) -> None:
        content["tasks"]["piqa"]["definition"]["sha256"] = file_hash(file)

    rewrite(pack, accept)
    with pytest.raises(ValueError, match=r"piqa\.yaml is not a task's definition as plain data"):
        Pack(pack).definition("piqa")
    assert not (tmp_path / "made").exists()
