"""The budget allocation: the target is a share of what synapses cost, not of their number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet import selection
from adaptivenet.counts import Count, as_count, as_share, less, part, total
from adaptivenet.pruning.allocations import Contest, Field, Leaf
from adaptivenet.pruning.demands import AtLeast, Demand
from adaptivenet.pruning.rules import Rules, as_rules, match

Kind = Literal["parameters", "bytes", "macs"]

__all__ = ["Budget"]


@dataclass(frozen=True, init=False)
class Budget:
    """The target is a share of a cost: parameters, bytes, or multiply-accumulates (MACs).

    A sparsity of 0.9 leaves a tenth of the cost of the dense tree, never more. Units are kept in
    the order of score per cost until the next one no longer fits: whatever is left out scores no
    more per cost than anything kept, and less than one unit's cost of the budget is unspent. Scores
    per cost are compared in float32; equal ones are taken by position as far as they fit. Where
    every synapse costs 1 this is `Global`.

    Where an event may wake units and all that live fit, dead ones of every leaf wake in the same
    proportion.

    Attributes:
      costs: pairs of pattern and cost of one synapse, a positive integer (a mapping is accepted);
        the first pattern that is found in a path wins.
      kind: what a leaf costs that no pattern matches: "parameters", 1 a synapse; "bytes", the size
        of its dtype; "macs", 1 for a dense kernel ``[in, out]`` (an example, or a position). A
        convolution's synapse is used once at each output position: give their number in ``costs``.

    References:
      Dantzig, "Discrete-variable extremum problems", Operations Research 5 (1957), for the greedy
      solution of the knapsack problem by value per weight.

    >>> Budget({"conv1": 576, "conv2": 64}, "macs").costs
    (('conv1', 576), ('conv2', 64))
    """

    costs: Rules
    kind: Kind

    # Counts depend on scores: no one can check them before an event.
    by_score = True

    def __init__(
        self,
        costs: Mapping[str, int] | Sequence[tuple[str, int]] = (),
        kind: Kind = "parameters",
    ) -> None:
        object.__setattr__(self, "costs", as_rules(costs, "Budget"))
        object.__setattr__(self, "kind", kind)
        if kind not in ("parameters", "bytes", "macs"):
            raise ValueError(f"kind must be 'parameters', 'bytes' or 'macs', not {kind!r}.")
        for pattern, cost in self.costs:
            if isinstance(cost, bool) or not isinstance(cost, int | np.integer) or cost < 1:
                raise ValueError(
                    f"Budget: the cost of {pattern!r} must be an integer >= 1, not {cost!r}; half "
                    "a byte is 4 bits: count all in bits. Leave out what is free by select=."
                )

    def groups(self, sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """One group of all leaves."""
        return (tuple(range(len(sizes))),)

    def of_leaves(self, leaves: Sequence[Leaf]) -> list[int]:
        """The cost of a synapse of each leaf.

        Args:
          leaves: the prunable leaves.

        Returns:
          One integer a leaf.

        Raises:
          ValueError: a pattern matches no leaf, or a leaf's cost is not known.

        >>> Budget(kind="bytes").of_leaves([Leaf("w", (2, 2), jnp.bfloat16, 4)])
        [2]
        """
        places = match(self.costs, [leaf.path for leaf in leaves], "Budget")
        found = []
        for place, leaf in zip(places, leaves, strict=True):
            if place is not None:
                found.append(int(self.costs[place][1]))
            elif self.kind == "bytes":
                found.append(jnp.dtype(leaf.dtype).itemsize)
            elif self.kind == "macs" and len(leaf.shape) != 2:
                raise ValueError(
                    f"Budget: the MACs of a synapse of leaf {leaf.path!r} of shape {leaf.shape} "
                    "are not known; give the number of output positions in costs="
                    f"{{{leaf.path!r}: ...}}."
                )
            else:
                found.append(1)
        return found

    def of_units(self, leaves: Sequence[Leaf]) -> list[int]:
        """The cost of a unit of each leaf: of all its synapses.

        Raises:
          ValueError: as :meth:`of_leaves`, or a leaf's structure keeps the same number a row.
        """
        for leaf in leaves:
            if leaf.row_wise:
                raise ValueError(
                    f"Budget chooses unit by unit, which leaf {leaf.path!r} cannot follow, as all "
                    "its rows keep the same number; use Uniform() or ErdosRenyiKernel(), or give "
                    "the leaf a rule of its own by PerPath(..., default=Budget(...))."
                )
        pairs = zip(self.of_leaves(leaves), leaves, strict=True)
        return [cost * math.prod(leaf.shape) // max(leaf.units, 1) for cost, leaf in pairs]

    def share_out(self, demand: Demand, field: Field) -> list[Contest]:
        """The contests: one a leaf, of as many units as the budget buys there."""
        leaves = field.leaves
        if not leaves:
            return []
        if isinstance(demand, AtLeast):
            raise ValueError(
                "Budget shares out a cost, which a threshold does not ask for; use Global(), or a "
                "schedule of sparsities such as cubic()."
            )
        costs = self.of_units(leaves)
        whole = sum(cost * leaf.units for cost, leaf in zip(costs, leaves, strict=True))
        if whole >= 2**63:
            raise ValueError(f"Budget: a total cost of {whole} is too large; count in thousands.")
        table = _limbs(costs)
        budget = demand.keep(_cost(field.living, table), whole)
        numbers = _bought(field, costs, table, budget)
        return [
            Contest((place,), as_count(numbers[place]), currency=("cost", cost, leaf.kind))
            for place, (cost, leaf) in enumerate(zip(costs, leaves, strict=True))
        ]


def _bought(field: Field, costs: list[int], table: jax.Array, budget: Count) -> jax.Array:
    """How many units of each leaf the budget buys, uint32 ``[leaves]``."""
    cheapest = min(costs)
    keys = [
        # By the cheapest, so that costs that are all equal change no bit of a score.
        selection._key(score.astype(jnp.float32) * jnp.float32(cheapest / cost), alive, False)
        for score, alive, cost in zip(field.scores, field.alive, costs, strict=True)
    ]

    def above(limit: jax.Array) -> jax.Array:
        return jnp.stack([jnp.sum(key > limit, dtype=jnp.uint32) for key in keys])

    def decide(i: jax.Array, low: jax.Array) -> jax.Array:
        middle = low | (jnp.uint32(1) << (jnp.int32(31) - i).astype(jnp.uint32))
        # Too much is kept from `middle` on: the last level that does not fit is not below it.
        over = less(budget, _cost(above(middle - jnp.uint32(1)), table))
        return jnp.where(over, middle, low)

    level = jax.lax.fori_loop(0, 32, decide, jnp.zeros((), jnp.uint32))
    kept = above(level)
    # At level 0 (where all that live fit) stand only the dead.
    equal = jnp.stack([jnp.sum((key == level) & (key > 0), dtype=jnp.uint32) for key in keys])
    if field.wakes:
        dead = jnp.asarray([leaf.units for leaf in field.leaves], jnp.uint32) - field.living
        dead = jnp.where(level == 0, dead, jnp.zeros_like(dead))
        left = (budget - _cost(kept, table)).astype(jnp.float32)
        price = jnp.maximum(_cost(dead, table).astype(jnp.float32), jnp.float32(1))
        share = as_share(jnp.clip(left / price * jnp.float32(1 - 2**-20), 0.0, 1.0))
        most = part(share, as_count(dead)).astype(jnp.uint32)
        most = jnp.where(most > 0, most - jnp.uint32(1), most)  # `part` may have rounded up
        kept, equal = kept + most, jnp.where(level == 0, dead - most, equal)
    return kept + _filled(equal, table, budget - _cost(kept, table))


def _filled(numbers: jax.Array, table: jax.Array, budget: Count) -> jax.Array:
    """How many of the given units of each leaf fit, leaf by leaf."""

    def leaf(left: jax.Array, row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        number, cost = row

        def decide(i: jax.Array, taken: jax.Array) -> jax.Array:
            more = taken | (jnp.uint32(1) << (jnp.int32(31) - i).astype(jnp.uint32))
            fits = (more <= number) & ~less(Count(left), _cost(more[None], cost[None]))
            return jnp.where(fits, more, taken)

        taken = jax.lax.fori_loop(0, 32, decide, jnp.zeros((), jnp.uint32))
        return (Count(left) - _cost(taken[None], cost[None])).limbs, taken

    return jax.lax.scan(leaf, budget.limbs, (numbers, table))[1]


def _limbs(costs: list[int]) -> jax.Array:
    rows = [[(cost >> (16 * place)) & 0xFFFF for place in range(4)] for cost in costs]
    return jnp.asarray(np.array(rows, np.uint32).reshape(len(costs), 4))


def _cost(numbers: jax.Array, table: jax.Array) -> Count:
    """The sum of numbers times costs, exact: uint32 ``[leaves]`` and limbs ``[leaves, 4]``."""
    limbs = as_count(numbers).limbs
    columns = [jnp.zeros(numbers.shape, jnp.uint32) for _ in range(5)]
    for i in range(2):  # the numbers are of 32 bits
        for j in range(4 - i):
            product = limbs[..., i] * table[..., j]
            columns[i + j] = columns[i + j] + (product & jnp.uint32(0xFFFF))
            columns[i + j + 1] = columns[i + j + 1] + (product >> 16)
    carried = Count(jnp.stack(columns[:4], axis=-1)) + as_count(0)
    return total(carried)
