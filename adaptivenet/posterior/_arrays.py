"""Precision, known values, and units: what the modules of this folder share."""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import jax.numpy as jnp

Axes = int | tuple[int, ...]


def wide(leaf: Any) -> jax.Array:
    """An array in the precision that is computed in: float64 stays, else float32."""
    leaf = jnp.asarray(leaf)
    return leaf.astype(wide_dtype(leaf.dtype))


def wide_dtype(dtype: Any) -> Any:
    """The dtype that is computed in, and that a state is kept in, beside leaves of a dtype."""
    return jnp.dtype("float64") if dtype == jnp.dtype("float64") else jnp.dtype("float32")


def known(*values: Any) -> bool:
    """Whether values are there already, so that they can be checked."""
    return not any(isinstance(value, jax.core.Tracer) for value in values)


def unit_shape(shape: tuple[int, ...], axis: Axes, name: str) -> tuple[int, ...]:
    """The shape of one number a unit, beside a leaf: axes that are not of units have length 1."""
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if any(not -len(shape) <= a < len(shape) for a in axes) or not axes:
        raise ValueError(
            f"leaf {name!r} of shape {shape} has no axis {axis}: give the axis of its units, or "
            "leave the leaf out with select=."
        )
    own = {a % len(shape) for a in axes}
    return tuple(n if place in own else 1 for place, n in enumerate(shape))
