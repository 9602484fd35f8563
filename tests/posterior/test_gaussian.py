"""Beliefs against numerical integration and conjugate regression."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adaptivenet import trees
from adaptivenet.posterior import gaussian
from adaptivenet.posterior.gaussian import Posterior

GONE = optax.MaskedNode()


def one(mean, precision, dtype=jnp.float32):
    """A belief of a single leaf."""
    return Posterior({"w": jnp.asarray(mean, dtype)}, {"w": jnp.asarray(precision, jnp.float32)})


def two(m=0.5, s=2.0):
    """A belief of two leaves, and of a third nothing."""
    mean = {"a": jnp.full((2, 3), m), "b": jnp.array([-m]), "c": GONE}
    return Posterior(mean, jax.tree.map(lambda leaf: jnp.full_like(leaf, s), mean))


def density(x, mean, precision):
    return np.sqrt(precision / (2 * np.pi)) * np.exp(-0.5 * precision * (x - mean) ** 2)


def integrate(values, grid):
    return float(np.sum(0.5 * (values[1:] + values[:-1]) * np.diff(grid)))


numbers = st.floats(-3, 3)
precisions = st.floats(0.1, 10)


class TestAgainstIntegrals:
    GRID = np.linspace(-40, 40, 40_001)

    @hypothesis.given(numbers, precisions, numbers, precisions)
    @hypothesis.settings(max_examples=25)
    def test_divergence_and_entropy(self, m, s, n, t):
        p = density(self.GRID, m, s)
        log_p = 0.5 * np.log(s / 2 / np.pi) - 0.5 * s * (self.GRID - m) ** 2
        log_q = 0.5 * np.log(t / 2 / np.pi) - 0.5 * t * (self.GRID - n) ** 2
        got = gaussian.kl(one([m], [s]), one([n], [t]))
        expected = integrate(p * (log_p - log_q), self.GRID)
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
        got = gaussian.entropy(one([m], [s]))
        np.testing.assert_allclose(got, -integrate(p * log_p, self.GRID), rtol=1e-5, atol=1e-5)

    @hypothesis.given(numbers, precisions, numbers, precisions, st.floats(0.2, 5))
    @hypothesis.settings(max_examples=25)
    def test_products_quotients_and_powers(self, m, s, n, t, temperature):
        p, q = one([m], [s]), one([n], [t])
        values = density(self.GRID, m, s) * density(self.GRID, n, t)
        values /= integrate(values, self.GRID)
        both = gaussian.product(p, q)
        mean = integrate(values * self.GRID, self.GRID)
        variance = integrate(values * (self.GRID - mean) ** 2, self.GRID)
        np.testing.assert_allclose(both.mean["w"], [mean], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(both.precision["w"], [1 / variance], rtol=1e-4)
        back = gaussian.quotient(both, q)
        np.testing.assert_allclose(back.mean["w"], [m], rtol=1e-3, atol=2e-3)
        np.testing.assert_allclose(back.precision["w"], [s], rtol=1e-3)
        cold = gaussian.temper(p, temperature)
        values = density(self.GRID, m, s) ** (1 / temperature)
        values /= integrate(values, self.GRID)
        point = 0.3
        np.testing.assert_allclose(
            gaussian.log_density(cold, {"w": jnp.array([point])}),
            np.log(np.interp(point, self.GRID, values)),
            rtol=1e-3,
            atol=1e-3,
        )


class TestNumbers:
    def test_sums_run_over_all_leaves(self):
        p, q = two(0.5, 2.0), two(-1.0, 3.0)
        single, other = one([0.5], [2.0]), one([-1.0], [3.0])
        np.testing.assert_allclose(gaussian.kl(p, q), 7 * gaussian.kl(single, other), rtol=1e-6)
        np.testing.assert_allclose(gaussian.entropy(p), 7 * gaussian.entropy(single), rtol=1e-6)
        point = {"a": jnp.ones((2, 3)), "b": jnp.array([-1.0]), "c": jnp.ones(4)}
        np.testing.assert_allclose(
            gaussian.log_density(p, point),
            7 * gaussian.log_density(single, {"w": jnp.ones(1)}),
            rtol=1e-6,
        )

    def test_nearly_equal_beliefs_keep_their_digits(self):
        """The divergence of a relative difference d of precisions is d^2 / 4."""
        d = 2.0**-9
        got = gaussian.kl(one([1.0], [1.0]), one([1.0], [1.0 + d]))
        np.testing.assert_allclose(got, 0.5 * (d - np.log1p(d)), rtol=1e-3)
        assert gaussian.kl(two(), two()).item() == 0.0

    def test_signal_to_noise_and_damage(self):
        p = two(0.5, 4.0)
        snr, obd = gaussian.snr(p), gaussian.obd(p)
        assert trees.is_masked(snr["c"])
        np.testing.assert_allclose(snr["a"], np.full((2, 3), 1.0))
        np.testing.assert_allclose(snr["b"], [1.0])
        for name in ("a", "b"):
            np.testing.assert_allclose(np.square(snr[name]), 2 * obd[name], rtol=1e-6)
        # What is known to be irrelevant has no signal.
        assert gaussian.snr(one([2.0], [0.0]))["w"].tolist() == [0.0]

    def test_nothing_believed_is_zero(self):
        nothing = Posterior({"w": GONE}, {"w": GONE})
        assert gaussian.entropy(nothing).item() == 0.0
        assert gaussian.kl(nothing, nothing).item() == 0.0
        assert gaussian.product(nothing, nothing) == nothing

    def test_low_precision_parameters(self):
        p = one([0.1, 1.0], [3.0, 1e4], jnp.bfloat16)
        assert gaussian.snr(p)["w"].dtype == jnp.float32
        assert gaussian.kl(p, one([0.0, 0.0], [1.0, 1.0])).dtype == jnp.float32
        assert gaussian.sample(jax.random.key(0), p)["w"].dtype == jnp.bfloat16
        assert gaussian.product(p, p).mean["w"].dtype == jnp.bfloat16
        assert gaussian.isotropic(p.mean, 2.0).mean["w"].dtype == jnp.float32

    def test_double_precision_is_kept(self):
        with jax.enable_x64(True):
            w = {"w": jnp.array([1.0 + 1e-12], jnp.float64)}
            p = Posterior(w, {"w": jnp.ones(1, jnp.float64)})
            q = Posterior({"w": jnp.ones(1, jnp.float64)}, {"w": jnp.ones(1, jnp.float32)})
            assert gaussian.isotropic(w, 1.0).precision["w"].dtype == jnp.float64
            np.testing.assert_allclose(gaussian.kl(p, q), 0.5e-24, rtol=1e-3)


class TestDraws:
    def test_moments(self):
        p = Posterior(
            {"a": jnp.array([1.0, -2.0]), "b": jnp.zeros(2), "c": GONE},
            {"a": jnp.array([1.0, 100.0]), "b": jnp.array([4.0, 4.0]), "c": GONE},
        )
        number = 20_000
        keys = jax.random.split(jax.random.key(0), number)
        draws = jax.jit(jax.vmap(gaussian.sample, (0, None)))(keys, p)
        for name in ("a", "b"):
            spread = 1 / np.sqrt(p.precision[name])
            error = (draws[name].mean(0) - p.mean[name]) / spread * np.sqrt(number)
            assert np.all(np.abs(error) < 4.5)
            np.testing.assert_allclose(draws[name].std(0), spread, rtol=0.03)
        # Neither elements nor leaves share their noise.
        together = np.concatenate([draws["a"], draws["b"]], 1)
        off = np.corrcoef(together.T) - np.eye(4)
        assert np.all(np.abs(off) < 0.04)

    def test_same_key_same_draw_and_the_rest_from_the_parameters(self):
        p, key = two(), jax.random.key(3)
        params = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(1), "c": jnp.arange(4)}
        alone, whole = gaussian.sample(key, p), gaussian.sample(key, p, params)
        assert trees.is_masked(alone["c"])
        np.testing.assert_array_equal(alone["a"], whole["a"])
        np.testing.assert_array_equal(whole["c"], np.arange(4))

    def test_the_density_at_draws_is_minus_the_entropy_on_average(self):
        p = two(1.0, 7.0)
        keys = jax.random.split(jax.random.key(1), 4_000)
        densities = jax.vmap(lambda k: gaussian.log_density(p, gaussian.sample(k, p)))(keys)
        error = densities.mean() + gaussian.entropy(p)
        assert abs(error) < 4.5 * densities.std() / np.sqrt(4_000)


class TestPriors:
    def test_conjugate_regression(self):
        """Bayesian linear regression on orthogonal inputs has a diagonal posterior, exactly."""
        rng = np.random.default_rng(0)
        x = np.linalg.qr(rng.normal(size=(50, 4)))[0] * np.array([1.0, 3.0, 5.0, 9.0])
        y = x @ np.array([1.0, -1.0, 0.5, 0.0]) + rng.normal(size=50)
        alpha = 0.7
        precision = x.T @ x + alpha * np.eye(4)
        mode = np.linalg.solve(precision, x.T @ y)
        w = {"w": jnp.asarray(mode, jnp.float32)}
        summed = {"w": jnp.asarray(np.sum(x**2, 0), jnp.float32)}
        averaged = {"w": jnp.asarray(np.mean(x**2, 0), jnp.float32)}
        for got in (
            gaussian.calibrate(w, summed, prior=alpha),
            gaussian.calibrate(w, averaged, prior=alpha, examples=50),
        ):
            np.testing.assert_allclose(got.precision["w"], np.diag(precision), rtol=1e-5)
            np.testing.assert_allclose(got.mean["w"], mode, rtol=1e-6)
        # Without its prior it is the likelihood, whose mode is that of least squares.
        prior = gaussian.isotropic(w, alpha)
        likelihood = gaussian.quotient(got, prior)
        least = np.linalg.lstsq(x, y, rcond=None)[0]
        np.testing.assert_allclose(likelihood.mean["w"], least, rtol=1e-4, atol=1e-5)

    def test_decay_in_a_mean_loss_is_a_prior_times_examples(self):
        """The mode of mean loss + decay/2 |w|^2 is that of the belief with prior N decay."""
        x, y, decay = np.array([1.0, 2.0, 3.0]), np.array([1.0, 1.0, 2.0]), 0.3
        mode = np.mean(x * y) / (np.mean(x * x) + decay)
        likelihood = one([np.sum(x * y) / np.sum(x * x)], [np.sum(x * x)])
        prior = gaussian.isotropic({"w": jnp.zeros(1)}, len(x) * decay)
        np.testing.assert_allclose(gaussian.product(prior, likelihood).mean["w"], [mode], rtol=1e-6)

    def test_a_prior_for_each_layer_and_unit(self):
        params = {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "b": jnp.ones(2)}
        prior = {"a": {"kernel": jnp.array([1.0, 2.0, 3.0]), "bias": 4.0}, "b": 5.0}
        got = gaussian.isotropic(params, prior, mean=1.5)
        assert got.precision["a"]["kernel"].tolist() == [[1.0, 2.0, 3.0]] * 2
        assert got.precision["a"]["bias"].tolist() == [4.0] * 3
        assert got.mean["b"].tolist() == [1.5, 1.5]
        got = gaussian.isotropic(params, {"a": 2.0, "b": 5.0})
        assert got.precision["a"]["kernel"].tolist() == [[2.0] * 3] * 2
        got = gaussian.calibrate(params, got.precision, prior={"a": 1.0, "b": 2.0}, examples=3)
        assert got.precision["a"]["bias"].tolist() == [7.0] * 3
        assert got.precision["b"].tolist() == [17.0] * 2

    def test_masked_leaves_pass_through(self):
        params = {"w": jnp.ones(2), "ids": jnp.arange(3), "gone": GONE}
        prior = gaussian.isotropic(params, 2.0)
        assert trees.paths(prior.mean) == trees.paths(prior.precision) == ("w",)
        curvature = {"w": GONE, "ids": GONE, "gone": GONE}
        got = gaussian.calibrate(params, curvature, prior=1.0)
        assert trees.paths(got.mean) == trees.paths(got.precision) == ()


class TestCombining:
    def test_what_only_one_believes_is_kept(self):
        p = Posterior({"a": jnp.ones(1), "b": GONE}, {"a": jnp.ones(1), "b": GONE})
        q = Posterior({"a": GONE, "b": jnp.zeros(2)}, {"a": GONE, "b": jnp.full(2, 3.0)})
        both = gaussian.product(p, q)
        assert both.mean["a"].tolist() == [1.0]
        assert both.precision["b"].tolist() == [3.0, 3.0]
        half = Posterior(p.mean, {"a": jnp.full(1, 0.5), "b": GONE})
        rest = gaussian.quotient(both, half)
        assert rest.precision["a"].tolist() == [0.5]
        assert rest.precision["b"].tolist() == [3.0, 3.0]

    def test_a_floor(self):
        p, q = one([1.0, 1.0], [2.0, 1.0]), one([0.0, 0.0], [1.0, 3.0])
        with pytest.raises(ValueError, match=r"quotient of 'w' is not positive \(1 of 2.*floor="):
            gaussian.quotient(p, q)
        got = gaussian.quotient(p, q, floor=0.5)
        assert got.precision["w"].tolist() == [1.0, 0.5]
        assert got.mean["w"].tolist() == [2.0, 1.0]
        within = jax.jit(gaussian.quotient)(p, q)
        assert within.precision["w"].tolist() == [1.0, -2.0]
        within = jax.jit(lambda p, q, f: gaussian.quotient(p, q, floor=f))(p, q, jnp.float32(0.5))
        assert within.precision["w"].tolist() == [1.0, 0.5]

    def test_extreme_precisions_do_not_overflow(self):
        """Natural parameters of these beliefs are not finite in float32."""
        p, q = one([1e10], [1e30]), one([1e10], [3e30])
        both = gaussian.product(p, q)
        np.testing.assert_allclose(both.mean["w"], [1e10], rtol=1e-6)
        np.testing.assert_allclose(gaussian.quotient(both, q).mean["w"], [1e10], rtol=1e-6)

    def test_a_population(self):
        p = Posterior({"w": jnp.ones((3, 2))}, {"w": jnp.ones((3, 2))})
        heat = jnp.array([0.5, 1.0, 2.0])
        got = jax.jit(jax.vmap(gaussian.temper))(p, heat)
        np.testing.assert_allclose(got.precision["w"][:, 0], 1 / heat)
        np.testing.assert_allclose(
            jax.vmap(gaussian.kl)(got, p),
            [gaussian.kl(one([1.0] * 2, [1 / h] * 2), one([1.0] * 2, [1.0] * 2)) for h in heat],
            rtol=1e-5,
        )


class TestRefusals:
    @pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
    def test_precisions(self, bad):
        p = Posterior({"a": {"w": jnp.zeros(3)}}, {"a": {"w": jnp.array([1.0, bad, 2.0])}})
        for use in (
            gaussian.check,
            gaussian.entropy,
            lambda p: gaussian.kl(p, p),
            lambda p: gaussian.sample(jax.random.key(0), p),
            lambda p: gaussian.log_density(p, p.mean),
            lambda p: gaussian.temper(p, 1.0),
            lambda p: gaussian.product(p, p),
            lambda p: gaussian.quotient(p, p),
        ):
            with pytest.raises(ValueError, match=r"precision of 'a/w' is not .*positive \(1 of 3"):
                use(p)
        jax.jit(gaussian.entropy)(p)  # nothing can be said within jit

    def test_scores_of_what_is_not_finite(self):
        for score in (gaussian.snr, gaussian.obd):
            with pytest.raises(ValueError, match="precision of 'w' is not finite and non-negative"):
                score(one([1.0], [np.inf]))
            with pytest.raises(ValueError, match="the mean of 'w' is not finite"):
                score(one([np.nan], [1.0]))

    def test_known_values_within_jit(self):
        bad = one([1.0], [-1.0])
        with pytest.raises(ValueError, match="precision of 'w'"):
            jax.jit(lambda: gaussian.entropy(bad))()

    def test_structures(self):
        p = two()
        with pytest.raises(TypeError, match="mean and precision, which dict has not"):
            gaussian.check({})
        with pytest.raises(ValueError, match=r"precision has shape \(2,\) at 'w'.*\(1,\)"):
            gaussian.check(one([1.0], [1.0, 1.0]))
        with pytest.raises(ValueError, match="precision has no array at 'w'"):
            gaussian.check(Posterior({"w": jnp.ones(1)}, {"w": GONE}))
        with pytest.raises(ValueError, match="precision has an array at 'w'"):
            gaussian.check(Posterior({"w": GONE}, {"w": jnp.ones(1)}))
        with pytest.raises(ValueError, match="second belief has another structure"):
            gaussian.kl(p, one([1.0], [1.0]))
        with pytest.raises(ValueError, match="beliefs have another structure"):
            gaussian.product(p, one([1.0], [1.0]))
        with pytest.raises(ValueError, match=r"beliefs have shapes \(1,\) and \(2,\)"):
            gaussian.product(one([1.0], [1.0]), one([1.0, 1.0], [1.0, 1.0]))
        with pytest.raises(ValueError, match="the parameters has no array at 'w'"):
            gaussian.log_density(one([1.0], [1.0]), {"w": GONE})
        with pytest.raises(ValueError, match="divisor believes something"):
            gaussian.quotient(Posterior({"w": GONE}, {"w": GONE}), one([1.0], [1.0]))

    def test_numbers(self):
        p = two()
        with pytest.raises(ValueError, match="temperature must be a positive number, not 0"):
            gaussian.temper(p, 0.0)
        with pytest.raises(ValueError, match="floor must be a positive number"):
            gaussian.quotient(p, p, floor=-1.0)
        with pytest.raises(ValueError, match="examples must be a positive number"):
            gaussian.calibrate(p.mean, p.precision, prior=1.0, examples=0)
        with pytest.raises(ValueError, match="precision of 'w' is not finite and positive"):
            gaussian.isotropic({"w": jnp.ones(1)}, 0.0)
        with pytest.raises(ValueError, match="give the estimator a positive prior="):
            gaussian.calibrate({"w": jnp.ones(1)}, {"w": jnp.zeros(1)}, prior=0.0)
        with pytest.raises(ValueError, match="prior= is no prefix of the tree, whose leaves are w"):
            gaussian.calibrate({"w": jnp.ones(1)}, {"w": jnp.ones(1)}, prior={"v": 1.0})
        with pytest.raises(ValueError, match=r"precision= has shape \(3,\) for 'w', which has"):
            gaussian.isotropic({"w": jnp.ones(2)}, {"w": jnp.ones(3)})

    def test_a_state_without_a_belief(self):
        params = {"w": jnp.ones(2)}
        with pytest.raises(ValueError, match=r"holds no posterior.*with_posterior\(estimator"):
            gaussian.find(optax.sgd(0.1, momentum=0.9).init(params), params)
