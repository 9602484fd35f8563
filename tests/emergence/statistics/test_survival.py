"""Kaplan-Meier curves and what is made of them, against a slow version and lifelines."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from adaptivenet.emergence import statistics

SPELLS = st.lists(st.tuples(st.integers(1, 8), st.booleans()), min_size=1, max_size=25)


def product_limit(durations, observed, time):
    """Survival and the limits of log(-log) with Greenwood's variance, from their definitions."""
    survival, greenwood = 1.0, 0.0
    for moment in sorted({d for d, seen in zip(durations, observed, strict=True) if seen}):
        if moment > time:
            break
        at_risk = sum(d >= moment for d in durations)
        deaths = sum(d == moment and s for d, s in zip(durations, observed, strict=True))
        survival *= 1 - deaths / at_risk
        if at_risk > deaths:
            greenwood += deaths / (at_risk * (at_risk - deaths))
    if survival in (0.0, 1.0):
        return survival, survival, survival
    spread = stats.norm.ppf(0.975) * np.sqrt(greenwood) / np.log(survival)
    low, high = survival ** np.exp(-spread), survival ** np.exp(spread)
    return survival, min(low, high), max(low, high)


@settings(max_examples=30)
@given(SPELLS)
def test_the_curve_is_the_product_limit(spells):
    durations, observed = zip(*spells, strict=True)
    curve = statistics.kaplan_meier(durations, observed)
    assert curve.times.tolist() == sorted({0.0, *map(float, durations)})
    for place, time in enumerate(curve.times):
        want = product_limit(durations, observed, time)
        got = (curve.survival[place], curve.low[place], curve.high[place])
        np.testing.assert_allclose(got, want, atol=1e-9)
        assert curve.at_risk[place] == sum(d >= time for d in durations)


@settings(max_examples=30)
@given(SPELLS, st.floats(0.1, 8))
def test_the_restricted_mean_is_the_area_under_the_curve(spells, horizon):
    durations, observed = zip(*spells, strict=True)
    horizon = min(horizon, max(durations))
    curve = statistics.kaplan_meier(durations, observed)
    points = (np.arange(20_000) + 0.5) / 20_000 * horizon
    heights = curve.survival[np.searchsorted(curve.times, points, side="right") - 1]
    got = statistics.restricted_mean(curve, horizon)
    assert got == pytest.approx(horizon * heights.mean(), abs=2e-3)


def test_without_censoring_the_restricted_mean_is_the_mean_of_the_minimum():
    durations = np.array([1.0, 4.0, 2.0, 9.0])
    curve = statistics.kaplan_meier(durations, np.ones(4, bool))
    assert statistics.restricted_mean(curve, 5.0) == pytest.approx(np.minimum(durations, 5).mean())


def test_the_restricted_mean_is_lifelines():
    lifelines = pytest.importorskip("lifelines")
    rng = np.random.default_rng(0)
    durations, observed = rng.exponential(2, 40), rng.random(40) < 0.7
    fitter = lifelines.KaplanMeierFitter().fit(durations, observed)
    want = lifelines.utils.restricted_mean_survival_time(fitter, t=1.5)
    curve = statistics.kaplan_meier(durations, observed)
    assert statistics.restricted_mean(curve, 1.5) == pytest.approx(want)


def test_log_rank_by_hand():
    durations = np.array([1, 2, 3, 3, 4, 5, 6, 6])
    observed = np.array([1, 1, 1, 0, 1, 1, 1, 0], bool)
    groups = np.array(["a", "a", "b", "a", "b", "a", "b", "b"])
    difference = variance = 0.0
    for time in np.unique(durations[observed]):
        at_risk = durations >= time
        n, own = at_risk.sum(), (at_risk & (groups == "a")).sum()
        ends = (durations == time) & observed
        deaths = ends.sum()
        difference += (ends & (groups == "a")).sum() - deaths * own / n
        if n > 1:
            variance += deaths * (own / n) * (1 - own / n) * (n - deaths) / (n - 1)
    got = statistics.log_rank(durations, observed, groups)
    assert got.statistic == pytest.approx(difference**2 / variance)
    assert got.p == pytest.approx(stats.chi2.sf(got.statistic, 1))
    assert (got.groups, got.n) == (2, 8)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: statistics.kaplan_meier([], []), "at least 1"),
        (lambda: statistics.kaplan_meier([1, -2], [1, 1]), "must not be negative"),
        (lambda: statistics.kaplan_meier([1, 2], [1]), "observed holds 1 values, durations 2"),
        (lambda: statistics.kaplan_meier([1, 2], [1, 3]), "must be True .* or False"),
        (lambda: statistics.kaplan_meier([1, 2], [1, 1], confidence=95), "confidence must lie"),
        (
            lambda: statistics.restricted_mean(statistics.kaplan_meier([1, 2], [1, 1]), 3),
            r"horizon=3 must lie in \(0, 2\]",
        ),
        (lambda: statistics.log_rank([1, 2], [1, 1], ["a", "a"]), "at least two groups"),
        (lambda: statistics.log_rank([1, 2], [1, 1], ["a"]), "groups holds 1 labels"),
    ],
)
def test_what_is_refused(use, message):
    with pytest.raises(ValueError, match=message):
        use()
