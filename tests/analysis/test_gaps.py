"""The gap against size and the laws compared: closed forms, simulated coverage, planted studies."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from analysis import plots, tables
from analysis.exponents import exponents, held_out_size
from analysis.gaps import gap_trend, loss_gap
from analysis.scaling import exponent_difference, fit_power_law
from analysis.study import load_study

planted = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("planted.py"))))
SIZES = np.array([2.75e4, 1.62e5, 3.63e5, 8.58e5, 2.89e6])
NAMES = ("a", "b", "c", "d", "e")


def write_study(
    root: Path, laws: dict[str, tuple[float, float]], n_seeds: int = 2, noise: float = 0.002
) -> None:
    """Five sizes of each family, loss a * non-embedding^-b, a budget per size and rates of their
    own for the families."""
    rng = np.random.default_rng(5)
    for i, (name, size) in enumerate(zip(NAMES, SIZES.astype(int).tolist(), strict=True)):
        for family, (a, b) in laws.items():
            planted.MODELS[f"{family}_{name}"] = (family, 3, 64, size + 20_000, size, 0.0)
            for seed in range(n_seeds):
                loss = a * size**-b * np.exp(rng.normal(0, noise))
                about = {"budget_tokens": 10_000 * (i + 1)}
                about |= {"recipe": {"optim": "searched", "schedule": "shared"}}
                rate = 0.004 if family == "rwkv4" else 0.002
                model = f"{family}_{name}"
                planted.write_run(
                    root, "study", model, seed, loss, n_rows=3, about=about, peak_lr=rate
                )


def test_trend_is_the_textbook_regression() -> None:
    rng = np.random.default_rng(0)
    gap = -0.5 + 0.1 * np.log10(SIZES) + rng.normal(0, 0.02, len(SIZES))
    trend = gap_trend(SIZES, gap)
    assert trend is not None
    line = stats.linregress(np.log10(SIZES), gap)
    half = stats.t.ppf(0.975, len(SIZES) - 2) * line.stderr
    assert (trend.slope, trend.high - trend.slope) == pytest.approx((line.slope, half))
    assert trend.line(1e5) == pytest.approx(line.intercept + 5 * line.slope)
    at_zero = stats.t.ppf(0.975, len(SIZES) - 2) * line.intercept_stderr  # of log10 x = 0
    assert trend.half(1.0) == pytest.approx(at_zero)
    assert gap_trend(SIZES[:3], gap[:3]) is None
    assert gap_trend(SIZES[[0, 0, 1, 2]], gap[:4]) is None  # three sizes, not four


def test_trend_interval_covers_at_its_rate() -> None:
    rng = np.random.default_rng(1)
    trials, covered = 1000, 0
    for _ in range(trials):
        trend = gap_trend(SIZES, 0.3 - 0.07 * np.log10(SIZES) + rng.normal(0, 0.02, len(SIZES)))
        assert trend is not None
        covered += trend.low <= -0.07 <= trend.high
    assert 0.93 < covered / trials < 0.97


@pytest.mark.parametrize("shared", [0.0, 0.05])
@pytest.mark.parametrize("other_x", [SIZES, SIZES**1.05])
def test_exponent_interval_covers_at_its_rate(shared: float, other_x: np.ndarray) -> None:
    """Scatter of each size, the match's five times as large, and what both have in common, as where
    both laws bend; that makes no interval wider."""
    rng = np.random.default_rng(1)
    trials, covered, widths = 1000, 0, []
    for _ in range(trials):
        both = rng.normal(0, shared, len(SIZES))
        ours = 9 * SIZES**-0.11 * np.exp(rng.normal(0, 0.002, len(SIZES)) + both)
        others = 8 * other_x**-0.08 * np.exp(rng.normal(0, 0.01, len(SIZES)) + both)
        _, low, high = exponent_difference(SIZES, ours, other_x, others)
        covered += low <= 0.03 <= high
        widths.append(high - low)
    assert 0.93 < covered / trials < 0.97
    assert np.median(widths) < 0.025


def test_exponent_difference_of_equal_sizes_is_the_regression_of_the_ratio() -> None:
    rng = np.random.default_rng(2)
    ours = 9 * SIZES**-0.11 * np.exp(rng.normal(0, 0.02, len(SIZES)))
    others = 8 * SIZES**-0.08 * np.exp(rng.normal(0, 0.02, len(SIZES)))
    difference, low, high = exponent_difference(SIZES, ours, SIZES, others)
    line = stats.linregress(np.log(SIZES), np.log(others / ours))
    half = stats.t.ppf(0.975, len(SIZES) - 2) * line.stderr
    assert (difference, high - difference) == pytest.approx((line.slope, half))
    assert difference - low == pytest.approx(half)
    assert difference == pytest.approx(
        fit_power_law(SIZES, ours).b - fit_power_law(SIZES, others).b
    )
    two = exponent_difference(SIZES[:2], ours[:2], SIZES[:2], others[:2])
    assert np.isfinite(two[0])
    assert np.isnan(two[1:]).all()
    flat = np.ones(3)
    assert exponent_difference(SIZES[:3], flat, SIZES[:3], flat) == (0, 0, 0)


def test_a_study_with_a_budget_per_size(tmp_path: Path) -> None:
    write_study(tmp_path, {"rwkv4": (7.0, 0.1), "gpt": (9.0, 0.08)})
    study = load_study(tmp_path / "study", "gpt")
    pairs = tables.matched_pairs(study)
    heads, rows = pairs.texts()
    cells = dict(zip(heads, rows[0], strict=True))
    assert cells["peak lr"] == "0.004 / 0.002"
    assert cells["tokens (per non-emb.)"] == f"10k ({10_000 / 27_500:.3g})"
    assert np.isfinite(pairs.frame[["gap_low", "percent_low"]]).all(axis=None)
    assert any("Peak learning rates differ within pairs" in note for note in pairs.notes)
    frame = exponents(study).frame.set_index("x")
    row = frame.loc["non-embedding parameters"]
    assert row["low"] < 0.02 < row["high"]
    assert exponents(study).texts()[1][1][-1] == "RWKV-4"
    for item in (
        exponents(study), held_out_size(study), loss_gap(study), plots.scaling(study),
        tables.scaling_fits(study),
    ):  # fmt: skip
        assert any("budgets differ between sizes (10k to 50k)" in n for n in item.notes), item.title
    percent = 100 * (7.0 / 9.0 * SIZES**-0.02 - 1)
    assert pairs.frame["percent"].to_numpy() == pytest.approx(percent, abs=0.5)


def test_the_largest_size_is_predicted_or_not(tmp_path: Path) -> None:
    write_study(tmp_path, {"rwkv4": (7.0, 0.1), "gpt": (9.0, 0.08)})
    study = load_study(tmp_path / "study", "gpt")
    largest = study.runs["model"] == "gpt_e"
    study.runs.loc[largest, "val/bpb"] *= 1.2  # the GPT's law bends
    rows = held_out_size(study).frame.set_index(["family", "x"])
    held = rows.xs("non-embedding parameters", level="x")
    assert held["model"].to_dict() == {"rwkv4": "rwkv4_e", "gpt": "gpt_e"}
    assert held["inside"].to_dict() == {"rwkv4": True, "gpt": False}
    assert held.loc["rwkv4", "predicted"] == pytest.approx(7 * SIZES[-1] ** -0.1, rel=0.01)
    assert held.loc["gpt", "measured"] / held.loc["gpt", "predicted"] == pytest.approx(
        1.2, rel=0.02
    )
    assert (held["n_sizes"] == 4).all()
