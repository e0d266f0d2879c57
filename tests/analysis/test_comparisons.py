"""Pairs of models on the same documents: what is compared, how, and what is left out."""

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from analysis.comparisons import MEAN, comparisons
from analysis.significance import mcnemar
from analysis.study import NothingToShowError, load_study

planted = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("planted.py"))))


def pair_of(tmp_path: Path, first: list, second: list, metric: str = "acc") -> tuple[Path, Path]:
    """A matched pair of converted models with one scored task, `piqa`."""
    runs = [planted.write_converted(tmp_path, "demo", m) for m in ("rwkv4_169m", "pythia_160m")]
    for run, right in zip(runs, (first, second), strict=True):
        planted.write_scored_documents(run, "piqa", metric, right)
    return runs[0], runs[1]


def test_planted_differences_are_in_the_table(tmp_path: Path) -> None:
    planted.write_paper_suite(tmp_path, share=0.25)
    table = comparisons(load_study(tmp_path / "official", "gpt"))
    frame = table.frame
    by_pair = frame.set_index(["model", "task"])
    assert set(frame["reference"]) == {f"pythia_{s}/official" for s in ("160m", "410m", "1b4")}
    # planted: RWKV is 5 points better on every task, the third family is not
    for size in ("169m", "430m", "1b5"):
        mean = by_pair.loc[(f"rwkv4_{size}/official", MEAN)]
        assert mean["low"] > 0
        assert mean["p_holm"] < 0.05
        assert abs(mean["difference"] - 0.05) < 0.03
    assert by_pair.loc[("mamba_370m/official", MEAN), "p"] > 0.05
    assert (frame["p_holm"] >= frame["p"]).all()
    assert f"corrected for all {len(frame)} tests" in " ".join(table.notes)
    assert len(frame) == 5 * 13
    assert "| 459 (subset) " in table.markdown()  # of piqa's 1838
    assert "Subset: fewer documents" in " ".join(table.notes)


def test_a_comparison_by_hand(tmp_path: Path) -> None:
    first = [1, 1, 1, 1, 1, 1, 1, 0, 1, 0]
    second = [0, 0, 0, 0, 0, 0, 0, 1, 1, 0]
    pair_of(tmp_path, first, second)
    table = comparisons(load_study(tmp_path / "demo", "gpt"))
    (row,) = table.frame.to_dict("records")
    assert (row["only_model"], row["only_reference"], row["n_documents"]) == (7, 1, 10)
    assert row["p"] == row["p_holm"] == mcnemar(7, 1)
    assert row["difference"] == pytest.approx(0.6)
    assert row["low"] == pytest.approx(0.1, abs=0.11)
    assert table.texts()[1][0][-1] == "–"  # 0.07: not below 0.05
    assert "7 / 1" in table.markdown()
    assert "ubset" not in table.markdown()


def test_lower_is_better_where_it_is_and_lengths_weigh(tmp_path: Path) -> None:
    runs = [planted.write_converted(tmp_path, "demo", m) for m in ("rwkv4_169m", "pythia_160m")]
    rng = np.random.default_rng(0)
    lengths = rng.integers(50, 500, 60)
    for run, rate in zip(runs, (0.7, 0.8), strict=True):
        nats = -(rate + 0.05 * rng.normal(size=60)) * lengths
        score = -nats.sum() / lengths.sum() / np.log(2)
        about = {"protocol_hash": planted.PROTOCOL_HASH, "n_documents": 60}
        planted.write_eval(run, "wikitext", {"bits_per_byte,none": score}, **about)
        rows = [[float(a), int(b)] for a, b in zip(nats, lengths, strict=True)]
        planted.write_documents(run, "wikitext", "bits_per_byte", rows)
    (row,) = comparisons(load_study(tmp_path / "demo", "gpt")).frame.to_dict("records")
    assert row["difference"] == pytest.approx(row["score"] - row["reference/score"])
    assert row["low"] < row["difference"] < row["high"] < 0
    assert row["test"] == "sign flip"
    assert (
        comparisons(load_study(tmp_path / "demo", "gpt")).texts()[1][0][-1] == "rwkv4_169m/official"
    )


