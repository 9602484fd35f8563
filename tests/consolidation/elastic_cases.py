"""Parameters, beliefs and comparisons that the tests of elastic rules share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet.posterior import Posterior

PARAMS = {"kernel": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2), "bias": jnp.ones(2)}


def like(params, seed, low=0.0, high=2.0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.uniform(low, high, p.shape), dtype), params)


def believed(seed):
    precision = like(PARAMS, seed)
    precision["kernel"] = precision["kernel"].at[0, 0].set(0.0)
    return Posterior(like(PARAMS, seed + 100, -1.0, 1.0), precision)


def gradient(tx, state, params):
    nothing = jax.tree.map(jnp.zeros_like, params)
    return tx.update(nothing, state, params)[0]


def close(got, expected, **options):
    options = {"rtol": 2e-5, "atol": 1e-5} | options
    for name in got:
        np.testing.assert_allclose(got[name], expected[name], **options)
