"""Confidence intervals over seeds: the bias-corrected bootstrap, and Student's.

The unit of analysis is the seed: hand in one number a seed, not one a synapse.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from adaptivenet.emergence._extras import require
from adaptivenet.emergence.statistics._values import as_numbers, check_share

__all__ = ["Interval", "bca", "student"]


class Interval(NamedTuple):
    """An estimate and its confidence interval.

    Attributes:
      estimate: the statistic of the values themselves.
      low: lower end; None where one value says nothing of its spread.
      high: upper end; likewise.
      confidence: nominal coverage.
      n: number of values (of rows, where several arrays were given).
      method: ``bca``, ``percentile``, ``student``, ``degenerate`` (both ends are the estimate) or
        ``none`` (no ends).
    """

    estimate: float
    low: float | None
    high: float | None
    confidence: float
    n: int
    method: str


def bca(
    values: Any,
    statistic: Callable[..., Any] = np.mean,
    *,
    confidence: float = 0.95,
    resamples: int = 9_999,
    seed: int = 0,
) -> Interval:
    """Bias-corrected and accelerated bootstrap interval.

    With 20 values it covers less than it says: about 92 % instead of 95 % for a mean (the controls
    of this project measure it).

    Args:
      values: numbers, shape [n]; or a tuple of such arrays, whose rows are drawn together (paired
        values, for a statistic of several arguments such as a correlation or a ratio of means).
      statistic: function of as many arrays to a number; one with an ``axis`` argument, such as
        ``np.mean``, is evaluated for many resamples at once, which is faster.
      confidence: nominal coverage.
      resamples: bootstrap samples.
      seed: of the resampling.

    Returns:
      The interval. A single value has no ends (None); where every resample gives the same statistic
      both ends are the estimate; where BCa is undefined because the estimate lies outside all
      resamples, the percentile interval stands instead, and ``method`` says so.

    Raises:
      ValueError: nan, no values, arrays of different lengths, or a statistic that gives nan.

    References:
      Efron, "Better bootstrap confidence intervals", Journal of the American Statistical
      Association 82, 1987.

    >>> got = bca([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    >>> got.estimate, got.low < 3.0, got.high > 4.0, got.method
    (3.5, True, True, 'bca')
    >>> bca([2.0, 2.0, 2.0]).method, bca([2.0]).low
    ('degenerate', None)
    """
    check_share(confidence, "confidence")
    several = isinstance(values, tuple)
    arrays = [as_numbers(one, "values") for one in (values if several else [values])]
    n = len(arrays[0])
    if any(len(array) != n for array in arrays):
        raise ValueError(f"paired arrays differ in length: {[len(array) for array in arrays]}.")
    estimate = float(statistic(*arrays))
    if not math.isfinite(estimate):
        raise ValueError(f"the statistic of the values is {estimate}; it must be a finite number.")
    if n == 1:
        return Interval(estimate, None, None, confidence, n, "none")
    if all(np.all(array == array[0]) for array in arrays):
        return Interval(estimate, estimate, estimate, confidence, n, "degenerate")
    stats = require("scipy.stats")
    with warnings.catch_warnings():
        # Both are seen in the result: ends that are nan, and zero spread of the resamples.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        result = stats.bootstrap(
            arrays,
            statistic,
            paired=True,
            confidence_level=confidence,
            n_resamples=resamples,
            method="BCa",
            rng=np.random.default_rng(seed),
            batch=max(1, min(resamples, 5_000_000 // n)),
        )
    low, high = map(float, result.confidence_interval)
    drawn = np.asarray(result.bootstrap_distribution)
    if not np.all(np.isfinite(drawn)):
        raise ValueError(
            f"the statistic is nan or infinite for {int(np.sum(~np.isfinite(drawn)))} of "
            f"{resamples} resamples; use one that every resample defines."
        )
    if math.isfinite(low) and math.isfinite(high):
        return Interval(estimate, low, high, confidence, n, "bca")
    if np.ptp(drawn) == 0:
        return Interval(estimate, estimate, estimate, confidence, n, "degenerate")
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()
    return Interval(estimate, low, high, confidence, n, "percentile")


def student(values: Any, *, confidence: float = 0.95) -> Interval:
    """Student's interval of a mean.

    Args:
      values: numbers, shape [n].
      confidence: nominal coverage, exact for Gaussian values.

    Returns:
      The interval; a single value has no ends (None).

    Raises:
      ValueError: nan or no values.

    >>> got = student([1.0, 2.0, 3.0])
    >>> got.estimate, round(got.low, 3), round(got.high, 3)
    (2.0, -0.484, 4.484)
    """
    check_share(confidence, "confidence")
    array = as_numbers(values, "values")
    mean, n = float(array.mean()), len(array)
    if n == 1:
        return Interval(mean, None, None, confidence, n, "none")
    if np.all(array == array[0]):
        value = float(array[0])
        return Interval(value, value, value, confidence, n, "degenerate")
    half = float(require("scipy.stats").t.ppf((1 + confidence) / 2, n - 1))
    half *= float(array.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, confidence, n, "student")
