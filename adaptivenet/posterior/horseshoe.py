"""Bayesian compression: a horseshoe over units, which removes units and says how many bits stay.

A weight is ``w = z v``: a scale ``z`` that all synapses of a unit share, and a weight ``v`` of its
own. The scale is half-Cauchy, heavy at zero and in the tail, times a half-Cauchy scale of the whole
leaf. The square of a half-Cauchy number is a gamma times an inverse gamma number, against which the
divergence of a log-normal belief is closed::

    w = v sqrt(s_a s_b alpha beta)      v ~ N(0, 1)
    s_a ~ Gamma(1/2, scale^2)     s_b ~ InverseGamma(1/2, 1)     one a leaf
    alpha ~ Gamma(1/2, 1)         beta ~ InverseGamma(1/2, 1)    one a unit

Products of log-normal numbers are log-normal, so ``z``, its mode and the marginal mean and variance
of each weight are closed too. All trees of :class:`Horseshoe` are trained by any optimizer on
``loss * examples + kl(state)``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet import trees
from adaptivenet.posterior import sparse_vd
from adaptivenet.posterior._arrays import Axes, unit_shape, wide, wide_dtype
from adaptivenet.posterior.gaussian import Posterior

PyTree = Any

__all__ = [
    "Horseshoe",
    "LogNormal",
    "bit_widths",
    "init",
    "kl",
    "kl_gamma",
    "kl_inverse_gamma",
    "log_modes",
    "mask",
    "product",
    "sample",
    "scales",
    "weights",
]


class LogNormal(NamedTuple):
    """Independent log-normal numbers: the exponentials of Gaussian ones.

    Attributes:
      mean: means of the logarithms.
      log_variance: logarithms of the variances of the logarithms.
    """

    mean: jax.Array
    log_variance: jax.Array


class Scales(NamedTuple):
    """The four factors of a leaf's squared scales.

    Attributes:
      s_a: gamma factor of the leaf, of shape (1, ..., 1).
      s_b: inverse gamma factor of the leaf, of the same shape.
      alpha: gamma factor of each unit; the axes of units are whole, the others 1.
      beta: inverse gamma factor of each unit.
    """

    s_a: LogNormal
    s_b: LogNormal
    alpha: LogNormal
    beta: LogNormal


class Horseshoe(NamedTuple):
    """Variational parameters of a group horseshoe.

    Attributes:
      mean: means of ``v``, and every other parameter of the network as it is.
      log_variance: log variances of ``v``; masked nodes for leaves without a belief.
      scales: a :class:`Scales` for each leaf with a belief; masked nodes elsewhere.
    """

    mean: PyTree
    log_variance: PyTree
    scales: PyTree

    def posterior(self, params: PyTree = None) -> Posterior:
        """The means and precisions of the weights with the scales integrated out.

        With ``z`` log-normal: ``E w = E v E z`` and ``V w = V v E z^2 + (E v)^2 V z``. (The
        marginal itself is not Gaussian; these are its first two moments.)

        References:
          Louizos et al., 2017, section 4.2, the marginal of the non-centred horseshoe.

        >>> state = init({"w": jnp.ones((2, 3))})
        >>> state.posterior().mean["w"].shape
        (2, 3)
        """
        del params
        moments = trees.map_synapses(_moments, self.log_variance, self.mean, self.scales)
        return Posterior(
            trees.map_synapses(lambda _, pair: pair[0], self.log_variance, moments),
            trees.map_synapses(lambda _, pair: 1 / pair[1], self.log_variance, moments),
        )


def _log_scale(factors: Scales) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of ``log z``: half the sum of four independent logarithms."""
    mean = 0.5 * sum((f.mean for f in factors[1:]), start=factors[0].mean)
    variances = [jnp.exp(f.log_variance) for f in factors]
    return mean, 0.25 * sum(variances[1:], start=variances[0])


def _moments(
    log_variance: jax.Array, mean: jax.Array, factors: Scales
) -> tuple[jax.Array, jax.Array]:
    m, v = _log_scale(factors)
    mean = wide(mean)
    second = jnp.exp(2 * m + 2 * v)
    spread = second * -jnp.expm1(-v)  # E z^2 - (E z)^2
    return mean * jnp.exp(m + 0.5 * v), jnp.exp(log_variance) * second + jnp.square(mean) * spread


