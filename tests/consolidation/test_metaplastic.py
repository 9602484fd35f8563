"""Metaplasticity is the published rule; it protects signs, and precisions set the steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adaptivenet as an
from adaptivenet import testing
from adaptivenet.consolidation.metaplastic import (
    binarize,
    by_precision,
    metaplastic,
    sech_squared,
    straight_through_sign,
)
from adaptivenet.posterior.gaussian import Posterior, isotropic
from tests.cells import every_cell

PARAMS = {"kernel": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2), "bias": jnp.ones(2)}


class Reference:
    """The authors' Adam in numpy, weight by weight: its moment decides who is held back."""

    def __init__(self, w, m, rate=0.05, b1=0.9, b2=0.999, eps=1e-8):
        self.w, self.m, self.rate, self.betas, self.eps = w.copy(), m, rate, (b1, b2), eps
        self.first, self.second, self.t = np.zeros_like(w), np.zeros_like(w), 0

    def step(self, grad):
        b1, b2 = self.betas
        self.t += 1
        for place in np.ndindex(*self.w.shape):
            g, w = grad[place], self.w[place]
            self.first[place] = b1 * self.first[place] + (1 - b1) * g
            self.second[place] = b2 * self.second[place] + (1 - b2) * g * g
            mean = self.first[place] / (1 - b1**self.t)
            root = np.sqrt(self.second[place] / (1 - b2**self.t))
            move = -self.rate * mean / (root + self.eps)
            if np.sign(w) * self.first[place] > 0:
                move *= 1 - np.tanh(self.m * abs(w)) ** 2
            self.w[place] += move


def test_after_adam_it_is_the_authors_optimizer():
    rng = np.random.default_rng(0)
    start = rng.normal(size=(3, 4))
    start[0, 0] = 0.0
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        tx, params = optax.chain(optax.adam(0.05), metaplastic(1.3)), {"w": jnp.asarray(start)}
        state, reference = tx.init(params), Reference(start, 1.3)
        for _ in range(20):
            grad = rng.normal(size=start.shape)
            updates, state = tx.update({"w": jnp.asarray(grad)}, state, params)
            params = optax.apply_updates(params, updates)
            reference.step(grad)
            np.testing.assert_allclose(params["w"], reference.w, rtol=1e-9, atol=1e-12)


class TestFactor:
    @given(x=st.floats(0.0, 40.0))
    def test_sech_squared(self, x):
        got = float(sech_squared(jnp.float32(x)))
        np.testing.assert_allclose(got, 1 / np.cosh(np.float64(np.float32(x))) ** 2, rtol=2e-5)

    def test_far_out_it_is_zero_and_not_nan(self):
        assert sech_squared(jnp.array([100.0, 1e30, jnp.inf])).tolist() == [0.0, 0.0, 0.0]

    @settings(max_examples=25)
    @given(w=st.floats(-3, 3, width=32), u=st.floats(-1, 1, width=32), m=st.floats(0, 3))
    def test_weights_strengthen_freely_and_weaken_slowly(self, w, u, m):
        params = {"w": jnp.full((1, 1), w, jnp.float32)}
        updates, _ = metaplastic(m).update(
            {"w": jnp.full((1, 1), u, jnp.float32)}, optax.EmptyState(), params
        )
        got = float(updates["w"][0, 0])
        if np.sign(w) * np.sign(u) >= 0:
            assert got == np.float32(u)
        else:
            assert abs(got) <= abs(np.float32(u))
            np.testing.assert_allclose(got, u / np.cosh(m * w) ** 2, rtol=1e-4, atol=1e-37)

    def test_both_directions_and_another_function(self):
        params, grads = {"w": jnp.array([[2.0, 2.0]])}, {"w": jnp.array([[0.5, -0.5]])}
        tx = metaplastic(3.0, direction="both", plasticity=lambda x: 1 / (1 + x))
        updates, _ = tx.update(grads, tx.init(params), params)
        np.testing.assert_allclose(updates["w"], [[0.5 / 7, -0.5 / 7]], rtol=1e-6)

    def test_a_strength_of_zero_leaves_updates_alone(self):
        """Negative control, to the bit."""
        grads = jax.tree.map(lambda p: jnp.sin(p) / 3, PARAMS)
        updates, _ = metaplastic(0.0).update(grads, optax.EmptyState(), PARAMS)
        for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_biases_learn_as_ever_unless_chosen(self):
        grads = jax.tree.map(lambda p: -p, PARAMS)
        default, _ = metaplastic(2.0).update(grads, optax.EmptyState(), PARAMS)
        np.testing.assert_array_equal(default["bias"], grads["bias"])
        assert np.all(np.abs(default["kernel"]) < np.abs(grads["kernel"]))
        strengths = {"kernel": 0.0, "bias": 2.0}
        chosen, _ = metaplastic(strengths, select=".").update(grads, optax.EmptyState(), PARAMS)
        np.testing.assert_array_equal(chosen["kernel"], grads["kernel"])
        assert np.all(np.abs(chosen["bias"]) < np.abs(grads["bias"]))


