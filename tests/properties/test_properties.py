"""Laws that hold for every tree, size, sparsity and seed."""

from __future__ import annotations

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptivenet import pruning, selection
from adaptivenet.counts import as_count, as_share, part

SHAPES = ((3, 5), (4, 4), (7, 2))
SIZE = sum(a * b for a, b in SHAPES)
seeds = st.integers(0, 2**16)
sparsities = st.floats(0, 0.999)
# Few programs, many examples: whatever varies is an argument of a compiled function.
quick = settings(max_examples=30)


def tree(seed, rounding=1):
    """Weights with ties in them."""
    rng = np.random.default_rng(seed)
    return {
        f"layer{place}": rng.normal(size=shape).round(rounding).astype(np.float32)
        for place, shape in enumerate(SHAPES)
    }


def half_up(share, number):
    return int(Fraction(share) * number + Fraction(1, 2))


def count(mask):
    return sum(int(np.sum(leaf)) for leaf in jax.tree.leaves(mask))


def equal(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def implies(a, b):
    """Every True of the first mask is True in the second."""
    return all(
        np.all(~np.asarray(x) | np.asarray(y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def revise(params, share, seed=0, score=pruning.magnitude, allocation=pruning.Global()):  # noqa: B008
    pruner = pruning.prune(
        lambda step: pruning.Sparsity(share), score=score, allocation=allocation, seed=seed
    )
    params, state = pruning.revise(pruner, params, pruner.init(params))
    return params, state.mask


jitted = jax.jit(revise, static_argnames=("score", "allocation"))


@given(seeds, sparsities)
@quick
def test_the_count_is_exact(seed, sparsity):
    _, mask = jitted(tree(seed), as_share(sparsity))
    assert count(mask) == SIZE - half_up(sparsity, SIZE)


@given(st.integers(0, 2**62), sparsities)
def test_the_count_is_exact_for_any_size(size, sparsity):
    cut = part(as_share(sparsity), as_count(size))
    assert int(as_count(size) - cut) == size - half_up(sparsity, size)


@given(seeds, sparsities)
@quick
def test_cutting_twice_is_cutting_once(seed, sparsity):
    once, mask = jitted(tree(seed), as_share(sparsity))
    twice, again = jitted(once, as_share(sparsity))
    assert equal(mask, again) or count(mask) > sum(int((p != 0).sum()) for p in once.values())
    assert equal(once, twice)
    assert equal(pruning.apply_mask(once, mask), once)


@given(seeds, sparsities, sparsities)
@quick
def test_the_larger_sparsity_keeps_a_part_of_what_the_smaller_keeps(seed, a, b):
    low, high = sorted((a, b))
    few = jitted(tree(seed), as_share(high))[1]
    many = jitted(tree(seed), as_share(low))[1]
    assert implies(few, many)


@given(seeds, st.integers(0, SIZE), st.integers(0, SIZE))
@quick
def test_selections_are_nested_and_their_threshold_separates(seed, a, b):
    scores = tree(seed)
    few, many = sorted((a, b))
    select = functools.partial(_select, scores)
    inner, outer = select(few), select(many)
    assert implies(inner.mask, outer.mask)
    assert count(inner.mask) == few
    for name, leaf in scores.items():
        kept, dropped = (np.abs(leaf)[np.asarray(m)] for m in (inner.mask[name], ~inner.mask[name]))
        assert np.all(kept >= inner.threshold)
        assert np.all(dropped <= inner.threshold)


_select = jax.jit(selection.select)


@given(seeds, st.randoms(use_true_random=False), st.integers(0, SIZE))
@quick
def test_scores_without_ties_may_stand_in_any_order(seed, random, k):
    flat = np.random.default_rng(seed).permutation(SIZE).astype(np.float32)
    order = list(range(SIZE))
    random.shuffle(order)
    straight = np.asarray(_select([flat], k).mask[0])
    shuffled = np.asarray(_select([flat[order]], k).mask[0])
    np.testing.assert_array_equal(straight[order], shuffled)


@given(seeds, st.integers(-20, 20), sparsities)
@quick
def test_the_scale_of_the_weights_does_not_matter(seed, power, sparsity):
    params = tree(seed)
    scaled = {name: leaf * np.float32(2.0**power) for name, leaf in params.items()}
    assert equal(jitted(params, as_share(sparsity))[1], jitted(scaled, as_share(sparsity))[1])


@pytest.mark.parametrize(
    ("score", "allocation"),
    [(pruning.magnitude, pruning.Uniform()), (pruning.random, pruning.Global())],
)
def test_jit_and_eager_agree(score, allocation):
    # Eager calls compile anew each time, which leaves no room for more examples.
    eager = revise(tree(3), as_share(0.6), 3, score, allocation)
    assert equal(eager, jitted(tree(3), as_share(0.6), 3, score, allocation))


@given(seeds, sparsities)
@quick
def test_uniform_is_exact_in_every_leaf(seed, sparsity):
    _, mask = jitted(tree(seed), as_share(sparsity), allocation=pruning.Uniform())
    for leaf in mask.values():
        assert count(leaf) == leaf.size - half_up(sparsity, leaf.size)


@given(seeds, seeds, sparsities)
@quick
def test_landing_is_apply_mask(seed, other, sparsity):
    """One is the update that the other's selection needs."""
    params, updates = tree(seed), tree(other, rounding=3)
    _, mask = jitted(params, as_share(sparsity))
    landed = optax.apply_updates(params, pruning.landing(updates, params, mask))
    assert equal(landed, pruning.apply_mask(optax.apply_updates(params, updates), mask))


_percentile = pruning.prune(pruning.percentile(17.0))
_percentile_step = jax.jit(_percentile.update)


@given(seeds)
@settings(max_examples=10)
def test_percentile_follows_its_recurrence(seed):
    params = tree(seed)
    state, alive = _percentile.init(params), SIZE
    for _ in range(8):
        updates, state = _percentile_step(params, state, params)
        params = optax.apply_updates(params, updates)
        alive -= half_up(0.17, alive)
        assert count(state.mask) == alive == int(state.record.alive)


_cubic = pruning.prune(pruning.cubic(0.9, 1, 7), every=2)
_cubic_step = jax.jit(_cubic.update)


@given(seeds)
@settings(max_examples=10)
def test_without_regrowth_masks_are_nested_and_the_dead_stay_zero(seed):
    params = tree(seed, rounding=4)
    state = _cubic.init(params)
    for step in range(9):
        before = state.mask
        noise = tree(seed + step + 1, rounding=3)
        updates, state = _cubic_step(noise, state, params)
        params = optax.apply_updates(params, updates)
        assert implies(state.mask, before)
        assert equal(pruning.apply_mask(params, state.mask), params)
    assert count(state.mask) == SIZE - half_up(0.9, SIZE)


_evolve = pruning.prune(0.5, regrow=pruning.at_random(0.3))
_evolve_step = jax.jit(_evolve.update)


@given(seeds)
@settings(max_examples=10)
def test_births_and_deaths_balance(seed):
    params = tree(seed, rounding=4)
    state, alive = _evolve.init(params), SIZE
    for step in range(4):
        before = state.mask
        updates, state = _evolve_step(tree(step, rounding=3), state, params)
        params = optax.apply_updates(params, updates)
        record = state.record
        assert int(record.alive) == alive - int(record.deaths) + int(record.births)
        assert int(record.kept) == alive - int(record.deaths)
        woken = {name: np.asarray(state.mask[name] & ~before[name]) for name in params}
        assert all(not np.any(np.asarray(params[name])[woken[name]]) for name in params)
        alive = int(record.alive)
        assert alive == SIZE - half_up(0.5, SIZE) == count(state.mask)


@given(seeds, sparsities)
@quick
def test_a_population_is_its_members(seed, sparsity):
    params = tree(seed)
    shares = as_share(jnp.array([0.0, sparsity, 0.9], jnp.float32))
    masks = _population(params, shares)[1]
    for place in range(3):
        share = jax.tree.map(lambda limbs: limbs[place], shares)  # noqa: B023 (used at once)
        member = jax.tree.map(lambda m: m[place], masks)  # noqa: B023
        assert equal(member, jitted(params, share)[1])


_population = jax.jit(jax.vmap(revise, in_axes=(None, 0)))
