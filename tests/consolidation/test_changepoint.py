"""Bayesian changepoint detection is the sum over all partitions, and finds changes in time."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptivenet.consolidation.changepoint import bernoulli_model, changepoint, normal_model


def log_marginal_normal(x, mean, weight, shape, scale):
    """The evidence of a run in closed form (Murphy 2007), in float64."""
    n = len(x)
    centre = np.mean(x)
    k, a = weight + n, shape + n / 2
    b = scale + 0.5 * np.sum((x - centre) ** 2) + weight * n * (centre - mean) ** 2 / (2 * k)
    return (
        math.lgamma(a)
        - math.lgamma(shape)
        + shape * math.log(scale)
        - a * math.log(b)
        + 0.5 * math.log(weight / k)
        - n / 2 * math.log(2 * math.pi)
    )


def log_marginal_bernoulli(x, ones, zeros):
    a, b = ones + sum(x), zeros + len(x) - sum(x)
    parts = (a, b, ones + zeros), (a + b, ones, zeros)
    return sum(map(math.lgamma, parts[0])) - sum(map(math.lgamma, parts[1]))


def by_enumeration(x, hazard, evidence):
    """The posterior of the run length, over all ways of cutting the stream into runs."""
    total = np.zeros(len(x) + 1)
    for cuts in itertools.product([False, True], repeat=len(x) - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(x)]
        weight = sum(math.log(hazard if cut else 1 - hazard) for cut in cuts)
        weight += sum(evidence(x[a:b]) for a, b in itertools.pairwise(edges))
        total[edges[-1] - edges[-2]] += math.exp(weight)
    return total / total.sum()


def run_lengths(detector, x, size):
    """The same by the detector, after the last value."""
    state = detector.init()
    for value in x:
        state, _ = UPDATES[detector](state, jnp.asarray(value, jnp.float32))
    found = np.zeros(size)
    np.add.at(found, np.asarray(state.length), np.exp(np.asarray(state.log_weight, np.float64)))
    return found


NORMAL = {"mean": 0.3, "weight": 0.2, "shape": 1.5, "scale": 0.4}
DETECTORS = {
    "normal": changepoint(normal_model(**NORMAL), hazard=0.1, window=9),
    "bernoulli": changepoint(bernoulli_model(0.7, 1.3), hazard=0.2, window=9),
}
UPDATES = {detector: jax.jit(detector.update) for detector in DETECTORS.values()}


class TestPosterior:
    @settings(max_examples=10)
    @given(x=st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=9))
    def test_normal_values(self, x):
        got = run_lengths(DETECTORS["normal"], x, len(x) + 1)
        expected = by_enumeration(
            np.array(x), 0.1, lambda run: log_marginal_normal(run, *NORMAL.values())
        )
        np.testing.assert_allclose(got, expected, rtol=2e-3, atol=1e-6)

    @settings(max_examples=10)
    @given(x=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def test_zeros_and_ones(self, x):
        got = run_lengths(DETECTORS["bernoulli"], x, len(x) + 1)
        expected = by_enumeration(x, 0.2, lambda run: log_marginal_bernoulli(run, 0.7, 1.3))
        np.testing.assert_allclose(got, expected, rtol=2e-3, atol=1e-6)

    def test_another_hazard_is_another_posterior(self):
        """Negative control: the comparison is not blind."""
        x = np.array([0.0, 0.1, 2.0, 2.1])
        evidence = lambda run: log_marginal_normal(run, *NORMAL.values())  # noqa: E731
        got = run_lengths(DETECTORS["normal"], x, 5)
        assert np.max(np.abs(got - by_enumeration(x, 0.3, evidence))) > 0.1

    def test_what_does_not_fit_the_window_is_improbable(self):
        """A few run lengths of two hundred are nearly all that is believed; more are more."""
        rng = np.random.default_rng(0)
        x = np.concatenate([rng.normal(0, 1, 100), rng.normal(4, 1, 100)]).astype(np.float32)
        model, found = normal_model(weight=0.05), []
        for window in (16, 64, 200):
            detector = changepoint(model, hazard=0.01, window=window)
            state, _ = jax.jit(lambda v, d=detector: jax.lax.scan(d.update, d.init(), v))(x)
            weights = np.zeros(201)
            np.add.at(weights, np.asarray(state.length), np.exp(np.asarray(state.log_weight)))
            found.append(weights)
        for weights in found:
            np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-4)
            assert 99 <= np.argmax(weights) <= 101
        errors = [np.abs(weights - found[-1]).sum() / 2 for weights in found[:-1]]
        assert errors[1] < errors[0] / 2
        assert errors[0] < 0.05

    def test_predictive_densities_stay_exact_for_long_runs(self):
        """Gamma functions of large numbers cancel in float32; the series does not."""
        model = normal_model()
        for a in (0.5, 3.0, 9.9, 10.1, 500.0, 1e6):
            statistics = tuple(jnp.float32(s) for s in (0.0, 2 * a, a, a))
            got = float(model.log_predictive(statistics, jnp.float32(0.5)))
            spread = 2 * a * (2 * a + 1) / (2 * a)
            log = math.lgamma(a + 0.5) - math.lgamma(a)
            if a > 1e5:
                log = 0.5 * math.log(a) - 1 / (8 * a)
            expected = log - 0.5 * math.log(math.pi * spread)
            expected -= (a + 0.5) * math.log1p(0.25 / spread)
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


class TestAlarms:
    def found(self, values, detector):
        run = jax.vmap(lambda v: jax.lax.scan(detector.update, detector.init(), v)[1])
        return np.asarray(jax.jit(run)(jnp.asarray(values, jnp.float32)))

    def test_changes_of_the_mean(self):
        """Twenty streams with a change, and the same without (negative control)."""
        values = np.random.default_rng(0).normal(size=(20, 400))
        detector = changepoint(normal_model(weight=0.05), hazard=1e-3, window=24)
        expected = 1e-3 * values.size  # the changes that the prior expects: 8
        assert self.found(values, detector).sum() <= expected
        values[:, 200:] += 3.0
        found = self.found(values, detector)
        assert found[:, :200].sum() <= expected / 2
        delays = [np.flatnonzero(row[200:]) for row in found]
        assert max(d[0] for d in delays) < 12
        assert sum(map(len, delays)) <= 20 + expected / 2  # one change is one alarm

    def test_changes_of_the_spread_which_sums_do_not_see(self):
        values = np.random.default_rng(1).normal(size=(10, 400))
        values[:, 200:] *= 6.0
        detector = changepoint(normal_model(weight=0.05), hazard=1e-3, window=24)
        found = self.found(values, detector)
        assert found[:, :200].sum() <= 2  # what the prior expects of 2000 values
        assert sum(row[200:215].any() for row in found) >= 8

    def test_errors_of_a_classifier(self):
        rng = np.random.default_rng(2)
        values = (rng.uniform(size=(10, 400)) < 0.05).astype(float)
        values[:, 200:] = rng.uniform(size=(10, 200)) < 0.7
        found = self.found(values, changepoint(bernoulli_model(), hazard=1e-3, window=24))
        assert found[:, :200].sum() <= 2  # as above
        assert all(row[200:].any() for row in found)
        assert np.median([np.flatnonzero(row)[0] for row in found]) < 215

    def test_changes_soon_after_an_alarm_are_the_same_and_later_ones_are_not(self):
        """Steps of ten deviations; what is found does not hide what comes after."""
        noise = np.random.default_rng(4).normal(size=120)
        for second, expected in ((46, [40]), (55, [40, 55])):
            values = noise + 10.0 * (np.arange(120) >= 40) + 10.0 * (np.arange(120) >= second)
            detector = changepoint(normal_model(weight=0.05), hazard=1e-3, window=24)
            places = np.flatnonzero(self.found(values[None], detector)[0])
            assert len(places) == len(expected)
            assert all(0 <= p - e <= 3 for p, e in zip(places, expected, strict=True))

    def test_values_that_are_not_finite_leave_no_trace(self):
        values = np.random.default_rng(3).normal(size=100).astype(np.float32)
        detector = changepoint(normal_model(), window=8)
        run = jax.jit(lambda v: jax.lax.scan(detector.update, detector.init(), v)[0])
        broken = np.insert(values, [10, 50], [np.nan, np.inf])
        for a, b in zip(jax.tree.leaves(run(values)), jax.tree.leaves(run(broken)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_hazards_may_be_traced():
    values = jnp.asarray(np.random.default_rng(0).normal(size=50), jnp.float32)

    def last(hazard):
        detector = changepoint(normal_model(), hazard=hazard, window=8)
        return jax.lax.scan(detector.update, detector.init(), values)[0].recent(5)

    rare, frequent = jax.jit(jax.vmap(last))(jnp.array([1e-4, 0.3]))
    assert rare < 0.1 < frequent


def test_errors():
    for make, message in (
        (lambda: changepoint(normal_model(), hazard=0.0), "hazard must be positive"),
        (lambda: changepoint(normal_model(), hazard=1.0), "1 - hazard must be positive"),
        (lambda: changepoint(normal_model(), threshold=2.0), r"threshold must be in \[0, 1\]"),
        (lambda: changepoint(normal_model(), window=1), "needed are window >= 2"),
        (lambda: changepoint(normal_model(), recent=0), "recent >= 1"),
        (lambda: changepoint(normal_model(), gap=-1), "gap >= 0"),
        (lambda: normal_model(scale=0.0), "scale must be positive"),
        (lambda: bernoulli_model(ones=0.0), "ones must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