class TestBinarize:
    def test_signs_exactly_and_a_gradient_that_passes(self):
        hidden = {"w": jnp.array([[-3.3, -0.1, 0.0, 1e-30, 0.7, 5.1]]), "bias": jnp.ones(3)}
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
            cast = jax.tree.map(lambda p: p.astype(dtype), hidden)  # noqa: B023 (used at once)
            got = binarize(cast, window=1.0)
            assert got["w"].dtype == dtype
            assert got["w"].astype(jnp.float32).tolist() == [[-1.0, -1.0, 1.0, 1.0, 1.0, 1.0]]
            np.testing.assert_array_equal(got["bias"], cast["bias"])

        def total(window):
            return jax.grad(lambda h: binarize(h, window=window)["w"].sum())(hidden)["w"].tolist()

        assert total(None) == [[1.0] * 6]
        assert total(1.0) == [[0.0, 1.0, 1.0, 1.0, 1.0, 0.0]]

    def test_the_chain_rule_goes_through(self):
        """d/dh of (sign(h) - 3)^2 is 2 (sign(h) - 3), at the sign and not at h."""
        grad = jax.grad(lambda h: jnp.sum((straight_through_sign(h) - 3.0) ** 2))(
            jnp.array([0.2, -0.2])
        )
        assert grad.tolist() == [-4.0, -8.0]


def memory(m, key):
    """A binary perceptron learns 40 patterns, then 40 others: the share it knows, after each."""
    n, patterns = 200, 40
    a, b, start = jax.random.split(key, 3)

    def task(key):
        x, y = jax.random.split(key)
        return jax.random.rademacher(x, (patterns, n), float), jax.random.rademacher(
            y, (patterns,), float
        )

    def loss(hidden, x, y):
        margin = y * (x @ binarize(hidden)["w"])[:, 0] / n**0.5
        return jnp.mean(jax.nn.relu(1.5 - margin))

    tx = optax.chain(optax.sgd(0.5), metaplastic(m))
    params = {"w": 0.1 * jax.random.normal(start, (n, 1))}
    known = []
    for data, steps in ((task(a), 60), (task(b), 60)):

        def step(carry, _, data=data):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, *data), state, params)
            return (optax.apply_updates(params, updates), state), None

        params = jax.lax.scan(step, (params, tx.init(params)), None, steps)[0][0]
        for x, y in (task(a), task(b)):
            known.append(jnp.mean((y * (x @ binarize(params)["w"])[:, 0]) > 0))
    return jnp.stack(known)


def test_a_binary_perceptron_keeps_more_and_learns_more_slowly():
    """Negative control: m = 0. What is kept has its price, and the test says so."""
    keys = jax.random.split(jax.random.key(0), 8)
    run = jax.jit(jax.vmap(jax.vmap(memory, (None, 0)), (0, None)))
    plain, meta = np.asarray(run(jnp.array([0.0, 8.0]), keys)).mean(1)
    learnt_first, _, first_after, second_after = range(4)
    for arm in (plain, meta):
        assert arm[learnt_first] > 0.95
        assert arm[second_after] > 0.8
    assert plain[first_after] < 0.83
    assert meta[first_after] > plain[first_after] + 0.05
    assert meta[second_after] < plain[second_after]


