"""How many modes a law has: the dip test, Gaussian mixtures, kernel densities.

Weights span orders of magnitude. To ask about them on a logarithmic scale, hand in ``log|w|``: the
logarithm, and what becomes of exact zeros, are the caller's choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from adaptivenet.emergence._extras import require
from adaptivenet.emergence.statistics._values import as_numbers, subsample

__all__ = ["Dip", "Mixture", "dip", "mixture", "modes"]

_GRID = 2048


class Dip(NamedTuple):
    """Hartigan's dip test.

    Attributes:
      statistic: largest distance to the nearest unimodal distribution function, at most 1/4.
      p: of a dip this large under the uniform law, the least favourable of the unimodal ones.
      n: how many values were used.
    """

    statistic: float
    p: float
    n: int


class Mixture(NamedTuple):
    """The Gaussian mixture that the Bayesian information criterion prefers.

    Attributes:
      components: number of components with the lowest BIC.
      bic: BIC by number of components.
      weights: of the components, in the order of their means; float64[components].
      means: float64[components].
      sds: standard deviations; float64[components].
      converged: whether expectation-maximisation converged for every number of components.
      n: how many values were used.
    """

    components: int
    bic: dict[int, float]
    weights: np.ndarray
    means: np.ndarray
    sds: np.ndarray
    converged: bool
    n: int


def dip(values: Any, *, maximum: int = 72_000, seed: int = 0) -> Dip:
    """Tests whether values come from a law with one mode.

    It is exact at the uniform law and conservative at any other, so it rejects a Gaussian almost
    never.

    Args:
      values: numbers, shape [n].
      maximum: of more values, this many are drawn at random (the table of p ends at 72,000).
      seed: of that draw.

    Returns:
      The statistic and its p.

    Raises:
      ValueError: nan, fewer than four values, or ``maximum`` beyond the table.
      MissingExtra: diptest is not installed.

    References:
      Hartigan and Hartigan, "The dip test of unimodality", Annals of Statistics 13, 1985.

    >>> result = dip([0.0, 0.1, 0.2, 0.3, 5.0, 5.1, 5.2, 5.3])
    >>> result.n, result.p < 0.05
    (8, True)
    """
    if maximum > 72_000:
        raise ValueError(f"maximum={maximum} is beyond the table of the dip test, 72,000.")
    array = subsample(as_numbers(values, "values", least=4), maximum, seed)
    statistic, p = require("diptest").diptest(array)
    return Dip(float(statistic), float(p), len(array))


def mixture(
    values: Any,
    components: Sequence[int] = (1, 2, 3),
    *,
    maximum: int = 100_000,
    seed: int = 0,
) -> Mixture:
    """Fits Gaussian mixtures and chooses their number of components by BIC.

    A second component shows that the law is no Gaussian, not that it has two modes: a skewed law
    gets two as well. Values are standardised for the fit, so that the result does not depend on
    their unit.

    Args:
      values: numbers, shape [n], not all equal.
      components: numbers of components to compare.
      maximum: of more values, this many are drawn at random.
      seed: of that draw and of the starting points.

    Returns:
      The choice, its parameters and every BIC.

    Raises:
      ValueError: nan, constant values, or fewer values than twice the largest number of components.
      MissingExtra: scikit-learn is not installed.

    >>> found = mixture([-5.2, -5.0, -4.8, -5.1, -4.9, 4.8, 5.0, 5.2, 4.9, 5.1])
    >>> found.components, found.means.round(3).tolist(), found.weights.round(3).tolist()
    (2, [-5.0, 5.0], [0.5, 0.5])
    """
    if not components or min(components) < 1 or len(set(components)) != len(components):
        raise ValueError(f"components must be distinct numbers from 1, not {tuple(components)}.")
    array = as_numbers(values, "values", least=2 * max(components))
    array = subsample(array, maximum, seed)
    centre, scale = array.mean(), array.std()
    if np.ptp(array) <= 1e-12 * np.max(np.abs(array)):
        raise ValueError("values are all equal: there is no law to fit a mixture to.")
    rows = ((array - centre) / scale)[:, None]
    bic, fits = {}, {}
    for number in components:
        fit, converged = _fit_mixture(rows, number, seed)
        # Back in the values' unit every density is divided by the scale.
        bic[number] = float(fit.bic(rows) + 2 * len(array) * np.log(scale))
        fits[number] = (fit, converged)
    best = min(bic, key=lambda number: (bic[number], number))
    fit = fits[best][0]
    order = np.argsort(fit.means_[:, 0])
    return Mixture(
        best,
        bic,
        fit.weights_[order],
        fit.means_[order, 0] * scale + centre,
        np.sqrt(fit.covariances_[order, 0, 0]) * scale,
        all(converged for _, converged in fits.values()),
        len(array),
    )


def _fit_mixture(rows: np.ndarray, components: int, seed: int) -> tuple[Any, bool]:
    import warnings

    fit = require("sklearn.mixture").GaussianMixture(
        components, n_init=3, max_iter=500, random_state=seed
    )
    warning = require("sklearn.exceptions").ConvergenceWarning
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", warning)  # told by the result's `converged`
        fit.fit(rows)
    return fit, bool(fit.converged_)


def modes(values: Any, bandwidth: float | None = None, *, prominence: float = 0.05) -> np.ndarray:
    """Where the kernel density of values has its modes, for bifurcation plots.

    Args:
      values: numbers, shape [n].
      bandwidth: standard deviation of the Gaussian kernel, in the values' unit; by default
        Silverman's rule of thumb, 0.9 min(sd, IQR / 1.34) n^(-1/5).
      prominence: a mode must rise above its surroundings by this share of the highest one; 0 counts
        every ripple of the tails.

    Returns:
      Locations in ascending order, to about a thousandth of their range; float64[modes]. Values
      that are all equal have one mode.

    Raises:
      ValueError: nan, fewer than two values, a bandwidth that is not positive, or a prominence
        outside [0, 1).

    References:
      Silverman, "Density estimation for statistics and data analysis", 1986, equation 3.31.

    >>> modes([1.0, 1.1, 0.9, 5.0, 5.1, 4.9], 0.5).round(1).tolist()
    [1.0, 5.0]
    """
    array = as_numbers(values, "values", least=2)
    if bandwidth is not None and not bandwidth > 0:
        raise ValueError(f"bandwidth must be positive, not {bandwidth:g}.")
    if not 0 <= prominence < 1:
        raise ValueError(f"prominence must lie in [0, 1), not {prominence:g}.")
    if np.ptp(array) <= 1e-12 * np.max(np.abs(array)):
        return array[:1].copy()
    width = _rule_of_thumb(array) if bandwidth is None else float(bandwidth)
    grid = np.linspace(array.min() - 4 * width, array.max() + 4 * width, _GRID)
    step = grid[1] - grid[0]
    # Each value is shared out among its two neighbours on the grid, which are then convolved.
    left, right = np.divmod((array - grid[0]) / step, 1)
    left = left.astype(np.int64)
    bins = np.bincount(left, 1 - right, _GRID) + np.bincount(left + 1, right, _GRID)
    height = require("scipy.ndimage").gaussian_filter1d(bins, width / step, mode="constant")
    peaks, _ = require("scipy.signal").find_peaks(height, prominence=prominence * height.max())
    return grid[peaks]


def _rule_of_thumb(values: np.ndarray) -> float:
    low, high = np.quantile(values, [0.25, 0.75])
    spread = values.std(ddof=1)
    if high > low:  # many ties give an IQR of zero
        spread = min(spread, (high - low) / 1.34)
    return float(0.9 * spread * len(values) ** -0.2)
