"""Synaptic intelligence against a slow loop, closed forms, and the loss itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adaptivenet as an
from adaptivenet import pruning
from adaptivenet.consolidation.boundary import consolidate
from adaptivenet.consolidation.elastic import penalty
from adaptivenet.consolidation.path_integral import PathIntegralState, path_integral
from tests.cells import every_cell

PARAMS = {"kernel": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2), "bias": jnp.ones(2)}


def bounded(tx, every=2):
    """With boundaries of its own, so that a scan runs through them."""
    tx = optax.with_extra_args_support(tx)

    def init(params):
        return tx.init(params), jnp.zeros((), jnp.int32)

    def update(updates, state, params=None, **extra):
        inner, step = state
        due = step % every == every - 1
        inner = jax.lax.cond(due, lambda s: consolidate(s, params), lambda s: s, inner)
        updates, inner = tx.update(updates, inner, params, **extra)
        return updates, (inner, step + 1)

    return optax.GradientTransformationExtraArgs(init, update)


class TestAgainstALoop:
    @pytest.mark.parametrize("decay", [1.0, 0.7])
    def test_three_tasks_with_momentum(self, decay):
        c, xi, rate, momentum = 0.8, 0.05, 0.1, 0.9
        rng = np.random.default_rng(0)
        theta = rng.normal(size=5)
        anchor, omega, credit = theta.copy(), np.zeros(5), np.zeros(5)
        trace = np.zeros(5)
        with jax.enable_x64(True):
            inner = optax.sgd(rate, momentum=momentum)
            tx = path_integral(inner, c, damping=xi, decay=decay)
            params = {"w": jnp.asarray(theta)}
            state = tx.init(params)
            for task in range(3):
                curvature, goal = rng.uniform(0, 2, 5), rng.normal(size=5)
                for _ in range(7):
                    g = curvature * np.sin(theta - goal)
                    total = g + 2 * c * omega * (theta - anchor)
                    trace = momentum * trace + total
                    step = -rate * trace
                    credit = credit - g * step

                    grads = {"w": jnp.asarray(curvature) * jnp.sin(params["w"] - goal)}
                    updates, state = tx.update(grads, state, params)
                    params = optax.apply_updates(params, updates)
                    theta = theta + step
                    np.testing.assert_allclose(params["w"], theta, rtol=1e-10)
                    np.testing.assert_allclose(state.credit["w"], credit, rtol=1e-7)
                expected = np.maximum(decay * omega + credit / ((theta - anchor) ** 2 + xi), 0)
                np.testing.assert_allclose(state.importance(params)["w"], expected, rtol=1e-6)
                state = consolidate(state, params)
                omega, anchor, credit = expected, theta.copy(), np.zeros(5)
                np.testing.assert_allclose(state.omega["w"], omega, rtol=1e-6)
                np.testing.assert_array_equal(state.anchor["w"], params["w"])
                np.testing.assert_array_equal(state.credit["w"], np.zeros(5))
                assert task < 0 or np.any(omega > 0)

    def test_the_surrogate_loss(self):
        """What is added is the gradient of c * sum(omega (theta - anchor)^2)."""
        tx = path_integral(optax.identity(), 0.7)
        state = tx.init(PARAMS)
        omega = jax.tree.map(lambda p: jnp.abs(p) + 0.1, PARAMS)
        state = state._replace(omega=omega)
        where = jax.tree.map(lambda p: p + 0.5, PARAMS)
        nothing = jax.tree.map(jnp.zeros_like, PARAMS)
        got, _ = tx.update(nothing, state, where)
        expected = jax.grad(penalty)(where, state, 0.7)
        for name, found in got.items():
            np.testing.assert_allclose(found, expected[name], rtol=1e-6)
        value = sum(float(jnp.sum(omega[k] * 0.25)) for k in omega)
        np.testing.assert_allclose(penalty(where, state, 0.7), 0.7 * value, rtol=1e-6)


class TestQuadraticLosses:
    """Zenke et al., section 4: what the path integral is in a quadratic bowl."""

    curvature = np.array([0.1, 1.0, 3.0])
    goal = np.array([1.0, -2.0, 0.5])

    def descend(self, rate, steps, **options):
        tx = path_integral(optax.sgd(rate), 1.0, **options)
        start = {"w": jnp.zeros(3)}

        def step(carry, _):
            params, state = carry
            h, goal = jnp.float32(self.curvature), jnp.float32(self.goal)
            updates, state = tx.update({"w": h * (params["w"] - goal)}, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (start, tx.init(start)), None, length=steps)[0]

    @pytest.mark.parametrize("rate", [0.5, 0.1])
    def test_the_closed_form_of_gradient_descent(self, rate):
        steps, h = 40, self.curvature
        _, state = self.descend(rate, steps)
        apart = self.goal**2
        expected = h * apart * (1 - (1 - rate * h) ** (2 * steps)) / (2 - rate * h)
        np.testing.assert_allclose(state.credit["w"], expected, rtol=1e-4)

    def test_the_surrogate_loss_becomes_the_loss(self):
        params, state = self.descend(0.01, 8000, damping=1e-6)
        np.testing.assert_allclose(params["w"], self.goal, atol=2e-3)
        state = consolidate(state, params)
        np.testing.assert_allclose(state.omega["w"], self.curvature / 2, rtol=0.02)
        for where in ([0.0, 0.0, 0.0], [3.0, 1.0, -1.0]):
            loss = np.sum(self.curvature * (np.array(where) - self.goal) ** 2) / 2
            found = penalty({"w": jnp.array(where)}, state)
            np.testing.assert_allclose(found, loss, rtol=0.03)

    def test_credits_add_up_to_the_fall_of_the_loss(self):
        """Equation 3, along a path that is no straight line."""
        key = jax.random.key(0)
        x = jax.random.normal(key, (20, 3))
        y = jnp.sin(x @ jnp.array([[1.0], [2.0], [-1.0]]))
        params = {
            "a": jax.random.normal(jax.random.fold_in(key, 1), (3, 6)),
            "b": jax.random.normal(jax.random.fold_in(key, 2), (6, 1)),
        }

        def loss(p):
            return jnp.mean(jnp.square(jnp.tanh(x @ p["a"]) @ p["b"] - y))

        gaps = []
        for rate, steps in ((0.04, 50), (0.01, 200)):
            tx = path_integral(optax.sgd(rate), 1.0)

            def step(carry, _, tx=tx):
                p, s = carry
                updates, s = tx.update(jax.grad(loss)(p), s, p)
                return (optax.apply_updates(p, updates), s), None

            (end, state), _ = jax.lax.scan(step, (params, tx.init(params)), None, length=steps)
            fall = float(loss(params) - loss(end))
            gaps.append(sum(float(jnp.sum(c)) for c in state.credit.values()) / fall - 1)
        assert fall > 0.3
        assert abs(gaps[1]) < 0.03
        assert abs(gaps[1]) < 0.5 * abs(gaps[0])


class TestPrecision:
    def test_only_what_lands_is_credited(self):
        params = {"w": jnp.array([256.0, 0.0], jnp.bfloat16)}
        tx = path_integral(optax.sgd(0.25), 1.0)
        state = tx.init(params)
        grads = {"w": jnp.array([1.0, 1.0], jnp.bfloat16)}
        updates, state = tx.update(grads, state, params)
        assert optax.apply_updates(params, updates)["w"][0] == 256.0
        assert state.credit["w"].tolist() == [0.0, 0.25]
        assert state.credit["w"].dtype == jnp.float32

    def test_uphill_is_worth_nothing(self):
        """As in the authors' code; the sum of tasks is what is cut off."""
        tx = path_integral(optax.sgd(-0.1), 1.0)
        _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
        assert float(state.credit["bias"][0]) < 0
        moved = jax.tree.map(lambda p: 1.1 * p, PARAMS)
        assert consolidate(state, moved).omega["bias"].tolist() == [0.0, 0.0]
        state = state._replace(omega=jax.tree.map(lambda o: o + 20.0, state.omega))
        assert 0 < float(consolidate(state, moved).omega["bias"][0]) < 20.0

    def test_refused_updates_earn_nothing(self):
        tx = path_integral(optax.apply_if_finite(optax.sgd(0.1), 5), 1.0)
        grads = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), PARAMS)
        updates, state = tx.update(grads, tx.init(PARAMS), PARAMS)
        assert updates["bias"].tolist() == [0.0, 0.0]
        assert state.credit["bias"].tolist() == [0.0, 0.0]

    def test_leaves_that_are_not_floating_and_select(self):
        params = {**PARAMS, "ids": jnp.arange(3)}
        grads = {**PARAMS, "ids": np.zeros(3, jax.dtypes.float0)}
        zero = optax.GradientTransformation(lambda p: (), lambda u, s, p=None: (u, s))
        tx = path_integral(zero, 1.0, select="kernel")
        updates, state = tx.update(grads, tx.init(params), params)
        assert isinstance(state.omega["ids"], optax.MaskedNode)
        assert isinstance(state.credit["bias"], optax.MaskedNode)
        assert updates["ids"] is grads["ids"]
        assert isinstance(consolidate(state, params), PathIntegralState)


