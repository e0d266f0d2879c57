"""Making packs, and tasks made from them: rows that do not fit, hubs that fail, no network."""

import gzip
import json
import os
import random
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import pytest

from experiments import prefetch
from experiments.config.entry import CONF_DIR
from experiments.evaluation import tasks as tasks_module
from experiments.evaluation.pack import Pack
from experiments.evaluation.prefetching import read_jsonl
from experiments.evaluation.squad_metrics import (
    MODULE,
    compute_exact,
    compute_f1,
    normalize_answer,
)
from experiments.evaluation.tasks import Tasks
from experiments.runs.run_dir import RunDir

pytestmark = pytest.mark.usefixtures("_small_index")


def run_main(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> int:
    monkeypatch.setattr(sys, "argv", ["prefetch", *overrides])
    try:
        prefetch.main()
    except SystemExit as left:
        return left.code  # type: ignore[return-value]
    return 0


def write_rows_file(file: Path, rows: list[Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


PIQA = [{"goal": f"Open {i}", "sol1": "Pull it.", "sol2": "Eat it.", "label": 0} for i in range(5)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A folder with five rows of piqa."""
    folder = tmp_path / "rows"
    folder.mkdir()
    write_rows_file(folder / "piqa.jsonl", PIQA)
    return folder


def test_the_command_makes_and_replaces_a_pack(
    paper_rows: Path, tmp_path: Path, monkeypatch, capsys, neox_tokenizer_json: Path
) -> None:
    out = tmp_path / "deep" / "pack"
    command = [
        f"out={out}",
        f"source={paper_rows}",
        "tasks.tasks=[piqa,ai2_arc]",
        f"tokenizer_file={neox_tokenizer_json}",
    ]
    assert run_main(monkeypatch, *command) == 0
    shown = capsys.readouterr().out
    assert "piqa: 6 rows of validation (a subset: the official split has 1838)" in shown
    pack = Pack(out)
    assert list(pack.tasks) == ["piqa", "arc_challenge", "arc_easy"]
    assert pack.tokenizer is not None
    assert pack.tokenizer.read_bytes() == neox_tokenizer_json.read_bytes()
    assert os.listdir(out.parent) == ["pack"]  # nothing half-made is left

    assert run_main(monkeypatch, *command) == 2
    assert "holds a pack: force=true replaces it" in capsys.readouterr().err
    assert run_main(monkeypatch, *command, "force=true", "tasks.tasks=[piqa,arc_easy]") == 0
    assert list(Pack(out).tasks) == ["piqa", "arc_easy"]
    assert not (out / "data" / "arc_challenge").exists()
    before = Pack(out).hash
    assert run_main(monkeypatch, *command, "force=true", "tasks.tasks=[piqa,arc_easy]") == 0
    assert Pack(out).hash == before  # same rows, same pack

    mine = tmp_path / "mine" / "data"
    mine.mkdir(parents=True)
    assert run_main(monkeypatch, *command[1:], f"out={mine.parent}", "force=true") == 2
    assert "holds other things than a pack" in capsys.readouterr().err
    assert mine.is_dir()

    (out / "mine.txt").write_text("x")
    assert run_main(monkeypatch, *command, "force=true") == 2
    assert "holds other things than a pack" in capsys.readouterr().err
    assert (out / "mine.txt").read_text() == "x"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks.tasks=[piqa,record,sciq]"], "has no record.jsonl (task record), sciq.jsonl (task"),
        (["files={piqa: other.jsonl}"], "has no other.jsonl (task piqa)"),
        (["files={copa: other.jsonl}"], "files= names tasks that are not asked for: copa"),
        (["files=5"], "files must be {TASK: NAME.jsonl, ...}, got 5"),
        (["source=null", "files={piqa: x}"], "files= names files of source=FOLDER"),
        (["source=/nowhere"], "source=/nowhere is not a folder"),
        (["tasks.tasks=[cloze]"], "cloze is made from each run's own text"),
        (["tasks.tasks=[piqqa]"], "lm-eval knows no task 'piqqa'; like it are piqa"),
        (["tokenizer_file=/nowhere"], "tokenizer_file=/nowhere is not a file"),
        ([f"tokenizer_file={CONF_DIR / 'train.yaml'}"], "train.yaml is not a tokenizer.json"),
    ],
)
def test_bad_requests_are_one_line(
    rows: Path, monkeypatch, capsys, overrides: list[str], message: str
) -> None:
    asked = [f"source={rows}", "tasks.tasks=[piqa]", f"out={rows.parent / 'pack'}", *overrides]
    given = {override.partition("=")[0]: override for override in asked}
    assert run_main(monkeypatch, *given.values()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert os.listdir(rows.parent) == ["rows"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: [{"question": row.pop("goal"), **row} for row in rows],
            "row 1 does not fit it",
        ),
        (lambda rows: [*rows[:2], {**rows[2], "label": 2}, *rows[3:]], "row 3 does not fit it"),
        (lambda rows: [*rows[:4], {"goal": "x"}], "line 5 of .* does not have the fields"),
        (lambda rows: [*rows[:4], {**rows[4], "label": "no"}], "values of several types"),
        (lambda rows: [*rows, "text"], "line 6 of .* does not have the fields"),
        (lambda rows: [], "holds no rows"),
        (lambda rows: rows * 400, "2000 rows, but its validation split has 1838"),
    ],
)
def test_rows_that_do_not_fit_are_named(rows: Path, monkeypatch, capsys, change, message) -> None:
    write_rows_file(rows / "piqa.jsonl", change([dict(row) for row in PIQA]))
    out = rows.parent / "pack"
    assert run_main(monkeypatch, f"source={rows}", "tasks.tasks=[piqa]", f"out={out}") == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("error:")]
    assert "piqa.jsonl" in line
    assert re.search(message, line)
    assert os.listdir(rows.parent) == ["rows"]


def test_a_row_that_a_tasks_own_code_refuses_is_found(
    paper_rows: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    lines = (paper_rows / "hellaswag.jsonl").read_text().splitlines()
    lines[3] = lines[3].replace('"label": "3"', '"label": ""')
    (tmp_path / "hellaswag.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    asked = [f"source={tmp_path}", "tasks.tasks=[hellaswag]", f"out={tmp_path / 'pack'}"]
    assert run_main(monkeypatch, *asked) == 2
    expected = "hellaswag.jsonl.gz is not right for task hellaswag: row 4 does not fit it: Value"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"a": 1}\n{"a": \n', r"line 2 of .*rows\.jsonl is not JSON"),
        ("rows.jsonl", b'{"a": "\xff"}\n', r"rows\.jsonl is damaged"),
        ("rows.jsonl", b'{"a": 1}\n{"a": 123456789012345678901234567890}\n', "too large a number"),
        (
            "rows.jsonl.gz",
            gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-9],
            r"rows\.jsonl\.gz is damaged",
        ),
    ],
)
def test_damaged_files_are_one_line(tmp_path: Path, name: str, content: bytes, message) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_jsonl(tmp_path / name)


def test_only_line_ends_end_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": "one\u2028line"}\n\n{"a": "x"}')
    assert read_jsonl(tmp_path / "rows.jsonl")["a"] == ["one\u2028line", "x"]


class Hub:
    """`datasets.load_dataset` of a hub that knows a data set under one name."""

    def __init__(self, known: str) -> None:
        self.known = known
        self.asked: list[str] = []

    def __call__(self, path: str, name: str | None = None, **_: Any) -> dict[str, Any]:
        self.asked.append(path)
        if path != self.known:
            raise datasets.exceptions.DatasetNotFoundError(f"no {path}\nat all")
        rows = datasets.Dataset.from_list(PIQA)
        return {"train": rows.select([0, 1, 2]), "validation": rows, "test": rows}


@pytest.mark.parametrize("known", ["baber/piqa", "ybisk/piqa", "piqa"])
def test_a_data_set_that_moved_is_found(tmp_path: Path, monkeypatch, known: str) -> None:
    hub = Hub(known)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    out = tmp_path / "pack"
    assert run_main(monkeypatch, "tasks.tasks=[piqa]", "tasks.n_documents={}", f"out={out}") == 0
    assert hub.asked[0] == "baber/piqa"  # what the installed lm-eval says comes first
    assert hub.asked[-1] == known
    entry = Pack(out).tasks["piqa"]
    assert list(entry["splits"]) == ["validation"]  # no few-shot examples were asked for
    # known counts stay; what the hub has is whole
    assert (entry["official"], entry["subset"]) == (1838, True)


@pytest.mark.parametrize("known", ["baber/piqa", "piqa"])
def test_a_data_set_that_moved_is_found_without_a_pack(monkeypatch, known: str) -> None:
    monkeypatch.setattr(datasets, "load_dataset", Hub(known))
    (piqa,) = Tasks(["piqa"], None, 0).load("piqa", None)["tasks"].values()
    assert len(piqa.eval_docs) == 5
    assert piqa.config.dataset_path == known
    with pytest.raises(ValueError, match="neither cached here nor can they be downloaded"):
        Tasks(["copa"], None, 0).load("copa", None)


def test_the_hubs_whole_split_is_no_subset(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", Hub("baber/piqa"))
    out = tmp_path / "pack"
    asked = ["tasks=base", "tasks.tasks=[piqa]", "tasks.num_fewshot=2", f"out={out}"]
    assert run_main(monkeypatch, *asked) == 0
    entry = Pack(out).tasks["piqa"]
    assert {split: part["rows"] for split, part in entry["splits"].items()} == {
        "validation": 5,
        "train": 3,
    }
    assert (entry["official"], entry["subset"]) == (5, False)
    task = Tasks(["piqa"], None, 0, pack=out).load("piqa", None)["tasks"]["piqa"]
    assert task.fewshot_context(task.eval_docs[0], num_fewshot=2).count("Question:") == 3


def test_a_hub_out_of_reach_says_what_to_do(tmp_path: Path, monkeypatch, capsys) -> None:
    hub = Hub("other")
    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert run_main(monkeypatch, "tasks.tasks=[boolq]", f"out={tmp_path / 'pack'}") == 2
    assert hub.asked == ["aps/super_glue", "super_glue"]
    (line,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error:")]
    assert "the rows of boolq cannot be had from the hub (aps/super_glue: no aps/super_glue" in line
    assert "source=FOLDER with boolq.jsonl, or copy a pack" in line
    assert os.listdir(tmp_path) == []


def test_tasks_come_from_the_pack(paper_pack: Path) -> None:
    tasks = Tasks(["ai2_arc", "piqa", "copa", "cloze"], None, 0, pack=paper_pack)
    assert tasks.names == ["arc_challenge", "arc_easy", "piqa", "copa", "cloze"]
    assert tasks.members("piqa") == ["piqa"]
    (task,) = tasks.load("piqa", None)["tasks"].values()
    assert task.doc_to_text(task.eval_docs[5]) == "Question: Open 5\nAnswer:"
    assert task.VERSION == 1.0
    assert tasks.documents("piqa") == {"official": 1838, "subset": True}
    assert tasks.pack_hash("piqa") == Pack(paper_pack).task_hash("piqa")[:16]
    assert tasks.pack_hash("cloze") is None
    assert tasks.documents("copa")["subset"] is False
    assert tasks.documents("arc_easy")["subset"] is None
    assert tasks.documents("cloze") == {"official": None, "subset": None}
    with pytest.raises(ValueError, match="has no task hellaswagg, gsm8k: it has boolq, copa, "):
        Tasks(["hellaswagg", "piqa", "gsm8k"], None, 0, pack=paper_pack)


def test_few_shot_examples_that_a_pack_lacks_are_refused(paper_pack: Path) -> None:
    tasks = Tasks(["piqa", "lambada_openai"], None, 0, pack=paper_pack)
    (piqa,) = tasks.load("piqa", None)["tasks"].values()
    piqa.set_fewshot_seed(1)
    with pytest.raises(ValueError, match="no rows of split 'train' for few-shot examples"):
        piqa.fewshot_context(piqa.eval_docs[0], num_fewshot=1)
    (lambada,) = tasks.load("lambada_openai", None)["tasks"].values()  # has its test split alone
    assert lambada.fewshot_context(lambada.eval_docs[0], num_fewshot=1).count("told her") == 2


def test_another_definition_or_version_is_refused(paper_pack: Path, monkeypatch) -> None:
    there = Pack(paper_pack).tasks["piqa"]["definition"]
    monkeypatch.setattr(tasks_module, "definition", lambda *_: there | {"doc_to_text": "{{goal}}"})
    with pytest.raises(ValueError, match=r"task piqa is not defined here .*\(doc_to_text"):
        Tasks(["piqa"], None, 0, pack=paper_pack)
    monkeypatch.setattr(tasks_module, "version", lambda _: "0.4.99")
    with pytest.raises(ValueError, match=rf"with lm-eval {version('lm-eval')}, here is 0.4.99"):
        Tasks(["piqa"], None, 0, pack=paper_pack)


def test_own_task_files_stay_with_their_owner(rows: Path, tmp_path: Path, monkeypatch) -> None:
    """A pack holds the rows of a task of the user's own, but its file must be given again."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "code.py").write_text("def text(doc):\n    return 'Q: ' + doc['goal']\n")
    (folder / "mine.yaml").write_text(
        "task: mine\ndataset_path: some/where\nvalidation_split: validation\n"
        "output_type: multiple_choice\ndoc_to_text: !function code.text\ndoc_to_target: label\n"
        "doc_to_choice: '{{[sol1, sol2]}}'\nmetric_list: [{metric: acc}]\n"
    )
    write_rows_file(rows / "mine.jsonl", PIQA)
    out = tmp_path / "pack"
    monkeypatch.setattr(Tasks, "_manager", Tasks._local)
    asked = ["tasks=base", "tasks.tasks=[mine]", f"tasks.include_path={folder}", f"source={rows}"]
    assert run_main(monkeypatch, *asked, f"out={out}") == 0
    assert Pack(out).tasks["mine"]["definition"]["doc_to_text"] == "!function code.text"
    (task,) = Tasks(["mine"], str(folder), 0, pack=out).load("mine", None)["tasks"].values()
    assert task.doc_to_text(task.eval_docs[0]) == "Q: Open 0"
    with pytest.raises(ValueError, match=r"no file that defines task mine.*tasks\.include_path"):
        Tasks(["mine"], None, 0, pack=out)


def test_answers_are_compared_as_by_another_implementation() -> None:
    assert compute_f1("the", "an") == 1.0  # nothing is left of either
    assert compute_f1("the", "cat") == 0.0
    from lm_eval.tasks.super_glue.record.t5_utils import (
        normalize_squad,
        squad_em_agg,
        squad_f1_agg,
    )

    rng = random.Random(0)
    words = ["The", "a", "cat", "Cat's", "dog,", "über", "an", "x", "the-cat", " \t", "I.B.M."]
    for _ in range(300):
        one, two = (" ".join(rng.choices(words, k=rng.randint(1, 5))) for _ in range(2))
        assert normalize_answer(one) == normalize_squad(one)
        if normalize_answer(one) and normalize_answer(two):
            assert compute_f1(one, two) == pytest.approx(squad_f1_agg([(one, f"0_{two}")]))
            assert compute_exact(one, two) == squad_em_agg([(one, f"0_{two}")])


def forget_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.super_glue.record.util", raising=False)


@pytest.mark.parametrize("transformers", ["as it is", "absent"])
def test_record_is_scored_without_transformers_metrics(
    paper_pack: Path, monkeypatch, transformers: str
) -> None:
    forget_record(monkeypatch)
    if transformers == "absent":
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "transformers", None)  # import fails
    (record,) = Tasks(["record"], None, 0, pack=paper_pack).load("record", None)["tasks"].values()
    assert MODULE not in sys.modules
    doc = record.eval_docs[0]
    assert doc["entities"] == ["Ann", "Bob", "the Ann"]
    scores = [(-1.0, False), (-3.0, False), (-2.0, False)]
    assert record.process_results(doc, scores) == {"f1": 1.0, "em": 1}
    assert record.process_results(doc, [scores[2], scores[1], scores[0]]) == {"f1": 1.0, "em": 1}
    wrong = [(-3.0, False), (-1.0, False), (-2.0, False)]
    assert record.process_results(doc, wrong) == {"f1": 0.0, "em": 0}


NO_NETWORK = """
import os, socket, sys
def refuse(*args, **kwargs):
    os.write(2, b"the network was asked for\\n")
    os._exit(99)
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


@pytest.mark.slow
def test_a_pack_needs_no_network_and_no_cache(
    paper_pack: Path, run: RunDir, tmp_path: Path
) -> None:
    """Scores all twelve with sockets that end the process, in an empty home."""
    asked = [f"run='{run.path}'", f"pack={paper_pack}", "tasks=paper12", "tasks.bootstrap_iters=0"]
    argv = ["evaluate", "device=cpu", "n_threads=1", *asked]
    code = f"sys.argv = {argv}\nfrom experiments.evaluate import main\nmain()\n"
    told = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HOME", "HF_DATASETS_CACHE")
    env = {key: value for key, value in os.environ.items() if key not in told}
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK + code],
        cwd=CONF_DIR.parent,
        env=env | {"HOME": str(home), "HF_HOME": str(home / "hf")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    pack = Pack(paper_pack)
    for task, entry in pack.tasks.items():
        scored = json.loads((run.path / "eval" / f"{task}.json").read_text())
        assert scored["n-samples"][task]["effective"] == 6
        assert scored["protocol"]["pack"] == pack.task_hash(task)[:16]
        assert scored["protocol"]["subset"] == entry["subset"]
    assert not (home / "hf").exists()
