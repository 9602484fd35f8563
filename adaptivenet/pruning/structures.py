"""Structures: what is cut as one.

A structure pools the scores of synapses into scores of units, and spreads a mask of units back over
the synapses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

PyTree = Any

__all__ = ["Element", "Structure"]


class Structure(Protocol):
    """Maps scores of synapses to units, and masks of units back."""

    def pool(self, scores: PyTree) -> PyTree:
        """Scores of the units, one leaf a leaf."""
        ...

    def pool_mask(self, mask: PyTree) -> PyTree:
        """Which units are alive."""
        ...

    def spread(self, units: PyTree, mask: PyTree) -> PyTree:
        """A mask of units as a mask of synapses."""
        ...


@dataclass(frozen=True)
class Element:
    """Every synapse by itself (unstructured).

    >>> Element().pool({"kernel": 1.0})
    {'kernel': 1.0}
    """

    def pool(self, scores: PyTree) -> PyTree:
        """The scores themselves."""
        return scores

    def pool_mask(self, mask: PyTree) -> PyTree:
        """The mask itself."""
        return mask

    def spread(self, units: PyTree, mask: PyTree) -> PyTree:
        """The mask of units itself."""
        del mask
        return units
