"""Shares in whole numbers, beside giving units one by one."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from adaptivenet.counts import as_count
from adaptivenet.pruning.apportion import apportion
from tests.pruning.events import sainte_lague


def shared(number, weights, most):
    found = apportion(
        as_count(number), jnp.array(weights, jnp.float32), jnp.array(most, jnp.uint32)
    )
    return found.astype(jnp.uint32).tolist()


@given(st.integers(0, 60), st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=1))
def test_it_is_what_one_by_one_gives(number, leaves):
    """Weights in unequal primes' roots, so that no two quotients tie."""
    roots = np.sqrt(np.arange(1, len(leaves) + 1) * 7.0 + 0.3)
    weights = [np.float32(w * r) for (w, _), r in zip(leaves, roots, strict=True)]
    most = [m for _, m in leaves]
    got = shared(number, weights, most)
    assert sum(got) == min(number, sum(most))
    assert all(g <= m for g, m in zip(got, most, strict=True))
    quotients = [w / (g + 0.5) for w, g, m in zip(weights, got, most, strict=True) if g < m]
    served = [w / (g - 0.5) for w, g in zip(weights, got, strict=True) if g]
    # No unit could be moved to a leaf with a larger quotient: what defines the method.
    assert not quotients or not served or max(quotients) <= min(served) * (1 + 1e-6)
    if all(weights):
        assert np.abs(np.array(got) - sainte_lague(weights, number, most)).sum() <= 2


def test_ties_and_what_is_left_go_to_the_first():
    assert shared(5, [1.0, 1.0], [9, 9]) == [3, 2]
    assert shared(7, [0.0, 3.0, 0.0], [4, 2, 4]) == [4, 2, 1]
    assert shared(3, [0.0, 0.0], [2, 2]) == [2, 1]
    assert shared(3, [np.nan, 1.0], [2, 2]) == [1, 2]
    assert shared(0, [1.0, 2.0], [2, 2]) == [0, 0]
    assert shared(9, [1.0, 2.0], [2, 2]) == [2, 2]
    assert shared(4, [np.inf, 1.0], [3, 3]) == [3, 1]
    assert shared(4, [1e-30, 2e-30], [9, 9]) == [1, 3]


def test_large_numbers_and_populations():
    big = 4_000_000_000
    assert sum(shared(big, [1.0, 3.0, 0.1], [big, big, big])) == big
    numbers = as_count(jnp.array([4, 8], jnp.uint32))
    many = jax.jit(jax.vmap(apportion, (0, None, None)))
    got = many(numbers, jnp.array([1.0, 3.0]), jnp.array([9, 9], jnp.uint32))
    assert got.astype(jnp.int32).tolist() == [[1, 3], [2, 6]]
