"""Predictions against closed forms, quadrature and brute force."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adaptivenet.posterior.gaussian import Posterior
from adaptivenet.posterior.laplace import laplace
from adaptivenet.posterior.predict import (
    Linearised,
    averaged,
    linearised,
    probabilities,
    regression,
)


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def normal(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def affine(p, x):
    return x @ p["kernel"] + p["bias"]


def net(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


@pytest.mark.parametrize("structure", ["full", "kronecker", "last_layer"])
def test_regression_is_exact_for_a_linear_model(structure):
    """Two outputs: the exact predictive covariance of conjugate regression is that of each."""
    x, y, noise = normal(9, 3), normal(9, 2, seed=2), 0.4
    X = np.hstack([np.asarray(x), np.ones((9, 1))])
    precision = X.T @ X / noise + 2.0 * np.eye(4)
    mode = np.linalg.solve(precision, X.T @ np.asarray(y) / noise)
    params = {"kernel": jnp.asarray(mode[:3]), "bias": jnp.asarray(mode[3])}
    options = {"likelihood": "gaussian", "prior_precision": 2.0, "noise": noise}
    fit = laplace(affine, params, x, y, structure=structure, **options)
    new = normal(5, 3, seed=3)
    N = np.hstack([np.asarray(new), np.ones((5, 1))])
    wanted = np.einsum("ni,ij,nj->n", N, np.linalg.inv(precision), N)
    found = linearised(fit, affine, new, batch_size=2)
    np.testing.assert_allclose(found.mean, N @ mode, rtol=1e-9)
    np.testing.assert_allclose(found.covariance, wanted[:, None, None] * np.eye(2), atol=1e-10)
    got = regression(found, noise)
    np.testing.assert_allclose(got.variance, np.stack([wanted + noise] * 2, axis=1), rtol=1e-9)
    drawn = averaged(
        fit, affine, new, jax.random.key(0), likelihood="gaussian", samples=4_000, noise=noise
    )
    np.testing.assert_allclose(drawn.mean, got.mean, atol=5 * (wanted.max() / 4_000) ** 0.5)
    np.testing.assert_allclose(drawn.variance - noise, got.variance - noise, rtol=0.15)


@pytest.mark.parametrize("structure", ["diagonal", "full", "ekfac"])
def test_the_covariance_is_that_of_the_jacobian(structure):
    params = {"a": normal(3, 4, seed=2), "b": normal(4, 2, seed=3)}
    x, targets = normal(6, 3), jnp.array([0, 1, 1, 0, 1, 0])
    fit = laplace(net, params, x, targets, likelihood="categorical", structure=structure)
    found = linearised(fit, net, x)
    for row in range(2):
        J = jax.jacobian(lambda p, row=row: net(p, x[row : row + 1])[0])(params)
        columns = [jax.tree.map(lambda v, k=k: v[k], J) for k in range(2)]
        solved = [fit.gaussian.solve(column) for column in columns]
        wanted = [
            [
                sum((u * v).sum() for u, v in zip(*map(jax.tree.leaves, (a, b)), strict=True))
                for b in solved
            ]
            for a in columns
        ]
        np.testing.assert_allclose(found.covariance[row], np.asarray(wanted), rtol=1e-8)


def test_any_posterior_serves():
    belief = Posterior(
        {"a": optax.MaskedNode(), "b": normal(4, 2, seed=3)},
        {"a": optax.MaskedNode(), "b": jnp.full((4, 2), 5.0)},
    )
    params = {"a": normal(3, 4, seed=2), "b": jnp.zeros((4, 2))}
    x = normal(3, 3)
    hidden = np.tanh(np.asarray(x @ params["a"]))
    found = linearised(belief, net, x, params=params)
    np.testing.assert_allclose(found.mean, hidden @ np.asarray(belief.mean["b"]), rtol=1e-9)
    wanted = (hidden**2).sum(axis=1) / 5
    np.testing.assert_allclose(found.variance(), np.stack([wanted] * 2, axis=1), rtol=1e-9)
    with pytest.raises(ValueError, match="give the parameters as params="):
        averaged(belief, net, x, jax.random.key(0))


class TestProbabilities:
    def sigmoids(self, mean, variance):
        """By quadrature."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(80)
        values = 1 / (1 + np.exp(-(mean + np.sqrt(variance) * nodes)))
        return values @ weights / weights.sum()

    @pytest.mark.parametrize(
        ("mean", "variance"), [(0.0, 3.0), (1.0, 0.5), (-2.0, 4.0), (3.0, 9.0)]
    )
    def test_of_one_logit(self, mean, variance):
        found = Linearised(jnp.full((1, 1), mean), jnp.full((1, 1, 1), variance))
        wanted = self.sigmoids(mean, variance)
        got = probabilities(found, "bernoulli")
        np.testing.assert_allclose(got[0, 0], wanted, atol=0.02)  # MacKay's is this near
        drawn = probabilities(
            found, "bernoulli", method="sampled", samples=10_000, key=jax.random.key(0)
        )
        np.testing.assert_allclose(drawn[0, 0], wanted, atol=5 * 0.5 / 100)

    def test_draws_have_the_covariance(self):
        """Two classes with logits that move together: the difference alone counts."""
        covariance = jnp.array([[[5.0, 4.0], [4.0, 5.0]]])
        found = Linearised(jnp.array([[1.0, 0.0]]), covariance)
        drawn = probabilities(found, method="sampled", samples=10_000, key=jax.random.key(0))
        np.testing.assert_allclose(drawn[0, 0], self.sigmoids(1.0, 2.0), atol=0.01)
        np.testing.assert_allclose(drawn.sum(), 1.0)

    def test_without_doubt_both_are_the_softmax(self):
        mean = normal(4, 2, 3)  # at two times
        found = Linearised(mean, jnp.zeros((4, 6, 6)))
        for options in ({}, {"method": "sampled", "key": jax.random.key(0), "samples": 2}):
            got = probabilities(found, **options)
            np.testing.assert_allclose(got, jax.nn.softmax(mean), rtol=1e-9)

    def test_doubt_takes_confidence(self):
        mean = normal(20, 4)
        sure, unsure = (
            probabilities(Linearised(mean, v * jnp.broadcast_to(jnp.eye(4), (20, 4, 4))))
            for v in (0.1, 10.0)
        )
        assert (unsure.max(axis=-1) < sure.max(axis=-1)).all()
        assert (unsure.argmax(axis=-1) == sure.argmax(axis=-1)).all()