def test_the_first_task_is_kept_and_without_strength_it_is_not():
    """Two tasks that need different synapses, and share one."""
    curvatures, goals = ([1.0, 1.0, 0.0], [0.0, 0.5, 1.0]), ([1.0, 2.0, 0.0], [0.0, -2.0, 3.0])

    def train(strength):
        tx = path_integral(optax.sgd(0.1), strength, damping=1e-3)
        params = {"w": jnp.zeros(3)}
        state = tx.init(params)
        for h, goal in zip(map(jnp.array, curvatures), map(jnp.array, goals), strict=True):

            def step(carry, _, h=h, goal=goal):
                p, s = carry
                updates, s = tx.update({"w": h * (p["w"] - goal)}, s, p)
                return (optax.apply_updates(p, updates), s), None

            (params, state), _ = jax.lax.scan(step, (params, state), None, length=300)
            state = consolidate(state, params)
        return np.asarray(params["w"])

    free, held = train(0.0), train(10.0)
    np.testing.assert_allclose(free, [1.0, -2.0, 3.0], atol=1e-3)
    np.testing.assert_allclose(held, [1.0, 2.0, 3.0], atol=0.3)


class TestInChains:
    def test_a_belief_around_and_a_pruner_within(self):
        chain = optax.chain(optax.adam(1e-2), pruning.prune(0.5, score=pruning.snr, every=2))
        tx = an.with_posterior(an.posterior.squared_gradient(0.9), path_integral(chain, 50.0))
        params, state, update = PARAMS, tx.init(PARAMS), jax.jit(tx.update)
        for step in range(6):
            grads = jax.tree.map(lambda p: jnp.cos(p * 3.0 + step), params)  # noqa: B023
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            an.testing.check_landing(params, state)
            if step == 2:
                state = consolidate(state, params)
                assert float(jnp.max(state.inner.omega["kernel"])) > 0
        assert int(jnp.sum(params["kernel"] == 0)) == 3

    def test_extra_arguments_go_through(self):
        inner = optax.GradientTransformationExtraArgs(
            lambda p: (), lambda u, s, p=None, *, factor, **_: (optax.tree.scale(factor, u), s)
        )
        tx = path_integral(inner, 1.0)
        updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, factor=3.0)
        np.testing.assert_allclose(updates["bias"], 3.0)

    def test_injected_strengths(self):
        make = optax.inject_hyperparams(path_integral)
        tx = make(inner=optax.identity(), strength=0.5)
        state = tx.init(PARAMS)
        omega = jax.tree.map(jnp.ones_like, PARAMS)
        state = state._replace(inner_state=state.inner_state._replace(omega=omega))
        where = jax.tree.map(lambda p: p + 1.0, PARAMS)
        nothing = jax.tree.map(jnp.zeros_like, PARAMS)
        np.testing.assert_allclose(tx.update(nothing, state, where)[0]["bias"], 1.0)
        state.hyperparams["strength"] = jnp.float32(2.0)
        np.testing.assert_allclose(tx.update(nothing, state, where)[0]["bias"], 4.0)

    def test_the_inner_updates_before_the_first_boundary(self):
        tx, plain = path_integral(optax.adam(1e-2), 1e6), optax.adam(1e-2)
        got, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
        expected, _ = plain.update(PARAMS, plain.init(PARAMS), PARAMS)
        for name, found in got.items():
            assert found.tobytes() == expected[name].tobytes()


