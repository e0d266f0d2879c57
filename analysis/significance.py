"""Is one model better than another on the same documents? Paired tests, intervals, correction.

All tests condition on the documents and ask whether the two models could be swapped on each of
them: then a document's difference d is as likely as -d. For 0/1 scores that is McNemar's exact
test; for others, and for means over tasks, the same null is drawn by flipping signs. Intervals are
percentiles of a bootstrap over documents. A document is a unit: seeds are averaged before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr  # the binomial, without the seconds scipy.stats takes to import

Array = npt.NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 9999
CELLS = 4_000_000  # numbers held at once while resampling


@dataclass(frozen=True)
class Differences:
    """The differences (first model minus second) of the documents of one task, (n,), and the
    weight each has in the task's score, (n,)."""

    values: Array
    weights: Array

    @property
    def mean(self) -> float:
        """The difference of the two scores."""
        return float(np.average(self.values, weights=self.weights))


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p of McNemar's test: documents that only one of the two models got right are
    the first's with probability 1/2. 1 when there are none."""
    n = only_first + only_second
    return min(1.0, 2 * float(bdtr(min(only_first, only_second), n, 0.5))) if n else 1.0


def sign_flip(tasks: Sequence[Differences], seed: int = 0, resamples: int = RESAMPLES) -> float:
    """Two-sided p that the unweighted mean over tasks of the differences is 0, where the sign of
    each document is free to flip: the share of `resamples` drawn sign patterns, with the observed
    one, whose mean is as far from 0."""
    rng = np.random.default_rng(seed)
    observed = abs(float(np.mean([task.mean for task in tasks])))
    drawn = np.zeros(resamples)
    for task in tasks:
        terms = task.values * task.weights / task.weights.sum()
        sizes, counts = np.unique(np.abs(terms[terms != 0]), return_counts=True)
        # m equal terms with free signs add up to (2 k - m) of them, k binomial
        for rows in _blocks(resamples, len(sizes)):
            k = rng.binomial(counts, 0.5, size=(len(rows), len(sizes)))
            drawn[rows] += (2 * k - counts) @ sizes
    drawn /= len(tasks)
    tolerance = 1e-9 * max(observed, 1e-9)  # sums of the same terms in another order are equal
    return float((1 + np.sum(np.abs(drawn) >= observed - tolerance)) / (1 + resamples))


def bootstrap(
    tasks: Sequence[Differences], seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95 % interval of the unweighted mean over tasks of the differences, documents resampled
    within each task (percentiles). NaN when no document of any task tells the models apart."""
    if not any(task.values.any() for task in tasks):
        return np.nan, np.nan
    rng = np.random.default_rng(seed)
    drawn = np.zeros(resamples)
    for task in tasks:
        pairs = np.column_stack([task.values * task.weights, task.weights])
        kinds, counts = np.unique(pairs, axis=0, return_counts=True)
        n = len(pairs)
        # how often each kind of document comes up when n are drawn with replacement
        for rows in _blocks(resamples, len(kinds)):
            sums = rng.multinomial(n, counts / n, size=len(rows)) @ kinds
            drawn[rows] += sums[:, 0] / sums[:, 1]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(drawn / len(tasks), [tail, 1 - tail])
    return float(low), float(high)


def holm(p: npt.ArrayLike) -> Array:
    """Holm's step-down correction, (n,) in the same order: rejecting those below 5 % rejects any
    true null among all of them with probability 5 % at most, whatever their dependence."""
    p = np.asarray(p, float)
    order = np.argsort(p, kind="stable")
    steps = p[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted


def _blocks(n: int, width: int) -> list[npt.NDArray[np.int64]]:
    """The numbers below n in blocks that keep (block, width) arrays small."""
    return np.array_split(np.arange(n), -(-n * max(width, 1) // CELLS))
