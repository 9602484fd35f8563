"""Parameters and precisions that the tests of releasing, owning and lifelong learning share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def tree(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        "a": jnp.asarray(rng.normal(size=(4, 5)), dtype),
        "bias": jnp.asarray(rng.normal(size=5), dtype),
        "c": jnp.asarray(rng.normal(size=(3, 2)), dtype),
    }


def precise(params, seed=1, low=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(low + rng.gamma(1.0, 5.0, size=p.shape), jnp.float32), params
    )
