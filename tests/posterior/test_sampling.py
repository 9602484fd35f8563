"""Samplers against their exact stationary laws, and summaries against slow versions.

The tests of NUTS and HMC need BlackJAX (the extra ``bayes``) and are skipped without it.
"""

from __future__ import annotations

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

from adaptivenet.posterior import Posterior, sampling

MEAN, VARIANCE = {"a": 2.0, "b": -1.0}, {"a": 0.25, "b": 4.0}
START = {"a": jnp.zeros((2, 250)), "b": jnp.zeros(500)}
KEY = jax.random.key(0)


def gaussian(params):
    """Independent Gaussians, a mean and a variance for each leaf."""
    return -sum(
        0.5 * jnp.sum(jnp.square(params[name] - MEAN[name])) / VARIANCE[name] for name in params
    )


def run(kind="sgld", start=START, density=gaussian, key=KEY, **options):
    options = {"samples": 40, "warmup": 400, "thin": 20, "step_size": 0.1} | options
    return sampling.sample_posterior(density, start, key, kind, **options)


def check_law(draws, mean, variance):
    """Mean and variance within five standard errors; the elements are independent chains."""
    means, squares = draws.mean(0).ravel(), ((draws - mean) ** 2).mean(0).ravel()
    for values, expected in ((means, mean), (squares, variance)):
        error = values.std(ddof=1) / np.sqrt(values.size)
        assert abs(values.mean() - expected) < 5 * error, (values.mean(), expected, error)
        assert error < 0.05 * np.sqrt(variance) * max(1.0, np.sqrt(variance))


class TestStationaryLaws:
    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_langevin(self, temperature):
        draws, report = run("sgld", temperature=temperature)
        for name, x in draws.items():
            assert x.shape == (40, *START[name].shape)
            v = VARIANCE[name]
            check_law(np.asarray(x, float), MEAN[name], temperature * v / (1 - 0.1 / (2 * v)))
        assert report.acceptance is None
        assert not report.divergent.any()
        assert report.gradients.tolist() == [20] * 40

    @pytest.mark.parametrize(("friction", "temperature"), [(1.0, 1.0), (3.0, 0.5)])
    def test_hamiltonian(self, friction, temperature):
        h = 0.2
        draws, _ = run("sghmc", step_size=h, friction=friction, temperature=temperature)
        for name, x in draws.items():
            slope = 1 / VARIANCE[name]
            # theta' = theta + h r; r' = (1 - h C) r - h slope theta' + noise.
            matrix = np.array([[1, h], [-h * slope, 1 - h * friction - h * h * slope]])
            noise = np.diag([0, 2 * h * friction * temperature])
            law = scipy.linalg.solve_discrete_lyapunov(matrix, noise)
            check_law(np.asarray(x, float), MEAN[name], law[0, 0])

    def test_minibatches_add_the_noise_of_their_gradients(self):
        # Data x_i ~ N(theta, 1), prior N(0, 1): a Gaussian posterior of precision n + 1.
        n, batch, h = 50, 10, 0.004
        data = np.random.default_rng(0).normal(3.0, 1.0, n).astype(np.float32)

        def likelihood(theta, x):
            return -0.5 * jnp.sum(jnp.square(x[:, None] - theta), 1)

        def prior(theta):
            return -0.5 * jnp.sum(jnp.square(theta))

        density = sampling.log_posterior(likelihood, prior, n)
        # The copies share their mini-batches, so chains are what is independent.
        keys = jax.random.split(KEY, 200)
        draws, _ = jax.vmap(
            lambda key: run("sgld", jnp.zeros(1), density, key, step_size=h, data=data,
                            batch_size=batch)
        )(keys)  # fmt: skip
        of_gradient = n**2 / batch * data.astype(float).var()
        variance = (2 * h + h**2 * of_gradient) / (1 - (1 - h * (n + 1)) ** 2)
        assert variance > 1.3 / (n + 1)
        check_law(np.asarray(draws[..., 0], float).T, data.astype(float).sum() / (n + 1), variance)


