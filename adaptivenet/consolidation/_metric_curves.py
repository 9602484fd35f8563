"""What happens within and between tasks: stability gaps and plasticity (see ``metrics``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import numpy as np


class Gap(NamedTuple):
    """What :func:`stability_gap` found; nan for tasks that were not learnt yet.

    Attributes:
      drop: [T, T], ``drop[t, k]``: accuracy on task k before task t was trained, minus the lowest
        while it was.
      recovered: [T, T], accuracy at the end of task t minus that lowest.
    """

    drop: np.ndarray
    recovered: np.ndarray


def stability_gap(curves: Any, ends: Sequence[int]) -> Gap:
    """The worst drop of earlier tasks within the training of each, and what of it comes back.

    Args:
      curves: [N, K], accuracy on each task at every evaluation during training.
      ends: T ascending integers: row of the last evaluation of each task's training.

    Returns:
      The drops; ``np.nanmax(gap.drop)`` is the worst.

    Raises:
      ValueError: shapes or ends do not fit, or an entry that is needed is missing.

    References:
      De Lange et al., "Continual evaluation for lifelong learning: identifying the stability gap",
      ICLR 2023, arXiv:2205.13452.

    >>> gap = stability_gap([[1.0, 0.0], [0.25, 0.5], [0.75, 1.0]], [0, 2])
    >>> gap.drop[1, 0].item(), gap.recovered[1, 0].item()
    (0.75, 0.5)
    """
    table, ends = _curves(curves, ends)
    drop, recovered = (np.full((len(ends), len(ends)), np.nan) for _ in range(2))
    for t in range(1, len(ends)):
        window = table[ends[t - 1] : ends[t] + 1, :t]
        low = window[1:].min(axis=0)
        drop[t, :t], recovered[t, :t] = window[0] - low, window[-1] - low
    return Gap(drop, recovered)


def min_accuracy(curves: Any, ends: Sequence[int]) -> float:
    """min-ACC: mean over earlier tasks of the lowest accuracy ever seen after they were learnt.

    Args:
      curves: [N, K], as for :func:`stability_gap`; only tasks before the last are read.
      ends: as for :func:`stability_gap`; at least two.

    Returns:
      The mean.

    Raises:
      ValueError: as :func:`stability_gap`, or there is one task only.

    References:
      De Lange et al., ICLR 2023: average minimum accuracy.

    >>> min_accuracy([[1.0, 0.0], [0.25, 0.5], [0.75, 1.0]], [0, 2])
    0.25
    """
    table, ends = _curves(curves, ends)
    if len(ends) < 2:
        raise ValueError("min-ACC needs two tasks or more: it is over the tasks before the last.")
    lows = [table[end + 1 : ends[-1] + 1, k].min() for k, end in enumerate(ends[:-1])]
    return float(np.mean(lows))


def worst_case_accuracy(curves: Any, ends: Sequence[int]) -> float:
    """WC-ACC: the last task's final accuracy and, for the others, their :func:`min_accuracy`.

    Args:
      curves: as for :func:`stability_gap`.
      ends: as for :func:`stability_gap`; at least two.

    Returns:
      ``final / T + (1 - 1 / T) min-ACC``.

    Raises:
      ValueError: as :func:`min_accuracy`.

    References:
      De Lange et al., ICLR 2023: worst-case accuracy.

    >>> worst_case_accuracy([[1.0, 0.0], [0.25, 0.5], [0.75, 1.0]], [0, 2])
    0.625
    """
    low = min_accuracy(curves, ends)
    table, ends = _curves(curves, ends)
    share = 1.0 / len(ends)
    return float(share * table[ends[-1], len(ends) - 1] + (1.0 - share) * low)


def windowed_forgetting(curve: Any, window: int) -> float:
    """The largest drop of a curve within a window of evaluations.

    Args:
      curve: [N], accuracy on one task at every evaluation.
      window: number of consecutive evaluations, at least 2.

    Returns:
      ``max(curve[m] - curve[n])`` over ``m < n < m + window``; below zero where it only rises (the
      authors' code has zero there).

    Raises:
      ValueError: the curve is no vector of two or more, holds nan, or the window is below 2.

    References:
      De Lange et al., ICLR 2023: windowed forgetting.

    >>> windowed_forgetting([1.0, 0.75, 0.25, 1.0], 2)
    0.5
    """
    values = _curve(curve, "curve")
    if len(values) < 2 or window < 2:
        raise ValueError(
            f"windowed forgetting needs two evaluations in a window, not {len(values)} in all and "
            f"a window of {window}."
        )
    lags = range(1, min(window, len(values)))
    return float(max(np.max(values[:-lag] - values[lag:]) for lag in lags))


def plasticity(accuracy: Any, fresh: Any) -> np.ndarray | np.floating:
    """What a network reaches on a new task, over what a fresh network reaches on it.

    Args:
      accuracy: [...], of the network with a past, after a given training.
      fresh: [...], of newly initialised ones after the same training.

    Returns:
      The ratio; 1 where nothing of the ability to learn was lost.

    Raises:
      ValueError: shapes do not broadcast, an accuracy is not finite, or a fresh one not positive.

    References:
      Dohare et al., "Loss of plasticity in deep continual learning", Nature 632 (2024), for the
      comparison with fresh networks.

    >>> float(plasticity(0.45, 0.9))
    0.5
    """
    old, new = measured(accuracy, "accuracy"), measured(fresh, "fresh")
    if not (np.isfinite(old).all() and np.isfinite(new).all() and (new > 0).all()):
        raise ValueError("plasticity needs finite accuracies, and positive ones of fresh networks.")
    return np.divide(old, new)


def steps_to(curve: Any, target: float) -> float:
    """The number of evaluations until a curve reaches a target: 1 if the first does.

    Args:
      curve: [N], accuracy at every evaluation.
      target: accuracy to reach.

    Returns:
      The number; inf where it is not reached.

    Raises:
      ValueError: the curve is no vector, or holds nan.

    >>> steps_to([0.1, 0.5, 0.9], 0.5)
    2.0
    """
    reached = _curve(curve, "curve") >= target
    return float(np.argmax(reached) + 1) if reached.any() else float("inf")


def plasticity_in_steps(curve: Any, fresh: Any, target: float) -> float:
    """How many evaluations a fresh network needs to a target, over those of one with a past.

    Args:
      curve: [N], accuracies of the network with a past while it learns the task.
      fresh: [M], those of a newly initialised one.
      target: accuracy to reach; the fresh network must.

    Returns:
      The ratio: below 1 where the past slows learning, 0 where the target is not reached, above 1
      where the past helps.

    Raises:
      ValueError: a curve is no vector or holds nan, or the fresh network misses the target.

    >>> plasticity_in_steps([0.1, 0.2, 0.3, 0.6], [0.3, 0.7], 0.5)
    0.5
    """
    steps = steps_to(fresh, target)
    if np.isinf(steps):
        raise ValueError(f"the fresh network does not reach {target}: choose a lower target.")
    return steps / steps_to(curve, target)


def measured(values: Any, name: str) -> np.ndarray:
    """Numbers in float64; refuses traced ones."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values)):
        raise TypeError(
            f"{name} is traced; these metrics are of measured numbers, in float64: return the "
            "accuracies from the jitted function and compute them outside."
        )
    return np.asarray(values, np.float64)


def _curve(values: Any, name: str) -> np.ndarray:
    array = measured(values, name)
    if array.ndim != 1 or array.size == 0 or np.isnan(array).any():
        raise ValueError(
            f"{name} must be a vector of accuracies without nan, not of shape {array.shape}"
            + (f" with {int(np.isnan(array).sum())} nan." if array.ndim == 1 else ".")
        )
    return array


def _curves(curves: Any, ends: Sequence[int]) -> tuple[np.ndarray, list[int]]:
    table, places = measured(curves, "curves"), [int(end) for end in ends]
    if table.ndim != 2 or not 1 <= len(places) <= table.shape[1]:
        raise ValueError(
            f"curves must have shape [evaluations, tasks] with a column for each of "
            f"{len(places)} tasks in ends=, not {table.shape}."
        )
    if any(b <= a for a, b in zip([-1, *places], places, strict=False)) or (
        places[-1] >= len(table)
    ):
        raise ValueError(
            f"ends= must be ascending rows of curves= (0 to {len(table) - 1}), the last "
            f"evaluation of each task, not {places}."
        )
    for k, end in enumerate(places):
        gone = np.flatnonzero(np.isnan(table[end : places[-1] + 1, k]))
        if len(gone):
            raise ValueError(
                f"curves[{end + gone[0]}, {k}] is nan: a task must be tested at every evaluation "
                "from the end of its training on."
            )
    return table, places