class TestByPrecision:
    def update(self, tx, precision, grads=None):
        params = jax.tree.map(jnp.zeros_like, precision)
        grads = jax.tree.map(jnp.ones_like, precision) if grads is None else grads
        belief = Posterior(params, precision)
        return tx.update(grads, tx.init(params), params, posterior=belief)[0]

    def test_the_factor_is_the_share_of_uncertainty_that_is_left(self):
        precision = {"w": jnp.array([0.5, 2.0, 8.0, 200.0])}
        np.testing.assert_allclose(
            self.update(by_precision(2.0), precision)["w"], [1.0, 1.0, 0.25, 0.01], rtol=1e-6
        )
        np.testing.assert_allclose(
            self.update(by_precision(2.0, power=0.5), precision)["w"], [1, 1, 0.5, 0.1], rtol=1e-6
        )
        np.testing.assert_allclose(
            self.update(by_precision(2.0, least=0.1), precision)["w"], [1, 1, 0.25, 0.1], rtol=1e-6
        )
        same = self.update(by_precision(2.0, power=0.0), precision)
        np.testing.assert_array_equal(same["w"], np.ones(4))  # negative control

    def test_it_is_a_kalman_filter(self):
        """Numbers observed with unit noise, by steps of prior/precision: the posterior mean."""
        rng = np.random.default_rng(0)
        prior, data = 0.5, rng.normal(size=(40, 3))
        params = {"w": jnp.zeros(3)}
        # A gradient step of 1 / precision is (1 / prior) times the factor.
        tx = optax.chain(optax.sgd(1 / prior), by_precision(prior))
        state = tx.init(params)
        for seen, row in enumerate(data, start=1):
            grads = {"w": params["w"] - jnp.asarray(row, jnp.float32)}
            belief = Posterior(params, {"w": jnp.full(3, prior + seen)})
            updates, state = tx.update(grads, state, params, posterior=belief)
            params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["w"], data.sum(0) / (prior + 40), rtol=1e-4, atol=1e-6)

    def test_leaves_without_belief_or_choice_pass(self):
        precision = {"w": jnp.full((2, 2), 10.0), "b": jnp.full(2, 10.0), "c": optax.MaskedNode()}
        params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2), "c": jnp.ones(3)}
        belief = Posterior(precision, precision)
        for select, touched in ((None, {"w", "b"}), ("w", {"w"})):
            tx = by_precision({"w": 1.0, "b": 2.0, "c": 1.0}, select=select)
            updates, _ = tx.update(params, tx.init(params), params, posterior=belief)
            for name, leaf in updates.items():
                factor = {"w": 0.1, "b": 0.2}[name] if name in touched else 1.0
                np.testing.assert_allclose(leaf, np.full(leaf.shape, factor), rtol=1e-6)

    def test_half_precision(self):
        params = {"w": jnp.ones(2, jnp.bfloat16)}
        tx = by_precision(1.0)
        updates, _ = tx.update(
            params, tx.init(params), params, posterior=isotropic(params, precision=2.0)
        )
        assert updates["w"].dtype == jnp.bfloat16
        assert updates["w"].astype(jnp.float32).tolist() == [0.5, 0.5]


def hidden_weights(strength):
    return optax.chain(optax.adam(1e-2), metaplastic(strength))


def believing(strength):
    estimator = an.posterior.squared_gradient(0.9, prior=1.0)
    return an.with_posterior(
        estimator, optax.chain(optax.sgd(0.1), by_precision(1.0, power=strength))
    )


@every_cell
def test_contract(subject, mode):
    """Both in one chain: a program serves both."""

    def make(strength):
        estimator = an.posterior.squared_gradient(0.9, prior=1.0)
        chain = optax.chain(
            optax.sgd(0.1), metaplastic(strength), by_precision(1.0, least=strength)
        )
        return an.with_posterior(estimator, chain)

    testing.check(make, subject=subject, mode=mode)


def test_resumes():
    testing.check_resume(hidden_weights, subject="list")
    testing.check_resume(believing, subject="dict")


class TestErrors:
    def test_numbers_out_of_range(self):
        for make, message in (
            (lambda: metaplastic(-1.0), "strength must be a number >= 0"),
            (lambda: metaplastic({"w": -1.0}), "strength must be a number >= 0"),
            (lambda: metaplastic(1.0, direction="up"), 'direction must be "weakening" or "both"'),
            (lambda: by_precision(0.0), "prior must be positive"),
            (lambda: by_precision(1.0, power=-1), "power must be a number >= 0"),
            (lambda: by_precision(1.0, least=2.0), r"least must be in \[0, 1\]"),
            (lambda: straight_through_sign(jnp.ones(1), 0.0), "window must be positive"),
        ):
            with pytest.raises(ValueError, match=message):
                make()

    def test_trees_that_do_not_fit(self):
        with pytest.raises(ValueError, match=r"strength= has the shape \(5,\)"):
            metaplastic({"kernel": jnp.ones(5), "bias": 1.0}).init(PARAMS)
        with pytest.raises(ValueError, match="matches no leaf"):
            metaplastic(1.0, select="dense").init(PARAMS)
        with pytest.raises(ValueError, match="matches no leaf"):
            by_precision(1.0, select="dense").init(PARAMS)
        with pytest.raises(TypeError, match="only floating leaves"):
            metaplastic(1.0, select="ids").init({"ids": jnp.arange(3)})

    def test_no_parameters_and_no_belief(self):
        with pytest.raises(ValueError, match=r"metaplastic\(\) needs the parameters"):
            metaplastic(1.0).update(PARAMS, optax.EmptyState())
        with pytest.raises(ValueError, match=r"by_precision\(\) needs the belief: wrap"):
            by_precision(1.0).update(PARAMS, optax.EmptyState(), PARAMS)
        with pytest.raises(TypeError, match=r"by_precision\(\) takes a belief such as"):
            by_precision(1.0).update(PARAMS, optax.EmptyState(), PARAMS, posterior=object())
