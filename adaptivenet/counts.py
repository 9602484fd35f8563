"""Exact counts and fractions of any size, without 64-bit integers.

JAX has no 64-bit integers by default, and float32 cannot even count to 2^25, so the number of
synapses that a sparsity leaves of a large network would drift. A :class:`Count` holds a 64-bit
integer as four 16-bit limbs in uint32 (the least significant first), a :class:`Share` a fraction in
[0, 1) as 64 bits after the point. Both are pytrees and work under jit, vmap and scan.
"""

from __future__ import annotations

import fractions
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet import trees

__all__ = ["Count", "Share", "as_count", "as_share", "clip", "cumulative", "less", "part", "total"]

_LIMBS = 4
_BITS = 16
_LOW = np.uint32(0xFFFF)
# Sums of limbs stay below 2^32 for as many terms.
_MOST_TERMS = 2**16 - 1


@trees.register_dataclass
@dataclass(frozen=True)
class Count:
    """A non-negative integer below 2^64.

    Attributes:
      limbs: uint32 ``[..., 4]``, 16 bits in each, the least significant first.

    >>> int(as_count(2**40) + as_count(5))
    1099511627781
    """

    limbs: Any

    def __add__(self, other: Count) -> Count:
        """Adds (modulo 2^64)."""
        return Count(_carry(self.limbs + other.limbs))

    def __sub__(self, other: Count) -> Count:
        """Subtracts, never below zero."""
        difference = Count(_carry(self.limbs + (_LOW - other.limbs) + _one(self.limbs)))
        below = less(self, other)[..., None]
        return Count(jnp.where(below, jnp.uint32(0), difference.limbs))

    def __int__(self) -> int:
        """The Python integer (of a scalar that is not traced)."""
        limbs = np.asarray(self.limbs)
        return sum(int(limb) << (_BITS * place) for place, limb in enumerate(limbs))

    def astype(self, dtype: Any) -> jax.Array:
        """Converts to a dtype: exact for integers that hold it, rounded for floats."""
        out = jnp.zeros(self.limbs.shape[:-1], dtype)
        for place in reversed(range(_LIMBS)):
            scale = jnp.asarray(2**_BITS if jnp.issubdtype(dtype, jnp.floating) else 0, dtype)
            shifted = out * scale if jnp.issubdtype(dtype, jnp.floating) else out << _BITS
            out = shifted + self.limbs[..., place].astype(dtype)
        return out


@trees.register_dataclass
@dataclass(frozen=True)
class Share:
    """A fraction in [0, 1).

    Attributes:
      limbs: uint32 ``[..., 4]``; the value is the 64-bit integer they hold over 2^64.

    >>> round(float(as_share(0.95)), 6)
    0.95
    """

    limbs: Any

    def __float__(self) -> float:
        """The Python float (of a scalar that is not traced)."""
        return int(Count(self.limbs)) / 2**64

    def astype(self, dtype: Any) -> jax.Array:
        """Converts to a floating dtype."""
        out = jnp.zeros(self.limbs.shape[:-1], dtype)
        for place in range(_LIMBS):
            out = (out + self.limbs[..., place].astype(dtype)) * jnp.asarray(2.0**-_BITS, dtype)
        return out


def _one(limbs: jax.Array) -> jax.Array:
    return jnp.zeros_like(limbs).at[..., 0].set(jnp.uint32(1))


def _carry(limbs: jax.Array) -> jax.Array:
    out, carry = [], jnp.zeros(limbs.shape[:-1], jnp.uint32)
    for place in range(limbs.shape[-1]):
        value = limbs[..., place] + carry
        out.append(value & _LOW)
        carry = value >> _BITS
    return jnp.stack(out, axis=-1)


def as_count(value: Any) -> Count:
    """Makes a count of a Python integer or an integer array.

    Args:
      value: a non-negative Python integer below 2^64, an integer array, or a count.

    Returns:
      The count, of the array's shape.

    Raises:
      ValueError: the integer is negative or too large.
      TypeError: the value is not an integer.

    >>> int(as_count(jnp.uint32(7)))
    7
    """
    if isinstance(value, Count):
        return value
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        if not 0 <= int(value) < 2**64:
            raise ValueError(f"a count must be in [0, 2^64), not {value}.")
        limbs = [(int(value) >> (_BITS * place)) & 0xFFFF for place in range(_LIMBS)]
        return Count(jnp.asarray(np.array(limbs, np.uint32)))
    if isinstance(value, np.ndarray) and value.dtype in (np.int64, np.uint64):
        # jnp.asarray would keep the low 32 bits only.
        wide = np.maximum(value, 0).astype(np.uint64)
        places = np.arange(0, _LIMBS * _BITS, _BITS, dtype=np.uint64)
        return Count(jnp.asarray(((wide[..., None] >> places) & 0xFFFF).astype(np.uint32)))
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"a count must be an integer, not {array.dtype}.")
    if jnp.issubdtype(array.dtype, jnp.signedinteger):
        array = jnp.maximum(array, jnp.zeros_like(array))
    places = jnp.iinfo(array.dtype).bits // _BITS or 1
    limbs = [
        (array >> jnp.asarray(_BITS * place, array.dtype)).astype(jnp.uint32) & _LOW
        if place < places
        else jnp.zeros(array.shape, jnp.uint32)
        for place in range(_LIMBS)
    ]
    return Count(jnp.stack(limbs, axis=-1))


