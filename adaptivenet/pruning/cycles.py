"""Schedules that go back and forth, and schedules stated by the rate at which synapses are lost.

Where the sparsity falls, synapses wake at zero by the regrowth rule's priority (at random, if there
is none). The turning points of a cycle always see an event, whatever ``every`` is, and ask for
exact counts. (A sparsity that follows a loss is :func:`adaptivenet.pruning.auto`.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet.counts import Share, as_share
from adaptivenet.pruning.demands import Demand, Sparsity
from adaptivenet.pruning.schedules import (
    Number,
    Schedule,
    check_sparsity,
    check_window,
    known,
    largest,
    polynomial,
)

__all__ = ["ac_dc", "cyclic", "rates", "sawtooth"]

Shape = Literal["cosine", "triangular"]
Rate = Literal["decreasing", "constant", "increasing"]


def _whole(value: Any) -> jax.Array:
    return jnp.asarray(value).astype(jnp.int32)


def _real(value: Any) -> jax.Array:
    return jnp.asarray(value).astype(jnp.float32)


def _check_length(value: Number, name: str, least: int) -> None:
    if not known(value):
        return
    whole = not isinstance(value, bool) and np.issubdtype(np.asarray(value).dtype, np.integer)
    if not whole or not np.all(np.asarray(value) >= least):
        raise ValueError(f"{name} must be a number of updates >= {least}, not {value!r}.")


def _choose(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listing = " or ".join(map(repr, choices))
        raise ValueError(f"{name}={value!r}; choose {listing}.")


class _Exact(Schedule):
    """A schedule whose value is float32 but for the steps at which it is a given number, exactly.

    Subclasses list those steps; later entries win.
    """

    def _between(self, step: jax.Array) -> jax.Array:
        raise NotImplementedError

    def _exact(self, step: jax.Array) -> list[tuple[jax.Array, Number]]:
        raise NotImplementedError

    def __call__(self, step: Any) -> jax.Array:
        step = _whole(step)
        value = self._between(step)
        for where, number in self._exact(step):
            value = jnp.where(where, _real(number), value)
        return value

    def demand(self, step: Any, state: Any, signals: Mapping[str, Any]) -> tuple[Demand, Any]:
        del signals
        step = _whole(step)
        limbs = as_share(self._between(step)).limbs
        for where, number in self._exact(step):
            limbs = jnp.where(where, as_share(number).limbs, limbs)
        return Sparsity(Share(limbs)), state

    def _within(self, step: jax.Array) -> jax.Array:
        inside = step >= _whole(self.start)
        return inside if self.end is None else inside & (step <= _whole(self.end))


@dataclass(frozen=True, eq=False, kw_only=True)
class _Cyclic(_Exact):
    low: Number
    high: Number
    period: Number
    start: Number
    end: Number | None
    shape: Shape
    may_grow: bool

    def peak(self) -> Number | None:
        return largest(self.high)

    def _place(self, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Updates since the last low, and updates from low to high."""
        period = _whole(self.period)
        return (step - _whole(self.start)) % period, period // 2

    def _between(self, step: jax.Array) -> jax.Array:
        place, rise = self._place(step)
        fall = _whole(self.period) - rise
        up = place.astype(jnp.float32) / rise.astype(jnp.float32)
        down = (rise + fall - place).astype(jnp.float32) / fall.astype(jnp.float32)
        height = jnp.where(place <= rise, up, down)
        if self.shape == "cosine":
            height = 0.5 - 0.5 * jnp.cos(jnp.float32(np.pi) * height)
        low, high = _real(self.low), _real(self.high)
        return jnp.clip(low + (high - low) * height, low, high)

    def _exact(self, step: jax.Array) -> list[tuple[jax.Array, Number]]:
        place, rise = self._place(step)
        exact = [(place == 0, self.low), (place == rise, self.high)]
        if self.end is not None:
            exact.append((step >= _whole(self.end), self.high))
        return [*exact, (step < _whole(self.start), 0.0)]

    def due(self, step: Any, every: Any, ongoing: bool = False) -> jax.Array:
        step = _whole(step)
        place, rise = self._place(step)
        turning = ((place == 0) | (place == rise)) & self._within(step)
        return turning | super().due(step, every, ongoing)


