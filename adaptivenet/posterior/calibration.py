"""Calibration after training: temperature and vector scaling, and likelihoods that compare fairly.

Raw likelihood and calibration error do not rank models fairly, because one number, the temperature,
may decide them; compare models after each got its own (:func:`calibrated_log_likelihood`).

Everything takes logits [n, classes]. For an ensemble, or for samples of a posterior, give the log
of the mean prediction (:func:`adaptivenet.posterior.metrics.mixture_log_probabilities`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet.posterior._metric_values import as_floats, as_labels, as_predictions, known_values

__all__ = [
    "CalibratedLikelihood",
    "VectorScaling",
    "calibrated_log_likelihood",
    "fit_temperature",
    "fit_vector_scaling",
]

_PASSES = 60  # 30 bisections alone would reach the tolerance; Newton takes about 6
_TOLERANCE = 1e-6


def fit_temperature(
    logits: Any, labels: Any, *, bounds: tuple[Any, Any] = (0.01, 100.0)
) -> jax.Array:
    """The temperature that makes held-out data most likely; divide logits by it.

    The negative log likelihood is convex in 1 / temperature. Newton's method finds the root of its
    slope on a logarithmic scale; steps that leave the bracket or shrink it too little are replaced
    by bisection, so that it converges from anywhere.

    Args:
      logits: [n, classes] of examples that were not trained on; -inf for classes ruled out.
      labels: integers [n].
      bounds: smallest and largest temperature; traced numbers are accepted.

    Returns:
      Scalar. At a bound where the likelihood has no maximum between them: where every example is
      classified rightly, at the lower one, or where the loss underflows to 0 on the way to it. 1
      where no temperature changes anything.

    Raises:
      TypeError, ValueError: dtypes, shapes or values that are none of the above.

    References:
      Guo et al., "On calibration of modern neural networks", ICML 2017, section 4.2, equation 9.

    >>> logits = jnp.array([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [4.0, 0.0]])
    >>> temperature = fit_temperature(logits, [0, 0, 0, 1])  # 3 of 4 are right
    >>> jax.nn.softmax(logits / temperature)[0, 0].round(4).item()
    0.75
    """
    array, index = _held_out(logits, labels)
    return _fit(array, index, jnp.ones(index.shape, array.dtype), _checked_bounds(bounds))


def _held_out(logits: Any, labels: Any) -> tuple[jax.Array, jax.Array]:
    array = as_predictions(logits, True, "logits")
    return array, as_labels(labels, array)


def _checked_bounds(bounds: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
    low, high = (as_floats(bound, "bounds") for bound in bounds)
    numbers = [known_values(bound) for bound in bounds]
    if numbers[0] is not None and numbers[1] is not None and not 0 < numbers[0] < numbers[1]:
        raise ValueError(f"bounds must be 0 < smallest < largest temperature, not {bounds}.")
    return low, high


def _fit(
    logits: jax.Array, labels: jax.Array, weights: jax.Array, bounds: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """The temperature for weighted examples."""
    # Differences to the label's logit; classes ruled out have no probability and no say.
    chosen = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, None], 1, mode="fill")
    chosen = jnp.where(labels[:, None] < 0, jnp.nan, chosen)
    shifted = logits - logits.max(-1, keepdims=True)
    ruled_out = jnp.isneginf(logits)
    gap = jnp.where(ruled_out, 0.0, logits - chosen)
    total = weights.sum()

    def slopes(u: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First derivative by b = e^u of the mean loss, and its derivative by u."""
        b = jnp.exp(u)
        p = jax.nn.softmax(jnp.where(ruled_out, -jnp.inf, b * shifted))
        mean = jnp.sum(p * gap, -1)
        # Gaps to the mean first: the difference of squares would cancel.
        variance = jnp.sum(p * jnp.square(gap - mean[:, None]), -1)
        return jnp.sum(weights * mean) / total, b * jnp.sum(weights * variance) / total

    # A float carry of one dtype throughout; u = -log(temperature).
    low, high = (-jnp.log(bound.astype(logits.dtype)) for bound in reversed(bounds))
    start = jnp.clip(jnp.zeros((), logits.dtype), low, high)
    slope, curvature = slopes(start)

    def unfinished(carry: Any) -> jax.Array:
        step, _, slope, _, low, high, move = carry
        apart = (high - low > _TOLERANCE) & (jnp.abs(move) > _TOLERANCE)
        return (step < _PASSES) & apart & (slope != 0)

    def improve(carry: Any) -> Any:
        step, u, slope, curvature, low, high, move = carry
        low, high = jnp.where(slope < 0, u, low), jnp.where(slope > 0, u, high)
        newton = u - slope / jnp.where(curvature > 0, curvature, 1.0)
        inside = (curvature > 0) & (newton > low) & (newton < high)
        shrinks = jnp.abs(newton - u) < 0.5 * jnp.abs(move)
        following = jnp.where(inside & shrinks, newton, 0.5 * (low + high))
        return (step + 1, following, *slopes(following), low, high, following - u)

    carry = (jnp.zeros((), jnp.int32), start, slope, curvature, low, high, high - low)
    u = jax.lax.while_loop(unfinished, improve, carry)[1]
    return jnp.where(jnp.isnan(slope), jnp.nan, jnp.exp(-u))


class CalibratedLikelihood(NamedTuple):
    """Log likelihood after temperature scaling, by cross-validation.

    Attributes:
      log_likelihood: scalar, mean nats per example over examples and splits; larger is better.
      per_split: [splits], its values.
      temperature: [splits, 2], fitted on the first and on the second half of each split.
    """

    log_likelihood: jax.Array
    per_split: jax.Array
    temperature: jax.Array