def init(
    params: PyTree,
    axis: Axes = -2,
    select: trees.Select = None,
    *,
    log_variance: Any = -9.0,
) -> Horseshoe:
    """Variational parameters whose marginal mean is the network given.

    Args:
      params: pytree of floating arrays.
      axis: the axis (or axes) of a leaf along which its units lie: -2 takes the inputs of a dense
        kernel ``[inputs, outputs]`` or the input channels of a convolution, -1 the outputs.
      select: the leaves with a belief, as for :func:`adaptivenet.trees.select_leaves`; by default
        those of two or more dimensions.
      log_variance: initial log variance of ``v`` and of the logarithms of all scales.

    Returns:
      The state; scales have a mean of about 1.

    Raises:
      ValueError: a selected leaf has no such axis.

    References:
      Louizos et al., "Bayesian compression for deep learning", NeurIPS 2017, arXiv:1705.08665,
      section 4.2.

    >>> state = init({"w": jnp.ones((4, 3))})
    >>> state.scales["w"].alpha.mean.shape, state.scales["w"].s_a.mean.shape
    ((4, 1), (1, 1))
    """
    chosen = trees.synapses(params, select)
    names = iter(trees.paths(chosen))

    def factors(leaf: jax.Array) -> Scales:
        units = unit_shape(leaf.shape, axis, next(names))
        dtype = wide(leaf).dtype
        spread = jnp.asarray(log_variance).astype(dtype)

        def start(shape: tuple[int, ...]) -> LogNormal:
            return LogNormal(jnp.zeros(shape, dtype), jnp.broadcast_to(spread, shape))

        one = (1,) * leaf.ndim
        return Scales(start(one), start(one), start(units), start(units))

    scales_of = jax.tree.map(factors, chosen)

    def unscaled(leaf: jax.Array, factor: Scales) -> jax.Array:
        m, v = _log_scale(factor)
        return (wide(leaf) / jnp.exp(m + 0.5 * v)).astype(leaf.dtype)

    def spread(leaf: jax.Array) -> jax.Array:
        dtype = wide_dtype(leaf.dtype)
        return jnp.broadcast_to(jnp.asarray(log_variance).astype(dtype), leaf.shape)

    return Horseshoe(
        trees.merge_synapses(lambda leaf, _, f: unscaled(leaf, f), chosen, params, scales_of),
        jax.tree.map(spread, chosen),
        scales_of,
    )


def kl_gamma(q: LogNormal, shape: Any, scale: Any) -> jax.Array:
    """``KL(LogNormal || Gamma(shape, scale))`` of each number, in nats.

    Args:
      q: log-normal numbers.
      shape: shape of the gamma density ``x^(shape - 1) exp(-x / scale)``, > 0.
      scale: its scale, > 0.

    Returns:
      Array like ``q.mean``.

    References:
      Louizos et al., 2017, section 4.2 (closed by ``E x^p = exp(p m + p^2 v / 2)``).

    >>> round(kl_gamma(LogNormal(jnp.zeros(()), jnp.zeros(())), 1.0, 1.0).item(), 4)
    0.2298
    """
    k, c = (jnp.asarray(number).astype(q.mean.dtype) for number in (shape, scale))
    variance = jnp.exp(q.log_variance)
    # x / scale as one exponential: the scale of a sparse prior is tiny.
    ratio = jnp.exp(q.mean + 0.5 * variance - jnp.log(c))
    return (
        jax.lax.lgamma(k) + k * (jnp.log(c) - q.mean) + ratio - 0.5 * q.log_variance - _HALF_2_PI_E
    )


def kl_inverse_gamma(q: LogNormal, shape: Any, scale: Any) -> jax.Array:
    """``KL(LogNormal || InverseGamma(shape, scale))`` of each number, in nats.

    Args:
      q: log-normal numbers.
      shape: shape of the density ``x^(-shape - 1) exp(-scale / x)``, > 0.
      scale: its scale, > 0.

    Returns:
      Array like ``q.mean``.

    References:
      Louizos et al., 2017, section 4.2.

    >>> round(kl_inverse_gamma(LogNormal(jnp.zeros(()), jnp.zeros(())), 1.0, 1.0).item(), 4)
    0.2298
    """
    # The inverse of x is log-normal and has a gamma prior; divergences do not see the change.
    inverse = 1 / jnp.asarray(scale).astype(q.mean.dtype)
    return kl_gamma(LogNormal(-q.mean, q.log_variance), shape, inverse)


_HALF_2_PI_E = 0.5 * math.log(2 * math.pi * math.e)


