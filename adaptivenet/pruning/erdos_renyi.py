"""The Erdős-Rényi-kernel allocation: small and thin leaves stay denser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet import counts
from adaptivenet.counts import Count, Share, as_count, clip, less, total
from adaptivenet.pruning.allocations import Contest, Field, Leaf, share_out, singles
from adaptivenet.pruning.demands import AtLeast, Demand

__all__ = ["ErdosRenyiKernel"]


@dataclass(frozen=True)
class ErdosRenyiKernel:
    """The density of a leaf is proportional to ``sum(shape) / prod(shape)``.

    That is ``(in + out) / (in * out)`` for a dense kernel, and
    ``(h + w + in + out) / (h * w * in * out)`` for a convolution. Where this exceeds 1 the leaf
    stays dense, and the others share what is left in the same proportion. Fractions of a unit go
    to the largest remainders, ties by position, so that the total is exactly the target's.

    A leaf with fewer living units than its share keeps those. (As the target falls by one, the
    largest remainders may give a leaf one more than before; where nothing wakes, that one goes to
    the next remainder, so that the total stays exact.) A threshold is the same in every leaf.

    References:
      Evci et al., "Rigging the lottery: making all tickets winners", ICML 2020, section 3(1);
      Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
      connectivity inspired by network science", Nature Communications 9 (2018), for dense kernels.

    >>> from adaptivenet.pruning.demands import as_demand
    >>> leaves = (Leaf("a", (8, 8), jnp.float32, 64), Leaf("b", (2, 6), jnp.float32, 12))
    >>> field = Field(leaves, jnp.array([64, 12], jnp.uint32))
    >>> [int(c.keep) for c in ErdosRenyiKernel().share_out(as_demand(0.75), field)]
    [13, 6]
    """

    def groups(self, sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Every leaf by itself."""
        return singles(sizes)

    def of_leaves(self, leaves: Sequence[Leaf], wanted: int) -> list[int]:
        """How many units of each leaf make up a total, where all are alive.

        Args:
          leaves: the prunable leaves.
          wanted: the total, at most the units of all leaves.

        Returns:
          One integer a leaf; they add up to ``wanted``.

        >>> leaves = (Leaf("a", (8, 8), jnp.float32, 64), Leaf("b", (2, 6), jnp.float32, 12))
        >>> ErdosRenyiKernel().of_leaves(leaves, 19)
        [13, 6]
        """
        weights = [_weight(leaf) for leaf in leaves]
        quotas = [Fraction(0)] * len(leaves)
        rest = {place for place, weight in enumerate(weights) if weight}
        left = Fraction(wanted)
        while rest:
            scale = left / sum(weights[place] * leaves[place].units for place in rest)
            dense = {place for place in rest if scale * weights[place] > 1}
            for place in dense or rest:
                quotas[place] = leaves[place].units * min(scale * weights[place], Fraction(1))
            left -= sum(leaves[place].units for place in dense)
            rest = rest - dense if dense else set()
        numbers = [int(quota) for quota in quotas]
        order = sorted(range(len(leaves)), key=lambda place: numbers[place] - quotas[place])
        for place in order[: wanted - sum(numbers)]:
            numbers[place] += 1
        return numbers

    def share_out(self, demand: Demand, field: Field) -> list[Contest]:
        """The contests: one a leaf."""
        if isinstance(demand, AtLeast) or not field.leaves:
            return share_out(_Singles(), demand, field)
        size = sum(leaf.units for leaf in field.leaves)
        wanted = demand.keep(total(as_count(field.living)), size)
        numbers = _shared(_table(field.leaves), wanted, field)
        return [Contest((i,), Count(numbers.limbs[i])) for i in range(len(field.leaves))]


