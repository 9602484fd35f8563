"""One pruning event as a pure function: score, share out, cut, wake."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet import trees
from adaptivenet.counts import as_share
from adaptivenet.pruning import allocations, competition, feasible, regrowth, scores
from adaptivenet.pruning.allocations import Allocation, Field, Leaf
from adaptivenet.pruning.coupled import Coupled
from adaptivenet.pruning.demands import Demand
from adaptivenet.pruning.record import count_leaves
from adaptivenet.pruning.rowwise import NofM, RowWise, check_demand
from adaptivenet.pruning.schedules import known
from adaptivenet.pruning.structures import Element, Structure, of_leaves

PyTree = Any

__all__ = ["Outcome", "check", "cut_and_wake"]


class Outcome(NamedTuple):
    """What an event decided.

    Attributes:
      kept: pytree of bool, the synapses that survived the cut; the others land on zero.
      mask: pytree of bool, the survivors and those woken: what may learn from now on.
      threshold: float32 scalar, the lowest score kept.
    """

    kept: PyTree
    mask: PyTree
    threshold: jax.Array


def cut_and_wake(
    params: PyTree,
    mask: PyTree,
    demand: Demand,
    *,
    score: scores.Score,
    structure: Structure,
    allocation: Allocation,
    regrow: regrowth.Regrowth | None,
    may_grow: bool,
    key: jax.Array,
    signals: Mapping[str, Any],
) -> Outcome:
    """Revises a mask once.

    Args:
      params: the synapses (masked nodes elsewhere), zero where dead.
      mask: the mask so far.
      demand: what the schedule asks for.
      score: scores of the synapses.
      structure: what is cut as one.
      allocation: which leaves share a count.
      regrow: rule that wakes synapses, or None. Its ``fraction`` may be a function of the signal
        ``step``. With an attribute ``redistribute`` that is true, woken synapses of all leaves
        compete together, wherever they were cut: the total is kept, and leaves grow and shrink.
      may_grow: whether the demand can exceed what is alive.
      key: random key of this event.
      signals: further arguments of the score and of the rule. Both are given ``mask`` and ``key``
        as well, and the rule ``kept``, the mask after the cut.

    Returns:
      The survivors and the new mask. Synapses that are dead are never kept for their score; they
      can only be woken.

    Raises:
      ValueError: the score returns other shapes, the structure does not fit a leaf or the demand,
        or a pattern of the structure or the allocation matches no leaf.

    >>> from adaptivenet.pruning import Element, Global, demands
    >>> w = {"w": jnp.array([[3.0, -1.0], [0.5, 2.0]])}
    >>> out = cut_and_wake(w, {"w": jnp.ones((2, 2), bool)}, demands.as_demand(0.5),
    ...     score=scores.magnitude, structure=Element(), allocation=Global(), regrow=None,
    ...     may_grow=False, key=jax.random.key(0), signals={})
    >>> out.kept["w"].tolist()
    [[True, False], [False, True]]
    """
    score_key, wake_key = jax.random.split(key)
    raw = scores.supply(score, params, {**signals, "mask": mask, "key": score_key})
    _check_shapes(jax.tree.leaves(raw), jax.tree.leaves(mask), score)
    unit_scores, treedef = jax.tree.flatten(structure.pool(raw))
    alive = jax.tree.leaves(structure.pool_mask(mask))
    rule = regrow if regrow is not None or not may_grow else regrowth.AtRandom()
    leaves, structures = _leaves(params, structure, [leaf.shape for leaf in alive])
    for one, leaf in zip(structures, leaves, strict=True):
        check_demand(one, leaf.path, demand)
    field = Field(
        leaves=leaves,
        living=count_leaves(alive),
        scores=tuple(unit_scores),
        alive=tuple(alive),
        wakes=rule is not None,
    )
    contests = allocations.share_out(allocation, demand, field)
    everything = isinstance(regrow, regrowth.Everything)
    fraction = None
    if regrow is not None and not everything:
        fraction = as_share(_fraction(regrow, signals), "fraction")
    redistribute = bool(getattr(regrow, "redistribute", False)) and not everything
    wanted = [contest.keep for contest in contests]
    counts = competition.exchanged(contests, field) if redistribute else wanted

    kept: list[Any] = [None] * len(alive)
    thresholds = []
    for turn, (contest, count) in enumerate(zip(contests, counts, strict=True)):
        row_wise = structures[contest.members[0]]
        if isinstance(row_wise, RowWise):
            found = competition.cut_rows(row_wise, contest, field, fraction)
        elif count is None:
            found = competition.cut_below(contest, field, fraction)
        else:
            found = competition.cut_to(contest, count, field, fraction)
        survivors, number, threshold = found
        wanted[turn] = number if number is not None else wanted[turn]
        thresholds.append(threshold)
        for place, leaf in zip(contest.members, survivors, strict=True):
            kept[place] = leaf

    plain = type(structure) is Element
    survivors = structure.spread(jax.tree.unflatten(treedef, kept), mask)
    if not plain:
        # What was dead within a unit that survives stays dead.
        survivors = jax.tree.map(jnp.logical_and, survivors, mask)
    if everything:
        return Outcome(survivors, jax.tree.map(jnp.ones_like, survivors), thresholds[0])
    if rule is None:
        return Outcome(survivors, survivors, thresholds[0])
    known_then = {**signals, "mask": mask, "kept": survivors, "key": wake_key}
    priority = jax.tree.leaves(structure.pool(scores.supply(rule.priority, params, known_then)))
    rooms = competition.rooms(contests, wanted, field, redistribute)
    shares, own = None, getattr(rule, "shares", None)
    if redistribute and own is not None:
        found = scores.supply(own, params, known_then)
        shares = jnp.stack(jax.tree.leaves(found)).astype(jnp.float32)
    awake = competition.wake(priority, kept, rooms, field, shares)
    if plain:
        return Outcome(survivors, jax.tree.unflatten(treedef, awake), thresholds[0])
    born = jax.tree.unflatten(treedef, [new & ~old for new, old in zip(awake, kept, strict=True)])
    if isinstance(structure, Coupled):
        woken = structure.wake(born, jax.tree.unflatten(treedef, awake), mask)
    else:
        woken = structure.spread(born, mask)
    return Outcome(survivors, jax.tree.map(jnp.logical_or, survivors, woken), thresholds[0])


def check(
    params: PyTree, *, structure: Structure, allocation: Allocation, target: Any = None
) -> None:
    """Refuses what can be known to fail before the first event.

    Args:
      params: the synapses (masked nodes elsewhere); shapes and dtypes suffice.
      structure: what is cut as one.
      allocation: which leaves share a count.
      target: the largest sparsity that the schedule will ask for, where it is known.

    Raises:
      ValueError: the structure does not fit a leaf, a pattern matches none, the target would empty
        a leaf (see :func:`adaptivenet.pruning.feasible.check_target`), or it is 0 where the
        structure fixes the density.

    >>> from adaptivenet.pruning import Element, Uniform
    >>> check({"w": jnp.ones((2, 3))}, structure=Element(), allocation=Uniform(), target=0.95)
    Traceback (most recent call last):
      ...
    ValueError: a target of 0.95 leaves none of the 6 units of leaf 'w'; lower it, leave the leaf \
