"""Bayesian model reduction against true evidences of conjugate linear regression."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from adaptivenet import pruning
from adaptivenet.posterior import reduction
from adaptivenet.posterior.gaussian import Posterior

NOISE = 0.5  # deviation


def problem(seed, examples=12, inputs=4, centred=True):
    """Linear regression: x, y, the prior's mean and variances, the exact posterior."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(examples, inputs))
    truth = rng.normal(size=inputs) * (rng.random(inputs) < 0.5)
    y = x @ truth + NOISE * rng.normal(size=examples)
    variances = rng.uniform(0.5, 2, inputs)
    centre = np.zeros(inputs) if centred else 0.3 * rng.normal(size=inputs)
    precision = x.T @ x / NOISE**2 + np.diag(1 / variances)
    covariance = np.linalg.inv(precision)
    mean = covariance @ (x.T @ y / NOISE**2 + centre / variances)
    return x, y, centre, variances, mean, covariance


def log_evidence(x, y, centre, variances):
    """log p(y) with the weights integrated out: y is Gaussian."""
    covariance = (x * variances) @ x.T + NOISE**2 * np.eye(len(y))
    return stats.multivariate_normal.logpdf(y, x @ centre, covariance)


@functools.cache
def dense(group):
    """Compiled once for each group."""
    return jax.jit(lambda m, c, p, centre: reduction.reduce_dense(m, c, group, p, centre))


def marginals(mean, covariance):
    """The belief about each weight alone, in float64."""
    return Posterior({"w": jnp.asarray(mean)}, {"w": jnp.asarray(1 / np.diag(covariance))})


@given(seed=st.integers(0, 10_000), spike=st.sampled_from([0.0, 1e-4, 0.1, 0.5]))
def test_a_weights_change_is_that_of_the_true_evidences(seed, spike):
    x, y, centre, variances, mean, covariance = problem(seed, centred=spike == 0.1)
    with jax.enable_x64(True):
        prior = Posterior({"w": jnp.asarray(centre)}, {"w": jnp.asarray(1 / variances)})
        found = reduction.evidence_change(marginals(mean, covariance), prior, spike)["w"]
    full = log_evidence(x, y, centre, variances)
    for place in range(len(mean)):
        narrow, middle = variances.copy(), centre.copy()
        narrow[place], middle[place] = spike, 0.0
        true = log_evidence(x, y, middle, narrow) - full
        assert found[place].item() == pytest.approx(true, rel=1e-8, abs=1e-8)


@given(
    seed=st.integers(0, 10_000),
    group=st.sampled_from([{3}, {1, 2}, {0, 1, 3}, {0, 1, 2, 3}]),
)
def test_a_groups_change_and_what_is_left_are_exact(seed, group):
    x, y, centre, variances, mean, covariance = problem(seed, centred=False)
    gone = np.array(sorted(group))
    with jax.enable_x64(True):
        numbers = mean, covariance, np.diag(variances), centre
        found = dense(tuple(sorted(group)))(*map(jnp.asarray, numbers))
    left = [place for place in range(4) if place not in group]
    true = log_evidence(x[:, left], y, centre[left], variances[left]) - log_evidence(
        x, y, centre, variances
    )
    assert found.change.item() == pytest.approx(true, rel=1e-8, abs=1e-8)
    # The posterior of the smaller model, from its data.
    precision = x[:, left].T @ x[:, left] / NOISE**2 + np.diag(1 / variances[left])
    spread = np.linalg.inv(precision)
    middle = spread @ (x[:, left].T @ y / NOISE**2 + centre[left] / variances[left])
    np.testing.assert_allclose(found.mean[np.array(left, int)], middle, atol=1e-9)
    np.testing.assert_allclose(found.covariance[np.ix_(left, left)], spread, atol=1e-9)
    np.testing.assert_array_equal(found.mean[gone], 0)
    np.testing.assert_array_equal(found.covariance[gone], 0)


def test_units_add_up_where_the_inputs_are_orthogonal():
    """Then weights are independent a posteriori, and a unit's evidence is the sum over them."""
    rng = np.random.default_rng(0)
    x = np.linalg.qr(rng.normal(size=(20, 4)))[0]
    y = x @ np.array([1.0, 0.5, 0.0, 0.01]) + NOISE * rng.normal(size=20)
    precision = 1 / NOISE**2 + 1.0
    mean = x.T @ y / NOISE**2 / precision
    belief = Posterior(
        {"w": jnp.asarray(mean.reshape(2, 2), jnp.float32)}, {"w": jnp.full((2, 2), precision)}
    )
    change = reduction.unit_change(reduction.evidence_change(belief), axis=0)["w"]
    full = log_evidence(x, y, np.zeros(4), np.ones(4))
    for unit, left in ((0, [2, 3]), (1, [0, 1])):
        true = log_evidence(x[:, left], y, np.zeros(2), np.ones(2)) - full
        assert change[unit, 0].item() == pytest.approx(true, rel=1e-4, abs=1e-5)
    kept = reduction.reduction_mask(belief, axis=0)["w"]
    np.testing.assert_array_equal(kept, np.broadcast_to(change <= 0, (2, 2)))


