"""The budget against an exhaustive greedy: never over it, and nothing better is left out."""

from __future__ import annotations

import functools
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptivenet import pruning
from adaptivenet.counts import as_share
from adaptivenet.pruning.allocations import Field, Leaf, PerPath
from adaptivenet.pruning.budgets import Budget
from adaptivenet.pruning.demands import AtLeast, OfAlive, Sparsity
from adaptivenet.pruning.rowwise import FanIn, NofM
from adaptivenet.pruning.structures import ByPath, Unit
from tests.pruning import events
from tests.pruning.events import draw, ones


def cut(params, mask, demand, allocation, structure=events.ELEMENT, may_grow=False):
    return events.cut(params, mask, demand, structure, allocation, may_grow=may_grow)


def spent(mask, costs):
    return sum(cost * int(np.asarray(mask[name]).sum()) for name, cost in costs.items())


def budget_of(whole, sparsity):
    return whole - int(Fraction(sparsity) * whole + Fraction(1, 2))


def greedy(params, alive, costs, budget):
    """One synapse after another, by score per cost; ends at the first level that does not fit."""
    cheapest = min(costs.values())
    ratios = {
        name: np.abs(leaf) * np.float32(cheapest / costs[name]) for name, leaf in params.items()
    }
    kept = {name: np.zeros(leaf.shape, bool) for name, leaf in params.items()}
    levels = sorted({float(r) for leaf in ratios.values() for r in leaf.ravel()}, reverse=True)
    for level in levels:
        fits = True
        for name, leaf in ratios.items():
            for index in np.ndindex(leaf.shape):
                if not alive[name][index] or leaf[index] != level:
                    continue
                if costs[name] <= budget:
                    kept[name][index] = True
                    budget -= costs[name]
                else:
                    fits = False
        if not fits:
            break
    return kept


COSTS = {"a": 5, "b": 1, "c": 12}
SHAPES = {"a": (4, 5), "b": (6, 7), "c": (3, 4)}
BUDGET = Budget({"a": 5, "c": 12})
WHOLE = 5 * 20 + 42 + 12 * 12


@pytest.mark.parametrize("seed", range(3))
def test_as_one_synapse_after_another(seed):
    params = draw(seed, **SHAPES)
    shares = [0.0, 0.2, 0.5, 0.77, 0.9, 0.99]
    masks = jax.vmap(lambda s: cut(params, ones(params), Sparsity(as_share(s)), BUDGET).mask)(
        jnp.asarray(shares, jnp.float32)
    )
    for place, share in enumerate(shares):
        budget = budget_of(WHOLE, np.float32(share).item())
        mask = {name: np.asarray(leaf[place]) for name, leaf in masks.items()}
        expected = greedy(params, ones(params), COSTS, budget)
        for name in SHAPES:
            np.testing.assert_array_equal(mask[name], expected[name])
        assert spent(mask, COSTS) <= budget
        # Less than the dearest is left over, and nothing left out is worth more per cost.
        assert budget - spent(mask, COSTS) < max(COSTS.values()) or share == 0
        worth = {n: np.abs(leaf) / COSTS[n] for n, leaf in params.items()}
        kept = np.concatenate([worth[n][mask[n]] for n in SHAPES])
        left = np.concatenate([worth[n][~mask[n]] for n in SHAPES])
        if kept.size and left.size:
            assert left.max() <= kept.min() * (1 + 1e-6)


@functools.partial(jax.jit, static_argnames=("costs",))
def bought(demand, scores, alive, costs):
    leaves = (Leaf("a", (3, 1), jnp.float32, 3), Leaf("b", (4, 1), jnp.float32, 4))
    parts = [scores[:3, None], scores[3:, None]], [alive[:3, None], alive[3:, None]]
    living = jnp.stack([jnp.sum(part, dtype=jnp.uint32) for part in parts[1]])
    field = Field(leaves, living, tuple(parts[0]), tuple(parts[1]))
    contests = Budget({"a": costs[0], "b": costs[1]}).share_out(demand, field)
    return [contest.keep.astype(jnp.int32) for contest in contests]


