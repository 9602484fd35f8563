"""IVON is algorithm 1 of its paper, wherever it lies in a chain, and learns known variances."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptivenet import pruning, testing, trees
from adaptivenet.posterior.draws import noisy_value_and_grad, sample_parameters
from adaptivenet.posterior.gaussian import Posterior, find
from adaptivenet.posterior.ivon import IvonState, ivon, scale_by_ivon

PARAMS = {
    "a": {"kernel": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2), "bias": jnp.ones(2)},
    "ids": jnp.arange(3),
}
FLOATS = {"kernel": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2), "bias": jnp.ones(2)}


def loss(params):
    return sum(jnp.sum(jnp.cos(leaf) + leaf**2) for leaf in jax.tree.leaves(params))


def same(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), **tolerance)


class TestAlgorithm:
    """The published algorithm, line by line, in float64."""

    @pytest.mark.parametrize("rescale", [True, False])
    @pytest.mark.parametrize("radius", [float("inf"), 0.7])
    def test_step_by_step(self, rescale, radius):
        rng = np.random.default_rng(0)
        lr, ess, h0, b1, b2, delta = 0.3, 20.0, 0.7, 0.8, 0.6, 0.05
        m = rng.normal(size=(2, 3))
        h, g = np.full_like(m, h0), np.zeros_like(m)
        with jax.enable_x64(True):
            params = {"w": jnp.asarray(m)}
            options = {"hess_init": h0, "b1": b1, "b2": b2, "weight_decay": delta}
            tx = ivon(lr, ess, **options, clip_radius=radius, rescale=rescale)
            state = tx.init(params)
            for t in range(1, 8):
                sigma = 1.0 / np.sqrt(ess * (h + delta))
                noise = sigma * rng.normal(size=m.shape)
                gradient = np.sin(3.0 * (m + noise)) + m + noise
                h_hat = gradient * noise / sigma**2
                g = b1 * g + (1 - b1) * gradient
                h = b2 * h + (1 - b2) * h_hat + 0.5 * (1 - b2) ** 2 * (h - h_hat) ** 2 / (h + delta)
                step = np.clip((g / (1 - b1**t) + delta * m) / (h + delta), -radius, radius)
                m = m - lr * ((h0 + delta) if rescale else 1.0) * step

                grads = {"w": jnp.asarray(gradient)}
                told = {"noise": {"w": jnp.asarray(noise)}}
                if t % 2:
                    told = {"noisy_params": {"w": params["w"] + noise}}
                updates, state = tx.update(grads, state, params, **told)
                params = optax.apply_updates(params, updates)
                np.testing.assert_allclose(params["w"], m, rtol=1e-9)
                belief = find(state, params)
                np.testing.assert_allclose(belief.precision["w"], ess * (h + delta), rtol=1e-9)
                np.testing.assert_array_equal(belief.mean["w"], params["w"])

    @given(
        h=st.floats(-0.09, 1e3),
        product=st.floats(-1e3, 1e3),
        b2=st.sampled_from([0.0, 0.5, 0.9, 0.999]),
    )
    def test_no_gradient_makes_the_precision_less_than_half(self, h, product, b2):
        tx = scale_by_ivon(10.0, b2=b2, weight_decay=0.1)
        params = {"w": jnp.ones(1)}
        state = tx.init(params)._replace(hess={"w": jnp.full(1, h, jnp.float32)})
        before = state.posterior(params).precision["w"]
        told = {"noise_grads": {"w": jnp.full(1, product, jnp.float32)}}
        _, state = tx.update(params, state, params, **told)
        after = state.posterior(params).precision["w"]
        assert float(after[0]) >= 0.499 * float(before[0])
        assert np.isfinite(after).all()

    def test_what_is_told_may_be_told_in_three_ways(self):
        tx = ivon(0.1, 50.0, b2=0.9)
        state = tx.init(FLOATS)
        noisy, noise = sample_parameters(state, FLOATS)
        grads = jax.grad(loss)(noisy)
        products = jax.tree.map(jnp.multiply, noise, grads)
        results = [
            tx.update(grads, state, FLOATS, **told)
            for told in ({"noise": noise}, {"noisy_params": noisy}, {"noise_grads": products})
        ]
        same(results[0], results[2], rtol=1e-6)
        same(results[0], results[1], rtol=1e-3, atol=1e-4)


class TestKnownPosterior:
    def test_linear_regression(self):
        """The precisions are the diagonal of the true one, the mean is the true one."""
        rng = np.random.default_rng(1)
        n, noise = 200, 0.5
        inputs = rng.normal(size=(n, 4)) * np.array([0.3, 1.0, 2.0, 4.0])
        inputs[:, 1] += 0.5 * inputs[:, 2]  # correlated
        targets = inputs @ np.array([1.0, -1.0, 0.5, 0.0]) + noise * rng.normal(size=n)
        decay = 0.01
        true = inputs.T @ inputs / noise**2 + n * decay * np.eye(4)
        mean = np.linalg.solve(true, inputs.T @ targets / noise**2)
        x, y = jnp.asarray(inputs, jnp.float32), jnp.asarray(targets, jnp.float32)

        def nll(params):
            return jnp.mean(jnp.square(x @ params["w"] - y)) / (2 * noise**2)

        def run(seed):
            options = {"hess_init": 5.0, "b2": 0.998, "weight_decay": decay, "seed": seed}
            tx = ivon(optax.cosine_decay_schedule(0.02, 6000), n, **options)
            params = {"w": jnp.zeros(4)}

            def step(carry, _):
                params, state = carry
                _, grads, extra = noisy_value_and_grad(nll, state, params, samples=2)
                updates, state = tx.update(grads, state, params, **extra)
                carry = optax.apply_updates(params, updates), state
                return carry, find(state, params).precision["w"]

            (params, _), precisions = jax.lax.scan(step, (params, tx.init(params)), None, 6000)
            return params["w"], precisions[-1]

        with jax.numpy_dtype_promotion("standard"):  # as optax's schedules need
            found, precisions = jax.jit(jax.vmap(run))(jnp.arange(4))
        np.testing.assert_allclose(precisions, np.tile(np.diag(true), (4, 1)), rtol=0.1)
        sigma = 1 / np.sqrt(np.diag(true))
        assert np.all(np.abs(np.asarray(found) - mean) < 0.1 * sigma)


class TestDraws:
    def test_noise_has_the_spread_of_the_belief(self):
        params = {"w": jnp.full((200, 100), 0.5)}
        state = optax.chain(optax.clip(1.0), ivon(0.1, 25.0, weight_decay=1.0)).init(params)
        noisy, noise = sample_parameters(state, params, jax.random.key(3))
        np.testing.assert_allclose(noise["w"].std(), 1 / np.sqrt(25 * 2), rtol=0.02)
        np.testing.assert_allclose(noise["w"].mean(), 0.0, atol=0.005)
        np.testing.assert_array_equal(noisy["w"], params["w"] + noise["w"])

    def test_the_key_of_the_state_advances_with_updates_only(self):
        tx = ivon(0.1, 10.0)
        state = tx.init(FLOATS)
        first, again = sample_parameters(state, FLOATS)[1], sample_parameters(state, FLOATS)[1]
        same(first, again)
        _, grads, extra = noisy_value_and_grad(loss, state, FLOATS)
        _, state = tx.update(grads, state, FLOATS, **extra)
        other = sample_parameters(state, FLOATS)[1]
        assert not np.array_equal(first["bias"], other["bias"])
        assert not np.array_equal(first["bias"], first["kernel"][0])

    def test_the_draw_of_one_sample_is_that_of_sample(self):
        state = ivon(0.1, 10.0).init(FLOATS)
        noisy, noise = sample_parameters(state, FLOATS)
        value, grads, extra = noisy_value_and_grad(loss, state, FLOATS)
        expected, slopes = jax.value_and_grad(loss)(noisy)
        same((value, grads), (expected, slopes), rtol=1e-6)
        same(extra["noise_grads"], jax.tree.map(jnp.multiply, noise, slopes), rtol=1e-6)

    def test_the_average_over_samples(self):
        state = ivon(0.1, 10.0).init(FLOATS)
        key = jax.random.key(5)
        value, grads, extra = noisy_value_and_grad(loss, state, FLOATS, samples=3, key=key)
        rows = []
        for own in jax.random.split(key, 3):
            noisy, noise = sample_parameters(state, FLOATS, own)
            one, slopes = jax.value_and_grad(loss)(noisy)
            rows.append((one, slopes, jax.tree.map(jnp.multiply, noise, slopes)))
        expected = jax.tree.map(lambda *leaves: sum(leaves) / 3, *rows)
        same((value, grads, extra["noise_grads"]), expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("samples", [1, 3])
    def test_auxiliary_outputs_are_stacked(self, samples):
        state = ivon(0.1, 10.0).init(FLOATS)

        def both(params, scale):
            return scale * loss(params), {"bias": params["bias"]}

        (value, aux), grads, _ = noisy_value_and_grad(
            both, state, FLOATS, 2.0, samples=samples, has_aux=True
        )
        plain, slopes, _ = noisy_value_and_grad(
            lambda p: 2.0 * loss(p), state, FLOATS, samples=samples
        )
        assert aux["bias"].shape == (samples, 2)
        same((value, grads), (plain, slopes), rtol=1e-6)

    def test_half_precision(self):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), FLOATS)
        tx = ivon(0.1, 10.0)
        state = tx.init(params)
        noisy, noise = sample_parameters(state, params)
        assert noisy["bias"].dtype == jnp.bfloat16
        assert noise["bias"].dtype == jnp.float32
        for samples in (1, 2):
            _, grads, extra = noisy_value_and_grad(loss, state, params, samples=samples)
            assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("bfloat16")}
            updates, after = tx.update(grads, state, params, **extra)
            moved = optax.apply_updates(params, updates)
            assert {leaf.dtype for leaf in jax.tree.leaves(moved)} == {jnp.dtype("bfloat16")}
        kinds = {leaf.dtype for leaf in jax.tree.leaves((after[0].hess, after[0].momentum))}
        assert kinds == {jnp.dtype("float32")}
        assert find(after, params).mean["bias"].dtype == jnp.float32

    def test_leaves_that_are_not_floating_stay(self):
        tx = scale_by_ivon(10.0)
        state = tx.init(PARAMS)
        noisy, noise = sample_parameters(state, PARAMS)
        np.testing.assert_array_equal(noisy["ids"], PARAMS["ids"])
        assert trees.is_masked(noise["ids"])
        grads = {**PARAMS, "ids": np.zeros(3, jax.dtypes.float0)}
        updates, state = tx.update(grads, state, PARAMS, noise=noise)
        assert updates["ids"].dtype == jax.dtypes.float0
        belief = find(state, PARAMS)
        assert trees.is_masked(belief.precision["ids"])
        assert trees.is_masked(belief.mean["ids"])


class TestWrappers:
    """The package ivon-optax breaks in the first of these."""

    def train(self, tx, steps=4, init=None):
        params = FLOATS if init is None else init
        state = tx.init(params)
        for _ in range(steps):
            _, grads, extra = noisy_value_and_grad(loss, state, params)
            updates, state = tx.update(grads, state, params, **extra)
            params = optax.apply_updates(params, updates)
        return params, state

    def test_anywhere_in_a_chain(self):
        plain = self.train(ivon(0.1, 10.0))[0]
        for tx in (
            optax.chain(optax.identity(), optax.chain(ivon(0.1, 10.0), optax.identity())),
            optax.chain(scale_by_ivon(10.0), optax.scale(-1.0), optax.scale(0.1)),
            optax.apply_if_finite(ivon(0.1, 10.0), 3),
            optax.inject_hyperparams(ivon)(0.1, 10.0),
            optax.inject_hyperparams(ivon)(lambda step: 0.1, ess=10.0),
        ):
            same(self.train(tx)[0], plain, rtol=1e-5)

    def test_a_chain_that_changes_the_gradient_leaves_the_curvature(self):
        direct = self.train(ivon(0.1, 10.0), steps=1)[1]
        clipped = self.train(optax.chain(optax.clip(1e-3), ivon(0.1, 10.0)), steps=1)[1]
        same(find(direct, FLOATS).precision, find(clipped, FLOATS).precision)

    def test_strengths_that_are_injected_are_those_of_the_posterior(self):
        tx = optax.inject_hyperparams(ivon)(0.1, ess=10.0, weight_decay=0.5)
        params, state = self.train(tx)
        state.hyperparams["ess"] = jnp.float32(20.0)
        _, grads, extra = noisy_value_and_grad(loss, state, params)
        _, state = tx.update(grads, state, params, **extra)
        belief = find(state, params)
        inner = optax.tree_utils.tree_get(state, "hess")
        same(belief.precision, jax.tree.map(lambda h: 20.0 * (h + 0.5), inner), rtol=1e-6)

    def test_masked(self):
        tx = optax.masked(ivon(0.1, 10.0), {"kernel": True, "bias": False})
        state = tx.init(FLOATS)
        noisy, noise = sample_parameters(state, FLOATS)
        np.testing.assert_array_equal(noisy["bias"], FLOATS["bias"])
        assert trees.is_masked(noise["bias"])
        params, state = self.train(tx)
        alone, _ = self.train(ivon(0.1, 10.0), init={"kernel": FLOATS["kernel"]})
        np.testing.assert_allclose(params["kernel"], alone["kernel"], rtol=1e-6)
        assert trees.is_masked(find(state, params).precision["bias"])

    def test_masked_above_a_subtree(self):
        params = {"a": dict(FLOATS), "b": dict(FLOATS)}
        tx = optax.masked(ivon(0.1, 10.0), {"a": True, "b": False})
        state = tx.init(params)
        noisy, noise = sample_parameters(state, params)
        same(noisy["b"], params["b"])
        assert trees.size(noise) == trees.size(FLOATS)
        _, grads, extra = noisy_value_and_grad(loss, state, params, samples=2)
        updates, _ = tx.update(grads, state, params, **extra)
        same(updates["b"], grads["b"])

    def test_two_groups_draw_each_its_own(self):
        transforms = {"wide": ivon(0.1, 1.0), "narrow": ivon(0.1, 1e6)}
        tx = optax.partition(transforms, {"kernel": "wide", "bias": "narrow"})
        params = {"kernel": jnp.ones((30, 30)), "bias": jnp.ones(900)}
        _, noise = sample_parameters(tx.init(params), params)
        assert 0.9 < float(noise["kernel"].std()) < 1.1
        assert 0.0009 < float(noise["bias"].std()) < 0.0011
        self.train(tx, init=params)

    def test_micro_batches(self):
        """All of an update have one draw, and give the update of the whole batch."""
        data = jnp.linspace(0.5, 2.0, 4)

        def fit(params, x):
            return jnp.mean(x) * loss(params)

        steps = optax.MultiSteps(ivon(0.1, 10.0), every_k_schedule=2)
        params, state = FLOATS, steps.init(FLOATS)
        with jax.numpy_dtype_promotion("standard"):  # MultiSteps divides by its counter
            for part in (data[:2], data[2:]):
                noisy, noise = sample_parameters(state, FLOATS)
                grads = jax.grad(fit)(noisy, part)
                updates, state = steps.update(grads, state, params, noise=noise)
                params = optax.apply_updates(params, updates)
        whole = ivon(0.1, 10.0)
        start = whole.init(FLOATS)
        noisy, noise = sample_parameters(start, FLOATS)
        updates, after = whole.update(jax.grad(fit)(noisy, data), start, FLOATS, noise=noise)
        same(params, optax.apply_updates(FLOATS, updates), rtol=1e-5)
        same(find(state, params).precision, find(after, params).precision, rtol=1e-5)

    def test_before_a_pruner(self):
        tx = optax.chain(ivon(0.1, 10.0), pruning.prune(0.5))
        params, state = self.train(tx)
        assert int(jnp.sum(params["kernel"] == 0)) == 3
        testing.check_landing(params, state)

    def test_nnx(self):
        from flax import nnx

        model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        graph = nnx.graphdef(model)
        optimizer = nnx.Optimizer(model, ivon(0.1, 10.0), wrt=nnx.Param)
        before = model.kernel[...]

        def squares(params):
            return jnp.sum(jnp.square(nnx.merge(graph, params)(jnp.ones((1, 3)))))

        params = nnx.state(model, nnx.Param)
        _, grads, extra = noisy_value_and_grad(squares, nnx.as_pure(optimizer.opt_state), params)
        optimizer.update(model, grads, **extra)
        assert not np.array_equal(before, model.kernel[...])
        belief = find(nnx.as_pure(optimizer.opt_state), nnx.as_pure(nnx.state(model, nnx.Param)))
        assert trees.paths(belief.precision) == ("bias", "kernel")


def test_members_of_a_population_draw_different_numbers():
    def draw(shift):
        params = jax.tree.map(lambda leaf: leaf + shift, FLOATS)
        return sample_parameters(ivon(0.1, 10.0).init(params), params)[1]["kernel"]

    first, second = jax.vmap(draw)(jnp.array([0.0, 1.0]))
    assert not np.array_equal(first, second)


class TestErrors:
    def test_numbers_out_of_range(self):
        for options, name in (
            ({"ess": 0.0}, "ess must be positive"),
            ({"ess": -1}, "ess must be positive"),
            ({"ess": 1, "hess_init": 0.0}, "hess_init must be positive"),
            ({"ess": 1, "weight_decay": 0.0}, "weight_decay must be positive"),
            ({"ess": 1, "clip_radius": 0.0}, "clip_radius must be positive"),
            ({"ess": 1, "b1": 1.0}, r"b1 must be in \[0, 1\)"),
            ({"ess": 1, "b2": -0.1}, r"b2 must be in \[0, 1\)"),
        ):
            with pytest.raises(ValueError, match=name):
                scale_by_ivon(**options)

    def test_an_update_that_is_not_told_what_was_drawn(self):
        tx = ivon(0.1, 10.0)
        state = tx.init(FLOATS)
        with pytest.raises(
            ValueError, match=r"needs exactly one of .* not none: take the gradient"
        ):
            tx.update(FLOATS, state, FLOATS)
        with pytest.raises(ValueError, match="not noise and noise_grads"):
            tx.update(FLOATS, state, FLOATS, noise=FLOATS, noise_grads=FLOATS)
        with pytest.raises(ValueError, match="needs the parameters"):
            tx.update(FLOATS, state, noise=FLOATS)

    def test_noise_of_other_parameters(self):
        tx = ivon(0.1, 10.0)
        state = tx.init(FLOATS)
        wrong = {**FLOATS, "kernel": jnp.ones((2, 2))}
        with pytest.raises(ValueError, match=r"noise= has shape \(2, 2\) for leaf 'kernel'"):
            tx.update(FLOATS, state, FLOATS, noise=wrong)
        wrong = {**FLOATS, "bias": optax.MaskedNode()}
        with pytest.raises(ValueError, match="noise_grads= has nothing for leaf 'bias'"):
            tx.update(FLOATS, state, FLOATS, noise_grads=wrong)
        with pytest.raises(ValueError, match="belongs to another tree"):
            tx.update(FLOATS, state, FLOATS, noise={"kernel": FLOATS["kernel"]})

    def test_nothing_to_draw_from(self):
        with pytest.raises(ValueError, match="holds no belief to draw from"):
            sample_parameters(optax.adam(0.1).init(FLOATS), FLOATS)
        with pytest.raises(ValueError, match="samples must be at least 1"):
            noisy_value_and_grad(loss, ivon(0.1, 10.0).init(FLOATS), FLOATS, samples=0)


def test_the_state_is_a_named_tuple_with_a_posterior():
    state = scale_by_ivon(10.0, hess_init=0.5, weight_decay=0.25).init(FLOATS)
    assert isinstance(state, IvonState)
    belief = state.posterior(FLOATS)
    assert isinstance(belief, Posterior)
    np.testing.assert_allclose(belief.precision["bias"], [7.5, 7.5])
