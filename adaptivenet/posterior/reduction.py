"""Bayesian model reduction: would the evidence rise if a synapse were not there?

A network fitted once under a broad prior holds the evidence of every network under a narrower one:
``p~(y) / p(y)`` is the posterior expectation of the ratio of the priors. For a Gaussian belief and
prior it is closed. A synapse whose removal raises the evidence goes; there is no threshold to set.

With a prior ``N(0, 1/p0)``, a belief ``N(m, 1/p)`` and removal for good, the change of the log
evidence is ``(log(p / p0) - m^2 p) / 2``: what is cut has a squared signal-to-noise ratio below the
log of how much the data sharpened the belief.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from adaptivenet import trees
from adaptivenet.posterior._arrays import Axes, known, wide
from adaptivenet.posterior.gaussian import Posterior

PyTree = Any
Number = Any  # a Python number, or a traced scalar

__all__ = [
    "Reduced",
    "evidence",
    "evidence_change",
    "reduce_dense",
    "reduction_mask",
    "restrict",
    "slab_log_odds",
    "unit_change",
]


def evidence_change(
    posterior: Posterior, prior: Posterior | Number = 1.0, spike: Number = 0.0
) -> PyTree:
    """The change of the log evidence when a synapse's prior shrinks to a spike at zero, in nats.

    Each synapse is taken by itself. Where the belief is the exact marginal of each parameter (a
    linear model), so is the result; elsewhere it is as good as the belief.

    Args:
      posterior: belief whose precision includes the prior's.
      prior: the prior under which it was found: the precision of a Gaussian around zero, > 0, or a
        ``Posterior`` of means and precisions.
      spike: variance of the reduced prior, at most that of the prior; 0 removes the synapse.

    Returns:
      Pytree like the belief, float32 (float64 where it is): positive where the evidence rises when
      the synapse is removed.

    Raises:
      ValueError: the prior's precision is not positive, or the spike is wider than the prior.

    References:
      Friston and Penny, "Post hoc Bayesian model selection", NeuroImage 2011; Wright et al.,
      "BMRS: Bayesian model reduction for structured pruning", NeurIPS 2024, arXiv:2406.01345;
      with a spike of variance 0 it is the Savage-Dickey ratio (Dickey, 1971).

    >>> belief = Posterior({"w": jnp.array([0.1, 2.0])}, {"w": jnp.array([10.0, 10.0])})
    >>> [round(x, 3) for x in evidence_change(belief)["w"].tolist()]
    [1.101, -18.849]
    """
    means, precisions = _priors(posterior, prior)
    _check_spike(precisions, spike)

    def leaf(mean: Any, precision: Any, prior_mean: Any, prior_precision: Any) -> jax.Array:
        m, p = wide(mean), wide(precision)
        m0, p0, s = (wide(x).astype(m.dtype) for x in (prior_mean, prior_precision, spike))
        widening = s * (p - p0)
        square = p * jnp.square(m) - p0 * jnp.square(m0) - s * p * p0 * jnp.square(m - m0)
        return 0.5 * (jnp.log(p) - jnp.log(p0) - jnp.log1p(widening) - square / (1 + widening))

    return trees.map_synapses(leaf, posterior.mean, posterior.precision, means, precisions)


def _priors(posterior: Posterior, prior: Posterior | Number) -> tuple[PyTree, PyTree]:
    if isinstance(prior, Posterior):
        return prior.mean, prior.precision
    zero = trees.map_synapses(lambda _: 0.0, posterior.mean)
    return zero, trees.map_synapses(lambda _: prior, posterior.mean)


def _check_spike(precisions: PyTree, spike: Number) -> None:
    for name, precision in zip(trees.paths(precisions), jax.tree.leaves(precisions), strict=True):
        if not known(precision):
            continue
        precision = np.asarray(precision, np.float64)
        if not np.all(np.isfinite(precision) & (precision > 0)):
            raise ValueError(
                f"the prior's precision at leaf {name!r} must be positive and finite: give "
                "prior= a number such as the weight decay times the number of examples."
            )
        if not known(spike):
            continue
        widest = np.asarray(spike, np.float64)
        # A prior of variance 1/p is written so in float32, hence the slack.
        if not (np.all(widest >= 0) and np.all(widest * np.max(precision) <= 1 + 1e-6)):
            raise ValueError(
                f"spike={spike} must be a variance from 0 to that of the prior at leaf {name!r}, "
                f"{1 / np.max(precision):g}."
            )


def unit_change(change: PyTree, axis: Axes) -> PyTree:
    """The change of the log evidence when a unit goes as one: the sum over its synapses.

    Args:
      change: as :func:`evidence_change` returns; beliefs are independent, so changes add up.
      axis: the axis (or axes) of each leaf along which the units lie.

    Returns:
      Pytree of arrays whose other axes have length 1.

    Raises:
      ValueError: a leaf has no such axis.

    References:
      Wright et al., 2024, section 3.

    >>> unit_change({"w": jnp.array([[1.0, -2.0], [0.5, 0.5]])}, axis=-1)["w"].tolist()
    [[1.5, -1.5]]
    """
    names = iter(trees.paths(change))
    axes = (axis,) if isinstance(axis, int) else tuple(axis)

    def leaf(values: jax.Array) -> jax.Array:
        name = next(names)
        if any(not -values.ndim <= a < values.ndim for a in axes):
            raise ValueError(
                f"leaf {name!r} of shape {values.shape} has no axis {axis}: give the axis of its "
                "units, or a belief without this leaf."
            )
        own = {a % values.ndim for a in axes}
        others = tuple(place for place in range(values.ndim) if place not in own)
        return jnp.sum(values, axis=others, keepdims=True)

    return jax.tree.map(leaf, change)


def reduction_mask(
    posterior: Posterior,
    prior: Posterior | Number = 1.0,
    spike: Number = 0.0,
    axis: Axes | None = None,
) -> PyTree:
    """Keeps what the evidence asks for: everything whose removal would lower it.

    Args:
      posterior: belief whose precision includes the prior's.
      prior: as for :func:`evidence_change`.
      spike: as for :func:`evidence_change`.
      axis: None decides by synapse; the axis (or axes) of units by unit.

    Returns:
      Pytree of bool like the belief, False where the change is positive.

    Raises:
      ValueError: as :func:`evidence_change` and :func:`unit_change`.

    References:
      Wright et al., 2024, section 3.

    >>> belief = Posterior({"w": jnp.array([0.1, 2.0])}, {"w": jnp.array([10.0, 10.0])})
    >>> reduction_mask(belief)["w"].tolist()
    [False, True]
    """
    change = evidence_change(posterior, prior, spike)
    decided = change if axis is None else unit_change(change, axis)
    return trees.map_synapses(lambda c, d: jnp.broadcast_to(d <= 0, c.shape), change, decided)


def evidence(
    params: PyTree,
    *,
    posterior: Posterior,
    prior: Posterior | Number = 1.0,
    spike: Number = 0.0,
    **signals: Any,
) -> PyTree:
    """A score: ``log(1 + evidence with the synapse / evidence without it)``.

    It is ``log 2`` where both are equal, so that the schedule ``threshold(math.log(2))`` cuts what
    :func:`reduction_mask` cuts and any other cuts in the same order.

    Args:
      params: the synapses (masked nodes elsewhere).
      posterior: belief with a leaf for each of them.
      prior: as for :func:`evidence_change`; set it with ``functools.partial(evidence, prior=p)``.
      spike: as for :func:`evidence_change`.
      **signals: not used.

    Returns:
      Positive scores of the parameters' shapes, float32.

    Raises:
      TypeError: the posterior is none.
      ValueError: it has no belief of a synapse, or as :func:`evidence_change`.

    References:
      Wright et al., 2024, section 3.

    >>> belief = Posterior({"w": jnp.array([0.1, 2.0])}, {"w": jnp.array([10.0, 10.0])})
    >>> [round(x, 3) for x in evidence({"w": jnp.ones(2)}, posterior=belief)["w"].tolist()]
    [0.287, 18.849]
    """
    del signals
    if isinstance(prior, Posterior):
        prior = restrict(prior, params)
    change = evidence_change(restrict(posterior, params), prior, spike)
    return jax.tree.map(lambda c: jax.nn.softplus(-c), change)


def slab_log_odds(
    posterior: Posterior,
    keep: Number = 0.5,
    prior: Posterior | Number = 1.0,
    spike: Number = 0.0,
) -> PyTree:
    """The log odds that a synapse comes from the slab rather than from the spike.

    The evidence of slab against spike, by Bayesian model reduction, plus the prior's log odds.

    Args:
      posterior: belief under the slab, whose precision includes the slab's.
      keep: prior probability of the slab, in (0, 1).
      prior: the slab: the precision of a Gaussian around zero, or a ``Posterior``.
      spike: variance of the spike; 0 is a point at zero.

    Returns:
      Pytree like the belief, float32 (float64 where it is).

    Raises:
      ValueError: ``keep`` is outside (0, 1), or as :func:`evidence_change`.

    References:
      Mitchell and Beauchamp, "Bayesian variable selection in linear regression", JASA 1988, for
      spike and slab.

    >>> belief = Posterior({"w": jnp.array([0.1, 2.0])}, {"w": jnp.array([10.0, 10.0])})
    >>> [round(x, 3) for x in slab_log_odds(belief)["w"].tolist()]
    [-1.101, 18.849]
    """
    if known(keep) and not np.all((np.asarray(keep) > 0) & (np.asarray(keep) < 1)):
        raise ValueError(f"keep must be a probability in (0, 1), not {keep}.")
    change = evidence_change(posterior, prior, spike)

    def leaf(c: jax.Array) -> jax.Array:
        chance = jnp.asarray(keep).astype(c.dtype)
        return jnp.log(chance) - jnp.log1p(-chance) - c

    return jax.tree.map(leaf, change)


def restrict(posterior: Any, params: PyTree) -> Posterior:
    """A belief about the synapses only, in their container, matched by path.

    Args:
      posterior: object with the trees mean and precision, of at least the synapses.
      params: the synapses (masked nodes elsewhere).

    Returns:
      The belief, shaped like ``params``.

    Raises:
      TypeError: it has no mean or no precision.
      ValueError: a synapse has no belief, or one of another shape.

    >>> ones = {"a": jnp.ones(2), "b": jnp.ones((1, 2))}
    >>> trees.paths(restrict(Posterior(ones, ones), trees.synapses(ones)).mean)
    ('b',)
    """
    if not (hasattr(posterior, "mean") and hasattr(posterior, "precision")):
        raise TypeError(
            "posterior= must have the trees mean and precision, which "
            f"{type(posterior).__name__} has not."
        )
    leaves, treedef = jax.tree.flatten(params)
    parts = []
    for what, tree in (("mean", posterior.mean), ("precision", posterior.precision)):
        there = dict(zip(trees.paths(tree), jax.tree.leaves(tree), strict=True))
        found = []
        for name, param in zip(trees.paths(params), leaves, strict=True):
            if name not in there:
                raise ValueError(
                    f"the posterior holds no {what} of leaf {name!r}: let its estimator select "
                    "the leaves that are pruned."
                )
            if jnp.shape(there[name]) != jnp.shape(param):
                raise ValueError(
                    f"the posterior's {what} of leaf {name!r} has shape {jnp.shape(there[name])}, "
                    f"the parameters {jnp.shape(param)}: it belongs to other parameters."
                )
            found.append(there[name])
        parts.append(jax.tree.unflatten(treedef, found))
    return Posterior(*parts)


class Reduced(NamedTuple):
    """What :func:`reduce_dense` returns.

    Attributes:
      change: change of the log evidence, a scalar, in nats.
      mean: means once the group is zero, ``[n]``; zero within the group.
      covariance: covariances, ``[n, n]``; zero within the group.
    """

    change: jax.Array
    mean: jax.Array
    covariance: jax.Array


def reduce_dense(
    mean: jax.Array,
    covariance: jax.Array,
    group: Sequence[int],
    prior_covariance: jax.Array | Number = 1.0,
    prior_mean: jax.Array | Number = 0.0,
) -> Reduced:
    """Removes a group of parameters from a belief with covariances, as in small or linear models.

    What stays learns of the removal: its belief is conditioned on the group being zero.

    Args:
      mean: posterior means, ``[n]``.
      covariance: posterior covariance, ``[n, n]``.
      group: positions that are set to zero, static.
      prior_covariance: ``[n, n]``, or the variance of every parameter.
      prior_mean: ``[n]``, or the mean of every parameter.

    Returns:
      The change of the log evidence and the belief that is left; exact for a Gaussian posterior.

    Raises:
      ValueError: the group is empty, not within the parameters, or names one twice.

    References:
      Friston and Penny, 2011, for nested Gaussian models.

    >>> covariance = jnp.array([[0.5, 0.4], [0.4, 0.5]])
    >>> reduced = reduce_dense(jnp.array([1.0, 1.0]), covariance, [1])
    >>> round(reduced.mean[0].item(), 3), round(reduced.covariance[0, 0].item(), 3)
    (0.2, 0.18)
    """
    mean, covariance = wide(mean), wide(covariance)
    size = mean.shape[0]
    chosen = sorted(int(place) for place in group)
    if not chosen or chosen[0] < 0 or chosen[-1] >= size or len(set(chosen)) != len(chosen):
        raise ValueError(
            f"group={list(group)} must name at least one of the {size} parameters, each once."
        )
    of_prior = wide(prior_covariance).astype(mean.dtype)
    if of_prior.ndim == 0:
        of_prior = of_prior * jnp.eye(size, dtype=mean.dtype)
    centre = jnp.broadcast_to(wide(prior_mean).astype(mean.dtype), mean.shape)
    places = np.asarray(chosen)
    rows = np.ix_(places, places)
    change = _log_density(mean[places], covariance[rows]) - _log_density(
        centre[places], of_prior[rows]
    )
    gain = jnp.linalg.solve(covariance[rows], covariance[places]).T  # [n, group]
    left = mean - _dot(gain, mean[places])
    spread = covariance - _dot(gain, covariance[places])
    # Exactly zero, where rounding leaves a little.
    gone = np.isin(np.arange(size), places)
    return Reduced(
        change,
        jnp.where(gone, 0, left),
        jnp.where(gone[:, None] | gone[None, :], 0, 0.5 * (spread + spread.T)),
    )


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _log_density(mean: jax.Array, covariance: jax.Array) -> jax.Array:
    """Log density at zero, less a constant that cancels between two of the same size."""
    square = mean @ jnp.linalg.solve(covariance, mean)
    return -0.5 * (jnp.linalg.slogdet(covariance)[1] + square)
