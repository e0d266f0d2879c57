"""Power laws of loss against size or compute, with intervals.

The unit of a fit is a size: repeats (seeds) of a size are averaged first, because what bends a
curve away from a power law is shared by all seeds of that size, and counting every seed as a point
would make the intervals too narrow. Student-t intervals: few sizes, wide intervals.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit  # the t quantile, without the seconds scipy.stats takes to import

LEVEL = 0.95
MIN_SIZES_IRREDUCIBLE = 6

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PowerLaw:
    """`y = c + a * x ** -b`; `b_low`, `b_high` and the band are NaN for two sizes."""

    a: float
    b: float
    c: float
    b_low: float
    b_high: float
    n_sizes: int
    n_runs: int
    r2: float
    _center: float
    _covariance: Array  # of (log a at the centre, b[, c])
    _variance: float  # of log y around the curve
    _t: float

    def predict(self, x: npt.ArrayLike) -> tuple[Array, Array, Array]:
        """Loss at x and the 95 % prediction band for the mean loss of one more size there."""
        x = np.asarray(x, float)
        power = self.a * x**-self.b
        y = self.c + power
        lever = np.log(x) - self._center
        gradient = [power / y, -lever * power / y]
        if len(self._covariance) == 3:
            gradient.append(1 / y)
        jacobian = np.stack(gradient, axis=-1)
        variance = np.einsum("...i,ij,...j->...", jacobian, self._covariance, jacobian)
        half = self._t * np.sqrt(variance + self._variance)
        return y, y * np.exp(-half), y * np.exp(half)

    @property
    def note(self) -> str:
        """How far the interval can be trusted, in words; empty when there is nothing to warn of."""
        if self.n_sizes == 2:
            return "2 sizes: a line through two points, no interval"
        if self.n_sizes == 3:
            return "3 sizes: one degree of freedom, trust the interval little"
        return ""


def fit_power_law(x: npt.ArrayLike, y: npt.ArrayLike, irreducible: bool = False) -> PowerLaw:
    """Least squares in log y over distinct sizes x (repeats averaged).

    Args:
        x: sizes, (n,), at least 2 distinct ones (6 if `irreducible`).
        y: losses, (n,).
        irreducible: fit c too; else it is 0.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    sizes, which = np.unique(x, return_inverse=True)
    n = len(sizes)
    assert n >= (MIN_SIZES_IRREDUCIBLE if irreducible else 2), f"a power law over {n} sizes"
    log_y = np.bincount(which, np.log(y)) / np.bincount(which)
    log_x = np.log(sizes)
    center = float(log_x.mean())
    u = log_x - center
    theta = _solve(u, log_y) if not irreducible else _solve_irreducible(u, log_y)
    c = float(theta[2]) if irreducible else 0.0
    power = np.exp(theta[0] - theta[1] * u)
    jacobian = np.stack([power / (c + power), -u * power / (c + power)], axis=1)
    if irreducible:
        jacobian = np.column_stack([jacobian, 1 / (c + power)])
    residual = log_y - np.log(c + power)
    freedom = n - len(theta)
    variance = float(residual @ residual / freedom) if freedom else np.nan
    covariance = np.linalg.pinv(jacobian.T @ jacobian) * variance
    t = float(stdtrit(freedom, 0.5 + LEVEL / 2)) if freedom else np.nan
    half = t * float(np.sqrt(covariance[1, 1]))
    spread = float(((log_y - log_y.mean()) ** 2).sum())
    return PowerLaw(
        a=float(np.exp(theta[0] + theta[1] * center)),
        b=float(theta[1]),
        c=c,
        b_low=float(theta[1]) - half,
        b_high=float(theta[1]) + half,
        n_sizes=n,
        n_runs=len(x),
        r2=1 - float(residual @ residual) / spread if spread else np.nan,
        _center=center,
        _covariance=covariance,
        _variance=variance,
        _t=t,
    )


def _solve(u: Array, log_y: Array) -> Array:
    """(log a, b) by the closed form; u is centred."""
    return np.array([log_y.mean(), -(u @ log_y) / (u @ u)])


def _solve_irreducible(u: Array, log_y: Array) -> Array:
    """(log a, b, c): the best start from a grid over c, then a bounded least-squares refinement."""
    from scipy import optimize

    def residuals(theta: Array) -> Array:
        return np.log(theta[2] + np.exp(theta[0] - theta[1] * u)) - log_y

    y = np.exp(log_y)
    starts = [np.append(_solve(u, np.log(y - c)), c) for c in y.min() * np.linspace(0, 0.98, 25)]
    start = min(starts, key=lambda theta: float(np.sum(residuals(theta) ** 2)))
    bounds = ([-np.inf, -np.inf, 0.0], [np.inf, np.inf, y.min()])
    return optimize.least_squares(residuals, start, bounds=bounds, x_scale="jac").x


def exponent_difference(
    x: npt.ArrayLike, y: npt.ArrayLike, other_x: npt.ArrayLike, other_y: npt.ArrayLike
) -> tuple[float, float, float]:
    """`b - other_b` of two power laws over matched sizes and its 95 % t interval.

    Entry i of both is one size. Scatter that a size has in common with its match, as where both
    laws bend, cancels: the residuals of the two fits count with their covariance. For equal x this
    is the regression of log(other_y / y) on log x. NaN ends for fewer than 3 sizes."""
    slopes, weights, residuals = [], [], []
    for sizes, values in ((x, y), (other_x, other_y)):
        u, log_y = np.log(np.asarray(sizes, float)), np.log(np.asarray(values, float))
        u -= u.mean()
        slope = (u @ log_y) / (u @ u)
        slopes.append(slope)
        weights.append(u / (u @ u))
        residuals.append(log_y - log_y.mean() - slope * u)
    difference = float(slopes[1] - slopes[0])
    freedom = len(weights[0]) - 2
    if freedom < 1:
        return difference, np.nan, np.nan
    covariance = np.inner(residuals, residuals) / freedom
    signs = np.array([-1.0, 1.0])
    variance = float(signs @ (covariance * np.inner(weights, weights)) @ signs)
    half = float(stdtrit(freedom, 0.5 + LEVEL / 2)) * np.sqrt(max(variance, 0.0))
    return difference, difference - half, difference + half
