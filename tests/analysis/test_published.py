"""Published figures: complete, true to their sources, and beside ours."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from analysis.published import load_published, published_gap
from analysis.study import load_study

planted = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("planted.py"))))


# v1's own averages, in per cent: over the tasks that are among the twelve (no BoolQ), and with
# StoryCloze and TriviaQA
MEANS = {
    ("RWKV-4", 0.17): (46.70, 44.13), ("Pythia v0", 0.16): (46.73, 44.14),
    ("GPT-Neo", 0.16): (45.91, 43.42), ("RWKV-4", 0.43): (50.75, 48.04),
    ("Pythia v0", 0.41): (51.31, 48.39), ("GPT-Neo", 0.40): (50.17, 47.25),
    ("RWKV-4", 1.52): (56.95, 53.91), ("Pythia v0", 1.41): (56.63, 53.55),
    ("GPT-Neo", 1.40): (55.58, 52.64), ("RWKV-4", 2.98): (60.97, 57.93),
    ("Pythia v0", 2.78): (60.81, 57.64), ("GPT-Neo", 2.80): (59.32, 55.92),
    ("RWKV-4", 7.39): (63.99, 61.20), ("Pythia v0", 6.86): (63.39, 60.44),
    ("GPT-J", 6.10): (64.24, 61.34), ("RWKV-4", 14.15): (66.14, 63.71),
    ("GPT-level", 14.20): (65.74, 63.11), ("Pythia v0", 11.85): (65.09, 62.38),
    ("GPT-NeoX", 20.60): (67.05, 64.58),
}  # fmt: skip


def test_published_tables_add_up_to_their_own_means() -> None:
    frame = load_published()
    frame = frame[frame["source"].str.startswith("RWKV paper") & (frame["metric"] != "perplexity")]
    seen = {}
    for (family, total), rows in frame.groupby(["family", "parameters"]):
        assert len(rows) == 13
        paper = rows[rows["task"].isin(planted.PAPER)]
        key = (family, round(total / 1e9, 2))
        seen[key] = (100 * paper["value"].mean(), 100 * rows["value"].mean())
    assert set(seen) == set(MEANS)
    for key, means in MEANS.items():
        assert seen[key] == pytest.approx(means, abs=0.01), key


def test_the_gap_to_what_was_published(tmp_path: Path) -> None:
    run = planted.write_converted(tmp_path, "demo", "rwkv4_169m")
    about = {"n_documents": 1838, "subset": False}
    planted.write_eval(run, "piqa", {"acc,none": 0.6607, "acc_stderr,none": 0.01}, **about)
    lambada = {"perplexity,none": 30.33, "perplexity_stderr,none": 0.5, "acc,none": 0.33}
    planted.write_eval(run, "lambada_openai", lambada, n_documents=100, subset=True)
    trained = planted.write_run(tmp_path, model="gpt_tiny", about={
        "parameters": {"total": 162_322_944, "non_embedding": 85_056_000}})  # fmt: skip
    planted.write_eval(trained, "piqa", {"acc,none": 0.6, "acc_stderr,none": 0.01}, **about)
    table = published_gap(load_study(tmp_path / "demo", "gpt"))
    frame = table.frame.set_index(["model", "task", "metric", "published/model"])
    assert len(frame) == 3 + 4  # RWKV's three, and PIQA of Pythia v1, v1 deduped, v0 (twice)
    piqa = frame.loc[("rwkv4_169m/official", "piqa", "acc", "RWKV-4 169M")]
    assert piqa["gap"] == pytest.approx(0.01)
    assert (piqa["gap_in_se"], piqa["error_of"]) == (pytest.approx(1.0), "ours")
    ppl = frame.loc[("rwkv4_169m/official", "lambada_openai", "perplexity", "RWKV-4 169M")]
    assert (ppl["gap"], ppl["gap_in_se"]) == (pytest.approx(1.0), pytest.approx(2.0))
    assert ppl["documents"] == "100 (subset)"
    v1 = frame.loc[("gpt_tiny", "piqa", "acc", "Pythia v1 160M")]
    error = np.hypot(0.01, np.sqrt(0.6273 * (1 - 0.6273) / 1838))
    assert (v1["error_of"], v1["gap_in_se"]) == ("both", pytest.approx((0.6 - 0.6273) / error))
    assert "+1.0" in table.markdown()
