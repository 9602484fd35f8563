"""The evidence where it is exact, its slopes, and the priors that it chooses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivenet.posterior.evidence import effective_parameters, log_evidence, tune_prior
from adaptivenet.posterior.laplace import laplace


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def normal(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def linear(p, x):
    return x @ p["w"]


def net(p, x):
    hidden = jnp.tanh(x @ p["a"]["kernel"] + p["a"]["bias"]) * p["scale"]
    return hidden @ p["b"]["kernel"] + p["b"]["bias"]


def parameters():
    return {
        "a": {"kernel": normal(3, 4, seed=2), "bias": normal(4, seed=3)},
        "b": {"kernel": normal(4, 3, seed=4), "bias": normal(3, seed=5)},
        "scale": normal(4, seed=6),
    }


def regression(x, y, prior, noise, structure="full"):
    """A fit at the mode."""
    X, d = np.asarray(x), np.broadcast_to(np.asarray(prior), (x.shape[1],))
    precision = X.T @ X / noise + np.diag(d)
    mode = np.linalg.solve(precision, X.T @ np.asarray(y) / noise)
    given = {"w": jnp.asarray(prior)[:, None]} if np.ndim(prior) else prior
    return laplace(
        linear,
        {"w": jnp.asarray(mode)},
        x,
        y,
        likelihood="gaussian",
        prior_precision=given,
        noise=noise,
        structure=structure,
    )


def marginal(x, y, prior, noise):
    """log N(y; 0, noise I + X D^-1 X^T)."""
    X, y = np.asarray(x), np.asarray(y).ravel()
    covariance = noise * np.eye(len(y)) + X @ np.diag(1 / np.broadcast_to(prior, X.shape[1])) @ X.T
    log = np.linalg.slogdet(2 * np.pi * covariance)[1]
    return -0.5 * (log + y @ np.linalg.solve(covariance, y))


@pytest.mark.parametrize("structure", ["full", "kronecker", "ekfac"])
@pytest.mark.parametrize(("prior", "noise"), [(0.7, 0.3), (np.array([0.1, 2.0, 9.0]), 1.4)])
def test_is_exact_for_conjugate_regression(prior, noise, structure):
    if structure == "ekfac" and np.ndim(prior):
        prior = 5.0
    x, y = normal(8, 3), normal(8, 1, seed=2)
    fit = regression(x, y, prior, noise, structure)
    np.testing.assert_allclose(log_evidence(fit), marginal(x, y, prior, noise), rtol=1e-10)


def problem(structure, prior=0.5):
    targets = jnp.array([0, 2, 1, 1, 0, 2, 2])
    return laplace(
        net,
        parameters(),
        normal(7, 3),
        targets,
        likelihood="categorical",
        structure=structure,
        prior_precision=prior,
    )


@pytest.mark.parametrize("structure", ["diagonal", "full", "kronecker"])
def test_its_slope_by_the_prior(structure):
    """Of kernel and bias apart, so that Kronecker blocks are whitened."""
    fit = problem(structure)

    def value(logs):
        prior = jax.tree.map(jnp.exp, {"a": logs["a"], "b": logs["b"], "scale": logs["scale"]})
        return log_evidence(fit.with_prior(prior))

    start = {
        "a": {"kernel": jnp.array(0.3), "bias": jnp.array([0.3, 0.4, -0.1, 0.0])},
        "b": {"kernel": jnp.array(-0.5), "bias": jnp.array(1.0)},
        "scale": jnp.array([0.1, 0.2, 0.3, 0.4]),
    }
    if structure == "kronecker":
        start["a"]["bias"] = jnp.array(0.9)
    compiled = jax.jit(value)
    slopes = jax.jit(jax.grad(value))(start)
    for k, leaf in enumerate(jax.tree.leaves(start)):
        for place in range(leaf.size):
            ends = []
            for step in (1e-5, -1e-5):
                leaves, treedef = jax.tree.flatten(start)
                leaves[k] = leaf.ravel().at[place].add(step).reshape(leaf.shape)
                ends.append(compiled(treedef.unflatten(leaves)))
            got = jax.tree.leaves(slopes)[k].ravel()[place]
            np.testing.assert_allclose(got, (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-7)


def test_effective_parameters():
    x, y = normal(8, 3), normal(8, 1, seed=2)
    values = np.linalg.eigvalsh(np.asarray(x).T @ np.asarray(x) / 0.3)
    fit = regression(x, y, 0.7, 0.3)
    wanted = (values / (values + 0.7)).sum()
    np.testing.assert_allclose(effective_parameters(fit), wanted, rtol=1e-10)


@pytest.mark.parametrize("method", ["mackay", "gradient"])
def test_both_find_the_same_optimum(method):
    """Of precision and noise together; the mean follows, so the evidence is that of the data."""
    x = normal(30, 3)
    y = x @ jnp.array([[1.0], [0.5], [-2.0]]) + 0.7 * normal(30, 1, seed=3)
    prior, noise = 1.0, 1.0
    for _ in range(6):
        fit = regression(x, y, prior, noise)
        tuned = tune_prior(fit, "one", method=method, steps=300, learning_rate=0.03, noise=True)
        prior = float(tuned.laplace.gaussian.prior[0].ravel()[0])
        noise = float(tuned.laplace.noise)
    top = marginal(x, y, prior, noise)
    for factor in (0.9, 1.1):
        assert marginal(x, y, prior * factor, noise) < top
        assert marginal(x, y, prior, noise * factor) < top
    np.testing.assert_allclose(tuned.log_evidence[-1], top, rtol=1e-4)
    assert tuned.log_evidence.shape == (301,)


@pytest.mark.parametrize(
    ("structure", "granularity"),
    [
        ("diagonal", "one"),
        ("diagonal", "weight"),
        ("kronecker", "layer"),
        ("kronecker", "unit"),
        ("ekfac", "layer"),
        ("full", "unit"),
    ],
)
def test_tuning_raises_the_evidence(structure, granularity):
    fit = problem(structure, 3.0)
    options = {"learning_rate": 0.1, "steps": 200, "method": "gradient"}
    tuned = tune_prior(fit, granularity, **options)
    assert tuned.log_evidence[-1] > tuned.log_evidence[0] + 0.5
    np.testing.assert_allclose(tuned.log_evidence[0], log_evidence(fit), rtol=1e-9)
    np.testing.assert_allclose(tuned.log_evidence[-1], log_evidence(tuned.laplace), rtol=1e-9)
    leaves = dict(zip(fit.gaussian.names, tuned.laplace.gaussian.prior, strict=True))
    kernel, bias = leaves["a/kernel"], leaves["a/bias"]
    if granularity == "unit":
        np.testing.assert_allclose(kernel, jnp.broadcast_to(bias, kernel.shape), rtol=1e-10)
        assert len(np.unique(np.asarray(bias))) == 4
    elif granularity != "weight":
        np.testing.assert_allclose(kernel, jnp.full(kernel.shape, bias[0]), rtol=1e-10)
        same = np.isclose(leaves["b/kernel"][0, 0], bias[0])
        assert same == (granularity == "one")
    if granularity in ("one", "layer"):  # the fixed point is the optimum of Adam
        fixed = tune_prior(fit, granularity, steps=60)
        np.testing.assert_allclose(fixed.log_evidence[-1], tuned.log_evidence[-1], atol=0.02)


def test_a_unit_without_a_use_is_pulled_to_zero():
    """Automatic relevance determination: one input tells of the targets, the others do not."""
    x = normal(60, 3)
    y = 2.0 * x[:, :1] + 0.1 * normal(60, 1, seed=5)
    mode = jnp.linalg.lstsq(x, y)[0]
    fit = laplace(linear, {"w": mode}, x, y, likelihood="gaussian", noise=0.01, structure="full")
    prior = tune_prior(fit, "weight", steps=100).laplace.gaussian.prior[0].ravel()
    assert prior[0] < 1.0
    assert (prior[1:] > 100 * prior[0]).all()


def test_nothing_to_fit_stays_within_bounds():
    fit = laplace(
        linear,
        {"w": jnp.zeros((3, 1))},
        normal(4, 3),
        jnp.zeros((4, 1)),
        likelihood="gaussian",
        structure="diagonal",
    )
    for method in ("mackay", "gradient"):
        found = tune_prior(fit, "one", method=method, steps=5)
        assert np.isfinite(found.log_evidence).all()
        assert found.laplace.gaussian.prior[0].max() <= 1.0001e12


class TestErrors:
    @pytest.mark.parametrize(
        ("structure", "arguments", "message"),
        [
            ("diagonal", {"granularity": "row"}, "granularity must be one of one, layer"),
            ("diagonal", {"method": "newton"}, "method must be one of mackay, gradient"),
            ("diagonal", {"steps": -1}, "steps must be a number >= 0"),
            ("diagonal", {"noise": True}, "noise=True: likelihood='categorical' has no noise"),
            ("kronecker", {"granularity": "weight"}, "needs structure='diagonal'"),
            ("ekfac", {"granularity": "unit"}, "ekfac has one precision a layer"),
        ],
    )
    def test_arguments(self, structure, arguments, message):
        with pytest.raises(ValueError, match=message):
            tune_prior(problem(structure), **arguments)
