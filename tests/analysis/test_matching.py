"""Matched pairs and their gaps: who is matched, planted gaps, simulated coverage."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.matching import matched_pairs, seed_gap
from analysis.runs import CONDITIONS


def runs_frame(*rows: tuple[str, str, float, int, float]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["family", "model", "parameters/total", "seed", "val/bpb"])
    frame["parameters/non_embedding"] = frame["parameters/total"] * 0.9
    frame["flops_per_token"] = frame["parameters/total"] * 6
    frame["n_variants"], frame["converted"] = 1, False
    frame[CONDITIONS] = ["shared", "shared", "32-true"]
    frame[["tokens", "budget_tokens", "peak_lr"]] = 1e6, 1e6, 1e-3
    frame["variant"], frame["tried"] = "", ""
    return frame


def test_gap_is_paired_by_seed() -> None:
    """Seeds move both sides together by far more than the gap; pairing takes that out."""
    losses = {0: 2.0, 1: 2.5, 2: 3.0}
    rows = [("gpt", "gpt_a", 1.0e6, seed, loss) for seed, loss in losses.items()]
    extra = {0: 0.011, 1: 0.010, 2: 0.009}
    rows += [("rwkv4", "rwkv4_a", 1.01e6, s, losses[s] + extra[s]) for s in losses]
    (pair,) = matched_pairs(runs_frame(*rows), "val/bpb", "gpt").to_dict("records")
    half = stats.t.ppf(0.975, 2) * 0.001 / np.sqrt(3)
    assert (pair["model"], pair["reference"], pair["n_seeds"]) == ("rwkv4_a", "gpt_a", 3)
    assert pair["gap"] == pytest.approx(0.010)
    assert (pair["gap_low"], pair["gap_high"]) == pytest.approx((0.010 - half, 0.010 + half))
    assert pair["loss"] - pair["reference/loss"] == pytest.approx(0.010)
    assert pair["parameters/total"] == 1.01e6
    assert pair["reference/parameters/total"] == 1.0e6


def test_pairs_are_the_nearest_sizes_and_none_beyond_ten_per_cent() -> None:
    runs = runs_frame(
        ("rwkv4", "rwkv4_a", 1.00e6, 0, 2.2),
        ("rwkv4", "rwkv4_b", 5.00e6, 0, 2.0),
        ("gpt", "gpt_a", 0.97e6, 0, 2.3),
        ("gpt", "gpt_near", 1.01e6, 0, 2.1),
        ("gpt", "gpt_far", 8.00e6, 0, 1.9),
    )
    (pair,) = matched_pairs(runs, "val/bpb", "gpt").to_dict("records")
    assert (pair["model"], pair["reference"]) == ("rwkv4_a", "gpt_near")
    assert pair["gap"] == pytest.approx(0.1)
    assert np.isnan(pair["gap_low"])
    assert pair["note"] == "one seed: no interval"


@pytest.mark.parametrize(
    ("variant", "tried", "budget", "note"),
    [
        ("", "", 1e6, ""),  # the recipe names no override: it chose both rates
        ("optim.peak_lr=0.002", "a; b", 1e6, ""),  # the same search chose them
        ("optim.peak_lr=0.002", "b", 1e6, "not alike in peak_lr (0.001 / 0.002): no interval"),
        ("", "", 2e6, "not alike in budget_tokens (1000000.0 / 2000000.0): no interval"),
    ],
)
def test_rates_of_a_pair_may_differ_if_chosen_alike(
    variant: str, tried: str, budget: float, note: str
) -> None:
    rows = [
        (family, f"{family}_a", 1.0e6, seed, loss + 0.1 * seed)
        for family, loss in (("rwkv4", 2.2), ("gpt", 2.3))
        for seed in (0, 1, 2)
    ]
    runs = runs_frame(*rows)
    runs["tried"] = tried if not note else ""
    columns = ["peak_lr", "variant", "budget_tokens", "tried"]
    runs.loc[runs["family"] == "gpt", columns] = [0.002, variant, budget, tried]
    (pair,) = matched_pairs(runs, "val/bpb", "gpt").to_dict("records")
    assert (pair["peak_lr"], pair["reference/peak_lr"], pair["note"]) == (0.001, 0.002, note)
    assert np.isfinite([pair["gap_low"], pair["percent_low"]]).all() == (not note)


def test_gap_in_per_cent_is_of_the_ratio_of_losses() -> None:
    rows = [("gpt", "gpt_a", 1.0e6, seed, 2.0 + seed) for seed in (0, 1)]
    rows += [("rwkv4", "rwkv4_a", 1.0e6, seed, 0.9 * (2.0 + seed)) for seed in (0, 1)]
    (pair,) = matched_pairs(runs_frame(*rows), "val/bpb", "gpt").to_dict("records")
    ends = [pair[key] for key in ("percent", "percent_low", "percent_high")]
    assert ends == pytest.approx([-10, -10, -10])


def test_gap_interval_covers_at_its_stated_rate() -> None:
    generator = np.random.default_rng(4)
    hits = 0
    for _ in range(800):
        shared = generator.normal(0, 0.5, 3)
        ours = pd.Series(shared + 0.02 + generator.normal(0, 0.01, 3))
        gap = seed_gap(ours, pd.Series(shared + generator.normal(0, 0.01, 3)))
        hits += gap["gap_low"] <= 0.02 <= gap["gap_high"]
    assert 0.92 < hits / 800 < 0.98
