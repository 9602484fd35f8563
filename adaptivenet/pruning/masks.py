"""Landing on a mask: the pure functions that make pruned parameters exactly zero."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from adaptivenet import trees

PyTree = Any

__all__ = ["apply_mask", "full_mask", "landing"]


def full_mask(params: PyTree, select: trees.Select = None) -> PyTree:
    """A mask that keeps every synapse.

    Args:
      params: pytree of arrays.
      select: as for :func:`adaptivenet.trees.select_leaves`.

    Returns:
      Pytree of bool, all True; masked nodes for leaves that are not synapses.

    Raises:
      ValueError, TypeError: as :func:`adaptivenet.trees.select_leaves`.

    >>> full_mask({"kernel": jnp.zeros((1, 2)), "bias": jnp.zeros(2)})["kernel"].tolist()
    [[True, True]]
    """
    kept = trees.synapses(params, select)
    # From the leaf itself, so that the mask is sharded as the leaf is.
    return jax.tree.map(lambda leaf: jnp.ones_like(leaf, dtype=bool), kept)


def apply_mask(params: PyTree, mask: PyTree) -> PyTree:
    """Sets pruned synapses to zero by selection (never by multiplication: inf and nan vanish too).

    Args:
      params: pytree of arrays.
      mask: pytree of bool with masked nodes for leaves that are not synapses.

    Returns:
      ``params``, zero wherever the mask is False; other leaves as they are.

    Raises:
      ValueError: the mask belongs to another tree.

    >>> apply_mask({"w": jnp.array([jnp.inf, 2.0])}, {"w": jnp.array([False, True])})["w"].tolist()
    [0.0, 2.0]
    """
    return trees.merge_synapses(lambda keep, p: jnp.where(keep, p, jnp.zeros_like(p)), mask, params)


def landing(updates: PyTree, params: PyTree, mask: PyTree) -> PyTree:
    """Updates after which ``optax.apply_updates`` lands exactly on the mask.

    ``p + (-p)`` is 0 in every float format, so ``where(mask, update, -p)`` needs no second call
    after the step. (Parameters that are inf or nan cannot land; :func:`apply_mask` repairs them.)

    Args:
      updates: pytree of updates.
      params: pytree of parameters.
      mask: pytree of bool with masked nodes for leaves that are not synapses.

    Returns:
      Updates of at least the parameters' precision.

    >>> u = landing({"w": jnp.array([0.1, 0.1])}, {"w": jnp.array([0.3, 0.7])},
    ...             {"w": jnp.array([False, True])})
    >>> (jnp.array([0.3, 0.7]) + u["w"])[0].item()
    0.0
    """

    def land(keep: jax.Array, update: jax.Array, param: jax.Array) -> jax.Array:
        # In fewer bits than the parameter has, -p would be rounded and miss zero.
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.promote_types(update.dtype, param.dtype)
        return jnp.where(keep, update.astype(dtype), -param.astype(dtype))

    return trees.merge_synapses(land, mask, updates, params)
