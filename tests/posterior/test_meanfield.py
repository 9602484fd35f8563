"""Mean-field inference finds the known optimum, and its layers have the right distribution."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptivenet import trees
from adaptivenet.posterior import meanfield
from adaptivenet.posterior.gaussian import Posterior

PARAMS = {"kernel": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2), "bias": jnp.ones(2)}


class TestFields:
    @given(scale=st.floats(1e-6, 50.0))
    def test_scales_are_those_given(self, scale):
        fields = meanfield.init({"w": jnp.zeros(1)}, scale)
        np.testing.assert_allclose(meanfield.scales(fields)["w"], scale, rtol=2e-5)
        np.testing.assert_allclose(meanfield.posterior(fields).precision["w"], scale**-2, rtol=4e-5)

    def test_by_leaf_and_half_precision(self):
        params = {"w": jnp.ones(2, jnp.bfloat16), "v": jnp.ones(1), "ids": jnp.arange(2)}
        fields = meanfield.init(params, {"w": 0.1, "v": jnp.array([0.2]), "ids": 0.0001})
        assert fields.rho["w"].dtype == jnp.float32
        drawn = meanfield.sample(fields, jax.random.key(0))
        assert jax.tree.map(lambda x: x.dtype, drawn) == jax.tree.map(lambda x: x.dtype, params)
        np.testing.assert_array_equal(drawn["ids"], params["ids"])
        belief = meanfield.posterior(fields)
        assert trees.is_masked(belief.mean["ids"])
        assert trees.is_masked(belief.precision["ids"])
        np.testing.assert_allclose(belief.precision["w"], 100.0, rtol=1e-5)
        np.testing.assert_allclose(belief.precision["v"], 25.0, rtol=1e-5)

    def test_draws_and_their_gradients(self):
        """x = m + s e, so that dx/dm = 1 and dx/ds = e."""
        fields = meanfield.init({"w": jnp.full(5000, 2.0)}, 0.3)
        key = jax.random.key(1)
        drawn = meanfield.sample(fields, key)["w"]
        np.testing.assert_allclose(drawn.mean(), 2.0, atol=0.02)
        np.testing.assert_allclose(drawn.std(), 0.3, rtol=0.03)
        slopes = jax.grad(lambda f: jnp.sum(meanfield.sample(f, key)["w"]))(fields)
        np.testing.assert_array_equal(slopes.mean["w"], 1.0)
        sigmoid = 1 - np.exp(-0.3)  # the derivative of softplus at rho
        expected = (np.asarray(drawn) - 2.0) / 0.3 * sigmoid
        np.testing.assert_allclose(slopes.rho["w"], expected, rtol=1e-3, atol=1e-4)


class TestDivergence:
    @given(
        mean=st.floats(-2, 2),
        scale=st.floats(0.3, 2.0),
        before=st.floats(-2, 2),
        width=st.floats(0.3, 2.0),
    )
    def test_against_an_integral(self, mean, scale, before, width):
        grid = np.linspace(mean - 12 * scale, mean + 12 * scale, 20_001)

        def log_density(x, m, s):
            return -0.5 * ((x - m) / s) ** 2 - np.log(s * np.sqrt(2 * np.pi))

        log_q = log_density(grid, mean, scale)
        expected = np.trapezoid(np.exp(log_q) * (log_q - log_density(grid, before, width)), grid)
        fields = meanfield.init({"w": jnp.full(1, mean, jnp.float32)}, scale)
        found = meanfield.kl(fields, prior_mean=before, prior_scale=width)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)

    def test_priors_by_leaf_and_beliefs(self):
        fields = meanfield.init(PARAMS, 0.5)
        scales = {"kernel": 1.0, "bias": jnp.array([2.0, 3.0])}
        means = {"kernel": 0.1, "bias": 1.0}
        found = meanfield.kl(fields, prior_mean=means, prior_scale=scales)
        parts = [
            meanfield.kl(meanfield.init({"w": w}, 0.5), prior_mean=m, prior_scale=s)
            for w, m, s in (
                (PARAMS["kernel"], 0.1, 1.0),
                (PARAMS["bias"][:1], 1.0, 2.0),
                (PARAMS["bias"][1:], 1.0, 3.0),
            )
        ]
        np.testing.assert_allclose(found, sum(parts), rtol=1e-5)
        before = Posterior(
            {"kernel": jnp.full((3, 2), 0.1), "bias": jnp.ones(2)},
            {"kernel": jnp.ones((3, 2)), "bias": jnp.array([1 / 4, 1 / 9])},
        )
        np.testing.assert_allclose(meanfield.kl(fields, prior=before), found, rtol=1e-5)
        itself = meanfield.kl(fields, prior=meanfield.posterior(fields))
        np.testing.assert_allclose(itself, 0.0, atol=1e-5)


class TestConjugate:
    """Linear regression: the best means are exact, the best precisions the true diagonal."""

    def problem(self):
        rng = np.random.default_rng(0)
        n, noise = 60, 0.7
        inputs = rng.normal(size=(n, 3))
        inputs[:, 1] += 0.8 * inputs[:, 0]
        targets = inputs @ np.array([1.0, -0.5, 0.3]) + noise * rng.normal(size=n)
        precision = inputs.T @ inputs / noise**2 + np.eye(3)
        mean = np.linalg.solve(precision, inputs.T @ targets / noise**2)
        x, y = (jnp.asarray(a, jnp.float32) for a in (inputs, targets))

        def log_likelihood(params, rows=slice(None)):
            return -jnp.sum(jnp.square(x[rows] @ params["w"] - y[rows])) / (2 * noise**2)

        return log_likelihood, mean, precision

    def test_training_finds_it(self):
        log_likelihood, mean, precision = self.problem()
        tx = optax.adam(optax.cosine_decay_schedule(0.05, 2000))
        fields = meanfield.init({"w": jnp.zeros(3)}, 0.5)

        def step(carry, key):
            fields, state = carry
            slopes = jax.grad(lambda f: -meanfield.elbo(f, log_likelihood, key, samples=8))(fields)
            updates, state = tx.update(slopes, state, fields)
            return (optax.apply_updates(fields, updates), state), None

        with jax.numpy_dtype_promotion("standard"):  # as optax's schedules need
            keys = jax.random.split(jax.random.key(0), 2000)
            (fields, _), _ = jax.lax.scan(step, (fields, tx.init(fields)), keys)
        belief = meanfield.posterior(fields)
        sigma = np.diag(precision) ** -0.5
        np.testing.assert_allclose(belief.mean["w"], mean, atol=0.05 * sigma.min())
        np.testing.assert_allclose(belief.precision["w"], np.diag(precision), rtol=0.05)

    def test_the_bound_is_exact_in_expectation(self):
        """E log p(y|w) has a closed form for a quadratic."""
        log_likelihood, mean, precision = self.problem()
        fields = meanfield.init({"w": jnp.asarray(mean, jnp.float32)}, 0.2)
        curvature = np.diag(precision) - 1.0
        fit = float(log_likelihood({"w": fields.mean["w"]})) - 0.5 * 0.04 * curvature.sum()
        expected = fit - float(meanfield.kl(fields))
        found = meanfield.elbo(fields, log_likelihood, jax.random.key(2), samples=20_000)
        np.testing.assert_allclose(found, expected, rtol=0.005)

    def test_scale_and_temperature(self):
        log_likelihood, _, _ = self.problem()
        fields = meanfield.init({"w": jnp.zeros(3)}, 0.2)
        key = jax.random.key(2)
        plain = meanfield.elbo(fields, log_likelihood, key, samples=2)
        penalty = meanfield.kl(fields)
        half = meanfield.elbo(
            fields, log_likelihood, key, slice(0, 30), samples=2, scale=2.0, temperature=0.5
        )
        other = meanfield.elbo(fields, log_likelihood, key, slice(30, 60), samples=2, scale=2.0)
        np.testing.assert_allclose(half + other, 2 * plain + 0.5 * penalty, rtol=1e-5)


def dense_moments(inputs, scale, bias_scale):
    """Variances of the outputs, and the covariance of two rows with the same kernel."""
    x, s = np.asarray(inputs, np.float64), np.asarray(scale, np.float64)
    return x**2 @ s**2 + np.asarray(bias_scale, np.float64) ** 2


@pytest.mark.parametrize("layer", [meanfield.local_dense, meanfield.flipout_dense])
class TestLayers:
    INPUTS: ClassVar = jnp.array([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]])
    SCALE = jnp.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.05]])
    BIAS: ClassVar = {"bias": jnp.array([1.0, -1.0]), "bias_scale": jnp.array([0.3, 0.6])}

    def draws(self, layer, number, **bias):
        keys = jax.random.split(jax.random.key(0), number)
        return np.asarray(
            jax.jit(
                jax.vmap(lambda k: layer(self.INPUTS, PARAMS["kernel"], self.SCALE, k, **bias))
            )(keys)
        )

    def test_moments(self, layer):
        outputs = self.draws(layer, 20_000, **self.BIAS)
        mean = np.asarray(self.INPUTS @ PARAMS["kernel"] + self.BIAS["bias"])
        variance = dense_moments(self.INPUTS, self.SCALE, self.BIAS["bias_scale"])
        np.testing.assert_allclose(outputs.mean(0), mean, atol=0.05)
        np.testing.assert_allclose(outputs.var(0), variance, rtol=0.05)
        # Examples are uncorrelated, which draws that share a kernel are not.
        for unit in range(2):
            correlation = np.corrcoef(outputs[:, 0, unit], outputs[:, 1, unit])[0, 1]
            assert abs(correlation) < 0.03
        shared = np.asarray(self.INPUTS[0] * self.INPUTS[1]) @ np.asarray(self.SCALE) ** 2
        assert (np.abs(shared) / np.sqrt(variance.prod(0))).max() > 0.3

    def test_a_certain_kernel_is_a_dense_product(self, layer):
        got = layer(self.INPUTS, PARAMS["kernel"], 0.0 * self.SCALE, jax.random.key(0))
        np.testing.assert_allclose(got, self.INPUTS @ PARAMS["kernel"], rtol=1e-6)

    def test_gradients_are_finite_at_zero(self, layer):
        """Images have pixels that are zero, and a square root is steep there."""

        def total(scale, inputs):
            return jnp.sum(layer(inputs, PARAMS["kernel"], scale, jax.random.key(0)) ** 2)

        for inputs in (jnp.zeros((2, 3)), self.INPUTS):
            for scale in (jnp.zeros((3, 2)), self.SCALE):
                slopes = jax.grad(total, argnums=(0, 1))(scale, inputs)
                assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))

    def test_shapes_and_dtypes(self, layer):
        inputs = jnp.ones((2, 4, 3), jnp.bfloat16)
        got = layer(inputs, PARAMS["kernel"], self.SCALE, jax.random.key(0), **self.BIAS)
        assert (got.shape, got.dtype) == ((2, 4, 2), jnp.bfloat16)
        assert layer(inputs[0, 0], PARAMS["kernel"], self.SCALE, jax.random.key(0)).shape == (2,)

    def test_shapes_that_do_not_fit(self, layer):
        key = jax.random.key(0)
        kernel = PARAMS["kernel"]
        with pytest.raises(ValueError, match="takes mean and scale of one shape"):
            layer(self.INPUTS, kernel, self.SCALE[:2], key)
        with pytest.raises(ValueError, match=r"takes inputs \[\.\.\., 3\] for a kernel"):
            layer(self.INPUTS[:, :2], kernel, self.SCALE, key)
        with pytest.raises(ValueError, match=r"takes bias_scale \(2,\), not \(3,\)"):
            layer(self.INPUTS, kernel, self.SCALE, key, bias_scale=jnp.ones(3))


def test_stochastic_draws_anew_for_each_key():
    fields = meanfield.init(PARAMS, 0.1)

    def apply(params, inputs, *, factor=1.0):
        return factor * (inputs @ params["kernel"] + params["bias"])

    drawn = meanfield.stochastic(apply)
    key = jax.random.key(4)
    got = drawn(fields, jnp.ones((1, 3)), draw=key, factor=2.0)
    expected = apply(meanfield.sample(fields, key), jnp.ones((1, 3)), factor=2.0)
    np.testing.assert_array_equal(got, expected)
    assert not np.array_equal(got, drawn(fields, jnp.ones((1, 3)), draw=jax.random.key(5)))


def test_a_population_over_priors():
    fields = meanfield.init(PARAMS, 0.1)
    widths = jnp.array([0.5, 2.0])
    together = jax.vmap(lambda width: meanfield.kl(fields, prior_scale=width))(widths)
    alone = [meanfield.kl(fields, prior_scale=float(width)) for width in widths]
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_errors():
    with pytest.raises(ValueError, match="scale must be positive"):
        meanfield.init(PARAMS, 0.0)
    with pytest.raises(ValueError, match="belongs to another tree"):
        meanfield.init(PARAMS, {"kernel": 0.1})
    with pytest.raises(ValueError, match="prior_scale must be positive"):
        meanfield.kl(meanfield.init(PARAMS, 0.1), prior_scale=-1.0)
    with pytest.raises(ValueError, match="samples must be at least 1"):
        meanfield.elbo(meanfield.init(PARAMS, 0.1), jnp.sum, jax.random.key(0), samples=0)
