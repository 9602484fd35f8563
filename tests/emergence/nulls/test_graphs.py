"""Rewiring keeps degrees, and reaches every graph that has them equally often."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptivenet.emergence import nulls

rewire = jax.jit(lambda mask, seed, trades: nulls.rewire(mask, jax.random.key(seed), trades=trades))


def as_matrix(leaf):
    return leaf.reshape(-1, leaf.shape[-1])


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0]), st.integers(1, 6))
@settings(max_examples=40)
def test_degrees_are_kept_exactly(seed, density, trades):
    rng = np.random.default_rng(seed)
    # Even and odd numbers of rows, a convolution, a single row, units of very unequal degree.
    mask = {
        "even": rng.random((8, 13)) < density,
        "odd": rng.random((7, 5)) < density * rng.random((7, 1)) * 2,
        "kernel": rng.random((3, 3, 4, 6)) < density,
        "vector": rng.random(9) < density,
        "bias": optax.MaskedNode(),
    }
    new, accepted, moved = jax.device_get(rewire(mask, jnp.uint32(seed), jnp.int32(trades)))
    assert jax.tree.structure(new) == jax.tree.structure(mask)
    names = sorted(set(mask) - {"bias"})
    for place, name in enumerate(names):
        old, now = as_matrix(mask[name]), as_matrix(new[name])
        assert new[name].shape == mask[name].shape
        np.testing.assert_array_equal(now.sum(axis=0), old.sum(axis=0))
        np.testing.assert_array_equal(now.sum(axis=1), old.sum(axis=1))
        share = (now & ~old).sum() / max(old.sum(), 1)
        assert moved[place] == pytest.approx(share, abs=1e-6)
        assert 0 <= accepted[place] <= 1
    np.testing.assert_array_equal(new["vector"], mask["vector"])


def all_graphs(rows, columns):
    """Every 0-1 matrix with these margins, by brute force."""
    choices = [itertools.combinations(range(len(columns)), degree) for degree in rows]
    found = []
    for picked in itertools.product(*map(list, choices)):
        matrix = np.zeros((len(rows), len(columns)), bool)
        for row, chosen in enumerate(picked):
            matrix[row, list(chosen)] = True
        if matrix.sum(axis=0).tolist() == list(columns):
            found.append(matrix)
    return found


def swaps_from(matrix):
    """Number of double-edge swaps that a graph allows."""
    edges = list(zip(*np.nonzero(matrix), strict=True))
    return sum(
        not matrix[a, d] and not matrix[c, b]
        for (a, b), (c, d) in itertools.combinations(edges, 2)
        if a != c and b != d
    )


# rows, columns, number of graphs, and the value of chi-square exceeded once in a thousand
CASES = [
    ((2, 1, 1), (2, 1, 1), 5, 18.47),
    ((2, 2, 1, 1), (3, 1, 1, 1), 18, 40.79),
    ((3, 2, 1), (2, 2, 1, 1), 8, 24.32),
]


@pytest.mark.parametrize(("rows", "columns", "number", "limit"), CASES)
def test_it_converges_to_the_uniform_law_over_all_graphs(rows, columns, number, limit):
    graphs = all_graphs(rows, columns)
    assert len(graphs) == number
    # A chain that draws again until a swap succeeds would favour graphs that allow many.
    assert len({swaps_from(graph) for graph in graphs}) > 1
    keys = jax.random.split(jax.random.key(1), 10_000)
    start = {"w": jnp.asarray(graphs[0])}
    drawn = jax.jit(jax.vmap(lambda key: nulls.rewire(start, key, trades=20).mask["w"]))(keys)
    drawn = np.asarray(drawn)
    counts = np.array([np.all(drawn == graph, axis=(1, 2)).sum() for graph in graphs])
    assert counts.sum() == len(keys)
    expected = len(keys) / number
    assert np.sum((counts - expected) ** 2) / expected < limit


def test_it_forgets_where_it_began():
    """As far from the start as independent draws are from each other, on an ordered start."""
    rows, columns = np.mgrid[:60, :40]
    start = {"w": jnp.asarray((columns - rows // 2) % 40 < 4)}  # a band
    keys = jax.random.split(jax.random.key(0), 24)
    drawn = jax.jit(jax.vmap(lambda key: nulls.rewire(start, key)))(keys)
    masks = np.asarray(drawn.mask["w"]).reshape(24, -1)
    overlap = (masks[:12, None] & masks[None, 12:]).sum(axis=-1) / 240
    kept = 1 - np.asarray(drawn.moved).ravel()
    # About one in eight, as degrees have it; the standard error of the mean is about 0.004.
    assert kept.mean() == pytest.approx(overlap.mean(), abs=0.02)
    assert np.all((np.asarray(drawn.accepted) > 0.4) & (np.asarray(drawn.accepted) < 0.6))


def test_accepted_is_the_share_of_disputed_synapses_that_change_rows():
    """One trade of one pair of rows: by hand from what came out."""
    start = jnp.array([[True, True, True, False, False, True], [False] * 3 + [True, True, True]])
    shares = []
    for seed in range(20):
        new, accepted, _ = rewire({"w": start}, jnp.uint32(seed), jnp.int32(1))
        gained = int(jnp.sum(new["w"][0] & ~start[0]))
        # Five columns are disputed; each one gained is another one given.
        assert float(accepted[0]) == pytest.approx(2 * gained / 5)
        shares.append(gained)
    assert set(shares) == {0, 1, 2}


def test_degrees_that_fix_the_graph():
    mask = {
        "full": jnp.ones((4, 5), bool),
        "nested": jnp.tril(jnp.ones((4, 4), bool)),
        "one_row": jnp.array([[True, False, True]]),
    }
    new = jax.jit(nulls.rewire)(mask, jax.random.key(0))
    for name, leaf in mask.items():
        np.testing.assert_array_equal(new.mask[name], leaf)
    assert new.accepted.tolist() == new.moved.tolist() == [0.0, 0.0, 0.0]


def test_members_alone_and_in_a_population():
    masks = {"w": jax.random.bernoulli(jax.random.key(0), 0.3, (3, 9, 8))}
    keys = jax.random.split(jax.random.key(1), 3)
    together = jax.jit(jax.vmap(nulls.rewire))(masks, keys)
    for place in range(3):
        alone = jax.jit(nulls.rewire)({"w": masks["w"][place]}, keys[place])
        np.testing.assert_array_equal(together.mask["w"][place], alone.mask["w"])
    assert len({np.asarray(m).tobytes() for m in together.mask["w"]}) == 3


@pytest.mark.parametrize("trades", [0, -1, 2.5])
def test_a_number_of_trades_that_is_none_is_refused(trades):
    with pytest.raises(ValueError, match="trades must be an integer >= 1"):
        nulls.rewire({"w": jnp.ones((2, 2), bool)}, jax.random.key(0), trades=trades)
