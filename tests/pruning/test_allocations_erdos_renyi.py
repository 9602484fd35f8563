"""The Erdős-Rényi-kernel allocation against the loop of its paper, in fractions."""

from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptivenet.counts import as_share
from adaptivenet.pruning.allocations import Field, Leaf
from adaptivenet.pruning.demands import AtLeast, OfAlive, Sparsity
from adaptivenet.pruning.erdos_renyi import ErdosRenyiKernel
from adaptivenet.pruning.structures import Block
from tests.pruning import events

ERK = ErdosRenyiKernel()
# LeNet-5: two convolutions, three dense kernels.
LENET = [(5, 5, 1, 6), (5, 5, 6, 16), (400, 120), (120, 84), (84, 10)]


def oracle(shapes, total):
    """Densities in proportion to sum/prod; the leaf that most exceeds 1 is made dense, and again.

    Then whole numbers by largest remainder.
    """
    sizes = [int(np.prod(shape)) for shape in shapes]
    weights = [
        Fraction(sum(shape), size) if size else Fraction(0)
        for shape, size in zip(shapes, sizes, strict=True)
    ]
    dense = {i for i, size in enumerate(sizes) if size == 0}
    while len(dense) < len(sizes):
        rest = [i for i in range(len(sizes)) if i not in dense]
        left = total - sum(sizes[i] for i in dense)
        scale = Fraction(left) / sum(weights[i] * sizes[i] for i in rest)
        over = [i for i in rest if scale * weights[i] > 1]
        if not over:
            break
        worst = max(over, key=lambda i: weights[i])
        dense |= {i for i in over if weights[i] == weights[worst]}
    exact = [
        Fraction(sizes[i]) if i in dense else scale * weights[i] * sizes[i]
        for i in range(len(sizes))
    ]
    counts = [int(number) for number in exact]
    order = sorted(range(len(sizes)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def field(shapes, living=None, wakes=False):
    leaves = tuple(
        Leaf(f"w{i}", tuple(shape), jnp.dtype(jnp.float32), int(np.prod(shape)))
        for i, shape in enumerate(shapes)
    )
    living = [leaf.units for leaf in leaves] if living is None else living
    return Field(leaves, jnp.asarray(living, jnp.uint32), wakes=wakes)


def shared(shapes, demand, **kwargs):
    return [contest.keep for contest in ERK.share_out(demand, field(shapes, **kwargs))]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.8, 0.9, 0.99, 0.9999])
def test_lenet(sparsity):
    size = sum(int(np.prod(shape)) for shape in LENET)
    total = size - int(Fraction(sparsity) * size + Fraction(1, 2))
    got = [int(keep) for keep in shared(LENET, Sparsity(as_share(sparsity)))]
    assert sum(got) == total
    assert got == oracle(LENET, total)


def test_small_layers_stay_dense():
    got = shared(LENET, Sparsity(as_share(0.8)))
    densities = [int(keep) / np.prod(shape) for keep, shape in zip(got, LENET, strict=True)]
    assert densities[0] == 1.0
    # The published formula, where nothing is capped.
    ratio = densities[2] / densities[3]
    assert ratio == pytest.approx((520 / 48000) / (204 / 10080), rel=1e-3)


@settings(max_examples=25)
@given(data=st.data())
def test_any_shapes_and_totals(data):
    dimension = st.integers(1, 9)
    shape = st.lists(dimension, min_size=1, max_size=4)
    shapes = data.draw(st.lists(shape, min_size=1, max_size=4))
    size = sum(int(np.prod(s)) for s in shapes)
    for total in {0, 1, size, *data.draw(st.lists(st.integers(0, size), max_size=4))}:
        # As a share of the living every number is asked for exactly.
        demand = OfAlive(
            as_share(Fraction(size - total, size) if total else 1 - Fraction(1, 2**60))
        )
        got = [int(keep) for keep in shared(shapes, demand)]
        assert got == oracle(shapes, total)


def test_leaves_of_more_than_what_float32_counts():
    shapes = [(2**16, 2**15), (2**13, 2**13), (7, 3)]
    size = 2**31 + 2**26 + 21
    for share in (Fraction(1, 3), Fraction(999_983, 1_000_003)):
        total = size - int(share * size + Fraction(1, 2))
        got = [int(keep) for keep in shared(shapes, Sparsity(as_share(share)))]
        assert got == oracle(shapes, total)


