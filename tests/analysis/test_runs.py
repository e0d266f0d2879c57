"""Run directories, whole and broken, become the right rows; what must not mix is refused."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from analysis.benchmarks import benchmark_scores

from analysis.evaluations import load_scores
from analysis.generation import crossing, mean_generation
from analysis.runs import load_curves, load_runs
from analysis.study import NothingToShowError, best_variants, load_study, mean_scores

planted = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("planted.py"))))


def test_one_row_a_run_with_the_numbers_of_its_files(tmp_path: Path) -> None:
    planted.write_run(tmp_path, model="gpt_nano", seed=3, bpb=2.5, overrides="optim=own")
    (row,) = load_runs(tmp_path / "demo").to_dict("records")
    assert (row["run"], row["status"]) == ("demo/gpt_nano/seed=3,optim=own", "finished")
    assert (row["family"], row["seed"], row["variant"]) == ("gpt", 3, "optim=own")
    assert row["parameters/total"] == 199_000
    assert row["val/bpb"] == 2.5
    assert row["val/loss"] == pytest.approx(2.5 * np.log(2))
    assert row["flops"] == row["tokens"] * row["flops_per_token"]
    assert row["device/name"] == "Some CPU"


def test_every_state_of_a_run_is_told_apart(tmp_path: Path) -> None:
    planted.write_run(tmp_path, seed=0)
    running = planted.write_run(tmp_path, seed=1, n_rows=4)
    (running / "result.json").unlink()
    failed = planted.write_run(tmp_path, seed=2)
    (failed / "result.json").unlink()
    (failed / "error.txt").write_text(
        "loss is NaN at step 7; lower optim.peak_lr=0.003 or use 32-true\n\n"
        "Traceback (most recent call last):\n  ...\nLossNotFinite: loss is NaN\n"
    )
    mended = planted.write_run(tmp_path, seed=8)
    (mended / "error.txt").write_text("of an earlier attempt\n\nTraceback\n")
    cut = planted.write_run(tmp_path, seed=3)
    (cut / "manifest.json").write_text('{"suite": "de')
    gone = planted.write_run(tmp_path, seed=4)
    (gone / "manifest.json").unlink()
    odd = planted.write_run(tmp_path, seed=5)
    result = json.loads((odd / "result.json").read_text())
    (odd / "result.json").write_text(json.dumps(result | {"val/loss": None}))
    binary = planted.write_run(tmp_path, seed=6)
    (binary / "result.json").write_bytes(b"\xff\xfe\x00")
    frozen = tmp_path / "demo" / "rwkv4_nano" / "seed=7"
    frozen.mkdir()
    (frozen / "config.yaml").write_text("seed: 7\n")

    runs = load_runs(tmp_path / "demo").set_index("path")
    seen = {int(path.rsplit("=", 1)[1]): (r.status, r.reason) for path, r in runs.iterrows()}
    assert seen[0] == ("finished", "")
    assert seen[1] == ("running-or-interrupted", "no result.json; reached step 40")
    reason = "loss is NaN at step 7; lower optim.peak_lr=0.003 or use 32-true"
    assert seen[2] == ("failed", reason)
    assert seen[8] == ("finished", "")
    assert seen[3][0] == "unreadable"
    assert "manifest.json is not JSON" in seen[3][1]
    assert seen[4] == ("unreadable", "manifest.json lacks suite")
    assert seen[5][0] == "unreadable"
    assert "val/loss=None" in seen[5][1]
    assert seen[6][0] == "unreadable"
    assert "result.json is not JSON" in seen[6][1]
    assert seen[7] == ("running-or-interrupted", "no result.json, no readable metrics.csv yet")

    study = load_study(tmp_path / "demo")
    assert list(study.runs["seed"]) == [0, 8]
    assert len(study.left_out) == 7


def test_the_later_row_of_a_step_counts(tmp_path: Path) -> None:
    run = planted.write_run(tmp_path, n_rows=3)
    with (run / "metrics.csv").open("a") as file:
        file.write("20,666666,9.0,,,,1.25,1.75,,,\n20,666666,9.0,0.001,3.5,0.1,,,100,,\n")
    curves, problems = load_curves(load_runs(tmp_path))
    assert problems == []
    assert len(curves) == 6  # a train and a val row for each of 3 steps
    at = curves[curves["step"] == 20]
    assert sorted(at["val/bpb"].dropna()) == [1.75]
    assert sorted(at["train/loss"].dropna()) == [3.5]
    assert (curves["run"] == "demo/rwkv4_nano/seed=0").all()


def test_damaged_metric_rows_are_skipped_and_told(tmp_path: Path) -> None:
    run = planted.write_run(tmp_path, n_rows=3)
    with (run / "metrics.csv").open("a") as file:
        file.write("40,123,nonsen\x00\n50,1333333,9.0,,,,1.0,1.5,,,\n60,16")
    other = planted.write_run(tmp_path, seed=1)
    (other / "metrics.csv").write_text("a,b\n1,2\n")
    empty = planted.write_run(tmp_path, seed=2)
    (empty / "metrics.csv").write_text("")
    curves, problems = load_curves(load_runs(tmp_path))
    assert set(curves["run"]) == {"demo/rwkv4_nano/seed=0"}
    assert 1.5 in set(curves["val/bpb"])
    told = dict(problems)
    assert "damaged rows skipped" in told["demo/rwkv4_nano/seed=0"]
    assert "not the list of columns" in told["demo/rwkv4_nano/seed=1"]
    assert "metrics.csv" in told["demo/rwkv4_nano/seed=2"]


def test_damaged_scores_and_costs_leave_the_run_in(tmp_path: Path) -> None:
    run = planted.write_run(tmp_path)
    (run / "eval" / "cloze.json").write_text("{")
    (run / "bench" / "generate.json").write_text('{"rows": [{"n_tokens": 1}]}')
    study = load_study(tmp_path / "demo")
    assert len(study.runs) == 1
    assert set(study.scores["task"]) == {"bits_per_byte"}
    assert study.generation.empty
    assert any("eval/cloze.json" in reason for reason in study.left_out["reason"])
    assert any("bench/generate.json" in reason for reason in study.left_out["reason"])


def test_globs_and_missing_folders(tmp_path: Path) -> None:
    planted.write_suite(tmp_path, seeds=1)
    planted.write_run(tmp_path, suite="other")
    assert len(load_runs(tmp_path / "demo")) == 6
    assert set(load_runs(f"{tmp_path}/demo/rwkv4_*")["family"]) == {"rwkv4"}
    with pytest.raises(FileNotFoundError, match="no runs in"):
        load_runs(tmp_path / "nothing")


def test_report_and_checkpoint_folders_are_not_runs(tmp_path: Path) -> None:
    run = planted.write_run(tmp_path)
    for folder in (tmp_path / "demo" / "report", tmp_path / "demo" / ".report-x"):
        planted.write_json(folder / "result.json", {})
    planted.write_json(run / "checkpoints" / "manifest.json", {})
    assert list(load_runs(tmp_path / "demo")["path"]) == [str(run)]


def test_scores_keep_lm_evals_keys_and_name_the_headline(tmp_path: Path) -> None:
    run = planted.write_run(tmp_path, accuracy=0.31)
    metrics = {"acc_norm,none": 0.4, "acc_norm_stderr,none": 0.02, "acc,none": 0.3,
               "acc_stderr,none": 0.01}  # fmt: skip
    planted.write_eval(run, "piqa", metrics)
    planted.write_eval(run, "lambada", {"perplexity,none": 20.0, "acc,none": 0.2})
    scores, problems = load_scores(load_runs(tmp_path))
    assert problems == []
    headlines = scores[scores["headline"]].set_index("task")
    assert headlines["metric"].to_dict() == {
        "bits_per_byte": "bits_per_byte,none",
        "cloze": "acc,none",
        "lambada": "acc,none",
        "piqa": "acc,none",
    }
    assert headlines.loc["cloze", ["score", "stderr", "chance"]].tolist() == [0.31, 0.01, 0.25]
    assert np.isnan(headlines.loc["bits_per_byte", "stderr"])
    both = scores[scores["task"] == "piqa"].set_index("metric")
    assert both["stderr"].to_dict() == {"acc,none": 0.01, "acc_norm,none": 0.02}


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
        load_study(tmp_path / "demo")
    assert "(demo/gpt_nano/seed=0)" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(load_study(tmp_path / "demo", allow_mixed=True).runs) == 3


def test_token_budgets_may_differ_between_sizes_not_within_a_pair(tmp_path: Path) -> None:
    for model, budget in (("nano", 1_000_000), ("tiny", 4_000_000)):
        for family in ("rwkv4", "gpt"):
            about = {"budget_tokens": budget}
            planted.write_run(tmp_path, model=f"{family}_{model}", about=about)
    study = load_study(tmp_path / "demo")
    assert sorted(study.runs["tokens"].unique()) == [1e6, 4e6]
    planted.write_run(tmp_path, model="gpt_tiny", seed=1, about={"budget_tokens": 1_000_000})
    with pytest.raises(ValueError, match="differ in token budget of rwkv4_tiny and gpt_tiny: "):
        load_study(tmp_path / "demo")


def test_peak_rates_are_read_from_the_configs(tmp_path: Path) -> None:
    planted.write_run(tmp_path, seed=0, peak_lr=0.004)
    planted.write_run(tmp_path, seed=1, overrides="optim.peak_lr=1.0e-05")
    damaged = planted.write_run(tmp_path, seed=2)
    (damaged / "config.yaml").write_text("optim: [\n")
    (planted.write_run(tmp_path, seed=3) / "config.yaml").unlink()
    runs = load_runs(tmp_path / "demo").set_index("seed")
    assert runs.loc[[0, 1], "peak_lr"].tolist() == [0.004, 1e-5]
    assert runs.loc[[2, 3], "peak_lr"].isna().all()
    assert (runs["status"] == "finished").all()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dtype", "bfloat16"),
        ("checkpoint", "best"),
        ("rolling_ctx", 64),
        ("limit", 20),
        ("gen_kwargs", "{'max_gen_toks': 64}"),
        ("seed", 3),
        ("task_version", 2),
        ("subset", True),
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
        load_study(tmp_path / "demo")
    assert str(value)[:24] in str(caught.value)
    study = load_study(tmp_path / "demo", allow_mixed=True)
    cloze = mean_scores(study.scores[study.scores["task"] == "cloze"])
    assert sorted(cloze["score"]) == [0.3, 0.4]  # no mean over what is not alike
    shown = benchmark_scores(study).markdown().splitlines()
    assert any("| cloze" in line and str(value)[:8] in line for line in shown)


@pytest.mark.parametrize("key", ["weights", "device", "max_ctx", "n_truncated", "time_s"])
def test_what_a_score_does_not_depend_on_may_differ(tmp_path: Path, key: str) -> None:
    planted.write_run(tmp_path, seed=0)
    run = planted.write_run(tmp_path, seed=1)
    planted.write_eval(run, "cloze", {"acc,none": 0.3}, 0.25, **{key: 7})
    scores = load_study(tmp_path / "demo").scores
    assert mean_scores(scores).set_index("task").loc["cloze", "n_runs"] == 2


def test_a_manifest_from_before_the_data_seed_was_noted_is_read(tmp_path: Path) -> None:
    planted.write_run(tmp_path, seed=0)
    old = planted.write_run(tmp_path, seed=1)
    manifest = json.loads((old / "manifest.json").read_text())
    del manifest["data"]["seed"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    assert len(load_study(tmp_path / "demo").runs) == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [("n_threads", 1), ("device", "cuda"), ("dtype", "bfloat16"), ("chunk_len", 1)],
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
        load_study(tmp_path / "demo")
    with pytest.raises(NothingToShowError, match="measured in different ways"):
        mean_generation(load_study(tmp_path / "demo", allow_mixed=True))


def test_an_unfinished_run_of_other_data_does_not_stop_the_report(tmp_path: Path) -> None:
    planted.write_run(tmp_path, seed=0)
    run = planted.write_run(tmp_path, seed=1, data={"fingerprint": "e" * 16})
    (run / "result.json").unlink()
    assert len(load_study(tmp_path / "demo").runs) == 1


def test_no_finished_run_is_an_error_that_counts_them(tmp_path: Path) -> None:
    run = planted.write_run(tmp_path)
    (run / "result.json").unlink()
    with pytest.raises(ValueError, match=r"no finished run in .*1 running-or-interrupted"):
        load_study(tmp_path / "demo")


def test_repeats_are_seeds_only(tmp_path: Path) -> None:
    for seed in (0, 1):
        planted.write_run(tmp_path, seed=seed, bpb=2.9, overrides="optim.lr=0.001")
        planted.write_run(tmp_path, seed=seed, bpb=2.7, overrides="optim.lr=0.002")
    kept, notes = best_variants(load_runs(tmp_path))
    assert list(kept["val/bpb"]) == [2.7, 2.7]
    assert list(kept["n_variants"]) == [2, 2]
    assert notes == ["rwkv4_nano: best of 2 variants by val/bpb: optim.lr=0.002."]


@pytest.mark.parametrize(
    ("about", "name"),
    [
        ({"precision": "bf16-mixed"}, "bf16-mixed"),
        ({"recipe": {"optim": "own", "schedule": "shared"}}, "own"),
    ],
)
def test_runs_of_another_precision_or_recipe_are_no_repeats(
    tmp_path: Path, about: dict, name: str
) -> None:
    planted.write_run(tmp_path, seed=0, bpb=2.9)
    planted.write_run(tmp_path, seed=1, bpb=2.7, about=about)
    kept, notes = best_variants(load_study(tmp_path / "demo").runs)
    assert list(kept["val/bpb"]) == [2.7]
    assert notes == [f"rwkv4_nano: best of 2 variants by val/bpb: no overrides, {name}."]


def test_crossing_is_where_a_model_becomes_cheaper_for_good() -> None:
    at = [64, 256, 1024, 4096]
    flat, growing = pd.Series([8.0] * 4, at), pd.Series([1.0, 4.0, 16.0, 64.0], at)
    assert crossing(flat, growing) == pytest.approx(512)  # growing is n / 64
    assert crossing(flat, growing * 10) == 64
    assert crossing(growing, flat) == np.inf
    assert np.isnan(crossing(flat, growing.set_axis([1, 2, 3, 4])))
    back = pd.Series([1.0, 16.0, 16.0, 4.0], at)
    assert crossing(back, flat) == pytest.approx(2048)  # the last time counts


def test_generation_measured_by_an_earlier_version_is_left_out(tmp_path: Path) -> None:
    run = planted.write_run(tmp_path)
    rows = [{"n_tokens": 64, "seconds": 1.0, "state_bytes": 5, "peak_mem_bytes": 1}]
    planted.write_json(run / "bench" / "generate.json", {"protocol": {}, "rows": rows})
    study = load_study(tmp_path / "demo")
    assert study.generation.empty
    assert study.left_out["reason"].tolist() == [
        "bench/generate.json: measured by an earlier version: measure again"
    ]
    with pytest.raises(NothingToShowError, match="no run has bench"):
        mean_generation(study)
