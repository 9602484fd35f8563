"""SWAG's moments are those of the iterates, and its draws have its covariance."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptivenet import trees
from adaptivenet.posterior.gaussian import find
from adaptivenet.posterior.swag import sample_swag, swag


def walk(tx, params, moves):
    """Runs over given updates; returns the parameters, the state and the iterates."""

    def step(carry, move):
        params, state = carry
        updates, state = tx.update(move, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.lax.scan(step, (params, tx.init(params)), moves)


def random_moves(steps, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "a": jnp.asarray(rng.normal(size=(steps, 2)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(steps, 3, 1)), jnp.float32),
    }


START = {"a": jnp.array([1.0, -1.0]), "b": jnp.ones((3, 1))}


class TestMoments:
    @given(start=st.integers(0, 9), every=st.integers(1, 4), offset=st.sampled_from([0.0, 1000.0]))
    def test_of_the_iterates_that_are_due(self, start, every, offset):
        params = jax.tree.map(lambda leaf: leaf + offset, START)
        # Traced numbers: one program for all examples.
        run = jax.jit(lambda s, e, p: walk(swag(s, every=e), p, random_moves(10)))
        (params, state), path = run(jnp.int32(start), jnp.int32(every), params)
        due = [t for t in range(1, 11) if t >= start and (t - start) % every == 0]
        assert int(state.count) == len(due)
        if not due:
            return
        belief = find(state, params)
        for name, rows in path.items():
            chosen = np.asarray(rows, np.float64)[np.array(due) - 1]
            np.testing.assert_allclose(belief.mean[name], chosen.mean(0), rtol=1e-5, atol=1e-5)
            variance = np.maximum(chosen.var(0), 1e-30)
            if len(due) > 1:
                np.testing.assert_allclose(1 / belief.precision[name], variance, rtol=2e-3)

    def test_a_random_walk_of_known_moments(self):
        """x <- (1 - a) x + a noise has mean 0 and variance a / (2 - a)."""
        a, width = 0.4, 300
        tx = optax.chain(optax.scale(-a), swag(200))

        def step(carry, noise):
            params, state = carry
            updates, state = tx.update({"x": params["x"] - noise}, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = {"x": jnp.full(width, 5.0)}
        noise = jax.random.normal(jax.random.key(0), (3000, width))
        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), noise)
        belief = find(state, params)
        variance = 1 / np.asarray(belief.precision["x"])
        np.testing.assert_allclose(variance.mean(), a / (2 - a), rtol=0.01)
        # Its spectrum at zero is 1, so the mean of n has the variance 1 / n.
        np.testing.assert_allclose(np.asarray(belief.mean["x"]).var(), 1 / 2801, rtol=0.3)

    def test_before_the_first_iterate_it_is_the_parameters(self):
        state = swag(5, floor=1e-4).init(START)
        belief = state.posterior(START)
        np.testing.assert_array_equal(belief.mean["a"], START["a"])
        np.testing.assert_allclose(belief.precision["a"], 1e4, rtol=1e-6)

    def test_updates_pass(self):
        tx = swag(0)
        updates, _ = tx.update(START, tx.init(START), START, something="else")
        assert updates is START

    @pytest.mark.parametrize("compiled", [False, True])
    def test_half_precision_and_leaves_that_are_not_floating(self, compiled):
        params = {"w": jnp.ones(2, jnp.bfloat16), "ids": jnp.arange(2)}
        tx = swag(1, rank=2)
        state = tx.init(params)
        updates = {"w": jnp.full(2, 0.001, jnp.bfloat16), "ids": jnp.zeros(2, jnp.int32)}
        update = jax.jit(tx.update) if compiled else tx.update
        _, state = update(updates, state, params)
        assert state.mean["w"].dtype == jnp.float32
        np.testing.assert_array_equal(state.mean["w"], [1.0, 1.0])  # as bfloat16 lands
        assert trees.is_masked(find(state, params).precision["ids"])
        drawn = sample_swag(state, params, jax.random.key(0))
        assert drawn["w"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(drawn["ids"], params["ids"])

    def test_a_rank_that_is_injected(self):
        tx = optax.inject_hyperparams(swag)(1)
        with pytest.raises(ValueError, match=r"static_args=\('rank',\)"):
            jax.jit(tx.init)(START)
        optax.inject_hyperparams(swag, static_args=("rank",))(1).init(START)


class TestLowRank:
    STEPS, RANK = 9, 4

    def fitted(self):
        tx = optax.chain(optax.identity(), swag(2, rank=self.RANK))
        (params, state), path = walk(tx, START, random_moves(self.STEPS, 3))
        flat = np.concatenate([np.asarray(path["a"]), np.asarray(path["b"])[..., 0]], 1)
        return params, state, flat[1:].astype(np.float64)

    def covariance(self, rows):
        running = np.cumsum(rows, 0) / np.arange(1, len(rows) + 1)[:, None]
        last = (rows - running)[-self.RANK :]
        return 0.5 * np.diag(rows.var(0)) + 0.5 * last.T @ last / (self.RANK - 1)

    def test_the_posterior_is_the_diagonal_of_the_covariance(self):
        params, state, rows = self.fitted()
        belief = find(state, params)
        got = np.concatenate([1 / belief.precision["a"], 1 / belief.precision["b"][:, 0]])
        np.testing.assert_allclose(got, np.diag(self.covariance(rows)), rtol=1e-5)
        np.testing.assert_allclose(belief.mean["a"], rows.mean(0)[:2], rtol=1e-5)

    def test_draws_have_the_covariance_across_leaves(self):
        params, state, rows = self.fitted()
        keys = jax.random.split(jax.random.key(1), 20_000)
        drawn = jax.jit(jax.vmap(lambda key: sample_swag(state, params, key)))(keys)
        flat = np.concatenate([np.asarray(drawn["a"]), np.asarray(drawn["b"])[..., 0]], 1)
        expected = self.covariance(rows)
        np.testing.assert_allclose(np.cov(flat.T), expected, atol=0.03 * expected.max())
        np.testing.assert_allclose(flat.mean(0), rows.mean(0), atol=0.05)
        # What would be lost by drawing leaf by leaf.
        assert np.abs(expected[:2, 2:]).max() > 0.1 * expected.max()

    def test_draws_from_the_diagonal(self):
        (params, state), path = walk(swag(1), START, random_moves(8))
        keys = jax.random.split(jax.random.key(1), 20_000)
        drawn = jax.jit(jax.vmap(lambda key: sample_swag(state, params, key)))(keys)
        np.testing.assert_allclose(drawn["a"].var(0), np.asarray(path["a"]).var(0), rtol=0.05)


def test_inside_of_wrappers():
    tx = optax.masked(swag(1), {"a": True, "b": False})
    (params, state), path = walk(tx, START, random_moves(4))
    belief = find(state, params)
    np.testing.assert_allclose(belief.mean["a"], np.asarray(path["a"]).mean(0), rtol=1e-5)
    assert trees.is_masked(belief.precision["b"])
    drawn = sample_swag(state, params, jax.random.key(0))
    np.testing.assert_array_equal(drawn["b"], params["b"])


class TestErrors:
    def test_numbers_out_of_range(self):
        for options, message in (
            ({"start": -1}, "start must be a whole number >= 0, not -1"),
            ({"start": 1.5}, "start must be a whole number >= 0, not 1.5"),
            ({"start": 1, "every": 0}, "every must be a whole number >= 1, not 0"),
            ({"start": 1, "rank": -2}, "rank must be a whole number >= 0, not -2"),
            ({"start": 1, "rank": 1}, "rank=1 has no covariance"),
            ({"start": 1, "floor": 0.0}, "floor must be positive"),
        ):
            with pytest.raises(ValueError, match=message):
                swag(**options)

    def test_no_parameters_and_no_state(self):
        tx = swag(1)
        with pytest.raises(ValueError, match=r"swag\(\) needs the parameters"):
            tx.update(START, tx.init(START))
        with pytest.raises(ValueError, match=r"holds no swag\(\)"):
            sample_swag(optax.adam(0.1).init(START), START, jax.random.key(0))
