"""Power laws and gaps against planted truth, closed forms and simulated coverage."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.runs import CONDITIONS
from analysis.scaling import fit_power_law, matched_pairs, seed_gap

SIZES = np.array([3e4, 1e5, 3e5, 1e6, 3e6, 1e7, 3e7])


def test_planted_exponents_come_back_exactly() -> None:
    law = fit_power_law(SIZES, 12 * SIZES**-0.11)
    assert law.b == pytest.approx(0.11, abs=1e-12)
    assert law.a == pytest.approx(12, rel=1e-10)
    assert law.b_high - law.b_low < 1e-10
    assert law.r2 == pytest.approx(1)


def test_planted_irreducible_term_comes_back() -> None:
    y = 1.3 + 40 * SIZES**-0.3
    law = fit_power_law(SIZES, y, irreducible=True)
    assert (law.a, law.b, law.c) == pytest.approx((40, 0.3, 1.3), rel=1e-4)
    middle, low, high = law.predict(SIZES)
    assert middle == pytest.approx(y, rel=1e-6)
    assert (low <= middle).all()
    assert (middle <= high).all()
    assert fit_power_law(SIZES, y).r2 < law.r2  # a straight line is visibly the wrong form


def test_slope_interval_equals_the_textbook_one() -> None:
    noise = np.exp(np.random.default_rng(1).normal(0, 0.03, len(SIZES)))
    y = 12 * SIZES**-0.11 * noise
    law = fit_power_law(SIZES, y)
    line = stats.linregress(np.log(SIZES), np.log(y))
    half = stats.t.ppf(0.975, len(SIZES) - 2) * line.stderr
    assert law.b == pytest.approx(-line.slope)
    assert (law.b_low, law.b_high) == pytest.approx((-line.slope - half, -line.slope + half))
    assert law.r2 == pytest.approx(line.rvalue**2)


@pytest.mark.parametrize("n_sizes", [3, 5])
def test_intervals_cover_at_their_stated_rate(n_sizes: int) -> None:
    """Noise shared by the seeds of a size and of each run; the band is for a size not fitted."""
    generator = np.random.default_rng(2)
    x, trials, hits, inside = SIZES[:n_sizes], 1200, 0, 0
    for _ in range(trials):
        of_size = generator.normal(0, 0.02, n_sizes)
        of_run = generator.normal(0, 0.02, (3, n_sizes))
        y = 12 * x**-0.1 * np.exp(of_size + of_run)
        law = fit_power_law(np.tile(x, 3), y.ravel())
        hits += law.b_low <= 0.1 <= law.b_high
        _, low, high = law.predict(1e8)
        new_size = generator.normal(0, 0.02) + generator.normal(0, 0.02, 3).mean()
        inside += low <= 12 * 1e8**-0.1 * np.exp(new_size) <= high
    # 95 % of 1200, four standard errors either way
    assert 0.925 < hits / trials < 0.975
    assert 0.925 < inside / trials < 0.975


def test_irreducible_interval_covers_roughly_at_its_rate() -> None:
    generator = np.random.default_rng(3)
    hits = 0
    for _ in range(150):
        y = (1.0 + 30 * SIZES**-0.25) * np.exp(generator.normal(0, 0.003, len(SIZES)))
        law = fit_power_law(SIZES, y, irreducible=True)
        hits += law.b_low <= 0.25 <= law.b_high
    assert hits / 150 > 0.88  # linearised, so only roughly nominal


def test_few_sizes_are_told_as_such() -> None:
    two = fit_power_law([1e5, 1e5, 1e6], [3.0, 3.1, 2.0])
    assert np.isnan([two.b_low, two.b_high, *two.predict(1e7)[1:]]).all()
    assert (two.n_sizes, two.n_runs) == (2, 3)
    assert "no interval" in two.note
    assert "one degree of freedom" in fit_power_law([1e4, 1e5, 1e6], [3.0, 2.4, 2.1]).note
    assert fit_power_law(SIZES, SIZES**-0.1).note == ""


@pytest.mark.parametrize(
    ("x", "y", "irreducible", "message"),
    [
        ([1e5, 1e5], [2.0, 2.1], False, "at least 2 sizes, there are 1"),
        ([1e5, 1e6], [2.0, np.nan], False, "positive, finite"),
        ([1e5, 0], [2.0, 2.1], False, "positive, finite"),
        (SIZES[:5], SIZES[:5] ** -0.1, True, "at least 6 sizes, there are 5"),
    ],
)
def test_impossible_fits_are_refused(x: list, y: list, irreducible: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_power_law(x, y, irreducible)


def runs_frame(*rows: tuple[str, str, float, int, float]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["family", "model", "parameters/total", "seed", "val/bpb"])
    frame["parameters/non_embedding"] = frame["parameters/total"] * 0.9
    frame["flops_per_token"] = frame["parameters/total"] * 6
    frame["n_variants"], frame["status"] = 1, "finished"
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
    (pair,) = matched_pairs(runs_frame(*rows), "val/bpb").to_dict("records")
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
    (pair,) = matched_pairs(runs, "val/bpb").to_dict("records")
    assert (pair["model"], pair["reference"]) == ("rwkv4_a", "gpt_near")
    assert pair["gap"] == pytest.approx(0.1)
    assert np.isnan(pair["gap_low"])
    assert pair["note"] == "one seed: no interval"


def test_a_pair_is_one_of_total_parameters() -> None:
    """Equal in the other measures only: 20 % apart in total is no match."""
    runs = runs_frame(("rwkv4", "rwkv4_a", 1.0e6, 0, 2.2), ("gpt", "gpt_a", 1.2e6, 0, 2.3))
    runs[["parameters/non_embedding", "flops_per_token"]] = 9e5
    assert matched_pairs(runs, "val/bpb").empty


@pytest.mark.parametrize(
    ("condition", "note"),
    [
        ("precision", "not alike in precision (32-true / bf16-mixed): no interval"),
        ("recipe/optim", "not alike in optim (shared / bf16-mixed): no interval"),
    ],
)
def test_runs_trained_differently_are_no_pairs(condition: str, note: str) -> None:
    rows = [
        (family, f"{family}_a", 1.0e6, seed, loss + 0.1 * seed)
        for family, loss in (("rwkv4", 2.2), ("gpt", 2.3))
        for seed in (0, 1, 2)
    ]
    runs = runs_frame(*rows)
    (alike,) = matched_pairs(runs, "val/bpb").to_dict("records")
    assert np.isfinite(alike["gap_low"])
    runs.loc[runs["family"] == "gpt", condition] = "bf16-mixed"
    (pair,) = matched_pairs(runs, "val/bpb").to_dict("records")
    assert pair["gap"] == pytest.approx(-0.1)
    assert np.isnan([pair["gap_low"], pair["gap_high"]]).all()
    assert pair["note"] == note


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
    (pair,) = matched_pairs(runs, "val/bpb").to_dict("records")
    assert (pair["peak_lr"], pair["reference/peak_lr"], pair["note"]) == (0.001, 0.002, note)
    assert np.isfinite([pair["gap_low"], pair["percent_low"]]).all() == (not note)


def test_gap_in_per_cent_is_of_the_ratio_of_losses() -> None:
    rows = [("gpt", "gpt_a", 1.0e6, seed, 2.0 + seed) for seed in (0, 1)]
    rows += [("rwkv4", "rwkv4_a", 1.0e6, seed, 0.9 * (2.0 + seed)) for seed in (0, 1)]
    (pair,) = matched_pairs(runs_frame(*rows), "val/bpb").to_dict("records")
    ends = [pair[key] for key in ("percent", "percent_low", "percent_high")]
    assert ends == pytest.approx([-10, -10, -10])


def test_gap_without_a_common_seed_has_no_interval() -> None:
    gap = seed_gap(pd.Series({0: 2.0, 1: 2.2}), pd.Series({2: 1.9, 3: 2.1}))
    assert gap["gap"] == pytest.approx(0.1)
    assert np.isnan(gap["gap_low"])
    assert gap["note"] == "no seed in common: no interval"


def test_gap_interval_covers_at_its_stated_rate() -> None:
    generator = np.random.default_rng(4)
    hits = 0
    for _ in range(800):
        shared = generator.normal(0, 0.5, 3)
        mine = pd.Series(shared + 0.02 + generator.normal(0, 0.01, 3))
        gap = seed_gap(mine, pd.Series(shared + generator.normal(0, 0.01, 3)))
        hits += gap["gap_low"] <= 0.02 <= gap["gap_high"]
    assert 0.92 < hits / 800 < 0.98
