"""How good Gaussian predictions of numbers are (see ``metrics``)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erf

from adaptivenet.posterior._metric_values import as_floats, known_values, nan_if_nan, widest


def _standardized(targets: Any, mean: Any, std: Any) -> tuple[jax.Array, jax.Array]:
    """The residuals in units of std, and std, of the common shape."""
    arrays = [as_floats(x, name) for x, name in ((targets, "targets"), (mean, "mean"))]
    scale = as_floats(std, "std")
    if arrays[0].shape != arrays[1].shape or arrays[0].size == 0:
        raise ValueError(
            f"targets {arrays[0].shape} and mean {arrays[1].shape} must have one shape, not empty."
        )
    if scale.ndim and scale.shape != arrays[0].shape:
        raise ValueError(f"std must be a scalar or have shape {arrays[0].shape}: {scale.shape}.")
    numbers = known_values(std)
    if numbers is not None and not (numbers > 0).all():
        raise ValueError(f"std must be > 0, but the smallest is {numbers.min():g}.")
    dtype = widest(arrays[0].dtype, arrays[1].dtype)
    scale = jnp.broadcast_to(scale, arrays[0].shape).astype(dtype)
    scale = jnp.where(scale > 0, scale, jnp.nan)  # what could not be checked
    return (arrays[0].astype(dtype) - arrays[1].astype(dtype)) / scale, scale


def gaussian_nll(targets: Any, mean: Any, std: Any) -> jax.Array:
    """Mean negative log density of targets under Gaussians.

    Args:
      targets: floating, of any shape.
      mean: of the same shape.
      std: standard deviations > 0, of the same shape or a scalar.

    Returns:
      Scalar, in nats; it depends on the unit of the targets and may be negative.

    Raises:
      TypeError, ValueError: shapes that differ, std <= 0, nan.

    >>> gaussian_nll(jnp.zeros(2), jnp.zeros(2), 1.0).item()
    0.918938...
    """
    z, scale = _standardized(targets, mean, std)
    return jnp.mean(0.5 * jnp.square(z) + jnp.log(scale)) + 0.5 * np.log(2 * np.pi).item()


def gaussian_crps(targets: Any, mean: Any, std: Any) -> jax.Array:
    """Mean continuous ranked probability score of Gaussians.

    Args:
      targets: floating, of any shape.
      mean: of the same shape.
      std: standard deviations > 0, of the same shape or a scalar.

    Returns:
      Scalar >= 0, in the unit of the targets; for std -> 0 it is the mean absolute error.

    Raises:
      TypeError, ValueError: as :func:`gaussian_nll`.

    References:
      Gneiting and Raftery, "Strictly proper scoring rules, prediction, and estimation", JASA 102,
      2007, section 4.2.

    >>> gaussian_crps(jnp.zeros(2), jnp.zeros(2), 1.0).item()
    0.233694...
    """
    z, scale = _standardized(targets, mean, std)
    density = jnp.exp(-0.5 * jnp.square(z)) / np.sqrt(2 * np.pi).item()
    centred = erf(z / np.sqrt(2).item())  # 2 Phi(z) - 1
    return jnp.mean(scale * (z * centred + 2 * density - 1 / np.sqrt(np.pi).item()))


def interval_coverage(targets: Any, mean: Any, std: Any, level: Any = 0.95) -> jax.Array:
    """Share of the targets inside the central interval of their Gaussians.

    Args:
      targets: floating, of any shape.
      mean: of the same shape.
      std: standard deviations > 0, of the same shape or a scalar.
      level: nominal coverage in (0, 1); a scalar, or an array of several.

    Returns:
      Coverage, of the shape of ``level``; equal to it where the Gaussians are right.

    Raises:
      TypeError, ValueError: as :func:`gaussian_nll`; a level outside (0, 1).

    >>> interval_coverage(jnp.array([0.0, 3.0]), jnp.zeros(2), 1.0, 0.95).item()
    0.5
    """
    z, _ = _standardized(targets, mean, std)
    levels = as_floats(level, "level").astype(z.dtype)
    numbers = known_values(level)
    if numbers is not None and not ((numbers > 0) & (numbers < 1)).all():
        raise ValueError(f"level must be in (0, 1), not {level}; 0.95 for 95 %.")
    inside = jnp.abs(erf(z.ravel() / np.sqrt(2).item())) <= levels[..., None]
    share = jnp.mean(inside.astype(z.dtype), -1)
    return nan_if_nan(share, z)
