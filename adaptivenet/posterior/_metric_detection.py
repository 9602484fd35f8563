"""Uncertainty of ensembles, and how well a score tells two sets apart (see ``metrics``)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import entr, logsumexp

from adaptivenet.posterior._metric_values import as_floats, as_predictions, nan_if_nan, widest


def mixture_log_probabilities(
    members: Any, *, axis: int = 0, from_logits: bool = False
) -> jax.Array:
    """Log of the mean prediction of an ensemble, or of samples of a posterior.

    Args:
      members: [members, ..., classes], probabilities or logits.
      axis: that of the members, not the last.
      from_logits: whether ``members`` are logits.

    Returns:
      Log probabilities without that axis: logits to every function here.

    Raises:
      TypeError, ValueError: dtypes, shapes or values that are none of the above.

    >>> members = jnp.array([[[50.0, 0.0]], [[0.0, 50.0]]])
    >>> jnp.exp(mixture_log_probabilities(members, from_logits=True)).tolist()
    [[0.5, 0.5]]
    """
    logs, place = _member_logs(members, axis, from_logits)
    return logsumexp(logs, axis=place) - jnp.log(jnp.asarray(logs.shape[place], logs.dtype))


def _member_logs(members: Any, axis: int, from_logits: bool) -> tuple[jax.Array, int]:
    array = as_predictions(members, from_logits, "members")
    place = axis + array.ndim if axis < 0 else axis
    if not 0 <= place < array.ndim - 1:
        raise ValueError(
            f"axis={axis} must be that of the members, not that of the classes (the last); the "
            f"shape is {array.shape}."
        )
    return (jax.nn.log_softmax(array) if from_logits else jnp.log(array)), place


def _entropy_of_logs(logs: jax.Array) -> jax.Array:
    return jnp.sum(entr(jnp.exp(logs)), -1)


def predictive_entropy(
    predictions: Any, *, axis: int | None = None, from_logits: bool = False
) -> jax.Array:
    """Entropy of the prediction: total uncertainty.

    Args:
      predictions: [..., classes], probabilities or logits.
      axis: that of an ensemble, whose mean prediction is taken first; None for none.
      from_logits: whether ``predictions`` are logits.

    Returns:
      Nats in [0, log(classes)], without the axis of the ensemble and the last one.

    Raises:
      TypeError, ValueError: as :func:`mixture_log_probabilities`.

    >>> predictive_entropy(jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]]), axis=0).tolist()
    [0.693147...]
    """
    if axis is not None:
        mixed = mixture_log_probabilities(predictions, axis=axis, from_logits=from_logits)
        return _entropy_of_logs(mixed)
    array = as_predictions(predictions, from_logits)
    return _entropy_of_logs(jax.nn.log_softmax(array)) if from_logits else entr(array).sum(-1)


def expected_entropy(members: Any, *, axis: int = 0, from_logits: bool = False) -> jax.Array:
    """Mean entropy of the members of an ensemble: what more data would not take away.

    Args:
      members: [members, ..., classes], probabilities or logits.
      axis: that of the members, not the last.
      from_logits: whether ``members`` are logits.

    Returns:
      Nats, without the axis of the members and the last one.

    Raises:
      TypeError, ValueError: as :func:`mixture_log_probabilities`.

    >>> expected_entropy(jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]])).tolist()
    [0.0]
    """
    logs, place = _member_logs(members, axis, from_logits)
    return jnp.mean(_entropy_of_logs(logs), place)


def mutual_information(members: Any, *, axis: int = 0, from_logits: bool = False) -> jax.Array:
    """Mutual information of label and member (BALD): the members' disagreement.

    Computed as the mean divergence of the members from their mixture, which equals
    ``predictive_entropy - expected_entropy`` and loses less to rounding where they nearly agree.

    Args:
      members: [members, ..., classes], probabilities or logits.
      axis: that of the members, not the last.
      from_logits: whether ``members`` are logits.

    Returns:
      Nats in [0, log(classes)], without the axis of the members and the last one.

    Raises:
      TypeError, ValueError: as :func:`mixture_log_probabilities`.

    References:
      Houlsby et al., "Bayesian active learning for classification and preference learning", 2011
      (arXiv:1112.5745), equation 2.

    >>> mutual_information(jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]])).tolist()
    [0.693147...]
    """
    logs, place = _member_logs(members, axis, from_logits)
    mixed = logsumexp(logs, axis=place, keepdims=True)
    mixed = mixed - jnp.log(jnp.asarray(logs.shape[place], logs.dtype))
    p = jnp.exp(logs)
    # Where a member has probability 0 its term is 0; elsewhere the mixture is positive.
    ratio = jnp.where(p > 0, logs, 0.0) - jnp.where(p > 0, mixed, 0.0)
    return jnp.maximum(jnp.mean(jnp.sum(p * ratio, -1), place), 0.0)


def _two_sets(positives: Any, negatives: Any) -> tuple[jax.Array, jax.Array]:
    sets = []
    for name, scores in (("positives", positives), ("negatives", negatives)):
        array = as_floats(scores, name)
        if array.ndim != 1 or array.size == 0:
            raise ValueError(f"{name} must be scores of shape [n] with n >= 1, not {array.shape}.")
        sets.append(array)
    dtype = widest(sets[0].dtype, sets[1].dtype)
    return sets[0].astype(dtype), sets[1].astype(dtype)


def auroc(positives: Any, negatives: Any) -> jax.Array:
    """Area under the ROC curve: the chance that a positive scores above a negative.

    For the detection of foreign inputs the positives are the scores (entropy, mutual information)
    of the foreign set. Ties count one half, as on the trapezoidal curve.

    Args:
      positives: floating scores [m] of the set that should score high.
      negatives: floating scores [n] of the other.

    Returns:
      Scalar in [0, 1]; 0.5 is chance.

    Raises:
      TypeError, ValueError: other shapes or dtypes, no scores, nan.

    References:
      Hanley and McNeil, "The meaning and use of the area under a ROC curve", Radiology 143, 1982.

    >>> auroc(jnp.array([0.9, 0.5]), jnp.array([0.5, 0.1])).item()
    0.875
    """
    high, low = _two_sets(positives, negatives)
    ordered = jnp.sort(low)
    below = jnp.searchsorted(ordered, high, side="left").astype(high.dtype)
    not_above = jnp.searchsorted(ordered, high, side="right").astype(high.dtype)
    return nan_if_nan(jnp.mean((below + not_above) / (2 * low.size)), high, low)


def average_precision(positives: Any, negatives: Any) -> jax.Array:
    """Area under the precision-recall curve (AUPR) as average precision, a step function.

    Each positive contributes the precision at its own score as threshold; equal scores stand on one
    side together. It depends on the share of positives, which is also the value of chance.

    Args:
      positives: floating scores [m] of the set that should score high.
      negatives: floating scores [n] of the other.

    Returns:
      Scalar in (0, 1].

    Raises:
      TypeError, ValueError: as :func:`auroc`.

    References:
      Davis and Goadrich, "The relationship between precision-recall and ROC curves", ICML 2006,
      on why the curve is not interpolated linearly.

    >>> average_precision(jnp.array([0.9, 0.5]), jnp.array([0.5, 0.1])).item()
    0.833333...
    """
    high, low = _two_sets(positives, negatives)

    def at_least(scores: jax.Array) -> jax.Array:
        rank = jnp.searchsorted(jnp.sort(scores), high, side="left")
        return (scores.size - rank).astype(high.dtype)

    true, false = at_least(high), at_least(low)
    return nan_if_nan(jnp.mean(true / (true + false)), high, low)
