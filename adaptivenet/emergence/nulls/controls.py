"""Controls of forgetting: all weights shrink alike (L2), or by the same amount (L1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet import trees
from adaptivenet.pruning.schedules import known

PyTree = Any

__all__ = ["matched_decay", "scale", "soft_threshold", "soft_thresholded", "uniform_decay"]


def uniform_decay(
    rate: Any, *, select: trees.Select = None
) -> optax.GradientTransformationExtraArgs:
    """Decoupled L2 decay at the end of a chain: after each step synapses shrink by one factor.

    The null model of a rule that lets the weak forget: here all forget alike.

    Args:
      rate: share lost in each update, in [0, 1), possibly traced.
      select: which leaves hold synapses; see :func:`adaptivenet.trees.select_leaves`.

    Returns:
      A transformation after which ``optax.apply_updates`` yields ``(params + update) * (1 - rate)``
      on synapses (up to rounding; what would be zero still is). It may follow ``prune``.

    Raises:
      ValueError: the rate is out of range; at ``update``, no parameters.

    References:
      Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019.

    >>> tx, params = uniform_decay(0.5), {"w": jnp.array([[4.0]])}
    >>> updates, _ = tx.update({"w": jnp.array([[2.0]])}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["w"].item()
    3.0
    """
    _check(rate, "rate of uniform_decay()", below=1.0)

    def shrink(update: jax.Array, param: jax.Array) -> jax.Array:
        return update - _like(rate, update) * (param + update)

    return _after_the_step("uniform_decay", shrink, select)


def soft_threshold(
    rate: Any, *, select: trees.Select = None
) -> optax.GradientTransformationExtraArgs:
    """The proximal step of an L1 penalty at the end of a chain; it lands on exact zeros.

    Args:
      rate: what every magnitude loses in each update (the step size times the penalty), >= 0,
        possibly traced.
      select: which leaves hold synapses; see :func:`adaptivenet.trees.select_leaves`.

    Returns:
      A transformation after which ``optax.apply_updates`` yields the soft threshold of
      ``params + update`` on synapses: exactly zero up to the rate, up to rounding elsewhere.

    Raises:
      ValueError: the rate is out of range; at ``update``, no parameters.

    References:
      Daubechies, Defrise and De Mol, "An iterative thresholding algorithm for linear inverse
      problems with a sparsity constraint", Communications on Pure and Applied Mathematics 57
      (2004).

    >>> tx, params = soft_threshold(0.5), {"w": jnp.array([[4.0, 0.25]])}
    >>> updates, _ = tx.update({"w": jnp.zeros((1, 2))}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["w"].tolist()
    [[3.5, 0.0]]
    """
    _check(rate, "rate of soft_threshold()")

    def shrink(update: jax.Array, param: jax.Array) -> jax.Array:
        limit = _like(rate, update)
        reached = param + update
        # p + (-p) is zero in every format; p + (0 - p) need not survive another rounding.
        return jnp.where(
            jnp.abs(reached) <= limit, -param, update - jnp.clip(reached, -limit, limit)
        )

    return _after_the_step("soft_threshold", shrink, select)


def scale(params: PyTree, factor: Any, *, select: trees.Select = None) -> PyTree:
    """Multiplies all synapses by one factor: :func:`uniform_decay` as a map, between chunks.

    Args:
      params: pytree of arrays.
      factor: scalar, possibly traced.
      select: which leaves hold synapses.

    Returns:
      The parameters; other leaves as they are.

    >>> scale({"w": jnp.array([[4.0]]), "b": jnp.array([4.0])}, 0.5)["w"].item()
    2.0
    """
    return _map_chosen(lambda p: p * _like(factor, p), select, params)


def soft_thresholded(params: PyTree, rate: Any, *, select: trees.Select = None) -> PyTree:
    """The soft threshold of all synapses: :func:`soft_threshold` as a map, between chunks.

    Args:
      params: pytree of arrays.
      rate: what every magnitude loses, >= 0, possibly traced.
      select: which leaves hold synapses.

    Returns:
      ``sign(p) max(|p| - rate, 0)``; other leaves as they are.

    Raises:
      ValueError: the rate is out of range.

    >>> soft_thresholded({"w": jnp.array([[4.0, -0.25]])}, 0.5)["w"].tolist()
    [[3.5, 0.0]]
    """
    _check(rate, "rate of soft_thresholded()")

    def shrink(param: jax.Array) -> jax.Array:
        return param - jnp.clip(param, -_like(rate, param), _like(rate, param))

    return _map_chosen(shrink, select, params)


def matched_decay(params: PyTree, other: PyTree, *, select: trees.Select = None) -> jax.Array:
    """The factor by which ``params`` must be scaled to have the L2 norm of another tree.

    The control of a rule that weakens some synapses: ``scale(params, matched_decay(params,
    rule(params)))`` loses as much norm, spread over all.

    Args:
      params: pytree of arrays.
      other: pytree of the same structure.
      select: which leaves hold synapses; others do not count.

    Returns:
      float32 scalar; 1 where the synapses of ``params`` are all zero.

    >>> matched_decay({"w": jnp.array([[3.0, 4.0]])}, {"w": jnp.array([[0.0, 4.0]])}).item()
    0.800000011920929
    """
    chosen = trees.select_leaves(params, select)
    norms = []
    for tree in (params, other):
        pairs = jax.tree.leaves(jax.tree.map(lambda c, p: (p if c else None,), chosen, tree))
        norms.append(jnp.sqrt(sum(jnp.sum(jnp.square(p.astype(jnp.float32))) for p in pairs)))
    whole = norms[0] > 0
    return jnp.where(whole, norms[1] / jnp.where(whole, norms[0], 1.0), 1.0)


def _map_chosen(function: Callable[..., jax.Array], select: trees.Select, params: PyTree) -> PyTree:
    chosen = trees.select_leaves(params, select)
    return jax.tree.map(lambda c, p: function(p) if c else p, chosen, params)


def _after_the_step(
    name: str, shrink: Callable[[jax.Array, jax.Array], jax.Array], select: trees.Select
) -> optax.GradientTransformationExtraArgs:
    def init(params: PyTree) -> optax.EmptyState:
        trees.select_leaves(params, select)
        return optax.EmptyState()

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **signals: Any
    ) -> tuple[PyTree, Any]:
        del signals
        if params is None:
            raise ValueError(
                f"{name}() needs the parameters: call tx.update(grads, opt_state, params)."
            )

        def act(chosen: bool, update: jax.Array, param: jax.Array) -> jax.Array:
            if not chosen:
                return update
            # In fewer bits than the parameter has, -p would be rounded and miss zero.
            with jax.numpy_dtype_promotion("standard"):
                dtype = jnp.promote_types(update.dtype, param.dtype)
            return shrink(update.astype(dtype), param.astype(dtype))

        return jax.tree.map(act, trees.select_leaves(params, select), updates, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def _like(value: Any, array: jax.Array) -> jax.Array:
    return jnp.asarray(value).astype(array.dtype)


def _check(rate: Any, name: str, below: float = math.inf) -> None:
    if known(rate):
        value = np.asarray(rate, np.float64)
        if not (np.all(np.isfinite(value)) and np.all(value >= 0) and np.all(value < below)):
            limit = f"in [0, {below:g})" if below < math.inf else "finite and >= 0"
            raise ValueError(f"{name} must be {limit}, not {rate}.")
