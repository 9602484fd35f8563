"""Link scores against an enumeration of paths and of the communities they make."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptivenet import pruning
from adaptivenet.pruning.linkprediction import ByLinkPrediction, by_link_prediction, link_scores


def by_enumeration(mask, rule):
    """On the graph of all units: every path of three links, every unit's links one by one."""
    inputs, outputs = mask.shape
    size = inputs + outputs
    graph = np.zeros((size, size), bool)
    graph[:inputs, inputs:] = mask
    graph |= graph.T
    degree = graph.sum(axis=1)
    scores = np.zeros(mask.shape)
    for u, v in itertools.product(range(inputs), range(inputs, size)):
        if graph[u, v]:
            continue
        paths = [
            (a, b)
            for a, b in itertools.permutations(range(size), 2)
            if graph[u, a] and graph[a, b] and graph[b, v] and not {a, b} & {u, v}
        ]
        community = {unit for path in paths for unit in path}

        def outside(unit, inside=(*community, u, v)):
            return sum(graph[unit, other] and other not in inside for other in range(size))

        for path in paths:
            if rule == "CH3-L3":
                product = np.prod([1 + outside(unit) for unit in path])
            else:
                product = np.prod([degree[unit] for unit in path])
            scores[u, v - inputs] += product**-0.5
    return scores


@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    share=st.floats(0, 1),
    seed=st.integers(0, 999),
    rule=st.sampled_from(["CH3-L3", "RA-L3"]),
)
def test_equal_the_enumeration_of_paths(shape, share, seed, rule):
    mask = np.random.default_rng(seed).random(shape) < share
    got = link_scores(jnp.asarray(mask), rule)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, by_enumeration(mask, rule), rtol=1e-5)


def test_a_path_by_hand():
    """u - b - a - v, where b has one more link and a two: 1 / sqrt((1 + 1) (1 + 2))."""
    mask = np.zeros((3, 5), bool)
    mask[0, 0] = mask[1, 0] = mask[1, 1] = True  # u = 0, b = 0, a = 1, v = 1
    mask[2, 0] = mask[1, 3] = mask[1, 4] = True
    score = float(link_scores(jnp.asarray(mask))[0, 1])
    assert score == pytest.approx(6**-0.5)
    assert float(link_scores(jnp.asarray(mask), "RA-L3")[0, 1]) == pytest.approx((3 * 4) ** -0.5)


def test_a_convolution_is_a_graph_of_its_taps_and_outputs():
    mask = np.random.default_rng(0).random((2, 2, 3, 4)) < 0.4
    flat = link_scores(jnp.asarray(mask.reshape(12, 4)))
    np.testing.assert_array_equal(np.reshape(link_scores(jnp.asarray(mask)), (12, 4)), flat)
    np.testing.assert_array_equal(link_scores(jnp.asarray([True, False, False])), 0)


def test_a_population_and_a_compiled_one():
    masks = jnp.asarray(np.random.default_rng(1).random((3, 5, 4)) < 0.5)
    for function in (link_scores, lambda mask: link_scores(mask, "RA-L3")):
        together = jax.jit(jax.vmap(function))(masks)
        for one, mask in zip(together, masks, strict=True):
            np.testing.assert_allclose(one, function(mask), rtol=1e-6)


def test_the_likeliest_links_wake_and_biases_do_not_disturb():
    """Out of step and in it, in a net with biases: no link that wakes is less likely than one."""
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "a": {"kernel": jax.random.normal(keys[0], (7, 6)), "bias": jnp.ones(6)},
        "b": {"kernel": jax.random.normal(keys[1], (6, 4)), "bias": jnp.ones(4)},
    }
    tx = optax.chain(
        optax.sgd(0.1),
        pruning.prune(0.6, regrow=by_link_prediction(0.3), allocation=pruning.Uniform()),
    )
    state = tx.init(params)
    step = jax.jit(tx.update)
    for _ in range(3):
        updates, state = step(jax.tree.map(jnp.sin, params), state, params)
        params = optax.apply_updates(params, updates)
        for layer, size in (("a", 42), ("b", 24)):
            mask = np.asarray(pruning.mask(state)[layer]["kernel"])
            kept = np.asarray(state[1].survivors[layer]["kernel"])
            assert mask.sum() == size - round(0.6 * size)
            scores = by_enumeration(kept, "CH3-L3")
            assert (mask & ~kept).sum() == round(0.3 * mask.sum())
            assert scores[mask & ~kept].min() >= scores[~mask].max() * (1 - 1e-4)


def test_links_without_a_path_wake_at_random_and_last():
    mask = {"w": jnp.array([[True, False, False], [True, True, False], [False, False, False]])}
    rule = by_link_prediction(0.3)

    def order(key):
        return rule.priority({"w": jnp.zeros((3, 3))}, mask=mask, key=key)["w"]

    draws = jax.vmap(order)(jax.random.split(jax.random.key(0), 300)).reshape(300, 9)
    dead = np.flatnonzero(~np.asarray(mask["w"]).ravel())
    assert dead.tolist() == [1, 2, 5, 6, 7, 8]
    assert bool(jnp.all(draws[:, 1] > 0.5))  # the only one that a path reaches
    last = np.asarray(draws[:, dead[1:]])
    assert last.max() < 2.0**-32
    first = np.bincount(last.argmax(axis=1), minlength=5) / 300
    np.testing.assert_allclose(first, 0.2, atol=0.1)


def test_the_survivors_are_the_graph_where_they_are_known():
    mask = {"w": jnp.ones((2, 2), bool)}
    kept = {"w": jnp.array([[True, False], [True, True]])}
    params = {"w": jnp.ones((2, 2))}
    key = jax.random.key(0)
    got = by_link_prediction().priority(params, mask=mask, kept=kept, key=key)["w"]
    assert float(got[0, 1]) == pytest.approx(1.0, abs=1e-4)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\), not 1\.5"):
        by_link_prediction(1.5)
    with pytest.raises(ValueError, match="rule='CH2'; choose 'CH3-L3' or 'RA-L3'"):
        by_link_prediction(0.1, rule="CH2")
    with pytest.raises(ValueError, match="choose 'CH3-L3' or 'RA-L3'"):
        link_scores(jnp.ones((2, 2), bool), "L3")
    assert by_link_prediction(0.2) == ByLinkPrediction(0.2)