def calibrated_log_likelihood(
    logits: Any,
    labels: Any,
    key: jax.Array,
    *,
    splits: int = 5,
    bounds: tuple[Any, Any] = (0.01, 100.0),
) -> CalibratedLikelihood:
    """Log likelihood of a test set at the temperature found on the other half of it.

    The set is split at random into halves; each half is evaluated at the temperature that was
    fitted on the other; so no example is judged by a temperature that has seen it.

    Args:
      logits: [n, classes], n >= 2; of an ensemble the log of its mean prediction.
      labels: integers [n].
      key: a random key, of the splits; use one key for all models that are compared.
      splits: how often it is repeated.
      bounds: as for :func:`fit_temperature`.

    Returns:
      The mean, the value of each split, and the temperatures.

    Raises:
      TypeError, ValueError: as :func:`fit_temperature`; fewer than two examples; splits < 1.

    References:
      Ashukha et al., "Pitfalls of in-domain uncertainty estimation and ensembling in deep
      learning", ICLR 2020 (arXiv:2002.06470), sections 3 and 4.

    >>> logits = jnp.tile(jnp.array([[9.0, 0.0]]), (64, 1))
    >>> labels = jnp.arange(64) % 4 == 0
    >>> result = calibrated_log_likelihood(logits, labels.astype(jnp.int32), jax.random.key(0))
    >>> result.log_likelihood > -0.75, result.temperature.shape
    (Array(True, dtype=bool), (5, 2))
    """
    array, index = _held_out(logits, labels)
    if isinstance(splits, bool) or not isinstance(splits, int) or splits < 1:
        raise ValueError(f"splits must be an integer >= 1, not {splits!r}.")
    n = array.shape[0]
    if n < 2:
        raise ValueError("two halves take at least two examples, but there is one.")
    limits = _checked_bounds(bounds)

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        second = jax.random.permutation(key, n) >= n // 2
        halves = jnp.stack([~second, second])
        temperature = jax.vmap(lambda half: _fit(array, index, half.astype(array.dtype), limits))(
            halves
        )
        # The first half is judged by the temperature of the second, and the other way round.
        scale = jnp.where(second, temperature[0], temperature[1])[:, None]
        logs = jax.nn.log_softmax(array / scale)
        chosen = jnp.take_along_axis(logs, jnp.maximum(index, 0)[:, None], 1, mode="fill")
        return chosen.mean(), temperature

    # One split after another: all at once would hold the logits many times over.
    per_split, temperature = jax.lax.map(one, jax.random.split(key, splits))
    return CalibratedLikelihood(per_split.mean(), per_split, temperature)


class VectorScaling(NamedTuple):
    """A scale and a shift for each class, fitted by :func:`fit_vector_scaling`.

    Attributes:
      scale: [classes].
      shift: [classes].
    """

    scale: jax.Array
    shift: jax.Array

    def __call__(self, logits: Any) -> jax.Array:
        """The calibrated logits, of the same shape [..., classes]."""
        array = as_floats(logits, "logits")
        return array * self.scale.astype(array.dtype) + self.shift.astype(array.dtype)


def fit_vector_scaling(
    logits: Any, labels: Any, *, strength: Any = 1e-4, steps: int = 100
) -> VectorScaling:
    """A scale and a shift for each class that make held-out data most likely.

    It has 2 classes parameters and may change the predicted class, unlike one temperature; with few
    held-out examples it overfits. L-BFGS starts from the best single temperature, so on the data it
    is fitted on it is never worse than that, up to ``strength``.

    Args:
      logits: [n, classes] of examples that were not trained on, finite.
      labels: integers [n].
      strength: of the pull, half the squared distance, to the temperature it starts from; it makes
        the minimum unique. May be traced.
      steps: of L-BFGS.

    Returns:
      The scaling; call it on logits.

    Raises:
      TypeError, ValueError: as :func:`fit_temperature`; -inf; strength <= 0.

    References:
      Guo et al., "On calibration of modern neural networks", ICML 2017, section 4.2.

    >>> logits = jnp.tile(jnp.array([[4.0, 0.0]]), (4, 1))
    >>> scaling = fit_vector_scaling(logits, [0, 0, 0, 1])
    >>> jax.nn.softmax(scaling(logits))[0, 0].round(2).item()
    0.75
    """
    array, index = _held_out(logits, labels)
    numbers = known_values(logits)
    if numbers is not None and not np.isfinite(numbers).all():
        raise ValueError("vector scaling takes finite logits; drop the classes that are ruled out.")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer >= 1, not {steps!r}.")
    strengths = known_values(strength)
    if strengths is not None and not (strengths > 0).all():
        raise ValueError(f"strength must be > 0, not {strength}; 1e-4 hardly matters.")
    pull = jnp.asarray(strength).astype(array.dtype)
    ones = jnp.ones(array.shape[-1], array.dtype)
    limits = _checked_bounds((0.01, 100.0))
    first = VectorScaling(
        ones / _fit(array, index, jnp.ones(index.shape, array.dtype), limits), 0 * ones
    )

    def loss(scaling: VectorScaling) -> jax.Array:
        logs = jax.nn.log_softmax(scaling(array))
        chosen = jnp.take_along_axis(logs, jnp.maximum(index, 0)[:, None], 1, mode="fill")
        distance = jax.tree.map(lambda x, x0: jnp.sum(jnp.square(x - x0)), scaling, first)
        return 0.5 * pull * sum(distance) - chosen.mean()

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def improve(carry: Any, _: None) -> tuple[Any, None]:
        scaling, state = carry
        value, grad = value_and_grad(scaling, state=state)
        updates, state = solver.update(grad, state, scaling, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(scaling, updates), state), None

    (scaling, _), _ = jax.lax.scan(improve, (first, solver.init(first)), length=steps)
    return scaling
