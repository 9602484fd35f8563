"""Allocations: how a target is shared out among the leaves.

An allocation splits the leaves into groups, within each of which units compete; a demand then
gives every group its exact integer count. An allocation of one's own needs ``groups`` only. One
that sets the counts itself has ``share_out(demand, field) -> list[Contest]`` as well, as
`ErdosRenyiKernel`, `Budget` and `PerPath` do (and ``by_score = True`` if it reads the scores, which
are not there yet when ``init`` checks the target).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet.counts import Count, Share, as_count, as_share, clip, part, total
from adaptivenet.pruning.demands import AtLeast, Demand, OfAlive, Sparsity
from adaptivenet.pruning.rules import Rules, as_rules, match
from adaptivenet.pruning.schedules import Number, check_sparsity, known

__all__ = [
    "Allocation",
    "Contest",
    "Field",
    "Fixed",
    "Global",
    "Leaf",
    "PerPath",
    "Uniform",
    "share_out",
]


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


class Leaf(NamedTuple):
    """What an allocation may know of a prunable leaf.

    Attributes:
      path: its name.
      shape: of the parameter.
      dtype: of the parameter.
      units: how many units it has (synapses, unless the structure is a coarser one).
      kind: leaves of unlike kinds have unlike structures, and do not compete.
      row_wise: whether its structure keeps the same number in every row; its kind is its own.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    units: int
    kind: int = 0
    row_wise: bool = False


@dataclass(frozen=True)
class Field:
    """What competes at an event.

    Attributes:
      leaves: the prunable leaves.
      living: uint32 ``[leaves]``, the living units of each.
      scores: scores of the units, an array a leaf.
      alive: which units live, an array a leaf.
      wakes: whether an event may wake units, so that a leaf may be given more than lives in it.
    """

    leaves: tuple[Leaf, ...]
    living: jax.Array
    scores: tuple[Any, ...] = ()
    alive: tuple[Any, ...] = ()
    wakes: bool = False

    def of(self, places: Sequence[int]) -> Field:
        """The same of some of the leaves."""
        return Field(
            leaves=tuple(self.leaves[place] for place in places),
            living=self.living[jnp.asarray(places, jnp.int32)],
            scores=tuple(self.scores[place] for place in places) if self.scores else (),
            alive=tuple(self.alive[place] for place in places) if self.alive else (),
            wakes=self.wakes,
        )


class Contest(NamedTuple):
    """Leaves that compete, and how many of their units are kept.

    Attributes:
      members: indices of the leaves.
      keep: how many units; None where a threshold decides.
      limit: the threshold, or None.
      floors: how many each member keeps at the least, or None.
      living: how many live, or None where no one has counted yet.
      currency: contests of one currency may exchange woken units, where the regrowth rule
        redistributes.
    """

    members: tuple[int, ...]
    keep: Count | None
    limit: Any = None
    floors: tuple[Count, ...] | None = None
    living: Count | None = None
    currency: Any = None


def singles(sizes: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
    """Every leaf by itself."""
    return tuple((place,) for place in range(len(sizes)))


def _check_share(value: Number, name: str) -> None:
    """Refuses a share outside [0, 1), where its value is known."""
    if known(value) and not np.all((np.asarray(value) >= 0) & (np.asarray(value) < 1)):
        raise ValueError(f"{name} must be in [0, 1), not {value}.")


@dataclass(frozen=True)
class _Floored:
    """Base of allocations that can keep every leaf alive.

    Attributes:
      floor: units of each leaf that survive whatever the target is.
      floor_share: the same as a share of each leaf, in [0, 1); the larger of the two holds.
    """

    floor: int = 0
    floor_share: Number = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.floor, bool) or not isinstance(self.floor, int) or self.floor < 0:
            raise ValueError(f"floor must be a number of units >= 0, not {self.floor!r}.")
        _check_share(self.floor_share, "floor_share")

    def floors(self, sizes: Sequence[int]) -> tuple[Count, ...] | None:
        """The least that each leaf keeps, or None where there is no floor."""
        if (
            self.floor == 0
            and known(self.floor_share)
            and np.all(np.asarray(self.floor_share) == 0)
        ):
            return None
        share = as_share(self.floor_share, "floor_share")
        least = as_count(self.floor)
        return tuple(
            clip(part(share, as_count(size)), least, as_count(max(size, self.floor)))
            for size in sizes
        )


@dataclass(frozen=True)
class Global(_Floored):
    """All units of the tree compete: one threshold, and layers take what they earn.

    What a layer earns may be nothing at all, which no one can know before the event; the record's
    ``layers`` tells. A floor prevents it: floors are met first, by each leaf's best, and the rest
    of the target goes to the best of all others. Floors above the target are met all the same.

    Attributes:
      floor: units of each leaf that survive whatever the target is.
      floor_share: the same as a share of each leaf, in [0, 1); the larger of the two holds.

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
class Uniform(_Floored):
    """The same share in every leaf.

    Attributes:
      floor: units of each leaf that survive whatever the target is.
      floor_share: the same as a share of each leaf, in [0, 1); the larger of the two holds.

    >>> Uniform().groups([10, 20])
    ((0,), (1,))
    """

    def groups(self, sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Every leaf by itself."""
        return singles(sizes)


@dataclass(frozen=True)
class Fixed:
    """A sparsity of its own, from the first event on that asks for any: for :class:`PerPath`.

    Attributes:
      sparsity: in [0, 1).

    >>> Fixed(0.5).sparsity
    0.5
    """

    sparsity: Number

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, "sparsity")