def test_seeds_are_averaged_over_each_document_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for model, rate in (("rwkv4_nano", 0.9), ("gpt_nano", 0.5)):
        for seed in (0, 1):
            run = planted.write_run(tmp_path, model=model, seed=seed)
            right = (rng.random(200) < rate).astype(int).tolist()
            planted.write_scored_documents(run, "piqa", "acc", right)
    table = comparisons(load_study(tmp_path / "demo", "gpt"))
    row = table.frame.set_index("task").loc["piqa"]
    assert (row["test"], row["n_runs"], row["n_documents"]) == ("sign flip", 2, 200)
    assert row["difference"] == pytest.approx(row["score"] - row["reference/score"])
    assert row["p_holm"] < 0.001
    assert any("Seeds are not resampled" in note for note in table.notes)
    assert any("no eval/cloze.documents.jsonl" in note for note in table.notes)


@pytest.mark.parametrize(("swing", "better"), [(0.0, "rwkv4_nano"), (0.2, "–")])
def test_better_asks_for_the_seeds_too(tmp_path: Path, swing: float, better: str) -> None:
    """20 points on every document's mean; a swing of the seeds may leave that to luck."""
    shares = {0: 0.66 + swing, 1: 0.7, 2: 0.74 - swing}
    for seed, share in shares.items():
        for model, right in (("rwkv4_nano", share), ("gpt_nano", 0.5 + 0.01 * (seed - 1))):
            run = planted.write_run(tmp_path, model=model, seed=seed)
            n = round(500 * right)
            planted.write_scored_documents(run, "piqa", "acc", [1] * n + [0] * (500 - n))
    table = comparisons(load_study(tmp_path / "demo", "gpt"))
    at = table.frame["task"].tolist().index("piqa")
    row = table.frame.loc[at]
    assert (row["n_seeds"], row["p_holm"] < 0.001) == (3, True)
    differences = [shares[seed] - 0.5 - 0.01 * (seed - 1) for seed in (0, 1, 2)]
    interval = stats.ttest_1samp(differences, 0).confidence_interval()
    assert (row["seeds_low"], row["seeds_high"]) == pytest.approx(tuple(interval))
    heads, rows = table.texts()
    cells = dict(zip(heads, rows[at], strict=True))
    assert cells["better"] == better
    assert cells["over seeds"] == f"[{interval.low:+.4f}, {interval.high:+.4f}] (3)"


def _other_documents(run: Path) -> None:
    file = run / "eval" / "piqa.documents.jsonl"
    file.write_text(file.read_text().replace('"d3"', '"e3"'))


def _other_values(run: Path) -> None:
    planted.write_documents(run, "piqa", "acc", [1, 1, 1, 1])


def _cut(run: Path) -> None:
    file = run / "eval" / "piqa.documents.jsonl"
    file.write_text(file.read_text()[:-9])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda run: (run / "eval" / "piqa.documents.jsonl").unlink(), "no eval/piqa.documents"),
        (_other_documents, r"not the same documents \(4 and 4, 3 in common\)"),
        (_other_values, r"mean acc of its documents is 1.000000, its score 0.500000"),
        (_cut, "piqa.documents.jsonl is damaged"),
        (
            lambda run: (run / "eval" / "piqa.json").unlink(),
            "pythia_160m/official has no score of it",
        ),
    ],
)
def test_what_cannot_be_compared_is_left_out_with_the_reason(
    tmp_path: Path, change: Callable[[Path], None], reason: str
) -> None:
    _, others = pair_of(tmp_path, [1, 1, 0, 0], [1, 0, 1, 0])
    change(others)
    with pytest.raises(NothingToShowError, match=reason):
        comparisons(load_study(tmp_path / "demo", "gpt"))


def test_documents_in_another_order_or_twice_are_matched(tmp_path: Path) -> None:
    _, others = pair_of(tmp_path, [1, 1, 0, 0], [1, 0, 1, 0])
    file = others / "eval" / "piqa.documents.jsonl"
    head, *rows = file.read_text().splitlines()
    file.write_text("\n".join([head, *reversed(rows)]) + "\n")
    (row,) = comparisons(load_study(tmp_path / "demo", "gpt")).frame.to_dict("records")
    assert (row["only_model"], row["only_reference"]) == (1, 1)