class TestChains:
    @pytest.mark.parametrize("kind", ["sgld", "sghmc"])
    def test_without_heat_it_is_a_recursion(self, kind):
        def schedule(step):
            return 0.1 / (1.0 + step.astype(jnp.float32))

        start = {"a": jnp.array([1.0, -3.0])}
        draws, report = run(
            kind, start, temperature=0.0, samples=4, warmup=3, thin=2, step_size=schedule
        )

        def slope(x):
            return (MEAN["a"] - x) / VARIANCE["a"]

        x, r, kept, sizes = np.array([1.0, -3.0]), np.zeros(2), [], []
        for step in range(3 + 4 * 2):
            h = 0.1 / (1 + step)
            if kind == "sgld":
                x = x + h * slope(x)
            else:
                x = x + h * r
                r = r + h * (slope(x) - 1.0 * r)
            if step >= 3 and (step - 3) % 2 == 1:
                kept.append(x)
                sizes.append(h)
        np.testing.assert_allclose(draws["a"], kept, rtol=1e-5)
        np.testing.assert_allclose(report.step_size, sizes, rtol=1e-6)
        expected = [gaussian({"a": jnp.asarray(x, jnp.float32)}) for x in kept]
        np.testing.assert_allclose(report.log_density, expected, rtol=1e-4)

    def test_keys_decide(self):
        small = {"b": jnp.zeros(3)}
        short = functools.partial(run, start=small, samples=5, warmup=2, thin=1)
        once, again, other = short(), short(), short(key=jax.random.key(1))
        np.testing.assert_array_equal(once[0]["b"], again[0]["b"])
        assert not np.isclose(once[0]["b"], other[0]["b"]).any()

    def test_a_population_over_keys_and_step_sizes(self):
        small = {"b": jnp.zeros(3)}

        def one(key, size):
            return run("sghmc", small, key=key, step_size=size, samples=5, warmup=2, thin=1)

        keys, sizes = jax.random.split(KEY, 2), jnp.array([0.1, 0.3])
        together = jax.jit(jax.vmap(one))(keys, sizes)
        for i in range(2):
            alone = one(keys[i], sizes[i])
            for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
                np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-6)

    def test_small_floats_are_sampled_as_single_and_masked_nodes_stay(self):
        start = {"a": jnp.zeros(3, jnp.bfloat16), "b": optax.MaskedNode()}

        def density(params):
            assert params["a"].dtype == jnp.float32
            return -jnp.sum(jnp.square(params["a"]))

        draws, _ = run("sgld", start, density, samples=3, warmup=0, thin=1)
        assert draws["a"].dtype == jnp.float32
        assert draws["b"] == optax.MaskedNode()
        belief = sampling.moments(draws)
        assert belief.precision["b"] == optax.MaskedNode()

    def test_a_chain_that_explodes_is_divergent(self):
        _, report = run("sgld", step_size=100.0)
        assert report.divergent[-1]


