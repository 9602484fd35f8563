"""How good predictions and their uncertainties are: likelihood, calibration, detection, intervals.

Pure functions on arrays, safe under jit and vmap. Classification takes ``predictions`` of shape
[n, classes]: probabilities, or logits with ``from_logits=True`` (log probabilities are logits too).
A network with one sigmoid output is two classes: stack ``[1 - p, p]``. Everything is computed in
float32 or wider; logarithms are natural (nats).

Shapes are checked always, values where they are known: under jit a wrong label gives nan.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet.posterior._metric_detection import (
    auroc,
    average_precision,
    expected_entropy,
    mixture_log_probabilities,
    mutual_information,
    predictive_entropy,
)
from adaptivenet.posterior._metric_regression import gaussian_crps, gaussian_nll, interval_coverage
from adaptivenet.posterior._metric_values import as_labels, as_predictions

Binning = Literal["width", "mass"]

__all__ = [
    "Reliability",
    "auroc",
    "average_precision",
    "brier",
    "classwise_calibration_error",
    "expected_calibration_error",
    "expected_entropy",
    "gaussian_crps",
    "gaussian_nll",
    "interval_coverage",
    "log_likelihood",
    "maximum_calibration_error",
    "mixture_log_probabilities",
    "mutual_information",
    "negative_log_likelihood",
    "predictive_entropy",
    "reliability",
]


class Reliability(NamedTuple):
    """What a reliability diagram shows.

    Attributes:
      count: int32 [bins], examples in each bin.
      confidence: float [bins], their mean confidence; nan where there are none.
      accuracy: float [bins], the share of them that is right; nan where there are none.
    """

    count: jax.Array
    confidence: jax.Array
    accuracy: jax.Array


def log_likelihood(predictions: Any, labels: Any, *, from_logits: bool = False) -> jax.Array:
    """Log probability of each label.

    Args:
      predictions: [n, classes], probabilities or logits.
      labels: integers [n].
      from_logits: whether ``predictions`` are logits.

    Returns:
      [n], in nats. A probability of 0 gives -inf, without clipping; logits do not underflow.

    Raises:
      TypeError, ValueError: dtypes, shapes or values that are none of the above.

    >>> log_likelihood(jnp.log(jnp.array([[0.5, 0.5]])), [1], from_logits=True).tolist()
    [-0.693147...]
    """
    array = as_predictions(predictions, from_logits)
    index = as_labels(labels, array)
    logs = jax.nn.log_softmax(array) if from_logits else jnp.log(array)
    chosen = jnp.take_along_axis(logs, jnp.maximum(index, 0)[:, None], 1, mode="fill")[:, 0]
    return jnp.where(index < 0, jnp.nan, chosen)


def negative_log_likelihood(
    predictions: Any, labels: Any, *, from_logits: bool = False
) -> jax.Array:
    """Mean negative log likelihood (log loss, cross-entropy).

    Args:
      predictions: [n, classes], probabilities or logits.
      labels: integers [n].
      from_logits: whether ``predictions`` are logits.

    Returns:
      Scalar, in nats, >= 0; inf where a label has probability 0.

    Raises:
      TypeError, ValueError: as :func:`log_likelihood`.

    >>> negative_log_likelihood(jnp.array([[0.25, 0.75], [0.5, 0.5]]), [1, 0]).item()
    0.490414...
    """
    return -jnp.mean(log_likelihood(predictions, labels, from_logits=from_logits))


def brier(predictions: Any, labels: Any, *, from_logits: bool = False) -> jax.Array:
    """Brier score of several classes: mean squared distance to the one-hot label.

    Args:
      predictions: [n, classes], probabilities or logits.
      labels: integers [n].
      from_logits: whether ``predictions`` are logits.

    Returns:
      Scalar in [0, 2]. (For two classes it is twice the score of the positive one alone.)

    Raises:
      TypeError, ValueError: as :func:`log_likelihood`.

    References:
      Brier, "Verification of forecasts expressed in terms of probability", 1950, equation 2.

    >>> brier(jnp.array([[0.25, 0.75], [0.5, 0.5]]), [1, 0]).item()
    0.3125
    """
    p, index = _probabilities(predictions, labels, from_logits)
    one_hot = index[:, None] == jnp.arange(p.shape[-1])
    score = jnp.mean(jnp.sum(jnp.square(p - one_hot.astype(p.dtype)), -1))
    return jnp.where(jnp.all(one_hot.any(-1)), score, jnp.nan)


def _probabilities(predictions: Any, labels: Any, from_logits: bool) -> tuple[jax.Array, jax.Array]:
    array = as_predictions(predictions, from_logits)
    return (jax.nn.softmax(array) if from_logits else array), as_labels(labels, array)


def _confidences(
    predictions: Any, labels: Any, from_logits: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    p, index = _probabilities(predictions, labels, from_logits)
    valid = jnp.all((index >= 0) & (index < p.shape[-1]))
    return p.max(-1), (p.argmax(-1) == index).astype(p.dtype), valid


def _bin_of(confidence: jax.Array, bins: int, binning: Binning) -> jax.Array:
    """Index of each example's bin, int32 [n]."""
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins must be an integer >= 1, not {bins!r}.")
    if binning == "width":
        # Bin b is (b / bins, (b + 1) / bins]; 0 belongs to the first.
        edges = jnp.asarray(np.arange(1, bins) / bins, confidence.dtype)
        return jnp.searchsorted(edges, confidence, side="left").astype(jnp.int32)
    if binning == "mass":
        n = confidence.shape[0]
        if n * bins >= 2**31:
            raise ValueError(f"{n} examples in {bins} bins overflow 32 bits; use fewer bins.")
        # The rank of the first equal one: equal confidences share a bin, in whatever order.
        rank = jnp.searchsorted(jnp.sort(confidence), confidence, side="left").astype(jnp.int32)
        return rank * bins // n
    raise ValueError(f"binning must be 'width' or 'mass', not {binning!r}.")


