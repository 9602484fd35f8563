"""Paired comparisons, against SciPy, enumeration and hand-computed numbers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from adaptivenet.emergence import statistics

RNG = np.random.default_rng(2)
A, B = RNG.normal(0.5, 1, 12), RNG.normal(0, 1, 12)
SIDES = ["two-sided", "greater", "less"]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("than", [0.0, 0.3])
def test_t_is_scipys_paired_t(side, than):
    got = statistics.paired(A, B, alternative=side, than=than)
    want = stats.ttest_rel(A - than, B, alternative=side)
    assert got.statistic == pytest.approx(want.statistic)
    assert got.p == pytest.approx(want.pvalue)
    assert got.mean == pytest.approx(np.mean(A - B))
    assert got.d == pytest.approx((np.mean(A - B) - than) / np.std(A - B, ddof=1))
    assert got.n == 12


@pytest.mark.parametrize("side", SIDES)
def test_wilcoxon_is_scipys(side):
    got = statistics.paired(A, B, alternative=side, test="wilcoxon")
    want = stats.wilcoxon(A, B, alternative=side)
    assert (got.statistic, got.p) == (want.statistic, want.pvalue)


@pytest.mark.parametrize("side", SIDES)
def test_sign_flips_of_a_few_pairs_are_all_of_them(side):
    differences = A[:7] - B[:7]
    means = [np.mean(differences * signs) for signs in itertools.product([1.0, -1.0], repeat=7)]
    observed = differences.mean() - 1e-12
    greater = np.mean(np.array(means) >= observed)
    less = np.mean(np.array(means) <= differences.mean() + 1e-12)
    want = {"greater": greater, "less": less, "two-sided": 2 * min(greater, less)}[side]
    got = statistics.paired(differences, alternative=side, test="sign_flip")
    assert got.p == pytest.approx(min(want, 1.0))
    assert got.p * 2**7 == pytest.approx(round(got.p * 2**7))


def test_sign_flips_of_many_pairs_are_drawn_by_the_seed():
    values = RNG.normal(0.3, 1, 30)
    one = statistics.paired(values, test="sign_flip", seed=1)
    assert one == statistics.paired(values, test="sign_flip", seed=1)
    other = statistics.paired(values, test="sign_flip", seed=2)
    assert one.p != other.p
    assert one.p == pytest.approx(other.p, abs=0.03)
    assert one.p == pytest.approx(statistics.paired(values).p, abs=0.05)


@pytest.mark.parametrize("test", ["t", "wilcoxon", "sign_flip"])
def test_no_difference_at_all_is_no_evidence(test):
    values = np.array([0.91, 0.93, 0.95, 0.90])
    assert statistics.paired(values, values, test=test) == (0.0, 0.0, 1.0, 0.0, 4)
    # What rounding leaves of a constant difference is no variance either.
    got = statistics.paired(values + 0.1, values, than=0.1, test=test)
    assert (got.statistic, got.p, got.d) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("test", ["t", "wilcoxon", "sign_flip"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_constant_difference_has_the_p_of_the_sign_flips(test, sign):
    values = np.array([0.91, 0.93, 0.95, 0.90, 0.2])
    for side in SIDES:
        got = statistics.paired(values + 0.1 * sign, values, alternative=side, test=test)
        against = side != "two-sided" and (side == "greater") != (sign > 0)
        want = 1.0 if against else {"two-sided": 2.0}.get(side, 1.0) / 2**5
        assert got.p == pytest.approx(want)
        assert got.d == sign * math.inf
        assert got.mean == pytest.approx(0.1 * sign)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=10), st.floats(-10, 10))
def test_p_is_a_probability_and_the_sides_mirror(values, than):
    for test in ("t", "wilcoxon", "sign_flip"):
        greater = statistics.paired(values, alternative="greater", than=than, test=test)
        less = statistics.paired(-np.asarray(values), alternative="less", than=-than, test=test)
        assert 0 <= greater.p <= 1
        assert greater.p == pytest.approx(less.p)
        assert greater.d == pytest.approx(-less.d)


def test_equivalence_is_two_one_sided_tests():
    got = statistics.equivalence(A, B, low=-0.5, high=2.0)
    above = stats.ttest_rel(A + 0.5, B, alternative="greater").pvalue
    below = stats.ttest_rel(A - 2.0, B, alternative="less").pvalue
    assert (got.p_low, got.p_high) == (pytest.approx(above), pytest.approx(below))
    assert got.p == max(got.p_low, got.p_high)
    assert (got.low, got.high, got.n) == (-0.5, 2.0, 12)


def test_equivalence_is_statsmodels():
    weightstats = pytest.importorskip("statsmodels.stats.weightstats")
    p, low, high = weightstats.ttost_paired(A, B, -0.5, 2.0)
    got = statistics.equivalence(A, B, low=-0.5, high=2.0)
    assert got.p == pytest.approx(float(p))
    assert (got.p_low, got.p_high) == (pytest.approx(float(low[1])), pytest.approx(float(high[1])))


def test_equivalence_agrees_with_the_interval_of_ninety_per_cent():
    interval = statistics.student(A - B, confidence=0.9)
    inside = statistics.equivalence(A, B, low=interval.low - 1e-6, high=interval.high + 1e-6)
    outside = statistics.equivalence(A, B, low=interval.low + 1e-6, high=interval.high + 1e-6)
    assert inside.p < 0.05 < outside.p


def holm_by_hand(values):
    adjusted, worst = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        worst = max(worst, (len(values) - rank) * values[place])
        adjusted[place] = min(1.0, worst)
    return adjusted


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_the_step_down(values):
    np.testing.assert_allclose(statistics.holm(values), holm_by_hand(values))


def test_holm_is_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    values = np.random.default_rng(0).uniform(0, 0.3, 20).round(2)  # with ties, and some above 1
    expected = multitest.multipletests(values, method="holm")[1]
    np.testing.assert_allclose(statistics.holm(values), expected)


def test_pages_l_by_hand():
    # The tabulated example of three subjects and three ordered conditions.
    got = statistics.page_trend([[1, 2, 3], [1, 3, 2], [1, 2, 3]])
    assert got.statistic == (1 * 3 + 2 * 7 + 3 * 8)
    orders = list(itertools.permutations([1, 2, 3]))
    sums = [
        sum(a * 1 + b * 2 + c * 3 for a, b, c in rows)
        for rows in itertools.product(orders, repeat=3)
    ]
    assert got.p == pytest.approx(np.mean(np.array(sums) >= 41))
    assert (got.n, got.conditions) == (3, 3)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: statistics.paired([1.0]), "at least 2 are needed"),
        (lambda: statistics.paired([1.0, 2.0], [1.0, 2.0, 3.0]), "paired by seed"),
        (lambda: statistics.paired(A, B, test="z"), "test='z' is none of t, wilcoxon"),
        (lambda: statistics.paired(A, B, alternative="up"), "alternative='up' is none of"),
        (lambda: statistics.paired(A, B, than=math.nan), "than must be a finite number"),
        (lambda: statistics.equivalence(A, B, low=1, high=1), "low=1 must lie below high=1"),
        (lambda: statistics.holm([]), "at least 1"),
        (lambda: statistics.holm([0.2, 1.2]), r"must lie in \[0, 1\]"),
        (lambda: statistics.page_trend([1.0, 2.0]), "must have 2 axes"),
        (lambda: statistics.page_trend(np.ones((1, 3))), "at least 2 are needed"),
        (lambda: statistics.page_trend(np.ones((3, 2))), "at least 3 conditions"),
    ],
)
def test_what_is_refused(use, message):
    with pytest.raises(ValueError, match=message):
        use()
