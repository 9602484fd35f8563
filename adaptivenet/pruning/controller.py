"""The closed loop: the user states a tolerance, the controller finds the sparsity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet.counts import as_share
from adaptivenet.pruning.demands import Demand, Sparsity
from adaptivenet.pruning.schedules import (
    Number,
    Schedule,
    check_sparsity,
    check_window,
    known,
)

__all__ = ["AutoState", "auto"]


class AutoState(NamedTuple):
    """State of :func:`auto`.

    Attributes:
      density: share of synapses asked for, float32 scalar.
      good: the lowest density at which the tolerance last held.
      rate: relative size of the next step of the density.
      reference: the best (lowest) value of the monitored signal so far.
      raising: whether the last move was towards fewer synapses.
      misses: events in a row at which the tolerance did not hold, int32.
    """

    density: jax.Array
    good: jax.Array
    rate: jax.Array
    reference: jax.Array
    raising: jax.Array
    misses: jax.Array


@dataclass(frozen=True, eq=False, kw_only=True)
class _Auto(Schedule):
    tolerance: Number
    monitor: str
    rate: Number
    most: Number
    start: Number
    end: Number | None
    relative: bool
    patience: int
    may_grow: bool = True

    def __call__(self, step: Any) -> jax.Array:
        raise TypeError(
            "auto() has no sparsity that depends on the step alone: it follows the signal "
            f"{self.monitor!r}. Read the record of the optimizer state for what it asked for."
        )

    def init(self) -> AutoState:
        return AutoState(
            density=jnp.ones((), jnp.float32),
            good=jnp.ones((), jnp.float32),
            rate=jnp.asarray(self.rate).astype(jnp.float32),
            reference=jnp.asarray(jnp.inf, jnp.float32),
            raising=jnp.ones((), bool),
            misses=jnp.zeros((), jnp.int32),
        )

    def demand(
        self, step: Any, state: AutoState, signals: Mapping[str, Any]
    ) -> tuple[Demand, AutoState]:
        if self.monitor not in signals:
            raise ValueError(
                f"auto() follows the signal {self.monitor!r}, which nobody supplies: pass "
                f"{self.monitor}= to tx.update(...) or to an.pruning.revise(...)."
            )
        state = self.step(step, state, jnp.asarray(signals[self.monitor]).astype(jnp.float32))
        return Sparsity(as_share(1.0 - state.density)), state

    def step(self, step: Any, state: AutoState, value: jax.Array) -> AutoState:
        """One move of the controller on a new value of the signal."""
        step = jnp.asarray(step, jnp.int32)
        reference = jnp.where(value < state.reference, value, state.reference)
        slack = jnp.asarray(self.tolerance).astype(jnp.float32)
        if self.relative:
            slack = slack * jnp.abs(reference)
        # A run that diverged (nan, inf) is never within, even if it never did better.
        within = (value <= reference + slack) & jnp.isfinite(value)
        good = jnp.where(within, state.density, state.good)
        largest = jnp.asarray(self.rate).astype(jnp.float32)
        rate = jnp.where(
            within == state.raising,
            jnp.minimum(state.rate * 1.2, largest),
            jnp.maximum(state.rate * 0.5, largest / 16.0),
        )
        least = 1.0 - jnp.asarray(self.most).astype(jnp.float32)
        sparser = jnp.maximum(state.density * (1.0 - rate), least)
        # Back to what last held; and further, if even that no longer holds.
        denser = jnp.minimum(jnp.maximum(state.density / (1.0 - rate), state.good), 1.0)
        if self.end is not None:
            late = step > jnp.asarray(self.end, jnp.int32)
            sparser = jnp.where(late, state.density, sparser)
            # Synapses woken now would hardly learn any more: undo an untested cut, no more.
            denser = jnp.where(late, jnp.maximum(state.density, state.good), denser)
        moved = AutoState(
            density=jnp.where(within, sparser, denser),
            good=good,
            rate=rate,
            reference=reference,
            raising=within,
            misses=jnp.zeros((), jnp.int32),
        )
        waiting = state._replace(reference=reference)
        holding = waiting._replace(misses=state.misses + 1)
        hold = ~within & (holding.misses < jnp.asarray(self.patience, jnp.int32))
        warm = step < jnp.asarray(self.start, jnp.int32)
        return jax.tree.map(
            lambda a, b, c: jnp.where(warm, a, jnp.where(hold, b, c)), waiting, holding, moved
        )


def auto(
    tolerance: Number,
    *,
    monitor: str = "validation_loss",
    relative: bool = False,
    rate: Number = 0.2,
    patience: int = 2,
    most: Number = 0.999,
    start: Number = 0,
    end: Number | None = None,
) -> Schedule:
    """Raises the sparsity while a monitored value stays within a tolerance; else steps back.

    At each event the controller reads the monitored value (lower is better: a validation loss, or
    an error rate). If it lies within ``tolerance`` of the best value seen so far, the density is
    multiplied by ``1 - rate``; if it does not for ``patience`` events in a row (a network needs
    time to recover from a cut), the density returns to the last one that held. The rate
    grows by 1.2 while moves agree and halves when they turn, as in Rprop, so the density settles
    on the sparsest network that the tolerance allows. The user never states a sparsity. The
    tolerance must exceed the noise of the value: with n validation examples an error rate e is
    known to about ``sqrt(e (1 - e) / n)``.

    Args:
      tolerance: how far above its best value the monitored one may lie, >= 0, in the value's own
        unit (or as a share of the best value if ``relative``).
      monitor: name of the signal, given to ``tx.update(..., NAME=value)`` or to
        ``revise(..., NAME=value)``.
      relative: take the tolerance as a share of the best value.
      rate: largest relative step of the density, in (0, 1).
      patience: events in a row beyond the tolerance before the controller steps back, >= 1.
      most: largest sparsity ever asked for, in [0, 1).
      start: step before which the network stays dense and only the best value is recorded.
      end: step after which the sparsity is no longer raised, and only a cut that did not hold is
        undone, so that a run does not end on an untested cut; None for never.

    Returns:
      The schedule. Where it steps back, synapses are woken by the regrowth rule's priority (at
      random, if there is none) and start from zero.

    Raises:
      ValueError: a number out of range.

    References:
      Riedmiller and Braun, "A direct adaptive method for faster backpropagation learning: the
      RPROP algorithm", ICNN 1993, for the adaptation of the step size.

    >>> controller = auto(0.1, patience=1)
    >>> state = controller.init()
    >>> for loss in (1.0, 1.05, 1.3):
    ...     state = controller.step(1, state, jnp.float32(loss))
    ...     print(round(state.density.item(), 3))
    0.8
    0.64
    0.8
    """
    if known(tolerance) and not np.all(np.asarray(tolerance) >= 0):
        raise ValueError(f"tolerance must be >= 0, not {tolerance}.")
    if known(rate) and not np.all((np.asarray(rate) > 0) & (np.asarray(rate) < 1)):
        raise ValueError(f"rate must be in (0, 1), not {rate}.")
    if known(patience) and (patience != int(patience) or patience < 1):
        raise ValueError(f"patience must be a number of events >= 1, not {patience}.")
    check_sparsity(most, "most")
    check_window(start, end)
    return _Auto(
        tolerance=tolerance,
        monitor=monitor,
        rate=rate,
        most=most,
        start=start,
        end=end,
        relative=relative,
        patience=patience,
    )
