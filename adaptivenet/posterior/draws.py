"""Draws from the belief that an optimizer state holds, and gradients taken at them.

They serve every transformation whose state has ``posterior(params)``, ``noise(key)`` and ``key``,
such as :func:`adaptivenet.posterior.ivon` and :func:`adaptivenet.posterior.mesu`. The state is
found by its methods, wherever it lies in an optimizer state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adaptivenet import trees
from adaptivenet.posterior._arrays import wide_dtype

PyTree = Any

__all__ = ["noisy_value_and_grad", "sample_parameters"]


def sample_parameters(
    opt_state: PyTree, params: PyTree, key: jax.Array | None = None
) -> tuple[PyTree, PyTree]:
    """Draws parameters from the belief that an optimizer state holds.

    Args:
      opt_state: state with one IVON or MESU in it or several (of ``optax.partition``), at any
        depth. That of an ``nnx.Optimizer`` is given as ``nnx.as_pure(optimizer.opt_state)``, beside
        ``nnx.state(model, nnx.Param)``.
      params: the parameters, which are the mean.
      key: random key; by default the one that the state holds, which every update renews.

    Returns:
      ``(noisy, noise)``: the parameters drawn, of the dtypes of ``params``; and what was added, in
      float32, with masked nodes for leaves that no state covers.

    Raises:
      ValueError: the state holds no such transformation, or is of other parameters.

    >>> from adaptivenet.posterior import ivon
    >>> params = {"w": jnp.zeros(2)}
    >>> noisy, noise = sample_parameters(ivon(0.1, ess=1e6).init(params), params)
    >>> bool(jnp.all(noisy["w"] == noise["w"])), bool(jnp.all(jnp.abs(noise["w"]) < 0.01))
    (True, True)
    """
    states = _drawing(opt_state)
    key = _own_key(states) if key is None else key
    noisy, noise = params, jax.tree.map(lambda _: optax.MaskedNode(), params)
    for place, state in enumerate(states):
        drawn = state.noise(jax.random.fold_in(key, place))
        noisy = trees.merge_synapses(_plus, drawn, noisy)
        noise = trees.merge_synapses(lambda n, _: n, drawn, noise)
    return noisy, noise


def noisy_value_and_grad(
    loss: Callable[..., Any],
    opt_state: PyTree,
    params: PyTree,
    *args: Any,
    samples: int = 1,
    has_aux: bool = False,
    key: jax.Array | None = None,
) -> tuple[Any, PyTree, dict[str, PyTree]]:
    """Value and gradient of a loss at parameters drawn from the belief.

    Args:
      loss: ``loss(params, *args)``, a scalar; with ``has_aux`` a pair of it and anything.
      opt_state: as for :func:`sample_parameters`.
      params: pytree of floating arrays.
      *args: passed on to the loss.
      samples: number of draws, one after the other, that are averaged over.
      has_aux: whether the loss returns a pair.
      key: random key; by default the one that the state holds.

    Returns:
      ``(value, grads, extra)``: the mean value (with ``has_aux`` ``(value, aux)``, the latter
      stacked over draws), the mean gradient, and what ``tx.update(grads, opt_state, params,
      **extra)`` has to be told.

    Raises:
      ValueError: fewer than one sample; else as :func:`sample_parameters`.

    References:
      Shen et al., arXiv:2402.17641, algorithm 1, lines 2 and 3.

    >>> from adaptivenet.posterior import ivon
    >>> params = {"w": jnp.array([3.0])}
    >>> state = ivon(0.1, ess=1e12).init(params)
    >>> value, grads, _ = noisy_value_and_grad(lambda p: jnp.sum(p["w"] ** 2), state, params)
    >>> round(value.item(), 3), round(grads["w"].item(), 3)
    (9.0, 6.0)
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}.")
    slope = jax.value_and_grad(loss, has_aux=has_aux)
    key = _own_key(_drawing(opt_state)) if key is None else key

    def one(now: jax.Array) -> tuple[Any, PyTree, PyTree]:
        noisy, noise = sample_parameters(opt_state, params, now)
        value, grads = slope(noisy, *args)
        products = trees.map_synapses(lambda n, g: n * _array(g).astype(n.dtype), noise, grads)
        return value, grads, products

    if samples == 1:
        value, grads, products = one(key)
        value = (value[0], jax.tree.map(lambda leaf: leaf[None], value[1])) if has_aux else value
        return value, grads, {"noise_grads": products}

    def add(sums: Any, now: jax.Array) -> tuple[Any, Any]:
        value, grads, products = one(now)
        sharp = jax.tree.map(lambda g: g.astype(wide_dtype(g.dtype)), grads)
        return jax.tree.map(jnp.add, sums, (sharp, products)), value

    keys = jax.random.split(key, samples)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, wide_dtype(s.dtype)), jax.eval_shape(one, keys[0])[1:]
    )
    sums, values = jax.lax.scan(add, zeros, keys)
    grads, products = jax.tree.map(lambda total: total / samples, sums)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
    value = (jnp.mean(values[0]), values[1]) if has_aux else jnp.mean(values)
    return value, grads, {"noise_grads": products}


def _plus(noise: jax.Array, node: Any) -> Any:
    """A leaf and noise; the leaf may be an NNX variable, which it remains."""
    return jax.tree.map(lambda p: (p.astype(noise.dtype) + noise).astype(p.dtype), node)


def _array(node: Any) -> Any:
    """The array of a leaf, which may be an NNX variable."""
    return jax.tree.leaves(node)[0]


def _draws(node: Any) -> bool:
    return all(callable(getattr(node, part, None)) for part in ("posterior", "noise"))


def _drawing(opt_state: PyTree) -> Sequence[Any]:
    states = [node for node in jax.tree.leaves(opt_state, is_leaf=_draws) if _draws(node)]
    if not states:
        raise ValueError(
            "this optimizer state holds no belief to draw from: put an.posterior.ivon(...) or "
            "an.posterior.mesu(...) into the chain."
        )
    return states


def _own_key(states: Sequence[Any]) -> jax.Array:
    return jax.random.split(jax.random.wrap_key_data(states[0].key))[1]
