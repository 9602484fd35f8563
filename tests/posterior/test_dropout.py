"""MC-dropout gives the moments of the predictions over masks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivenet.models.mlp import mlp
from adaptivenet.posterior.dropout import mc_dropout

RNG = np.random.default_rng(0)
PARAMS = {
    "dense1": {"kernel": jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)},
    "dense2": {"kernel": jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32)},
}
INPUTS = jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32)
KEY = jax.random.key(7)


def test_against_a_loop():
    got = mc_dropout(mlp, PARAMS, INPUTS, KEY, dropout=0.3, samples=6)
    rows = [mlp(PARAMS, INPUTS, key=key, dropout=0.3) for key in jax.random.split(KEY, 6)]
    rows = np.asarray(rows, np.float64)
    np.testing.assert_allclose(got.mean, rows.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.variance, rows.var(0, ddof=1), rtol=1e-5, atol=1e-6)
    assert got.variance.max() > 0.01


def test_moments_that_are_known():
    """A sum of w x m / (1 - p) over Bernoulli masks has the variance sum (w x)^2 p / (1 - p)."""
    weights = jnp.array([1.0, -2.0, 3.0])

    def apply(params, inputs, *, key, dropout):
        kept = jax.random.bernoulli(key, 1 - dropout, inputs.shape)
        return {"sum": jnp.sum(params * jnp.where(kept, inputs / (1 - dropout), 0.0), -1)}

    got = mc_dropout(apply, weights, jnp.ones((50, 3)), KEY, dropout=0.25, samples=400)
    np.testing.assert_allclose(got.mean["sum"].mean(), 2.0, atol=0.05)
    np.testing.assert_allclose(got.variance["sum"].mean(), 14 * 0.25 / 0.75, rtol=0.05)


def test_a_population_over_rates():
    rates = jnp.array([0.0, 0.5])
    got = jax.vmap(lambda rate: mc_dropout(mlp, PARAMS, INPUTS, KEY, dropout=rate, samples=4))(
        rates
    )
    np.testing.assert_array_equal(got.variance[0], 0.0)
    np.testing.assert_allclose(got.mean[0], mlp(PARAMS, INPUTS), rtol=1e-5)
    alone = mc_dropout(mlp, PARAMS, INPUTS, KEY, dropout=0.5, samples=4)
    np.testing.assert_allclose(got.variance[1], alone.variance, rtol=1e-4)


def test_half_precision_is_averaged_in_float32():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    got = mc_dropout(mlp, half, INPUTS.astype(jnp.bfloat16), KEY, dropout=0.5, samples=3)
    assert got.mean.dtype == got.variance.dtype == jnp.float32


def test_errors():
    with pytest.raises(ValueError, match="samples must be at least 2"):
        mc_dropout(mlp, PARAMS, INPUTS, KEY, dropout=0.5, samples=1)
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"dropout must be a rate in \[0, 1\)"):
            mc_dropout(mlp, PARAMS, INPUTS, KEY, dropout=rate)
