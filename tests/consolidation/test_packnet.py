"""PackNet: who owns a weight, who may move it, and the exact network of every task."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adaptivenet as an
from adaptivenet import counts
from adaptivenet.consolidation import packnet as pn
from adaptivenet.consolidation.boundary import consolidate
from adaptivenet.moments import reset_moments
from tests.cells import every_cell

boundary = jax.jit(consolidate)
quick_prune = jax.jit(pn.prune)


def tree(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"a": (4, 5), "bias": (5,), "c": (3, 2)}
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


def obvious(weights, owner, task, fraction):
    """The slow version: sort the free weights of a leaf, and give away the largest."""
    weights, owner = weights.copy(), owner.copy()
    places = [p for p in np.ndindex(owner.shape) if owner[p] < 0]
    places.sort(key=lambda p: abs(weights[p]))
    cut = int(np.floor(fraction * len(places) + 0.5))
    for p in places[:cut]:
        weights[p] = 0.0
    for p in places[cut:]:
        owner[p] = task
    return weights, owner


@settings(max_examples=15)
@given(seed=st.integers(0, 999), fraction=st.floats(0, 0.99), task=st.integers(0, 5))
def test_pruning_is_the_obvious_one(seed, fraction, task):
    rng = np.random.default_rng(seed)
    params = tree(seed)
    owner = {k: jnp.asarray(rng.integers(-1, 2, size=params[k].shape), jnp.int32) for k in "ac"}
    share = counts.as_share(fraction)
    pruned, given_ = quick_prune(params, {**owner, "bias": optax.MaskedNode()}, task, share)
    for k in "ac":
        weights, expected = obvious(np.asarray(params[k]), np.asarray(owner[k]), task, fraction)
        np.testing.assert_array_equal(given_[k], expected)
        np.testing.assert_array_equal(pruned[k], np.where(expected < 0, 0, params[k]))
        np.testing.assert_array_equal(pruned[k][expected == 0], weights[expected == 0])
    np.testing.assert_array_equal(pruned["bias"], params["bias"])


class TestPhases:
    def steps(self, tx, params, state, number=3, seed=0):
        step = jax.jit(tx.update)
        for place in range(number):
            grads = jax.tree.map(lambda p: jnp.cos(3 * p + place + seed), params)  # noqa: B023
            updates, state = step(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    def test_the_life_of_three_tasks(self):
        """Momentum and weight decay before it move nothing that is frozen."""
        chain = (optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))
        tx = optax.chain(*chain, pn.packnet(0.5))
        params = tree()
        state, kept = tx.init(params), {}
        left = {"a": 20, "c": 6}
        for task in range(3):
            before, owner = params, pn.owners(state)
            params, state = self.steps(tx, params, state, seed=task)
            for k in "ac":  # training: the free ones move, and no others
                moved = np.asarray(params[k] != before[k])
                np.testing.assert_array_equal(moved, np.asarray(owner[k]) < 0)
            assert bool(jnp.all(params["bias"] != before["bias"])) == (task == 0)

            trained = params
            state = boundary(state, params)
            now = pn.owners(state)
            for k in "ac":
                _, expected = obvious(
                    np.asarray(trained[k]), np.asarray(owner[k]), task, fraction=0.5
                )
                np.testing.assert_array_equal(now[k], expected)
                left[k] -= left[k] - int(np.floor(left[k] * 0.5 + 0.5))
                assert int((now[k] < 0).sum()) == left[k]
            params, state = self.steps(tx, params, state, seed=9)
            for k in "ac":  # retraining: its own move, the free are zero, others stay
                own = np.asarray(now[k])
                assert np.all(np.asarray(params[k])[own < 0] == 0)
                assert np.all(np.asarray(params[k])[own == task] != trained[k][own == task])
                older = (own >= 0) & (own < task)
                np.testing.assert_array_equal(params[k][older], trained[k][older])
            state = boundary(state, params)
            kept[task] = pn.view(params, pn.owners(state), task)
            assert int(state[-1].task) == task + 1
            assert not bool(state[-1].retraining)
        for task, view in kept.items():  # every task's network is there, to the bit
            again = pn.view(params, pn.owners(state), task)
            for one, other in zip(jax.tree.leaves(view), jax.tree.leaves(again), strict=True):
                np.testing.assert_array_equal(one, other)
        count = pn.capacity(pn.owners(state), 3).astype(jnp.int32).tolist()
        assert count == [left["a"] + left["c"], 10 + 3, 5 + 1, 2 + 1]
        # 20: 10, 5, 2 kept and 3 left (2.5 is rounded up); 6: 3, 1, 1 and 1 left.
        assert sum(count) == 26

    def test_the_order_matters(self):
        """Negative control: in front of momentum, frozen weights go on moving."""
        tx = optax.chain(pn.packnet(0.5), optax.sgd(0.1, momentum=0.9))
        params = tree()
        params, state = self.steps(tx, params, tx.init(params))
        state = boundary(boundary(state, params), params)
        after, _ = self.steps(tx, params, state)
        own = np.asarray(pn.owners(state)["a"]) == 0
        assert np.any(np.asarray(after["a"] != params["a"])[own])

    def test_moments_of_the_next_task(self):
        """The recipe of the module: what Adam remembers of free weights is forgotten."""
        tx = optax.chain(optax.adam(1e-2), pn.packnet(0.5))
        params = tree()
        params, state = self.steps(tx, params, tx.init(params))
        state = boundary(state, params)
        params, state = self.steps(tx, params, state)
        state = boundary(state, params)
        free = pn.free(pn.owners(state))
        momentum = optax.tree_utils.tree_get(reset_moments(state, params, free), "mu")
        before = optax.tree_utils.tree_get(state, "mu")
        assert np.any(np.asarray(before["a"])[np.asarray(free["a"])] != 0)
        np.testing.assert_array_equal(momentum["a"], np.where(free["a"], 0, before["a"]))

    def test_pruned_at_once(self):
        """prune() gives what the next update lands on."""
        tx = pn.packnet(0.3)
        params = tree()
        state = tx.init(params)
        now, _ = pn.prune(params, state.owner, 0, 0.3)
        state = boundary(state, params)
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        landed = optax.apply_updates(params, updates)
        for one, other in zip(jax.tree.leaves(now), jax.tree.leaves(landed), strict=True):
            np.testing.assert_array_equal(one, other)

    def test_heads_always_learn(self):
        params = {**tree(), "heads": [jnp.ones((2, 2)), jnp.ones(2)]}
        tx = pn.packnet(0.5, heads="heads")
        state = tx.init(params)
        state = boundary(boundary(state, params), params)
        ones = jax.tree.map(jnp.ones_like, params)
        updates, _ = tx.update(ones, state, params)
        assert all(bool((leaf == 1).all()) for leaf in updates["heads"])
        assert not updates["bias"].any()
        seen = pn.view(params, state.owner, 0)
        assert all(bool((leaf == 1).all()) for leaf in seen["heads"])
        assert not jax.tree.leaves(state.owner["heads"])

    @pytest.mark.parametrize("retraining", [False, True])
    def test_trainable(self, retraining):
        owner = {"w": jnp.array([-1, 0, 1, 2])}
        found = pn.trainable(owner, 1, retraining)["w"].tolist()
        assert found == ([False, False, True, False] if retraining else [True, False, False, False])

    def test_half_precision_lands(self):
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), tree())
        tx = pn.packnet(0.5)
        state = boundary(tx.init(params), params)
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        landed = optax.apply_updates(params, updates)
        assert np.all(np.asarray(landed["a"] == 0) == (np.asarray(state.owner["a"]) < 0))

    def test_populations(self):
        fractions = jnp.array([0.25, 0.5, 0.75])

        def member(fraction):
            params = tree()
            state = consolidate(pn.packnet(fraction).init(params), params)
            return pn.capacity(state.owner, 1)

        count = jax.jit(jax.vmap(member))(fractions).astype(jnp.int32)
        # Free ones of 20 and of 6: 5 + 2 (1.5 is rounded up), 10 + 3, 15 + 5 (4.5).
        assert count.tolist() == [[7, 19], [13, 13], [20, 6]]


def test_two_tasks_on_quadratics():
    """The second task is fitted with what the first left; the first stays, to the bit."""
    h = jnp.ones((1, 6))
    targets = [
        jnp.array([[3.0, 2.0, 0.1, 0.2, 1.0, 0.3]]),
        jnp.array([[9.0, 9.0, 2.0, -2.0, 9.0, 1.0]]),
    ]
    tx = optax.chain(optax.sgd(0.5), pn.packnet(0.5))
    params = {"w": jnp.zeros((1, 6))}
    state, views = tx.init(params), []
    for task, target in enumerate(targets):
        for _ in range(2):

            def step(carry, _, target=target):
                params, state = carry
                grads = {"w": h * (params["w"] - target)}
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), None

            (params, state), _ = jax.lax.scan(step, (params, state), None, 60)
            state = boundary(state, params)
        views.append(pn.view(params, pn.owners(state), task)["w"])
    np.testing.assert_allclose(views[0], [[3.0, 2.0, 0.0, 0.0, 1.0, 0.0]], atol=1e-6)
    np.testing.assert_array_equal(pn.view(params, pn.owners(state), 0)["w"], views[0])
    # 1.5 of three weights are pruned, rounded up: one is left of the second task.
    owner = np.asarray(pn.owners(state)["w"])[0]
    assert owner[[0, 1, 4]].tolist() == [0, 0, 0]
    assert sorted(owner[[2, 3, 5]].tolist()) == [-1, -1, 1]
    np.testing.assert_allclose(np.abs(views[1][0][owner == 1]), [2.0], atol=1e-6)


class Counted(NamedTuple):
    step: jax.Array
    inner: Any


def unchanged(state, params):
    del params
    return state


def with_boundaries(fraction):
    packing = pn.packnet(fraction, select=r"(dense1/kernel|^0/0)$")
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), packing)

    def init(params):
        return Counted(jnp.zeros((), jnp.int32), tx.init(params))

    def update(grads, state, params=None, **extra):
        updates, inner = tx.update(grads, state.inner, params, **extra)
        step = state.step + 1
        inner = jax.lax.cond(step % 2 == 0, consolidate, unchanged, inner, params)
        return updates, Counted(step, inner)

    return optax.GradientTransformationExtraArgs(init, update)


@every_cell
def test_contract(subject, mode):
    an.testing.check(with_boundaries, subject=subject, mode=mode, steps=4)


def test_checkpoints():
    an.testing.check_resume(with_boundaries, subject="list", steps=4)


class TestErrors:
    def test_no_free_weights_left(self):
        params = {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
        tx = pn.packnet(0.25)  # one is left of four, and 0.25 of one is none
        state = tx.init(params)
        for _ in range(3):
            state = consolidate(state, params)
        with pytest.raises(ValueError, match=r"no free weights are left for task 2: all 4 belong"):
            consolidate(state, params)

    def test_others(self):
        params = tree()
        with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\)"):
            pn.packnet(1.0)
        with pytest.raises(ValueError, match="matches no leaf"):
            pn.packnet(0.5, heads="head").init(params)
        with pytest.raises(ValueError, match="leaves no synapse"):
            pn.packnet(0.5, heads="a|c").init(params)
        tx = pn.packnet(0.5)
        with pytest.raises(ValueError, match=r"packnet\(\) needs the parameters"):
            tx.update(params, tx.init(params))
        with pytest.raises(ValueError, match=r"0 states of packnet\(\), not one"):
            pn.owners(optax.EmptyState())
        with pytest.raises(ValueError, match="belongs to another tree"):
            pn.view({"b": params["a"]}, tx.init(params).owner, 0)
        other = {"b": params["a"]}
        with pytest.raises(ValueError, match="belongs to another tree"):
            tx.update(other, tx.init(params), other)
