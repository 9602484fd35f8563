"""The exact k-th largest score of a whole pytree, without sorting or gathering.

The bit pattern of a non-negative float, read as an unsigned integer, is monotone in its value. The
k-th largest is therefore found digit by digit: count how many scores fall in each bin of the
leading bits, descend into the bin that holds the k-th, and repeat. All that is needed is
elementwise work and sums, so a sharded tree costs one small all-reduce a pass and no gather, and a
population is a batch axis.

Order: infinity, then finite scores, then zero (-0.0 counts as 0.0; signs are dropped), then nan,
then synapses left out by ``where=``. Equal scores are kept by position: leaves in their order,
elements in row-major order.

References:
  Alabi et al., "Fast k-selection algorithms for graphics processing units", JEA 17 (2012), for
  selection by radix counting.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet import counts, trees

PyTree = Any
Method = Literal["auto", "histogram", "bisection"]

__all__ = ["Selection", "kth_largest", "select", "top_mask"]

_FEW = 16_384  # up to here bisection is quick on a CPU as well, and compiles sooner
_DIGIT = 11  # bits a histogram pass decides: 2,048 bins stay in the first-level cache


class Selection(NamedTuple):
    """What :func:`select` found.

    Attributes:
      mask: pytree of bool, True at exactly ``k`` positions.
      threshold: scalar, the k-th largest score (inf where k is 0; nan in formats without inf).
    """

    mask: PyTree
    threshold: jax.Array


def top_mask(
    scores: PyTree, k: Any, *, where: PyTree | None = None, method: Method = "auto"
) -> PyTree:
    """Marks the k largest scores of a pytree: exactly k True.

    Args:
      scores: pytree of floating arrays of any shapes and dtypes (masked nodes are passed over);
        compared by absolute value.
      k: how many to keep, 0 <= k <= size: a Python integer, an integer array (possibly traced; it
        is then clipped), or a :class:`adaptivenet.counts.Count`.
      where: pytree of bool like ``scores``; positions that are False rank below all others.
      method: "histogram" (fast on CPU), "bisection" (elementwise work and sums only), or "auto":
        the first for many scores on a CPU, the second elsewhere.

    Returns:
      Pytree of bool, shaped like ``scores``.

    Raises:
      ValueError: k is outside [0, size].
      TypeError: a leaf is not floating.

    >>> top_mask({"a": jnp.array([3.0, 1.0]), "b": jnp.array([2.0, 2.0])}, 2)["b"].tolist()
    [True, False]
    """
    return select(scores, k, where=where, method=method).mask


def kth_largest(scores: PyTree, k: Any, *, method: Method = "auto") -> jax.Array:
    """The k-th largest absolute value of a whole pytree, exactly.

    Args:
      scores: pytree of floating arrays.
      k: rank from 1 (the largest) to the number of elements; as for :func:`top_mask`.
      method: as for :func:`top_mask`.

    Returns:
      Scalar of the leaves' dtype; float32 (or float64) where they have several.

    Raises:
      ValueError: k is outside [1, size].

    >>> float(kth_largest([jnp.array([1.0, -5.0]), jnp.array([[2.0]])], 2))
    2.0
    """
    if isinstance(k, int | np.integer) and k < 1:
        raise ValueError(f"k must be at least 1, not {k}.")
    return select(scores, k, method=method).threshold


def select(
    scores: PyTree, k: Any, *, where: PyTree | None = None, method: Method = "auto"
) -> Selection:
    """Finds the k-th largest score of a pytree and marks the k largest.

    Args:
      scores: as for :func:`top_mask`.
      k: as for :func:`top_mask`.
      where: as for :func:`top_mask`.
      method: as for :func:`top_mask`.

    Returns:
      The mask and the threshold.

    Raises:
      ValueError, TypeError: as :func:`top_mask`.

    >>> found = select({"a": jnp.array([3.0, jnp.nan, 0.5])}, 2)
    >>> found.mask["a"].tolist(), float(found.threshold)
    ([True, False, True], 0.5)
    """
    leaves, treedef = jax.tree.flatten(scores)
    size = trees.size(leaves)
    wanted = _wanted(k, size)
    for name, leaf in zip(trees.paths(scores), leaves, strict=True):
        if not jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating):
            raise TypeError(f"score {name!r} has dtype {jnp.asarray(leaf).dtype}, not a float.")
        if math.prod(jnp.shape(leaf)) > trees.LARGEST_LEAF:
            raise ValueError(
                f"score {name!r} has more than {trees.LARGEST_LEAF} elements, which a 32-bit "
                "position cannot number; split the leaf."
            )
    wide = any(jnp.asarray(leaf).dtype == jnp.float64 for leaf in leaves)
    dtypes = {jnp.asarray(leaf).dtype for leaf in leaves}
    dtype = dtypes.pop() if len(dtypes) == 1 else jnp.dtype("float64" if wide else "float32")
    if size == 0:
        return Selection(
            jax.tree.unflatten(treedef, [jnp.zeros(jnp.shape(leaf), bool) for leaf in leaves]),
            jnp.asarray(jnp.inf, dtype),
        )
    allowed: list[Any] = [None] * len(leaves)
    if where is not None:
        allowed = jax.tree.leaves(where)
        expected, got = ([jnp.shape(leaf) for leaf in part] for part in (leaves, allowed))
        if got != expected:
            raise ValueError(
                f"where= must have leaves shaped like the scores, {expected}, not {got}."
            )
    keys = [_key(jnp.asarray(leaf), ok, wide) for leaf, ok in zip(leaves, allowed, strict=True)]
    histogram = _use_histogram(method, keys)
    bits = 64 if wide else 32
    threshold = _kth_key(keys, wanted, bits, histogram)
    masks = _masks(keys, threshold, wanted, histogram)
    value = _value(threshold, dtype, wide)
    none = ~counts.less(counts.as_count(0), wanted)
    return Selection(
        jax.tree.unflatten(treedef, masks), jnp.where(none, jnp.asarray(jnp.inf, dtype), value)
    )


def _wanted(k: Any, size: int) -> counts.Count:
    if isinstance(k, bool | float):
        raise TypeError(f"k must be an integer, not {k!r}.")
    if isinstance(k, int | np.integer) and not 0 <= k <= size:
        raise ValueError(f"k={k} is outside [0, {size}], the number of scores.")
    return counts.clip(counts.as_count(k), counts.as_count(0), counts.as_count(size))


def _use_histogram(method: Method, keys: list[jax.Array]) -> bool:
    if method not in ("auto", "histogram", "bisection"):
        raise ValueError(f"method={method!r}; choose 'auto', 'histogram' or 'bisection'.")
    if method == "auto":
        many = sum(key.size for key in keys) > _FEW
        return many and jax.default_backend() == "cpu" and not any(map(_explicitly_sharded, keys))
    return method == "histogram"


def _explicitly_sharded(array: jax.Array) -> bool:
    # A scatter into bins has no sharding rule on meshes of Explicit axes; sums have one.
    spec = getattr(getattr(jax.typeof(array), "sharding", None), "spec", ())
    return any(axis is not None for axis in spec)


def _key(leaf: jax.Array, allowed: Any, wide: bool) -> jax.Array:
    """Unsigned integers in the order of the scores: 0 left out, 1 nan, then |score| + 2."""
    target, unsigned = (jnp.float64, jnp.uint64) if wide else (jnp.float32, jnp.uint32)
    # By integer arithmetic, so that denormals survive processors that flush them.
    if leaf.dtype == jnp.bfloat16:
        short = jax.lax.bitcast_convert_type(leaf, jnp.uint16).astype(jnp.uint32)
        pattern = short << 16
        leaf = jax.lax.bitcast_convert_type(pattern, jnp.float32) if wide else leaf
    if wide and leaf.dtype == jnp.float32:
        pattern = jax.lax.bitcast_convert_type(leaf, jnp.uint32) & jnp.uint32(0x7FFFFFFF)
        denormal = pattern.astype(jnp.float64) * 2.0**-149
        leaf = jnp.where(pattern < jnp.uint32(1 << 23), denormal, leaf.astype(jnp.float64))
    if wide or leaf.dtype != jnp.bfloat16:
        pattern = jax.lax.bitcast_convert_type(leaf.astype(target), unsigned)
    pattern = pattern & jnp.asarray(jnp.iinfo(unsigned).max >> 1, unsigned)
    infinity = jnp.asarray(np.array(np.inf, target).view(unsigned), unsigned)
    one = jnp.asarray(1, unsigned)
    key = jnp.where(pattern > infinity, one, pattern + one + one)
    return key if allowed is None else jnp.where(allowed, key, jnp.zeros_like(key))


def _value(key: jax.Array, dtype: Any, wide: bool) -> jax.Array:
    target = jnp.float64 if wide else jnp.float32
    two = jnp.asarray(2, key.dtype)
    value = jax.lax.bitcast_convert_type(jnp.maximum(key, two) - two, target)
    return jnp.where(key < two, jnp.asarray(jnp.nan, target), value).astype(dtype)


def _number(flags: jax.Array) -> counts.Count:
    """The number of True of one leaf (below 2^32)."""
    return counts.as_count(jnp.sum(flags, dtype=jnp.uint32))


def _sum(parts: list[counts.Count]) -> counts.Count:
    if len(parts) == 1:
        return parts[0]
    return counts.total(counts.Count(jnp.stack([part.limbs for part in parts])), axis=0)


def _kth_key(keys: list[jax.Array], wanted: counts.Count, bits: int, histogram: bool) -> jax.Array:
    """The `wanted`-th largest of unsigned keys of which only the low `bits` are used."""
    if histogram:
        return _kth_by_histogram(keys, wanted, bits)
    return _kth_by_bisection(keys, wanted, bits)


def _kth_by_bisection(keys: list[jax.Array], wanted: counts.Count, bits: int) -> jax.Array:
    dtype = keys[0].dtype

    def decide(i: jax.Array, low: jax.Array) -> jax.Array:
        shift = (jnp.asarray(bits - 1, jnp.int32) - i).astype(dtype)
        middle = low | (jnp.asarray(1, dtype) << shift)
        reached = _sum([_number(key >= middle) for key in keys])
        return jnp.where(counts.less(reached, wanted), low, middle)

    start = jnp.zeros((), dtype)
    return jax.lax.fori_loop(0, bits, decide, start)


def _kth_by_histogram(keys: list[jax.Array], wanted: counts.Count, bits: int) -> jax.Array:
    dtype = keys[0].dtype
    passes = -(-bits // _DIGIT)

    # A loop, although short and of known length: the body is compiled once.
    def descend(i: jax.Array, carry: tuple[jax.Array, counts.Count]) -> Any:
        prefix, above = carry
        low = (jnp.asarray((passes - 1) * _DIGIT, jnp.int32) - i * _DIGIT).astype(dtype)
        bins = _sum([_histogram(key, prefix, low) for key in keys])
        reached = counts.cumulative(bins, reverse=True) + above
        # The last bin from which on at least `wanted` scores are found holds the k-th.
        enough = ~counts.less(reached, wanted)
        digit = jnp.maximum(jnp.sum(enough, dtype=jnp.int32) - 1, 0)
        limbs = jnp.concatenate([reached.limbs, above.limbs[None]])
        above = counts.Count(jnp.take(limbs, digit + 1, axis=0))
        return (prefix << _DIGIT) | digit.astype(dtype), above

    start = (jnp.zeros((), dtype), counts.as_count(0))
    return jax.lax.fori_loop(0, passes, descend, start)[0]


def _histogram(key: jax.Array, prefix: jax.Array, low: jax.Array) -> counts.Count:
    """Counts the next digit of the keys that begin with a prefix."""
    shifted = key >> low
    digit = (shifted & jnp.asarray(2**_DIGIT - 1, key.dtype)).astype(jnp.int32)
    weight = ((shifted >> _DIGIT) == prefix).astype(jnp.uint32)
    return counts.as_count(jnp.zeros(2**_DIGIT, jnp.uint32).at[digit].add(weight))


def _masks(
    keys: list[jax.Array], threshold: jax.Array, wanted: counts.Count, histogram: bool
) -> list[jax.Array]:
    """Keeps what is above the threshold and, by position, as many equals as are still wanted."""
    above = _sum([_number(key > threshold) for key in keys])
    equal = counts.as_count(
        jnp.stack([jnp.sum(key == threshold, dtype=jnp.uint32) for key in keys])
    )
    before = counts.cumulative(equal)
    before = counts.Count(
        jnp.concatenate([jnp.zeros_like(before.limbs[:1]), before.limbs[:-1]], axis=0)
    )
    rest = wanted - above
    zero = counts.as_count(0)
    take = counts.clip(
        counts.Count(jnp.broadcast_to(rest.limbs, equal.limbs.shape)) - before, zero, equal
    )
    partial = counts.less(zero, take) & counts.less(take, equal)
    some = counts.less(zero, take)

    def whole() -> tuple[jax.Array, ...]:
        return tuple(
            (key > threshold) | ((key == threshold) & some[i]) for i, key in enumerate(keys)
        )

    def by_position() -> tuple[jax.Array, ...]:
        # Leaves before this one are taken whole, those behind not at all: one leaf is split.
        split = jnp.argmax(partial)
        ranks = [_rank((key == threshold) & partial[i]) for i, key in enumerate(keys)]
        bits = max(key.size for key in keys).bit_length()
        cut = _kth_key(ranks, counts.Count(take.limbs[split]), bits, histogram)
        return tuple(
            (key > threshold) | ((key == threshold) & some[i] & (~partial[i] | (ranks[i] >= cut)))
            for i, key in enumerate(keys)
        )

    return list(jax.lax.cond(jnp.any(partial), by_position, whole))


def _rank(flags: jax.Array) -> jax.Array:
    """Numbers the True flags of a leaf: larger for earlier positions, zero where False."""
    position = jnp.zeros(flags.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(flags.ndim)):
        place = jax.lax.broadcasted_iota(jnp.uint32, flags.shape, axis)
        position = position + place * jnp.uint32(stride)
        stride *= flags.shape[axis]
    return jnp.where(flags, jnp.uint32(flags.size) - position, jnp.uint32(0))