def kl(state: Horseshoe, scale: Any = 1e-5) -> jax.Array:
    """The divergence from the prior, summed over weights, units and leaves, in nats.

    Args:
      state: variational parameters.
      scale: of the half-Cauchy prior of a leaf, > 0; the smaller, the fewer units stay.

    Returns:
      A scalar >= 0.

    Raises:
      ValueError: the scale is not positive.

    References:
      Louizos et al., 2017, section 4.2; Neville et al., "Mean field variational Bayes for
      continuous sparse signal shrinkage", Electronic Journal of Statistics 2014, for the
      factors of the half-Cauchy.

    >>> bool(kl(init({"w": jnp.ones((2, 2))})) > 0)
    True
    """
    if not isinstance(scale, jax.core.Tracer) and not np.all(np.asarray(scale) > 0):
        raise ValueError(f"scale must be positive, not {scale}: it is that of a half-Cauchy prior.")

    def leaf(log_variance: jax.Array, mean: jax.Array, factors: Scales) -> jax.Array:
        mean = wide(mean)
        own = 0.5 * (jnp.exp(log_variance) + jnp.square(mean) - 1 - log_variance)
        square = jnp.square(jnp.asarray(scale).astype(mean.dtype))
        return (
            jnp.sum(own)
            + jnp.sum(kl_gamma(factors.s_a, 0.5, square))
            + jnp.sum(kl_inverse_gamma(factors.s_b, 0.5, 1.0))
            + jnp.sum(kl_gamma(factors.alpha, 0.5, 1.0))
            + jnp.sum(kl_inverse_gamma(factors.beta, 0.5, 1.0))
        )

    parts = jax.tree.leaves(trees.map_synapses(leaf, state.log_variance, state.mean, state.scales))
    return functools.reduce(jnp.add, parts) if parts else jnp.zeros((), jnp.float32)


def scales(state: Horseshoe) -> PyTree:
    """The belief about each unit's scale ``z``, which is log-normal.

    Args:
      state: variational parameters.

    Returns:
      Pytree with a :class:`LogNormal` for each leaf with a belief; axes that are not of units have
      length 1.

    >>> scales(init({"w": jnp.ones((4, 3))}))["w"].mean.shape
    (4, 1)
    """

    def leaf(log_variance: jax.Array, factors: Scales) -> LogNormal:
        del log_variance
        m, v = _log_scale(factors)
        return LogNormal(m, jnp.log(v))

    return trees.map_synapses(leaf, state.log_variance, state.scales)


def log_modes(state: Horseshoe) -> PyTree:
    """The logarithm of the mode of each unit's scale, ``m - v``: low where a unit is not needed.

    Args:
      state: variational parameters.

    Returns:
      Pytree like the state's leaves with a belief; axes that are not of units have length 1.

    References:
      Louizos et al., 2017, section 4.2: units of a large negative log-mode are pruned.

    >>> log_modes(init({"w": jnp.ones((4, 3))}, log_variance=0.0))["w"][0].tolist()
    [-1.0]
    """
    return trees.map_synapses(
        lambda _, z: z.mean - jnp.exp(z.log_variance), state.log_variance, scales(state)
    )


def mask(state: Horseshoe, threshold: Any) -> PyTree:
    """Keeps the units whose scale has a log-mode above a threshold, with all their synapses.

    Args:
      state: variational parameters.
      threshold: on the log-mode; look at the histogram of :func:`log_modes`, which has two humps
        after training.

    Returns:
      Pytree of bool like ``state.log_variance``.

    References:
      Louizos et al., 2017, section 4.2.

    >>> mask(init({"w": jnp.ones((1, 2))}), -3.0)["w"].tolist()
    [[True, True]]
    """
    return trees.map_synapses(
        lambda v, mode: jnp.broadcast_to(mode > jnp.asarray(threshold).astype(mode.dtype), v.shape),
        state.log_variance,
        log_modes(state),
    )


def weights(state: Horseshoe, threshold: Any = -jnp.inf) -> PyTree:
    """The network for testing: marginal means, exactly zero where :func:`mask` cuts.

    Args:
      state: variational parameters.
      threshold: on the log-mode; keeps everything by default.

    Returns:
      Pytree like ``state.mean``, of its dtypes.

    >>> [round(x, 4) for x in weights(init({"w": jnp.array([[2.0, 3.0]])}))["w"][0].tolist()]
    [2.0, 3.0]
    """
    return trees.merge_synapses(
        lambda keep, old, new: jnp.where(keep, new, 0).astype(old.dtype),
        mask(state, threshold),
        state.mean,
        state.posterior().mean,
    )


def _draw_scale(key: jax.Array, factors: Scales) -> jax.Array:
    m, v = _log_scale(factors)
    return jnp.exp(m + jnp.sqrt(v) * jax.random.normal(key, m.shape, m.dtype))


