"""Run directories, whole and broken, become the right rows; what must not mix is refused."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from analysis.evaluations import load_scores
from analysis.generation import crossing, mean_generation
from analysis.runs import State, load_curves, load_runs
from analysis.study import NothingToShowError, best_variants, load_study, mean_scores
from analysis.zero_shot import zero_shot_scores
from experiments.runs.state import State as RunState

planted = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("planted.py"))))


def test_every_state_of_a_run_is_noted_apart(tmp_path: Path) -> None:
    planted.write_run(tmp_path, seed=0)
    running = planted.write_run(tmp_path, seed=1, n_rows=4)
    (running / "result.json").unlink()
    failed = planted.write_run(tmp_path, seed=2)
    (failed / "result.json").unlink()
    (failed / "error.txt").write_text("loss is NaN at step 7\n\nTraceback\n  ...\n")
    cut = planted.write_run(tmp_path, seed=3)
    (cut / "manifest.json").write_text('{"suite": "de')
    frozen = tmp_path / "demo" / "rwkv4_nano" / "seed=4"
    frozen.mkdir()
    (frozen / "config.yaml").write_text("seed: 4\n")
    planted.write_json(tmp_path / "demo" / "report" / "result.json", {})  # no run

    runs = load_runs(tmp_path / "demo")
    seen = {int(r.path.rsplit("=", 1)[1]): (r.state, r.reason) for r in runs.itertuples()}
    assert seen[0] == (State.DONE, "")
    assert seen[1] == (State.INTERRUPTED, "no result.json (or still running); reached step 40")
    assert seen[2] == (State.FAILED, "loss is NaN at step 7")
    assert seen[3][0] == State.DAMAGED
    assert "manifest.json is not JSON" in seen[3][1]
    assert seen[4] == (State.WAITING, "training has not begun")

    study = load_study(tmp_path / "demo", "gpt")
    assert list(study.runs["seed"]) == [0]
    assert len(study.left_out) == 4


def test_states_are_those_of_the_experiments() -> None:
    assert {s.name: s.value for s in State} == {s.name: s.value for s in RunState}


def test_damaged_metric_rows_are_skipped_and_noted(tmp_path: Path) -> None:
    run = planted.write_run(tmp_path, n_rows=3)
    with (run / "metrics.csv").open("a") as file:
        file.write("40,123,nonsen\x00\n50,1333333,9.0,,,,1.0,1.5,,,\n60,16")
    other = planted.write_run(tmp_path, seed=1)
    (other / "metrics.csv").write_text("")
    curves, problems = load_curves(load_runs(tmp_path))
    assert set(curves["run"]) == {"demo/rwkv4_nano/seed=0"}
    assert 1.5 in set(curves["val/bpb"])
    noted = dict(problems)
    assert "damaged rows skipped" in noted["demo/rwkv4_nano/seed=0"]
    assert "metrics.csv" in noted["demo/rwkv4_nano/seed=1"]


def test_mean_scores_do_not_shrink_the_error_over_documents(tmp_path: Path) -> None:
    for seed, accuracy in ((0, 0.3), (1, 0.34)):
        planted.write_run(tmp_path, seed=seed, accuracy=accuracy)
    scores, _ = load_scores(load_runs(tmp_path))
    row = mean_scores(scores).set_index("metric").loc["acc,none"]
    assert row["score"] == pytest.approx(0.32)
    assert row["stderr"] == pytest.approx(0.01)
    assert row["seed_sd"] == pytest.approx(0.04 / np.sqrt(2))
    assert row["n_runs"] == 2


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"data": {"fingerprint": "e" * 16}}, "data fingerprint"),
        ({"data": {"tokenizer_hash": "b" * 16}}, "tokenizer"),
        ({"data": {"seed": 1}}, "data seed"),
        ({"about": {"budget_tokens": 2_000_000}}, "token budget"),
        ({"about": {"ctx_len": 512}}, "context length"),
        ({"about": {"batch_size": 32}}, "batch size"),
    ],
)
def test_runs_that_differ_in_what_must_match_are_refused(
    tmp_path: Path, change: dict, name: str
) -> None:
    planted.write_run(tmp_path, seed=0)
    planted.write_run(tmp_path, seed=1)
    planted.write_run(tmp_path, model="gpt_nano", seed=0, **change)
    with pytest.raises(ValueError, match=f"differ in {name}") as caught:
        load_study(tmp_path / "demo", "gpt")
    assert "(demo/gpt_nano/seed=0)" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(load_study(tmp_path / "demo", "gpt", allow_mixed=True).runs) == 3


def test_token_budgets_may_differ_between_sizes_not_within_a_pair(tmp_path: Path) -> None:
    for model, budget in (("nano", 1_000_000), ("tiny", 4_000_000)):
        for family in ("rwkv4", "gpt"):
            about = {"budget_tokens": budget}
            planted.write_run(tmp_path, model=f"{family}_{model}", about=about)
    study = load_study(tmp_path / "demo", "gpt")
    assert sorted(study.runs["tokens"].unique()) == [1e6, 4e6]
    planted.write_run(tmp_path, model="gpt_tiny", seed=1, about={"budget_tokens": 1_000_000})
    with pytest.raises(ValueError, match="differ in token budget of rwkv4_tiny and gpt_tiny: "):
        load_study(tmp_path / "demo", "gpt")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dtype", "bfloat16"),
        ("checkpoint", "best"),
        ("task_version", 2),
        ("n_documents", 17),
    ],
)
def test_scores_of_different_protocols_are_refused(
    tmp_path: Path, key: str, value: str | int
) -> None:
    planted.write_run(tmp_path, seed=0)
    run = planted.write_run(tmp_path, seed=1)
    scores = {"acc,none": 0.3, "acc_stderr,none": 0.01}
    planted.write_eval(run, "cloze", scores, 0.25, **{key: value})
    with pytest.raises(ValueError, match=f"differ in {key} of cloze: ") as caught:
        load_study(tmp_path / "demo", "gpt")
    assert str(value)[:24] in str(caught.value)
    study = load_study(tmp_path / "demo", "gpt", allow_mixed=True)
    cloze = mean_scores(study.scores[study.scores["task"] == "cloze"])
    assert sorted(cloze["score"]) == [0.3, 0.4]  # no mean over what is not alike
    shown = zero_shot_scores(study).markdown().splitlines()
    assert any("| cloze" in line and str(value)[:8] in line for line in shown)


@pytest.mark.parametrize("key", ["weights", "device", "max_ctx", "n_truncated", "time_s"])
def test_what_a_score_does_not_depend_on_may_differ(tmp_path: Path, key: str) -> None:
    planted.write_run(tmp_path, seed=0)
    run = planted.write_run(tmp_path, seed=1)
    planted.write_eval(run, "cloze", {"acc,none": 0.3}, 0.25, **{key: 7})
    scores = load_study(tmp_path / "demo", "gpt").scores
    assert mean_scores(scores).set_index("task").loc["cloze", "n_runs"] == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [("n_threads", 1), ("device", "cuda")],
)
def test_generation_measured_in_two_ways_is_refused(
    tmp_path: Path, key: str, value: str | int
) -> None:
    planted.write_run(tmp_path, seed=0)
    run = planted.write_run(tmp_path, seed=1)
    file = run / "bench" / "generate.json"
    content = json.loads(file.read_text())
    content["protocol"] |= {key: value, "repeats": 9}
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"differ in {key} of bench/generate.json: "):
        load_study(tmp_path / "demo", "gpt")
    with pytest.raises(NothingToShowError, match="measured in different ways"):
        mean_generation(load_study(tmp_path / "demo", "gpt", allow_mixed=True))


def test_no_finished_run_is_an_error_that_counts_them(tmp_path: Path) -> None:
    run = planted.write_run(tmp_path)
    (run / "result.json").unlink()
    with pytest.raises(ValueError, match=r"no finished run in .*1 interrupted"):
        load_study(tmp_path / "demo", "gpt")


def test_repeats_are_seeds_only(tmp_path: Path) -> None:
    for seed in (0, 1):
        planted.write_run(tmp_path, seed=seed, bpb=2.9, overrides="optim.lr=0.001")
        planted.write_run(tmp_path, seed=seed, bpb=2.7, overrides="optim.lr=0.002")
    kept, notes = best_variants(load_runs(tmp_path))
    assert list(kept["val/bpb"]) == [2.7, 2.7]
    assert list(kept["n_variants"]) == [2, 2]
    assert notes == ["rwkv4_nano: best of 2 variants by val/bpb: optim.lr=0.002."]


def test_crossing_is_where_a_model_becomes_cheaper_for_good() -> None:
    at = [64, 256, 1024, 4096]
    flat, growing = pd.Series([8.0] * 4, at), pd.Series([1.0, 4.0, 16.0, 64.0], at)
    assert crossing(flat, growing) == pytest.approx(512)  # growing is n / 64
    assert crossing(flat, growing * 10) == 64
    assert crossing(growing, flat) == np.inf
    assert np.isnan(crossing(flat, growing.set_axis([1, 2, 3, 4])))
    back = pd.Series([1.0, 16.0, 16.0, 4.0], at)
    assert crossing(back, flat) == pytest.approx(2048)  # the last time counts