class TestWhatIsRefused:
    def test_kinds_counts_and_options(self):
        with pytest.raises(
            ValueError, match="kind must be one of nuts, hmc, sgld, sghmc, not 'mh'"
        ):
            run("mh")
        for name, value in (("samples", 0), ("warmup", -1), ("thin", 1.5), ("samples", True)):
            with pytest.raises(ValueError, match=f"{name} must be an integer >="):
                run(**{name: value})
        with pytest.raises(TypeError, match="sgld has no option 'friction'; it has batch_size"):
            run("sgld", friction=1.0)
        with pytest.raises(TypeError, match="nuts has no option 'integration_steps'"):
            run("nuts", integration_steps=3)
        with pytest.raises(ValueError, match="sgld needs step_size="):
            run("sgld", step_size=None)
        for options in ({"step_size": 0.0}, {"step_size": np.nan}, {"friction": 0.0}):
            with pytest.raises(ValueError, match=f"{next(iter(options))} must be > 0"):
                run("sghmc", **options)
        with pytest.raises(ValueError, match="temperature must be >= 0"):
            run("sgld", temperature=-1.0)
        with pytest.raises(ValueError, match=r"step_size must be a scalar, not of shape \(2,\)"):
            run("sgld", step_size=jnp.ones(2))

    def test_parameters_and_densities(self):
        with pytest.raises(TypeError, match="leaf 'a/n' of params has dtype int32"):
            run(start={"a": {"n": jnp.arange(3), "w": jnp.zeros(3)}})
        with pytest.raises(ValueError, match="params have no leaves"):
            run(start={"a": optax.MaskedNode()})
        with pytest.raises(ValueError, match=r"one floating number, not \(500,\); sum over it"):
            run(density=lambda params: -jnp.square(params["b"]))
        with pytest.raises(ValueError, match=r"the log density is -?nan at params"):
            run(density=lambda params: jnp.sum(jnp.log(params["b"] - 1.0)))

    def test_data(self):
        def density(params, batch):
            return jnp.sum(params["b"]) + jnp.sum(batch)

        with pytest.raises(ValueError, match="data= and batch_size= go together"):
            run(density=density, data=jnp.ones(3))
        with pytest.raises(ValueError, match="data= must hold arrays of one leading axis"):
            run(density=density, data=(jnp.ones(3), jnp.ones(4)), batch_size=2)
        with pytest.raises(ValueError, match="data= must hold arrays of one leading axis"):
            run(density=density, data=jnp.ones(()), batch_size=2)
        with pytest.raises(ValueError, match="batch_size must be an integer >= 1"):
            run(density=density, data=jnp.ones(3), batch_size=0)
        with pytest.raises(ValueError, match="size must be the number of examples"):
            sampling.log_posterior(density, gaussian, 0)
        wrong = sampling.log_posterior(lambda w, x: jnp.sum(x - w), jnp.sum, 10)
        with pytest.raises(ValueError, match=r"one number an example, \[batch\], not .* \(\)"):
            wrong(jnp.zeros(()), jnp.ones(3))

    @pytest.mark.parametrize("kind", ["nuts", "hmc"])
    def test_without_blackjax_the_message_says_what_to_do(self, kind, monkeypatch):
        monkeypatch.setitem(sys.modules, "blackjax", None)
        with pytest.raises(ImportError, match=r"pip install 'adaptivenet\[bayes\]'.*sgld") as error:
            run(kind)
        assert error.value.name == "blackjax"


class TestMoments:
    def test_against_numpy(self):
        rng = np.random.default_rng(0)
        draws = {"a": rng.normal(100.0, 0.1, (50, 2, 3)), "b": rng.normal(size=50)}
        draws = {name: x.astype(np.float32) for name, x in draws.items()}
        belief = sampling.moments(draws)
        assert isinstance(belief, Posterior)
        for name, x in draws.items():
            x = x.astype(float)
            np.testing.assert_allclose(belief.mean[name], x.mean(0), rtol=1e-6)
            np.testing.assert_allclose(belief.precision[name], 1 / x.var(0, ddof=1), rtol=1e-3)

    def test_what_never_moved_has_the_precision_of_the_floor(self):
        draws = jnp.stack([jnp.ones(20), jnp.arange(20.0)], 1)
        assert sampling.moments(draws).precision[0] == pytest.approx(1e10)
        floors = jax.vmap(lambda floor: sampling.moments(draws, floor=floor).precision)(
            jnp.array([0.5, 100.0])
        )
        np.testing.assert_allclose(floors, [[2, 1 / 35], [0.01, 0.01]], rtol=1e-5)

    def test_what_is_refused(self):
        with pytest.raises(ValueError, match=r"leaf 'w' of samples needs .* n >= 2, not \(1, 3\)"):
            sampling.moments({"w": jnp.ones((1, 3))})
        with pytest.raises(ValueError, match=r"leaf 'b' has shape \(4,\), but 'a' has \(3,\)"):
            sampling.moments({"a": jnp.ones(3), "b": jnp.ones(4)})
        with pytest.raises(TypeError, match="leaf 'a' of samples has dtype int32"):
            sampling.moments({"a": jnp.arange(3)})
        with pytest.raises(ValueError, match="floor must be a variance > 0"):
            sampling.moments(jnp.ones(3), floor=0.0)