def sample(key: jax.Array, state: Horseshoe) -> PyTree:
    """Draws a network: scales of units, and weights.

    Args:
      key: random key.
      state: variational parameters.

    Returns:
      Pytree like ``state.mean``, of its dtypes; leaves without a belief as they are.

    >>> sample(jax.random.key(0), init({"w": jnp.ones((4, 3))}))["w"].shape
    (4, 3)
    """
    places = iter(range(len(jax.tree.leaves(state.log_variance))))

    def leaf(log_variance: jax.Array, mean: jax.Array, factors: Scales) -> jax.Array:
        of_scale, own = jax.random.split(jax.random.fold_in(key, next(places)))
        noise = jax.random.normal(own, mean.shape, log_variance.dtype)
        v = wide(mean) + jnp.exp(0.5 * log_variance) * noise
        return (v * _draw_scale(of_scale, factors)).astype(mean.dtype)

    return trees.merge_synapses(leaf, state.log_variance, state.mean, state.scales)


def product(
    key: jax.Array,
    x: jax.Array,
    mean: jax.Array,
    log_variance: jax.Array,
    factors: Scales,
    multiply: Callable[[jax.Array, jax.Array], jax.Array] = jnp.matmul,
) -> jax.Array:
    """A layer's linear map: scales drawn once, weights by local reparametrisation.

    Under ``vmap`` over examples, with a key for each, the scales are drawn for each as well.

    Args:
      key: random key.
      x: inputs, ``[..., inputs]`` for a dense layer.
      mean: the layer's leaf of ``state.mean``.
      log_variance: its leaf of ``state.log_variance``.
      factors: its leaf of ``state.scales``.
      multiply: the linear map of inputs and weights, such as a convolution.

    Returns:
      Outputs, of the shape and dtype of ``multiply(x, mean)``.

    References:
      Louizos et al., 2017, section 4.2; Kingma et al., "Variational dropout and the local
      reparameterization trick", NeurIPS 2015.

    >>> state = init({"w": jnp.ones((4, 3))})
    >>> leaves = state.mean["w"], state.log_variance["w"], state.scales["w"]
    >>> product(jax.random.key(0), jnp.ones((5, 4)), *leaves).shape
    (5, 3)
    """
    of_scale, own = jax.random.split(key)
    z = _draw_scale(of_scale, factors)
    scaled = (wide(mean) * z).astype(mean.dtype)
    return sparse_vd.product(own, x, scaled, log_variance + 2 * jnp.log(z), multiply)


def bit_widths(posterior: Posterior, axis: Axes | None = None) -> PyTree:
    """How many bits a weight needs for its rounding to vanish in its uncertainty.

    A uniform grid over ``[-max |mean|, max |mean|]`` whose step is twice the deviation (the root of
    the mean variance) rounds a weight by at most one deviation. Its levels, ``max |mean| /
    deviation + 1``, take the bits that are returned.

    Args:
      posterior: a belief, such as ``Horseshoe.posterior()``; leave out what is pruned by setting
        its mean to zero and its precision to inf.
      axis: None gives one width a leaf; the axis (or axes) of units one a unit.

    Returns:
      Pytree of int32 like the belief, of shape () or with axes that are not of units of length 1.
      A leaf or unit whose weights are all zero, or as uncertain as they are large, takes 1 bit or
      fewer: 0 stands for nothing to store; no width is above 32.

    Raises:
      ValueError: a leaf has no such axis.

    References:
      Louizos et al., 2017, section 3: the variance of the weights sets the unit round-off. The
      paper takes floating-point widths from it; a uniform grid is what integer kernels use.

    >>> belief = Posterior({"w": jnp.array([0.7, -1.0])}, {"w": jnp.array([1e4, 1e4])})
    >>> bit_widths(belief)["w"].item()  # 101 levels
    7
    """
    names = iter(trees.paths(posterior.mean))

    def leaf(mean: jax.Array, precision: jax.Array) -> jax.Array:
        mean, precision = wide(jnp.asarray(mean)), wide(jnp.asarray(precision))
        name = next(names)
        units = () if axis is None else unit_shape(mean.shape, axis, name)
        others = tuple(place for place, n in enumerate(units) if n == 1)
        over = None if axis is None else others
        keep = axis is not None
        alive = mean != 0
        largest = jnp.max(jnp.abs(mean), axis=over, keepdims=keep)
        count = jnp.sum(alive, axis=over, keepdims=keep).astype(mean.dtype)
        total = jnp.sum(jnp.where(alive, 1 / precision, 0), axis=over, keepdims=keep)
        deviation = jnp.sqrt(total / jnp.maximum(count, 1))
        # No uncertainty asks for more levels than there are numbers.
        levels = 1 + largest / jnp.maximum(deviation, jnp.finfo(mean.dtype).tiny)
        bits = jnp.clip(jnp.ceil(jnp.log2(levels)), 1, 32)
        return jnp.where(largest > 0, bits, 0).astype(jnp.int32)

    def both(mean: Any, precision: Any) -> Any:
        return optax.MaskedNode() if trees.is_masked(mean) else leaf(mean, precision)

    return jax.tree.map(both, posterior.mean, posterior.precision, is_leaf=trees.is_masked)
