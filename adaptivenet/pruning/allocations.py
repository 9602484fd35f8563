"""Allocations: how a target is shared out among the leaves.

An allocation splits the leaves into groups, within each of which synapses compete; a demand then
gives every group its exact integer count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Allocation", "Global", "Uniform"]


class Allocation(Protocol):
    """Shares a target out among leaves."""

    def groups(self, sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Splits leaves into groups that share one count.

        Args:
          sizes: units of each leaf.

        Returns:
          Indices of the leaves of each group; every leaf is in exactly one.
        """
        ...


@dataclass(frozen=True)
class Global:
    """All synapses of the tree compete: one threshold, and layers take what they earn.

    References:
      Lee et al., "SNIP", ICLR 2019, and Blalock et al., "What is the state of neural network
      pruning?", MLSys 2020, on global against layer-wise thresholds.

    >>> Global().groups([10, 20])
    ((0, 1),)
    """

    def groups(self, sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """One group of all leaves."""
        return (tuple(range(len(sizes))),)


@dataclass(frozen=True)
class Uniform:
    """The same share in every leaf.

    >>> Uniform().groups([10, 20])
    ((0,), (1,))
    """

    def groups(self, sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Every leaf by itself."""
        return tuple((place,) for place in range(len(sizes)))
