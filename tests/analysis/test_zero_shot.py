"""Tables and figures of scores, converted runs among them, from planted runs."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from omegaconf import OmegaConf

from analysis import report, zero_shot
from analysis.study import load_study

planted = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("planted.py"))))


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite of converted runs alone, on a quarter of the documents of twelve tasks."""
    root = tmp_path_factory.mktemp("runs")
    planted.write_paper_suite(root, share=0.25)
    return root / "official"


@pytest.mark.slow
def test_a_suite_of_converted_runs_makes_a_report(official: Path) -> None:
    contents = dict(OmegaConf.load(report.CONF / "report" / "default.yaml").contents)
    del contents["zero_shot_by_parameters"]  # drawn below; two such grids take seconds to write
    index, text = report.build("official", official.parent, contents, "gpt")
    absent = {line.split(": ")[1] for line in text.splitlines() if line.startswith("not shown")}
    assert absent == {
        "scaling", "matched_pairs", "loss_gap", "scaling_fits", "exponents", "held_out_size",
        "loss_curves", "loss_against_compute", "throughput", "training_throughput", "runs",
        "left_out",
    }  # fmt: skip
    for name in set(contents) - absent:
        assert (index.with_name(f"{name}.png").exists()) != (index.with_name(f"{name}.md").exists())


def test_trained_and_converted_runs_stand_together(tmp_path: Path) -> None:
    """Another context, data and budget are no reason; another protocol is."""
    planted.write_run(tmp_path, model="rwkv4_nano")
    planted.write_run(tmp_path, model="gpt_nano")
    external = planted.write_converted(tmp_path, "demo", "rwkv4_169m")
    for run in tmp_path.glob("demo/*/*"):
        planted.write_eval(run, "piqa", {"acc,none": 0.6, "acc_stderr,none": 0.01}, subset=False)
    study = load_study(tmp_path / "demo", "gpt")
    assert len(study.trained) == 2
    scores = zero_shot.zero_shot_scores(study).frame
    assert len(scores[scores["task"] == "piqa"]) == 3
    assert scores["n_runs"].eq(1).all()
    planted.write_eval(external, "piqa", {"acc,none": 0.6}, prefix="newline", subset=False)
    with pytest.raises(ValueError, match=r"differ in prefix of piqa: none .* against newline"):
        load_study(tmp_path / "demo", "gpt")


def test_headlines_and_their_direction(tmp_path: Path) -> None:
    run = planted.write_converted(tmp_path, "demo", "rwkv4_169m")
    both = {"acc,none": 0.3, "acc_norm,none": 0.35}
    for task in ("hellaswag", "piqa"):
        planted.write_eval(run, task, both)
    planted.write_eval(run, "record", {"f1,none": 0.7, "em,none": 0.6})
    planted.write_eval(run, "wikitext", {"word_perplexity,none": 30.0, "bits_per_byte,none": 1.0})
    scores = load_study(tmp_path / "demo", "gpt").scores
    headlines = scores[scores["headline"]].set_index("task")
    assert headlines["metric"].to_dict() == {
        "hellaswag": "acc_norm,none", "piqa": "acc,none", "record": "em,none",
        "wikitext": "bits_per_byte,none",
    }  # fmt: skip
    assert headlines["higher_is_better"].to_dict()["wikitext"] is False
    assert headlines.loc["hellaswag", "chance"] == 0.25


def test_the_mean_is_over_tasks_that_all_models_have(tmp_path: Path) -> None:
    for model, scores in {
        "rwkv4_169m": {"piqa": 0.6, "copa": 0.7, "sciq": 0.8},
        "pythia_160m": {"piqa": 0.5, "copa": 0.6},
    }.items():
        run = planted.write_converted(tmp_path, "demo", model)
        for task, score in scores.items():
            planted.write_eval(run, task, {"acc,none": score, "acc_stderr,none": 0.03})
    plot = zero_shot.zero_shot_mean(load_study(tmp_path / "demo", "gpt"))
    axes = plot.figure.axes[0]
    lines = {bars.get_label(): bars.lines[0] for bars in axes.containers}
    assert lines["RWKV-4"].get_ydata() == pytest.approx([0.65])
    assert lines["GPT"].get_ydata() == pytest.approx([0.55])
    low, high = axes.containers[0].lines[2][0].get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(np.sqrt(2 * 0.03**2) / 2)
    assert "Without tasks that not all models have: sciq." in plot.notes
    assert "PIQA (acc)" in " ".join(plot.notes)


def test_panels_come_in_the_papers_order(official: Path) -> None:
    study = load_study(official, "gpt")
    plot = zero_shot.zero_shot_by_parameters(study)
    titles = [axes.get_title(loc="left") for axes in plot.figure.axes]
    assert titles == [
        "ARC-Challenge", "ARC-Easy", "BoolQ", "COPA", "HeadQA", "HellaSwag", "LAMBADA",
        "OpenBookQA", "PIQA", "ReCoRD", "SciQ", "WinoGrande",
    ]  # fmt: skip
    arc = plot.figure.axes[0]
    assert {text.get_text() for text in arc.texts} == {
        "RWKV-4", "Pythia v0", "Pythia v1", "GPT-Neo", "OPT", "BLOOM",
    }  # fmt: skip
    assert any("EleutherAI/pythia; RWKV paper v1" in note for note in plot.notes)