@given(
    costs=st.sampled_from([(1, 1), (2, 3), (7, 1), (4, 9)]),
    budget=st.integers(0, 60),
    values=st.lists(st.integers(0, 6), min_size=7, max_size=7),
    living=st.lists(st.booleans(), min_size=7, max_size=7),
)
def test_tiny_trees_against_all_subsets(costs, budget, values, living):
    """The kept are worth the most of all subsets that cost no more, and little is unspent."""
    prices = [costs[0]] * 3 + [costs[1]] * 4
    whole = sum(prices)
    budget = min(budget, whole)
    scores = np.array(values, np.float32)
    alive = np.array(living)
    parts = [(scores[:3], alive[:3]), (scores[3:], alive[3:])]
    share = Fraction(whole - budget, whole) if budget else 1 - Fraction(1, 2**60)
    demand = Sparsity(as_share(share))
    numbers = [int(n) for n in bought(demand, jnp.asarray(scores), jnp.asarray(alive), costs)]
    kept = np.zeros(7, bool)
    for (part, ok), number, first in zip(parts, numbers, (0, 3), strict=True):
        order = np.argsort(np.where(ok, -part, np.inf), kind="stable")[:number]
        assert ok[order].all()
        kept[first + order] = True
    cost, value = int(np.dot(kept, prices)), float(scores[kept].sum())
    assert cost <= budget
    subsets = [np.array(s, bool) for s in itertools.product([0, 1], repeat=7)]
    subsets = [s for s in subsets if not np.any(s & ~alive)]
    # None of the same cost or less is worth more (the greedy is optimal for what it spends).
    assert value >= max(float(scores[s].sum()) for s in subsets if np.dot(s, prices) <= cost) - 1e-5
    # And what is unspent buys none of the best that were left out.
    left = alive & ~kept
    if left.any():
        ratios = scores / np.array(prices, np.float32)
        best = ratios[left].max()
        assert best <= ratios[kept].min(initial=np.inf) * (1 + 1e-6)
        dearest = max(
            p for p, r, out in zip(prices, ratios, left, strict=True) if out and np.isclose(r, best)
        )
        assert budget - cost < dearest


@pytest.mark.parametrize(("sparsity", "costs"), [(0.3, ()), (0.77, ()), (0.5, {".": 7})])
def test_with_one_cost_it_is_global(sparsity, costs):
    params = draw(3, **SHAPES)
    # Denormals, too.
    params["b"] = (params["b"] * np.float32(1e-41)).astype(np.float32)
    demand = Sparsity(as_share(sparsity))
    out = cut(params, ones(params), demand, Budget(costs))
    plain = cut(params, ones(params), demand, pruning.Global())
    for name in SHAPES:
        np.testing.assert_array_equal(out.mask[name], plain.mask[name])


def test_what_a_synapse_costs():
    leaves = [
        Leaf("conv/kernel", (3, 3, 2, 4), jnp.dtype(jnp.float32), 72),
        Leaf("dense/kernel", (8, 2), jnp.dtype(jnp.bfloat16), 16),
    ]
    assert Budget().of_leaves(leaves) == [1, 1]
    assert Budget(kind="bytes").of_leaves(leaves) == [4, 2]
    assert Budget({"conv": 196}, "macs").of_leaves(leaves) == [196, 1]
    with pytest.raises(ValueError, match=r"MACs of a synapse of leaf 'conv/kernel' of shape"):
        Budget(kind="macs").of_leaves(leaves)
    with pytest.raises(ValueError, match="Budget: 'embed' matches no prunable leaf"):
        Budget({"embed": 1}).of_leaves(leaves)


def test_bytes_of_mixed_formats():
    params = {"a": jnp.ones((4, 4), jnp.float32), "b": jnp.ones((4, 4), jnp.bfloat16)}
    out = cut(params, ones(params), Sparsity(as_share(0.5)), Budget(kind="bytes"))
    # 48 of 96 bytes: the cheap ones first, worth twice as much a byte.
    assert out.mask["b"].all()
    assert int(out.mask["a"].sum()) == 4


def test_units_cost_what_their_synapses_cost():
    params = {"a": jnp.ones((10, 4)), "b": jnp.ones((3, 5))}
    out = cut(params, ones(params), Sparsity(as_share(0.5)), Budget({"b": 2}), Unit())
    # 35 of 70; a unit of a scores 10 at a cost of 10, one of b 3 at 6.
    assert np.asarray(out.mask["a"]).all(axis=0).sum() == 3
    assert np.asarray(out.mask["b"]).all(axis=0).sum() == 0


def test_a_share_of_the_cost_of_the_living():
    params = draw(4, **SHAPES)
    first = cut(params, ones(params), Sparsity(as_share(0.3)), BUDGET)
    out = cut(params, first.mask, OfAlive(as_share(0.25)), BUDGET)
    alive = spent(first.mask, COSTS)
    assert not any(np.any(out.mask[n] & ~first.mask[n]) for n in SHAPES)
    assert budget_of(alive, 0.25) - 12 < spent(out.mask, COSTS) <= budget_of(alive, 0.25)