class TestConvergence:
    @staticmethod
    def autoregressive(rho, n=1_000, chains=64):
        rng = np.random.default_rng(0)
        rows = [rng.normal(size=chains)]
        for _ in range(n - 1):
            rows.append(rho * rows[-1] + np.sqrt(1 - rho**2) * rng.normal(size=chains))
        return np.array(rows, np.float32)

    @pytest.mark.parametrize("rho", [-0.5, 0.0, 0.5, 0.9])
    def test_effective_size_of_an_autoregressive_chain(self, rho):
        x = self.autoregressive(rho)
        got = np.asarray(sampling.effective_size({"x": x})["x"])
        expected = 1_000 * (1 - rho) / (1 + rho)
        assert np.median(got) == pytest.approx(expected, rel=0.12)
        # What it stands for: the variance of the mean is variance / effective size.
        assert 1 / np.square(x.mean(0, dtype=float)).mean() == pytest.approx(expected, rel=0.5)

    def test_effective_size_against_a_slow_sum(self):
        x = self.autoregressive(0.7, n=101, chains=3)
        for got, chain in zip(sampling.effective_size(x), x.T.astype(float), strict=True):
            centred = chain - chain.mean()
            rho = [np.sum(centred[: 101 - k] * centred[k:]) for k in range(101)] / np.sum(
                centred**2
            )
            total, last = 0.0, np.inf
            for k in range(0, 100, 2):
                last = min(last, rho[k] + rho[k + 1])
                if last <= 0:
                    break
                total += last
            np.testing.assert_allclose(got, 101 / (2 * total - 1), rtol=1e-4)

    def test_what_never_moved_has_none(self):
        assert np.isnan(sampling.effective_size(jnp.full(100, 0.1)))
        with pytest.raises(ValueError, match="n >= 4"):
            sampling.effective_size(jnp.ones(3))

    def test_split_r_hat_against_a_slow_version(self):
        x = np.random.default_rng(0).normal(size=(3, 41, 2)).astype(np.float32)
        x[1, :, 1] += 2.0
        got = sampling.split_r_hat({"x": x})["x"]
        for j in range(2):
            halves = [part for c in range(3) for part in (x[c, :20, j], x[c, 21:, j])]
            within = np.mean([np.var(part, ddof=1) for part in halves])
            between = 20 * np.var([np.mean(part) for part in halves], ddof=1)
            expected = np.sqrt((19 / 20 * within + between / 20) / within)
            np.testing.assert_allclose(got[j], expected, rtol=1e-5)
        assert got[0] < 1.1 < got[1]
        trend = np.linspace(0, 5, 100, dtype=np.float32)[None]
        assert sampling.split_r_hat(trend) > 1.5
        with pytest.raises(ValueError, match=r"needs \[chains, n, ...\] .* give x\[None\]"):
            sampling.split_r_hat(trend[0])


