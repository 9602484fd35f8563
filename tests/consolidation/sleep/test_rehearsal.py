"""Losses are their equations; the projection is the nearest gradient that does no harm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptivenet import testing
from adaptivenet.consolidation.sleep import buffer, rehearsal
from adaptivenet.consolidation.sleep.buffer import Drawn
from adaptivenet.consolidation.sleep.rehearsal import Remembered
from tests.cells import every_cell

rng = np.random.default_rng(0)
W = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)


def apply(params, inputs):
    return inputs @ params


def remembered(number, seed=1):
    rng = np.random.default_rng(seed)
    return Remembered(
        jnp.asarray(rng.normal(size=(number, 3)), jnp.float32),
        jnp.asarray(rng.integers(4, size=number)),
        jnp.asarray(rng.normal(size=(number, 4)), jnp.float32),
    )


def slow_cross_entropy(logits, labels):
    logits = np.asarray(logits, np.float64)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return -np.log(p[np.arange(len(p)), np.asarray(labels)])


class TestLosses:
    def test_cross_entropy(self):
        items = remembered(5)
        logits = apply(W, items.inputs)
        values = slow_cross_entropy(logits, items.labels)
        found = rehearsal.cross_entropy(logits, items.labels)
        np.testing.assert_allclose(found, values.mean(), rtol=1e-5)
        soft = jax.nn.one_hot(items.labels, 4)
        np.testing.assert_allclose(rehearsal.cross_entropy(logits, soft), found, rtol=1e-5)
        weights = jnp.array([1.0, 0.0, 2.0, 0.0, 0.5])
        found = rehearsal.cross_entropy(logits, items.labels, weights)
        np.testing.assert_allclose(found, np.average(values, weights=weights), rtol=1e-5)
        with pytest.raises(ValueError, match="weights= has the shape"):
            rehearsal.cross_entropy(logits, items.labels, jnp.ones(4))

    @pytest.mark.parametrize("beta", [0.0, 0.7])
    @pytest.mark.parametrize("twice", [False, True])
    def test_dark_experience(self, beta, twice):
        first, second = remembered(4), remembered(6, seed=2)
        where = jnp.array([True, True, False, True])
        again = Drawn(second, jnp.ones(6, bool)) if twice else None
        found = rehearsal.der_loss(apply, W, Drawn(first, where), alpha=0.3, beta=beta, again=again)
        keep = np.asarray(where)
        gaps = np.asarray(apply(W, first.inputs), np.float64) - np.asarray(first.logits)
        expected = 0.3 * np.mean(gaps[keep] ** 2)
        other, rows = (second, np.ones(6, bool)) if twice else (first, keep)
        values = slow_cross_entropy(apply(W, other.inputs), other.labels)
        np.testing.assert_allclose(found, expected + beta * values[rows].mean(), rtol=1e-5)

    def test_stored_logits_are_constants(self):
        items = remembered(4)

        def loss(params, logits):
            drawn = Drawn(items._replace(logits=logits), jnp.ones(4, bool))
            dark = rehearsal.der_loss(apply, params, drawn, alpha=1.0)
            return dark + rehearsal.distillation(apply(params, items.inputs), logits)

        into_params, into_logits = jax.grad(loss, (0, 1))(W, items.logits)
        assert not into_logits.any()
        assert into_params.any()

    def test_an_empty_memory_asks_for_nothing(self):
        """Neither values nor gradients."""
        memory = buffer.init(jax.tree.map(lambda x: x[0], remembered(1)), 5)
        none = buffer.draw(memory, jax.random.key(0), 3)

        def loss(params):
            logits = apply(params, none.items.inputs)
            total = rehearsal.der_loss(apply, params, none, alpha=1.0, beta=1.0)
            return total + rehearsal.distillation(logits, logits, weights=none.where)

        value, grads = jax.value_and_grad(loss)(W)
        assert value == 0
        np.testing.assert_array_equal(grads, 0)

    def test_distillation(self):
        logits, targets = remembered(5).logits, remembered(5, seed=3).logits
        for heat in (1.0, 2.0, 5.0):
            soft = np.exp(np.asarray(targets, np.float64) / heat)
            soft /= soft.sum(1, keepdims=True)
            log = np.asarray(jax.nn.log_softmax(logits / heat), np.float64)
            found = rehearsal.distillation(logits, targets, temperature=heat)
            expected = heat**2 * np.mean((soft * (np.log(soft) - log)).sum(1))
            np.testing.assert_allclose(found, expected, rtol=1e-5)
        # The square keeps the gradient's size: for large T it is (logits - targets) / classes,
        # of centred logits.
        grads = jax.grad(rehearsal.distillation)(logits, targets, temperature=300.0) * 5
        gap = logits - targets
        np.testing.assert_allclose(grads, (gap - gap.mean(1, keepdims=True)) / 4, atol=0.01)
        with pytest.raises(ValueError, match="temperature"):
            rehearsal.distillation(logits, targets, temperature=0.0)

    def test_mix_is_one_batch(self):
        new, old = remembered(6), remembered(3, seed=2)
        drawn = Drawn(old, jnp.array([True, False, True]))

        def loss(params, share):
            both, weights = rehearsal.mix(new, drawn, share=share)
            return rehearsal.cross_entropy(apply(params, both.inputs), both.labels, weights)

        a = slow_cross_entropy(apply(W, new.inputs), new.labels)
        b = slow_cross_entropy(apply(W, old.inputs), old.labels)[[0, 2]]
        np.testing.assert_allclose(loss(W, None), np.concatenate([a, b]).mean(), rtol=1e-5)
        np.testing.assert_allclose(loss(W, 0.25), 0.75 * a.mean() + 0.25 * b.mean(), rtol=1e-5)
        none = Drawn(old, jnp.zeros(3, bool))
        _, weights = rehearsal.mix(new, none, share=0.25)
        np.testing.assert_allclose(weights, [1 / 6] * 6 + [0] * 3, rtol=1e-6)
        with pytest.raises(ValueError, match="give both the same structure"):
            rehearsal.mix(new.inputs, drawn)
        with pytest.raises(ValueError, match=r"share must be in \[0, 1\)"):
            rehearsal.mix(new, drawn, share=1.0)


trees_of = st.integers(0, 2**31 - 1).map(
    lambda seed: [
        {"a": np.float32(r.normal(size=(2, 3))), "b": [np.float32(r.normal(size=4))]}
        for r in [np.random.default_rng(seed)]
        for _ in range(2)
    ]
)


def flat(tree):
    return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)])


class TestProjection:
    @given(pair=trees_of)
    def test_it_is_the_nearest_that_does_no_harm(self, pair):
        grads, reference = pair
        found = flat(rehearsal.project(grads, reference))
        g, r = flat(grads), flat(reference)
        assert found @ r >= -1e-5
        if g @ r >= 0:
            np.testing.assert_array_equal(found, g)
        else:
            np.testing.assert_allclose(found, g - (g @ r) / (r @ r) * r, atol=1e-5)
            # What was taken away is along r, and the constraint is tight: the nearest point.
            np.testing.assert_allclose(found @ r, 0, atol=1e-5)

    def test_leaves_that_are_not_floating_and_references_of_zeros(self):
        grads = {"w": jnp.array([1.0, -1.0]), "ids": np.zeros(2, jax.dtypes.float0)}
        zeros = {"w": jnp.zeros(2), "ids": grads["ids"]}
        found = rehearsal.project(grads, zeros)
        assert found["w"].tolist() == [1.0, -1.0]
        assert found["ids"] is grads["ids"]
        half = {"w": jnp.array([1.0, -1.0], jnp.bfloat16)}
        assert rehearsal.project(half, {"w": jnp.array([0.0, 3.0])})["w"].tolist() == [1.0, 0.0]
        assert rehearsal.project(half, half)["w"].dtype == jnp.bfloat16

    def test_errors(self):
        with pytest.raises(ValueError, match="the leaves a, but the gradient has w"):
            rehearsal.project({"w": jnp.ones(2)}, {"a": jnp.ones(2)})
        with pytest.raises(ValueError, match="reference gradient of leaf 'w' has the shape"):
            rehearsal.project({"w": jnp.ones(2)}, {"w": jnp.ones(3)})
        tx = rehearsal.agem()
        with pytest.raises(ValueError, match=r"agem\(\) needs the gradient of the loss of rem"):
            tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}))

    @pytest.mark.parametrize("protect", [True, False])
    def test_steps_do_not_climb_what_is_remembered(self, protect):
        """Two regressions that ask for opposite weights on one of the inputs."""
        old_x, new_x = rng.normal(size=(2, 40, 3)).astype(np.float32)
        old_y, new_y = old_x @ [1.0, 1.0, 0.0], new_x @ [-1.0, 0.0, 1.0]

        def mse(w, x, y):
            return jnp.mean((x @ w - y.astype(np.float32)) ** 2)

        memory = buffer.init((jnp.zeros(3), jnp.float32(0)), 40)
        memory = buffer.add(memory, (jnp.asarray(old_x), jnp.asarray(old_y, jnp.float32)))
        tx = optax.chain(rehearsal.agem(), optax.sgd(0.01))
        start = jnp.array([1.0, 1.0, 0.0])

        def step(carry, _):
            w, state = carry
            grads = jax.grad(mse)(w, new_x, new_y)
            reference = jax.grad(mse)(w, *memory.items) * float(protect)
            updates, state = tx.update(grads, state, w, reference_grads=reference)
            return (optax.apply_updates(w, updates), state), mse(w, old_x, old_y)

        (w, state), losses = jax.lax.scan(step, (start, tx.init(start)), None, 200)
        assert mse(w, new_x, new_y) < mse(start, new_x, new_y)
        if protect:
            assert losses.max() < 0.02
            assert 0 < int(state[0].conflicts) <= int(state[0].steps) == 200
        else:
            assert losses.max() > 1.0
            assert int(state[0].conflicts) == 0


def told(strength):
    """A chain that is told a reference gradient, as a training loop would."""
    chain = optax.chain(rehearsal.agem(), optax.sgd(0.1, momentum=0.5))

    def update(updates, state, params=None, **extra):
        reference = jax.tree.map(lambda p: strength * jnp.sin(7 * p), params)
        return chain.update(updates, state, params, reference_grads=reference)

    return optax.GradientTransformationExtraArgs(chain.init, update)


@every_cell
def test_contract(subject, mode):
    testing.check(told, subject=subject, mode=mode)


def test_checkpoints():
    testing.check_resume(told)
