"""The study of scaling: the law, its fit, and the chain, where the answer is known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import rounds, scaling, scaling_arms, scaling_fit, scaling_measures
from research.scaling_fit import Law, Points
from research.study import Outcome

TRUE = Law(scale=0.8, gamma=0.5, psi=1.1, plateau=0.88)
DENSITY = 0.7 ** np.arange(1, 16)
CONFIG = scaling.Config(widths=(8, 16, 32, 64), held_out=64, starts=2, resamples=20)


def dense_of(width):
    return 0.9 * np.asarray(width, np.float64) ** -0.35


def made(widths=(8, 16, 32), *, noise=0.0, seed=0, error=None):
    """Points of the law (or of another function), with relative noise."""
    width, density = (x.ravel() for x in np.meshgrid(np.float64(widths), DENSITY, indexing="ij"))
    dense = dense_of(width)
    values = scaling_fit.law(TRUE, dense, density, width) if error is None else error(density)
    values = values * np.exp(noise * np.random.default_rng(seed).normal(size=width.shape))
    return Points(dense, density, width, values)


def off(points, **options):
    found = scaling_fit.fit(points, **options)
    return scaling_fit.deviation(scaling_fit.law(found, *points[:3]), points.error)


def test_the_law_is_the_modulus_that_its_authors_write():
    dense, density, width = 0.1, np.array([1.0, 0.1, 0.003]), 20.0
    p = TRUE.scale / width**TRUE.psi
    above = density - 1j * p * (TRUE.plateau / dense) ** (1 / TRUE.gamma)
    expected = dense * np.abs(above / (density - 1j * p)) ** TRUE.gamma
    np.testing.assert_allclose(scaling_fit.law(TRUE, dense, density, width), expected, rtol=1e-12)


def test_the_law_ends_in_its_plateaus_and_has_its_slope_between_them():
    wide = scaling_fit.law(TRUE, 0.1, 1.0, 1e9)
    assert wide == pytest.approx(0.1, rel=1e-9)  # density 1, and far from the transition
    assert scaling_fit.law(TRUE, 0.1, 1e-15, 20.0) == pytest.approx(TRUE.plateau, rel=1e-9)
    steep = TRUE._replace(gamma=0.05)  # a transition over many decades: (0.88 / 0.1) ** 20
    density = np.array([1e-7, 1e-9])
    ratio = np.divide(*scaling_fit.law(steep._replace(scale=1e-14), 0.1, density, 1.0))
    assert np.log(ratio) / np.log(100) == pytest.approx(-steep.gamma, rel=1e-6)


def test_networks_of_one_invariant_are_interchangeable_where_dense_errors_are():
    widths = np.array([10.0, 40.0, 160.0])
    errors = scaling_fit.law(TRUE, 0.2, 2.0 * widths**-TRUE.psi, widths)
    np.testing.assert_allclose(errors, errors[0], rtol=1e-12)


def test_the_fit_recovers_constants_and_predicts_a_width_that_it_never_saw():
    points = made(noise=0.01)
    found = scaling_fit.fit(points)
    np.testing.assert_allclose(found, TRUE, rtol=0.15)
    assert off(points) < 0.012
    new = made((64,))
    assert scaling_fit.deviation(scaling_fit.law(found, *new[:3]), new.error) < 0.015
    assert scaling_fit.fit(points) == found  # no hidden randomness


def test_a_wrong_law_and_permuted_errors_fit_worse():
    points = made(noise=0.01)
    right = off(points)
    line = scaling_fit.fit_power(points)
    assert scaling_fit.deviation(scaling_fit.power(line, *points[1:3]), points.error) > 3 * right
    assert off(points, widths=False) > 3 * right
    mixed = np.random.default_rng(0).permuted(points.error.reshape(3, -1), axis=1).ravel()
    assert off(points._replace(error=mixed)) > 10 * right


def test_the_law_does_not_fit_whatever_falls_with_the_density():
    # A staircase of errors, as monotone as the law is.
    assert off(made((8, 16), error=lambda d: np.where(d > 0.05, 0.2, 0.85))) > 0.03


def test_a_power_law_is_recovered_by_its_own_fit():
    true = scaling_fit.Power(0.3, 0.4, 1.2)
    points = made()
    points = points._replace(error=scaling_fit.power(true, points.density, points.width))
    np.testing.assert_allclose(scaling_fit.fit_power(points), true, rtol=1e-6)


def test_interpolation_is_exact_where_log_ratios_are_linear_in_log_width():
    points = made((8, 32, 64))
    points = points._replace(error=points.dense * points.width ** np.log(1 / points.density))
    got = scaling_fit.interpolate(points, 0.3, DENSITY[:4], 16.0)
    np.testing.assert_allclose(got, 0.3 * 16.0 ** np.log(1 / DENSITY[:4]), rtol=1e-9)
    got = scaling_fit.interpolate(points, 0.3, DENSITY[:4], 128.0)  # beyond all widths
    np.testing.assert_allclose(got, 0.3 * 128.0 ** np.log(1 / DENSITY[:4]), rtol=1e-9)


def test_errors_of_zero_and_too_few_points_are_refused():
    points = made()
    with pytest.raises(ValueError, match=r"points\.error must be positive"):
        scaling_fit.fit(points._replace(error=points.error * (points.density < 0.5)))
    with pytest.raises(ValueError, match="3 points cannot fix 4 constants"):
        scaling_fit.fit(Points(*(x[:3] for x in points)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": 7}, "held_out=7 is none"),
        ({"widths": (8, 16), "held_out": 8}, "give three"),
        ({"widths": (16, 8, 32)}, "must ascend"),
        ({"family": ()}, "family must hold"),
    ],
)
def test_a_config_that_cannot_be_fitted_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        scaling.Config(**options)


def made_outcome(seeds=4, noise=0.02):
    widths = np.float64(CONFIG.widths)[:, None]
    density = np.broadcast_to(np.concatenate([[1.0], DENSITY]), (4, 16))
    error = scaling_fit.law(TRUE, dense_of(widths), density, widths)
    error[:, 0] = dense_of(widths)[:, 0]
    rng = np.random.default_rng(1)
    drawn = error * np.exp(noise * rng.normal(size=(seeds, *error.shape)))
    curves = {"error": drawn, "density": np.broadcast_to(density, drawn.shape)}
    found = [scaling_measures.measure(CONFIG, drawn[i], density, i) for i in range(seeds)]
    return Outcome({name: np.array([one[name] for one in found]) for name in found[0]}, curves)


def test_the_numbers_of_the_claims_separate_the_law_from_its_rivals():
    outcome = made_outcome()
    m = outcome.metrics
    assert np.all(m["fit_law"] < 0.03)
    assert np.all(m["held_law"] < 0.05)
    assert np.all(m["gain_over_no_width"] > 0.1)
    assert np.all(m["gain_over_power_law"] > 0.02)
    assert np.all(m["fit_permuted"] > 3 * m["fit_law"])
    np.testing.assert_allclose(m["left_out_64"], m["held_law"], rtol=1e-6)
    told = scaling_measures.summary(CONFIG, outcome)
    assert told["psi"].low <= told["psi"].estimate <= told["psi"].high
    assert told["psi"].low < TRUE.psi + 0.05
    assert told["psi"].high > TRUE.psi - 0.05
    assert told["fit_law"].estimate < m["fit_law"].mean()  # the mean over seeds has less noise


def test_the_figure_shows_every_width():
    figure = scaling.draw(CONFIG, made_outcome(2))
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels == ["width 8", "width 16", "width 32", "width 64 (held out)"]


@pytest.fixture
def quick_compilation():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.usefixtures("quick_compilation")
def test_a_chain_prunes_what_it_says_and_begins_with_the_dense_network():
    assert scaling_arms.hidden((2, 1), 4) == (8, 4)
    config = scaling.Config(family=(2, 1), rounds=4, rate=0.5, steps=6, rewind_steps=2)
    inputs = jax.random.normal(jax.random.key(1), (64, 10))
    task = rounds.Task(inputs, jnp.arange(64) % 10, inputs, jnp.arange(64) % 10)
    error, density = scaling_arms.chain(config, 4, jax.random.key(0), task)
    synapses = 10 * 8 + 8 * 4 + 4 * 10
    kept = [synapses]
    for _ in range(4):
        kept.append(kept[-1] - round(0.5 * kept[-1]))
    np.testing.assert_allclose(density, np.array(kept) / synapses, rtol=1e-6)
    assert error.shape == (5,)
    assert len(np.unique(error)) > 1
    assert np.all((error > 0) & (error <= 1))
