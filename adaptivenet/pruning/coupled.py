"""Coupled units as a structure of `prune`: what falls, falls with all that belongs to it.

:class:`adaptivenet.pruning.Unit` takes every leaf by itself; here the units are those that
:func:`adaptivenet.pruning.couple` finds in the trace of the model, so that a neuron loses its
column, its row in the next layer, and whatever else is selected, in one event::

    coupling = couple(apply, params, inputs)
    tx = optax.chain(optax.adam(1e-3), prune(schedule, structure=Coupled(coupling)))
    ...
    small = shrink(apply, params, inputs, opt_state=opt_state)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet import trees
from adaptivenet.pruning.allocations import Leaf
from adaptivenet.pruning.coupling import Coupling
from adaptivenet.pruning.structures import Pool
from adaptivenet.pruning.tracing.axes import whereabouts

PyTree = Any
Units = dict[str, jax.Array]
Slices = list[tuple[int, str, np.ndarray]]  # axis, group, and the unit of each position, or -1

__all__ = ["Coupled"]


@dataclass(frozen=True, eq=False)
class Coupled:
    """Coupled units, cut in the step by their pooled scores.

    The leaves that compete are the groups of the coupling, by name; a target is a share of their
    units. A synapse between two hidden layers belongs to a unit of either, counts for both, and
    lives while both do. What a unit costs is, for :class:`adaptivenet.pruning.Budget`, the number
    of its synapses before anything was cut (patterns of its ``costs`` are matched with the groups'
    names); :func:`adaptivenet.pruning.choose_units` counts what is left, out of the step.

    Attributes:
      coupling: of the model. Its parameters may lie deeper in a tree than those that are trained,
        as in Linen's ``{"params": ...}``: paths are matched from their ends.
      pooling: the "sum" or the "mean" over all elements of a unit. Scores are added as they come,
        and a unit is then worth the absolute value.
      normalise: whether each group is divided by the mean of its units, so that groups of unlike
        layers compete.
      groups: names of those that may lose units, such as
        :func:`adaptivenet.pruning.removable_groups` gives; None: all that may.

    Only selected leaves are cut and counted: without ``select=`` biases and norms stay as they are,
    which does not keep a unit alive whose weights are gone.

    Raises:
      ValueError: a group is unknown or has to stay, or pooling is neither of the two; in use: a
        leaf is none of the coupling's, or no unit has a part in the leaves.

    References:
      Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019; Fang et al.,
      "DepGraph: towards any structural pruning", CVPR 2023 (arXiv:2301.12900).

    >>> import adaptivenet as an
    >>> params = an.models.mlp_init(jax.random.key(0), (2, 3, 2))
    >>> coupled = Coupled(an.pruning.couple(an.models.mlp, params, jnp.ones((1, 2))))
    >>> alive = {"dense1/bias[0]": jnp.array([True, False, True])}
    >>> mask = coupled.spread(alive, an.pruning.full_mask(params))
    >>> mask["dense1"]["kernel"][0].tolist(), mask["dense2"]["kernel"][:, 0].tolist()
    ([True, False, True], [True, False, True])
    """

    coupling: Coupling
    pooling: Pool = "sum"
    normalise: bool = True
    groups: Sequence[str] | None = None
    _slices: dict[str, Slices] = field(default_factory=dict, init=False, repr=False)

    # A mapping from all leaves to all units, not a leaf at a time.
    joins_leaves = True

    def __post_init__(self) -> None:
        if self.pooling not in ("sum", "mean"):
            raise ValueError(f"pooling must be 'sum' or 'mean', not {self.pooling!r}.")
        free = {group.name for group in self.coupling.free}
        strange = sorted(set(self.groups or ()) - free)
        if strange:
            raise ValueError(
                f"groups: {', '.join(strange)} may not lose units; these may: "
                f"{', '.join(sorted(free)) or 'none'}."
            )
        chosen = free if self.groups is None else set(self.groups)
        units = {
            group.name: unit
            for unit, group in zip(self.coupling.units, self.coupling.groups, strict=True)
            if group.name in chosen
        }
        for path, node in zip(self.coupling.paths, self.coupling.leaves, strict=True):
            self._slices[path] = [
                (place, name, which)
                for place, axis in enumerate(node.axes)
                for name, unit in units.items()
                for which in whereabouts(axis, unit)
            ]

    def pool(self, scores: PyTree) -> Units:
        """Scores of the units, ``[units]`` by group."""
        sums = self._gathered(scores, _wide)
        if self.pooling == "mean":
            sizes = self._sizes(scores)
            sums = {name: s / jnp.asarray(sizes[name], s.dtype) for name, s in sums.items()}
        worth = {name: jnp.abs(s) for name, s in sums.items()}
        if not self.normalise:
            return worth
        means = {name: jnp.mean(w) for name, w in worth.items()}
        return {
            name: w / jnp.where(means[name] > 0, means[name], jnp.ones_like(means[name]))
            for name, w in worth.items()
        }

    def pool_mask(self, mask: PyTree) -> Units:
        """Which units have a living synapse."""
        return {name: count > 0 for name, count in self._gathered(mask, _counts).items()}

    def spread(self, units: Units, mask: PyTree) -> PyTree:
        """A mask of units as one of synapses: each lives while all units that it belongs to do."""

        def alive(path: str, leaf: Any) -> jax.Array:
            found = jnp.ones(leaf.shape, bool)
            for place, name, which in self._of(path):
                along = jnp.where(which >= 0, units[name][np.maximum(which, 0)], True)
                found = found & _across(along, place, leaf.ndim)
            return found

        return self._mapped(alive, mask)

    def wake(self, born: Units, awake: Units, mask: PyTree) -> PyTree:
        """The synapses of units that wake, as far as their other units are awake."""

        def touched(path: str, leaf: Any) -> jax.Array:
            found = jnp.zeros(leaf.shape, bool)
            for place, name, which in self._of(path):
                along = jnp.where(which >= 0, born[name][np.maximum(which, 0)], False)
                found = found | _across(along, place, leaf.ndim)
            return found

        return jax.tree.map(jnp.logical_and, self._mapped(touched, mask), self.spread(awake, mask))

    def leaves_of(self, params: PyTree) -> tuple[Leaf, ...]:
        """What allocations may know of the groups.

        Args:
          params: the synapses.

        Returns:
          One entry a group, with the units and what each has of synapses as its shape.
        """
        sizes, counts = self._sizes(params), self._counts()
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(params)]
        widest = max(dtypes, key=lambda dtype: jnp.dtype(dtype).itemsize)
        return tuple(
            Leaf(name, (counts[name], round(float(sizes[name].mean()))), widest, counts[name])
            for name in sorted(sizes)
        )

    def _counts(self) -> dict[str, int]:
        return {group.name: group.count for group in self.coupling.groups}

    def _of(self, path: str) -> Slices:
        """The slices of a leaf, whose path may end one of the coupling's."""
        found = self._slices.get(path)
        if found is not None:
            return found
        ends = [name for name in self._slices if name.endswith("/" + path)]
        if len(ends) != 1:
            raise ValueError(
                f"leaf {path!r} is {'several' if ends else 'none'} of the coupling's parameters "
                f"({', '.join(ends or self._slices)}): couple the function of these parameters."
            )
        return self._slices[ends[0]]

    def _leaves(self, tree: PyTree) -> Iterator[tuple[str, Any]]:
        return zip(trees.paths(tree), jax.tree.leaves(tree), strict=True)

    def _mapped(self, function: Any, tree: PyTree) -> PyTree:
        found = [function(path, leaf) for path, leaf in self._leaves(tree)]
        return jax.tree.unflatten(jax.tree.structure(tree), found)

    def _gathered(self, tree: PyTree, summed: Any) -> Units:
        """Of every unit, what its slices of all leaves sum up to."""
        counts, found = self._counts(), {}
        for path, leaf in self._leaves(tree):
            for place, name, which in self._of(path):
                along = summed(leaf, tuple(d for d in range(leaf.ndim) if d != place))
                here = which >= 0
                own = jnp.zeros(counts[name], along.dtype).at[which[here]].add(along[here])
                found[name] = found[name] + own if name in found else own
        if not found:
            raise ValueError(
                "no unit that may go has a part in the selected leaves "
                f"({', '.join(trees.paths(tree))}); print the coupling to see what stays and why."
            )
        return found

    def _sizes(self, tree: PyTree) -> dict[str, np.ndarray]:
        """How many elements of the leaves every unit has."""
        counts, found = self._counts(), {}
        for path, leaf in self._leaves(tree):
            for place, name, which in self._of(path):
                each = math.prod(leaf.shape) // max(leaf.shape[place], 1)
                own = np.bincount(which[which >= 0], minlength=counts[name]) * each
                found[name] = found.get(name, 0) + own
        return found


def _wide(leaf: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    # Summed in float32 at least: a sum of many bfloat16 would stop growing.
    return jnp.sum(leaf if leaf.dtype == jnp.float64 else leaf.astype(jnp.float32), axis=axes)


def _counts(leaf: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sum(leaf, axis=axes, dtype=jnp.int32)


def _across(along: jax.Array, place: int, dims: int) -> jax.Array:
    return jnp.expand_dims(along, [d for d in range(dims) if d != place])