def test_as_the_target_falls_one_by_one_the_total_stays_exact():
    """Of a total that is one less a leaf is due one more, now and then: it must not be lost."""
    shapes = [(1,), (2, 4), (4, 2, 4), (5, 4, 1), (7,), (5,)]
    size = sum(int(np.prod(shape)) for shape in shapes)

    def step(living, total):
        demand = Sparsity(as_share((size - total).astype(jnp.float32) / size))
        contests = ERK.share_out(demand, Field(field(shapes).leaves, living))
        wanted = jnp.stack([contest.keep.astype(jnp.uint32) for contest in contests])
        living = jnp.minimum(living, wanted)
        return living, living

    totals = jnp.arange(size - 1, 0, -1, dtype=jnp.int32)
    _, living = jax.lax.scan(step, field(shapes).living, totals)
    assert living.sum(axis=1).tolist() == totals.tolist()
    paradox = [
        any(np.array(oracle(shapes, t)) > np.array(oracle(shapes, t + 1))) for t in totals.tolist()
    ]
    assert any(paradox)
    # Nowhere is a leaf more than one off its own count.
    own = np.array([oracle(shapes, t) for t in totals.tolist()])
    assert np.abs(np.asarray(living).astype(int) - own).max() <= 1


def test_where_units_may_wake_a_leaf_is_given_all_it_should_have():
    shapes, living = [(6, 6), (6, 6)], [30, 2]
    demand = Sparsity(as_share(0.5))
    assert [int(k) for k in shared(shapes, demand, living=living, wakes=True)] == [18, 18]
    # Where none may, one beyond its share is the most a leaf keeps for another.
    assert [int(k) for k in shared(shapes, demand, living=living)] == [19, 18]


def test_targets_of_a_population():
    shares = jnp.array([0.0, 0.5, 0.9, 0.99], jnp.float32)
    size = sum(int(np.prod(shape)) for shape in LENET)

    @jax.jit
    @jax.vmap
    def member(share):
        keeps = shared(LENET, Sparsity(as_share(share)))
        return jnp.stack([keep.astype(jnp.uint32) for keep in keeps])

    for share, got in zip(shares, member(shares), strict=True):
        exact = Fraction(share.item())
        assert got.tolist() == oracle(LENET, size - int(exact * size + Fraction(1, 2)))


def cut(params, demand, structure=events.ELEMENT):
    return events.cut(params, events.ones(params), demand, structure, ERK)


def test_the_largest_of_each_leaf_are_kept():
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 2, 4), "dense": (8, 12), "last": (12, 3)}
    params = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    out = cut(params, Sparsity(as_share(0.8)))
    counts = oracle(list(shapes.values()), 204 - 163)
    for (name, leaf), count in zip(params.items(), counts, strict=True):
        worth = np.sort(np.abs(leaf).ravel())[::-1]
        np.testing.assert_array_equal(out.mask[name], np.abs(leaf) >= worth[count - 1])


def test_units_are_counted_where_the_structure_is_coarse():
    rng = np.random.default_rng(1)
    params = {"a": rng.normal(size=(8, 12)), "b": rng.normal(size=(4, 4))}
    out = cut(jax.tree.map(jnp.float32, params), Sparsity(as_share(0.5)), Block(2, 2))
    blocks = {n: np.asarray(m)[::2, ::2] for n, m in out.mask.items()}
    # 14 of 28 blocks: 20/96 * 24 to 8/16 * 4, of which the second would be more than all.
    assert (int(blocks["a"].sum()), int(blocks["b"].sum())) == (10, 4)


def test_a_threshold_means_the_same_everywhere():
    params = {"a": jnp.array([[0.1, 0.9]]), "b": jnp.array([[0.5, 0.4]])}
    out = cut(params, AtLeast(jnp.float32(0.45)))
    assert out.mask["a"].tolist() == [[False, True]]
    assert out.mask["b"].tolist() == [[True, False]]


def test_leaves_without_elements():
    shapes = [(0, 3), (4, 4)]
    got = [int(keep) for keep in shared(shapes, Sparsity(as_share(0.5)))]
    assert got == [0, 8]
    assert [int(k) for k in shared([(0, 3)], Sparsity(as_share(0.5)))] == [0]
