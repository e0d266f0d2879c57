"""bench=evaluate at toy size: what it compares is equal, and what it counts is right."""

from pathlib import Path
from typing import Any

import pytest

from experiments.benchmarks.evaluate import accuracy, evaluation

TOY = {"n_embd": 16, "n_layer": 2, "n_head": 2, "ctx_len": 256, "hf_batch_sizes": [2], "repeats": 1}


@pytest.fixture(scope="module")
def small_pack(
    tmp_path_factory: pytest.TempPathFactory,
    paper_rows: Path,
    small_index: Any,
    neox_tokenizer_json: Path,
) -> Path:
    """Two tasks, with a tokenizer."""
    from experiments.evaluation.task_rows import Source
    from experiments.evaluation.tasks import Tasks
    from experiments.prefetch import make_pack

    out = tmp_path_factory.mktemp("packs") / "two"
    names = ["piqa", "lambada_openai"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tasks, "_manager", small_index)
        wanted: dict[str, Any] = {"num_fewshot": 0, "n_documents": {}}
        source = Source(paper_rows, {}, names)
        make_pack(out, Tasks(names, None, 0), source, wanted, neox_tokenizer_json)
    return out


@pytest.mark.slow
def test_both_families_score_as_lm_evals_hf_backend(small_pack: Path) -> None:
    tasks = ["piqa", "lambada_openai"]
    report = evaluation(str(small_pack), tasks, n_documents=4, **TOY)
    speed, equal = report.tables["Speed, float32"], report.tables["Equality"]
    expected = [(family, task) for family in ("rwkv4", "gpt") for task in tasks]
    assert [(row["model"], row["task"]) for row in equal] == expected
    for row in equal:
        assert row["largest difference"] < 1e-3
        assert row["greedy alike"]
        assert row["acc, ours"] == row["acc, hf"]
    for row in speed:
        assert row["requests"] == (8 if row["task"] == "piqa" else 4)
        assert row["tokens scored"] <= row["tokens run"] <= row["tokens given"]
        assert row["tokens run"] < row["tokens given"] or row["task"] != "piqa"
        assert row["ratio"] > 0
        assert row["time / limit"] > 0
    bars = report.tables["Against what is wanted"]
    assert [bar["measured"] for bar in bars][-1] == max(row["largest difference"] for row in equal)


def test_what_it_needs_is_said(small_pack: Path, paper_pack: Path) -> None:
    with pytest.raises(ValueError, match="give the documents, pack=DIR"):
        evaluation(None, ["piqa"], n_documents=1, **TOY)
    with pytest.raises(ValueError, match="has no tokenizer"):
        evaluation(str(paper_pack), ["piqa"], n_documents=1, **TOY)
    with pytest.raises(ValueError, match="has no task sciq"):
        evaluation(str(small_pack), ["sciq"], n_documents=1, **TOY)


def test_accuracy_is_the_tasks_own() -> None:
    class Instance:
        def __init__(self, doc_id: int, idx: int) -> None:
            self.doc_id, self.idx, self.doc = doc_id, idx, {"gold": doc_id % 2}

    class Task:
        instances = [Instance(d, i) for d in range(3) for i in (1, 0)]  # noqa: RUF012

        @staticmethod
        def process_results(doc: dict[str, int], answers: list[tuple[float, bool]]) -> Any:
            return {"acc": float(max((0, 1), key=lambda i: answers[i][0]) == doc["gold"])}

    answers = [(-1.0, True), (-2.0, True), (-1.0, True), (-2.0, True), (-2.0, True), (-1.0, True)]
    assert accuracy(Task, answers) == pytest.approx(2 / 3)  # 1 | 0, 1 | 1, 0 | 0
