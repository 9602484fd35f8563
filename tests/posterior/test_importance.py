"""Importance sampling against densities whose moments and integrals are known."""

from __future__ import annotations

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivenet import models
from adaptivenet.posterior import Posterior, importance, laplace, log_density, temper
from adaptivenet.posterior.importance import Weighted, importance_sample

KEY = jax.random.key(0)
WIDE = Posterior(
    {"w": jnp.zeros(2), "b": jnp.zeros(())}, {"w": jnp.full(2, 0.2), "b": jnp.ones(())}
)
TRUTH = Posterior(
    {"w": jnp.array([0.5, -1.0]), "b": jnp.array(0.3)},
    {"w": jnp.array([1.0, 2.0]), "b": jnp.array(4.0)},
)


def test_moments_and_evidence_of_a_gaussian():
    found = importance_sample(lambda p: log_density(TRUTH, p) + 7.0, WIDE, KEY, samples=50_000)
    assert abs(found.log_evidence - 7.0) < 0.05
    np.testing.assert_allclose(jnp.exp(found.log_weights).sum(), 1.0, rtol=1e-4)
    moments = importance.weighted_moments(found)
    for name in ("w", "b"):
        np.testing.assert_allclose(moments.mean[name], TRUTH.mean[name], atol=0.04)
        np.testing.assert_allclose(moments.precision[name], TRUTH.precision[name], rtol=0.06)


def test_a_belief_that_is_the_posterior_weighs_all_draws_alike():
    found = importance_sample(lambda p: log_density(TRUTH, p), TRUTH, KEY, samples=500)
    np.testing.assert_allclose(found.effective_size, 500, rtol=1e-3)
    assert abs(found.log_evidence) < 1e-4


def test_a_belief_that_is_far_off_is_found_out():
    """A negative control: nearly all of the weight falls on a few draws."""
    off = Posterior({"w": jnp.full(2, -6.0), "b": jnp.array(3.0)}, TRUTH.precision)
    found = importance_sample(lambda p: log_density(TRUTH, p), off, KEY, samples=1000)
    assert found.effective_size < 10


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_draws_do_not_depend_on_how_many_are_weighed_at_a_time(batch_size):
    density = lambda p: log_density(TRUTH, p)  # noqa: E731
    one = importance_sample(density, WIDE, KEY, samples=100)
    other = importance_sample(density, WIDE, KEY, samples=100, batch_size=batch_size)
    np.testing.assert_allclose(one.samples["w"], other.samples["w"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one.log_weights, other.log_weights, atol=1e-5)


@pytest.mark.parametrize("structure", ["diagonal", "kronecker", "full"])
def test_the_exact_posterior_of_linear_regression(structure):
    """Conjugate: the full Laplace fit is the posterior; the others cover it more or less."""
    keys = jax.random.split(KEY, 3)
    x = jax.random.normal(keys[0], (40, 3))
    y = x @ jax.random.normal(keys[1], (3, 1)) + 0.5 * jax.random.normal(keys[2], (40, 1))
    design, noise = np.concatenate([np.asarray(x), np.ones((40, 1))], 1).astype(np.float64), 0.25
    precision = design.T @ design / noise + np.eye(4)
    mean = np.linalg.solve(precision, design.T @ np.asarray(y, np.float64) / noise)
    covariance = noise * np.eye(40) + design @ design.T
    evidence = -0.5 * (
        np.asarray(y)[:, 0] @ np.linalg.solve(covariance, np.asarray(y)[:, 0])
        + np.linalg.slogdet(covariance)[1]
        + 40 * math.log(2 * math.pi)
    )
    weights = jnp.asarray(mean, jnp.float32)
    params = {"dense1": {"kernel": weights[:3], "bias": weights[3]}}
    fit = laplace(
        models.mlp, params, x, y, likelihood="gaussian", noise=noise, structure=structure
    )  # the prior has precision one

    def density(p):
        error = jnp.sum(jnp.square(y - models.mlp(p, x))) / noise
        squares = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(p))
        constant = 40 * math.log(2 * math.pi * noise) + 4 * math.log(2 * math.pi)
        return -0.5 * (error + squares + constant)

    found = importance_sample(density, fit.gaussian, KEY, samples=20_000)
    assert abs(found.log_evidence - evidence) < 0.02
    if structure == "full":
        assert found.effective_size > 19_900
    variance = np.diag(np.linalg.inv(precision))
    moments = importance.weighted_moments(found)
    np.testing.assert_allclose(
        moments.precision["dense1"]["kernel"][:, 0], 1 / variance[:3], rtol=0.06
    )
    np.testing.assert_allclose(moments.mean["dense1"]["bias"], mean[3], atol=0.01)


