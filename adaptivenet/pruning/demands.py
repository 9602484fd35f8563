"""What a schedule asks of an event: how much to keep, and by what measure.

A schedule returns one of these; an allocation turns it into exact counts. All three are pytrees,
so that a population may ask for another amount in every member.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from adaptivenet import trees
from adaptivenet.counts import Count, Share, as_count, as_share, part

__all__ = ["AtLeast", "Demand", "OfAlive", "Sparsity", "as_demand"]


@trees.register_dataclass
@dataclass(frozen=True)
class Sparsity:
    """Keep all but this share of all synapses.

    Attributes:
      share: the sparsity, in [0, 1).

    >>> int(Sparsity(as_share(0.75)).keep(as_count(8), 8))
    2
    """

    share: Share

    def keep(self, alive: Count, size: int) -> Count:
        """The number to keep of ``size`` synapses, exact."""
        whole = _whole(alive, size)
        return whole - part(self.share, whole)

    def value(self) -> jax.Array:
        """The sparsity as float32."""
        return self.share.astype(jnp.float32)


@trees.register_dataclass
@dataclass(frozen=True)
class OfAlive:
    """Cut this share of the synapses that are still alive.

    Attributes:
      share: the part to cut, in [0, 1).

    >>> int(OfAlive(as_share(0.5)).keep(as_count(6), 100))
    3
    """

    share: Share

    def keep(self, alive: Count, size: int) -> Count:
        """The number to keep of ``alive`` synapses, exact."""
        del size
        return alive - part(self.share, alive)

    def value(self) -> jax.Array:
        """The share cut as float32."""
        return self.share.astype(jnp.float32)


@trees.register_dataclass
@dataclass(frozen=True)
class AtLeast:
    """Keep the living synapses whose score reaches a threshold; no count is asked for.

    Attributes:
      threshold: scalar.

    >>> float(AtLeast(jnp.float32(0.05)).value())
    0.05000000074505806
    """

    threshold: Any

    def value(self) -> jax.Array:
        """The threshold as float32."""
        return jnp.asarray(self.threshold).astype(jnp.float32)


Demand = Sparsity | OfAlive | AtLeast


def as_demand(value: Any) -> Demand:
    """Makes a demand of what a schedule returned: a number is a sparsity.

    >>> float(as_demand(0.5).value())
    0.5
    """
    if isinstance(value, Sparsity | OfAlive | AtLeast):
        return value
    return Sparsity(as_share(value))


def _whole(like: Count, size: int) -> Count:
    return Count(jnp.broadcast_to(as_count(size).limbs, like.limbs.shape))