def _per_bin(values: jax.Array, index: jax.Array, bins: int) -> jax.Array:
    """Sums of values by bin: a masked sum, which unlike a scatter is the same in every run."""
    inside = index[:, None] == jnp.arange(bins, dtype=jnp.int32)
    return jnp.sum(jnp.where(inside, values[:, None], jnp.zeros((), values.dtype)), 0)


def _weighted_gap(confidence: jax.Array, right: jax.Array, bins: int, binning: Binning) -> Any:
    index = _bin_of(confidence, bins, binning)
    return jnp.sum(jnp.abs(_per_bin(right - confidence, index, bins))) / confidence.shape[0]


def reliability(
    predictions: Any,
    labels: Any,
    *,
    bins: int = 15,
    binning: Binning = "width",
    from_logits: bool = False,
) -> Reliability:
    """The table behind a reliability diagram; the confidence is the largest probability.

    Args:
      predictions: [n, classes], probabilities or logits.
      labels: integers [n].
      bins: their number.
      binning: ``width``: bin b holds confidences in (b / bins, (b + 1) / bins]. ``mass``: n / bins
        examples each, by rank; equal confidences share the bin of the first of them.
      from_logits: whether ``predictions`` are logits.

    Returns:
      The table.

    Raises:
      TypeError, ValueError: as :func:`log_likelihood`; a bad number or kind of bins.

    >>> reliability(jnp.array([[0.25, 0.75], [0.5, 0.5]]), [1, 1], bins=2).count.tolist()
    [1, 1]
    """
    confidence, right, valid = _confidences(predictions, labels, from_logits)
    index = _bin_of(confidence, bins, binning)
    count = _per_bin(jnp.ones(index.shape, jnp.int32), index, bins)
    size = jnp.where(valid & (count > 0), count.astype(confidence.dtype), jnp.nan)
    return Reliability(
        count, _per_bin(confidence, index, bins) / size, _per_bin(right, index, bins) / size
    )


