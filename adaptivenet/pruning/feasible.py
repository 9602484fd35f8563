"""What can be known to fail before the first event: targets that leave nothing of a leaf."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet.counts import as_share
from adaptivenet.pruning.allocations import (
    Allocation,
    Field,
    Fixed,
    Leaf,
    PerPath,
    by_kind,
)
from adaptivenet.pruning.budgets import Budget
from adaptivenet.pruning.demands import Sparsity
from adaptivenet.pruning.erdos_renyi import ErdosRenyiKernel
from adaptivenet.pruning.rules import match
from adaptivenet.pruning.schedules import known

__all__ = ["check_target"]


def check_target(allocation: Allocation, leaves: Sequence[Leaf], target: Any = None) -> None:
    """Refuses a target that keeps no unit where an allocation's counts do not depend on scores.

    Nobody asks for a leaf without synapses: every sparsity is below 1, and it is rounding that
    empties a small leaf. So it is refused wherever it can be known, for rules of :class:`PerPath`
    too. (What a leaf earns under `Global` or `Budget` is known at the event only. Row-wise leaves
    keep one in every row.)

    Args:
      allocation: any. (One of your own whose ``share_out`` reads scores needs a true attribute
        ``by_score``: no one can check its counts before an event.)
      leaves: the prunable leaves.
      target: the largest sparsity that the schedule will ask for; None (or a traced one) where it
        is not known.

    Raises:
      ValueError: a leaf would be emptied; the message names it.

    >>> from adaptivenet.pruning.allocations import Uniform
    >>> check_target(Uniform(), [Leaf("w", (2, 3), jnp.float32, 6)], 0.95)
    Traceback (most recent call last):
      ...
    ValueError: a target of 0.95 leaves none of the 6 units of leaf 'w'; lower it, leave the leaf \
out by select=, or give the allocation a floor.
    """
    goal = _fraction(target)
    if isinstance(allocation, PerPath):
        _check_rules(allocation, leaves, goal)
    elif isinstance(allocation, Budget):
        _check_budget(allocation, leaves, goal)
    elif goal is None or not leaves or getattr(allocation, "by_score", False):
        return
    elif isinstance(allocation, ErdosRenyiKernel):
        wanted = _kept(sum(leaf.units for leaf in leaves), goal)
        _check_numbers(allocation.of_leaves(leaves, wanted), leaves, goal)
    elif hasattr(allocation, "share_out"):
        _check_contests(allocation, leaves, goal)
    else:
        _check_groups(allocation, leaves, goal)


def _fraction(value: Any) -> Fraction | None:
    if value is None or not known(value):
        return None
    return Fraction(float(np.max(np.asarray(value))))


def _kept(size: int, goal: Fraction) -> int:
    return size - int(goal * size + Fraction(1, 2))


def _check_groups(allocation: Allocation, leaves: Sequence[Leaf], goal: Fraction) -> None:
    sizes = [leaf.units for leaf in leaves]
    for group in allocation.groups(sizes):
        for members in by_kind(group, leaves):
            if any(leaves[place].row_wise for place in members):
                continue
            size = sum(sizes[place] for place in members)
            if size and _kept(size, goal) == 0 and not _floored(allocation, sizes, members):
                remedy = "give the allocation a floor"
                raise _empty([leaves[place] for place in members], goal, remedy)


def _floored(allocation: Any, sizes: Sequence[int], members: Sequence[int]) -> bool:
    """Whether a floor keeps some unit of a group alive."""
    if not hasattr(allocation, "floors"):
        return False
    with jax.ensure_compile_time_eval():
        floors = allocation.floors(sizes)
        chosen = [] if floors is None else [floors[place] for place in members]
        return any(not known(floor.limbs) or int(floor) > 0 for floor in chosen)


def _check_contests(allocation: Any, leaves: Sequence[Leaf], goal: Fraction) -> None:
    """An allocation of one's own is asked, with all units alive."""
    with jax.ensure_compile_time_eval():
        living = jnp.asarray([leaf.units for leaf in leaves], jnp.uint32)
        demand = Sparsity(as_share(float(goal)))
        for contest in allocation.share_out(demand, Field(tuple(leaves), living)):
            if contest.keep is not None and contest.floors is None and known(contest.keep.limbs):
                _check_numbers(
                    [int(contest.keep)], [leaves[place] for place in contest.members], goal
                )


def _check_numbers(numbers: Sequence[int], leaves: Sequence[Leaf], goal: Fraction) -> None:
    """One number a leaf, or one for all of them."""
    groups = [[leaf] for leaf in leaves] if len(numbers) == len(leaves) else [leaves]
    for number, group in zip(numbers, groups, strict=True):
        row_wise = any(leaf.row_wise for leaf in group)
        if number == 0 and not row_wise and any(leaf.units for leaf in group):
            raise _empty(group, goal, "give it a rule of its own by PerPath")


def _check_rules(allocation: PerPath, leaves: Sequence[Leaf], goal: Fraction | None) -> None:
    found = match(allocation.rules, [leaf.path for leaf in leaves], "PerPath")
    for place, leaf in zip(found, leaves, strict=True):
        if place is None or leaf.row_wise or not leaf.units:
            continue
        pattern, rule = allocation.rules[place]
        if isinstance(rule, Fixed):
            share = _fraction(rule.sparsity)
            if share is not None and _kept(leaf.units, share) == 0:
                raise ValueError(
                    f"PerPath: Fixed({float(share):g}) of {pattern!r} leaves none of the "
                    f"{leaf.units} units of leaf {leaf.path!r}; lower it, or leave the leaf out by "
                    "select=."
                )
            continue
        factor = _fraction(rule)
        if goal is not None and factor is not None and _kept(leaf.units, goal * factor) == 0:
            raise _empty([leaf], goal * factor, f"lower its factor of {pattern!r} in PerPath")
    rest = [leaf for place, leaf in zip(found, leaves, strict=True) if place is None]
    check_target(allocation.default, rest, None if goal is None else float(goal))


def _check_budget(allocation: Budget, leaves: Sequence[Leaf], goal: Fraction | None) -> None:
    costs = allocation.of_units(leaves)
    priced = [(cost, leaf) for cost, leaf in zip(costs, leaves, strict=True) if leaf.units]
    if goal is None or not priced:
        return
    whole = sum(cost * leaf.units for cost, leaf in priced)
    cheapest, leaf = min(priced, key=lambda pair: pair[0])
    if _kept(whole, goal) < cheapest:
        raise ValueError(
            f"a target of {float(goal):g} leaves {_kept(whole, goal)} of a cost of {whole}, for "
            f"which not even a unit of leaf {leaf.path!r} can be kept, which costs {cheapest}; "
            "lower it."
        )


def _empty(leaves: Sequence[Leaf], goal: Fraction, remedy: str) -> ValueError:
    names = ", ".join(repr(leaf.path) for leaf in leaves[:12])
    names += f", ... ({len(leaves)} in all)" if leaves[12:] else ""
    return ValueError(
        f"a target of {float(goal):g} leaves none of the {sum(leaf.units for leaf in leaves)} "
        f"units of leaf {names}; lower it, leave the leaf out by select=, or {remedy}."
    )
