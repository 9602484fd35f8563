"""What of a network still works: dormant units and ranks of features (see ``metrics``)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet import trees
from adaptivenet.posterior._arrays import known, wide

PyTree = Any


def dormant_score(activations: PyTree) -> PyTree:
    """The mean absolute activation of each unit over the mean of its layer.

    Args:
      activations: pytree with an array [..., units] a layer; all but the last axis are averaged
        (examples, positions).

    Returns:
      Pytree of [units], of mean 1; zeros for a layer that is silent.

    Raises:
      ValueError: a layer has no axis of units, or no examples.

    References:
      Sokar et al., "The dormant neuron phenomenon in deep reinforcement learning", ICML 2023,
      arXiv:2302.12902, definition 3.1.

    >>> dormant_score(jnp.array([[1.0, -3.0], [1.0, 3.0]])).tolist()
    [0.5, 1.5]
    """

    def score(name: str, leaf: Any) -> jax.Array:
        values = jnp.abs(wide(leaf))
        if values.ndim < 2 or values.size == 0:
            raise ValueError(
                f"activations of {name or 'the layer'} have shape {values.shape}; give "
                "[..., units] with at least one example."
            )
        each = jnp.mean(values, axis=tuple(range(values.ndim - 1)))
        mean = jnp.mean(each)
        return jnp.where(mean > 0, each / jnp.where(mean > 0, mean, jnp.ones_like(mean)), 0.0)

    leaves, treedef = jax.tree.flatten(activations)
    pairs = zip(trees.paths(activations), leaves, strict=True)
    return treedef.unflatten([score(name, leaf) for name, leaf in pairs])


def dormant_fraction(activations: PyTree, tau: Any = 0.025) -> jax.Array:
    """The share of units of all layers that are tau-dormant: whose score is at most tau.

    Args:
      activations: as for :func:`dormant_score`.
      tau: threshold >= 0, possibly traced; 0 counts units that never respond.

    Returns:
      float32 scalar in [0, 1].

    Raises:
      ValueError: as :func:`dormant_score`, there is no layer, or tau is below 0.

    References:
      Sokar et al., ICML 2023, definition 3.1 and the dormant ratio of a network.

    >>> dormant_fraction([jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 1.0]])]).item()
    0.25
    """
    if known(tau) and not np.all(np.asarray(tau) >= 0):
        raise ValueError(f"tau must be at least 0, not {tau}.")
    scores = jax.tree.leaves(dormant_score(activations))
    if not scores:
        raise ValueError("activations= holds no array: give one [..., units] for each layer.")
    limit = jnp.asarray(tau)
    asleep = [jnp.sum(s <= limit.astype(s.dtype), dtype=jnp.int32) for s in scores]
    return sum(asleep[1:], asleep[0]).astype(jnp.float32) / sum(s.size for s in scores)


def effective_rank(features: Any) -> jax.Array:
    """The exponential of the entropy of the normalised singular values.

    Args:
      features: [examples, units] (further leading axes are examples, too), as they are: subtract
        the mean beforehand if it should not count.

    Returns:
      Scalar between 1 and min(examples, units); 0 where all features are zero.

    Raises:
      ValueError: there are fewer than two axes.

    References:
      Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.

    >>> round(effective_rank(jnp.eye(3)).item(), 4)
    3.0
    """
    share, total = _spectrum(features)
    logs = jnp.log(jnp.where(share > 0, share, jnp.ones_like(share)))
    return jnp.where(total > 0, jnp.exp(-jnp.sum(share * logs)), 0.0)


def srank(features: Any, delta: Any = 0.01) -> jax.Array:
    """The number of largest singular values that make up a share ``1 - delta`` of their sum.

    Args:
      features: as for :func:`effective_rank`.
      delta: share that may be missing, in [0, 1), possibly traced.

    Returns:
      int32 scalar; 0 where all features are zero.

    Raises:
      ValueError: there are fewer than two axes, or delta is outside [0, 1).

    References:
      Kumar et al., "Implicit under-parameterization inhibits data-efficient deep reinforcement
      learning", ICLR 2021, arXiv:2010.14498.

    >>> srank(jnp.diag(jnp.array([6.0, 3.0, 1.0])), delta=0.2).item()
    2
    """
    if known(delta) and not np.all((np.asarray(delta) >= 0) & (np.asarray(delta) < 1)):
        raise ValueError(f"delta must be in [0, 1), not {delta}.")
    share, total = _spectrum(features)
    short = jnp.cumsum(share) < 1.0 - jnp.asarray(delta).astype(share.dtype)
    number = jnp.minimum(jnp.sum(short, dtype=jnp.int32) + 1, share.shape[0])
    # Rounding must not let singular values of zero in.
    number = jnp.minimum(number, jnp.sum(share > 0, dtype=jnp.int32))
    return jnp.where(total > 0, number, jnp.zeros_like(number))


def _spectrum(features: Any) -> tuple[jax.Array, jax.Array]:
    """Singular values, largest first, as shares of their sum; and the sum."""
    array = wide(features)
    if array.ndim < 2 or array.size == 0:
        raise ValueError(f"features must have shape [examples, units], not {array.shape}.")
    values = jnp.linalg.svd(array.reshape(-1, array.shape[-1]), compute_uv=False)
    total = jnp.sum(values)
    return values / jnp.where(total > 0, total, jnp.ones_like(total)), total
