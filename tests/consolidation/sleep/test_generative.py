"""Dreams are answered by the network as it was; a small model's bound is exact where it can be."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from adaptivenet.consolidation.sleep import generative, rehearsal, vae


class TestReplayed:
    def test_answers_of_the_old_network(self):
        rng = np.random.default_rng(0)
        w, inputs = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 4), (5, 3)))

        def loss(w, scale):
            draw = generative.replayed(lambda key: inputs * scale, lambda p, x: x @ p, w)
            items = draw(jax.random.key(0)).items
            return jnp.sum(items.logits) + jnp.sum(items.inputs)

        drawn = generative.replayed(lambda key: inputs, lambda p, x: x @ p, w)(jax.random.key(0))
        np.testing.assert_allclose(drawn.items.logits, inputs @ w, rtol=1e-6)
        np.testing.assert_array_equal(drawn.items.labels, jnp.argmax(inputs @ w, 1))
        assert drawn.where.tolist() == [True] * 5
        for grads in jax.grad(loss, (0, 1))(w, 2.0):
            assert not grads.any()

    def test_labels_of_the_generator_come_first(self):
        def dream(key):
            return jax.random.normal(key, (5, 2)), jnp.full(5, 7)

        draw = generative.replayed(dream, lambda p, x: x, None)
        assert draw(jax.random.key(0)).items.labels.tolist() == [7] * 5
        a, b = (draw(jax.random.key(k)).items.inputs for k in (0, 1))
        assert (a != b).all()
        dark = rehearsal.der_loss(lambda p, x: x, None, draw(jax.random.key(0)), alpha=1.0)
        assert dark == 0

    def test_tasks_weigh_the_same(self):
        one, two = jnp.float32(3.0), jnp.float32(6.0)
        assert generative.balanced(one, two, tasks=1) == 3
        np.testing.assert_allclose(generative.balanced(one, two, tasks=3), 5)
        with pytest.raises(ValueError, match="tasks must be at least 1"):
            generative.balanced(one, two, tasks=0)


def linear_model(features=4, latent=2, noise=0.5, seed=0):
    """A linear-Gaussian model with orthogonal loadings, whose posterior is diagonal."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(features, latent)))[0]
    loads = (q * np.array([1.5, 0.7])[:latent]).T  # [latent, features]
    shift = rng.normal(size=features)
    variance = 1 / (1 + (loads**2).sum(1) / noise**2)
    into = loads.T / noise**2 * variance  # posterior mean = (x - shift) @ into
    params = {
        "encoder": [],
        "mean": {"kernel": into, "bias": -shift @ into},
        "log_variance": {"kernel": np.zeros_like(into), "bias": np.log(variance)},
        "decoder": [{"kernel": loads, "bias": shift}],
    }
    law = stats.multivariate_normal(shift, loads.T @ loads + noise**2 * np.eye(features))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params), law, noise


