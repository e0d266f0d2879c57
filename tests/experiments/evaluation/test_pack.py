"""Packs on disk: what goes in comes out, and what was changed since is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value

from experiments.evaluation.pack import Pack, content_hash, write_rows
from experiments.evaluation.tasks import Tasks
from experiments.system.files import sha256


@pytest.fixture
def pack(tmp_path: Path, paper_pack: Path) -> Path:
    return Path(shutil.copytree(paper_pack, tmp_path / "pack"))


def rewrite(pack: Path, change: Callable[[dict[str, Any]], Any]) -> None:
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
        lines = (paper_rows / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
        assert {split: list(part) for split, part in rows.items()} == {
            entry["scored"]: [json.loads(line) for line in lines]
        }
    assert pack.tasks["arc_easy"]["scored"] == "test"
    assert pack.tasks["piqa"]["scored"] == "validation"
    assert pack.groups == {"ai2_arc": ["arc_challenge", "arc_easy"]}
    assert pack.tokenizer is None
    record = pack.tasks["record"]["definition"]
    assert record["process_results"] == "!function super_glue/record/util.process_results"
    assert "site-packages" not in (paper_pack / "pack.json").read_text()  # no path of this machine


def test_a_task_has_a_hash_of_its_own(pack: Path, paper_pack: Path) -> None:
    rewrite(pack, lambda content: content["tasks"].pop("copa"))
    less, whole = Pack(pack), Pack(paper_pack)
    assert less.hash != whole.hash
    assert less.task_hash("piqa") == whole.task_hash("piqa") != whole.task_hash("sciq")


def test_column_types_survive_and_a_hash_of_rows_is_of_their_values(pack: Path) -> None:
    features = Features({"label": ClassLabel(names=["no", "yes"]), "text": Value("string")})
    rows = Dataset.from_dict({"label": [0, 1, 1], "text": ["a", "b", "ü"]}, features=features)
    file = pack / "data" / "copa" / "validation.parquet"
    first = write_rows(rows, file)
    digest = sha256(file)
    assert write_rows(rows.select([0, 2, 1]), file) != first == write_rows(rows, file)
    assert sha256(file) == digest
    rewrite(pack, lambda content: content["files"].update({"data/copa/validation.parquet": digest}))
    back = Pack(pack).dataset("copa")["validation"]
    assert back.features == features
    assert list(back) == list(rows)
    assert back.map(lambda row: {"n": len(row["text"])}).cache_files == []


def test_what_was_changed_is_refused(pack: Path) -> None:
    rows = pack / "data" / "piqa" / "validation.parquet"
    original, content = rows.read_bytes(), bytearray(rows.read_bytes())
    content[len(content) // 2] ^= 1
    rows.write_bytes(content)
    with pytest.raises(ValueError, match=r"piqa/validation\.parquet is damaged: its hash is off"):
        Pack(pack)
    rows.unlink()
    with pytest.raises(FileNotFoundError, match=r"piqa/validation\.parquet is missing"):
        Pack(pack)
    rows.write_bytes(original)
    text = (pack / "pack.json").read_text()
    for broken in (text.replace('"official": 1838', '"official": 6'), text[:-40], "[]", "\x00"):
        (pack / "pack.json").write_text(broken)
        with pytest.raises(ValueError, match=r"pack\.json is damaged: its hash is off"):
            Pack(pack)
    (pack / "pack.json").unlink()
    with pytest.raises(FileNotFoundError, match="is not a task pack"):
        Pack(pack)


@pytest.mark.parametrize("path", ["../secret", "/etc/hostname", "data/../../secret", "link"])
def test_a_file_outside_of_the_pack_is_refused(pack: Path, path: str) -> None:
    (pack.parent / "secret").write_text("x")
    (pack / "link").symlink_to(pack.parent / "secret")
    rewrite(pack, lambda content: content["files"].update({path: sha256(pack.parent / "secret")}))
    with pytest.raises(ValueError, match="names a file outside its folder"):
        Pack(pack)


@pytest.mark.usefixtures("_small_index")
def test_code_outside_of_lm_eval_is_never_run(pack: Path, tmp_path: Path) -> None:
    (tmp_path / "evil.yaml").write_text("task: piqa\ndoc_to_text: !function evil.run\n")
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    source = {"source": str(tmp_path / "evil.yaml"), "definition": {"doc_to_text": "evil.run"}}
    rewrite(pack, lambda content: content["tasks"]["piqa"].update(source))
    with pytest.raises(ValueError, match="names a file outside of lm-eval"):
        Tasks(["piqa"], None, 0, pack=pack)


def test_columns_that_open_files_are_refused(pack: Path, tmp_path: Path) -> None:
    features = Features({"picture": [Image()]})
    rows = Dataset.from_dict({"picture": [[{"path": "/etc/hostname", "bytes": None}]]}, features)
    with pytest.raises(ValueError, match="'picture' is no text or number"):
        write_rows(rows, tmp_path / "rows.parquet")
    file = pack / "data" / "copa" / "validation.parquet"
    rows.to_parquet(str(file))
    digest = sha256(file)
    rewrite(pack, lambda content: content["files"].update({"data/copa/validation.parquet": digest}))
    with pytest.raises(ValueError, match="'picture' is no text or number"):
        Pack(pack).dataset("copa")