out by select=, or give the allocation a floor.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), params)
    pooled = jax.tree.leaves(jax.eval_shape(structure.pool, shapes))
    leaves, structures = _leaves(params, structure, [leaf.shape for leaf in pooled])
    none = target is not None and known(target) and not np.any(np.asarray(target))
    for one, leaf in zip(structures, leaves, strict=True):
        if isinstance(one, NofM) and one.n is not None and none:
            raise ValueError(
                f"leaf {leaf.path!r}: {one} fixes the density; the target only says when, and must "
                "be above 0."
            )
    feasible.check_target(allocation, leaves, target)


def _leaves(
    params: PyTree, structure: Structure, pooled: Sequence[tuple[int, ...]]
) -> tuple[tuple[Leaf, ...], list[Structure]]:
    """What allocations may know of the leaves, and the structure of each."""
    if isinstance(structure, Coupled):
        groups = structure.leaves_of(params)
        return groups, [structure] * len(groups)
    arrays, names = jax.tree.leaves(params), trees.paths(params)
    shapes = [tuple(leaf.shape) for leaf in arrays]
    structures = of_leaves(structure, names, shapes)
    leaves = []
    for place, (one, name, array) in enumerate(zip(structures, names, arrays, strict=True)):
        row_wise = isinstance(one, RowWise)
        # Row-wise leaves compete with none; others with those of an equal structure.
        kind = place if row_wise else structures.index(one)
        units = math.prod(pooled[place])
        leaves.append(Leaf(name, shapes[place], array.dtype, units, kind, row_wise))
    return tuple(leaves), structures


def _fraction(regrow: regrowth.Regrowth, signals: Mapping[str, Any]) -> Any:
    fraction = regrow.fraction
    if not callable(fraction):
        return fraction
    if "step" not in signals:
        raise ValueError("the fraction of regrowth is a function of the step: give signals step=.")
    return fraction(signals["step"])


def _check_shapes(raw: list[Any], mask: list[Any], score: scores.Score) -> None:
    got = [jnp.shape(leaf) for leaf in raw]
    expected = [jnp.shape(leaf) for leaf in mask]
    if got != expected:
        name = getattr(score, "__name__", type(score).__name__)
        raise ValueError(
            f"score {name}() must return leaves shaped like the synapses, {expected}, not {got}."
        )
