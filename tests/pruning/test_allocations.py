"""Allocations against a numpy oracle: exact counts for every leaf."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivenet import pruning
from adaptivenet.counts import as_share
from adaptivenet.pruning.demands import AtLeast, OfAlive, Sparsity

SHAPES = {"a": (7, 9), "b": (5, 5), "c": (31, 4)}
SIZES = [63, 25, 124]


def leaves(seed=0):
    rng = np.random.default_rng(seed)
    # Rounded, so that there are ties.
    return {n: rng.normal(size=s).round(1).astype(np.float32) for n, s in SHAPES.items()}


@functools.partial(jax.jit, static_argnums=3)
def cut(params, mask, demand, allocation):
    return pruning.cut_and_wake(
        {name: jnp.where(mask[name], leaf, 0.0) for name, leaf in params.items()},
        mask,
        demand,
        score=pruning.magnitude,
        structure=pruning.Element(),
        allocation=allocation,
        regrow=None,
        may_grow=False,
        key=jax.random.key(0),
        signals={},
    )


def oracle(params, mask, keep):
    """Keeps the largest living ones by a stable sort, ties by position."""
    flat = np.concatenate([np.abs(x).ravel() for x in params.values()])
    alive = np.concatenate([np.asarray(mask[name]).ravel() for name in params])
    order = np.argsort(np.where(alive, -flat, np.inf), kind="stable")
    kept = np.zeros(flat.size, bool)
    kept[order[: min(keep, alive.sum())]] = True
    parts = np.split(kept, np.cumsum([x.size for x in params.values()])[:-1])
    return {n: p.reshape(x.shape) for (n, x), p in zip(params.items(), parts, strict=True)}


def rounded(share, number):
    return int(Fraction(share) * number + Fraction(1, 2))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.77, 0.95, 0.999])
def test_global_keeps_the_exact_count_of_the_tree(sparsity):
    params = leaves()
    mask = {name: jnp.ones(shape, bool) for name, shape in SHAPES.items()}
    out = cut(params, mask, Sparsity(as_share(sparsity)), pruning.Global())
    keep = sum(SIZES) - rounded(sparsity, sum(SIZES))
    expected = oracle(params, mask, keep)
    for name, want in expected.items():
        np.testing.assert_array_equal(out.mask[name], want)
        np.testing.assert_array_equal(out.kept[name], want)
    assert sum(int(m.sum()) for m in out.mask.values()) == keep
    if keep:
        lowest = min(np.abs(params[n])[expected[n]].min() for n in params if expected[n].any())
        assert float(out.threshold) == lowest
    else:
        assert np.isinf(out.threshold)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.77, 0.95, 0.999])
def test_uniform_keeps_the_exact_count_of_every_leaf(sparsity):
    params = leaves(1)
    mask = {name: jnp.ones(shape, bool) for name, shape in SHAPES.items()}
    out = cut(params, mask, Sparsity(as_share(sparsity)), pruning.Uniform())
    for (name, leaf), size in zip(params.items(), SIZES, strict=True):
        keep = size - rounded(sparsity, size)
        want = oracle({name: leaf}, mask, keep)[name]
        assert want.sum() == keep
        np.testing.assert_array_equal(out.mask[name], want)


@pytest.mark.parametrize("allocation", [pruning.Global(), pruning.Uniform()])
def test_a_share_of_the_living_is_cut_where_they_compete(allocation):
    params = leaves(2)
    rng = np.random.default_rng(3)
    mask = {name: jnp.asarray(rng.random(shape) < 0.6) for name, shape in SHAPES.items()}
    out = cut(params, mask, OfAlive(as_share(0.2)), allocation)
    groups = [list(SHAPES)] if isinstance(allocation, pruning.Global) else [[n] for n in SHAPES]
    for names in groups:
        alive = sum(int(mask[name].sum()) for name in names)
        want = oracle({n: params[n] for n in names}, mask, alive - rounded(0.2, alive))
        for name in names:
            np.testing.assert_array_equal(out.mask[name], want[name])


@pytest.mark.parametrize("allocation", [pruning.Global(), pruning.Uniform()])
def test_a_threshold_means_the_same_everywhere(allocation):
    params = leaves(4)
    mask = {name: jnp.ones(shape, bool) for name, shape in SHAPES.items()}
    out = cut(params, mask, AtLeast(jnp.float32(0.5)), allocation)
    for name, leaf in params.items():
        np.testing.assert_array_equal(out.mask[name], np.abs(leaf) >= np.float32(0.5))


def test_a_threshold_of_zero_keeps_the_living_even_if_they_are_nan():
    params = {"a": np.array([[0.0, np.nan, 1.0]], np.float32)}
    mask = {"a": jnp.array([[True, True, False]])}
    out = cut(params, mask, AtLeast(jnp.float32(0.0)), pruning.Global())
    assert out.mask["a"].tolist() == [[True, True, False]]


def test_an_allocation_of_ones_own():
    @dataclass(frozen=True)
    class FirstAlone:
        def groups(self, sizes):
            return ((0,), tuple(range(1, len(sizes))))

    params = leaves(5)
    mask = {name: jnp.ones(shape, bool) for name, shape in SHAPES.items()}
    out = cut(params, mask, Sparsity(as_share(0.5)), FirstAlone())
    assert int(out.mask["a"].sum()) == 63 - rounded(0.5, 63)
    assert int(out.mask["b"].sum() + out.mask["c"].sum()) == 149 - rounded(0.5, 149)


def test_every_leaf_is_in_exactly_one_group():
    for sizes in ([], [3], [3, 0, 5]):
        for allocation in (pruning.Global(), pruning.Uniform()):
            members = [place for group in allocation.groups(sizes) for place in group]
            assert sorted(members) == list(range(len(sizes)))
