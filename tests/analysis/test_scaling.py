"""Power laws against planted truth, closed forms and simulated coverage."""

import numpy as np
import pytest
from scipy import stats

from analysis.scaling import fit_power_law

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