def test_the_dead_wake_within_the_budget():
    params = draw(5, **SHAPES)
    few = cut(params, ones(params), Sparsity(as_share(0.9)), BUDGET)
    for sparsity in (0.5, 0.0):
        out = cut(params, few.mask, Sparsity(as_share(sparsity)), BUDGET, may_grow=True)
        budget = budget_of(WHOLE, sparsity)
        for name in SHAPES:
            np.testing.assert_array_equal(out.kept[name], few.mask[name])
        assert budget - min(COSTS.values()) < spent(out.mask, COSTS) <= budget
    same = cut(params, few.mask, Sparsity(as_share(0.95)), BUDGET, may_grow=True)
    assert spent(same.mask, COSTS) <= budget_of(WHOLE, 0.95)


def test_of_the_dead_of_every_leaf_the_same_share_wakes():
    params = draw(9, a=(40, 50), b=(60, 70), c=(30, 40))
    few = {name: jnp.asarray(np.abs(leaf) > 1) for name, leaf in params.items()}
    out = cut(params, few, Sparsity(as_share(0.4)), BUDGET, may_grow=True)
    shares = [float((out.mask[n] & ~few[n]).sum() / (~few[n]).sum()) for n in SHAPES]
    assert min(shares) > 0.2
    assert max(shares) - min(shares) < 0.01


def test_costs_beyond_32_bits():
    params = draw(6, a=(3, 4), b=(3, 4))
    big = {"a": 5 * 10**15, "b": 3 * 10**15}
    out = cut(params, ones(params), Sparsity(as_share(0.6)), Budget(big))
    expected = greedy(params, ones(params), big, budget_of(96 * 10**15, 0.6))
    for name in params:
        np.testing.assert_array_equal(out.mask[name], expected[name])
    with pytest.raises(ValueError, match="too large; count in thousands"):
        cut(params, ones(params), Sparsity(as_share(0.6)), Budget({"a": 10**18}))


def test_half_precision_and_eager_runs():
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), draw(7, a=(2, 3), b=(3, 2)))
    out = cut(params, ones(params), Sparsity(as_share(0.5)), Budget({"a": 3}))
    exact = jax.tree.map(lambda p: np.asarray(p, np.float32), params)
    expected = greedy(exact, ones(params), {"a": 3, "b": 1}, 12)
    demand = Sparsity(as_share(0.5))
    eager = events.cut.__wrapped__(params, ones(params), demand, allocation=Budget({"a": 3}))
    for name in params:
        np.testing.assert_array_equal(out.mask[name], expected[name])
        np.testing.assert_array_equal(eager.mask[name], expected[name])


def test_nan_is_worth_least():
    params = {"a": jnp.array([[jnp.nan, 0.0, 1.0, jnp.inf]])}
    out = cut(params, ones(params), Sparsity(as_share(0.25)), Budget())
    assert out.mask["a"].tolist() == [[False, True, True, True]]


def test_demands_and_structures_that_do_not_fit():
    params = draw(8, a=(4, 4), b=(4, 4))
    with pytest.raises(ValueError, match="Budget shares out a cost, which a threshold"):
        cut(params, ones(params), AtLeast(jnp.float32(0.1)), Budget())
    for structure in (FanIn(), ByPath({"b": NofM(2, 4)})):
        with pytest.raises(ValueError, match=r"Budget chooses unit by unit, which leaf '[ab]'"):
            cut(params, ones(params), Sparsity(as_share(0.5)), Budget(), structure)
        with pytest.raises(ValueError, match="Budget chooses unit by unit"):
            pruning.event.check(params, structure=structure, allocation=Budget(), target=0.5)
    mixed = PerPath({"b": 1.0}, default=Budget())
    out = cut(params, ones(params), Sparsity(as_share(0.5)), mixed, ByPath({"b": NofM(2, 4)}))
    assert (int(out.mask["a"].sum()), int(out.mask["b"].sum())) == (8, 8)
    pruning.event.check(params, structure=FanIn(), allocation=pruning.Global(), target=0.5)
    pruning.event.check(params, structure=pruning.Element(), allocation=mixed, target=0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Budget({"a": 0}), "cost of 'a' must be an integer >= 1, not 0"),
        (lambda: Budget({"a": 0.5}), "count all in bits"),
        (lambda: Budget({"a": True}), "must be an integer"),
        (lambda: Budget(kind="flops"), "'parameters', 'bytes' or 'macs', not 'flops'"),
        (lambda: Budget({"(": 1}), "not a regular expression"),
    ],
)
def test_bad_budgets_are_refused_when_built(make, message):
    with pytest.raises(ValueError, match=message):
        make()
