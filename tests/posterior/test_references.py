"""Beliefs against other people's code and against samples of the posterior itself.

Skipped where the packages are not installed: BlackJAX (the extra ``bayes``), laplax (``test``).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from adaptivenet import models
from adaptivenet.posterior import fisher_diagonal, importance, laplace, sampling
from adaptivenet.posterior.draws import noisy_value_and_grad
from adaptivenet.posterior.gaussian import find
from adaptivenet.posterior.ivon import ivon

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # of the packages
        yield


class TestLaplax:
    """Curvature of a tiny net by products with unit vectors."""

    @pytest.fixture(autouse=True)
    def _laplax(self):
        self.ggn = pytest.importorskip("laplax.curv.ggn")
        self.diagonal = pytest.importorskip("laplax.curv.diagonal")
        self.full = pytest.importorskip("laplax.curv.full")

    def product(self, params, inputs, targets, loss):
        """Their product with the generalised Gauss-Newton matrix, summed over the examples."""
        return self.ggn.create_ggn_mv(
            lambda input, params: models.mlp(params, input),
            params,
            {"input": inputs, "target": targets},
            loss,
            num_curv_samples=len(inputs),
            num_total_samples=len(inputs),
        )

    @pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
    def test_the_curvature_is_theirs(self, likelihood):
        keys = jax.random.split(KEY, 3)
        params = models.mlp_init(keys[0], (4, 5, 3))
        inputs = jax.random.normal(keys[1], (12, 4))
        if likelihood == "categorical":
            targets, loss = jax.random.randint(keys[2], (12,), 0, 3), "cross_entropy"
        else:
            targets, loss = jax.random.normal(keys[2], (12, 3)), "mse"
        product = self.product(params, inputs, targets, loss)
        theirs = np.asarray(self.diagonal.create_diagonal_curvature(product, layout=params))
        # Their squared error is not halved: twice the curvature of a Gaussian of variance one.
        scale = 1.0 if likelihood == "categorical" else 0.5
        ours = fisher_diagonal(models.mlp, params, inputs, likelihood=likelihood)
        flat = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(ours)])
        np.testing.assert_allclose(flat, scale * theirs, rtol=1e-4, atol=1e-6)
        matrix = scale * np.asarray(self.full.create_full_curvature(product, layout=params))
        fit = laplace(
            models.mlp, params, inputs, targets, likelihood=likelihood, structure="full",
            prior_precision=2.0,
        )  # fmt: skip
        own = np.asarray(fit.gaussian.precision())
        np.testing.assert_allclose(own, matrix + 2 * np.eye(len(own)), rtol=1e-3, atol=1e-4)


def mode_of(density, start, steps=300):
    """Where a log density is highest."""
    tx = optax.lbfgs()
    fall = lambda p: -density(p)  # noqa: E731

    def step(carry, _):
        params, state = carry
        value, grads = optax.value_and_grad_from_state(fall)(params, state=state)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=fall)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps)[0][0])
    return run(start)


def hidden_layer():
    """A tanh net of 53 parameters that the data determine: all correlations matter."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(3000, 6)))
    kernels = [0.6 * rng.normal(size=(6, 4)), rng.normal(size=(4, 5))]
    truth = {
        f"dense{n}": {"kernel": jnp.asarray(k), "bias": jnp.zeros(k.shape[1])}
        for n, k in enumerate(kernels, 1)
    }
    apply = lambda p, x: models.mlp(p, x, activation=jnp.tanh)  # noqa: E731
    noise = 0.09
    y = apply(truth, x) + noise**0.5 * jnp.asarray(rng.normal(size=(3000, 5)))

    def density(params):
        squares = sum(jnp.sum(jnp.square(p)) for p in jax.tree.leaves(params))
        return -0.5 * jnp.sum(jnp.square(y - apply(params, x))) / noise - 0.5 * squares

    fit = laplace(
        apply, mode_of(density, truth, 100), x, y, likelihood="gaussian", noise=noise,
        structure="full",
    )  # fmt: skip
    return density, fit  # the prior has precision one


