"""Laplace approximations against dense matrices in float64, and what they refuse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adaptivenet.models.recurrent import lstm, lstm_init
from adaptivenet.models.transformer import transformer, transformer_init
from adaptivenet.posterior import gaussian
from adaptivenet.posterior.laplace import as_gaussian, laplace, log_likelihood

STRUCTURES = ["diagonal", "kronecker", "ekfac", "full"]


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def normal(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def parameters(outputs=3):
    return {
        "a": {"kernel": normal(3, 4, seed=2), "bias": normal(4, seed=3)},
        "b": {"kernel": normal(4, outputs, seed=4), "bias": normal(outputs, seed=5)},
        "scale": normal(4, seed=6),
    }


def net(p, x):
    hidden = jnp.tanh(x @ p["a"]["kernel"] + p["a"]["bias"]) * p["scale"]
    return hidden @ p["b"]["kernel"] + p["b"]["bias"]


def flat(tree):
    return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(tree)])


def exact(apply, params, x, likelihood, noise=1.0):
    """The generalised Gauss-Newton matrix by forward mode, example by example."""
    leaves, treedef = jax.tree.flatten(params)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def outputs(vector):
        parts = [p.reshape(v.shape) for p, v in zip(jnp.split(vector, ends), leaves, strict=True)]
        return apply(treedef.unflatten(parts), x)

    vector = jnp.concatenate([leaf.ravel() for leaf in leaves])
    out = np.asarray(jax.jit(outputs)(vector))
    J = np.asarray(jax.jit(jax.jacfwd(outputs))(vector)).reshape(*out.shape, -1)
    total = 0
    rows = out.reshape(-1, out.shape[-1]), J.reshape(-1, *J.shape[-2:])
    for logits, slope in zip(*rows, strict=True):
        if likelihood == "categorical":
            p = np.exp(logits - logits.max())
            p /= p.sum()
            H = np.diag(p) - np.outer(p, p)
        elif likelihood == "bernoulli":
            p = 1 / (1 + np.exp(-logits))
            H = np.diag(p * (1 - p))
        else:
            H = np.eye(len(logits)) / noise
        total = total + slope.T @ H @ slope
    return total


CASES = {
    "categorical": jnp.array([0, 2, 1, 1, 0]),
    "bernoulli": (np.random.default_rng(0).random((5, 3)) < 0.5).astype(float),
    "gaussian": np.random.default_rng(0).normal(size=(5, 3)),
}


class TestCurvature:
    @pytest.mark.parametrize("likelihood", list(CASES))
    def test_full_and_diagonal(self, likelihood, double):
        params, x = parameters(), normal(5, 3)
        options = {"noise": 0.5} if likelihood == "gaussian" else {}
        matrix = exact(net, params, x, likelihood, **options)
        options |= {"likelihood": likelihood, "prior_precision": 0.3}
        targets = jnp.asarray(CASES[likelihood])
        full = laplace(net, params, x, targets, structure="full", batch_size=2, **options)
        wanted = matrix + 0.3 * np.eye(len(matrix))
        np.testing.assert_allclose(full.gaussian.precision(), wanted, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(flat(full.posterior().precision), np.diag(wanted), rtol=1e-9)
        diagonal = laplace(net, params, x, targets, batch_size=3, **options)
        np.testing.assert_allclose(flat(diagonal.posterior().precision), np.diag(wanted), rtol=1e-9)
        np.testing.assert_array_equal(flat(diagonal.posterior().mean), flat(params))

    def test_predictions_at_every_step(self, double):
        """A readout by a tied embedding, attention, norms, and targets [examples, time]."""
        params = transformer_init(jax.random.key(0), 5, 3, width=2, heads=1, blocks=1, wide=3)
        params = jax.tree.map(lambda v: v.astype(float) + 0.3 * normal(*v.shape), params)
        x = jnp.array([[0, 3, 4], [1, 1, 2]])
        fit = laplace(transformer, params, x, x, likelihood="categorical")
        wanted = 1 + np.diag(exact(transformer, params, x, "categorical"))
        np.testing.assert_allclose(flat(fit.posterior().precision), wanted, rtol=1e-8)
        assert fit.count == 6

    def test_kernels_within_a_scan(self, double):
        params = lstm_init(jax.random.key(0), 1, 2, 2)
        params = jax.tree.map(lambda v: v.astype(float) + 0.1 * normal(*v.shape), params)
        x, targets = normal(4, 3, 1), jnp.array([0, 1, 1, 0])
        fit = laplace(lstm, params, x, targets, likelihood="categorical")
        wanted = 1 + np.diag(exact(lstm, params, x, "categorical"))
        np.testing.assert_allclose(flat(fit.posterior().precision), wanted, rtol=1e-8)

    @pytest.mark.parametrize("likelihood", list(CASES))
    def test_drawn_targets_are_unbiased(self, likelihood, double):
        params, x, targets = parameters(), normal(5, 3), jnp.asarray(CASES[likelihood])
        options = {"likelihood": likelihood, "prior_precision": 1e-9}
        diagonal = flat(laplace(net, params, x, targets, **options).posterior().precision)
        drawn = jax.jit(
            lambda key: laplace(net, params, x, targets, samples=3_000, key=key, **options)
        )(jax.random.key(0))
        got = flat(drawn.posterior().precision)
        # A sum of 5 x 3,000 squares; each class of relative deviations up to about 5.
        np.testing.assert_allclose(got, diagonal, rtol=0.25)
        assert np.abs(got / diagonal - 1).mean() < 0.06
        assert not np.allclose(got, diagonal, rtol=1e-6)

    def test_last_layer(self, double):
        params, x, targets = parameters(), normal(5, 3), CASES["categorical"]
        options = {"likelihood": "categorical"}
        fit = laplace(net, params, x, targets, structure="last_layer", **options)
        matrix = exact(net, params, x, "categorical")[16:31, 16:31]
        np.testing.assert_allclose(fit.gaussian.precision(), matrix + np.eye(15), atol=1e-10)
        belief = fit.posterior()
        assert isinstance(belief.mean["a"]["kernel"], optax.MaskedNode)
        assert isinstance(belief.precision["scale"], optax.MaskedNode)
        draw = fit.sample(jax.random.key(0))
        np.testing.assert_array_equal(draw["a"]["kernel"], params["a"]["kernel"])
        assert not np.allclose(draw["b"]["kernel"], params["b"]["kernel"])
        chosen = laplace(net, params, x, targets, structure="full", select="^b/", **options)
        np.testing.assert_allclose(chosen.gaussian.precision(), fit.gaussian.precision())
        first = laplace(net, params, x, targets, structure="full", select="^a/", **options)
        matrix = exact(net, params, x, "categorical")[:16, :16]
        np.testing.assert_allclose(first.gaussian.precision(), matrix + np.eye(16), atol=1e-10)


class TestConjugate:
    """Bayesian linear regression, where everything is known in closed form."""

    def regression(self):
        x, noise = normal(9, 3), 0.4
        params = {"kernel": jnp.zeros((3, 1)), "bias": jnp.zeros(1)}
        X = np.hstack([np.ones((9, 1)), np.asarray(x)])  # the bias is the first leaf
        y = normal(9, 1, seed=7)
        precision = X.T @ X / noise + 2.0 * np.eye(4)
        mean = np.linalg.solve(precision, X.T @ np.asarray(y) / noise)
        params = {"bias": jnp.asarray(mean[0]), "kernel": jnp.asarray(mean[1:])}
        return params, x, y, noise, mean.ravel(), precision

    @pytest.mark.parametrize("structure", ["kronecker", "ekfac", "full", "last_layer"])
    def test_posterior(self, structure, double):
        params, x, y, noise, mean, precision = self.regression()
        fit = laplace(
            lambda p, x: x @ p["kernel"] + p["bias"],
            params,
            x,
            y,
            likelihood="gaussian",
            prior_precision=2.0,
            noise=noise,
            structure=structure,
        )
        np.testing.assert_allclose(flat(fit.gaussian.mean), mean)
        np.testing.assert_allclose(
            flat(fit.gaussian.variances()), np.diag(np.linalg.inv(precision)), rtol=1e-9
        )
        wanted = np.linalg.slogdet(precision)[1]
        np.testing.assert_allclose(fit.gaussian.log_determinant(), wanted, rtol=1e-10)
        tree = {"bias": normal(1), "kernel": normal(3, 1)}
        np.testing.assert_allclose(
            flat(fit.gaussian.solve(tree)), np.linalg.solve(precision, flat(tree)), rtol=1e-8
        )

    def test_noise_may_change_afterwards(self, double):
        params, x, y, *_ = self.regression()

        def fit(noise, structure):
            return laplace(
                lambda p, x: x @ p["kernel"] + p["bias"],
                params,
                x,
                y,
                likelihood="gaussian",
                noise=noise,
                structure=structure,
            )

        for structure in STRUCTURES:
            a, b = fit(0.4, structure).with_noise(1.5), fit(1.5, structure)
            np.testing.assert_allclose(a.log_likelihood, b.log_likelihood, rtol=1e-10)
            np.testing.assert_allclose(
                flat(a.gaussian.variances()), flat(b.gaussian.variances()), rtol=1e-8
            )


class TestUse:
    @pytest.mark.parametrize("structure", STRUCTURES)
    def test_bfloat16_parameters(self, structure):
        params = jax.tree.map(lambda v: v.astype(jnp.bfloat16), parameters())
        x = normal(5, 3).astype(jnp.bfloat16)
        options = {"likelihood": "categorical", "structure": structure}
        fit = laplace(net, params, x, CASES["categorical"], **options)
        belief = fit.posterior()
        assert {v.dtype for v in jax.tree.leaves(belief.mean)} == {jnp.dtype(jnp.bfloat16)}
        assert {v.dtype for v in jax.tree.leaves(belief.precision)} == {jnp.dtype(jnp.float32)}
        assert all((v >= 1).all() for v in jax.tree.leaves(belief.precision))
        draw = fit.sample(jax.random.key(0))
        assert {v.dtype for v in jax.tree.leaves(draw)} == {jnp.dtype(jnp.bfloat16)}

    def test_jit_and_find(self):
        params, x, targets = parameters(), normal(5, 3), CASES["categorical"]
        for structure in ("diagonal", "full"):
            fit = laplace(net, params, x, targets, likelihood="categorical", structure=structure)
            inside = jax.jit(
                lambda p, x, d, s=structure: laplace(
                    net, p, x, targets, likelihood="categorical", structure=s, prior_precision=d
                )
            )(params, x, 1.0)
            a, b = flat(fit.gaussian.variances()), flat(inside.gaussian.variances())
            np.testing.assert_allclose(a, b, rtol=1e-4)
            found = gaussian.find((fit,), params)
            np.testing.assert_array_equal(flat(found.precision), flat(fit.posterior().precision))

    def test_posteriors_are_gaussians(self):
        masked = optax.MaskedNode()
        belief = gaussian.Posterior(
            {"a": jnp.ones(2), "b": masked}, {"a": jnp.full(2, 4.0), "b": masked}
        )
        with pytest.raises(ValueError, match="masked leaves: give the parameters"):
            as_gaussian(belief)
        params = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
        found = as_gaussian(belief, params)
        assert found.dimension == 2
        draw = found.sample(jax.random.key(0))
        assert draw["b"].tolist() == [0.0] * 3
        np.testing.assert_allclose(found.log_determinant(), 2 * np.log(4.0), rtol=1e-6)
        with pytest.raises(TypeError, match="not dict"):
            as_gaussian(params)


class TestErrors:
    def fit(self, targets, apply=net, x=None, params=None, **options):
        options = {"likelihood": "categorical", **options}
        x = normal(5, 3) if x is None else x
        return laplace(apply, parameters() if params is None else params, x, targets, **options)

    @pytest.mark.parametrize(
        ("likelihood", "targets", "message"),
        [
            ("categorical", jnp.zeros((5, 3)), r"needs whole class numbers \(5,\)"),
            ("categorical", jnp.zeros((5, 1), int), r"whole class numbers \(5,\)"),
            ("categorical", jnp.array([0, 1, 2, 3, 0]), "class numbers from 0 to 2"),
            ("categorical", jnp.zeros(4, int), r"5 examples need as many targets, not \(4,\)"),
            ("bernoulli", jnp.zeros(5), r"targets of the outputs' shape \(5, 3\)"),
            ("bernoulli", jnp.full((5, 3), 1.5), r"targets in \[0, 1\]"),
            ("gaussian", jnp.zeros((5,), int), r"targets of the outputs' shape \(5, 3\)"),
            ("gaussian", jnp.zeros((5, 3), int), "needs floating targets"),
            ("poisson", jnp.zeros(5), "likelihood must be one of categorical, bernoulli, gaussian"),
        ],
    )
    def test_heads_that_do_not_match(self, likelihood, targets, message):
        with pytest.raises(ValueError, match=message):
            self.fit(targets, likelihood=likelihood)

    def test_one_logit_is_no_class(self):
        with pytest.raises(ValueError, match="use 'bernoulli' for one logit"):
            self.fit(jnp.zeros(5, int), params=parameters(1))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"structure": "sparse"}, "structure must be one of diagonal, kronecker"),
            ({"samples": 2}, "samples= and key= go together"),
            ({"samples": 0, "key": jax.random.key(0)}, "samples must be a number of draws >= 1"),
            ({"noise": 0.5}, "noise=0.5 is for likelihood='gaussian'"),
            ({"noise": -1.0}, "noise must be positive and finite, not -1.0"),
            ({"prior_precision": -1.0}, "prior precision of 'a/bias' must be positive"),
            ({"batch_size": 0}, "batch_size must be a number of examples"),
            ({"select": "nothing"}, "select='nothing' matches no leaf"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            self.fit(CASES["categorical"], **options)

    def test_examples_that_depend_on_each_other(self):
        def apply(p, x):
            return net(p, x - x.mean(axis=0))

        with pytest.raises(ValueError, match="changes with the others in the batch"):
            self.fit(CASES["categorical"], apply)

    def test_numbers_that_are_not_finite(self):
        params = parameters()
        params["scale"] = params["scale"].at[0].set(jnp.nan)
        with pytest.raises(ValueError, match="log likelihood of the data is not finite"):
            self.fit(CASES["categorical"], params=params)

    def test_a_matrix_too_large(self):
        params, x = {"w": jnp.zeros((200, 101))}, jnp.zeros((1, 200))
        with pytest.raises(ValueError, match="full matrix of 20200 parameters takes 2 GB"):
            self.fit(jnp.zeros(1, int), lambda p, x: x @ p["w"], x, params, structure="full")

    def test_a_precision_that_is_not_positive(self):
        params, x = {"w": jnp.zeros((2, 1))}, jnp.full((4, 2), 1e6)
        with pytest.raises(ValueError, match="not positive in this floating dtype"):
            self.fit(
                jnp.zeros((4, 1)),
                lambda p, x: x @ p["w"],
                x,
                params,
                likelihood="gaussian",
                structure="full",
                prior_precision=1e-6,
            )

    def test_no_noise_but_of_regression(self):
        with pytest.raises(ValueError, match="likelihood='categorical' has no noise"):
            self.fit(CASES["categorical"]).with_noise(2.0)


def test_log_likelihoods():
    logits, labels = normal(4, 3), jnp.array([0, 2, 1, 1])
    expected = -optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()
    np.testing.assert_allclose(log_likelihood("categorical", logits, labels), expected, rtol=1e-5)
    halves = jnp.array([[0.0, 1.0, 0.5]] * 4)
    expected = -optax.sigmoid_binary_cross_entropy(logits, halves).sum()
    np.testing.assert_allclose(log_likelihood("bernoulli", logits, halves), expected, rtol=1e-5)
    logs = jax.scipy.stats.norm.logpdf(halves, logits, jnp.sqrt(0.3)).sum()
    np.testing.assert_allclose(log_likelihood("gaussian", logits, halves, 0.3), logs, rtol=1e-5)
