"""Where an element can come from: primitives that move or sum, on arrays of bool.

An element of the result is True if any element that it is made of is. In numpy where that is
short: a primitive called on its own is compiled for every new shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from adaptivenet.pruning.tracing.tape import Step

Masks = Sequence[np.ndarray]


def moved(step: Step, masks: Masks, rest: Sequence[Any] = ()) -> list[np.ndarray]:
    """What becomes of masks.

    Args:
      step: an operation that moves or sums elements, or multiplies and sums them: then a term
        counts where both factors are True.
      masks: bool, in the place of its first operands.
      rest: its other operands, such as indices.

    Returns:
      bool, one array a result.
    """
    if step.name in NUMPY:
        return [np.asarray(found, bool) for found in NUMPY[step.name](step.eqn.params, masks)]
    params = dict(step.eqn.params)
    if "preferred_element_type" in params:
        params["preferred_element_type"] = jnp.dtype("float32")
    operands = [jnp.asarray(mask, jnp.float32) for mask in masks]
    found = step.eqn.primitive.bind(*operands, *rest, **params)
    found = found if step.eqn.primitive.multiple_results else [found]
    return [np.asarray(array) > 0 for array in found]


def _broadcast(p: Any, masks: Masks) -> Masks:
    shape = [1] * len(p["shape"])
    for place, to in enumerate(p["broadcast_dimensions"]):
        shape[to] = masks[0].shape[place]
    return [np.broadcast_to(masks[0].reshape(shape), p["shape"])]


def _slice(p: Any, masks: Masks) -> Masks:
    strides = p["strides"] or (1,) * masks[0].ndim
    bounds = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    return [masks[0][tuple(slice(*bound) for bound in bounds)]]


def _split(p: Any, masks: Masks) -> Masks:
    return np.split(masks[0], np.cumsum(p["sizes"])[:-1], axis=p["axis"])


def _pad(p: Any, masks: Masks) -> Masks:
    low, high, inner = zip(*p["padding_config"], strict=True) if masks[0].ndim else ((), (), ())
    whole = [
        n + max(n - 1, 0) * i + a + b
        for n, a, b, i in zip(masks[0].shape, low, high, inner, strict=True)
    ]
    found = np.full(whole, bool(masks[1].any()))
    places = [
        np.arange(n) * (i + 1) + a for n, a, i in zip(masks[0].shape, low, inner, strict=True)
    ]
    inside = [(p >= 0) & (p < n) for p, n in zip(places, whole, strict=True)]
    kept = masks[0][np.ix_(*inside)] if masks[0].ndim else masks[0]
    found[np.ix_(*(p[i] for p, i in zip(places, inside, strict=True)))] = kept
    return [found]


def _cumsum(p: Any, masks: Masks) -> Masks:
    mask = np.flip(masks[0], p["axis"]) if p["reverse"] else masks[0]
    found = np.logical_or.accumulate(mask, axis=p["axis"])
    return [np.flip(found, p["axis"]) if p["reverse"] else found]


def _product(p: Any, masks: Masks) -> Masks:
    """``dot_general``: batch dimensions, those of the left, those of the right."""
    (lc, rc), (lb, rb) = p["dimension_numbers"]
    left, right = masks
    lf = [d for d in range(left.ndim) if d not in (*lc, *lb)]
    rf = [d for d in range(right.ndim) if d not in (*rc, *rb)]
    batch = [left.shape[d] for d in lb]
    one = left.transpose(*lb, *lf, *lc).reshape(*batch, -1, _size(left, lc))
    other = right.transpose(*rb, *rc, *rf).reshape(*batch, _size(right, rc), -1)
    # Counts stay exact in float32 as far as zero and not zero go.
    found = np.matmul(one.astype(np.float32), other.astype(np.float32)) > 0
    return [found.reshape(*batch, *(left.shape[d] for d in lf), *(right.shape[d] for d in rf))]


def _size(mask: np.ndarray, dims: Sequence[int]) -> int:
    return int(np.prod([mask.shape[d] for d in dims], dtype=np.int64))


def _reshape(p: Any, masks: Masks) -> Masks:
    if p.get("dimensions") is not None:
        masks = [np.transpose(masks[0], p["dimensions"])]
    return [masks[0].reshape(p["new_sizes"])]


NUMPY: dict[str, Callable[[Any, Masks], Any]] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": lambda p, masks: [np.concatenate(masks, axis=p["dimension"])],
    "cumsum": _cumsum,
    "dot_general": _product,
    "expand_dims": lambda p, masks: [np.expand_dims(masks[0], tuple(p["dimensions"]))],
    "pad": _pad,
    "reduce_max": lambda p, masks: [masks[0].any(axis=tuple(p["axes"]))],
    "reduce_sum": lambda p, masks: [masks[0].any(axis=tuple(p["axes"]))],
    "reshape": _reshape,
    "rev": lambda p, masks: [np.flip(masks[0], p["dimensions"])],
    "slice": _slice,
    "split": _split,
    "squeeze": lambda p, masks: [np.squeeze(masks[0], tuple(p["dimensions"]))],
    "transpose": lambda p, masks: [np.transpose(masks[0], p["permutation"])],
}