def intelligent(strength):
    return bounded(path_integral(optax.adam(1e-2), strength * 10, damping=0.1, decay=strength))


@every_cell
def test_the_contract(subject, mode):
    an.testing.check(intelligent, subject=subject, mode=mode)


@pytest.mark.parametrize("subject", ["nnx_optimizer", "dict"])
def test_resumed_runs(subject):
    an.testing.check_resume(intelligent, subject=subject)


def test_what_the_contract_runs_protects_at_all():
    tx = intelligent(0.5)
    params, state = PARAMS, tx.init(PARAMS)
    for step in range(6):
        grads = jax.tree.map(lambda p: jnp.cos(p * 3.0 + step), params)  # noqa: B023
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    memory = state[0].memory
    assert float(jnp.max(memory.precision["bias"])) > 0.1
    assert float(jnp.max(jnp.abs(params["bias"] - memory.mean["bias"]))) > 1e-3


def test_errors():
    for options, message in (
        ({"strength": -1.0}, "strength must be a number >= 0"),
        ({"strength": 1.0, "damping": 0.0}, "damping must be positive"),
        ({"strength": 1.0, "decay": 2.0}, r"decay must be in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            path_integral(optax.sgd(0.1), **options)
    with pytest.raises(TypeError, match=r"wraps an optimizer, such as optax\.adam"):
        path_integral(1.0, 1.0)  # pyright: ignore[reportArgumentType]
    tx = path_integral(optax.sgd(0.1), 1.0)
    with pytest.raises(ValueError, match=r"path_integral\(\) needs the parameters"):
        tx.update(PARAMS, tx.init(PARAMS))
    with pytest.raises(ValueError, match="matches no leaf"):
        path_integral(optax.sgd(0.1), 1.0, select="nothing").init(PARAMS)
    refusing = optax.GradientTransformationExtraArgs(
        lambda p: (), lambda u, s, p=None, *, only=0: (u, s)
    )
    tx = path_integral(refusing, 1.0)
    with pytest.raises(TypeError) as caught:
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, other=1)
    assert any("path_integral()" in note for note in caught.value.__notes__)