def test_averages_are_those_of_a_loop():
    params = {"a": normal(3, 4, seed=2), "b": normal(4, 2, seed=3)}
    x, key = normal(5, 3), jax.random.key(3)
    fit = laplace(net, params, x, jnp.zeros(5, int), likelihood="categorical")
    draws = [fit.sample(k) for k in jax.random.split(key, 7)]
    rows = [jax.nn.softmax(net(draw, x)) for draw in draws]
    for belief in (fit, fit.posterior()):
        got = averaged(belief, net, x, key, samples=7)
        np.testing.assert_allclose(got.mean, np.mean(rows, axis=0), rtol=1e-9)
        np.testing.assert_allclose(got.variance, np.var(rows, axis=0), rtol=1e-7)


class TestErrors:
    FOUND = Linearised(jnp.zeros((1, 2)), jnp.zeros((1, 2, 2)))

    def test_probabilities(self):
        for options, message in [
            ({"likelihood": "gaussian"}, r"use regression\(\)"),
            ({"likelihood": "poisson"}, "likelihood must be one of"),
            ({"method": "exact"}, "method must be one of probit, sampled"),
            ({"method": "sampled"}, "needs key="),
            ({"method": "sampled", "key": jax.random.key(0), "samples": 0}, "draws >= 1"),
        ]:
            with pytest.raises(ValueError, match=message):
                probabilities(self.FOUND, **options)

    def test_others(self):
        with pytest.raises(ValueError, match="noise is a variance, >= 0"):
            regression(self.FOUND, -1.0)
        belief = Posterior({"w": jnp.zeros((2, 2))}, {"w": jnp.ones((2, 2))})
        with pytest.raises(ValueError, match="batch_size must be"):
            linearised(belief, lambda p, x: x @ p["w"], jnp.ones((1, 2)), batch_size=0)
        with pytest.raises(ValueError, match="draws >= 1"):
            averaged(
                belief, lambda p, x: x @ p["w"], jnp.ones((1, 2)), jax.random.key(0), samples=0
            )
