"""bench=evaluate at toy size: what it compares is equal, and what it counts is right."""

from pathlib import Path
from typing import Any

import pytest

from experiments.benchmarks.evaluate import evaluation, work
from experiments.evaluation.prefix_tree import plan
from models.families import families

SIZE = {"name": "toy", "reference": "rwkv4", "n_layer": 2, "n_embd": 16, "n_head": 2}
TOY: dict[str, Any] = {"size": SIZE, "ctx_len": 256, "hf_batch_sizes": [2], "repeats": 1}


@pytest.fixture(scope="module")
def small_pack(
    tmp_path_factory: pytest.TempPathFactory,
    paper_rows: Path,
    small_index: Any,
    neox_tokenizer_json: Path,
) -> Path:
    """Two tasks, with a tokenizer."""
    from experiments.evaluation.prefetching import Wanted, find_files, make_pack
    from experiments.evaluation.tasks import Tasks

    out = tmp_path_factory.mktemp("packs") / "two"
    names = ["piqa", "lambada_openai"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tasks, "_manager", small_index)
        files = find_files(paper_rows, {}, names)
        make_pack(out, Wanted(Tasks(names, None, 0), 0, {}, files, neox_tokenizer_json))
    return out


@pytest.mark.slow
def test_every_family_scores_as_lm_evals_hf_backend(small_pack: Path) -> None:
    tasks = ["piqa", "lambada_openai"]
    (rows,) = evaluation(str(small_pack), tasks, n_documents=4, **TOY).tables.values()
    expected = [(family.label, task) for family in families().values() for task in tasks]
    assert [(row["model"], row["task"]) for row in rows] == expected
    for row in rows:
        assert row["largest difference, nats"] < 1e-3
        assert row["greedy alike"]
        assert row["requests"] == (8 if row["task"] == "piqa" else 4)
        assert row["tokens scored"] <= row["tokens run"] <= row["tokens given"]
        assert row["tokens run"] < row["tokens given"] or row["task"] != "piqa"
        assert row["ratio"] > 0
        assert row["time / limit"] > 0


def test_what_it_needs_is_said(small_pack: Path, paper_pack: Path) -> None:
    with pytest.raises(ValueError, match="give the documents, pack=DIR"):
        evaluation(None, ["piqa"], n_documents=1, **TOY)
    with pytest.raises(ValueError, match="has no tokenizer"):
        evaluation(str(paper_pack), ["piqa"], n_documents=1, **TOY)
    with pytest.raises(ValueError, match="has no task sciq"):
        evaluation(str(small_pack), ["sciq"], n_documents=1, **TOY)


def test_shared_beginnings_are_counted_once() -> None:
    context = tuple(range(20))
    requests = [((*context, 30), (31, 32)), ((*context, 40), (41, 42))]
    # 20 shared, and of each its last context token and all but the last answer token
    assert work(plan(requests)[1]) == (20 + 2 * 2, 4)
