"""Rows in the shape of the paper's twelve tasks, a pack of them, and an index of those tasks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from experiments.runs.run_dir import RunDir
from experiments.system.files import write_json
from models.gpt.model import GPT

N_ROWS = 6
LETTERS = ["A", "B", "C", "D"]
FOLDERS = (
    "arc", "super_glue", "headqa", "hellaswag", "lambada", "openbookqa", "piqa", "sciq",
    "winogrande",
)  # fmt: skip
PAPER12 = (
    "arc_easy", "arc_challenge", "boolq", "copa", "headqa_en", "hellaswag", "lambada_openai",
    "openbookqa", "piqa", "record", "sciq", "winogrande",
)  # fmt: skip


def paper_row(task: str, i: int) -> dict[str, Any]:
    """Row i of a task, with the columns the task's data set has."""
    four = {"text": [f"thing {i} {letter}" for letter in LETTERS], "label": LETTERS}
    arc = {"id": f"q{i}", "question": f"Which is {i}?", "choices": four, "answerKey": "ABCD"[i % 4]}
    rows: dict[str, dict[str, Any]] = {
        "arc_easy": arc,
        "arc_challenge": arc,
        "boolq": {"question": f"is {i} even", "passage": f"On {i}.", "idx": i, "label": i % 2},
        "copa": {
            "premise": f"The man saw {i}.",
            "choice1": "He ran.",
            "choice2": "It fell.",
            "question": ("cause", "effect")[i % 2],
            "idx": i,
            "label": i % 2,
        },
        "headqa_en": {
            "qid": i,
            "qtext": f"What is {i}?",
            "ra": 1 + i % 4,
            "answers": [{"aid": k + 1, "atext": f"it {k}"} for k in range(4)],
        },
        "hellaswag": {
            "ind": i,
            "activity_label": "Running",
            "ctx_a": "A man runs.",
            "ctx_b": f"he sees {i}",
            "ctx": f"A man runs. he sees {i}",
            "endings": [f"and [step] goes {k}." for k in range(4)],
            "label": str(i % 4),
        },
        "lambada_openai": {"text": f"He had told her {i} times about the old house"},
        "openbookqa": {
            "id": f"o{i}",
            "question_stem": f"The sun is {i}",
            "choices": four,
            "answerKey": "ABCD"[i % 4],
        },
        "piqa": {"goal": f"Open {i}", "sol1": "Pull it.", "sol2": "Eat it.", "label": i % 2},
        "record": {
            "passage": f"Ann met Bob.\n@highlight\nThey talked {i} times",
            "query": "Then @placeholder left.",
            "entities": ["Bob", "Ann", "the Ann"],
            "answers": ["Ann"],
            "idx": {"passage": i, "query": i},
        },
        "sciq": {
            "question": f"What is {i}?",
            "distractor3": "a",
            "distractor1": "b",
            "distractor2": "c",
            "correct_answer": "d",
            "support": " It is d.",
        },
        "winogrande": {
            "sentence": f"Ann met Eve {i} times so _ smiled.",
            "option1": "Ann",
            "option2": "Eve",
            "answer": str(1 + i % 2),
        },
    }
    return rows[task]


@pytest.fixture(scope="session")
def paper_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `<task>.jsonl` for each of the twelve tasks, six rows each."""
    folder = tmp_path_factory.mktemp("rows")
    for task in PAPER12:
        lines = [json.dumps(paper_row(task, i)) + "\n" for i in range(N_ROWS)]
        (folder / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def small_index() -> Any:
    """lm-eval's index of the twelve tasks and their neighbours; the whole one takes ten seconds."""
    from lm_eval import tasks

    root = Path(tasks.__file__).parent
    folders = [root / name for name in FOLDERS]
    return tasks.TaskManager(include_path=folders, include_defaults=False)


@pytest.fixture
def _small_index(monkeypatch: pytest.MonkeyPatch, small_index: Any) -> None:
    from experiments.evaluation.tasks import Tasks

    monkeypatch.setattr(Tasks, "_manager", small_index)


@pytest.fixture(scope="session")
def paper_pack(
    tmp_path_factory: pytest.TempPathFactory, paper_rows: Path, small_index: Any
) -> Path:
    """A pack of the twelve tasks, made from `paper_rows`."""
    from experiments.evaluation.prefetching import Wanted, find_files, make_pack
    from experiments.evaluation.tasks import Tasks

    out = tmp_path_factory.mktemp("packs") / "paper12"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tasks, "_manager", small_index)
        tasks = Tasks([*PAPER12[2:], "ai2_arc"], None, 0)
        files = find_files(paper_rows, {}, list(PAPER12))
        make_pack(out, Wanted(tasks, 0, {"piqa": 1838, "copa": N_ROWS}, files))
    return out


NET = {
    "_target_": "models.gpt.model.GPT",
    "vocab_size": 256,
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "ctx_len": 400,
}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A converted run: no data of its own."""
    path = tmp_path / "runs" / "toy" / "gpt_toy" / "released"
    (path / "checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    model = GPT(**{k: v for k, v in NET.items() if k != "_target_"})  # type: ignore[arg-type]
    OmegaConf.save(OmegaConf.create({"model": {"net": NET}}), path / "config.yaml")
    weights = {f"model.{k}": v for k, v in model.state_dict().items()}
    torch.save({"state_dict": weights}, path / "checkpoints" / "last.ckpt")
    (path / "tokenizer.json").write_text(json.dumps({"kind": "bytes", "vocab_size": 256}))
    write_json(path / "manifest.json", {"converted": {"format": "hf_gpt_neox"}})
    write_json(path / "result.json", {"converted": True})
    return RunDir(path)
