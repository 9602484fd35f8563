"""Sparse variational dropout against the integrals that it approximates."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, special

from adaptivenet.posterior import gaussian, sparse_vd
from adaptivenet.posterior.sparse_vd import SparseVD

# E log |N(0, 1)|: the divergence is E log |1 + sqrt(alpha) n| - log(alpha) / 2 less this.
_LIMIT = -0.5 * (np.euler_gamma + np.log(2))


def by_quadrature(log_alpha):
    """The divergence in float64, with the integrand's singularity as a breakpoint."""
    deviation = np.exp(0.5 * log_alpha)

    def integrand(n):
        return np.exp(-0.5 * n * n) / np.sqrt(2 * np.pi) * np.log(np.abs(1 + deviation * n))

    ends = sorted({-40.0, 40.0, *([-1 / deviation] if 1 / deviation < 40 else [])})
    pieces = [
        integrate.quad(integrand, a, b, limit=500, points=[p for p in (-6, 0, 6) if a < p < b])[0]
        for a, b in itertools.pairwise(ends)
    ]
    return sum(pieces) - 0.5 * log_alpha - _LIMIT


def by_series(log_alpha):
    """The same by the mean log of a non-central chi-square: a Poisson mixture of digammas."""
    rate = 0.5 * np.exp(-log_alpha)
    k = np.arange(5_000)
    logs = -rate + k * np.log(rate) - special.gammaln(k + 1)
    return 0.5 * (np.log(2) + np.exp(logs) @ special.digamma(k + 0.5)) - _LIMIT


def single(log_alpha):
    shape = np.shape(log_alpha)
    return SparseVD({"w": jnp.ones(shape)}, {"w": jnp.asarray(log_alpha, jnp.float32)})


def test_the_divergence_is_within_its_published_accuracy_of_the_integral():
    grid = np.linspace(-6.5, 9, 125)
    exact = np.array([by_series(x) for x in grid])
    checked = [by_quadrature(x) for x in grid[::12]]
    np.testing.assert_allclose(checked, exact[::12], atol=2e-6)
    got = np.array([sparse_vd.kl(single(x)).item() for x in grid])
    # The paper's accuracy is that of the fit before its constant k1 makes pure noise free.
    fit, integral = 0.63576 - got, -_LIMIT - exact
    assert 1e-3 < np.max(np.abs(fit - integral)) < 0.009
    assert np.max(np.abs(got - exact)) < 0.01


def test_its_gradient_follows_the_integral():
    grid = np.linspace(-5, 8, 27)
    step = 1e-4
    exact = [(by_series(x + step) - by_series(x - step)) / (2 * step) for x in grid]
    got = jax.grad(lambda x: sparse_vd.kl(SparseVD({"w": jnp.ones(27)}, {"w": x})))(
        jnp.asarray(grid, jnp.float32)
    )
    np.testing.assert_allclose(got, exact, atol=0.015)


@jax.jit
def _value(pair):
    return sparse_vd.kl(SparseVD({"w": pair[:1]}, {"w": pair[1:]}))


_slopes = jax.jit(jax.grad(_value))


@given(theta=st.floats(-4, 4), log_variance=st.floats(-8, 4))
def test_gradients_by_both_parameters_are_those_of_finite_differences(theta, log_variance):
    with jax.enable_x64(True):
        pair = np.array([theta, log_variance])
        got = _slopes(pair)
        step = 1e-6 * (1 + abs(theta))
        for shift, slope in zip(step * np.eye(2), got, strict=True):
            by_hand = (_value(pair + shift) - _value(pair - shift)) / (2 * step)
            assert slope.item() == pytest.approx(by_hand.item(), rel=1e-3, abs=1e-4)


def test_pure_noise_is_free_and_flat():
    theta = jnp.array([0.0, 1e-30, -1e-22, 1e-15], jnp.float32)
    state = SparseVD({"w": theta}, {"w": jnp.zeros(4)})
    assert sparse_vd.kl(state).item() == pytest.approx(0, abs=1e-6)
    slopes = jax.grad(sparse_vd.kl)(state)
    np.testing.assert_allclose(slopes.theta["w"], 0, atol=1e-10)
    np.testing.assert_allclose(slopes.log_variance["w"], 0, atol=1e-10)
    assert np.all(np.isfinite(sparse_vd.log_alpha(state)["w"]))


def test_the_divergence_falls_with_alpha():
    values = [sparse_vd.kl(single(x)).item() for x in np.linspace(-20, 12, 60)]
    assert np.all(np.diff(values) < 0)
    assert min(values) >= 0


def test_local_reparametrisation_has_the_moments_of_sampled_weights():
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (3, 5))
    theta = jax.random.normal(keys[1], (5, 2))
    log_variance = jnp.linspace(-4, 0, 10).reshape(5, 2)
    draw = jax.vmap(lambda key: sparse_vd.product(key, x, theta, log_variance))
    outputs = np.asarray(draw(jax.random.split(keys[2], 20_000)), np.float64)
    wide = [np.asarray(a, np.float64) for a in (x, theta, log_variance)]
    mean, variance = wide[0] @ wide[1], wide[0] ** 2 @ np.exp(wide[2])
    np.testing.assert_allclose(outputs.mean(axis=0), mean, atol=5 * np.sqrt(variance.max() / 2e4))
    np.testing.assert_allclose(outputs.var(axis=0), variance, rtol=0.06)
    # The weights drawn directly, for the same network.
    state = SparseVD({"w": theta}, {"w": log_variance})
    weights = jax.vmap(lambda key: sparse_vd.sample(key, state)["w"])(
        jax.random.split(keys[0], 20_000)
    )
    np.testing.assert_allclose(np.var(weights, axis=0), np.exp(wide[2]), rtol=0.06)
    np.testing.assert_allclose(np.mean(weights, axis=0), theta, atol=0.04)