class TestBound:
    def expected(self, params, inputs, likelihood="gaussian", **options):
        key = jax.random.key(3)
        return np.asarray(
            jax.jit(
                lambda p: vae.elbo(p, key, inputs, likelihood=likelihood, samples=20_000, **options)
            )(params)
        )

    def test_it_is_the_evidence_where_the_posterior_is_exact(self):
        params, law, noise = linear_model()
        inputs = law.rvs(6, random_state=1)
        found = self.expected(params, jnp.asarray(inputs, jnp.float32), scale=noise)
        np.testing.assert_allclose(found, law.logpdf(inputs), atol=0.05)

    def test_it_is_lower_by_the_divergence_where_it_is_not(self):
        params, law, noise = linear_model()
        inputs = jnp.asarray(law.rvs(6, random_state=1), jnp.float32)
        shift, wider = jnp.array([0.3, -0.2]), 0.4
        worse = params | {
            "mean": params["mean"] | {"bias": params["mean"]["bias"] + shift},
            "log_variance": params["log_variance"]
            | {"bias": params["log_variance"]["bias"] + wider},
        }
        variance = np.exp(params["log_variance"]["bias"])
        kl = 0.5 * np.sum(shift**2 / variance + math.exp(wider) - 1 - wider)
        assert kl > 0.5
        found = self.expected(worse, inputs, scale=noise)
        np.testing.assert_allclose(found, law.logpdf(inputs) - kl, atol=0.08)

    def test_it_is_below_the_evidence_of_pixels(self):
        """With one latent variable the evidence is an integral over a line."""
        params = vae.init(jax.random.key(5), features=5, latent=1, hidden=(3,))
        params = jax.tree.map(lambda p: 1.5 * p, params)
        inputs = jnp.asarray(np.random.default_rng(0).integers(2, size=(6, 5)), jnp.float32)
        grid = np.linspace(-8, 8, 1601)
        logits = np.asarray(vae.decode(params, jnp.asarray(grid[:, None], jnp.float32)), np.float64)
        p = 1 / (1 + np.exp(-logits))
        x = np.asarray(inputs)[:, None]
        given = np.prod(np.where(x == 1, p, 1 - p), axis=-1)
        evidence = np.log(given @ stats.norm.pdf(grid) * (grid[1] - grid[0]))
        found = self.expected(params, inputs, "bernoulli")
        assert (found < evidence + 0.01).all()
        assert (found < evidence - 0.01).any()
        half = self.expected(params, inputs, "bernoulli", beta=0.5)
        assert (half >= found).all()
        assert (half > found + 0.5).any()

    def test_dreams_are_draws_from_the_model(self):
        params, law, noise = linear_model()
        found = vae.dream(params, jax.random.key(0), 40_000, likelihood="gaussian", scale=noise)
        np.testing.assert_allclose(found.mean(0), law.mean, atol=0.05)
        np.testing.assert_allclose(np.cov(found.T), law.cov, atol=0.08)
        smooth = vae.dream(params, jax.random.key(0), 40_000, likelihood="gaussian")
        np.testing.assert_allclose(np.cov(smooth.T), law.cov - noise**2 * np.eye(4), atol=0.08)

    def test_weights(self):
        params, _, _ = linear_model()
        inputs = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
        values = vae.elbo(params, jax.random.key(0), inputs, likelihood="gaussian")
        weights = jnp.array([True, False, True])
        options = {"weights": weights, "likelihood": "gaussian"}
        found = vae.loss(params, jax.random.key(0), inputs, **options)
        np.testing.assert_allclose(found, -(values[0] + values[2]) / 2, rtol=1e-6)


def test_a_conditional_model_learns_its_classes():
    """Three prototypes with noise; what is dreamt of a class is near its own prototype."""
    rng = np.random.default_rng(0)
    prototypes = rng.integers(2, size=(3, 12)).astype(np.float32)
    labels = jnp.asarray(rng.integers(3, size=600))
    flips = rng.random((600, 12)) < 0.05
    inputs = jnp.asarray(np.where(flips, 1 - prototypes[labels], prototypes[labels]))
    params = vae.init(jax.random.key(0), 12, 2, hidden=(16,), classes=3)
    tx = optax.adam(1e-2)

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            value, grads = jax.value_and_grad(vae.loss)(params, key, inputs, labels)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        keys = jax.random.split(jax.random.key(1), 150)
        return jax.lax.scan(step, (params, tx.init(params)), keys)

    (params, _), losses = train(params)
    assert losses[-1] < 0.6 * losses[0]
    told = jnp.repeat(jnp.arange(3), 50)
    dreams = vae.dream(params, jax.random.key(2), 150, told)
    assert dreams.min() >= 0
    assert dreams.max() <= 1
    nearest = jnp.argmin(jnp.abs(dreams[:, None] - prototypes).sum(-1), axis=1)
    assert (nearest == told).mean() > 0.95
    soft = vae.elbo(params, jax.random.key(3), inputs[:4], jax.nn.one_hot(labels[:4], 3))
    hard = vae.elbo(params, jax.random.key(3), inputs[:4], labels[:4])
    np.testing.assert_allclose(soft, hard, rtol=1e-5)
    wrong = vae.elbo(params, jax.random.key(3), inputs[:4], (labels[:4] + 1) % 3)
    assert (wrong < hard).all()


def test_errors():
    plain = vae.init(jax.random.key(0), 4, 2, hidden=())
    told = vae.init(jax.random.key(0), 4, 2, hidden=(), classes=3)
    x, key = jnp.ones((2, 4)), jax.random.key(0)
    for make, message in (
        (lambda: vae.init(key, 0, 2), "must be positive integers"),
        (lambda: vae.encode(plain, jnp.ones((2, 3))), r"inputs must be \[batch, 4\]"),
        (lambda: vae.decode(plain, x), r"latents must be \[batch, 2\]"),
        (lambda: vae.encode(plain, x, jnp.zeros(2, int)), "this model knows no classes"),
        (lambda: vae.encode(told, x), "one of 3 classes: give labels"),
        (lambda: vae.encode(told, x, jnp.zeros(3, int)), "labels must be 2 integers"),
        (lambda: vae.elbo(plain, key, x, likelihood="poisson"), "likelihood must be"),
        (lambda: vae.elbo(plain, key, x, likelihood="gaussian", scale=0.0), "scale must be posit"),
        (lambda: vae.elbo(plain, key, x, samples=0), "samples must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
