"""Who survives a contest, and who wakes in the room that is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adaptivenet import selection
from adaptivenet.counts import Count, Share, as_count, as_share, clip, less, part, total
from adaptivenet.pruning.allocations import Contest, Field
from adaptivenet.pruning.apportion import apportion
from adaptivenet.pruning.record import count_leaves
from adaptivenet.pruning.rowwise import RowWise, top_rows

__all__ = ["cut_below", "cut_rows", "cut_to", "exchanged", "rooms", "wake"]

Found = tuple[list[Any], Any, jax.Array]
Rooms = list[tuple[tuple[int, ...], Any]]


def cut_to(contest: Contest, keep: Count, field: Field, fraction: Share | None) -> Found:
    """Keeps the best of a contest by number.

    Args:
      contest: the leaves that compete.
      keep: how many units are wanted; those that live may be fewer.
      field: what competes.
      fraction: share of the kept that gives way to woken units, or None.

    Returns:
      Masks of the survivors, a leaf each; None (the contest says how many are to be awake in the
      end); and the lowest score kept, float32.
    """
    chosen, where = _members(contest, field)
    living = contest.living
    if living is None:
        living = total(as_count(field.living[jnp.asarray(contest.members, jnp.int32)]))
    number = clip(keep, as_count(0), living)
    if fraction is not None:
        number = number - _giving_way(fraction, number, chosen)
    survivors, threshold = _select(chosen, number, where, contest.floors)
    return survivors, None, threshold.astype(jnp.float32)


def cut_below(contest: Contest, field: Field, fraction: Share | None) -> Found:
    """Keeps what reaches a threshold; as :func:`cut_to`, with the number that does."""
    chosen, where = _members(contest, field)
    limit = contest.limit
    survivors = [
        ok & ((value.astype(jnp.float32) >= limit) | (limit <= 0))
        for value, ok in zip(chosen, where, strict=True)
    ]
    if contest.floors is not None:
        forced, _ = _forced(chosen, where, contest.floors)
        survivors = [a | b for a, b in zip(survivors, forced, strict=True)]
    number = total(as_count(count_leaves(survivors)))
    if fraction is not None:
        rest = number - _giving_way(fraction, number, chosen)
        survivors, _ = _select(chosen, rest, survivors, contest.floors)
    return survivors, number, limit


def cut_rows(structure: RowWise, contest: Contest, field: Field, fraction: Share | None) -> Found:
    """Keeps the best of every row; as :func:`cut_to`, with the number of each row.

    What gives way is chosen in the leaf as a whole, as in SRigL: rows are short, and a share of
    each would round to nothing.
    """
    (scores,), (alive,) = _members(contest, field)
    k = structure.per_row(_asked(contest, field), *scores.shape)
    survivors = [top_rows(scores, k, alive)]
    if fraction is not None:
        number = total(as_count(count_leaves(survivors)))
        rest = number - _giving_way(fraction, number, [scores])
        survivors = selection.top_mask([scores], rest, where=survivors)
    worth = jnp.where(survivors[0], jnp.abs(scores.astype(jnp.float32)), jnp.inf)
    return survivors, k, jnp.min(worth, initial=jnp.inf)


def exchanged(contests: Sequence[Contest], field: Field) -> list[Count | None]:
    """Counts to cut to where woken units move between contests.

    What lives in a contest may have come from others, and stays: of the allocation's counts only
    the total holds. Where that falls, contests give up in proportion to what they hold beyond their
    own count. (Rounded towards cutting: what is cut too much wakes again.)

    Args:
      contests: all of the event.
      field: what competes.

    Returns:
      A count a contest; None where a threshold decides.
    """
    counts: list[Count | None] = [contest.keep for contest in contests]
    purses: dict[Any, list[int]] = {}
    for turn, contest in enumerate(contests):
        if contest.keep is not None and not field.leaves[contest.members[0]].row_wise:
            purses.setdefault(_purse(contest, field), []).append(turn)
    for turns in purses.values():
        if len(turns) < 2:
            continue
        members = [jnp.asarray(contests[turn].members, jnp.int32) for turn in turns]
        living = _stack([total(as_count(field.living[group])) for group in members])
        over = living - _stack([contests[turn].keep for turn in turns])
        asked = total(_stack([contests[turn].keep for turn in turns]))
        excess, beyond = total(living) - asked, total(over)
        ratio = excess.astype(jnp.float32) / jnp.maximum(beyond.astype(jnp.float32), 1.0)
        ratio = ratio * jnp.float32(1 + 2**-21)
        some = clip(part(as_share(ratio), over) + as_count(1), as_count(0), over)
        # A share is below 1: all that is beyond is asked for by itself.
        given = jnp.where(ratio >= jnp.float32(1 - 2**-23), over.limbs, some.limbs)
        given = jnp.where(less(as_count(0), excess), given, jnp.zeros_like(given))
        left = (living - Count(given)).limbs
        for row, turn in enumerate(turns):
            counts[turn] = Count(left[row])
    return counts


def rooms(
    contests: Sequence[Contest], wanted: Sequence[Any], field: Field, redistribute: bool
) -> Rooms:
    """Leaves among which units wake, and how many are to be awake in the end.

    Args:
      contests: all of the event.
      wanted: how many of each are to be awake in the end (of a row-wise leaf: in each row).
      field: what competes.
      redistribute: whether contests of one currency share their room.

    Returns:
      Pairs of indices of leaves and a number.
    """
    if not redistribute:
        return [(contest.members, number) for contest, number in zip(contests, wanted, strict=True)]
    merged: dict[Any, tuple[tuple[int, ...], Any]] = {}
    for contest, number in zip(contests, wanted, strict=True):
        purse = _purse(contest, field)
        members, before = merged.get(purse, ((), None))
        merged[purse] = (members + contest.members, number if before is None else before + number)
    # In the order of the leaves, by which ties are broken.
    return [(tuple(sorted(members)), number) for members, number in merged.values()]


def wake(
    priority: Sequence[jax.Array],
    kept: Sequence[jax.Array],
    rooms: Rooms,
    field: Field,
    shares: jax.Array | None = None,
) -> list[jax.Array]:
    """Wakes the dead of the highest priority in the room that is left.

    Args:
      priority: of the units, an array a leaf.
      kept: the survivors.
      rooms: of :func:`rooms`.
      field: what competes.
      shares: float32 ``[leaves]``, in proportion to which leaves of one room are served; without
        them the highest priority of all leaves is.

    Returns:
      Masks of what is awake, an array a leaf.
    """
    awake = list(kept)
    for group, number in rooms:
        survivors = [kept[place] for place in group]
        dead = [~leaf for leaf in survivors]
        if field.leaves[group[0]].row_wise:
            # Every row wakes what it lacks.
            has = jnp.sum(survivors[0], axis=1, dtype=jnp.uint32)
            room = jnp.maximum(number, has) - has
            woken = [top_rows(priority[group[0]], room, dead[0])]
        else:
            room = number - total(as_count(count_leaves(survivors)))
            wanted = [priority[place] for place in group]
            if shares is None or len(group) == 1:
                woken = selection.top_mask(wanted, room, where=dead)
            else:
                each = apportion(room, shares[jnp.asarray(group)], count_leaves(dead)).limbs
                woken = [
                    selection.top_mask([leaf], Count(each[turn]), where=[dead[turn]])[0]
                    for turn, leaf in enumerate(wanted)
                ]
        for place, leaf in zip(group, woken, strict=True):
            awake[place] = kept[place] | leaf
    return awake


def _members(contest: Contest, field: Field) -> tuple[list[Any], list[Any]]:
    chosen = [field.scores[place] for place in contest.members]
    return chosen, [field.alive[place] for place in contest.members]


def _giving_way(fraction: Share, number: Count, chosen: Sequence[jax.Array]) -> Count:
    """How many of the kept give way: never more than there are others to wake instead."""
    others = as_count(sum(leaf.size for leaf in chosen)) - number
    return clip(part(fraction, number), as_count(0), others)


def _asked(contest: Contest, field: Field) -> Count:
    """How many units a leaf by itself is to keep: none where there is a positive threshold."""
    size = as_count(field.leaves[contest.members[0]].units)
    if contest.keep is None:
        return Count(jnp.where(contest.limit > 0, jnp.zeros_like(size.limbs), size.limbs))
    if contest.floors is None:
        return contest.keep
    return clip(contest.keep, contest.floors[0], size)


def _select(
    chosen: list[Any], number: Count, where: list[Any], floors: tuple[Count, ...] | None
) -> tuple[Any, jax.Array]:
    """The best of a group; the best of each leaf first, up to its floor."""
    if floors is None:
        return selection.select(chosen, number, where=where)
    forced, limits = _forced(chosen, where, floors)
    others = [ok & ~must for ok, must in zip(where, forced, strict=True)]
    rest = number - total(as_count(count_leaves(forced)))
    best, threshold = selection.select(chosen, rest, where=others)
    both = [a | b for a, b in zip(forced, best, strict=True)]
    lowest = [limit.astype(jnp.float32) for limit in (threshold, *limits)]
    return both, jnp.min(jnp.stack(lowest))


def _forced(
    chosen: list[Any], where: list[Any], floors: tuple[Count, ...]
) -> tuple[list[Any], list[jax.Array]]:
    living = count_leaves(where)
    masks, limits = [], []
    for place, (score, ok, floor) in enumerate(zip(chosen, where, floors, strict=True)):
        least = clip(floor, as_count(0), as_count(living[place]))
        found = selection.select([score], least, where=[ok])
        masks += found.mask
        limits.append(found.threshold)
    return masks, limits


def _purse(contest: Contest, field: Field) -> Any:
    return contest.currency, field.leaves[contest.members[0]].kind


def _stack(numbers: Sequence[Any]) -> Count:
    return Count(jnp.stack([number.limbs for number in numbers]))
