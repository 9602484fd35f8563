"""Whole numbers in proportion to weights: how woken synapses are shared out among leaves."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from adaptivenet.counts import Count, as_count, clip, cumulative, less, total

__all__ = ["apportion"]

# Bit patterns of quotients: below the smallest normal float every leaf is full.
_SMALLEST = 0x0080_0000
_BITS = 31


def apportion(number: Count, weights: jax.Array, most: jax.Array) -> Count:
    """Shares out a number in proportion to weights, by the method of Sainte-Lague.

    Each unit goes to the leaf of the largest quotient, its weight over one half more than what it
    has; a full leaf's share passes on to the others. What is left when all that have a weight are
    full, and the last units of equal quotients, go to the first leaves.

    Args:
      number: how much there is.
      weights: float ``[leaves]``, none negative; nan counts as 0.
      most: uint32 ``[leaves]``, what each can take.

    Returns:
      ``[leaves]`` counts; their sum is the number, or all that can be taken if that is less.

    References:
      Balinski and Young, "Fair representation: meeting the ideal of one man, one vote", 2001, for
      divisor methods; the divisor is found by bisection instead of giving units one by one.

    >>> most = jnp.array([3, 9, 9], jnp.uint32)
    >>> share = apportion(as_count(10), jnp.array([5.0, 3.0, 1.0]), most)
    >>> share.astype(jnp.int32).tolist()
    [3, 5, 2]
    """
    weights = jnp.nan_to_num(weights.astype(jnp.float32))
    ceiling = most.astype(jnp.float32)

    def held(bits: jax.Array) -> Count:
        """What each leaf holds when every quotient from these bits on is served."""
        quotient = jax.lax.bitcast_convert_type(jnp.maximum(bits, _SMALLEST), jnp.float32)
        served = jnp.floor(weights / quotient + 0.5)
        # What is full is left out before the conversion: it may be beyond the integers.
        full = (served >= ceiling) | (bits < _SMALLEST)
        return as_count(jnp.where(full, most, jnp.where(full, 0.0, served).astype(jnp.uint32)))

    def lower(place: jax.Array, bits: jax.Array) -> jax.Array:
        trial = bits | (jnp.uint32(1) << (_BITS - 1 - place).astype(jnp.uint32))
        return jnp.where(less(total(held(trial)), number), bits, trial)

    # The largest quotient down to which the number suffices; one above it, it does not.
    bits = jax.lax.fori_loop(0, _BITS, lower, jnp.zeros((), jnp.uint32))
    sure, possible = held(bits + 1), held(bits)
    extra = possible - sure
    left = number - total(sure)
    before = cumulative(extra) - extra
    return sure + clip(left - before, as_count(0), extra)