@settings(max_examples=20)
@given(
    mean=st.floats(-2, 2), precision=st.floats(2, 50), prior=st.floats(0.1, 2), part=st.floats(0, 1)
)
def test_the_change_is_the_mean_ratio_of_the_priors(mean, precision, prior, part):
    spike = (0.05 + 0.95 * part) / prior
    with jax.enable_x64(True):
        belief = Posterior(jnp.asarray(mean), jnp.asarray(precision))
        found = reduction.evidence_change(belief, prior, spike).item()

    # The trapezium rule is exact to rounding for functions as smooth as this.
    w = np.linspace(-12, 12, 6_001)
    belief_at = stats.norm.logpdf(w, mean, precision**-0.5)
    ratio = stats.norm.logpdf(w, 0, spike**0.5) - stats.norm.logpdf(w, 0, prior**-0.5)
    exact = integrate.trapezoid(np.exp(belief_at + ratio), w)
    assert found == pytest.approx(np.log(exact), abs=1e-6)


def test_a_spike_as_wide_as_the_prior_changes_nothing():
    belief = Posterior(jnp.array([-1.0, 0.0, 2.0]), jnp.array([4.0, 100.0, 2.0]))
    np.testing.assert_allclose(reduction.evidence_change(belief, 2.0, 0.5), 0, atol=1e-5)


def test_the_threshold_is_the_log_of_how_much_was_learnt():
    """Removed for good: kept if and only if SNR^2 > log(precision / prior)."""
    precision = jnp.geomspace(1.5, 1e6, 40)
    edge = jnp.sqrt(jnp.log(precision / 0.5) / precision)
    for factor, kept in ((1.001, True), (0.999, False)):
        belief = Posterior(edge * factor, precision)
        assert np.all(reduction.reduction_mask(belief, 0.5) == kept)


def test_the_score_cuts_what_the_mask_cuts():
    params = {"w": 0.3 * jax.random.normal(jax.random.key(0), (6, 5)), "b": jnp.ones(5)}
    belief = Posterior(
        {"w": params["w"], "b": optax.MaskedNode()},
        {"w": jnp.full((6, 5), 30.0), "b": optax.MaskedNode()},
    )
    mask = reduction.reduction_mask(belief, 2.0)["w"]
    assert 0 < mask.sum() < mask.size
    score = functools.partial(reduction.evidence, prior=2.0)
    tx = pruning.prune(pruning.threshold(math.log(2)), score=score)
    updates = jax.tree.map(jnp.zeros_like, params)
    _, state = tx.update(updates, tx.init(params), params, posterior=belief)
    np.testing.assert_array_equal(state.mask["w"], mask)


def test_the_score_keeps_its_order_where_probabilities_would_not():
    belief = Posterior({"w": jnp.array([1.0, 2.0, 3.0])}, {"w": jnp.full(3, 1e3)})
    scores = reduction.evidence({"w": jnp.zeros(3)}, posterior=belief)["w"]
    assert np.all(np.diff(scores) > 100)


def test_slab_log_odds_are_evidence_and_prior():
    belief = Posterior({"w": jnp.array([0.1, 1.0])}, {"w": jnp.array([9.0, 9.0])})
    change = reduction.evidence_change(belief, 2.0)["w"]
    odds = reduction.slab_log_odds(belief, 0.2, 2.0)["w"]
    np.testing.assert_allclose(odds, np.log(0.2 / 0.8) - change, rtol=1e-6)


def test_strengths_may_be_traced():
    belief = Posterior({"w": jnp.array([0.1, 1.0])}, {"w": jnp.array([9.0, 9.0])})
    both = jax.jit(jax.vmap(lambda p: reduction.evidence_change(belief, p, 0.1)["w"]))(
        jnp.array([0.5, 2.0])
    )
    for found, prior in zip(both, (0.5, 2.0), strict=True):
        by_one = reduction.evidence_change(belief, prior, 0.1)["w"]
        np.testing.assert_allclose(found, by_one, rtol=1e-5)


def test_errors_name_what_is_wrong():
    belief = Posterior({"w": jnp.ones(2)}, {"w": jnp.full(2, 4.0)})
    with pytest.raises(ValueError, match="prior's precision at leaf 'w' must be positive"):
        reduction.evidence_change(belief, 0.0)
    with pytest.raises(ValueError, match=r"spike=2.0 must be a variance from 0 to .* leaf 'w', 1"):
        reduction.evidence_change(belief, 1.0, 2.0)
    with pytest.raises(ValueError, match=r"leaf 'w' of shape \(2,\) has no axis -2"):
        reduction.reduction_mask(belief, axis=-2)
    with pytest.raises(ValueError, match="keep must be a probability"):
        reduction.slab_log_odds(belief, 1.0)
    for group in ([], [0, 0], [2], [-1]):
        with pytest.raises(ValueError, match=r"group=.* at least one of the 2 parameters"):
            reduction.reduce_dense(jnp.ones(2), jnp.eye(2), group)
    with pytest.raises(ValueError, match="no mean of leaf 'v'"):
        reduction.evidence({"v": jnp.ones(2)}, posterior=belief)
    with pytest.raises(ValueError, match=r"mean of leaf 'w' has shape \(2,\)"):
        reduction.evidence({"w": jnp.ones(3)}, posterior=belief)
    with pytest.raises(TypeError, match="trees mean and precision"):
        reduction.evidence({"w": jnp.ones(2)}, posterior=SimpleNamespace(mean=belief.mean))