def test_importance_sampling_of_a_hidden_layer():
    """The Laplace fit against its own draws, weighted by the posterior."""
    with jax.enable_x64(True):
        density, fit = hidden_layer()
        drawn = importance.importance_sample(density, fit.gaussian, KEY, samples=4000)
        moments = importance.weighted_moments(drawn)
        assert drawn.effective_size > 1000
        found = np.concatenate([np.ravel(v) for v in jax.tree.leaves(fit.gaussian.variances())])
        exact = np.concatenate([1 / np.ravel(p) for p in jax.tree.leaves(moments.precision)])
        np.testing.assert_allclose(np.median(found / exact), 1.0, atol=0.05)
        np.testing.assert_allclose(found / exact, np.ones(53), atol=0.2)  # draws add some per cent


class TestNuts:
    """Marginal variances of nets of about 50 parameters."""

    @pytest.fixture(autouse=True)
    def _blackjax(self):
        pytest.importorskip("blackjax", reason="needs the extra bayes")
        with jax.enable_x64(True):
            yield

    @staticmethod
    def variances(density, fit, samples):
        """Marginal variances of draws, which are made in coordinates that the fit makes round."""
        mode, unflatten = ravel_pytree(fit.gaussian.params)
        root = fit.gaussian.root

        def place(z):
            return mode + jax.scipy.linalg.solve_triangular(root, z, lower=True, trans="T")

        draws, report = sampling.sample_posterior(
            lambda z: density(unflatten(place(z))),
            jnp.zeros_like(mode),
            KEY,
            samples=samples,
            warmup=150,
        )
        assert np.mean(report.divergent) < 0.01
        assert float(np.min(sampling.effective_size(draws))) > 0.05 * samples
        return np.asarray(jax.vmap(place)(draws)).var(0, ddof=1)

    def test_laplace_of_a_hidden_layer(self):
        density, fit = hidden_layer()
        found = np.concatenate([np.ravel(v) for v in jax.tree.leaves(fit.gaussian.variances())])
        ratio = found / self.variances(density, fit, 4000)
        assert len(ratio) == 53
        np.testing.assert_allclose(np.median(ratio), 1.0, atol=0.05)
        np.testing.assert_allclose(ratio, np.ones(53), atol=0.15)  # draws add some per cent

    def test_ivon_and_laplace_of_a_classifier(self):
        """Logistic regression on 49 features: nearly diagonal, as mean-field beliefs need."""
        rng = np.random.default_rng(2)
        x = jnp.asarray(rng.normal(size=(2000, 49)))
        truth = jnp.asarray(rng.normal(size=(49, 1)) * 0.3)
        y = jnp.asarray(rng.random((2000, 1)) < jax.nn.sigmoid(x @ truth), float)
        apply = lambda p, x: x @ p["kernel"] + p["bias"]  # noqa: E731

        def likelihood(params, x, y):
            logits = apply(params, x)
            return jnp.sum(y * logits - jax.nn.softplus(logits))

        def density(params):
            squares = sum(jnp.sum(jnp.square(p)) for p in jax.tree.leaves(params))
            return likelihood(params, x, y) - 0.5 * 4.0 * squares

        start = {"bias": jnp.zeros(1), "kernel": jnp.zeros((49, 1))}
        fit = laplace(
            apply, mode_of(density, start, 30), x, y, likelihood="bernoulli",
            prior_precision=4.0, structure="full",
        )  # fmt: skip
        drawn = self.variances(density, fit, 3000)
        variances = np.concatenate([np.ravel(v) for v in jax.tree.leaves(fit.gaussian.variances())])
        np.testing.assert_allclose(np.mean(variances / drawn), 1.0, atol=0.1)
        assert np.quantile(np.abs(np.log(variances / drawn)), 0.9) < 0.1

        # Noise of the product raises the curvature of IVON: hence all data, and some draws a step.
        rate = optax.cosine_decay_schedule(0.5, 2000)
        tx = ivon(rate, 2000.0, hess_init=0.2, b2=0.999, weight_decay=2e-3)

        def step(carry, _):
            params, state = carry
            mean = lambda p: -likelihood(p, x, y) / 2000  # noqa: E731
            _, grads, extra = noisy_value_and_grad(mean, state, params, samples=8)
            updates, state = tx.update(grads, state, params, **extra)
            return (optax.apply_updates(params, updates), state), None

        run = jax.jit(lambda start: jax.lax.scan(step, (start, tx.init(start)), length=2000)[0])
        params, state = run(start)
        found = find(state, params).precision
        believed = np.concatenate([1 / np.ravel(p) for p in jax.tree.leaves(found)])
        np.testing.assert_allclose(np.median(believed / drawn), 1.0, atol=0.1)
