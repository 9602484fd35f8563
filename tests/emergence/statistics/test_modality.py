"""The dip test, mixtures and modes, against their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from adaptivenet.emergence import statistics

RNG = np.random.default_rng(7)
TWO = np.concatenate([RNG.normal(-3, 1, 300), RNG.normal(3, 0.5, 100)])
ONE = RNG.normal(10, 2, 400)


def dip_by_definition(values):
    """Least distance of the empirical law to a unimodal one, as one linear program a mode."""
    x = np.unique(values)
    above = np.array([np.mean(values <= v) for v in x])
    below = np.array([np.mean(values < v) for v in x])
    k, best = len(x), np.inf
    for mode in range(k):
        # Unknown: the law at each point, just left and right of it where it may jump (the mode),
        # and the distance. Convex before the mode, concave after it.
        rows, limits = [], []

        def at(i, sign, mode=mode):
            row = np.zeros(k + 2)
            # Index k stands for the value just left of the mode.
            row[k if (i == mode and sign == "left") else i] = 1.0
            return row

        for i in range(k):
            for side, target in (("left", below[i]), ("right", above[i])):
                row = at(i, side)
                rows += [row - np.eye(k + 2)[-1], -row - np.eye(k + 2)[-1]]
                limits += [target, -target]

        def slope(i, j, first, last):
            return (at(j, last) - at(i, first)) / (x[j] - x[i])

        left = [slope(i, i + 1, "right", "left") for i in range(mode)]
        right = [slope(i, i + 1, "right", "left") for i in range(mode, k - 1)]
        rows += [a - b for a, b in itertools.pairwise(left)]  # slopes rise before the mode
        rows += [b - a for a, b in itertools.pairwise(right)]  # and fall after it
        rows += [-s for s in left + right] + [at(mode, "left") - at(mode, "right")]
        limits += [0.0] * (len(rows) - len(limits))
        cost = np.eye(k + 2)[-1]
        result = optimize.linprog(cost, A_ub=rows, b_ub=limits, bounds=(0, 1))
        best = min(best, result.fun)
    return best


@pytest.mark.parametrize("seed", range(4))
def test_the_dip_is_the_distance_to_the_nearest_unimodal_law(seed):
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.normal(0, 1, 5), rng.normal(6, 1, 6)])
    got = statistics.dip(values)
    assert got.statistic == pytest.approx(dip_by_definition(values), abs=1e-6)


def test_the_dip_rejects_two_modes_and_not_one():
    assert statistics.dip(TWO).p < 0.001
    assert statistics.dip(ONE).p > 0.5
    assert statistics.dip(np.ones(10)) == (0.0, 1.0, 10)


def test_the_dip_draws_at_most_maximum_values():
    got = statistics.dip(TWO, maximum=100, seed=1)
    assert got.n == 100
    assert got == statistics.dip(TWO, maximum=100, seed=1)
    assert got != statistics.dip(TWO, maximum=100, seed=2)
    with pytest.raises(ValueError, match="beyond the table"):
        statistics.dip(TWO, maximum=100_000)


def test_the_mixture_finds_the_components_that_are_there():
    got = statistics.mixture(TWO)
    assert got.components == 2
    assert got.converged
    assert got.n == 400
    np.testing.assert_allclose(got.weights, [0.75, 0.25], atol=0.02)
    np.testing.assert_allclose(got.means, [-3, 3], atol=0.2)
    np.testing.assert_allclose(got.sds, [1, 0.5], atol=0.1)
    assert statistics.mixture(ONE).components == 1


def test_one_component_is_the_gaussian_with_its_bic():
    got = statistics.mixture(ONE, components=(1,))
    assert got.means[0] == pytest.approx(ONE.mean())
    assert got.sds[0] == pytest.approx(ONE.std(), rel=1e-5)
    log_likelihood = stats.norm.logpdf(ONE, ONE.mean(), ONE.std()).sum()
    assert got.bic[1] == pytest.approx(2 * np.log(400) - 2 * log_likelihood)


def test_bic_of_two_components_is_by_its_definition():
    got = statistics.mixture(TWO)
    density = stats.norm.pdf(TWO[:, None], got.means, got.sds) @ got.weights
    assert got.bic[2] == pytest.approx(5 * np.log(400) - 2 * np.log(density).sum(), rel=1e-6)
    assert set(got.bic) == {1, 2, 3}
    assert min(got.bic, key=got.bic.__getitem__) == 2


def test_the_mixture_does_not_depend_on_the_unit():
    one, other = statistics.mixture(TWO), statistics.mixture(1e-4 * TWO + 5)
    assert one.components == other.components
    np.testing.assert_allclose(other.means, 1e-4 * one.means + 5, rtol=1e-6)
    np.testing.assert_allclose(other.sds, 1e-4 * one.sds, rtol=1e-4)


def kernel_density(values, bandwidth, points):
    return np.exp(-0.5 * ((points[:, None] - values) / bandwidth) ** 2).sum(1)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.floats(0.1, 1.5))
def test_modes_are_those_of_the_kernel_density(seed, bandwidth):
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.normal(0, 1, 30), rng.normal(4, 1, 20)])
    points = np.linspace(values.min() - 6, values.max() + 6, 20_001)
    density = kernel_density(values, bandwidth, points)
    rising = np.diff(density) > 0
    peaks = points[1:-1][rising[:-1] & ~rising[1:]]
    got = statistics.modes(values, bandwidth, prominence=0.0)
    # Peaks may come or go where the density is flat to rounding; the high ones must agree.
    high = peaks[kernel_density(values, bandwidth, peaks) > 0.2 * density.max()]
    for peak in high:
        curvature = kernel_density(values, bandwidth, peak + np.array([-0.1, 0, 0.1]))
        if curvature[1] - curvature[[0, 2]].max() > 1e-3 * density.max():
            assert np.min(np.abs(got - peak)) < 0.02
    # The grid ripples by some ten-thousandths of the height; what stands above that is real.
    for value in statistics.modes(values, bandwidth, prominence=2e-3):
        assert np.min(np.abs(peaks - value)) < 0.1


def test_small_modes_are_left_out_by_their_prominence():
    values = np.concatenate([ONE, [40.0]])
    assert len(statistics.modes(values, 1.0)) == 1
    assert len(statistics.modes(values, 1.0, prominence=0.0)) >= 2
    assert len(statistics.modes(TWO)) == 2


def test_modes_of_values_that_are_all_equal():
    assert statistics.modes([2.0, 2.0, 2.0]).tolist() == [2.0]


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: statistics.dip([1.0, 2.0, 3.0]), "at least 4 are needed"),
        (lambda: statistics.mixture(np.ones(10)), "all equal"),
        (lambda: statistics.mixture(TWO, ()), "distinct numbers from 1"),
        (lambda: statistics.mixture(TWO, (1, 1)), "distinct numbers from 1"),
        (lambda: statistics.mixture([1.0, 2.0, 3.0]), "at least 6 are needed"),
        (lambda: statistics.modes(TWO, 0.0), "bandwidth must be positive"),
        (lambda: statistics.modes(TWO, prominence=1.0), "prominence must lie in"),
    ],
)
def test_what_is_refused(use, message):
    with pytest.raises(ValueError, match=message):
        use()
