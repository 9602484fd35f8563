"""What the metrics accept: dtypes, shapes, and values where they are known."""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np


def known_values(values: Any) -> np.ndarray | None:
    """The numbers themselves, in float64 where floating; None where they cannot be checked now."""
    if isinstance(values, jax.core.Tracer):
        return None
    if isinstance(values, jax.Array) and not values.is_fully_addressable:
        return None
    array = np.asarray(values)
    return array if np.issubdtype(array.dtype, np.integer) else array.astype(np.float64)


def widest(*dtypes: Any) -> Any:
    """The widest of some floating dtypes, at least float32, whatever the rules of promotion."""
    return max(jnp.dtype(jnp.float32), *map(jnp.dtype, dtypes), key=lambda dtype: dtype.itemsize)


def as_floats(values: Any, name: str) -> jax.Array:
    """An array of float32 or wider, without nan where that is known."""
    array = jnp.asarray(values)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating, not {array.dtype}; convert it first.")
    numbers = known_values(values)
    if numbers is not None and np.isnan(numbers).any():
        raise ValueError(f"{name} holds {int(np.isnan(numbers).sum())} nan of {numbers.size}.")
    return array.astype(widest(array.dtype))


def as_predictions(predictions: Any, from_logits: bool, name: str = "predictions") -> jax.Array:
    """Checks distributions over classes along the last axis; float32 or wider."""
    array = as_floats(predictions, name)
    if array.ndim < 1 or array.shape[-1] < 2 or array.size == 0:
        raise ValueError(
            f"{name} must have two or more classes on the last axis and at least one example, but "
            f"have shape {array.shape}; stack [1 - p, p] for one sigmoid output."
        )
    numbers = known_values(predictions)
    if numbers is None:
        return array
    if from_logits:
        if np.isinf(numbers.max(-1)).any():
            raise ValueError(f"{name}: logits hold inf, or a row of -inf only.")
        return array
    low, high = numbers.min(), numbers.max()
    if low < 0 or high > 1:
        raise ValueError(
            f"{name} must be probabilities in [0, 1], but range over [{low:g}, {high:g}]; "
            "give from_logits=True for logits."
        )
    # Rounding of as many terms as there are classes; 16-bit softmax is off by a few percent.
    tolerance = max(1e-3, 4 * float(jnp.finfo(jnp.asarray(predictions).dtype).eps))
    worst = np.abs(numbers.sum(-1) - 1.0).max()
    if worst > tolerance:
        raise ValueError(
            f"{name} must sum to 1 over the last axis, but a row is off by {worst:g}; "
            "normalize them, or give from_logits=True for logits."
        )
    return array


def as_labels(labels: Any, predictions: jax.Array) -> jax.Array:
    """Checks labels beside predictions [n, classes]; int32."""
    if predictions.ndim != 2:
        raise ValueError(
            f"predictions must have shape [n, classes], not {predictions.shape}; use jax.vmap for "
            "further axes (of an ensemble: mixture_log_probabilities)."
        )
    array = jnp.asarray(labels)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, not {array.dtype}; use argmax(-1) of one-hot.")
    if array.shape != predictions.shape[:1]:
        raise ValueError(
            f"labels must have shape {predictions.shape[:1]} beside predictions of shape "
            f"{predictions.shape}, not {array.shape}."
        )
    numbers = known_values(labels)
    classes = predictions.shape[-1]
    if numbers is not None and (numbers.min() < 0 or numbers.max() >= classes):
        raise ValueError(
            f"labels must be in [0, {classes}), but range over [{numbers.min()}, {numbers.max()}]."
        )
    return array.astype(jnp.int32)


def nan_if_nan(value: jax.Array, *arrays: jax.Array) -> jax.Array:
    """The value, or nan where an array holds one (that could not be checked before)."""
    bad = jnp.stack([jnp.isnan(array).any() for array in arrays]).any()
    return jnp.where(bad, jnp.nan, value)