def test_examples_of_a_batch_draw_their_own_noise():
    x, theta = jnp.ones((2, 3)), jnp.ones((3, 4))
    out = sparse_vd.product(jax.random.key(0), x, theta, jnp.zeros((3, 4)))
    assert not np.allclose(out[0], out[1])


def test_inputs_that_are_zero_have_finite_slopes():
    def loss(log_variance):
        out = sparse_vd.product(
            jax.random.key(0), jnp.zeros((1, 3)), jnp.ones((3, 2)), log_variance
        )
        return jnp.sum(out)

    np.testing.assert_array_equal(jax.grad(loss)(jnp.zeros((3, 2))), 0)


def test_a_convolution_goes_through_multiply():
    x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5))

    def convolve(a, w):
        return jax.lax.conv_general_dilated(
            a, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    quiet = jnp.full(kernel.shape, -jnp.inf)
    out = sparse_vd.product(jax.random.key(0), x, kernel, quiet, convolve)
    np.testing.assert_allclose(out, np.full((1, 2, 2, 5), 18.0))


def test_mask_weights_and_belief_agree_with_alpha():
    params = {"w": jnp.array([[1.0, 0.2, -0.01]]), "b": jnp.array([0.001])}
    state = sparse_vd.init(params, log_variance=-3.0)
    alpha = np.log(np.exp(-3.0) / np.array([[1.0, 0.2, 0.01]]) ** 2)
    np.testing.assert_allclose(sparse_vd.log_alpha(state)["w"], alpha, rtol=1e-5)
    assert sparse_vd.mask(state)["w"].tolist() == (alpha < 3).tolist() == [[True, True, False]]
    assert isinstance(sparse_vd.mask(state)["b"], optax.MaskedNode)
    tested = sparse_vd.weights(state)
    assert tested["b"] is params["b"]  # leaves without noise pass through
    assert tested["w"][0, 2] == 0
    belief = gaussian.find(("another state", state), params)
    np.testing.assert_allclose(belief.precision["w"], np.exp(3.0), rtol=1e-6)
    assert isinstance(belief.mean["b"], optax.MaskedNode)


def test_half_precision_is_computed_in_float32():
    params = {"w": jnp.full((2, 2), 0.003, jnp.bfloat16)}
    state = sparse_vd.init(params)
    assert state.log_variance["w"].dtype == jnp.float32
    wide = SparseVD({"w": params["w"].astype(jnp.float32)}, state.log_variance)
    assert sparse_vd.kl(state) == sparse_vd.kl(wide)
    assert sparse_vd.sample(jax.random.key(0), state)["w"].dtype == jnp.bfloat16


def test_training_cuts_the_inputs_that_say_nothing():
    """Linear regression: two of six inputs matter; the others end beyond the threshold."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(200, 6)), jnp.float32)
    noise = 0.3 * rng.normal(size=(200, 1))
    noise -= x @ np.linalg.lstsq(x, noise)[0]  # so that least squares finds exact zeros
    y = x @ jnp.array([[2.0], [-1.0], [0], [0], [0], [0]]) + jnp.asarray(noise, jnp.float32)
    state = sparse_vd.init({"w": jnp.full((6, 1), 0.1)}, log_variance=-6.0)
    tx = optax.adam(lambda count: 0.03 * (1 - count.astype(jnp.float32) / 1_500))

    def objective(state, key):
        out = sparse_vd.product(key, x, state.theta["w"], state.log_variance["w"])
        return jnp.sum(jnp.square(out - y)) / (2 * 0.09) + sparse_vd.kl(state)

    @jax.jit
    def train(state):
        def step(carry, key):
            state, memory = carry
            updates, memory = tx.update(jax.grad(objective)(state, key), memory, state)
            return (optax.apply_updates(state, updates), memory), None

        keys = jax.random.split(jax.random.key(0), 1_500)
        return jax.lax.scan(step, (state, tx.init(state)), keys)[0][0]

    state = train(state)
    assert sparse_vd.mask(state)["w"][:, 0].tolist() == [True, True] + [False] * 4
    np.testing.assert_allclose(sparse_vd.weights(state)["w"][:2, 0], [2, -1], atol=0.1)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="two leaves of the same layer"):
        sparse_vd.product(jax.random.key(0), jnp.ones((1, 2)), jnp.ones((2, 3)), jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="matches no leaf"):
        sparse_vd.init({"w": jnp.ones((2, 2))}, select="kernel")
    with pytest.raises(TypeError, match="'n' has dtype int32"):
        sparse_vd.init({"n": jnp.ones(2, jnp.int32)}, select="n")
