"""The implicit step of elastic weight consolidation: a minimum, and stable."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptivenet import pruning
from adaptivenet.consolidation.boundary import consolidate
from adaptivenet.consolidation.elastic import (
    RootMeanSquare,
    elastic,
    proximal,
)
from adaptivenet.posterior import Posterior

positive = st.floats(0.0078125, 100.0, width=32)
number = st.floats(-100, 100, width=32)


class TestProximal:
    @given(
        strength=st.floats(2.0**-20, 2.0**40, width=32),
        rate=st.floats(2.0**-10, 2.0, width=32),
        precision=positive,
        anchor=number,
        start=number,
        step=number,
    )
    def test_the_formula(self, strength, rate, precision, anchor, start, step):
        tx = proximal(strength, rate)
        params = {"w": jnp.array([start])}
        belief = Posterior({"w": jnp.array([anchor])}, {"w": jnp.array([precision])})
        state = consolidate(tx.init(params), params, belief)
        updates, _ = tx.update({"w": jnp.array([step])}, state, params)
        k = rate * strength * precision
        expected = (start + step + k * anchor) / (1 + k)
        size = abs(start) + abs(step) + abs(anchor)
        np.testing.assert_allclose(start + updates["w"][0], expected, atol=2e-6 * size)

    def test_strengths_beyond_the_format(self):
        params = {"w": jnp.array([2.0, 2.0])}
        tx = proximal(3e38, 10.0)
        state = consolidate(tx.init(params), params, Posterior(params, {"w": jnp.array([1e30, 0])}))
        updates, _ = tx.update({"w": jnp.ones(2)}, state, params)
        assert updates["w"].tolist() == [0.0, 1.0]

    @pytest.mark.parametrize("strength", [1e1, 1e2, 1e3, 1e4])
    def test_stable_where_the_gradient_is_not(self, strength):
        """Four decades of strength, at a rate at which the loss alone is easy."""
        rate, optimum = 0.5, 3.0
        params = {"w": jnp.array([1.0])}
        belief = Posterior({"w": jnp.array([0.5])}, {"w": jnp.ones(1)})

        def train(tx):
            state = consolidate(tx.init(params), params, belief)

            def step(carry, _):
                params, state = carry
                grads = jax.tree.map(lambda p: p - optimum, params)
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, state), None, length=60)[0][0]["w"][0]

        best = (optimum + strength * 0.5) / (1 + strength)
        implicit = train(optax.chain(optax.sgd(rate), proximal(strength, rate)))
        np.testing.assert_allclose(implicit, best, rtol=1e-4)
        explicit = train(optax.chain(elastic(strength), optax.sgd(rate)))
        assert not abs(explicit - best) < 1e3

    def test_the_metric_of_the_optimizer_decides_the_balance(self):
        """Behind Adam, its own metric ends at the minimum of loss plus penalty; none does not."""
        curvature = jnp.array([10.0, 0.1])
        params = {"w": jnp.zeros(2)}
        belief = Posterior(params, {"w": jnp.array([1.0, 1.0])})
        best = curvature * 2.0 / (curvature + 1.0)

        def train(chain, steps=1500, rate=1e-2):
            tx = pruning.with_signals(chain(rate))
            state = consolidate(tx.init(params), params, belief)

            def step(carry, _):
                params, state = carry
                grads = {"w": curvature * (params["w"] - 2.0)}
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), None

            (last, _), _ = jax.lax.scan(step, (params, state), None, length=steps)
            return np.asarray(last["w"])

        def behind(metric):
            return lambda r: optax.chain(
                optax.scale_by_adam(b1=0.0, b2=0.9, eps=1e-8),
                optax.scale(-r),
                proximal(1.0, r, metric=metric),
            )

        gradient = train(lambda r: optax.chain(elastic(1.0), optax.adam(r)))
        own = train(behind(RootMeanSquare(0.9, 1e-8)))
        plain = train(behind(None))
        np.testing.assert_allclose(gradient, best, atol=0.02)
        np.testing.assert_allclose(own, best, atol=0.02)
        assert np.max(np.abs(plain - best)) > 0.3

    def test_a_metric_is_stable_too(self):
        params = {"w": jnp.zeros(2)}
        tx = pruning.with_signals(
            optax.chain(optax.adam(0.1), proximal(1e8, 0.1, metric=RootMeanSquare()))
        )
        state = consolidate(tx.init(params), params, Posterior(params, {"w": jnp.ones(2)}))
        for _ in range(20):
            grads = {"w": params["w"] - 1.0}
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        assert np.all(np.abs(params["w"]) < 1e-3)

    def test_learning_rates_may_follow_a_schedule(self):
        rates = jnp.array([0.1, 0.5, 2.0])
        tx = proximal(3.0, lambda count: rates[count])
        params = {"w": jnp.array([1.0])}
        belief = Posterior({"w": jnp.zeros(1)}, {"w": jnp.ones(1)})
        state = consolidate(tx.init(params), params, belief)
        for rate in rates:
            updates, state = tx.update({"w": jnp.zeros(1)}, state, params)
            np.testing.assert_allclose(1.0 + updates["w"], 1 / (1 + 3 * rate), rtol=1e-5)
