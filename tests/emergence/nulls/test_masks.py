"""The cut alone, and as many synapses at random places."""

from __future__ import annotations

import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adaptivenet as an
from adaptivenet import pruning
from adaptivenet.emergence import nulls

SHAPES = {"a": (4, 6), "b": (6, 3)}
SIZE = 42


def tree(seed, rounding=1):
    """Weights with ties in them, and a bias."""
    rng = np.random.default_rng(seed)
    weights = {k: rng.normal(size=s).round(rounding).astype(np.float32) for k, s in SHAPES.items()}
    return {**weights, "bias": np.ones(3, np.float32)}


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def largest(params, k):
    """The k largest magnitudes, ties by position, the slow way."""
    flat = np.concatenate([np.abs(params[name]).ravel() for name in SHAPES])
    order = sorted(range(SIZE), key=lambda place: (-flat[place], place))
    kept = np.zeros(SIZE, bool)
    kept[order[:k]] = True
    return {"a": kept[:24].reshape(4, 6), "b": kept[24:].reshape(6, 3)}


cut = jax.jit(lambda params, k: nulls.truncation(params, k=k))


@pytest.mark.parametrize(
    ("score", "allocation"),
    [
        (pruning.magnitude, pruning.Global()),
        (pruning.magnitude, pruning.Uniform()),
        (pruning.random, pruning.Global()),
    ],
)
def test_it_keeps_what_one_event_of_prune_keeps(score, allocation):
    kwargs = {"score": score, "allocation": allocation, "select": "^[ab]$", "seed": 5}

    @jax.jit
    def both(params, sparsity):
        pruner = pruning.prune(sparsity, **kwargs)
        revised, state = pruning.revise(pruner, params, pruner.init(params))
        # And an event in the step of a chain whose optimizer stands still.
        tx = optax.chain(optax.sgd(0.0), pruner)
        updates, stepped = tx.update(params, tx.init(params), params)
        return (
            nulls.truncation(params, sparsity, **kwargs),
            (revised, state.mask),
            (optax.apply_updates(params, updates), pruning.mask(stepped)),
        )

    for sparsity in (0.0, 0.31, 0.95):
        got, revised, stepped = both(jax.tree.map(jnp.asarray, tree(0)), jnp.float32(sparsity))
        same(got, revised)
        same(got[1], stepped[1])
        for x, y in zip(jax.tree.leaves(got[0]), jax.tree.leaves(stepped[0]), strict=True):
            np.testing.assert_array_equal(x, y)


@given(st.integers(0, 2**32 - 1), st.integers(0, SIZE))
@settings(max_examples=40)
def test_the_k_largest_are_kept_and_the_others_exactly_zero(seed, k):
    params = tree(seed)
    left, mask = jax.device_get(cut(params, jnp.int32(k)))
    expected = largest(params, k)
    for name in SHAPES:
        np.testing.assert_array_equal(mask[name], expected[name])
        np.testing.assert_array_equal(left[name], np.where(expected[name], params[name], 0))
    np.testing.assert_array_equal(left["bias"], params["bias"])
    assert an.trees.is_masked(mask["bias"])


def test_a_share_is_rounded_to_the_nearest_count():
    by_share = jax.jit(lambda params, s: nulls.truncation(params, s), static_argnums=1)
    for sparsity in (0.25, 0.9):
        k = SIZE - int(Fraction(sparsity) * SIZE + Fraction(1, 2))
        same(by_share(tree(1), sparsity), cut(tree(1), jnp.int32(k)))


def test_populations_over_sparsities_and_numbers():
    params = tree(2)
    sparsities = jnp.array([0.0, 0.5, 0.9])
    by_share = jax.jit(jax.vmap(lambda s: nulls.truncation(params, s)[1]))(sparsities)
    by_number = jax.vmap(lambda k: cut(params, k)[1])(jnp.array([42, 21, 4]))
    same(by_share, by_number)
    assert (by_share["a"].sum(axis=(1, 2)) + by_share["b"].sum(axis=(1, 2))).tolist() == [42, 21, 4]


def test_signals_reach_the_score():
    def saliency(params, *, grads, **signals):
        return jax.tree.map(lambda p, g: jnp.abs(p * g), params, {"w": grads["w"]})

    params = {"w": jnp.array([[1.0, 2.0]])}
    grads = {"w": jnp.array([[9.0, 1.0]])}
    _, mask = nulls.truncation(params, 0.5, score=saliency, grads=grads)
    assert mask["w"].tolist() == [[True, False]]
    with pytest.raises(ValueError, match="asks for the signal 'grads'"):
        nulls.truncation(params, 0.5, score=saliency)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({}, TypeError, "either a sparsity or k="),
        ({"sparsity": 0.5, "k": 3}, TypeError, "either a sparsity or k="),
        ({"sparsity": 1.0}, ValueError, r"sparsity in \[0, 1\)"),
        ({"k": -1}, ValueError, "k must be an integer from 0 to 42, not -1"),
        ({"k": 43}, ValueError, "k must be an integer from 0 to 42"),
        ({"k": 2.0}, ValueError, "k must be an integer"),
        ({"k": 3, "allocation": pruning.Uniform()}, ValueError, "several groups"),
        ({"k": 3, "select": "c/kernel"}, ValueError, "matches no leaf"),
    ],
)
def test_bad_arguments_are_refused(kwargs, error, message):
    with pytest.raises(error, match=message):
        nulls.truncation(tree(0), **kwargs)


places = jax.jit(lambda mask, seed: nulls.random_mask(mask, jax.random.key(seed)))


@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
@settings(max_examples=30)
def test_a_random_mask_keeps_each_leafs_count(seed, density):
    rng = np.random.default_rng(seed)
    mask = {**{k: rng.random(s) < density for k, s in SHAPES.items()}, "bias": optax.MaskedNode()}
    moved = jax.device_get(places(mask, jnp.uint32(seed)))
    assert jax.tree.structure(moved) == jax.tree.structure(mask)
    for name in SHAPES:
        assert moved[name].dtype == bool
        assert moved[name].shape == SHAPES[name]
        assert moved[name].sum() == mask[name].sum()


def test_all_places_are_equally_likely_and_leaves_differ():
    """Two of four: chi-square over six placements of 6,000 draws with fixed keys."""
    mask = {name: jnp.array([[True, True], [False, False]]) for name in "ab"}
    keys = jax.random.split(jax.random.key(0), 6_000)
    moved = jax.vmap(lambda key: nulls.random_mask(mask, key))(keys)
    rows = {name: np.asarray(leaf).reshape(-1, 4) for name, leaf in moved.items()}
    for leaf in rows.values():
        counts = [
            np.all(leaf[:, list(pair)], axis=1).sum()
            for pair in itertools.combinations(range(4), 2)
        ]
        # 5 degrees of freedom: 20.5 is exceeded once in a thousand.
        assert np.sum((np.array(counts) - 1_000.0) ** 2) / 1_000.0 < 20.5
    # Leaves draw independently: a sixth of the pairs agree.
    agree = np.all(rows["a"] == rows["b"], axis=1).mean()
    assert abs(agree - 1 / 6) < 4 * np.sqrt(5 / 36 / 6_000)
