"""Paired comparisons over seeds: tests of a difference, of its absence, of an order.

The unit of analysis is the seed: ``a[i]`` and ``b[i]`` are the results of two arms that share seed
``i`` (its initial weights and batches). Missing values are an error; nothing is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from adaptivenet.emergence._extras import require
from adaptivenet.emergence.statistics._values import as_numbers

__all__ = [
    "Alternative",
    "Comparison",
    "Equivalence",
    "Test",
    "Trend",
    "equivalence",
    "holm",
    "page_trend",
    "paired",
]

Alternative = Literal["two-sided", "greater", "less"]
Test = Literal["t", "wilcoxon", "sign_flip"]
_ALTERNATIVES = ("two-sided", "greater", "less")
_TESTS = ("t", "wilcoxon", "sign_flip")


class Comparison(NamedTuple):
    """A paired comparison.

    Attributes:
      mean: mean difference a - b, in their unit (``than`` is not taken off).
      statistic: Student's t, Wilcoxon's signed-rank sum, or the mean difference less ``than``.
      p: of the test.
      d: Cohen's d_z, (mean - than) / standard deviation of the differences; infinite where they are
        all equal and differ from ``than``, 0 where they all equal ``than``.
      n: number of pairs.
    """

    mean: float
    statistic: float
    p: float
    d: float
    n: int


class Equivalence(NamedTuple):
    """Two one-sided tests: is the mean difference within bounds?

    Attributes:
      mean: mean difference, in its unit.
      p: the larger of the two; below alpha the difference lies within the bounds.
      p_low: of "not above the lower bound".
      p_high: of "not below the upper bound".
      low: the lower bound.
      high: the upper bound.
      n: number of pairs.
    """

    mean: float
    p: float
    p_low: float
    p_high: float
    low: float
    high: float
    n: int


class Trend(NamedTuple):
    """Page's test of an ordered alternative.

    Attributes:
      statistic: Page's L.
      p: of "all orders are alike" against "the values rise from column to column".
      n: number of seeds (rows).
      conditions: number of conditions (columns).
    """

    statistic: float
    p: float
    n: int
    conditions: int


def paired(
    a: Any,
    b: Any = None,
    *,
    alternative: Alternative = "two-sided",
    than: float = 0.0,
    test: Test = "t",
    resamples: int = 9_999,
    seed: int = 0,
) -> Comparison:
    """Tests whether the differences ``a - b`` are centred elsewhere than at ``than``.

    Args:
      a: one value a seed, shape [n].
      b: the other arm, same seeds in the same order; or None where ``a`` holds differences.
      alternative: ``greater``: a - b tends to be above ``than``.
      than: the difference under the null.
      test: ``t``: Student's (exact for Gaussian differences); ``wilcoxon``: signed ranks, exact up
        to 50 pairs without ties (pairs that equal ``than`` are left out of the ranks);
        ``sign_flip``: the mean under random signs, exact (all 2^n) where 2^n <= ``resamples``,
        that is up to 13 pairs, and Monte Carlo beyond. The last two ask for symmetry only.
      resamples: of the sign-flip test.
      seed: of the sign-flip test.

    Returns:
      The comparison. Differences that are all equal have no variance, so that t is infinite or, at
      ``than``, 0/0; the p of the ``t`` test is then that of the exact sign-flip test: 1 where they
      equal ``than``, else 2^(1-n) or 2^-n (one-sided), never 0.

    Raises:
      ValueError: nan, arms of different lengths, fewer than two pairs, or an unknown test or
        alternative.

    References:
      Lakens, "Calculating and reporting effect sizes", Frontiers in Psychology 4:863, 2013 (d_z).

    >>> got = paired([3.0, 4.0, 5.0], [2.0, 2.0, 2.0])
    >>> got.mean, round(got.statistic, 3), round(got.p, 3), got.d, got.n
    (2.0, 3.464, 0.074, 2.0, 3)
    """
    if alternative not in _ALTERNATIVES:
        raise ValueError(f"alternative={alternative!r} is none of {', '.join(_ALTERNATIVES)}.")
    if test not in _TESTS:
        raise ValueError(f"test={test!r} is none of {', '.join(_TESTS)}.")
    if not math.isfinite(than):
        raise ValueError(f"than must be a finite number, not {than}.")
    differences, scale = _differences(a, b)
    mean, n = float(differences.mean()), len(differences)
    rest = differences - than
    # What rounding leaves of equal differences is no variance, nor is what has no square.
    tiny = max(1e-13 * max(scale, abs(than)), 1e-150)
    rest = np.where(np.abs(rest) <= tiny, 0.0, rest)
    constant = bool(np.ptp(rest) <= tiny)
    centre = float(rest.mean())
    if constant:
        d = math.copysign(math.inf, centre) if centre else 0.0
    else:
        d = centre / float(rest.std(ddof=1))
    if constant and not centre:
        return Comparison(mean, 0.0, 1.0, 0.0, n)
    stats = require("scipy.stats")
    if test == "wilcoxon":
        result = stats.wilcoxon(rest, alternative=alternative)
        return Comparison(mean, float(result.statistic), float(result.pvalue), d, n)
    if test == "t" and constant:
        favoured = alternative == "two-sided" or (alternative == "greater") == (centre > 0)
        p = (2.0 if alternative == "two-sided" else 1.0) * 0.5**n if favoured else 1.0
        return Comparison(mean, d, p, d, n)
    if test == "t":
        result = stats.ttest_1samp(rest, 0.0, alternative=alternative)
        return Comparison(mean, float(result.statistic), float(result.pvalue), d, n)
    result = stats.permutation_test(
        (rest,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        alternative=alternative,
        rng=np.random.default_rng(seed),
    )
    return Comparison(mean, float(result.statistic), float(result.pvalue), d, n)


def _differences(a: Any, b: Any) -> tuple[np.ndarray, float]:
    """The differences, and the size of the numbers that they were taken of."""
    first = as_numbers(a, "a", least=2)
    if b is None:
        return first, float(np.max(np.abs(first)))
    second = as_numbers(b, "b", least=2)
    if first.shape != second.shape:
        raise ValueError(
            f"a holds {len(first)} values and b {len(second)}; they are paired by seed, so give "
            "the same seeds in the same order."
        )
    return first - second, float(max(np.max(np.abs(first)), np.max(np.abs(second))))


def equivalence(
    a: Any,
    b: Any = None,
    *,
    low: float,
    high: float,
    test: Test = "t",
    resamples: int = 9_999,
    seed: int = 0,
) -> Equivalence:
    """Two one-sided tests (TOST) that the mean of ``a - b`` lies between ``low`` and ``high``.

    "No significant difference" is no evidence of none; this is. The bounds say what counts as no
    difference, and are to be fixed before the data are seen.

    Args:
      a: one value a seed, shape [n].
      b: the other arm, same seeds in the same order; or None where ``a`` holds differences.
      low: lower bound of what counts as none, in the values' unit.
      high: upper bound.
      test: as in :func:`paired`.
      resamples: of the sign-flip test.
      seed: of the sign-flip test.

    Returns:
      Both p; the larger decides.

    Raises:
      ValueError: as :func:`paired`, or ``low`` not below ``high``.

    References:
      Schuirmann, "A comparison of the two one-sided tests procedure and the power approach",
      Journal of Pharmacokinetics and Biopharmaceutics 15, 1987.

    >>> equivalence([0.1, -0.1, 0.0, 0.05], low=-1.0, high=1.0).p < 0.05
    True
    """
    if not low < high:
        raise ValueError(f"low={low:g} must lie below high={high:g}.")
    options: Any = {"test": test, "resamples": resamples, "seed": seed}
    above = paired(a, b, than=low, alternative="greater", **options)
    below = paired(a, b, than=high, alternative="less", **options)
    return Equivalence(above.mean, max(above.p, below.p), above.p, below.p, low, high, above.n)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's adjustment of p values: the chance of any false rejection stays below alpha.

    Args:
      p_values: of a family of tests, shape [tests].

    Returns:
      Adjusted p values in the same order; float64[tests]. Compare each with alpha itself.

    Raises:
      ValueError: nan, none at all, or a p outside [0, 1].

    References:
      Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of
      Statistics 6, 1979.

    >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
    [0.03, 0.06, 0.06]
    """
    values = as_numbers(p_values, "p_values", least=1)
    if np.any((values < 0) | (values > 1)):
        raise ValueError(f"p_values must lie in [0, 1]; the worst is {values.max():g}.")
    # Not by statsmodels, which collects the garbage of the whole process on every call.
    order = np.argsort(values)
    steps = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(steps)
    adjusted[order] = np.minimum(steps, 1.0)
    return adjusted


def page_trend(values: Any) -> Trend:
    """Page's test that values rise over ordered conditions.

    Args:
      values: one row a seed, one column a condition, in the order in which they should rise; shape
        [seeds, conditions]. Each seed is ranked by itself, so that seeds need not be on one level.

    Returns:
      The trend; p is exact for small tables and asymptotic beyond (SciPy chooses).

    Raises:
      ValueError: nan, fewer than two seeds or fewer than three conditions.

    References:
      Page, "Ordered hypotheses for multiple treatments", Journal of the American Statistical
      Association 58, 1963.

    >>> page_trend([[1.0, 2.0, 3.0], [2.0, 5.0, 9.0], [0.0, 1.0, 4.0]]).statistic
    42.0
    """
    array = as_numbers(values, "values", least=2, dimensions=2)
    if array.shape[1] < 3:
        raise ValueError(f"a trend needs at least 3 conditions, got {array.shape[1]}.")
    result = require("scipy.stats").page_trend_test(array)
    return Trend(float(result.statistic), float(result.pvalue), *array.shape)