def as_share(value: Any, name: str = "sparsity") -> Share:
    """Makes a fraction of a number.

    Args:
      value: a Python number in [0, 1), taken exactly; or a floating array (possibly traced),
        which is clipped to [0, 1) and taken with the 24 bits float32 has; or a share.
      name: what the number is, for the message.

    Returns:
      The fraction.

    Raises:
      ValueError: a Python number outside [0, 1).

    >>> int(part(as_share(0.99), as_count(10**8)))
    99000000
    """
    if isinstance(value, Share):
        return value
    if isinstance(value, int | float | fractions.Fraction | np.floating | np.integer):
        if not (math.isfinite(value) and 0 <= value < 1):
            raise ValueError(f"{name} must be in [0, 1), not {value}.")
        exact = int(_exact(value) * 2**64 + fractions.Fraction(1, 2))
        return Share(as_count(min(exact, 2**64 - 1)).limbs)
    rest = jnp.clip(jnp.asarray(value).astype(jnp.float32), 0.0, 1.0 - 2.0**-24)
    limbs = []
    for _ in range(_LIMBS):  # every step is exact: a scaling by 2^16 and a subtraction
        rest = rest * jnp.float32(2**_BITS)
        digit = jnp.floor(rest)
        limbs.append(digit.astype(jnp.uint32))
        rest = rest - digit
    return Share(jnp.stack(limbs[::-1], axis=-1))


def _exact(value: Any) -> fractions.Fraction:
    if isinstance(value, np.floating | np.integer):
        value = value.item()
    return fractions.Fraction(value)


def part(share: Share, count: Count) -> Count:
    """The part of a count that a fraction makes, rounded to the nearest integer (half up).

    Args:
      share: the fraction.
      count: the whole.

    Returns:
      ``round(share * count)``, exact.

    >>> int(part(as_share(0.5), as_count(2**63 + 2)))
    4611686018427387905
    """
    columns = [jnp.zeros((), jnp.uint32) for _ in range(2 * _LIMBS + 1)]
    for i in range(_LIMBS):
        for j in range(_LIMBS):
            product = share.limbs[..., i] * count.limbs[..., j]
            columns[i + j] = columns[i + j] + (product & _LOW)
            columns[i + j + 1] = columns[i + j + 1] + (product >> _BITS)
    columns[_LIMBS - 1] = columns[_LIMBS - 1] + jnp.uint32(1 << (_BITS - 1))
    columns = jnp.broadcast_arrays(*columns[: 2 * _LIMBS])
    return Count(_carry(jnp.stack(columns, axis=-1))[..., _LIMBS:])


def less(a: Count, b: Count) -> jax.Array:
    """Tells where ``a < b``.

    >>> bool(less(as_count(3), as_count(2**33)))
    True
    """
    result = jnp.zeros(jnp.broadcast_shapes(a.limbs.shape[:-1], b.limbs.shape[:-1]), bool)
    for place in range(_LIMBS):
        x, y = a.limbs[..., place], b.limbs[..., place]
        result = (x < y) | ((x == y) & result)
    return result


def clip(count: Count, low: Count, high: Count) -> Count:
    """Limits a count to ``[low, high]``.

    >>> int(clip(as_count(9), as_count(1), as_count(5)))
    5
    """
    limbs = jnp.where(less(count, low)[..., None], low.limbs, count.limbs)
    return Count(jnp.where(less(high, Count(limbs))[..., None], high.limbs, limbs))


def total(count: Count, axis: int = -1) -> Count:
    """Sums counts along an axis (of fewer than 2^16 terms).

    >>> int(total(as_count(jnp.array([2**31, 2**31, 1], jnp.uint32))))
    4294967297
    """
    axis = axis % (count.limbs.ndim - 1)
    _check_terms(count.limbs.shape[axis])
    return Count(_carry(jnp.sum(count.limbs, axis=axis, dtype=jnp.uint32)))


def cumulative(count: Count, *, reverse: bool = False) -> Count:
    """Cumulative sums along the last axis (of fewer than 2^16 terms), inclusive.

    >>> cumulative(as_count(jnp.array([1, 2, 3], jnp.uint32)), reverse=True).astype(
    ...     jnp.int32).tolist()
    [6, 5, 3]
    """
    axis = count.limbs.ndim - 2
    _check_terms(count.limbs.shape[axis])
    sums = jax.lax.cumsum(count.limbs, axis=axis, reverse=reverse)
    return Count(_carry(sums))


def _check_terms(terms: int) -> None:
    if terms > _MOST_TERMS:
        raise ValueError(f"at most {_MOST_TERMS} counts can be summed at once, not {terms}.")