def expected_calibration_error(
    predictions: Any,
    labels: Any,
    *,
    bins: int = 15,
    binning: Binning = "width",
    from_logits: bool = False,
) -> jax.Array:
    """Expected calibration error (ECE); with ``binning="mass"`` the adaptive one.

    The mean over bins, weighted by their counts, of the distance between accuracy and confidence.
    It depends on the bins, is biased upward on few examples, and ranks models fairly only after
    temperature scaling (:mod:`adaptivenet.posterior.calibration`).

    Args:
      predictions: [n, classes], probabilities or logits.
      labels: integers [n].
      bins: their number.
      binning: as for :func:`reliability`.
      from_logits: whether ``predictions`` are logits.

    Returns:
      Scalar in [0, 1].

    Raises:
      TypeError, ValueError: as :func:`reliability`.

    References:
      Guo et al., "On calibration of modern neural networks", ICML 2017, equation 3; equal mass:
      Nixon et al., "Measuring calibration in deep learning", 2019 (arXiv:1904.01685).

    >>> expected_calibration_error(jnp.array([[0.25, 0.75], [0.25, 0.75]]), [1, 0]).item()
    0.25
    """
    confidence, right, valid = _confidences(predictions, labels, from_logits)
    return jnp.where(valid, _weighted_gap(confidence, right, bins, binning), jnp.nan)


def classwise_calibration_error(
    predictions: Any,
    labels: Any,
    *,
    bins: int = 15,
    binning: Binning = "width",
    from_logits: bool = False,
) -> jax.Array:
    """Class-wise ECE: every probability is held to its word, not only the largest.

    Args:
      predictions: [n, classes], probabilities or logits.
      labels: integers [n].
      bins: their number, for each class.
      binning: as for :func:`reliability`, by the probability of the class.
      from_logits: whether ``predictions`` are logits.

    Returns:
      Scalar in [0, 1], the mean over classes.

    Raises:
      TypeError, ValueError: as :func:`reliability`.

    References:
      Kull et al., "Beyond temperature scaling", NeurIPS 2019, section 2 (static calibration error
      in Nixon et al. 2019; with ``binning="mass"`` their adaptive one).

    >>> classwise_calibration_error(jnp.array([[0.25, 0.75], [0.25, 0.75]]), [1, 0]).item()
    0.25
    """
    p, index = _probabilities(predictions, labels, from_logits)

    def of(k: jax.Array) -> jax.Array:
        return _weighted_gap(p[:, k], (index == k).astype(p.dtype), bins, binning)

    error = jnp.mean(jax.lax.map(of, jnp.arange(p.shape[-1], dtype=jnp.int32)))
    valid = jnp.all((index >= 0) & (index < p.shape[-1]))
    return jnp.where(valid, error, jnp.nan)


def maximum_calibration_error(
    predictions: Any,
    labels: Any,
    *,
    bins: int = 15,
    binning: Binning = "width",
    from_logits: bool = False,
) -> jax.Array:
    """Maximum calibration error (MCE): the largest gap of any bin, however few it holds.

    Args:
      predictions: [n, classes], probabilities or logits.
      labels: integers [n].
      bins: their number.
      binning: as for :func:`reliability`.
      from_logits: whether ``predictions`` are logits.

    Returns:
      Scalar in [0, 1].

    Raises:
      TypeError, ValueError: as :func:`reliability`.

    References:
      Guo et al., "On calibration of modern neural networks", ICML 2017, equation 5.

    >>> maximum_calibration_error(jnp.array([[0.25, 0.75], [0.25, 0.75]]), [1, 0]).item()
    0.25
    """
    confidence, right, valid = _confidences(predictions, labels, from_logits)
    index = _bin_of(confidence, bins, binning)
    count = jnp.maximum(_per_bin(jnp.ones_like(confidence), index, bins), 1.0)
    gap = jnp.abs(_per_bin(right - confidence, index, bins)) / count
    return jnp.where(valid, gap.max(), jnp.nan)
