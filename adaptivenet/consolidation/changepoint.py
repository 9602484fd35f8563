"""Bayesian online changepoint detection: what is believed of when the last change was.

It is a detector for :func:`adaptivenet.consolidation.drift.on_drift`::

    detector = changepoint(normal_model(mean=0.5, weight=0.1, scale=0.05), hazard=1e-3)
    state, alarms = jax.lax.scan(detector.update, detector.init(), losses)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln, logsumexp

from adaptivenet.consolidation.boundary import check_share
from adaptivenet.consolidation.drift import Detector, guarded, increment
from adaptivenet.posterior._states import check_positive, scalar

PyTree = Any
Number = Any  # a Python number, or a traced scalar

__all__ = ["ChangepointState", "Model", "bernoulli_model", "changepoint", "normal_model"]


class Model(NamedTuple):
    """A conjugate model of the values between two changes.

    Attributes:
      prior: sufficient statistics before any value, a pytree of float scalars.
      log_predictive: ``(statistics, value) -> log density`` of the next value.
      absorb: ``(statistics, value) -> statistics``.
    """

    prior: PyTree
    log_predictive: Callable[[PyTree, jax.Array], jax.Array]
    absorb: Callable[[PyTree, jax.Array], PyTree]


def normal_model(
    mean: Number = 0.0, weight: Number = 1.0, shape: Number = 1.0, scale: Number = 1.0
) -> Model:
    r"""Normal values of unknown mean and variance.

    The variance is inverse-gamma with ``shape`` and ``scale`` (its guess is ``scale / shape``,
    worth ``2 shape`` values), the mean normal around ``mean``, worth ``weight`` values. A prior far
    from the values makes every change improbable: ``scale`` should be about ``shape`` times the
    variance of the values, and ``weight`` small, so that means may be far apart.

    Args:
      mean: of the mean.
      weight: positive.
      shape: positive.
      scale: positive.

    Returns:
      A model; its predictive density is Student's t.

    Raises:
      ValueError: a number is not positive.

    References:
      Murphy, "Conjugate Bayesian analysis of the Gaussian distribution" (2007).

    >>> model = normal_model()
    >>> round(model.log_predictive(model.prior, jnp.zeros(())).item(), 4)  # log(1/4)
    -1.3863
    """
    for name, value in (("weight", weight), ("shape", shape), ("scale", scale)):
        check_positive(name, value)

    def log_predictive(statistics: Any, value: jax.Array) -> jax.Array:
        centre, k, a, b = statistics
        spread = 2.0 * b * (k + 1.0) / k
        power = (a + 0.5) * jnp.log1p(jnp.square(value - centre) / spread)
        return _log_gamma_ratio(a) - 0.5 * jnp.log(math.pi * spread) - power

    def absorb(statistics: Any, value: jax.Array) -> Any:
        centre, k, a, b = statistics
        gap = value - centre
        return (
            centre + gap / (k + 1.0),
            k + 1.0,
            a + 0.5,
            b + 0.5 * k / (k + 1.0) * jnp.square(gap),
        )

    prior = tuple(scalar(x) for x in (mean, weight, shape, scale))
    return Model(prior, log_predictive, absorb)


def bernoulli_model(ones: Number = 1.0, zeros: Number = 1.0) -> Model:
    """Values of 0 and 1 with an unknown probability, such as errors of a classifier.

    Args:
      ones: pseudo-count of ones, positive.
      zeros: pseudo-count of zeros, positive.

    Returns:
      A model.

    Raises:
      ValueError: a number is not positive.

    >>> model = bernoulli_model(1.0, 3.0)
    >>> round(model.log_predictive(model.prior, jnp.ones(())).item(), 4)  # log(1/4)
    -1.3863
    """
    check_positive("ones", ones)
    check_positive("zeros", zeros)

    def log_predictive(statistics: Any, value: jax.Array) -> jax.Array:
        a, b = statistics
        return jnp.log(jnp.where(value > 0.5, a, b)) - jnp.log(a + b)

    def absorb(statistics: Any, value: jax.Array) -> Any:
        a, b = statistics
        one = (value > 0.5).astype(a.dtype)
        return a + one, b + (1.0 - one)

    return Model((scalar(ones), scalar(zeros)), log_predictive, absorb)


class ChangepointState(NamedTuple):
    """State of :func:`changepoint`: what is believed of when the last change was.

    Attributes:
      log_weight: ``[window]``, log probabilities of the run lengths that are kept; -inf where there
        is none yet.
      length: ``[window]`` int32, the run lengths: values since the last change, with the newest.
      statistics: of the values in each run, a pytree with a leading axis.
      since: int32 scalar, values since the last alarm.
    """

    log_weight: jax.Array
    length: jax.Array
    statistics: PyTree
    since: jax.Array

    def recent(self, limit: Number) -> jax.Array:
        """The probability that there was a change within the last ``limit`` values."""
        return jnp.sum(jnp.where(self.length <= limit, jnp.exp(self.log_weight), 0.0))


def changepoint(
    model: Model,
    *,
    hazard: Number = 1e-3,
    window: int = 64,
    recent: int = 50,
    gap: int = 10,
    threshold: Number = 0.5,
) -> Detector:
    r"""Bayesian online changepoint detection.

    Between two changes values are drawn from a conjugate model whose parameters are drawn anew at
    every change; before every value but the first there is a change with the probability
    ``hazard``. The posterior over the run length, the number of values since the last change, is
    updated exactly. ``window`` run lengths are kept; when there are more, the least probable one
    gives way and the others are normalised. It alarms when a change within the last ``recent``
    values is more probable than ``threshold``, once a change: those up to ``gap`` values after an
    alarm (or after the first value) count as the same.

    Args:
      model: :func:`normal_model` or :func:`bernoulli_model`.
      hazard: in (0, 1).
      window: number of run lengths, at least 2; with no more values than that nothing is left out.
      recent: as above, at least 1: how long it may take to make sure.
      gap: as above, not negative.
      threshold: a probability.

    Returns:
      A detector.

    Raises:
      ValueError: a number is out of range.

    References:
      Adams and MacKay, "Bayesian online changepoint detection", arXiv:0710.3742, algorithm 1 (here
      the run length counts the newest value, so that an alarm may come with the first value after
      a change); Fearnhead and Liu, "On-line inference for multiple changepoint problems", JRSS B 69
      (2007), for leaving out what is improbable.

    >>> detector = changepoint(normal_model(weight=0.1, scale=0.1), gap=3)
    >>> values = jnp.array([0.0, 0.1, -0.1, 0.0, 0.1, 0.0, -0.1, 7.0, 7.1])
    >>> state, alarms = jax.lax.scan(detector.update, detector.init(), values)
    >>> alarms.tolist().index(True), state.length[jnp.argmax(state.log_weight)].item()
    (7, 2)
    """
    check_positive("hazard", hazard)
    check_positive("1 - hazard", 1.0 - hazard)
    check_share("threshold", threshold)
    if window < 2 or recent < 1 or gap < 0:
        raise ValueError(
            f"window={window}, recent={recent}, gap={gap}: needed are window >= 2, recent >= 1 and "
            "gap >= 0."
        )

    def init() -> ChangepointState:
        floats = jnp.result_type(float)
        return ChangepointState(
            jnp.full(window, -jnp.inf, floats),
            jnp.zeros(window, jnp.int32),
            jax.tree.map(lambda s: jnp.full(window, s, floats), model.prior),
            jnp.zeros((), jnp.int32),
        )

    def step(state: ChangepointState, value: jax.Array) -> tuple[ChangepointState, jax.Array]:
        rate, first = scalar(hazard), jnp.all(state.length == 0)
        predictive = jax.vmap(model.log_predictive, (0, None))(state.statistics, value)
        grown = state.log_weight + jnp.log1p(-rate) + predictive
        # The weights sum to 1, so that what begins here has the hazard as its prior.
        begun = model.log_predictive(model.prior, value) + jnp.where(first, 0.0, jnp.log(rate))
        place = jnp.argmin(grown)
        weight = grown.at[place].set(begun)
        length = jnp.where(jnp.isneginf(grown), 0, increment(state.length))
        length = length.at[place].set(1)
        statistics = jax.vmap(model.absorb, (0, None))(state.statistics, value)
        fresh = model.absorb(model.prior, value)
        statistics = jax.tree.map(lambda s, f: s.at[place].set(f), statistics, fresh)
        weight = weight - logsumexp(weight)
        since = increment(state.since)
        after = ChangepointState(weight, length, statistics, since)
        # A run that began before the last alarm is longer than what came since.
        alarm = after.recent(jnp.minimum(since - gap, recent)) > scalar(threshold)
        return after._replace(since=jnp.where(alarm, 0, since)), alarm

    return guarded(init, step)


def _log_gamma_ratio(a: jax.Array) -> jax.Array:
    """``log Gamma(a + 1/2) - log Gamma(a)``, whose terms would cancel for large a."""
    small = jnp.minimum(a, 10.0)
    large = jnp.maximum(a, 10.0)
    series = 0.5 * jnp.log(large) - 1.0 / (8.0 * large) + 1.0 / (192.0 * large**3)
    return jnp.where(a < 10.0, gammaln(small + 0.5) - gammaln(small), series)
