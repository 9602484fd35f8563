"""Sparse variational dropout: a Gaussian a synapse under a log-uniform prior, which cuts by itself.

Each synapse is ``theta + sigma * noise``. Under the scale-free prior ``p(|w|) ~ 1 / |w|`` the
divergence depends only on ``alpha = sigma^2 / theta^2``, and it falls as alpha grows: noise is
free, so synapses that the data do not need drown in it. Those of large alpha are cut. Both trees
of :class:`SparseVD` are trained by any optimizer on ``loss * examples + kl(state)``::

    state = sparse_vd.init(params)

    def objective(state, key, batch):
        logits = apply(sparse_vd.sample(key, state), batch.x)  # or product(), layer by layer
        return examples * cross_entropy(logits, batch.y).mean() + warmup * sparse_vd.kl(state)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adaptivenet import trees
from adaptivenet.posterior._arrays import wide, wide_dtype
from adaptivenet.posterior.gaussian import Posterior

PyTree = Any

__all__ = ["SparseVD", "init", "kl", "log_alpha", "mask", "product", "sample", "weights"]

# The fit of the divergence by Molchanov et al., equation 14.
_K1, _K2, _K3 = 0.63576, 1.87320, 1.48695


class SparseVD(NamedTuple):
    """Variational parameters, in the additive parametrisation.

    Attributes:
      theta: the means, and every other parameter of the network as it is.
      log_variance: ``log sigma^2`` of each synapse, float32 (float64 where theta is); masked nodes
        for leaves without noise.
    """

    theta: PyTree
    log_variance: PyTree

    def posterior(self, params: PyTree = None) -> Posterior:
        """The belief, ``Posterior(theta, exp(-log_variance))``, masked where there is no noise.

        >>> state = init({"w": jnp.ones((1, 2)), "b": jnp.ones(2)}, log_variance=0.0)
        >>> state.posterior().precision["w"].tolist()
        [[1.0, 1.0]]
        """
        del params
        return Posterior(
            trees.map_synapses(lambda _, m: m, self.log_variance, self.theta),
            jax.tree.map(lambda v: jnp.exp(-v), self.log_variance),
        )


def init(params: PyTree, log_variance: Any = -10.0, select: trees.Select = None) -> SparseVD:
    """Variational parameters around a network.

    Args:
      params: pytree of floating arrays.
      log_variance: initial ``log sigma^2`` of every synapse; small enough that the network still
        learns.
      select: the leaves with noise, as for :func:`adaptivenet.trees.select_leaves`; by default
        those of two or more dimensions.

    Returns:
      The state.

    Raises:
      ValueError, TypeError: nothing, or an integer leaf, is selected.

    References:
      Molchanov et al., "Variational dropout sparsifies deep neural networks", ICML 2017,
      arXiv:1701.05369, section 4.1.

    >>> init({"w": jnp.ones((1, 2)), "b": jnp.ones(2)}).log_variance["w"].tolist()
    [[-10.0, -10.0]]
    """

    def start(leaf: jax.Array) -> jax.Array:
        dtype = wide_dtype(leaf.dtype)
        return jnp.broadcast_to(jnp.asarray(log_variance).astype(dtype), leaf.shape)

    return SparseVD(params, jax.tree.map(start, trees.synapses(params, select)))


def _log_alpha(log_variance: jax.Array, theta: jax.Array) -> jax.Array:
    theta = wide(theta)
    # The floor keeps the logarithm finite at zero; the divergence is flat there already.
    floor = jnp.finfo(theta.dtype).tiny
    return log_variance - jnp.log(jnp.maximum(jnp.square(theta), floor))


def log_alpha(state: SparseVD) -> PyTree:
    """``log(sigma^2 / theta^2)`` of each synapse: minus the log of the squared signal-to-noise.

    A theta of zero counts as the smallest normal number, so that the result is finite.

    Args:
      state: variational parameters.

    Returns:
      Pytree like ``state.log_variance``.

    References:
      Molchanov et al., 2017, section 4.1.

    >>> state = SparseVD({"w": jnp.array([1.0, 10.0])}, {"w": jnp.zeros(2)})
    >>> [round(x, 3) for x in log_alpha(state)["w"].tolist()]
    [0.0, -4.605]
    """
    return trees.map_synapses(_log_alpha, state.log_variance, state.theta)


def kl(state: SparseVD) -> jax.Array:
    """The divergence from the log-uniform prior, summed over all synapses, in nats.

    The prior is improper: the constant is chosen so that the divergence of pure noise is zero. The
    fit is within 0.01 nats of the integral for every alpha.

    Args:
      state: variational parameters.

    Returns:
      A scalar >= 0, float32 (float64 where the state is).

    References:
      Molchanov et al., 2017, equation 14.

    >>> noise = SparseVD({"w": jnp.zeros(3)}, {"w": jnp.zeros(3)})
    >>> kl(noise).item()
    0.0
    """

    def leaf(log_variance: jax.Array, theta: jax.Array) -> jax.Array:
        x = _log_alpha(log_variance, theta)
        return jnp.sum(_K1 * jax.nn.sigmoid(-_K2 - _K3 * x) + 0.5 * jax.nn.softplus(-x))

    parts = jax.tree.leaves(trees.map_synapses(leaf, state.log_variance, state.theta))
    return functools.reduce(jnp.add, parts) if parts else jnp.zeros((), jnp.float32)


def sample(key: jax.Array, state: SparseVD) -> PyTree:
    """Draws a network.

    One draw serves a whole batch, so that its gradient is noisy; :func:`product` draws for each
    example.

    Args:
      key: random key.
      state: variational parameters.

    Returns:
      Pytree like ``state.theta``, of its dtypes; leaves without noise as they are.

    >>> state = init({"w": jnp.ones((1, 2))}, log_variance=-jnp.inf)
    >>> sample(jax.random.key(0), state)["w"].tolist()
    [[1.0, 1.0]]
    """
    places = iter(range(len(jax.tree.leaves(state.log_variance))))

    def leaf(log_variance: jax.Array, theta: jax.Array) -> jax.Array:
        own = jax.random.fold_in(key, next(places))
        noise = jax.random.normal(own, theta.shape, log_variance.dtype)
        return (wide(theta) + jnp.exp(0.5 * log_variance) * noise).astype(theta.dtype)

    return trees.merge_synapses(leaf, state.log_variance, state.theta)


def product(
    key: jax.Array,
    x: jax.Array,
    theta: jax.Array,
    log_variance: jax.Array,
    multiply: Callable[[jax.Array, jax.Array], jax.Array] = jnp.matmul,
) -> jax.Array:
    """A layer's linear map with noisy weights, by local reparametrisation.

    A sum of independent Gaussians is Gaussian, so the output is drawn instead of the weights:
    anew for each example, which lowers the variance of the gradient. Where weights are shared (a
    convolution's positions) the draws are independent by position, as in the paper.

    Args:
      key: random key.
      x: inputs, ``[..., inputs]`` for a dense layer.
      theta: means of the weights, ``[inputs, outputs]`` for a dense layer.
      log_variance: ``log sigma^2`` of the weights, of the same shape.
      multiply: the linear map of inputs and weights, such as a convolution.

    Returns:
      Outputs, of the shape and dtype of ``multiply(x, theta)``.

    Raises:
      ValueError: the two trees' leaves differ in shape.

    References:
      Kingma et al., "Variational dropout and the local reparameterization trick", NeurIPS 2015,
      section 2.3; Molchanov et al., 2017, equation 17.

    >>> x, theta = jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [4.0]])
    >>> product(jax.random.key(0), x, theta, jnp.full((2, 1), -jnp.inf)).tolist()
    [[11.0]]
    """
    if jnp.shape(theta) != jnp.shape(log_variance):
        raise ValueError(
            f"theta has shape {jnp.shape(theta)} and log_variance {jnp.shape(log_variance)}: give "
            "the two leaves of the same layer."
        )
    mean = multiply(x, theta)
    variance = multiply(jnp.square(x), jnp.exp(log_variance).astype(theta.dtype))
    # The root has no slope at zero, which inputs that are all zero would reach.
    noisy = variance > 0
    deviation = jnp.where(noisy, jnp.sqrt(jnp.where(noisy, variance, 1)), 0)
    return mean + deviation * jax.random.normal(key, mean.shape, mean.dtype)


def mask(state: SparseVD, threshold: Any = 3.0) -> PyTree:
    """Keeps the synapses whose ``log alpha`` is below a threshold.

    Args:
      state: variational parameters.
      threshold: on ``log alpha``; 3 is a binary dropout rate of 0.95.

    Returns:
      Pytree of bool like ``state.log_variance``.

    References:
      Molchanov et al., 2017, section 5.

    >>> mask(SparseVD({"w": jnp.array([1.0, 0.1])}, {"w": jnp.zeros(2)}))["w"].tolist()
    [True, False]
    """
    return jax.tree.map(lambda x: x < jnp.asarray(threshold).astype(x.dtype), log_alpha(state))


def weights(state: SparseVD, threshold: Any = 3.0) -> PyTree:
    """The network for testing: the means, exactly zero where :func:`mask` cuts.

    Args:
      state: variational parameters.
      threshold: on ``log alpha``.

    Returns:
      Pytree like ``state.theta``.

    >>> weights(SparseVD({"w": jnp.array([1.0, 0.1])}, {"w": jnp.zeros(2)}))["w"].tolist()
    [1.0, 0.0]
    """
    return trees.merge_synapses(
        lambda keep, theta: jnp.where(keep, theta, jnp.zeros_like(theta)),
        mask(state, threshold),
        state.theta,
    )
