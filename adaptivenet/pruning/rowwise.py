"""Row-wise structures: every row of a leaf keeps the same number of synapses.

A row-wise structure lays a leaf out as rows, each of which is a competition by itself. The leaf
does not compete with others; the allocation only says how many the whole leaf should keep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from adaptivenet import selection, trees
from adaptivenet.counts import Count, as_count, clip, less
from adaptivenet.pruning.demands import AtLeast, Demand, Sparsity
from adaptivenet.pruning.structures import (
    Folding,
    Shape,
    Structure,
    check_axes,
    check_whole,
    misfit,
)

__all__ = ["FanIn", "NofM", "RowWise", "check_demand", "top_rows"]


class RowWise(Folding):
    """Base of structures that keep the same number of synapses in every row of a leaf."""

    def accepts(self, demand: Demand) -> bool:
        """Whether a number a row can be told from the demand."""
        return not isinstance(demand, AtLeast)

    def per_row(self, keep: Count, rows: int, length: int) -> jax.Array:
        """The number to keep in each row.

        Args:
          keep: how many synapses the allocation would keep of the leaf.
          rows: rows of the leaf.
          length: synapses of a row.

        Returns:
          Scalar, uint32.
        """
        raise NotImplementedError

    def _pooled(self, folded: jax.Array) -> jax.Array:
        return folded

    def _any(self, folded: jax.Array) -> jax.Array:
        return folded

    def _column(self, units: jax.Array) -> jax.Array:
        return units


@dataclass(frozen=True)
class NofM(RowWise):
    """Of every m consecutive inputs, n are kept: 2:4 and its kin.

    ``NofM(2, 4)`` holds from the first event that asks for any sparsity (a target above 0) at its
    own density n / m, whatever the target is. ``NofM(m=4)`` is gradual: a leaf whose sparsity is to
    be s keeps ``n = m - floor(s * m)`` of every m, at least 1. The groups do not compete with one
    another nor with other leaves, under no allocation.

    Attributes:
      n: how many of each group are kept; None follows the target.
      m: size of the groups.
      axis: "contraction" is the axis of the inputs, -2: of a dense kernel ``[in, out]``, and of
        the input channels of a convolution ``[height, width, in, out]``. Or any other axis.

    References:
      Mishra et al., "Accelerating sparse deep neural networks", arXiv:2104.08378, for 2:4; Zhou et
      al., "Learning N:M fine-grained structured sparse neural networks from scratch", ICLR 2021.

    >>> NofM(2, 4).pool({"kernel": jnp.arange(8.0).reshape(4, 2)})["kernel"].tolist()
    [[0.0, 2.0, 4.0, 6.0], [1.0, 3.0, 5.0, 7.0]]
    """

    n: int | None = None
    m: int = 4
    axis: int | Literal["contraction"] = "contraction"

    def __post_init__(self) -> None:
        check_whole(self, "m")
        if self.n is not None:
            check_whole(self, "n")
            if self.n > self.m:
                raise ValueError(f"NofM keeps n of m: n={self.n} is more than m={self.m}.")
        check_axes(self, self._axis)

    def accepts(self, demand: Demand) -> bool:
        """All, where n is fixed; a gradual one needs to be told a sparsity."""
        return self.n is not None or isinstance(demand, Sparsity)

    @property
    def _axis(self) -> int:
        return -2 if self.axis == "contraction" else self.axis

    def check(self, path: str, shape: Shape) -> None:
        """Refuses a leaf whose axis is not a whole number of groups."""
        if not -len(shape) <= self._axis < len(shape):
            raise misfit(path, shape, f"it has no axis {self._axis} for {self}")
        if shape[self._axis] % self.m:
            raise misfit(
                path,
                shape,
                f"the {shape[self._axis]} entries of axis {self._axis} are not divisible by "
                f"m={self.m} of {self}",
            )

    def fold(self, leaf: jax.Array) -> jax.Array:
        """``[groups, m]``."""
        return jnp.moveaxis(leaf, self._axis, -1).reshape(leaf.size // self.m, self.m)

    def unfold(self, folded: jax.Array, shape: Shape) -> jax.Array:
        """The leaf again."""
        axis = self._axis % len(shape)
        last = folded.reshape(*shape[:axis], *shape[axis + 1 :], shape[axis])
        return jnp.moveaxis(last, -1, axis)

    def per_row(self, keep: Count, rows: int, length: int) -> jax.Array:
        """n, or as many as the target leaves."""
        if self.n is not None:
            asked = less(keep, as_count(rows * length))
            return jnp.where(asked, jnp.uint32(self.n), jnp.uint32(length))
        # A sparsity of 0.7 in float32 lies below 0.7: not to be counted as one more of every m.
        slack = as_count(rows // 4096)
        whole, left = _divide(keep - slack, rows)
        n = whole + (left > 0).astype(jnp.uint32)
        return jnp.clip(n, jnp.uint32(1), jnp.uint32(length))


@dataclass(frozen=True)
class FanIn(RowWise):
    """Every output keeps the same number of inputs: constant fan-in.

    A leaf of which the allocation keeps the share d keeps ``round(d * fan_in)`` inputs of each
    output, at least 1. Outputs do not compete with one another, nor with other leaves: under
    `Global` a leaf takes the target itself, as under `Uniform`. A regrowth rule drops its share
    where it scores lowest in the leaf, and wakes in each row what that row then lacks. (A schedule
    that cuts a share of the living stalls where that is less than half a synapse a row.)

    Attributes:
      axis: axes of the outputs; the inputs are all others, those of a window among them.

    References:
      Lasby et al., "Dynamic sparse training with structured sparsity", ICLR 2024: SRigL.

    >>> FanIn().pool({"kernel": jnp.arange(6.0).reshape(3, 2)})["kernel"].tolist()
    [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]
    """

    axis: int | tuple[int, ...] = -1

    def __post_init__(self) -> None:
        check_axes(self, *(self.axis if isinstance(self.axis, tuple) else (self.axis,)))

    def _axes(self, dimensions: int) -> tuple[int, ...]:
        axes = (self.axis,) if isinstance(self.axis, int) else self.axis
        return tuple(axis % dimensions for axis in axes)

    def check(self, path: str, shape: Shape) -> None:
        """Refuses a leaf that lacks an axis."""
        axes = (self.axis,) if isinstance(self.axis, int) else self.axis
        if any(not -len(shape) <= axis < len(shape) for axis in axes):
            raise misfit(path, shape, f"it has not all axes of {self}")
        if len(set(self._axes(len(shape)))) != len(axes):
            raise misfit(path, shape, f"{self} names an axis twice")

    def fold(self, leaf: jax.Array) -> jax.Array:
        """``[outputs, inputs]``."""
        axes = self._axes(leaf.ndim)
        outputs = math.prod(leaf.shape[axis] for axis in axes)
        first = jnp.moveaxis(leaf, axes, range(len(axes)))
        return first.reshape(outputs, math.prod(first.shape[len(axes) :]))

    def unfold(self, folded: jax.Array, shape: Shape) -> jax.Array:
        """The leaf again."""
        axes = self._axes(len(shape))
        rest = tuple(n for axis, n in enumerate(shape) if axis not in axes)
        first = folded.reshape(*(shape[axis] for axis in axes), *rest)
        return jnp.moveaxis(first, range(len(axes)), axes)

    def per_row(self, keep: Count, rows: int, length: int) -> jax.Array:
        """The leaf's count over its rows, rounded, at least 1."""
        whole, left = _divide(keep, rows)
        k = whole + (left >= jnp.uint32((rows + 1) // 2)).astype(jnp.uint32)
        return jnp.clip(k, jnp.uint32(min(1, length)), jnp.uint32(length))


def top_rows(scores: jax.Array, k: jax.Array, where: jax.Array) -> jax.Array:
    """Marks the k largest scores of every row among those allowed.

    In the order of :mod:`adaptivenet.selection`, and by the same bisection of the bit pattern:
    elementwise work and sums along rows, no sort, whatever the length. Equal scores are kept by
    position.

    Args:
      scores: floats ``[rows, length]``; compared by absolute value.
      k: uint32, how many to keep: a scalar, or one number a row ``[rows]``.
      where: bool ``[rows, length]``; only these can be kept, all of them where a row has fewer
        than k.

    Returns:
      Bool ``[rows, length]``.

    >>> scores = jnp.array([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    >>> top_rows(scores, jnp.uint32(2), jnp.ones((2, 3), bool)).tolist()
    [[True, False, True], [True, True, False]]
    """
    wide = scores.dtype == jnp.float64
    keys = selection._key(scores, where, wide)
    bits, dtype = (64 if wide else 32), keys.dtype
    wanted = jnp.broadcast_to(k, scores.shape[:1])

    def decide(i: jax.Array, low: jax.Array) -> jax.Array:
        shift = (jnp.asarray(bits - 1, jnp.int32) - i).astype(dtype)
        middle = low | (jnp.asarray(1, dtype) << shift)
        reached = jnp.sum(keys >= middle[:, None], axis=1, dtype=jnp.uint32)
        return jnp.where(reached < wanted, low, middle)

    start = jnp.zeros_like(wanted, dtype=dtype)
    threshold = jax.lax.fori_loop(0, bits, decide, start)[:, None]
    above, equal = keys > threshold, keys == threshold
    rest = wanted - jnp.sum(above, axis=1, dtype=jnp.uint32)
    order = jnp.cumsum(equal, axis=1, dtype=jnp.uint32)
    return where & (above | (equal & (order <= rest[:, None])))


def check_demand(structure: Structure, name: str, demand: Demand) -> None:
    """Refuses a demand from which a row-wise structure cannot tell a number a row."""
    if isinstance(structure, RowWise) and not structure.accepts(demand):
        kind = "a threshold" if isinstance(demand, AtLeast) else "a share of the living"
        raise ValueError(
            f"leaf {name!r}: {structure} keeps a number of synapses a row, which the schedule's "
            f"{kind} does not tell; use a schedule of sparsities such as cubic()."
        )


def _divide(count: Count, rows: int) -> tuple[jax.Array, jax.Array]:
    """A leaf's count over its rows; both fit 32 bits."""
    number = clip(count, as_count(0), as_count(trees.LARGEST_LEAF)).astype(jnp.uint32)
    divisor = jnp.uint32(max(rows, 1))
    return number // divisor, number % divisor
