"""Bootstrap and Student intervals, against SciPy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from adaptivenet.emergence import statistics

VALUES = np.random.default_rng(5).exponential(size=20)


def bca_by_hand(values, statistic, resamples, seed, confidence=0.95):
    """Efron's formulas, with the resamples that SciPy draws."""
    rng = np.random.default_rng(seed)
    n = len(values)
    drawn = np.array([statistic(values[row]) for row in rng.integers(0, n, (resamples, n))])
    estimate = statistic(values)
    below = (np.sum(drawn < estimate) + np.sum(drawn <= estimate)) / (2 * resamples)
    bias = stats.norm.ppf(below)
    left = np.array([statistic(np.delete(values, i)) for i in range(n)])
    apart = left.mean() - left
    acceleration = (apart**3).sum() / (6 * (apart**2).sum() ** 1.5)
    z = stats.norm.ppf([(1 - confidence) / 2, (1 + confidence) / 2])
    shares = stats.norm.cdf(bias + (bias + z) / (1 - acceleration * (bias + z)))
    return np.quantile(drawn, shares)


@pytest.mark.parametrize("statistic", [np.mean, np.std, lambda x: np.mean(x) ** 2])
def test_bca_is_efrons(statistic):
    got = statistics.bca(VALUES, statistic, resamples=2_000, seed=4)
    low, high = bca_by_hand(VALUES, statistic, 2_000, 4)
    assert got.method == "bca"
    assert got.estimate == pytest.approx(float(statistic(VALUES)))
    assert (got.low, got.high) == (pytest.approx(low, rel=1e-2), pytest.approx(high, rel=1e-2))


def test_bca_is_seeded_and_narrows_with_confidence():
    one = statistics.bca(VALUES, seed=1)
    assert one == statistics.bca(VALUES, seed=1)
    assert one != statistics.bca(VALUES, seed=2)
    narrow = statistics.bca(VALUES, confidence=0.5, seed=1)
    assert one.low < narrow.low < narrow.estimate < narrow.high < one.high


def test_rows_of_several_arrays_are_drawn_together():
    x = np.arange(10.0)
    got = statistics.bca((x, 3 * x + 1), lambda a, b: stats.linregress(a, b).slope, resamples=200)
    assert got.estimate == pytest.approx(3.0)
    assert (got.low, got.high) == (pytest.approx(3.0), pytest.approx(3.0))
    assert got.n == 10


def test_values_that_are_all_equal_give_a_degenerate_interval():
    for interval in (statistics.bca, statistics.student):
        got = interval([0.1, 0.1, 0.1])
        assert got[:3] == (got.estimate,) * 3
        assert got.estimate == pytest.approx(0.1)
        assert got.method == "degenerate"


def test_a_statistic_that_no_resample_changes_gives_a_degenerate_interval():
    got = statistics.bca([1.0, 2.0, 3.0], lambda x, axis=-1: np.zeros(np.shape(x)[:-1]))
    assert got == (0.0, 0.0, 0.0, 0.95, 3, "degenerate")


def test_where_bca_is_undefined_the_percentile_interval_says_so():
    # Only a resample that repeats no value, one of 11, gives the estimate; no one exceeds it.
    got = statistics.bca([1.0, 2.0, 3.0, 4.0], lambda x: float(len(np.unique(x)) == 4))
    assert got.method == "percentile"
    assert got.estimate == 1.0
    assert (got.low, got.high) == (0.0, 1.0)


@pytest.mark.parametrize("interval", [statistics.bca, statistics.student])
def test_one_value_has_no_ends(interval):
    assert interval([3.0]) == (3.0, None, None, 0.95, 1, "none")


def test_student_is_scipys():
    got = statistics.student(VALUES, confidence=0.9)
    low, high = stats.t.interval(0.9, 19, VALUES.mean(), stats.sem(VALUES))
    assert got[:3] == (pytest.approx(VALUES.mean()), pytest.approx(low), pytest.approx(high))


@settings(max_examples=30)
@given(
    st.lists(st.floats(-100, 100), min_size=2, max_size=12),
    st.floats(0.1, 10),
    st.floats(-100, 100),
)
def test_intervals_hold_the_estimate_and_move_with_the_unit(values, scale, shift):
    for interval in (statistics.student, lambda v: statistics.bca(v, resamples=100)):
        one = interval(values)
        other = interval(scale * np.asarray(values) + shift)
        if "percentile" in (one.method, other.method) or one.method != other.method:
            continue  # rounding decides which resamples equal the estimate
        assert one.low <= one.high
        size = 1e-6 * (1 + scale * np.max(np.abs(values)) + abs(shift))
        assert abs(other.estimate - (scale * one.estimate + shift)) <= size
        if one.method == "student":
            assert abs(other.low - (scale * one.low + shift)) <= size


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: statistics.bca([]), "at least 1 are needed"),
        (lambda: statistics.bca([1.0, 2.0], confidence=95), "confidence must lie between 0 and 1"),
        (lambda: statistics.student([1.0, 2.0], confidence=1), "confidence must lie between 0"),
        (lambda: statistics.bca(([1.0, 2.0], [1.0])), r"differ in length: \[2, 1\]"),
        (lambda: statistics.bca([1.0, 2.0], lambda x: np.nan), "must be a finite number"),
        (
            lambda: statistics.bca([1.0, 1.0, 2.0], lambda x: 1.0 if np.ptp(x) else np.nan),
            "nan or infinite for .* of 9999 resamples",
        ),
    ],
)
def test_what_is_refused(use, message):
    with pytest.raises(ValueError, match=message):
        use()
