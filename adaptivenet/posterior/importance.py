"""Importance sampling: draws of a Gaussian belief, weighted by what the posterior says of them.

Where a belief covers the posterior, as on small nets, the weighted draws are exact in the limit of
many, and tell how far the belief is off: by the effective number of draws, by the evidence, by the
weighted variances that a belief of independent Gaussians can be held against. In many dimensions a
few draws take all of the weight; :func:`smoothed` tells (``k`` above 0.7), and ``nuts`` of
:mod:`adaptivenet.posterior.sampling` is the reference then.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adaptivenet.posterior import gaussian
from adaptivenet.posterior._arrays import known, wide
from adaptivenet.posterior.gaussian import Posterior
from adaptivenet.posterior.sampling import LogDensity, check_count, check_density
from adaptivenet.posterior.structured import Gaussian

PyTree = Any

__all__ = ["Weighted", "importance_sample", "resampled", "smoothed", "weighted_moments"]


class Weighted(NamedTuple):
    """Weighted draws.

    Attributes:
      samples: like the parameters with a leading axis [samples].
      log_weights: [samples]; their exponentials sum to one.
      log_evidence: scalar, the logarithm of the density's integral, in nats.
    """

    samples: PyTree
    log_weights: jax.Array
    log_evidence: jax.Array

    @property
    def effective_size(self) -> jax.Array:
        """``1 / sum(w^2)``: as many equally weighted draws would tell as much."""
        return jnp.exp(-jax.nn.logsumexp(2 * self.log_weights))


def importance_sample(
    log_density: LogDensity,
    proposal: Posterior | Gaussian,
    key: jax.Array,
    *,
    samples: int = 10_000,
    batch_size: int = 256,
) -> Weighted:
    """Draws from a belief, each weighted by the posterior's density over the belief's.

    Args:
      log_density: function of the parameters to a scalar; it need not be normalized.
      proposal: the belief: a ``Posterior`` or what :func:`~adaptivenet.posterior.laplace` holds as
        ``gaussian`` (diagonal, Kronecker-factored or full). Leaves below 32 bits are drawn as
        float32. It should be wider than the posterior: ``temper(belief, 1.5)`` makes it so.
      key: a random key.
      samples: how many draws.
      batch_size: draws whose densities are computed at a time.

    Returns:
      The weighted draws. The evidence is without bias; moments are consistent, with a bias that
      falls with the number of draws.

    Raises:
      TypeError: the proposal is neither.
      ValueError: a bad number, a log density that is no scalar or not finite at the mean of the
        belief.

    References:
      Owen, "Monte Carlo theory, methods and examples", 2013, chapter 9 (self-normalized weights).

    >>> belief = Posterior(jnp.zeros(3), jnp.full(3, 0.5))
    >>> found = importance_sample(
    ...     lambda x: -0.5 * jnp.sum(jnp.square(x)), belief, jax.random.key(0), samples=20_000)
    >>> abs(found.log_evidence - 1.5 * math.log(2 * math.pi)) < 0.05, found.effective_size > 10_000
    (Array(True, dtype=bool), Array(True, dtype=bool))
    """
    check_count(samples, "samples", 2)
    check_count(batch_size, "batch_size", 1)
    if isinstance(proposal, Gaussian):
        own, mean = _believing, proposal.params
    elif isinstance(proposal, Posterior):
        own, mean = _independent, proposal.mean
    else:
        raise TypeError(
            f"the proposal must be a Posterior or the gaussian of a Laplace fit, not a "
            f"{type(proposal).__name__}."
        )
    check_density(log_density, (jax.tree.map(wide, mean),))
    return _weigh(log_density, own, proposal, key, samples, batch_size)


@functools.partial(jax.jit, static_argnames=("log_density", "own", "samples", "batch_size"))
def _weigh(
    log_density: LogDensity, own: Any, proposal: Any, key: jax.Array, samples: int, batch_size: int
) -> Weighted:
    draw, density = own(proposal)

    def one(key: jax.Array) -> tuple[PyTree, jax.Array]:
        place = draw(key)
        ratio = log_density(place) - density(place)
        # A place where the posterior is nothing weighs nothing; nan would weigh everything.
        return place, jnp.where(jnp.isnan(ratio), -jnp.inf, ratio)

    drawn, ratios = jax.lax.map(one, jax.random.split(key, samples), batch_size=batch_size)
    total = jax.nn.logsumexp(ratios)
    return Weighted(drawn, ratios - total, total - math.log(samples))


def _independent(belief: Posterior) -> tuple[Any, Any]:
    belief = Posterior(jax.tree.map(wide, belief.mean), belief.precision)
    return (
        lambda key: gaussian.sample(key, belief),
        lambda place: gaussian.log_density(belief, place),
    )


def _believing(belief: Gaussian) -> tuple[Any, Any]:
    belief = belief.widened()
    return belief.sample, belief.log_density


def smoothed(weighted: Weighted) -> tuple[Weighted, jax.Array]:
    """Replaces the largest weights by quantiles of a Pareto tail, and tells how heavy it is.

    Args:
      weighted: weighted draws; with fewer than 25 nothing can be said.

    Returns:
      The draws with smoothed weights, and the tail's shape ``k``: below 0.5 the estimates are
      reliable, from 0.7 on they are not, whatever their spread says; infinite if it cannot be told.

    Raises:
      ImportError: BlackJAX is missing (the extra ``bayes``).

    References:
      Vehtari et al., "Pareto smoothed importance sampling", JMLR 25, 2024 (arXiv:1507.02646).
    """
    try:
        from blackjax.diagnostics import psis_weights  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"smoothing needs blackjax >= 1.7, which cannot be imported ({error}); run: "
            "pip install 'adaptivenet[bayes]'.",
            name="blackjax",
        ) from error
    log_weights, k = psis_weights(weighted.log_weights)
    return weighted._replace(log_weights=log_weights), k


def weighted_moments(weighted: Weighted, *, floor: Any = 1e-10) -> Posterior:
    """The diagonal Gaussian of the weighted means and variances.

    Args:
      weighted: weighted draws.
      floor: smallest variance. May be traced.

    Returns:
      Means and inverse variances, float32 or wider; the variance is divided by one minus the sum
      of squared weights, as that of equal weights is by ``1 - 1 / n``.

    Raises:
      ValueError: a floor that is not positive.

    >>> draws = {"w": jnp.array([[1.0], [3.0], [9.0]])}
    >>> weighted_moments(Weighted(draws, jnp.log(jnp.array([0.5, 0.5, 0.0])), jnp.array(0.0)))
    Posterior(mean={'w': Array([2.], dtype=float32)}, precision={'w': Array([0.5], dtype=float32)})
    """
    if known(floor) and not floor > 0:
        raise ValueError(f"floor must be a variance > 0, not {floor}.")
    weights = jnp.exp(weighted.log_weights)
    rest = 1 - jnp.sum(jnp.square(weights))

    def average(x: jax.Array) -> jax.Array:
        return jnp.tensordot(weights.astype(x.dtype), x, 1, precision=jax.lax.Precision.HIGHEST)

    mean = jax.tree.map(average, weighted.samples)

    def precision(x: jax.Array, m: jax.Array) -> jax.Array:
        variance = average(jnp.square(x - m)) / rest.astype(x.dtype)
        return 1 / jnp.maximum(variance, jnp.asarray(floor).astype(x.dtype))

    return Posterior(mean, jax.tree.map(precision, weighted.samples, mean))


def resampled(weighted: Weighted, key: jax.Array, samples: int) -> PyTree:
    """Draws of equal weight, chosen among the weighted ones with replacement (systematically).

    Args:
      weighted: weighted draws.
      key: a random key.
      samples: how many.

    Returns:
      Like the draws, with a leading axis [samples].

    Raises:
      ValueError: fewer than one.

    References:
      Kitagawa, "Monte Carlo filter and smoother", Journal of Computational and Graphical Statistics
      5, 1996 (systematic resampling).

    >>> found = Weighted(jnp.array([1.0, 2.0, 3.0]), jnp.log(jnp.array([0.25, 0.0, 0.75])), 0.0)
    >>> resampled(found, jax.random.key(0), 4).tolist()
    [1.0, 3.0, 3.0, 3.0]
    """
    check_count(samples, "samples", 1)
    ends = jnp.cumsum(jnp.exp(weighted.log_weights))
    first = jax.random.uniform(key, dtype=ends.dtype)
    places = (jnp.arange(samples, dtype=ends.dtype) + first) / samples
    chosen = jnp.searchsorted(ends / ends[-1], places, side="right")
    return jax.tree.map(lambda x: x[jnp.minimum(chosen, len(ends) - 1)], weighted.samples)