@dataclass(frozen=True)
class _Singles:
    def groups(self, sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        return singles(sizes)


class _Table(NamedTuple):
    """All that does not depend on the target, exactly; row j holds where j classes are dense.

    A class is the leaves of one density weight; the heaviest become dense first.

    Attributes:
      reached: list of integers; a total above entry j makes class j dense.
      dense: the units of the dense classes, ``[classes, 4]`` limbs.
      shares: of what is left, for each leaf, ``[classes, leaves, 4]`` limbs.
      full: which leaves are dense, ``[classes, leaves]``.
    """

    reached: list[int]
    dense: np.ndarray
    shares: np.ndarray
    full: np.ndarray


def _table(leaves: Sequence[Leaf]) -> _Table:
    weights = [_weight(leaf) for leaf in leaves]
    classes = sorted({weight for weight in weights if weight > 0}, reverse=True) or [Fraction(1)]
    reached, dense, shares, full = [], [], [], []
    for weight in classes:
        is_full = [other > weight for other in weights]
        filled = sum(leaf.units for leaf, yes in zip(leaves, is_full, strict=True) if yes)
        parts = [
            Fraction(0) if yes else other * leaf.units
            for leaf, other, yes in zip(leaves, weights, is_full, strict=True)
        ]
        whole = sum(parts, Fraction(0)) or Fraction(1)
        reached.append(int(filled + whole / weight))  # rounded down: totals are integers
        dense.append(_limbs(filled))
        shares.append([_limbs(min(int(p / whole * 2**64), 2**64 - 1)) for p in parts])
        full.append(is_full)
    return _Table(reached, np.stack(dense), np.array(shares, np.uint32), np.array(full))


def _weight(leaf: Leaf) -> Fraction:
    size = int(np.prod(leaf.shape, dtype=object)) if leaf.shape else 1
    return Fraction(sum(leaf.shape), size) if size and leaf.units else Fraction(0)


def _limbs(number: int) -> np.ndarray:
    return np.array([(number >> (16 * place)) & 0xFFFF for place in range(4)], np.uint32)


def _shared(table: _Table, wanted: Count, field: Field) -> Count:
    """Exact counts of the leaves that add up to what is wanted."""
    thresholds = Count(jnp.asarray(np.stack([_limbs(number) for number in table.reached])))
    passed = jnp.sum(less(thresholds, wanted), dtype=jnp.int32)
    row = jnp.minimum(passed, len(table.reached) - 1)
    full = jnp.asarray(table.full)[row]
    shares = Share(jnp.asarray(table.shares)[row])
    left = wanted - Count(jnp.asarray(table.dense)[row])
    floors, fractions = _times(shares, left)
    sizes = as_count(jnp.asarray([leaf.units for leaf in field.leaves], jnp.uint32))
    floors = Count(jnp.where(full[:, None], sizes.limbs, floors.limbs))
    rank = _rank(jnp.where(full, jnp.uint32(0), fractions))
    rest = (wanted - total(floors)).astype(jnp.int32)
    numbers = floors + as_count((rank < rest).astype(jnp.uint32))
    if field.wakes:
        return numbers
    living = as_count(field.living)
    most = as_count(len(field.leaves))
    short = clip(total(numbers - living), as_count(0), most).astype(jnp.int32)
    spare = less(numbers, living)
    # What a leaf lacks goes to the next remainders, one each.
    order = _rank(jnp.where(spare, jnp.maximum(fractions, jnp.uint32(1)), jnp.uint32(0)))
    return numbers + as_count((spare & (order < short)).astype(jnp.uint32))


def _rank(values: jax.Array) -> jax.Array:
    """The place of each value from the largest, 0, on; ties by position."""
    order = jnp.argsort(jnp.bitwise_not(values), stable=True)
    places = jnp.arange(values.shape[0], dtype=jnp.int32)
    return jnp.zeros_like(places).at[order].set(places)


def _times(share: Share, count: Count) -> tuple[Count, jax.Array]:
    """Product of fractions ``[n]`` and a count: whole part, and 32 bits of the fraction, rounded.

    Rounding makes exact integers and equal fractions what they are, although the shares are
    rounded to 64 bits.
    """
    limbs = share.limbs.shape[-1]
    shape = jnp.broadcast_shapes(share.limbs.shape[:-1], count.limbs.shape[:-1])
    columns = [jnp.zeros(shape, jnp.uint32) for _ in range(2 * limbs + 1)]
    for i in range(limbs):
        for j in range(limbs):
            product = share.limbs[..., i] * count.limbs[..., j]
            columns[i + j] = columns[i + j] + (product & jnp.uint32(0xFFFF))
            columns[i + j + 1] = columns[i + j + 1] + (product >> 16)
    columns[1] = columns[1] + jnp.uint32(1 << 15)
    carried = counts._carry(jnp.stack(columns[: 2 * limbs], axis=-1))
    fraction = carried[..., limbs - 2] | (carried[..., limbs - 1] << 16)
    return Count(carried[..., limbs:]), fraction
