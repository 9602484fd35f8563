"""Structures: what is cut as one, and what must stay in step.

A structure pools the scores of synapses into scores of units, and spreads a mask of units back over
the synapses. `Element`, `Block` and `Unit` say what a unit is; units of the leaves then compete as
the allocation says. (`NofM` and `FanIn` of :mod:`adaptivenet.pruning.rowwise` keep the same number
in every row of a leaf.) `ByPath` gives every leaf its own.

A structure of one's own needs the three methods of :class:`Structure`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from adaptivenet import trees
from adaptivenet.pruning.rules import Rules, as_rules, match

PyTree = Any
Pool = Literal["sum", "mean"]
Shape = tuple[int, ...]

__all__ = ["Block", "ByPath", "Element", "Structure", "Unit"]


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


class Folding:
    """Base of structures that rearrange each leaf by itself: units first, their synapses last."""

    def check(self, path: str, shape: Shape) -> None:
        """Refuses a leaf that the structure does not fit.

        Args:
          path: its name, for the message.
          shape: its shape.

        Raises:
          ValueError: it does not fit.
        """
        raise NotImplementedError

    def fold(self, leaf: jax.Array) -> jax.Array:
        """The leaf as ``[..., synapses of a unit]``, or as ``[rows, length]``."""
        raise NotImplementedError

    def unfold(self, folded: jax.Array, shape: Shape) -> jax.Array:
        """The inverse of :meth:`fold`."""
        raise NotImplementedError

    def pool(self, scores: PyTree) -> PyTree:
        """Scores of the units of each leaf."""
        return self._map(lambda leaf: self._pooled(self.fold(leaf)), scores)

    def pool_mask(self, mask: PyTree) -> PyTree:
        """Which units have a living synapse."""
        return self._map(lambda leaf: self._any(self.fold(leaf)), mask)

    def spread(self, units: PyTree, mask: PyTree) -> PyTree:
        """A mask of units as a mask of all their synapses."""

        def back(leaf: jax.Array, unit: jax.Array) -> jax.Array:
            folded = jax.eval_shape(self.fold, leaf).shape
            return self.unfold(jnp.broadcast_to(self._column(unit), folded), leaf.shape)

        return trees.map_synapses(back, mask, units)

    def _map(self, function: Any, tree: PyTree) -> PyTree:
        leaves, treedef = jax.tree.flatten(tree)
        for name, leaf in zip(trees.paths(tree), leaves, strict=True):
            self.check(name, jnp.shape(leaf))
        return jax.tree.unflatten(treedef, [function(leaf) for leaf in leaves])

    def _pooled(self, folded: jax.Array) -> jax.Array:
        raise NotImplementedError

    def _any(self, folded: jax.Array) -> jax.Array:
        return jnp.any(folded, axis=-1)

    def _column(self, units: jax.Array) -> jax.Array:
        return units[..., None]


class _Pooling(Folding):
    """Base of structures whose units are several synapses, cut together.

    Scores are added as they come, and a unit is then worth the absolute value of its sum: a signed
    score such as ``w * g`` gives a unit the first-order Taylor estimate ``|sum(w * g)|``.
    """

    pooling: Pool

    def _pooled(self, folded: jax.Array) -> jax.Array:
        # Summed in float32 at least: a sum of many bfloat16 would stop growing.
        wide = folded if folded.dtype == jnp.float64 else folded.astype(jnp.float32)
        summed = jnp.abs(jnp.sum(wide, axis=-1))
        if self.pooling == "mean":
            summed = summed * jnp.asarray(1 / max(folded.shape[-1], 1), summed.dtype)
        return summed


@dataclass(frozen=True)
class Block(_Pooling):
    """Blocks of the last two axes are cut as one.

    The last two axes are inputs and outputs, of a dense kernel ``[in, out]`` as of a convolution
    ``[height, width, in, out]``. Targets are shares of the blocks.

    Attributes:
      rows: inputs of a block.
      columns: outputs of a block.
      pooling: a block's score, the "sum" or the "mean" of its synapses' scores.

    References:
      Gray et al., "GPU kernels for block-sparse weights", OpenAI 2017.

    >>> scores = {"kernel": jnp.arange(16.0).reshape(4, 4)}
    >>> Block(2, 2).pool(scores)["kernel"].tolist()
    [[10.0, 18.0], [42.0, 50.0]]
    """

    rows: int
    columns: int
    pooling: Pool = "sum"

    def __post_init__(self) -> None:
        check_whole(self, "rows", "columns")
        _check_pooling(self)

    def check(self, path: str, shape: Shape) -> None:
        """Refuses a leaf whose last two axes the blocks do not divide."""
        if len(shape) < 2 or shape[-2] % self.rows or shape[-1] % self.columns:
            raise misfit(path, shape, f"its last two axes cannot be cut by {self}")

    def fold(self, leaf: jax.Array) -> jax.Array:
        """``[..., row of blocks, column of blocks, synapses]``."""
        *front, height, width = leaf.shape
        r, c = self.rows, self.columns
        split = leaf.reshape(*front, height // r, r, width // c, c)
        return jnp.swapaxes(split, -3, -2).reshape(*front, height // r, width // c, r * c)

    def unfold(self, folded: jax.Array, shape: Shape) -> jax.Array:
        """The leaf again."""
        *front, height, width, _ = folded.shape
        split = folded.reshape(*front, height, width, self.rows, self.columns)
        return jnp.swapaxes(split, -3, -2).reshape(shape)


@dataclass(frozen=True)
class Unit(_Pooling):
    """Whole units of one axis: neurons, channels, heads, LSTM units.

    Every leaf is taken by itself: nothing that couples to a unit elsewhere (its bias, the next
    layer's inputs) is cut with it, as it is by :class:`adaptivenet.pruning.Coupled`. Targets are
    shares of the units. Leaves of unlike width compete fairly under ``pooling="mean"``, and in
    favour of the wide under "sum".

    Attributes:
      axis: the axis of the units: -1 for the outputs of dense kernels and convolutions, -2 for
        their inputs, or for the heads of an attention kernel ``[embed, heads, head_dim]``.
      size: how many consecutive entries make a unit, such as the dimension of a head where heads
        are not an axis of their own.
      gates: how many stretches of the axis a unit has a part in: 4 for an LSTM kernel
        ``[in, 4 * units]`` whose gates lie one behind the other.
      pooling: a unit's score, the "sum" or the "mean" of its synapses' scores.

    References:
      Li et al., "Pruning filters for efficient ConvNets", ICLR 2017; Molchanov et al., "Importance
      estimation for neural network pruning", CVPR 2019, for scores of units.

    >>> Unit().pool({"kernel": jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])})["kernel"].tolist()
    [5.0, 7.0, 9.0]
    >>> Unit(gates=2).pool({"kernel": jnp.array([[1.0, 2.0, 3.0, 4.0]])})["kernel"].tolist()
    [4.0, 6.0]
    """

    axis: int = -1
    size: int = 1
    gates: int = 1
    pooling: Pool = "sum"

    def __post_init__(self) -> None:
        check_whole(self, "size", "gates")
        _check_pooling(self)
        check_axes(self, self.axis)

    def check(self, path: str, shape: Shape) -> None:
        """Refuses a leaf whose axis holds no whole number of units."""
        if not -len(shape) <= self.axis < len(shape):
            raise misfit(path, shape, f"it has no axis {self.axis} for {self}")
        if shape[self.axis] % (self.gates * self.size):
            raise misfit(path, shape, f"axis {self.axis} cannot be cut into whole units by {self}")

    def fold(self, leaf: jax.Array) -> jax.Array:
        """``[units, synapses]``."""
        units = leaf.shape[self.axis] // (self.gates * self.size)
        first = jnp.moveaxis(leaf, self.axis, 0)
        split = first.reshape(self.gates, units, self.size, *first.shape[1:])
        synapses = self.gates * self.size * math.prod(first.shape[1:])
        return jnp.swapaxes(split, 0, 1).reshape(units, synapses)

    def unfold(self, folded: jax.Array, shape: Shape) -> jax.Array:
        """The leaf again."""
        axis = self.axis % len(shape)
        rest = shape[:axis] + shape[axis + 1 :]
        split = folded.reshape(folded.shape[0], self.gates, self.size, *rest)
        first = jnp.swapaxes(split, 0, 1).reshape(shape[axis], *rest)
        return jnp.moveaxis(first, 0, axis)


@dataclass(frozen=True, init=False)
class ByPath:
    """A structure of its own for every leaf, by regular expressions on the path.

    The first pattern that is found in a path wins. Leaves of unlike structures do not compete: a
    `Global` allocation holds among those of each, and the target is asked of each.

    Attributes:
      rules: pairs of pattern and structure (a mapping is accepted).
      default: the structure of leaves that no pattern matches.

    >>> mixed = ByPath({"conv": Unit(), "dense2": Block(2, 4)})
    >>> [type(s).__name__ for s in mixed.at(["conv1/kernel", "dense1/kernel", "dense2/kernel"])]
    ['Unit', 'Element', 'Block']
    """

    rules: Rules
    default: Structure

    def __init__(
        self,
        rules: Mapping[str, Structure] | Sequence[tuple[str, Structure]],
        default: Structure = Element(),
    ) -> None:
        object.__setattr__(self, "rules", as_rules(rules, "ByPath"))
        object.__setattr__(self, "default", default)
        for one in (default, *(structure for _, structure in self.rules)):
            alone = not isinstance(one, ByPath) and not getattr(one, "joins_leaves", False)
            if not alone or not hasattr(one, "spread"):
                raise TypeError(f"ByPath gives a leaf one structure such as Unit(), not {one!r}.")

    def at(self, names: Sequence[str]) -> list[Structure]:
        """The structure of each leaf.

        Args:
          names: paths of the prunable leaves.

        Returns:
          One structure a leaf.

        Raises:
          ValueError: a pattern matches none of them.
        """
        places = match(self.rules, names, "ByPath")
        return [self.default if place is None else self.rules[place][1] for place in places]

    def pool(self, scores: PyTree) -> PyTree:
        """Scores of the units of each leaf."""
        return self._map("pool", scores)

    def pool_mask(self, mask: PyTree) -> PyTree:
        """Which units are alive."""
        return self._map("pool_mask", mask)

    def spread(self, units: PyTree, mask: PyTree) -> PyTree:
        """A mask of units as a mask of synapses."""
        leaves, treedef = jax.tree.flatten(mask)
        found = zip(self.at(trees.paths(mask)), jax.tree.leaves(units), leaves, strict=True)
        return jax.tree.unflatten(treedef, [one.spread(unit, leaf) for one, unit, leaf in found])

    def _map(self, method: str, tree: PyTree) -> PyTree:
        leaves, treedef = jax.tree.flatten(tree)
        names = trees.paths(tree)
        found = of_leaves(self, names, [jnp.shape(leaf) for leaf in leaves])
        pairs = zip(found, leaves, strict=True)
        return jax.tree.unflatten(treedef, [getattr(one, method)(leaf) for one, leaf in pairs])


def of_leaves(
    structure: Structure, names: Sequence[str], shapes: Sequence[Shape]
) -> list[Structure]:
    """The structure of every leaf, checked against its shape."""
    found = structure.at(names) if isinstance(structure, ByPath) else [structure] * len(names)
    for one, name, shape in zip(found, names, shapes, strict=True):
        if isinstance(one, Folding):
            one.check(name, tuple(shape))
    return found


def misfit(path: str, shape: Shape, why: str) -> ValueError:
    return ValueError(
        f"leaf {path!r} of shape {shape}: {why}. Leave it out by select=, or give it another "
        "structure by ByPath."
    )


def check_whole(owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{type(owner).__name__}: {name} must be an integer >= 1, not {value}")


def check_axes(owner: Any, *axes: Any) -> None:
    """Refuses axes that are no integers."""
    for axis in axes:
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise TypeError(f"{type(owner).__name__}: axis must be an integer, not {axis!r}.")


def _check_pooling(owner: Any) -> None:
    if owner.pooling not in ("sum", "mean"):
        raise ValueError(
            f"{type(owner).__name__}: pooling must be 'sum' or 'mean', not {owner.pooling!r}."
        )