def cyclic(
    low: Number,
    high: Number,
    period: Number,
    *,
    start: Number = 0,
    end: Number | None = None,
    shape: Shape = "cosine",
) -> Schedule:
    """A sparsity that swings between two values, so that what was cut by mistake can come back.

    From ``low`` at ``start`` it rises to ``high`` within half a period (``period // 2`` updates),
    falls back to ``low`` within the other half, and so on; 0 before ``start``.

    Args:
      low: the smallest sparsity, in [0, 1).
      high: the largest, in [low, 1).
      period: updates from one low to the next, an integer >= 2.
      start: step of the first low.
      end: step from which the sparsity stays at ``high``; None swings for ever. A run that ends
        without a jump has ``end = start + n * period + period // 2``.
      shape: "cosine" (slow at the turning points) or "triangular" (straight lines).

    Returns:
      The schedule.

    Raises:
      ValueError: a sparsity outside [0, 1), ``low`` above ``high``, a period below 2, ``end``
        before ``start``, or an unknown shape.

    References:
      Srinivas et al., "Cyclical pruning for sparse neural networks", arXiv:2202.01290, for periodic
      schedules from which wrongly pruned weights recover; Li et al., "Pushing the limits of
      sparsity: a bag of tricks for extreme pruning", arXiv:2411.13545, for cycles between two
      sparsities.

    >>> schedule = cyclic(0.5, 0.9, period=8, end=20, shape="triangular")
    >>> [round(schedule(step).item(), 2) for step in (0, 2, 4, 6, 8, 20, 24)]
    [0.5, 0.7, 0.9, 0.7, 0.5, 0.9, 0.9]
    """
    check_sparsity(low, "low")
    check_sparsity(high, "high")
    if known(low) and known(high) and np.any(np.asarray(low) > np.asarray(high)):
        raise ValueError(f"low={low} is above high={high}.")
    _check_length(period, "period", 2)
    check_window(start, end)
    _choose("shape", shape, ("cosine", "triangular"))
    flat = known(low) and known(high) and bool(np.all(np.asarray(low) == np.asarray(high)))
    return _Cyclic(
        low=low, high=high, period=period, start=start, end=end, shape=shape, may_grow=not flat
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class _AcDc(_Exact):
    sparsity: Number
    phase: Number
    start: Number
    end: Number
    may_grow: bool = True

    def peak(self) -> Number | None:
        return largest(self.sparsity)

    def _sparse(self, step: jax.Array) -> jax.Array:
        since = step - _whole(self.start)
        compressed = (since >= 0) & ((since // _whole(self.phase)) % 2 == 0)
        return compressed | (step >= _whole(self.end))

    def _between(self, step: jax.Array) -> jax.Array:
        return jnp.zeros(step.shape, jnp.float32)

    def _exact(self, step: jax.Array) -> list[tuple[jax.Array, Number]]:
        return [(self._sparse(step), self.sparsity)]

    def due(self, step: Any, every: Any, ongoing: bool = False) -> jax.Array:
        step = _whole(step)
        # Before the first update the network is dense, even if the first phase begins at 0.
        before = self._sparse(step - 1) & (step > 1)
        switch = self._sparse(step) != before
        return switch | super().due(step, every, ongoing) if ongoing else switch


def ac_dc(sparsity: Number, phase: Number, warm_up: Number, fine_tune: Number) -> Schedule:
    """Alternating compressed and decompressed training: sparse and dense phases by turns.

    Dense until ``warm_up``; then phases of ``phase`` updates, the first one sparse; sparse for good
    from ``fine_tune`` on. A sparse phase begins by cutting and holds its mask; a dense phase begins
    by waking everything that was cut, at zero, and everything learns. Events happen where phases
    change and at no other step (unless there is a regrowth rule), whatever ``every`` is.

    The authors reset the optimizer's momentum at the beginning of every dense phase; what a plain
    chain has gathered for a synapse while it was cut moves it once it wakes, unless the moments of
    woken synapses are reset.

    Args:
      sparsity: of the sparse phases, in [0, 1).
      phase: updates in a phase, an integer >= 1.
      warm_up: step at which the first sparse phase begins.
      fine_tune: step from which the network stays sparse.

    Returns:
      The schedule.

    Raises:
      ValueError: the sparsity is outside [0, 1), the phase below 1, or ``fine_tune`` before
        ``warm_up``.

    References:
      Peste et al., "AC/DC: alternating compressed/decompressed training of deep neural networks",
      NeurIPS 2021, figure 1 (of 100 epochs, 10 to warm up, then phases of 5).

    >>> schedule = ac_dc(0.9, phase=5, warm_up=10, fine_tune=30)
    >>> [round(schedule(step).item(), 1) for step in (9, 10, 14, 15, 20, 25, 30, 35)]
    [0.0, 0.9, 0.9, 0.0, 0.9, 0.0, 0.9, 0.9]
    """
    check_sparsity(sparsity, "sparsity")
    _check_length(phase, "phase", 1)
    if known(warm_up) and np.any(np.asarray(warm_up) < 0):
        raise ValueError(f"warm_up must be a step >= 0, not {warm_up}.")
    if known(warm_up) and known(fine_tune) and np.any(np.asarray(fine_tune) < warm_up):
        raise ValueError(f"fine_tune={fine_tune} comes before warm_up={warm_up}.")
    return _AcDc(sparsity=sparsity, phase=phase, start=warm_up, end=fine_tune)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Sawtooth(_Exact):
    base: Schedule
    final: Number
    period: Number
    overshoot: Number
    start: Number
    end: Number
    may_grow: bool

    def peak(self) -> Number | None:
        numbers = (self.overshoot, self.period, self.start, self.end)
        top = self.base.peak()
        if top is None or not all(map(known, numbers)) or np.any(self.end <= self.start):
            return top
        with jax.ensure_compile_time_eval():
            last = self.start + (self.end - 1 - self.start) // self.period * self.period
            return largest(top, self._between(jnp.asarray(last, jnp.int32)))

    def _between(self, step: jax.Array) -> jax.Array:
        period = _whole(self.period)
        place = (step - _whole(self.start)) % period
        left = 1.0 - place.astype(jnp.float32) / period.astype(jnp.float32)
        return 1.0 - (1.0 - self.base(step)) * (1.0 - _real(self.overshoot) * left)

    def _exact(self, step: jax.Array) -> list[tuple[jax.Array, Number]]:
        return [(step >= _whole(self.end), self.final), (step < _whole(self.start), 0.0)]

    def due(self, step: Any, every: Any, ongoing: bool = False) -> jax.Array:
        step = _whole(step)
        tooth = (step - _whole(self.start)) % _whole(self.period) == 0
        return (tooth & self._within(step)) | super().due(step, every, ongoing)


def sawtooth(
    final: Number,
    start: Number,
    end: Number,
    *,
    period: Number,
    overshoot: Number = 0.2,
    initial: Number = 0.0,
    power: Number = 3.0,
) -> Schedule:
    """Cuts somewhat deeper than a polynomial asks for, and lets the excess grow back.

    Every ``period`` updates a share ``overshoot`` of the synapses that :func:`polynomial` would
    keep is cut as well; until the next cut the density returns to the polynomial's in a straight
    line: ``1 - s(t) = (1 - polynomial(t)) * (1 - overshoot * (1 - (t - start) % period / period))``

    Args:
      final: sparsity from step ``end`` on, in [0, 1).
      start: step at which pruning begins.
      end: step at which ``final`` is reached.
      period: updates from one cut to the next, an integer >= 1.
      overshoot: share of the synapses kept that is cut in excess, in [0, 1).
      initial: sparsity of the polynomial at ``start``.
      power: exponent of the polynomial.

    Returns:
      The schedule.

    Raises:
      ValueError: a sparsity or the overshoot outside [0, 1), a period below 1, a power that is not
        positive, or ``end`` before ``start``.

    >>> schedule = sawtooth(0.5, 0, 8, period=4, overshoot=0.2, power=1.0)
    >>> [round(schedule(step).item(), 4) for step in (0, 2, 4, 6, 8)]
    [0.2, 0.2125, 0.4, 0.4375, 0.5]
    """
    base = polynomial(final, start, end, initial=initial, power=power)
    _check_length(period, "period", 1)
    if known(overshoot) and not np.all((np.asarray(overshoot) >= 0) & (np.asarray(overshoot) < 1)):
        raise ValueError(f"overshoot must be a share in [0, 1), not {overshoot}.")
    smooth = known(overshoot) and not np.any(np.asarray(overshoot))
    return _Sawtooth(
        base=base,
        final=final,
        period=period,
        overshoot=overshoot,
        start=start,
        end=end,
        may_grow=base.may_grow or not smooth,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class _Rates(_Exact):
    final: Number
    start: Number
    end: Number
    rate: Rate
    may_grow: bool = False

    def peak(self) -> Number | None:
        return largest(self.final)

    def _between(self, step: jax.Array) -> jax.Array:
        start = _real(self.start)
        span = jnp.maximum(_real(self.end) - start, 1.0)
        done = jnp.clip((step.astype(jnp.float32) - start) / span, 0.0, 1.0)
        if self.rate == "decreasing":
            done = 1.0 - jnp.square(1.0 - done)
        elif self.rate == "increasing":
            done = jnp.square(done)
        return -jnp.expm1(jnp.log1p(-_real(self.final)) * done)

    def _exact(self, step: jax.Array) -> list[tuple[jax.Array, Number]]:
        return [(step >= _whole(self.end), self.final), (step < _whole(self.start), 0.0)]


def rates(final: Number, start: Number, end: Number, rate: Rate = "decreasing") -> Schedule:
    """A sparsity stated by the share of the *living* synapses that is lost in each update.

    With ``u = (t - start) / (end - start)`` the density is ``(1 - final) ** g(u)``: a constant rate
    (``g = u``) cuts the same per cent of what is left at every event, a decreasing one
    (``g = 1 - (1 - u) ** 2``) falls linearly to none at ``end``, an increasing one (``g = u ** 2``)
    rises linearly from none. (A :func:`polynomial` of power 1 cuts the same *number* at every
    event, which is an ever larger per cent of what is left.)

    Args:
      final: sparsity from step ``end`` on, in [0, 1).
      start: step at which pruning begins.
      end: step at which ``final`` is reached.
      rate: "decreasing", "constant" or "increasing".

    Returns:
      The schedule.

    Raises:
      ValueError: the sparsity is outside [0, 1), ``end`` before ``start``, or an unknown rate.

    References:
      Navlakha, Barth and Bar-Joseph, "Decreasing-rate pruning optimizes the construction of
      efficient and robust distributed networks", PLOS Computational Biology 11 (2015).

    >>> schedule = rates(0.99, 0, 2, "constant")
    >>> [round(schedule(step).item(), 4) for step in (0, 1, 2)]
    [0.0, 0.9, 0.99]
    """
    check_sparsity(final, "final")
    check_window(start, end)
    _choose("rate", rate, ("decreasing", "constant", "increasing"))
    return _Rates(final=final, start=start, end=end, rate=rate)
