"""What every statistic asks of its input: numbers, none of them missing, and enough of them."""

from __future__ import annotations

from typing import Any

import numpy as np


def as_numbers(values: Any, name: str, *, least: int = 1, dimensions: int = 1) -> np.ndarray:
    """Checks values and gives them back in double precision.

    Args:
      values: array of numbers.
      name: what messages call it.
      least: fewest rows.
      dimensions: how many axes it must have.

    Returns:
      float64 array.

    Raises:
      ValueError: another number of axes, too few rows, or values that are nan or infinite; they
        are never left out silently.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != dimensions:
        raise ValueError(f"{name} must have {dimensions} axes, got shape {array.shape}.")
    bad = int(np.sum(~np.isfinite(array)))
    if bad:
        raise ValueError(
            f"{name} holds {bad} values of {array.size} that are nan or infinite; "
            "decide what they mean (an exclusion rule, a failed seed) before testing."
        )
    if len(array) < least:
        raise ValueError(f"{name} holds {len(array)} values; at least {least} are needed.")
    return array


def check_share(value: float, name: str) -> float:
    """Refuses a number outside (0, 1)."""
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie between 0 and 1, not {value:g}.")
    return float(value)


def subsample(values: np.ndarray, maximum: int, seed: int) -> np.ndarray:
    """At most ``maximum`` rows, drawn without replacement, in their order."""
    if maximum < 1:
        raise ValueError(f"maximum must be at least 1, not {maximum}.")
    if len(values) <= maximum:
        return values
    chosen = np.random.default_rng(seed).choice(len(values), maximum, replace=False)
    return values[np.sort(chosen)]
