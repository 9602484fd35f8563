"""Regrowth: which dead synapses wake at an event.

A rule has a ``fraction``, the share of the kept synapses that gives way to woken ones at every
event, and a ``priority``, a score of the dead. Woken synapses start from zero. A schedule that
steps back wakes by the same priority.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from adaptivenet.pruning import scores
from adaptivenet.pruning.schedules import Number, known

PyTree = Any

__all__ = ["AtRandom", "Everything", "Regrowth", "at_random", "everything"]


class Regrowth(Protocol):
    """Chooses the synapses to wake."""

    @property
    def fraction(self) -> Number:
        """Share of the kept synapses that gives way to woken ones at every event."""
        ...

    def priority(self, params: PyTree, **signals: Any) -> PyTree:
        """Scores of the dead; the largest wake first."""
        ...


@dataclass(frozen=True)
class Everything:
    """Wakes all that is dead: see :func:`everything`."""

    fraction: Number = 0.0

    def priority(self, params: PyTree, **signals: Any) -> PyTree:
        """Not asked for: everything wakes."""
        return scores.magnitude(params, **signals)


@dataclass(frozen=True)
class AtRandom:
    """Wakes at random: see :func:`at_random`."""

    fraction: Number = 0.0

    def priority(self, params: PyTree, *, key: jax.Array, **signals: Any) -> PyTree:
        """Uniform random numbers."""
        return scores.random(params, key=key, **signals)


def everything() -> Everything:
    """Wakes every synapse right after it was cut, at zero: an event forgets, and nothing is lost.

    The founding design note's rule is ``prune(threshold(0.05), regrow=everything(), ...)``: weights
    below the threshold are set to zero and go on learning. The mask is then all True, and sparsity
    is what the last event left at zero.

    Returns:
      The rule.

    >>> everything().fraction
    0.0
    """
    return Everything()


def at_random(fraction: Number = 0.0) -> AtRandom:
    """Wakes dead synapses at random.

    Args:
      fraction: share of the kept synapses, the lowest scored, that give way to woken ones at every
        event, in [0, 1). The total kept is what the schedule asks for.

    Returns:
      The rule.

    Raises:
      ValueError: the fraction is outside [0, 1).

    References:
      Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
      connectivity inspired by network science", Nature Communications 9 (2018): SET.

    >>> at_random(0.3).fraction
    0.3
    """
    if known(fraction) and not np.all((np.asarray(fraction) >= 0) & (np.asarray(fraction) < 1)):
        raise ValueError(f"fraction must be in [0, 1), not {fraction}.")
    return AtRandom(fraction)
