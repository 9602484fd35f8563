"""Running moments, and what an optimizer remembers of a synapse that has just woken.

An optimizer's moments of a dead synapse are those of another life: of the weight that was cut, or
of gradients that moved nothing. :func:`reset_moments` finds them in any optimizer state by the
structure and the shapes of the parameters, without a list of types.

What wakes synapses is found without a list of types, too: a state with the fields ``mask``,
``survivors``, ``step`` and ``record`` (whose ``event`` tells whether the last update was one), such
as :class:`adaptivenet.pruning.PruneState`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptivenet import trees

PyTree = Any

__all__ = ["Average", "reset_moments"]


class Average(NamedTuple):
    """An exponential moving average without bias: the state of most estimators of signals.

    :func:`reset_moments` leaves it alone: what it knows of the gradient at a place stays true when
    the synapse there wakes.

    Attributes:
      value: pytree of float32, the average; masked nodes for leaves that are not floating.
      weight: float32 scalar, the sum of the weights of all that was averaged.
    """

    value: PyTree
    weight: jax.Array

    @property
    def reading(self) -> PyTree:
        """The average itself."""
        return self.value

    def then(self, decay: Any, new: PyTree) -> Average:
        """The average after one more term.

        The value is ``sum_i (1 - decay) decay^(t-i) x_i / weight`` with the weight
        ``1 - decay^t``: what Adam's bias correction gives, kept up to date term by term, so that
        reading it costs nothing.

        Args:
          decay: share of the past that is kept, in [0, 1).
          new: pytree with at least the leaves of ``value``.

        Returns:
          The next state.

        References:
          Kingma and Ba, "Adam", ICLR 2015, section 3.

        >>> average = Average(jnp.zeros(()), jnp.zeros(()))
        >>> for value in (1.0, 3.0):
        ...     average = average.then(0.5, jnp.float32(value))
        >>> round(average.reading.item(), 4)  # (0.5 * 3 + 0.25 * 1) / 0.75
        2.3333
        """
        rest = 1.0 - jnp.asarray(decay).astype(jnp.float32)
        weight = self.weight + (1.0 - self.weight) * rest
        step = rest / weight
        value = trees.map_synapses(
            lambda old, x: old + (x.astype(jnp.float32) - old) * step, self.value, new
        )
        return Average(value, weight)


def zeros(params: PyTree) -> PyTree:
    """float32 zeros for the floating leaves of a tree; masked nodes for the others."""

    def zero(leaf: Any) -> Any:
        if not jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating):
            return optax.MaskedNode()
        return jnp.zeros_like(leaf, dtype=jnp.float32)

    return jax.tree.map(zero, params)


def reset_moments(
    opt_state: PyTree, params: PyTree, born: PyTree, *, fresh: PyTree | None = None
) -> PyTree:
    """Forgets what an optimizer state remembers of synapses that have just woken.

    Every part of the state that has the structure of the parameters (whatever leaves a mask or a
    label took out of it) is parameter-like, and so are its floating leaves of the parameters'
    shapes: Adam's and rmsprop's moments, momentum, accumulated gradients, the iterates that
    schedule-free or lookahead keep. Scalars such as Adam's step count are shared by all synapses
    and stay, so the first step of a woken synapse is a little larger than that of a new network.

    What is not stored by synapse cannot be reset by synapse: adafactor's and sm3's row and column
    statistics, galore's projections, a state that ``optax.flatten`` made a vector, lbfgs's history.
    It stays as it is.

    Args:
      opt_state: any optimizer state.
      params: the parameters.
      born: pytree of bool, True at the synapses that woke; masked nodes for other leaves.
      fresh: the state that the transformation's ``init`` gives, for the values to start from (an
        accumulator of adagrad starts from 0.1, a step size of rprop from the learning rate); zeros
        by default.

    Returns:
      The state, of the same structure.

    Raises:
      ValueError: ``born`` belongs to another tree than the parameters, or ``fresh`` to another
        transformation than the state.

    References:
      Evci et al., "Rigging the lottery", ICML 2020, section 3: new connections start from zero
      weight and fresh momentum.

    >>> params = {"w": jnp.ones(3)}
    >>> tx = optax.sgd(0.1, momentum=0.9)
    >>> _, state = tx.update({"w": jnp.ones(3)}, tx.init(params))
    >>> state = reset_moments(state, params, {"w": jnp.array([True, False, False])})
    >>> optax.tree_utils.tree_get(state, "trace")["w"].tolist()
    [0.0, 1.0, 1.0]
    """
    trees.map_synapses(_check, born, params)
    leaves, treedef = jax.tree.flatten(opt_state)
    if fresh is not None and jax.tree.structure(fresh) != treedef:
        raise ValueError(
            "fresh= is not a state of the transformation that made the optimizer state: give what "
            "its init returns."
        )
    starts = [None] * len(leaves) if fresh is None else jax.tree.leaves(fresh)
    marks = jax.tree.leaves(born, is_leaf=trees.is_masked)
    for place, mark in places(opt_state, born).items():
        leaves[place] = restart(leaves[place], marks[mark], starts[place])
    return jax.tree.unflatten(treedef, leaves)


def _check(born: jax.Array, param: jax.Array) -> None:
    if jnp.shape(born) != jnp.shape(param):
        raise ValueError(
            f"born= has a leaf of shape {jnp.shape(born)} where the parameters have "
            f"{jnp.shape(param)}."
        )


def restart(leaf: jax.Array, born: jax.Array, start: jax.Array | None = None) -> jax.Array:
    """A leaf of a state with what is born set to its start."""
    start = jnp.zeros_like(leaf) if start is None else jnp.asarray(start).astype(leaf.dtype)
    return jnp.where(born, start, leaf)


def places(opt_state: PyTree, born: PyTree) -> dict[int, int]:
    """Which leaves of a state are parameter-like, and of which leaf of the parameters.

    Args:
      opt_state: any optimizer state.
      born: pytree with arrays for synapses and masked nodes elsewhere.

    Returns:
      Positions in ``jax.tree.leaves(opt_state)``, each with the position of its synapses in the
      leaves of ``born`` (masked nodes counted).

    >>> places(({"w": jnp.ones(2)}, jnp.ones(())), {"w": jnp.ones(2, bool)})
    {0: 0}
    """
    marks = jax.tree.leaves(born, is_leaf=trees.is_masked)

    def stop(node: Any) -> bool:
        return isinstance(node, Average) or beside(born, node) is not None

    found: dict[int, int] = {}
    position = 0
    for node in jax.tree.leaves(opt_state, is_leaf=stop):
        parts = None if isinstance(node, Average) else beside(born, node)
        if parts is None:
            position += len(jax.tree.leaves(node))
            continue
        for number, (mark, part) in enumerate(zip(marks, parts, strict=True)):
            inner = jax.tree.leaves(part)
            if len(inner) == 1 and not trees.is_masked(mark) and _like(inner[0], mark):
                found[position] = number
            position += len(inner)
    return found


def beside(mask: PyTree, tree: PyTree) -> list[Any] | None:
    """What stands in a tree at each leaf of a mask.

    A masked node, on either side, stands for all that is below it on the other: a mask has one for
    every leaf that is no synapse, ``optax.masked`` and ``optax.partition`` put one in the place of
    a whole subtree.

    Args:
      mask: pytree with an array for each synapse leaf and masked nodes elsewhere.
      tree: anything.

    Returns:
      One part a leaf of the mask (masked nodes counted); None where the tree is not shaped like it.

    >>> gone = optax.MaskedNode()
    >>> beside({"a": {"w": True, "v": True}, "b": gone}, {"a": gone, "b": {"w": 1.0}})
    [MaskedNode(), MaskedNode(), {'w': 1.0}]
    >>> beside({"a": True}, {"a": {"w": 1.0}}) is None
    True
    """
    if trees.is_masked(mask):
        return [tree]
    if trees.is_masked(tree):
        return [tree] * len(jax.tree.leaves(mask, is_leaf=trees.is_masked))
    if jax.tree_util.all_leaves([mask]):
        # No container where an array should be; but nothing at all will do.
        return (
            [tree] if len(jax.tree.leaves(tree)) == 0 or jax.tree_util.all_leaves([tree]) else None
        )
    marks, shape = _children(mask)
    parts, other = _children(tree)
    if shape != other:
        return None
    found: list[Any] = []
    for mark, part in zip(marks, parts, strict=True):
        below = beside(mark, part)
        if below is None:
            return None
        found += below
    return found


def _children(node: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(node, is_leaf=lambda other: other is not node)


def _like(leaf: Any, mark: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    floating = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    return floating and jnp.shape(leaf) == jnp.shape(mark)


class Resetting:
    """Resets the state of a chain after an event in the step, and only then.

    Attributes:
      init: makes a fresh state of the parameters, for the values to start from.
      branches: what the ``cond`` runs, kept because eager steps compile a branch once for each
        function they are given.
    """

    def __init__(self, init: Callable[[PyTree], Any]) -> None:
        self.init = init
        self.branches: dict[Any, Any] = {}

    def __call__(self, before: Any, after: Any, params: PyTree) -> Any:
        pairs = zip(_waking(before), _waking(after), strict=True)
        for old, new in pairs:
            if not jax.tree.leaves(new.survivors) or _untouched(old, new):
                continue
            found = places(after, new.mask)
            if not found:
                continue
            leaves, treedef = jax.tree.flatten(after)
            touched = [leaves[place] for place in found]
            # The record stays where a wrapper (MultiSteps, say) threw the update away.
            happened = new.record.event & (new.step != old.step)
            act = self._branch(treedef, found)
            touched = jax.lax.cond(
                happened, act, _unchanged, touched, params, new.mask, new.survivors
            )
            for place, leaf in zip(found, touched, strict=True):
                leaves[place] = leaf
            after = jax.tree.unflatten(treedef, leaves)
        return after

    def _branch(self, treedef: Any, found: dict[int, int]) -> Any:
        key = (treedef, tuple(found.items()))
        if key not in self.branches:

            def act(touched: list[Any], params: PyTree, mask: PyTree, survivors: PyTree) -> Any:
                born = woken(mask, survivors)
                # Woken synapses are at zero, whatever they were when this update began.
                landed = trees.merge_synapses(
                    lambda b, p: jnp.where(b, jnp.zeros_like(p), p), born, params
                )
                fresh = jax.tree.leaves(self.init(landed))
                marks = jax.tree.leaves(born, is_leaf=trees.is_masked)
                return [
                    restart(leaf, marks[mark], fresh[place])
                    for leaf, (place, mark) in zip(touched, found.items(), strict=True)
                ]

            self.branches[key] = act
        return self.branches[key]


def _unchanged(touched: list[Any], params: PyTree, mask: PyTree, survivors: PyTree) -> Any:
    del params, mask, survivors
    return touched


_FIELDS = ("mask", "survivors", "step", "record")


def _waking(state: PyTree) -> list[Any]:
    """The states that say which synapses an event woke, in the order of their leaves."""

    def wakes(node: Any) -> bool:
        return all(hasattr(node, field) for field in _FIELDS)

    return [node for node in jax.tree.leaves(state, is_leaf=wakes) if wakes(node)]


def _untouched(old: Any, new: Any) -> bool:
    """Whether the mask was passed on as it is: then this step has no event at all."""
    pairs = zip(jax.tree.leaves(old.mask), jax.tree.leaves(new.mask), strict=True)
    return all(a is b for a, b in pairs)


def woken(mask: PyTree, survivors: PyTree) -> PyTree:
    """The synapses that the last event woke, as a pytree of bool like the mask."""
    return trees.map_synapses(lambda m, s: m & ~s, mask, survivors)
