"""Counts and shares against Python's integers and fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from adaptivenet import counts

LIMIT = 2**64
EDGES = [0, 1, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**48, 2**63, LIMIT - 1]
numbers = st.integers(0, LIMIT - 1) | st.sampled_from(EDGES)


def stack(values) -> counts.Count:
    return counts.Count(jnp.stack([counts.as_count(value).limbs for value in values]))


def unstack(batch: counts.Count) -> list[int]:
    return [int(counts.Count(row)) for row in batch.limbs]


def exact_share(share: counts.Share) -> Fraction:
    return Fraction(int(counts.Count(share.limbs)), LIMIT)


def half_up(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


# Compiled once; that eager calls agree is a test of its own below.
add = jax.jit(lambda a, b: a + b)
subtract = jax.jit(lambda a, b: a - b)
less = jax.jit(counts.less)
part = jax.jit(counts.part)
clip = jax.jit(counts.clip)


@given(numbers)
def test_round_trip(n):
    assert int(counts.as_count(n)) == n


@given(numbers, numbers)
@example(LIMIT - 1, 1)
def test_add_and_subtract(a, b):
    x, y = counts.as_count(a), counts.as_count(b)
    assert int(add(x, y)) == (a + b) % LIMIT
    assert int(subtract(x, y)) == max(a - b, 0)


@given(numbers, numbers)
@example(2**32, 2**32 - 1)
def test_less(a, b):
    x, y = counts.as_count(a), counts.as_count(b)
    assert bool(less(x, y)) == (a < b)
    assert not bool(less(x, x))


@given(numbers, numbers, numbers)
def test_clip(n, a, b):
    low, high = sorted((a, b))
    got = clip(*map(counts.as_count, (n, low, high)))
    assert int(got) == min(max(n, low), high)


@given(st.floats(0, 1, exclude_max=True) | st.sampled_from([0.9, 0.95, 0.99, 0.999]), numbers)
@example(0.5, 2**63 + 1)
def test_part_is_the_rounded_product_of_the_exact_fraction(share, n):
    value = counts.as_share(share)
    # The share is the float to the nearest 2^-64 ...
    assert abs(exact_share(value) - Fraction(share)) <= Fraction(1, 2 * LIMIT) or share > 1 - 2**-60
    # ... and the product of it is rounded once.
    assert int(part(value, counts.as_count(n))) == half_up(exact_share(value) * n)


@pytest.mark.parametrize("power", range(2, 16))
@pytest.mark.parametrize("percent", [1, 5, 50, 70, 90, 95, 99])
def test_part_of_a_decimal_share_is_what_a_person_expects(power, percent):
    n = 10**power
    assert int(part(counts.as_share(percent / 100), counts.as_count(n))) == percent * n // 100


def test_part_keeps_its_promise_at_1e8():
    assert int(counts.part(counts.as_share(0.99), counts.as_count(10**8))) == 99_000_000
    # float32 has no number within 0.5 of this one:
    assert int(counts.part(counts.as_share(0.9), counts.as_count(123_456_789))) == 111_111_110
    assert round(np.float32(0.9) * np.float32(123_456_789)) != 111_111_110


@given(st.lists(numbers.map(lambda n: n >> 12), min_size=1, max_size=6))
def test_total_and_cumulative(values):
    batch = stack(values)
    assert int(counts.total(batch)) == sum(values) % LIMIT
    sums = np.cumsum(np.array(values, object))
    assert unstack(counts.cumulative(batch)) == list(sums)
    from_end = np.cumsum(np.array(values[::-1], object))[::-1]
    assert unstack(counts.cumulative(batch, reverse=True)) == list(from_end)


def test_total_of_as_many_terms_as_allowed_does_not_overflow():
    most = counts._MOST_TERMS
    batch = counts.Count(jnp.full((most, 4), 0xFFFF, jnp.uint32).at[:, 3].set(0))
    assert int(counts.total(batch)) == most * (2**48 - 1)
    assert int(counts.Count(counts.cumulative(batch).limbs[-1])) == most * (2**48 - 1)


@pytest.mark.parametrize("function", [counts.total, counts.cumulative])
def test_more_terms_are_refused(function):
    batch = counts.as_count(jnp.ones(2**16, jnp.uint32))
    with pytest.raises(ValueError, match="at most 65535 counts can be summed at once, not 65536"):
        function(batch)


def test_total_along_an_axis():
    batch = counts.as_count(jnp.array([[1, 2, 3], [10, 20, 30]], jnp.uint32))
    assert unstack(counts.total(batch)) == [6, 60]
    assert unstack(counts.total(batch, axis=0)) == [11, 22, 33]


@given(st.integers(0, 2**31 - 1))
def test_astype_integer_is_exact(n):
    count = counts.as_count(n)
    assert int(count.astype(jnp.int32)) == n
    assert int(counts.as_count(2 * n).astype(jnp.uint32)) == 2 * n


@given(numbers)
def test_astype_float_is_close(n):
    got = counts.as_count(n).astype(jnp.float32)
    assert got.dtype == jnp.float32
    assert float(got) == pytest.approx(n, rel=2**-22)


@given(st.integers(0, 2**24))
def test_astype_float_is_exact_where_float32_is(n):
    assert float(counts.as_count(n).astype(jnp.float32)) == n


@given(st.floats(0, 1, exclude_max=True))
def test_share_as_float(value):
    share = counts.as_share(value)
    assert float(share) == pytest.approx(value, abs=2**-53)
    assert float(share.astype(jnp.float32)) == pytest.approx(value, rel=2**-21, abs=2**-63)


@given(st.floats(0, 1, exclude_max=True, width=32))
def test_a_traced_share_is_the_float32_itself(value):
    # The smallest differ by what lies below 2^-64.
    got = exact_share(jax.jit(counts.as_share)(jnp.float32(value)))
    assert 0 <= Fraction(float(np.float32(value))) - got < Fraction(1, LIMIT)


def test_shares_of_arrays_are_clipped():
    got = counts.as_share(jnp.array([-0.5, 0.0, 1.0, 2.0, jnp.inf], jnp.float32))
    below_one = Fraction(2**24 - 1, 2**24)
    expected = [0, 0, below_one, below_one, below_one]
    assert [exact_share(counts.Share(row)) for row in got.limbs] == expected


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_shares_of_every_float(dtype):
    assert exact_share(counts.as_share(jnp.asarray(0.75, dtype))) == Fraction(3, 4)


def test_shares_of_exact_fractions_and_shares():
    third = counts.as_share(Fraction(1, 3))
    assert int(part(third, counts.as_count(3 * 10**18))) == 10**18
    assert counts.as_share(third) is third
    assert exact_share(counts.as_share(np.float32(0.1))) == Fraction(float(np.float32(0.1)))
    # The largest double below 1 must not become 1.
    assert exact_share(counts.as_share(math.nextafter(1, 0))) < 1
    assert exact_share(counts.as_share(Fraction(2**70 - 1, 2**70))) == Fraction(LIMIT - 1, LIMIT)


@pytest.mark.parametrize("value", [1, 1.0, -0.1, math.nan, math.inf, True, np.float32(1.5)])
def test_numbers_that_are_no_share_are_refused(value):
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\), not"):
        counts.as_share(value, "rate")


@pytest.mark.parametrize("value", [-1, LIMIT, np.int64(-5)])
def test_integers_that_are_no_count_are_refused(value):
    with pytest.raises(ValueError, match=r"a count must be in \[0, 2\^64\), not"):
        counts.as_count(value)


@pytest.mark.parametrize("value", [1.0, True, np.float32(2), jnp.ones(2)])
def test_what_is_no_integer_is_refused(value):
    with pytest.raises(TypeError, match="a count must be an integer, not"):
        counts.as_count(value)


@pytest.mark.parametrize(
    "dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]
)
def test_arrays_of_every_integer_dtype(dtype):
    top = np.iinfo(dtype).max
    values = np.array([0, 1, 100, top], dtype)
    assert unstack(counts.as_count(values)) == [0, 1, 100, int(top)]
    if np.issubdtype(dtype, np.signedinteger):
        assert unstack(counts.as_count(np.array([-1, np.iinfo(dtype).min], dtype))) == [0, 0]


def test_a_count_is_taken_as_it_is():
    count = counts.as_count(3)
    assert counts.as_count(count) is count


@given(st.lists(st.tuples(numbers, numbers), min_size=3, max_size=3))
def test_vmap_and_eager_agree_with_single_jitted_calls(pairs):
    x, y = stack([a for a, _ in pairs]), stack([b for _, b in pairs])
    share = counts.as_share(0.3)
    assert unstack(jax.vmap(lambda a, b: a - b)(x, y)) == [max(a - b, 0) for a, b in pairs]
    assert unstack(x + y) == [(a + b) % LIMIT for a, b in pairs]
    assert jax.vmap(counts.less)(x, y).tolist() == [a < b for a, b in pairs]
    batched = jax.vmap(counts.part, in_axes=(None, 0))(share, x)
    assert unstack(batched) == [int(part(share, counts.as_count(a))) for a, _ in pairs]


def test_shares_broadcast_against_counts():
    shares = counts.as_share(jnp.array([0.25, 0.5], jnp.float32))
    assert unstack(counts.part(shares, counts.as_count(10))) == [3, 5]


def test_counts_are_carried_by_scan():
    def step(count: counts.Count, _: None):
        count = count + counts.as_count(2**31)
        return count, count

    last, every = jax.lax.scan(step, counts.as_count(0), None, length=5)
    assert int(last) == 5 * 2**31
    assert unstack(every) == [n * 2**31 for n in range(1, 6)]
