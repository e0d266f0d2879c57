"""The paired tests: right by hand, blind to nothing planted, and wrong as rarely as they say."""

import numpy as np
import pytest
from scipy import stats

from analysis.significance import Differences, bootstrap, holm, mcnemar, sign_flip

N_SIMULATIONS = 2000
# three standard errors of a share near 5 % in that many simulations
SLACK = 3 * np.sqrt(0.05 * 0.95 / N_SIMULATIONS)


def of(values: np.ndarray | list[float], weights: np.ndarray | None = None) -> Differences:
    values = np.asarray(values, float)
    return Differences(values, np.ones(len(values)) if weights is None else weights)


def answers(rng: np.random.Generator, n: int, *skills: float) -> list[np.ndarray]:
    """0/1 answers of models that find the same documents hard, right at their own rates."""
    hard = rng.normal(size=n)
    return [(hard + rng.normal(size=n) < np.sqrt(2) * s).astype(float) for s in skills]


def test_mcnemar_by_hand_and_as_scipy() -> None:
    assert mcnemar(1, 8) == pytest.approx(2 * (1 + 9) / 2**9)
    assert mcnemar(8, 1) == mcnemar(1, 8)
    assert mcnemar(0, 0) == mcnemar(4, 4) == 1.0
    for pair in ((3, 11), (0, 6), (40, 61), (500, 620)):
        expected = stats.binomtest(min(pair), sum(pair), 0.5).pvalue
        assert mcnemar(*pair) == pytest.approx(expected)


def test_sign_flip_by_hand() -> None:
    exact = 2 / 2**5  # all five up, or all five down
    assert sign_flip([of([1, 1, 1, 1, 1, 0, 0])]) == pytest.approx(exact, abs=0.008)
    assert sign_flip([of([1, -1, 0])]) == 1.0
    assert sign_flip([of([0, 0])]) == 1.0
    # 3 and 1 with free signs: 4, 2, -2, -4; two of four patterns are as far out as 4
    weights = np.array([3.0, 1.0])
    assert of([1, 1], weights).mean == 1.0
    assert sign_flip([of([1, 1], weights)]) == pytest.approx(0.5, abs=0.02)
    # the mean over two tasks counts both alike: (2 + 1) / 2, of +-2 +-1
    assert sign_flip([of([2.0]), of([1.0])]) == pytest.approx(0.5, abs=0.02)


def test_bootstrap_is_scipys() -> None:
    rng = np.random.default_rng(0)
    first = rng.gamma(2, size=120)
    second = first + rng.normal(0.1, 0.5, size=120)
    others = stats.bootstrap(
        (first, second), lambda a, b, axis: np.mean(a - b, axis=axis), paired=True,
        vectorized=True, method="percentile", rng=1, n_resamples=9999,
    ).confidence_interval  # fmt: skip
    assert bootstrap([of(first - second)]) == pytest.approx(tuple(others), abs=0.004)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]).shape == (0,)


def test_no_difference_is_called_one_at_the_stated_rate_by_mcnemar() -> None:
    rng = np.random.default_rng(1)
    rejected = 0
    for _ in range(N_SIMULATIONS):
        first, second = answers(rng, 400, 0.2, 0.2)
        rejected += mcnemar(int((first > second).sum()), int((first < second).sum())) < 0.05
    # an exact test of a count cannot spend all of 5 %
    assert 0.02 < rejected / N_SIMULATIONS < 0.05 + SLACK


def test_no_difference_is_called_one_at_the_stated_rate_by_sign_flips() -> None:
    rng = np.random.default_rng(2)
    p = [
        sign_flip([of(rng.laplace(size=30)), of(rng.normal(size=20))], seed=i, resamples=99)
        for i in range(N_SIMULATIONS)
    ]
    for level in (0.05, 0.2):
        slack = 3 * np.sqrt(level * (1 - level) / N_SIMULATIONS)
        assert abs(np.mean(np.array(p) <= level) - level) < slack


@pytest.mark.slow
def test_intervals_miss_the_truth_at_the_stated_rate() -> None:
    rng = np.random.default_rng(3)
    missed = 0
    for i in range(N_SIMULATIONS):
        # two seeds a side, so that a document's difference is a half too
        tasks = []
        for n in (300, 200):
            sides = [np.mean(answers(rng, n, s, s), axis=0) for s in (0.3, 0.3)]
            tasks.append(of(sides[0] - sides[1]))
        low, high = bootstrap(tasks, seed=i, resamples=399)
        missed += not low <= 0 <= high
    assert abs(missed / N_SIMULATIONS - 0.05) < SLACK + 0.005  # percentiles of few: a little more


def test_holm_keeps_the_rate_of_a_whole_family() -> None:
    rng = np.random.default_rng(6)
    shared = rng.normal(size=(N_SIMULATIONS, 1))
    z = 0.5 * shared + np.sqrt(0.75) * rng.normal(size=(N_SIMULATIONS, 20))  # dependent tests
    p = 2 * stats.norm.sf(np.abs(z))
    assert (p < 0.05).any(axis=1).mean() > 0.3  # what happens without a correction
    assert np.mean([(holm(row) < 0.05).any() for row in p]) < 0.05 + SLACK
    p[:, 0] = 1e-6  # one true difference among them: found, and the others still kept
    adjusted = np.array([holm(row) for row in p])
    assert (adjusted[:, 0] < 0.05).all()
    assert (adjusted[:, 1:] < 0.05).any(axis=1).mean() < 0.05 + SLACK