@dataclass(frozen=True, init=False)
class PerPath:
    """Rules of its own for some leaves, by regular expressions on the path.

    A leaf that a pattern matches is taken by itself; the first pattern that is found in a path
    wins. The other leaves are shared out by the default. The sparsity of the whole tree is then
    not the target's.

    Attributes:
      rules: pairs of pattern and rule (a mapping is accepted). A number in [0, 1] multiplies what
        the schedule asks for (a sparsity, a share of the living, a threshold): 0 leaves a leaf as
        it is, 0.5 makes it half as sparse. :class:`Fixed` is a sparsity that no schedule changes.
      default: allocation of the leaves that no pattern matches.

    >>> PerPath({"conv1": 0.5, "head": Fixed(0.3)}).rules
    (('conv1', 0.5), ('head', Fixed(sparsity=0.3)))
    """

    rules: Rules
    default: Allocation

    def __init__(
        self,
        rules: Mapping[str, Any] | Sequence[tuple[str, Any]],
        default: Allocation = Global(),
    ) -> None:
        object.__setattr__(self, "rules", as_rules(rules, "PerPath"))
        object.__setattr__(self, "default", default)
        for pattern, rule in self.rules:
            if isinstance(rule, Fixed) or not known(rule):
                continue
            number = np.asarray(rule)
            fits = np.issubdtype(number.dtype, np.number) and np.all((number >= 0) & (number <= 1))
            if isinstance(rule, bool) or not fits:
                raise ValueError(
                    f"PerPath: the rule of {pattern!r} must be a multiplier in [0, 1] of what the "
                    f"schedule asks for, or Fixed(sparsity), not {rule!r}."
                )

    @property
    def by_score(self) -> bool:
        """Whether counts depend on scores, so that none can be checked before an event."""
        return getattr(self.default, "by_score", False)

    def groups(self, sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Every leaf by itself: no paths are known here; an event uses :meth:`share_out`."""
        return singles(sizes)

    def share_out(self, demand: Demand, field: Field) -> list[Contest]:
        """One contest for each leaf that a rule names, and those of the default."""
        found = match(self.rules, [leaf.path for leaf in field.leaves], "PerPath")
        contests = []
        for place, number in enumerate(found):
            if number is not None:
                asked = _ruled(demand, self.rules[number][1])
                # Nothing that wakes elsewhere may fill it: its rule is a promise.
                alone = _contest((place,), asked, field, None)._replace(currency=("path", place))
                contests.append(alone)
        rest = tuple(place for place, number in enumerate(found) if number is None)
        if rest:
            for contest in share_out(self.default, demand, field.of(rest)):
                members = tuple(rest[place] for place in contest.members)
                contests.append(contest._replace(members=members))
        return sorted(contests, key=lambda contest: contest.members)


def share_out(allocation: Allocation, demand: Demand, field: Field) -> list[Contest]:
    """The contests of an event.

    Args:
      allocation: any; its own ``share_out`` is called where it has one.
      demand: what the schedule asks for.
      field: what competes.

    Returns:
      Contests; every leaf is a member of exactly one. Leaves of unlike kinds are in unlike ones.

    >>> leaves = (Leaf("a", (4, 2), jnp.float32, 8), Leaf("b", (2, 2), jnp.float32, 4))
    >>> field = Field(leaves, jnp.array([8, 4], jnp.uint32))
    >>> [int(c.keep) for c in share_out(Uniform(), Sparsity(as_share(0.5)), field)]
    [4, 2]
    """
    own = getattr(allocation, "share_out", None)
    if own is not None:
        return own(demand, field)
    sizes = [leaf.units for leaf in field.leaves]
    floors = getattr(allocation, "floors", lambda sizes: None)(sizes)
    contests = []
    for group in allocation.groups(sizes):
        for members in by_kind(group, field.leaves):
            contests.append(_contest(members, demand, field, floors))
    return contests


def by_kind(group: tuple[int, ...], leaves: Sequence[Leaf]) -> list[tuple[int, ...]]:
    """The leaves of a group, apart where their structures are unlike."""
    kinds: dict[int, list[int]] = {}
    for place in group:
        kinds.setdefault(leaves[place].kind, []).append(place)
    return [tuple(members) for members in kinds.values()]


def _contest(
    members: tuple[int, ...], demand: Demand, field: Field, floors: tuple[Count, ...] | None
) -> Contest:
    least = None if floors is None else tuple(floors[place] for place in members)
    if isinstance(demand, AtLeast):
        return Contest(members, None, demand.value(), least)
    living = total(as_count(field.living[jnp.asarray(members, jnp.int32)]))
    keep = demand.keep(living, sum(field.leaves[place].units for place in members))
    return Contest(members, keep, None, least, living)


def _ruled(demand: Demand, rule: Any) -> Demand:
    """What a rule makes of a demand."""
    if isinstance(rule, Fixed):
        share = as_share(rule.sparsity)
        return Sparsity(
            Share(jnp.where(demand.value() > 0, share.limbs, jnp.zeros_like(share.limbs)))
        )
    if known(rule) and np.all(np.asarray(rule) == 1):
        return demand
    if isinstance(demand, AtLeast):
        return AtLeast(demand.value() * jnp.asarray(rule).astype(jnp.float32))
    scaled = Share(part(as_share(rule, "rule"), Count(demand.share.limbs)).limbs)
    return OfAlive(scaled) if isinstance(demand, OfAlive) else Sparsity(scaled)
