"""Symbolic axes: which positions of which arrays are one and the same unit.

The axis of an array is a product of factors, outermost first, as in a row-major reshape; a factor
is an :class:`Atom`, a number of indivisible units, or a :class:`Concat` of axes one behind the
other. Two axes that meet in a sum or a product are made equal by :func:`unify`, which splits atoms
where one side is finer. What stands for the same units then holds the same atoms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "Atom",
    "Axis",
    "Concat",
    "atoms",
    "cut",
    "fix",
    "fixed",
    "fresh",
    "join",
    "positions",
    "regroup",
    "resolve",
    "size",
    "unify",
    "whereabouts",
]


class Atom:
    """Units that nothing divides further, so far.

    Attributes:
      count: how many.
      why: why none of them may be taken out; empty if they may.
    """

    __slots__ = ("_becomes", "count", "why")

    def __init__(self, count: int, why: str = "") -> None:
        self.count = count
        self.why = why
        self._becomes: Axis | None = None

    def __repr__(self) -> str:
        return f"Atom({self.count}{', ' + repr(self.why) if self.why else ''})"

    def becomes(self, axis: Axis) -> None:
        """Lets an axis of the same size stand in its place."""
        self._becomes = axis
        if self.why:
            fix(axis, self.why)


@dataclass(frozen=True)
class Concat:
    """Axes one behind the other."""

    parts: tuple[Axis, ...]


Axis = tuple["Atom | Concat", ...]


def fresh(count: int, why: str = "") -> Axis:
    """An axis of units that are like no others.

    >>> fresh(3), fresh(1)
    ((Atom(3),), ())
    """
    return () if count == 1 else (Atom(count, why),)


def resolve(axis: Axis) -> Axis:
    """The axis in terms of what its atoms have become."""
    found: list[Atom | Concat] = []
    for factor in axis:
        if isinstance(factor, Atom):
            found += [factor] if factor._becomes is None else resolve(factor._becomes)
            continue
        parts = [part for part in map(resolve, factor.parts) if size(part)]
        spread: list[Axis] = []
        for part in parts:
            # A concatenation of concatenations is one.
            alone = len(part) == 1 and isinstance(part[0], Concat)
            spread += part[0].parts if alone else [part]  # pyright: ignore[reportAttributeAccessIssue]
        found += spread[0] if len(spread) == 1 else [Concat(tuple(spread))]
    return tuple(found)


def size(axis: Axis) -> int:
    """How many positions it has."""
    return math.prod(map(_count, axis))


def _count(factor: Atom | Concat) -> int:
    return factor.count if isinstance(factor, Atom) else sum(map(size, factor.parts))


def atoms(axis: Axis) -> Iterator[Atom]:
    """All atoms of it, as often as they occur."""
    for factor in resolve(axis):
        if isinstance(factor, Atom):
            yield factor
        else:
            for part in factor.parts:
                yield from atoms(part)


def fix(axis: Axis, why: str) -> None:
    """Forbids to take out any of its units; the first reason stays."""
    for atom in atoms(axis):
        atom.why = atom.why or why


def fixed(axis: Axis) -> bool:
    """Whether all of its units have to stay."""
    return all(atom.why for atom in atoms(axis))


def unify(one: Axis, other: Axis, why: str) -> bool:
    """Makes two axes of the same size equal.

    Args:
      one: an axis.
      other: an axis.
      why: what is noted at both if no common division is found; then both are fixed.

    Returns:
      Whether they are equal now.
    """
    one, other = resolve(one), resolve(other)
    if one == other:
        return True
    for known, free in ((one, other), (other, one)):
        if fixed(known):
            fix(free, next((atom.why for atom in atoms(known)), why))
            return True
    if _unify(list(one), list(other)):
        return True
    fix(one, why)
    fix(other, why)
    return False


def _unify(one: list[Atom | Concat], other: list[Atom | Concat]) -> bool:
    if not one or not other:
        return not one and not other
    first, second = one[0], other[0]
    if _count(first) > _count(second):
        return _unify(other, one)
    if _count(first) == _count(second):
        if not _same(first, second):
            return False
        # What was unified may have divided what follows.
        return _unify(list(resolve(tuple(one[1:]))), list(resolve(tuple(other[1:]))))
    if isinstance(second, Atom):
        if second.count % _count(first):
            return False
        rest = fresh(second.count // _count(first))
        if any(atom is second for atom in atoms((first,))):
            return False
        second.becomes((first, *rest))
        return _unify(
            list(resolve(tuple(one[1:]))), list(resolve((*rest, *resolve(tuple(other[1:])))))
        )
    # Equal groups of parts one behind the other are a product with their number.
    number = _count(first)
    if len(second.parts) % number:
        return False
    each = len(second.parts) // number
    groups = [
        resolve((Concat(second.parts[i : i + each]),)) for i in range(0, len(second.parts), each)
    ]
    if len(set(map(size, groups))) != 1:
        return False
    fix((first,), "counts parts that lie one behind the other")
    if not all(unify(a, b, "parts differ") for a, b in itertools.pairwise(groups)):
        return False
    rest = resolve((*groups[0], *other[1:]))
    return _unify(list(resolve(tuple(one[1:]))), list(rest))


def _same(first: Atom | Concat, second: Atom | Concat) -> bool:
    if first is second:
        return True
    if isinstance(first, Concat) and isinstance(second, Atom):
        first, second = second, first
    if isinstance(first, Atom):
        if any(atom is first for atom in atoms((second,))):
            return isinstance(second, Atom)
        if isinstance(second, Atom) and first.why and not second.why:
            first, second = second, first
        first.becomes((second,))
        return True
    assert isinstance(second, Concat)
    edges = sorted({*_edges(first), *_edges(second)})
    if not (_divide(first, edges) and _divide(second, edges)):
        return False
    (left,), (right,) = resolve((first,)), resolve((second,))
    assert isinstance(left, Concat)
    assert isinstance(right, Concat)
    return all(
        _unify(list(resolve(a)), list(resolve(b)))
        for a, b in zip(left.parts, right.parts, strict=True)
    )


def _edges(concat: Concat) -> list[int]:
    return list(itertools.accumulate(map(size, concat.parts)))


def _divide(concat: Concat, edges: Sequence[int]) -> bool:
    """Splits the parts of a concatenation at these positions."""
    start = 0
    for part in concat.parts:
        end = start + size(part)
        inner = [edge - start for edge in edges if start < edge < end]
        if inner and not _split(part, inner):
            return False
        start = end
    return True


def _split(axis: Axis, edges: Sequence[int]) -> bool:
    """Makes the first factor of an axis a concatenation with these inner edges."""
    axis = resolve(axis)
    first, inner = axis[0], size(axis[1:])
    if any(edge % inner for edge in edges):
        return False
    edges = [edge // inner for edge in edges]
    if isinstance(first, Concat):
        return _divide(first, edges)
    bounds = [0, *edges, first.count]
    first.becomes((Concat(tuple(fresh_one(b - a) for a, b in itertools.pairwise(bounds))),))
    return True


def fresh_one(count: int) -> Axis:
    """Like :func:`fresh`, but a single position has an atom as well: it may be taken out."""
    return (Atom(count),)


def cut(axis: Axis, start: int, stop: int) -> Axis | None:
    """The part of an axis from a position up to another.

    Args:
      axis: an axis.
      start: the first position.
      stop: the one behind the last.

    Returns:
      The part; None if it is not made of whole units.
    """
    axis = resolve(axis)
    if (start, stop) == (0, size(axis)):
        return axis
    if fixed(axis):
        return fresh(stop - start, next((atom.why for atom in atoms(axis)), "is a single position"))
    edges = [edge for edge in (start, stop) if 0 < edge < size(axis)]
    if not axis or not _split(axis, edges):
        return None
    axis = resolve(axis)
    first, rest = axis[0], axis[1:]
    assert isinstance(first, Concat)
    inner, at, found = size(rest), 0, []
    for part in first.parts:
        end = at + size(part) * inner
        if start <= at and end <= stop:
            found.append(part)
        at = end
    return resolve((Concat(tuple(found)), *rest))


def join(parts: Sequence[Axis]) -> Axis:
    """Axes one behind the other, as an axis."""
    if all(map(fixed, parts)):
        why = next((atom.why for part in parts for atom in atoms(part)), "is a single position")
        return fresh(sum(map(size, parts)), why)
    return resolve((Concat(tuple(part if part else fresh_one(1) for part in parts)),))


def regroup(axes: Sequence[Axis], sizes: Sequence[int], why: str) -> list[Axis]:
    """What a row-major reshape makes of the axes of an array.

    Args:
      axes: one a dimension.
      sizes: of the new dimensions.
      why: what is noted at axes that do not divide each other; they are fixed.

    Returns:
      One axis a new dimension.
    """
    rest = [factor for axis in axes for factor in resolve(axis)]
    found: list[Axis] = []
    place = 0
    while place < len(sizes):
        wanted, taken, have = sizes[place], [], 1
        while have < wanted and rest:
            factor = rest[0]
            count = _count(factor)
            if wanted % (have * count) == 0:
                taken.append(rest.pop(0))
                have *= count
                continue
            need = wanted // have
            if wanted % have or count % need:
                break
            outer, inner = fresh(need), fresh(count // need)
            if not _unify([*outer, *inner], [factor]):
                break
            rest = [*resolve(outer), *resolve(inner), *rest[1:]]
        if have == wanted:
            found.append(tuple(taken))
            place += 1
            continue
        # The fewest dimensions, old and new, that are as large as each other stay as they are.
        end = place + 1
        while have != wanted:
            if have < wanted:
                taken.append(rest.pop(0))
                have *= _count(taken[-1])
            else:
                wanted *= sizes[end]
                end += 1
        fix(tuple(taken), why)
        found += [fresh(count, why) for count in sizes[place:end]]
        place = end
    return found


Keep = Callable[[Atom], np.ndarray]


def positions(axis: Axis, keep: Keep) -> np.ndarray:
    """Positions of an axis whose units stay, in order.

    Args:
      axis: an axis.
      keep: which units of an atom stay, as sorted numbers.

    Returns:
      int64 ``[kept]``.
    """
    found = np.zeros(1, np.int64)
    for factor in resolve(axis):
        if isinstance(factor, Atom):
            inner = np.asarray(keep(factor), np.int64)
        else:
            starts = [0, *_edges(factor)]
            parts = [positions(p, keep) + s for p, s in zip(factor.parts, starts, strict=False)]
            inner = np.concatenate(parts)
        found = (found[:, None] * _count(factor) + inner).ravel()
    return found


def whereabouts(axis: Axis, atom: Atom) -> Iterator[np.ndarray]:
    """Which unit of an atom each position of an axis is, once for every place it has there.

    Args:
      axis: an axis.
      atom: one of its atoms.

    Yields:
      int64 ``[size]``, -1 where a position is none of them.
    """
    axis = resolve(axis)
    for place, factor in enumerate(axis):
        outer, inner = size(axis[:place]), size(axis[place + 1 :])
        numbers: list[np.ndarray] = []
        if factor is atom:
            numbers = [np.arange(atom.count)]
        elif isinstance(factor, Concat):
            starts = [0, *_edges(factor)]
            for part, start in zip(factor.parts, starts, strict=False):
                for found in whereabouts(part, atom):
                    row = np.full(_count(factor), -1)
                    row[start : start + len(found)] = found
                    numbers.append(row)
        for row in numbers:
            yield np.tile(np.repeat(row, inner), outer)
