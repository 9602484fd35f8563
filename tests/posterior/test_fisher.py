"""Streaming estimators against sums in numpy, and squared gradients against a loop."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivenet import trees
from adaptivenet.models.mlp import mlp, mlp_init
from adaptivenet.posterior.fisher import fisher, squared_gradient, value_and_squared_grads
from adaptivenet.posterior.fisher_exact import fisher_diagonal


def average(values, decay):
    weights = decay ** np.arange(len(values) - 1.0, -1.0, -1.0)
    return np.tensordot(weights / weights.sum(), np.stack(values), 1)


class TestEstimators:
    @pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
    def test_running_means(self, decay):
        rng = np.random.default_rng(0)
        rows = rng.normal(size=(5, 3)).astype(np.float32)
        w = {"w": jnp.ones(3), "ids": jnp.arange(2)}
        options = {"prior": 0.5, "examples": 100}
        own, batch = fisher(decay, **options), squared_gradient(decay, batch_size=8, **options)
        states = [own.init(w), batch.init(w)]
        for estimator, state in zip((own, batch), states, strict=True):
            belief = estimator.posterior(state, w)  # nothing seen yet: the prior
            np.testing.assert_allclose(belief.precision["w"], np.full(3, 0.5))
            assert trees.is_masked(belief.mean["ids"])
        for row in rows:
            g = {"w": jnp.asarray(row), "ids": np.zeros(2, jax.dtypes.float0)}
            states[0] = own.update(states[0], g, w, squared_grads={"w": jnp.abs(g["w"])}, other=1)
            states[1] = batch.update(states[1], g, w, other=1)
        got = own.posterior(states[0], w)
        expected = 100 * average(np.abs(rows), decay) + 0.5
        np.testing.assert_allclose(got.precision["w"], expected, rtol=1e-5)
        assert got.mean["w"] is w["w"]
        got = states[1].posterior(w)
        expected = 800 * average(rows**2, decay) + 0.5
        np.testing.assert_allclose(got.precision["w"], expected, rtol=1e-5)

    def test_a_population_over_decays_and_priors(self):
        def run(decay, prior):
            estimator = squared_gradient(decay, prior=prior)
            state = estimator.init(jnp.zeros(2))
            for value in (1.0, 2.0):
                state = estimator.update(state, jnp.full(2, value), jnp.zeros(2))
            return estimator.posterior(state, jnp.zeros(2)).precision

        got = jax.jit(jax.vmap(run))(jnp.array([0.0, 0.5]), jnp.array([1.0, 2.0]))
        np.testing.assert_allclose(got[:, 0], [5.0, 2 + (0.5 * 4 + 0.25) / 0.75], rtol=1e-6)

    def test_double_precision(self):
        with jax.enable_x64(True):
            w = jnp.ones(2, jnp.float64)
            state = squared_gradient(0.5).init(w)
            state = squared_gradient(0.5).update(state, w * (1 + 1e-12), w)
            assert state.mean_square.dtype == jnp.float64
            assert state.posterior(w).precision.dtype == jnp.float64

    def test_the_bias_of_the_square_of_a_mean(self):
        """(E g)^2 + Var(g) / B, where the Fisher information has (E g)^2 + Var(g)."""
        g = jnp.asarray(np.random.default_rng(0).normal(2.0, 3.0, (4_000, 16)), jnp.float32)
        w = jnp.zeros(())

        def run(estimator, row):
            state = estimator.init(w)
            extra = {"squared_grads": jnp.mean(jnp.square(row))}
            return estimator.update(state, jnp.mean(row), w, **extra).posterior(w).precision

        cases = ((fisher(0.0), 13.0), (squared_gradient(0.0), 4 + 9 / 16))
        for estimator, expected in cases:
            found = np.asarray(jax.vmap(lambda row: run(estimator, row))(g))  # noqa: B023
            assert abs(found.mean() - expected) < 4.5 * found.std() / np.sqrt(len(g))

    def test_what_is_refused(self):
        for build in (fisher, squared_gradient):
            for decay in (-0.1, 1.0):
                with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), not"):
                    build(decay)
            for bad in (0.0, -1.0, np.inf, np.nan):
                with pytest.raises(ValueError, match="prior must be a positive number"):
                    build(prior=bad)
                with pytest.raises(ValueError, match="examples must be a positive number"):
                    build(examples=bad)
        with pytest.raises(ValueError, match="batch_size must be a positive number"):
            squared_gradient(batch_size=0)
        estimator, w = fisher(), {"w": jnp.ones(2)}
        state = estimator.init(w)
        with pytest.raises(
            ValueError, match=r"call tx.update.*value_and_squared_grads\(loss, params"
        ):
            estimator.update(state, w, w)
        with pytest.raises(ValueError, match="squared_grads= has no leaf 'w'; it has v"):
            estimator.update(state, w, w, squared_grads={"v": jnp.ones(2)})
        with pytest.raises(ValueError, match=r"shape \(3,\) at 'w', but the parameter has \(2,\)"):
            estimator.update(state, w, w, squared_grads={"w": jnp.ones(3)})


def loss(params, example):
    return -jax.nn.log_softmax(mlp(params, example["x"]))[example["y"]]


class TestSquaredGrads:
    def data(self, number=7):
        rng = np.random.default_rng(0)
        return {"x": rng.normal(size=(number, 6)), "y": np.arange(number) % 3}

    def test_against_a_loop(self):
        with jax.enable_x64(True):
            params = mlp_init(jax.random.key(0), (6, 5, 3))
            params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)
            batch = jax.tree.map(jnp.asarray, self.data())
            one = jax.jit(jax.value_and_grad(loss))
            rows = [one(params, jax.tree.map(lambda x: x[n], batch)) for n in range(7)]  # noqa: B023
            values, grads = zip(*rows, strict=True)
            for chunk in (None, 3):
                run = jax.jit(lambda p, b: value_and_squared_grads(loss, p, b, chunk=chunk))  # noqa: B023
                value, mean, squares = run(params, batch)
                np.testing.assert_allclose(value, np.mean(values), rtol=1e-12)
                for place, (g, s) in enumerate(
                    zip(jax.tree.leaves(mean), jax.tree.leaves(squares), strict=True)
                ):
                    column = np.stack([jax.tree.leaves(grad)[place] for grad in grads])
                    np.testing.assert_allclose(g, column.mean(0), rtol=1e-9, atol=1e-12)
                    np.testing.assert_allclose(s, np.mean(column**2, 0), rtol=1e-9, atol=1e-12)

    def test_they_are_the_empirical_fisher_of_the_batch(self):
        params, batch = mlp_init(jax.random.key(0), (6, 5, 3)), self.data()
        batch["x"] = np.asarray(batch["x"], np.float32)
        _, _, squares = jax.jit(lambda p: value_and_squared_grads(loss, p, batch))(params)
        summed = fisher_diagonal(mlp, params, batch["x"], batch["y"], kind="empirical")
        for s, e in zip(jax.tree.leaves(squares), jax.tree.leaves(summed), strict=True):
            np.testing.assert_allclose(7 * s, e, rtol=1e-4, atol=1e-6)

    def test_dtypes_and_leaves_that_are_not_floating(self):
        params = {"w": jnp.ones((2, 3), jnp.bfloat16), "ids": jnp.arange(2)}

        def loss(params, x):
            return jnp.sum(jnp.square(x @ params["w"]))

        x = jnp.ones((4, 2), jnp.bfloat16)
        value, grads, squares = value_and_squared_grads(loss, params, x)
        assert value.dtype == grads["w"].dtype == jnp.bfloat16
        assert squares["w"].dtype == jnp.float32
        assert trees.is_masked(grads["ids"])
        assert trees.is_masked(squares["ids"])
        np.testing.assert_array_equal(squares["w"], np.full((2, 3), 16.0))

    def test_what_is_refused(self):
        params, x = {"w": jnp.ones(2)}, np.ones((3, 2))
        with pytest.raises(ValueError, match="must return a scalar for one example"):
            value_and_squared_grads(lambda p, x: x * p["w"], params, x)
        with pytest.raises(ValueError, match="must be floating, not int32"):
            value_and_squared_grads(lambda p, x: jnp.int32(1), params, x)
        with pytest.raises(ValueError, match="chunk=0 must be a positive"):
            value_and_squared_grads(lambda p, x: x @ p["w"], params, x, chunk=0)
        with pytest.raises(ValueError, match="the batch must be arrays with the same number"):
            value_and_squared_grads(lambda p, x: 0.0, params, {"x": x, "y": np.ones(2)})
