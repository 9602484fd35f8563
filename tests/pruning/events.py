"""Single events on drawn weights: what the tests of structures and allocations share."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet import pruning

ELEMENT, GLOBAL = pruning.Element(), pruning.Global()


@functools.partial(jax.jit, static_argnames=("structure", "allocation", "dtype", "may_grow"))
def cut(params, mask, demand, structure=ELEMENT, allocation=GLOBAL, dtype=None, may_grow=False):
    """An event by magnitude that wakes nothing of itself; dead weights are made zero before."""
    living = jax.tree.map(lambda p, m: jnp.where(m, p, jnp.zeros_like(p)), params, mask)
    return pruning.cut_and_wake(
        living if dtype is None else jax.tree.map(lambda p: p.astype(dtype), living),
        mask,
        demand,
        score=pruning.magnitude,
        structure=structure,
        allocation=allocation,
        regrow=None,
        may_grow=may_grow,
        key=jax.random.key(0),
        signals={},
    )


def draw(seed, **shapes):
    """Weights, rounded so that there are ties."""
    rng = np.random.default_rng(seed)
    return {n: rng.normal(size=s).round(1).astype(np.float32) for n, s in shapes.items()}


def ones(params):
    """A mask under which all live."""
    return jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)


def sainte_lague(weights, number, most):
    """Units one by one to the largest quotient."""
    has = [0] * len(weights)
    for _ in range(min(number, sum(most))):
        quotients = [
            w / (2 * h + 1) if h < m else -1.0 for w, h, m in zip(weights, has, most, strict=True)
        ]
        has[quotients.index(max(quotients))] += 1
    return has
