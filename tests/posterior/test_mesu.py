"""MESU is its published rule; without a window it is FOO-VB; it forgets as its prior says."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptivenet import trees
from adaptivenet.posterior.draws import noisy_value_and_grad, sample_parameters
from adaptivenet.posterior.gaussian import find
from adaptivenet.posterior.mesu import bgd, mesu

INF = float("inf")
PARAMS = {"kernel": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2), "bias": jnp.ones(2)}


def published(mu, sigma, g, d, n, mu_p, sigma_p, clip=INF):
    g, d = (np.clip(x, -clip / sigma, clip / sigma) for x in (g, d))
    move = -(sigma**2) * g + sigma**2 / (n * sigma_p**2) * (mu_p - mu)
    change = -(sigma**2) / 2 * d + sigma / (2 * n * sigma_p**2) * (sigma_p**2 - sigma**2)
    return move, change


def foo_vb(mu, sigma, g, d):
    root = np.sqrt(1 + 0.25 * sigma**2 * d**2)
    return -(sigma**2) * g, sigma * root - 0.5 * sigma**2 * d - sigma


class TestRule:
    """Against a slow version in numpy, in float64."""

    def run(self, make, reference, steps=6):
        rng = np.random.default_rng(0)
        mu, sigma = rng.normal(size=(2, 3)), np.full((2, 3), 0.2)
        with jax.enable_x64(True):
            tx, params = make(), {"w": jnp.asarray(mu)}
            state = tx.init(params)
            for _ in range(steps):
                epsilon, g = rng.normal(size=(2, *mu.shape))
                move, change = reference(mu, sigma, g, g * epsilon)
                told = {"noise": {"w": jnp.asarray(epsilon * sigma)}}
                updates, state = tx.update({"w": jnp.asarray(g)}, state, params, **told)
                params = optax.apply_updates(params, updates)
                mu, sigma = mu + move, sigma + change
                assert np.all(sigma > 0.02)
                np.testing.assert_allclose(params["w"], mu, rtol=1e-10)
                belief = find((state,), params)
                np.testing.assert_allclose(belief.precision["w"], sigma**-2, rtol=1e-10)
                np.testing.assert_array_equal(belief.mean["w"], params["w"])

    @pytest.mark.parametrize("window", [30, 1e15, INF])
    def test_published(self, window):
        def reference(mu, sigma, g, d):
            return published(mu, sigma, g, d, window, 0.3, 0.5)

        self.run(lambda: mesu(window, init_scale=0.2, prior_scale=0.5, prior_mean=0.3), reference)

    def test_rates_clipping_and_batches(self):
        def reference(mu, sigma, g, d):
            move, change = published(mu, sigma, 5 * g, 5 * d, 30, 0.0, 0.5, clip=0.4)
            return 0.7 * move, 0.3 * change

        options = {"mean_rate": 0.7, "scale_rate": 0.3, "clip": 0.4, "batch_size": 5}
        self.run(lambda: mesu(30, init_scale=0.2, prior_scale=0.5, **options), reference)

    def test_without_a_window_it_is_foo_vb(self):
        self.run(lambda: bgd(0.2), foo_vb)
        self.run(lambda: mesu(INF, init_scale=0.2, form="fixed_point"), foo_vb)
        self.run(lambda: mesu(1e15, init_scale=0.2, form="fixed_point"), foo_vb)

    def test_the_published_form_is_foo_vb_to_first_order(self):
        """Halving the slope makes the difference of the standard deviations a quarter."""
        gaps = []
        for slope in (0.4, 0.2, 0.1):
            mu, sigma, g = np.zeros(1), np.full(1, 0.5), np.full(1, 1.0)
            first = published(mu, sigma, g, slope, INF, 0.0, 1.0)
            exact = foo_vb(mu, sigma, g, slope)
            np.testing.assert_allclose(first[0], exact[0])
            got = []
            with jax.enable_x64(True):
                params = {"w": jnp.asarray(mu)}
                for form in ("published", "fixed_point"):
                    tx = mesu(INF, init_scale=0.5, form=form)
                    told = {"noise_grads": {"w": jnp.asarray(np.full(1, slope * 0.5))}}
                    _, state = tx.update({"w": jnp.asarray(g)}, tx.init(params), params, **told)
                    got.append(float(state.scale["w"][0]))
            np.testing.assert_allclose(got, [0.5 + first[1][0], 0.5 + exact[1][0]], rtol=1e-12)
            gaps.append(got[1] - got[0])
        assert 3.9 < gaps[0] / gaps[1] < 4.1
        assert 3.9 < gaps[1] / gaps[2] < 4.1

    @given(slope=st.floats(-1e4, 1e4), form=st.sampled_from(["published", "fixed_point"]))
    def test_standard_deviations_stay_positive(self, slope, form):
        params = {"w": jnp.zeros(1)}
        tx = mesu(100.0, init_scale=0.5, form=form)
        told = {"noise_grads": {"w": jnp.full(1, slope, jnp.float32)}}
        _, state = tx.update(params, tx.init(params), params, **told)
        scale = float(state.scale["w"][0])
        assert np.isfinite(scale)
        assert scale > 0
        if form == "fixed_point":
            v = 1 / (0.99 / 0.25 + 0.01)
            d = float(np.float32(slope)) / 0.5
            # The positive root of s^2 + v d s - v = 0, in float64 and without cancellation.
            half = 0.5 * v * d
            root = np.sqrt(half**2 + v)
            expected = v / (root + half) if half > 0 else root - half
            np.testing.assert_allclose(scale, expected, rtol=1e-5)


class TestForgetting:
    def still(self, tx, params, steps, products=None):
        """Steps whose gradients are zero, but for what they tell of the curvature."""
        grads = jax.tree.map(jnp.zeros_like, params)

        def step(carry, _):
            params, state = carry
            told = grads if products is None else products(state)
            updates, state = tx.update(grads, state, params, noise_grads=told)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, steps)[0]

    def test_the_fixed_point_is_a_product_of_gaussians(self):
        """Without data the belief is belief^(1 - 1/N) prior^(1/N), exactly."""
        n, sigma_p, mu_p = 4.0, 0.5, 2.0
        tx = mesu(n, init_scale=0.1, prior_scale=sigma_p, prior_mean=mu_p, form="fixed_point")
        params, state = self.still(tx, {"w": jnp.array([1.0])}, 3)
        precision, mean = 100.0, 1.0
        for _ in range(3):
            new = (1 - 1 / n) * precision + (1 / n) / sigma_p**2
            mean = ((1 - 1 / n) * precision * mean + (1 / n) / sigma_p**2 * mu_p) / new
            precision = new
        belief = find(state, params)
        np.testing.assert_allclose(belief.precision["w"], precision, rtol=1e-5)
        np.testing.assert_allclose(belief.mean["w"], mean, rtol=1e-5)

    @pytest.mark.parametrize("form", ["published", "fixed_point"])
    def test_what_remains_is_the_prior_and_a_window_of_curvature(self, form):
        """1 / sigma^2 tends to 1 / sigma_p^2 + N h."""
        n, curvature, sigma_p = 50.0, 0.3, 0.5
        tx = mesu(n, init_scale=0.2, prior_scale=sigma_p, form=form)

        def products(state):  # the mean of noise times gradient, for a quadratic loss
            return jax.tree.map(lambda s: curvature * s**2, state.scale)

        params, state = self.still(tx, {"w": jnp.zeros(1)}, 1500, products)
        expected = 1 / sigma_p**2 + n * curvature
        tolerance = 1e-4 if form == "published" else 0.02
        found = find(state, params).precision["w"]
        np.testing.assert_allclose(found, expected, rtol=tolerance)

    def test_an_infinite_window_forgets_nothing(self):
        params, state = self.still(mesu(INF, init_scale=0.1), {"w": jnp.array([3.0])}, 50)
        np.testing.assert_allclose(find(state, params).precision["w"], 100.0, rtol=1e-6)
        assert params["w"].item() == 3.0


@pytest.mark.parametrize("form", ["published", "fixed_point"])
def test_a_stream_of_observations_is_learnt_as_bayes_would(form):
    """Conjugate: 300 observations each of 200 numbers, one after the other."""
    rng = np.random.default_rng(2)
    n, noise, prior = 300, 3.0, 1.0
    truth = rng.normal(size=200)
    data = jnp.asarray(truth + noise * rng.normal(size=(n, 200)), jnp.float32)
    tx = mesu(INF, init_scale=prior, form=form)
    params = {"w": jnp.zeros(200)}

    def step(carry, row):
        params, state = carry

        def nll(params):
            return jnp.sum(jnp.square(params["w"] - row)) / (2 * noise**2)

        _, grads, extra = noisy_value_and_grad(nll, state, params, samples=16)
        updates, state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), None

    params, state = jax.jit(lambda start: jax.lax.scan(step, start, data)[0])(
        (params, tx.init(params))
    )
    precision = 1 / prior**2 + n / noise**2
    mean = np.asarray(data).sum(0) / noise**2 / precision
    belief = find(state, params)
    np.testing.assert_allclose(np.mean(belief.precision["w"]), precision, rtol=0.1)
    gap = (np.asarray(belief.mean["w"]) - mean) * np.sqrt(precision)
    assert np.sqrt(np.mean(gap**2)) < 0.5


def test_priors_by_leaf():
    prior = {"kernel": 0.5, "bias": jnp.array([1.0, 2.0])}
    start = {"kernel": jnp.full((3, 2), 0.1), "bias": 0.3}
    tx = mesu(10, init_scale=start, prior_scale=prior, prior_mean={"kernel": 0.0, "bias": 1.5})
    state = tx.init(PARAMS)
    np.testing.assert_allclose(state.scale["bias"], [0.3, 0.3])
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zeros, state, PARAMS, noise=zeros)
    np.testing.assert_allclose(updates["bias"], 0.09 / (10 * np.array([1.0, 4.0])) * 0.5, rtol=1e-5)
    np.testing.assert_allclose(updates["kernel"], -0.01 / 2.5 * PARAMS["kernel"], rtol=1e-5)


def test_half_precision_and_leaves_that_are_not_floating():
    params = {"w": jnp.ones(3, jnp.bfloat16), "ids": jnp.arange(2)}
    tx = mesu(10, init_scale=0.1)
    state = tx.init(params)
    noisy, noise = sample_parameters(state, params)
    assert noisy["w"].dtype == jnp.bfloat16
    grads = {"w": noisy["w"], "ids": np.zeros(2, jax.dtypes.float0)}
    updates, state = tx.update(grads, state, params, noise=noise)
    assert updates["w"].dtype == jnp.bfloat16
    assert state.scale["w"].dtype == jnp.float32
    assert trees.is_masked(find(state, params).precision["ids"])


class TestErrors:
    def test_numbers_out_of_range(self):
        for options, message in (
            ({"window": 0.5}, "window must be at least 1, not 0.5"),
            ({"window": 5, "init_scale": 0.0}, "init_scale must be positive"),
            (
                {"window": 5, "init_scale": 1.0, "prior_scale": {"w": -1.0}},
                "prior_scale must be positive",
            ),
            ({"window": 5, "mean_rate": 0}, "mean_rate must be positive"),
            ({"window": 5, "scale_rate": 0}, "scale_rate must be positive"),
            ({"window": 5, "clip": 0}, "clip must be positive"),
            ({"window": 5, "batch_size": 0}, "batch_size must be positive"),
            ({"window": 5, "form": "exact"}, 'form must be "published" or "fixed_point"'),
        ):
            with pytest.raises(ValueError, match=message):
                mesu(**options)

    def test_trees_that_do_not_fit(self):
        with pytest.raises(ValueError, match=r"prior_scale= has the shape \(3,\) where"):
            mesu(5, prior_scale={"kernel": 1.0, "bias": jnp.ones(3)}).init(PARAMS)
        with pytest.raises(ValueError, match="belongs to another tree"):
            mesu(5, prior_mean={"kernel": 0.0}).init(PARAMS)

    def test_nothing_told(self):
        tx = mesu(5)
        with pytest.raises(ValueError, match=r"mesu\(\) needs exactly one of noise="):
            tx.update(PARAMS, tx.init(PARAMS), PARAMS)
        with pytest.raises(ValueError, match=r"mesu\(\) needs the parameters"):
            tx.update(PARAMS, tx.init(PARAMS), noise=PARAMS)
