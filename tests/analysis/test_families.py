"""Families are known from run directories and the report's yaml alone."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
from omegaconf import OmegaConf

from analysis import report, tables
from analysis.families import PALETTE, Families
from analysis.study import load_study

planted = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("planted.py"))))


def test_labels_come_from_manifests_and_colours_from_the_palette() -> None:
    runs = pd.DataFrame({"family": ["rwkv4", "gpt", "mamba"], "parameters/total": [1, 1, 1]})
    runs["family_label"] = ["RWKV-4", "GPT", None]
    families = Families.of(runs, "gpt")
    assert families.names(runs) == "RWKV-4, GPT and mamba"
    two = Families.of(runs[:2], OmegaConf.load(report.CONF / "report.yaml").reference)
    assert (two.color("gpt"), two.color("rwkv4")) == ("#D55E00", "#0072B2")
    assert (two.marker("gpt"), two.marker("rwkv4")) == ("s", "o")
    styles = [(families.color(f), families.marker(f)) for f in ("gpt", "rwkv4", "mamba")]
    assert styles == list(PALETTE[:3])


def test_another_reference_turns_the_pairs_round(tmp_path: Path) -> None:
    for model in ("rwkv4_nano", "gpt_nano"):
        planted.write_run(tmp_path, model=model)
    table = tables.matched_pairs(load_study(tmp_path / "demo", "rwkv4"))
    assert table.texts()[0][1] == "matched RWKV-4"
    (pair,) = table.frame.to_dict("records")
    assert (pair["model"], pair["reference"]) == ("gpt_nano", "rwkv4_nano")
    assert abs(pair["gap"] - 0.08) < 1e-12
