"""The report from planted runs: complete, true to the numbers, self-contained, never half there."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from analysis import report

planted = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("planted.py"))))
CONTENTS = dict(OmegaConf.load(report.CONF / "report" / "default.yaml").contents)
FIGURES = {
    "scaling", "loss_gap", "loss_curves", "loss_against_compute", "throughput", "generation",
    "zero_shot_by_parameters", "zero_shot_by_flops", "zero_shot_mean",
}  # fmt: skip
# three small sizes have one task of accuracy, no published likes, no documents and none to hold out
SHOWN = set(CONTENTS) - {"zero_shot_mean", "published_gap", "comparisons", "held_out_size"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two seeds of everything, a run unfinished, a run damaged; the report's folder and text."""
    root = tmp_path_factory.mktemp("runs")
    planted.write_suite(root, seeds=2, noise=0.0)
    unfinished = planted.write_run(root, model="gpt_tiny", seed=7)
    (unfinished / "result.json").unlink()
    damaged = planted.write_run(root, model="gpt_tiny", seed=8)
    (damaged / "manifest.json").write_text("{")
    index, text = report.build("demo", root, CONTENTS, "gpt")
    return index.parent, text


def test_every_table_and_figure_is_written_in_every_form(built: tuple[Path, str]) -> None:
    folder, text = built
    for name in SHOWN:
        for suffix in ["png"] if name in FIGURES else ["csv", "md", "tex"]:
            assert (folder / f"{name}.{suffix}").stat().st_size > 100, name
    assert (folder / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert len(re.findall(r"^\|---", text, re.MULTILINE)) == len(SHOWN - FIGURES)
    assert not list(folder.parent.glob(".report*"))


def test_numbers_are_the_planted_ones(built: tuple[Path, str]) -> None:
    folder, text = built
    runs = pd.read_csv(folder / "runs.csv")
    assert len(runs) == 12
    for _, row in runs.iterrows():
        family, _, _, total, non_embedding, bpb = planted.MODELS[row["model"]]
        assert row["family"] == family
        assert (row["parameters/total"], row["parameters/non_embedding"]) == (total, non_embedding)
        assert row["val/bpb"] == pytest.approx(bpb)
        assert row["time_s"] * row["perf/tokens_per_s"] == pytest.approx(row["tokens"])
    pairs = pd.read_csv(folder / "matched_pairs.csv").set_index("model")
    assert pairs.loc["rwkv4_nano", "reference"] == "gpt_nano"
    assert pairs["gap"].round(6).to_dict() == {
        "rwkv4_nano": -0.08, "rwkv4_micro": 0.03, "rwkv4_tiny": -0.03,
    }  # fmt: skip
    assert "-0.0800 [-0.0800, -0.0800]" in text
    fits = pd.read_csv(folder / "scaling_fits.csv")
    ours = runs[runs["family"] == "rwkv4"]
    slope, _ = np.polyfit(np.log(ours["parameters/total"]), np.log(ours["val/bpb"]), 1)
    law = fits[(fits["family"] == "rwkv4") & (fits["x"] == "total parameters")].iloc[0]
    assert law["b"] == pytest.approx(-slope)
    assert (law["n_sizes"], law["n_runs"]) == (3, 6)
    scores = pd.read_csv(folder / "zero_shot_scores.csv").set_index(["task", "model"])
    assert scores.loc[("bits_per_byte", "gpt_micro"), "score"] == pytest.approx(2.47)
    assert scores.loc[("cloze", "gpt_micro"), "chance"] == 0.25
    assert scores.loc[("cloze", "gpt_micro"), "weights"] == "seed=000 seed=100"
    assert scores.loc[("cloze", "gpt_micro"), "protocol/checkpoint"] == "last"
    assert "| 0-shot, last checkpoint, v1.0" in text
    assert "All rows: float32, prefix none, window 256, lm-eval 0.4.13." in text
    cost = pd.read_csv(folder / "generation_cost.csv").set_index("model")
    assert cost.loc["gpt_nano", "state_bytes@65536"] == 2 * 3 * 64 * 4 * 65536
    assert cost.loc["rwkv4_nano", "state_bytes@64"] == 5 * 3 * 64 * 4
    assert cost.loc["rwkv4_nano", "prefill_tokens_per_s@64"] == pytest.approx(8 / 2.4e-4)
    assert cost.loc["rwkv4_nano", "reference"] == "gpt_nano"
    # 1.1 x flat meets 1 + n / 4096, drawn straight between 256 and 1024 in log-log
    assert 256 < cost.loc["rwkv4_nano", "cheaper_decode_s"] < 4096 * 0.11
    assert np.isnan(cost.loc["gpt_nano", "cheaper_decode_s"])


def test_what_is_left_out_is_said(built: tuple[Path, str]) -> None:
    folder, text = built
    left_out = pd.read_csv(folder / "left_out.csv").set_index("run")
    assert left_out.loc["demo/gpt_tiny/seed=7", "state"] == "interrupted"
    assert left_out.loc["demo/gpt_tiny/seed=8", "state"] == "damaged"
    html = (folder / "index.html").read_text()
    assert "<b>2 left out</b>" in html
    assert "demo/gpt_tiny/seed=8" in html
    assert "demo/gpt_tiny/seed=8" in text


def test_the_page_needs_nothing_else(built: tuple[Path, str]) -> None:
    html = (built[0] / "index.html").read_text()
    assert len(re.findall(r'src="data:image/png;base64,', html)) == len(FIGURES) - 1
    targets = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert all(t.startswith(("data:image/png", "#")) for t in targets)
    assert not re.search(r"https?://|<script|@import|url\(", html)
    ids = set(re.findall(r'<section id="([^"]*)"', html))
    assert {t[1:] for t in targets if t.startswith("#")} <= ids


def test_a_failed_report_leaves_the_old_one(
    built: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = built
    before = (folder / "index.html").read_bytes()

    def burst(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", burst)
    with pytest.raises(OSError, match="No space"):
        report.build("demo", folder.parent.parent, CONTENTS, "gpt")
    assert (folder / "index.html").read_bytes() == before
    assert not list(folder.parent.glob(".report*"))


def run_command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = (
        "import atexit, runpy, sys; atexit.register(lambda: print('torch' in sys.modules)); "
        "runpy.run_module('analysis.report', run_name='__main__', alter_sys=True)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_command_writes_the_report_and_never_imports_torch(tmp_path: Path) -> None:
    planted.write_run(tmp_path / "runs")
    done = run_command("suite=demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["runs/demo/report/index.html", "False"]
    assert (tmp_path / "runs/demo/report/index.html").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]  # nothing of Hydra's


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("suite=nope", "error: no suite 'nope' in runs/ (there are: demo)"),
        ("suit=demo", "error: Could not override 'suit'"),
    ],
)
def test_command_says_one_line_and_exits_with_2(
    tmp_path: Path, argument: str, message: str
) -> None:
    planted.write_run(tmp_path / "runs")
    done = run_command(argument, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_every_suite_yaml_names_functions_that_exist() -> None:
    for path in (report.CONF / "report").glob("*.yaml"):
        for name, target in (OmegaConf.load(path).get("contents") or {}).items():
            if target is not None:
                report.find_target(name, target)
