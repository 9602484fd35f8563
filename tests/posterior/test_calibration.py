"""Temperature and vector scaling against float64 searches and known temperatures."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from adaptivenet.posterior import calibration, metrics

fit = jax.jit(calibration.fit_temperature)
cross_validate = jax.jit(calibration.calibrated_log_likelihood, static_argnames="splits")


def drawn(seed, n, temperature=1.0, classes=4, spread=3.0):
    """Logits, and labels drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = (spread * rng.normal(size=(n, classes))).astype(np.float32)
    return logits, (logits / temperature + rng.gumbel(size=logits.shape)).argmax(1)


def slow_nll(logits, labels):
    logs = scipy.special.log_softmax(np.asarray(logits, float), axis=-1)
    return -np.mean(logs[np.arange(len(labels)), labels])


def slow_temperature(logits, labels):
    logits = np.asarray(logits, float)
    found = scipy.optimize.minimize_scalar(
        lambda u: slow_nll(logits * np.exp(u), labels),
        bounds=(-np.log(100), np.log(100)),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return np.exp(-found.x)


class TestTemperature:
    @hypothesis.settings(max_examples=25)
    @hypothesis.given(st.integers(0, 2**31 - 1), st.floats(-2.5, 2.5))
    def test_against_a_search_in_float64(self, seed, log_temperature):
        logits, labels = drawn(seed, 100, np.exp(log_temperature))
        expected = slow_temperature(logits, labels)
        hypothesis.assume(0.02 < expected < 50)
        got = fit(logits, labels)
        np.testing.assert_allclose(got, expected, rtol=2e-5)
        # The search in float64 cannot do better by more than rounding.
        best = slow_nll(logits / expected, labels)
        assert slow_nll(logits / got, labels) <= best + 1e-6

    @pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
    def test_a_known_temperature_is_found(self, temperature):
        logits, labels = drawn(0, 20_000, temperature)
        # The standard error of the maximum-likelihood estimate of 1 / temperature.
        p = scipy.special.softmax(logits.astype(float) / temperature, axis=-1)
        variance = (p * logits**2).sum(-1) - (p * logits).sum(-1) ** 2
        error = 1 / np.sqrt(variance.sum())
        assert abs(1 / fit(logits, labels) - 1 / temperature) < 4 * error
        assert error * temperature < 0.02

    def test_scaled_logits_scale_the_temperature(self):
        logits, labels = drawn(1, 100)
        once = fit(logits, labels)
        for factor in (0.1, 7.0):
            scaled = (factor * logits).astype(np.float32)
            np.testing.assert_allclose(fit(scaled, labels), factor * once, rtol=1e-4)

    def test_a_shift_of_a_row_changes_nothing(self):
        logits, labels = drawn(2, 100)
        shifts = np.random.default_rng(0).normal(0, 50, (100, 1)).astype(np.float32)
        np.testing.assert_allclose(fit(logits + shifts, labels), fit(logits, labels), rtol=1e-4)

    def test_two_levels_of_confidence_have_a_closed_form(self):
        # 3 of 4 are right at a gap of 8: the best gap is log 3.
        logits = np.tile(np.array([[8.0, 0.0]], np.float32), (4, 1))
        np.testing.assert_allclose(fit(logits, np.array([0, 0, 0, 1])), 8 / np.log(3), rtol=1e-5)

    def test_classes_ruled_out_have_no_say(self):
        logits, labels = drawn(3, 100)
        out = np.concatenate([logits, np.full((100, 1), -np.inf, np.float32)], 1)
        np.testing.assert_allclose(fit(out, labels), fit(logits, labels), rtol=1e-5)

    def test_from_far_away(self):
        # Saturated softmax: Newton alone sees no curvature, or flies off.
        for factor in (1e-2, 20.0):
            logits, labels = drawn(4, 100)
            far = (factor * logits).astype(np.float32)
            expected = slow_temperature(far, labels)
            np.testing.assert_allclose(fit(far, labels), expected, rtol=2e-5)

    def test_bounds(self):
        logits, _ = drawn(5, 100)
        right, wrong = logits.argmax(1), logits.argmin(1)
        np.testing.assert_allclose(fit(logits, right), 0.01, rtol=1e-4)
        # Nothing is gained below the temperature at which the loss underflows.
        coldest = fit(10 * np.eye(4, dtype=np.float32)[right], right)
        assert 0.01 < coldest < 0.2
        assert slow_nll(10 * np.eye(4)[right] / coldest, right) < 1e-20
        np.testing.assert_allclose(fit(logits, wrong), 100.0, rtol=1e-4)
        got = fit(logits, right, bounds=(jnp.float32(0.5), jnp.float32(0.9)))
        np.testing.assert_allclose(got, 0.5, rtol=1e-4)
        got = fit(logits, wrong, bounds=(0.5, 0.9))
        np.testing.assert_allclose(got, 0.9, rtol=1e-4)

    def test_where_no_temperature_matters_it_is_one(self):
        assert fit(np.zeros((10, 3), np.float32), np.arange(10) % 3).item() == 1.0

    def test_ensembles_give_the_log_of_their_mean(self):
        rng = np.random.default_rng(0)
        members = rng.normal(0, 3, (5, 100, 4)).astype(np.float32)
        labels = rng.integers(4, size=100)
        mixed = scipy.special.softmax(members.astype(float), -1).mean(0)
        logs = metrics.mixture_log_probabilities(members, from_logits=True)
        np.testing.assert_allclose(
            fit(logs, labels), slow_temperature(np.log(mixed), labels), rtol=2e-5
        )

    def test_it_lowers_the_calibration_error_of_held_out_data(self):
        logits, labels = drawn(6, 4_000, 3.0)
        temperature = fit(logits[:2_000], labels[:2_000])
        rest = logits[2_000:], labels[2_000:]
        before = metrics.expected_calibration_error(*rest, from_logits=True)
        scaled = rest[0] / np.asarray(temperature)
        after = metrics.expected_calibration_error(scaled, rest[1], from_logits=True)
        assert before > 0.15
        assert after < 0.04

    def test_a_population_is_its_members_one_by_one(self):
        sets = [drawn(seed, 100, t) for seed, t in enumerate((0.3, 1.0, 4.0))]
        logits, labels = (np.stack(column) for column in zip(*sets, strict=True))
        together = jax.jit(jax.vmap(calibration.fit_temperature))(logits, labels)
        alone = [fit(*one) for one in sets]
        np.testing.assert_allclose(together, alone, rtol=1e-4)
        assert len({round(float(t), 1) for t in alone}) == 3

    def test_what_is_refused(self):
        logits, labels = drawn(0, 10)
        for bounds in ((0.0, 1.0), (2.0, 1.0), (-1.0, 1.0)):
            with pytest.raises(ValueError, match="bounds must be 0 < smallest < largest"):
                calibration.fit_temperature(logits, labels, bounds=bounds)
        with pytest.raises(ValueError, match=r"labels must be in \[0, 4\)"):
            calibration.fit_temperature(logits, labels + 4)
        with pytest.raises(ValueError, match="logits: logits hold inf"):
            calibration.fit_temperature(np.full((10, 4), np.inf), labels)
        assert np.isnan(fit(logits, labels + 4))
        assert np.isnan(fit(logits, labels - 4))


class TestCalibratedLogLikelihood:
    def test_against_a_slow_cross_validation(self):
        n, key = 101, jax.random.key(3)
        logits, labels = drawn(0, n, 2.5)
        got = cross_validate(logits, labels, key, splits=3)
        for s, split_key in enumerate(jax.random.split(key, 3)):
            order = np.asarray(jax.random.permutation(split_key, n))
            halves = [np.flatnonzero(order < n // 2), np.flatnonzero(order >= n // 2)]
            assert sorted(map(len, halves)) == [50, 51]
            temperatures = [slow_temperature(logits[half], labels[half]) for half in halves]
            np.testing.assert_allclose(got.temperature[s], temperatures, rtol=2e-5)
            total = sum(
                -slow_nll(logits[half] / t, labels[half]) * len(half)
                for half, t in zip(halves, temperatures[::-1], strict=True)
            )
            np.testing.assert_allclose(got.per_split[s], total / n, atol=1e-4)
        np.testing.assert_allclose(got.log_likelihood, np.mean(got.per_split), rtol=1e-5)
        assert len(set(np.asarray(got.per_split).tolist())) == 3

    def test_it_does_not_depend_on_the_temperature_of_the_logits(self):
        logits, labels = drawn(1, 101)
        key = jax.random.key(0)
        cool = cross_validate((4 * logits).astype(np.float32), labels, key, splits=3)
        plain = cross_validate(logits, labels, key, splits=3)
        np.testing.assert_allclose(cool.log_likelihood, plain.log_likelihood, atol=1e-5)
        np.testing.assert_allclose(cool.temperature, 4 * plain.temperature, rtol=1e-3)

    def test_it_is_close_to_that_of_the_true_model(self):
        logits, labels = drawn(2, 5_000, 3.0)
        got = calibration.calibrated_log_likelihood(logits, labels, jax.random.key(0), splits=2)
        assert abs(got.log_likelihood + slow_nll(logits / 3, labels)) < 2e-3
        assert got.log_likelihood > -slow_nll(logits, labels) + 0.1

    def test_what_is_refused(self):
        logits, labels = drawn(0, 10)
        key = jax.random.key(0)
        for splits in (0, 2.0, True):
            with pytest.raises(ValueError, match="splits must be an integer >= 1"):
                calibration.calibrated_log_likelihood(logits, labels, key, splits=splits)
        with pytest.raises(ValueError, match="two halves take at least two examples"):
            calibration.calibrated_log_likelihood(logits[:1], labels[:1], key)
        with pytest.raises(ValueError, match="bounds must be"):
            calibration.calibrated_log_likelihood(logits, labels, key, bounds=(1.0, 1.0))
        wrong = cross_validate(logits, labels + 4, key, splits=2)
        assert np.isnan(wrong.log_likelihood)


class TestVectorScaling:
    vector = staticmethod(jax.jit(calibration.fit_vector_scaling, static_argnames="steps"))

    def warped(self):
        """Logits of a true model, and the same badly scaled and shifted by class."""
        true, labels = drawn(0, 400, classes=3, spread=1.5)
        scale = np.array([0.5, 2.0, 3.0], np.float32)
        shift = np.array([1.0, -2.0, 0.5], np.float32)
        return true, (true - shift) / scale, labels

    def test_against_a_search_in_float64(self):
        _, logits, labels = self.warped()
        strength = 1e-2
        start = 1 / slow_temperature(logits, labels)

        def loss(x):
            distance = np.sum((x[:3] - start) ** 2) + np.sum(x[3:] ** 2)
            return slow_nll(logits * x[:3] + x[3:], labels) + 0.5 * strength * distance

        best = scipy.optimize.minimize(loss, np.r_[[start] * 3, [0.0] * 3], tol=1e-10)
        got = self.vector(logits, labels, strength=strength)
        np.testing.assert_allclose(np.r_[got.scale, got.shift], best.x, atol=2e-3)

    def test_it_undoes_a_warp_that_one_temperature_cannot(self):
        true, logits, labels = self.warped()
        scaling = self.vector(logits, labels, strength=1e-4)
        after = slow_nll(scaling(logits), labels)
        one = slow_nll(logits / fit(logits, labels), labels)
        # Six parameters fitted on these data: a little better than the truth itself.
        assert after <= slow_nll(true, labels) + 1e-3
        assert after < one - 0.1

    def test_what_is_refused(self):
        logits, labels = drawn(0, 10)
        with pytest.raises(ValueError, match="strength must be > 0"):
            calibration.fit_vector_scaling(logits, labels, strength=0.0)
        with pytest.raises(ValueError, match="steps must be an integer >= 1"):
            calibration.fit_vector_scaling(logits, labels, steps=0)
        logits[0, 0] = -np.inf
        with pytest.raises(ValueError, match="finite logits"):
            calibration.fit_vector_scaling(logits, labels)
