"""One pruning event as a pure function: score, share out, cut, wake."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adaptivenet import selection
from adaptivenet.counts import Count, as_count, as_share, clip, part, total
from adaptivenet.pruning import regrowth, scores
from adaptivenet.pruning.allocations import Allocation
from adaptivenet.pruning.demands import AtLeast, Demand
from adaptivenet.pruning.record import count_leaves
from adaptivenet.pruning.structures import Structure

PyTree = Any

__all__ = ["Outcome", "cut_and_wake"]


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
      regrow: rule that wakes synapses, or None.
      may_grow: whether the demand can exceed what is alive.
      key: random key of this event.
      signals: further arguments of the score and of the rule.

    Returns:
      The survivors and the new mask. Synapses that are dead are never kept for their score; they
      can only be woken.

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
    unit_scores, treedef = jax.tree.flatten(structure.pool(raw))
    alive = jax.tree.leaves(structure.pool_mask(mask))
    _check_shapes(unit_scores, alive, score)
    sizes = [leaf.size for leaf in alive]
    groups = allocation.groups(sizes)
    numbers = count_leaves(alive)

    kept: list[Any] = [None] * len(alive)
    wanted: list[Count] = []
    thresholds = []
    for group in groups:
        members = jnp.asarray(group, jnp.int32)
        living = total(as_count(numbers[members]))
        chosen = [unit_scores[place] for place in group]
        where = [alive[place] for place in group]
        if isinstance(demand, AtLeast):
            limit = demand.value()
            survivors = [
                ok & ((value.astype(jnp.float32) >= limit) | (limit <= 0))
                for value, ok in zip(chosen, where, strict=True)
            ]
            number = total(as_count(count_leaves(survivors)))
            wanted.append(number)
            thresholds.append(limit)
            if regrow is not None and not isinstance(regrow, regrowth.Everything):
                cut = number - part(as_share(regrow.fraction, "fraction"), number)
                survivors = selection.top_mask(chosen, cut, where=survivors)
        else:
            keep = demand.keep(living, sum(sizes[place] for place in group))
            cut = clip(keep, as_count(0), living)
            if regrow is not None:
                cut = cut - part(as_share(regrow.fraction, "fraction"), cut)
            survivors, threshold = selection.select(chosen, cut, where=where)
            wanted.append(keep)
            thresholds.append(threshold.astype(jnp.float32))
        for place, leaf in zip(group, survivors, strict=True):
            kept[place] = leaf

    if isinstance(regrow, regrowth.Everything):
        awake = [jnp.ones_like(leaf) for leaf in kept]
    elif regrow is not None or may_grow:
        rule = regrow if regrow is not None else regrowth.AtRandom()
        order = scores.supply(rule.priority, params, {**signals, "mask": mask, "key": wake_key})
        priority = jax.tree.leaves(structure.pool(order))
        awake = _wake(priority, kept, groups, wanted)
    else:
        awake = kept
    spread = [structure.spread(jax.tree.unflatten(treedef, units), mask) for units in (kept, awake)]
    return Outcome(spread[0], spread[1], thresholds[0])


def _wake(
    priority: list[jax.Array],
    kept: list[jax.Array],
    groups: tuple[tuple[int, ...], ...],
    wanted: list[Count],
) -> list[jax.Array]:
    awake = list(kept)
    for group, number in zip(groups, wanted, strict=True):
        survivors = [kept[place] for place in group]
        room = number - total(as_count(count_leaves(survivors)))
        dead = [~leaf for leaf in survivors]
        woken = selection.top_mask([priority[place] for place in group], room, where=dead)
        for place, leaf in zip(group, woken, strict=True):
            awake[place] = kept[place] | leaf
    return awake


def _check_shapes(unit_scores: list[Any], alive: list[Any], score: scores.Score) -> None:
    got = [jnp.shape(leaf) for leaf in unit_scores]
    expected = [jnp.shape(leaf) for leaf in alive]
    if got != expected:
        name = getattr(score, "__name__", type(score).__name__)
        raise ValueError(
            f"score {name}() must return leaves shaped like the synapses, {expected}, not {got}."
        )