class TestBlackJAX:
    """NUTS and HMC: skipped where the extra ``bayes`` is not installed."""

    @pytest.fixture(autouse=True)
    def _blackjax(self):
        self.blackjax = pytest.importorskip("blackjax", reason="needs the extra bayes")
        with jax.numpy_dtype_promotion("standard"):
            yield

    START = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(6)}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("kind", "options"), [("nuts", {}), ("hmc", {"thin": 2, "integration_steps": 3})]
    )
    def test_moments_of_independent_gaussians(self, kind, options):
        draws, report = sampling.sample_posterior(
            gaussian, self.START, KEY, kind, samples=1_000, warmup=300, **options
        )
        assert not report.divergent.any()
        assert 0.6 < report.acceptance.mean() < 0.99
        assert (report.gradients >= options.get("thin", 1)).all()
        assert (report.step_size == report.step_size[0]).all()
        expected = gaussian(jax.tree.map(lambda x: x[-1], draws))
        np.testing.assert_allclose(report.log_density[-1], expected, rtol=1e-4)
        belief = sampling.moments(draws)
        for name, x in draws.items():
            size = np.asarray(sampling.effective_size(x))
            assert size.min() > 150
            error = np.sqrt(VARIANCE[name] / size)
            assert (np.abs(belief.mean[name] - MEAN[name]) < 5 * error).all()
            ratio = VARIANCE[name] * np.asarray(belief.precision[name])
            np.testing.assert_allclose(ratio.mean(), 1.0, atol=0.1)

    def test_marginals_of_conjugate_linear_regression(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(30, 4)).astype(np.float32)
        x[:, 1] += x[:, 0]  # correlated weights
        y = (x @ [1.0, -1.0, 0.5, 0.0] + 0.5 * rng.normal(size=30)).astype(np.float32)
        precision = x.T.astype(float) @ x / 0.25 + np.eye(4)
        covariance = np.linalg.inv(precision)
        mean = covariance @ x.T.astype(float) @ y / 0.25

        def density(w):
            return -2.0 * jnp.sum(jnp.square(y - x @ w)) - 0.5 * jnp.sum(jnp.square(w))

        def chain(key):
            return sampling.sample_posterior(density, jnp.zeros(4), key, samples=1_000, warmup=300)

        draws, report = jax.jit(jax.vmap(chain))(jax.random.split(KEY, 4))
        assert not report.divergent.any()
        assert (sampling.split_r_hat(draws) < 1.02).all()
        belief = sampling.moments(draws.reshape(-1, 4))
        deviation = np.sqrt(np.diag(covariance))
        assert (np.abs(belief.mean - mean) < 0.15 * deviation).all()
        np.testing.assert_allclose(belief.precision * np.diag(covariance), np.ones(4), atol=0.12)

    def test_without_warmup_the_step_size_is_the_one_given(self):
        draws, report = sampling.sample_posterior(
            gaussian, self.START, KEY, "hmc", samples=5, warmup=0, step_size=0.1,
            integration_steps=7,
        )  # fmt: skip
        assert draws["b"].shape == (5, 6)
        np.testing.assert_allclose(report.step_size, np.full(5, 0.1), rtol=1e-6)
        assert report.gradients.tolist() == [7] * 5

    def test_langevin_steps_are_those_of_blackjax(self):
        kernel = self.blackjax.sgld(lambda position, batch: jax.grad(gaussian)(position))
        start = {"a": jnp.ones(3), "b": jnp.ones(2)}
        draws, _ = run("sgld", start, temperature=0.0, samples=6, warmup=0, thin=1)
        position = start
        for i in range(6):
            position = kernel.step(KEY, position, (), 0.1, 0.0)
            for name in start:
                np.testing.assert_allclose(draws[name][i], position[name], rtol=1e-5)

    def test_effective_size_is_near_that_of_blackjax(self):
        x = TestConvergence.autoregressive(0.6)
        theirs = self.blackjax.ess(x[None], 0, 1)
        np.testing.assert_allclose(
            np.median(sampling.effective_size(x)), np.median(theirs), rtol=0.1
        )

    def test_what_is_refused(self):
        with pytest.raises(ValueError, match="nuts without warm-up needs step_size="):
            sampling.sample_posterior(gaussian, self.START, KEY, warmup=0)
        with pytest.raises(ValueError, match="nuts adapts its step size"):
            run("nuts", self.START, step_size=lambda step: 0.1)
        with pytest.raises(ValueError, match="integration_steps must be an integer >= 1"):
            run("hmc", self.START, integration_steps=0)
        with pytest.raises(ValueError, match=r"the log density is -?nan at params"):
            run("nuts", self.START, lambda p: jnp.sum(jnp.log(p["b"] - 1.0)))