def test_draws_of_a_half_precision_belief_are_not_rounded():
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), TRUTH.mean)
    found = importance_sample(
        lambda p: log_density(TRUTH, p), Posterior(narrow, TRUTH.precision), KEY, samples=50
    )
    assert found.samples["w"].dtype == jnp.float32


def test_places_of_no_density_weigh_nothing():
    found = importance_sample(
        lambda p: jnp.where(p["b"] > 0, log_density(TRUTH, p), jnp.nan), TRUTH, KEY, samples=200
    )
    assert not jnp.isnan(found.log_weights).any()
    assert (jnp.exp(found.log_weights)[found.samples["b"] <= 0] == 0).all()


def test_resampling_repeats_draws_as_often_as_they_weigh():
    weights = jnp.array([0.1, 0.0, 0.6, 0.3])
    found = Weighted(jnp.arange(4), jnp.log(weights), jnp.array(0.0))
    drawn = importance.resampled(found, KEY, 1000)
    counts = np.bincount(np.asarray(drawn), minlength=4)
    np.testing.assert_allclose(counts, 1000 * weights, atol=1)
    assert counts[1] == 0


def test_it_runs_under_jit_and_vmap():
    density = lambda p: log_density(TRUTH, p)  # noqa: E731
    run = lambda key, t: importance_sample(density, temper(TRUTH, t), key, samples=64).log_evidence  # noqa: E731
    keys, heat = jax.random.split(KEY, 3), jnp.array([1.0, 1.5, 2.0])
    found = jax.jit(jax.vmap(run))(keys, heat)
    np.testing.assert_allclose(
        found, [run(k, t) for k, t in zip(keys, heat, strict=True)], atol=1e-4
    )


class TestSmoothing:
    def test_the_tail_tells_a_good_belief_from_a_bad_one(self):
        pytest.importorskip("blackjax", reason="needs the extra bayes")
        for belief, least, most in ((WIDE, -np.inf, 0.5), (temper(TRUTH, 0.2), 0.7, np.inf)):
            found = importance_sample(lambda p: log_density(TRUTH, p), belief, KEY, samples=5000)
            with jax.numpy_dtype_promotion("standard"):  # of the package
                smooth, k = importance.smoothed(found)
            assert least < k < most
            np.testing.assert_allclose(jnp.exp(smooth.log_weights).sum(), 1.0, rtol=1e-3)

    def test_without_blackjax_the_error_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "blackjax.diagnostics", None)
        found = Weighted(jnp.arange(30.0), jnp.full(30, -math.log(30)), jnp.array(0.0))
        with pytest.raises(ImportError, match=r"adaptivenet\[bayes\]"):
            importance.smoothed(found)


class TestErrors:
    def test_a_proposal_of_another_kind(self):
        with pytest.raises(TypeError, match="Posterior or the gaussian"):
            importance_sample(lambda p: 0.0, {"w": jnp.zeros(2)}, KEY)

    def test_no_samples(self):
        with pytest.raises(ValueError, match="samples must be an integer >= 2"):
            importance_sample(lambda p: log_density(TRUTH, p), TRUTH, KEY, samples=1)

    def test_a_density_of_many_numbers(self):
        with pytest.raises(ValueError, match="one floating number"):
            importance_sample(lambda p: p["w"], TRUTH, KEY)

    def test_a_mean_without_density(self):
        with pytest.raises(ValueError, match="start where it is finite"):
            importance_sample(lambda p: jnp.log(p["b"] - 5.0), TRUTH, KEY)

    def test_a_floor_of_nothing(self):
        found = Weighted(jnp.arange(3.0), jnp.log(jnp.full(3, 1 / 3)), jnp.array(0.0))
        with pytest.raises(ValueError, match="floor must be a variance"):
            importance.weighted_moments(found, floor=0.0)
