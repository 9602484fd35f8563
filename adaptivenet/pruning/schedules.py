"""Schedules: what an event asks for at a step, and when events are due.

A schedule is data: its rates and targets may be traced arrays, so that ``vmap`` runs a population
over sparsities in one program. ``step`` counts completed optimizer updates. A plain function of the
step, or a number, is accepted wherever a schedule is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from adaptivenet.counts import Share, as_share
from adaptivenet.pruning.demands import AtLeast, Demand, OfAlive, Sparsity, as_demand

__all__ = [
    "Schedule",
    "as_schedule",
    "constant",
    "cubic",
    "linear",
    "one_shot",
    "percentile",
    "polynomial",
    "threshold",
]

Number = Any  # a Python number, or a traced scalar


def known(value: Any) -> bool:
    """Tells whether a value can be checked now (it is not traced)."""
    return not isinstance(value, jax.core.Tracer)


def check_sparsity(value: Number, name: str) -> None:
    """Refuses a sparsity outside [0, 1), where its value is known."""
    if isinstance(value, str | None):
        raise TypeError(f"{name} must be a number in [0, 1), not {value!r}.")
    if known(value):
        for number in np.ravel(np.asarray(value, np.float64)):
            if not (math.isfinite(number) and 0 <= number < 1):
                raise ValueError(
                    f"{name} must be a sparsity in [0, 1), not {number:g}; "
                    "0.95 keeps 5 % of the synapses."
                )


def largest(*values: Number) -> float | None:
    """The largest of some numbers, None where one of them is not known."""
    if not all(map(known, values)):
        return None
    return max(float(np.max(np.asarray(value, np.float64))) for value in values)


def check_window(start: Number, end: Number | None) -> None:
    """Refuses a window that begins before 0 or ends before it begins."""
    if known(start) and np.any(np.asarray(start) < 0):
        raise ValueError(f"start must be a step >= 0, not {start}.")
    if end is not None and known(start) and known(end) and np.any(np.asarray(end) < start):
        raise ValueError(f"end={end} comes before start={start}.")


class Schedule:
    """Base of all schedules: what is asked for at a step, and when.

    Attributes:
      may_grow: whether the target may ever ask for more synapses than are alive; where it cannot,
        events skip the search for synapses to wake.
      start: first step at which events may happen.
      end: last one, or None.

    >>> class Half(Schedule):
    ...     def __call__(self, step):
    ...         return jnp.float32(0.5)
    >>> Half().demand(jnp.int32(3), (), {})[0].value().item()
    0.5
    """

    may_grow: bool = True
    start: Number = 0
    end: Number | None = None

    def __call__(self, step: Any) -> Any:
        """The value asked for at a step: a sparsity, share or threshold (float32 scalar)."""
        raise NotImplementedError

    def peak(self) -> Number | None:
        """The largest sparsity that it is bound to ask for; None where that is not known."""
        return None

    def init(self) -> Any:
        """State of a closed-loop schedule; open-loop ones have none."""
        return ()

    def demand(self, step: Any, state: Any, signals: Mapping[str, Any]) -> tuple[Demand, Any]:
        """What an event at this step asks for, and the next state."""
        del signals
        return as_demand(self(step)), state

    def due(self, step: Any, every: Any, ongoing: bool = False) -> jax.Array:
        """Whether an in-step event happens at this step.

        Args:
          step: number of updates completed with this one, from 1.
          every: steps between events.
          ongoing: keep on after ``end`` (a regrowth rule has work to do there).

        Returns:
          Scalar bool. The last step of the window is always due, so that a target is reached
          whatever ``every`` is (a window that ends at 0 ends with the first update).
        """
        step = jnp.asarray(step, jnp.int32)
        since = step - jnp.asarray(self.start, jnp.int32)
        turn = (since >= 0) & (since % jnp.asarray(every, jnp.int32) == 0)
        if self.end is None:
            return turn
        end = jnp.maximum(jnp.asarray(self.end, jnp.int32), 1)
        return (step == end) | (turn if ongoing else turn & (step <= end))


@dataclass(frozen=True, eq=False, kw_only=True)
class _Polynomial(Schedule):
    final: Number
    start: Number
    end: Number
    initial: Number
    power: Number
    may_grow: bool

    def peak(self) -> Number | None:
        return largest(self.initial, self.final)

    def _fraction_left(self, step: Any) -> jax.Array:
        start = jnp.asarray(self.start).astype(jnp.float32)
        span = jnp.asarray(self.end).astype(jnp.float32) - start
        done = jnp.asarray(step).astype(jnp.float32) - start
        left = 1.0 - jnp.clip(done / jnp.maximum(span, 1.0), 0.0, 1.0)
        return jnp.power(left, jnp.asarray(self.power).astype(jnp.float32))

    def __call__(self, step: Any) -> jax.Array:
        step = jnp.asarray(step)
        initial = jnp.asarray(self.initial).astype(jnp.float32)
        final = jnp.asarray(self.final).astype(jnp.float32)
        value = final + (initial - final) * self._fraction_left(step)
        value = jnp.where(step >= jnp.asarray(self.end).astype(step.dtype), final, value)
        before = step < jnp.asarray(self.start).astype(step.dtype)
        return jnp.where(before, jnp.float32(0), value)

    def demand(self, step: Any, state: Any, signals: Mapping[str, Any]) -> tuple[Demand, Any]:
        # The end point is exact (64 bits); between the ends float32 decides.
        ended = jnp.asarray(step) >= jnp.asarray(self.end).astype(jnp.asarray(step).dtype)
        limbs = jnp.where(ended, as_share(self.final).limbs, as_share(self(step)).limbs)
        return Sparsity(Share(limbs)), state


def polynomial(
    final: Number, start: Number, end: Number, *, initial: Number = 0.0, power: Number = 3.0
) -> Schedule:
    """Sparsity that follows a polynomial from ``initial`` at ``start`` to ``final`` at ``end``.

    ``s(t) = final + (initial - final) * (1 - (t - start) / (end - start)) ** power``; 0 before
    ``start``, ``final`` from ``end`` on.

    Args:
      final: sparsity from step ``end`` on, in [0, 1).
      start: step at which pruning begins.
      end: step at which ``final`` is reached.
      initial: sparsity at ``start``.
      power: the exponent; above 1 prunes fast first and slowly later.

    Returns:
      The schedule.

    Raises:
      ValueError: a sparsity outside [0, 1), a power that is not positive, or ``end`` before
        ``start``.

    References:
      Zhu and Gupta, "To prune, or not to prune", arXiv:1710.01878, equation 1 (power 3).

    >>> polynomial(0.9, 0, 10, power=1.0)(5).item()
    0.44999998807907104
    """
    check_sparsity(final, "final")
    check_sparsity(initial, "initial")
    check_window(start, end)
    if known(power) and not np.all(np.asarray(power) > 0):
        raise ValueError(f"power must be positive, not {power}.")
    grows = not (known(initial) and not np.any(np.asarray(initial))) and not (
        known(initial) and known(final) and np.all(np.asarray(initial) <= np.asarray(final))
    )
    return _Polynomial(
        final=final, start=start, end=end, initial=initial, power=power, may_grow=grows
    )


def cubic(final: Number, start: Number, end: Number, *, initial: Number = 0.0) -> Schedule:
    """Sparsity along a cubic: fast while synapses abound, slow towards the end.

    Args:
      final: sparsity from step ``end`` on, in [0, 1).
      start: step at which pruning begins.
      end: step at which ``final`` is reached.
      initial: sparsity at ``start``.

    Returns:
      The schedule.

    Raises:
      ValueError: as :func:`polynomial`.

    References:
      Zhu and Gupta, "To prune, or not to prune", arXiv:1710.01878, equation 1.

    >>> [round(cubic(final=0.8, start=0, end=4)(step).item(), 4) for step in (0, 2, 4, 9)]
    [0.0, 0.7, 0.8, 0.8]
    """
    return polynomial(final, start, end, initial=initial, power=3.0)


def linear(final: Number, start: Number, end: Number, *, initial: Number = 0.0) -> Schedule:
    """Sparsity along a straight line.

    Args:
      final: sparsity from step ``end`` on, in [0, 1).
      start: step at which pruning begins.
      end: step at which ``final`` is reached.
      initial: sparsity at ``start``.

    Returns:
      The schedule.

    Raises:
      ValueError: as :func:`polynomial`.

    >>> linear(final=0.5, start=10, end=20)(15).item()
    0.25
    """
    return polynomial(final, start, end, initial=initial, power=1.0)


@dataclass(frozen=True, eq=False)
class _Constant(Schedule):
    sparsity: Number
    start: Number = 0
    end: Number | None = None
    may_grow: bool = False

    def peak(self) -> Number | None:
        return largest(self.sparsity)

    def __call__(self, step: Any) -> jax.Array:
        step = jnp.asarray(step)
        value = jnp.asarray(self.sparsity).astype(jnp.float32)
        return jnp.where(step < jnp.asarray(self.start).astype(step.dtype), 0.0, value)

    def demand(self, step: Any, state: Any, signals: Mapping[str, Any]) -> tuple[Demand, Any]:
        before = jnp.asarray(step) < jnp.asarray(self.start).astype(jnp.asarray(step).dtype)
        limbs = as_share(self.sparsity).limbs
        return Sparsity(Share(jnp.where(before, jnp.uint32(0), limbs))), state


def constant(sparsity: Number) -> Schedule:
    """The same sparsity at every event.

    Args:
      sparsity: in [0, 1).

    Returns:
      The schedule.

    Raises:
      ValueError: the sparsity is outside [0, 1).

    >>> constant(0.5)(7).item()
    0.5
    """
    check_sparsity(sparsity, "sparsity")
    return _Constant(sparsity)


def one_shot(sparsity: Number, step: Number) -> Schedule:
    """Dense until a step, at which everything is cut at once.

    Args:
      sparsity: from the step on, in [0, 1).
      step: the number of completed updates after which the cut happens.

    Returns:
      The schedule.

    Raises:
      ValueError: the sparsity is outside [0, 1) or the step is negative.

    >>> one_shot(0.5, step=3)(2).item(), one_shot(0.5, step=3)(3).item()
    (0.0, 0.5)
    """
    check_sparsity(sparsity, "sparsity")
    check_window(step, None)
    return _Constant(sparsity, start=step, end=step)


@dataclass(frozen=True, eq=False)
class _Threshold(Schedule):
    value: Number
    start: Number = 0
    end: Number | None = None
    may_grow: bool = False

    def __call__(self, step: Any) -> jax.Array:
        step = jnp.asarray(step)
        value = jnp.asarray(self.value).astype(jnp.float32)
        return jnp.where(step < jnp.asarray(self.start).astype(step.dtype), 0.0, value)

    def demand(self, step: Any, state: Any, signals: Mapping[str, Any]) -> tuple[Demand, Any]:
        return AtLeast(self(step)), state


def threshold(value: Number, *, start: Number = 0, end: Number | None = None) -> Schedule:
    """Cuts every synapse whose score is below a fixed threshold.

    With ``regrow=everything()`` this is the rule of the founding design note: weights below 0.05
    are zeroed at every event and may grow again.

    Args:
      value: the threshold on the score, >= 0.
      start: first step at which it holds.
      end: last step with an event, or None.

    Returns:
      The schedule.

    Raises:
      ValueError: the threshold is negative or not finite.

    >>> threshold(0.05)(1).item()
    0.05000000074505806
    """
    if known(value) and not np.all(np.isfinite(value) & (np.asarray(value) >= 0)):
        raise ValueError(f"the threshold must be a finite number >= 0, not {value}.")
    check_window(start, end)
    return _Threshold(value, start, end)


@dataclass(frozen=True, eq=False)
class _Percentile(Schedule):
    share: Number
    start: Number = 0
    end: Number | None = None
    may_grow: bool = False

    def __call__(self, step: Any) -> jax.Array:
        step = jnp.asarray(step)
        value = jnp.asarray(self.share).astype(jnp.float32)
        outside = step < jnp.asarray(self.start).astype(step.dtype)
        if self.end is not None:
            outside = outside | (step > jnp.asarray(self.end).astype(step.dtype))
        return jnp.where(outside, 0.0, value)

    def demand(self, step: Any, state: Any, signals: Mapping[str, Any]) -> tuple[Demand, Any]:
        inside = self(step) > 0
        limbs = jnp.where(inside, as_share(self.share).limbs, jnp.uint32(0))
        return OfAlive(Share(limbs)), state


def percentile(percent: Number, *, start: Number = 0, end: Number | None = None) -> Schedule:
    """An adaptive threshold: each event cuts the lowest per cent of the living synapses.

    After n events ``(1 - percent / 100) ** n`` of the synapses are left.

    Args:
      percent: of the synapses alive (of the tree, or of each leaf, as the allocation says), in
        [0, 100).
      start: first step with an event.
      end: last one, or None.

    Returns:
      The schedule.

    Raises:
      ValueError: the per cent are outside [0, 100).

    >>> percentile(20.0)(1).item()
    0.20000000298023224
    """
    if known(percent) and not np.all((np.asarray(percent) >= 0) & (np.asarray(percent) < 100)):
        raise ValueError(f"percent must be in [0, 100), not {percent}.")
    check_window(start, end)
    return _Percentile(percent / 100, start, end)


@dataclass(frozen=True, eq=False)
class _Function(Schedule):
    function: Callable[[Any], Any]

    def __call__(self, step: Any) -> Any:
        return self.function(step)


def as_schedule(schedule: Any) -> Schedule:
    """Makes a schedule of a number (a constant sparsity) or of a function of the step.

    Args:
      schedule: a schedule, a sparsity, or a function from step to sparsity (as in optax).

    Returns:
      The schedule.

    Raises:
      ValueError: a number outside [0, 1).
      TypeError: anything else.

    >>> as_schedule(0.5)(0).item()
    0.5
    """
    if isinstance(schedule, Schedule):
        return schedule
    if callable(schedule):
        return _Function(schedule)
    try:
        check_sparsity(schedule, "sparsity")
    except (TypeError, ValueError) as error:
        if isinstance(error, TypeError) or "convert" in str(error):
            raise TypeError(
                f"schedule={schedule!r} is neither a schedule such as an.pruning.cubic(...), nor "
                "a function of the step, nor a sparsity in [0, 1)."
            ) from None
        raise
    return constant(schedule)
