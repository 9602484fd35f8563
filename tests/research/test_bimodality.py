"""S1: the parts whose answer is known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import bimodality, bimodality_arms, bimodality_measures, rounds, study

GAINS = (0.1, 0.2, 0.4, 0.8)
CONFIG = bimodality.Config(hidden=(6, 5), rounds=3, steps=4, gains=GAINS, reference_gain=0.4)
LAYERS = ("dense1", "dense2", "dense3")


def dip(*ps):
    """Dips of three layers at each gain, of which the two large ones have these p values."""
    values = np.array([[p / 2, p, 0.9] for p in ps])
    return np.stack([np.zeros_like(values), values], -1)


@pytest.mark.parametrize(
    ("ps", "expected"),
    [
        ((0.01, 0.01, 0.01, 0.01), 0.05),  # split from the first on: one step before
        ((0.5, 0.5, 0.005, 0.005), 0.2 * 2**0.5),  # half way between 0.5 and 0.005
        ((0.01, 0.5, 0.5, 0.005), 0.4 * 2**0.5),  # from there on, not once
        ((0.5, 0.5, 0.5, 0.5), 1.6),  # nowhere: one step beyond
    ],
)
def test_the_critical_gain_is_where_the_last_whole_layer_splits(ps, expected):
    assert np.exp(bimodality_measures.critical(CONFIG, dip(*ps))) == pytest.approx(expected)


def test_the_soft_threshold_leaves_the_mass_it_was_told():
    kernel = jax.random.normal(jax.random.key(5), (40, 6))
    rate = bimodality_arms.rate_of(kernel, jnp.asarray(60.0))
    assert jnp.sum(jnp.maximum(jnp.abs(kernel) - rate, 0)) == pytest.approx(60.0, rel=1e-5)


def network():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((40, 6), (6, 5), (5, 10))
    return {
        name: {"kernel": jax.random.normal(key, shape), "bias": jnp.zeros(shape[1])}
        for name, key, shape in zip(LAYERS, keys, shapes, strict=True)
    }


def task():
    inputs = jax.random.normal(jax.random.key(1), (32, 40))
    targets = jnp.arange(32) % 10
    return rounds.Task(inputs, targets, inputs, targets)


def test_with_the_gradient_off_the_weakest_decay_and_the_others_stay():
    before = network()
    after = bimodality_arms.soft(CONFIG, "no_learning", 0.5, jax.random.key(2), before, task())
    for name in LAYERS:
        old, new = (np.asarray(p[name]["kernel"]).ravel() for p in (before, after))
        kept = round(0.3 * old.size)
        strong = np.argsort(-np.abs(old), kind="stable")[:kept]
        weak = np.setdiff1d(np.arange(old.size), strong)
        np.testing.assert_array_equal(new[strong], old[strong])
        np.testing.assert_allclose(new[weak], old[weak] * 0.5**CONFIG.rounds, rtol=1e-6)


def test_hard_arms_cut_as_many_and_truncation_keeps_its_weights():
    for arm in ("truncation", "oneshot", "gradual", "random"):
        end = bimodality_arms.hard(CONFIG, arm, jax.random.key(3), network(), task())
        for name in LAYERS:
            kernel = np.asarray(end[name]["kernel"])
            assert np.count_nonzero(kernel) == kernel.size - round(0.7 * kernel.size)


def test_the_dip_is_credited_only_with_what_the_mass_does_not_say():
    rng = np.random.default_rng(0)
    mass, dips = rng.uniform(size=(2, 8, 5))

    def outcome(price):
        curves = {"learning_accuracy": price, "learning_cut": np.zeros_like(price)}
        layers = np.zeros((8, 5, 3, 2))
        layers[..., 0] = dips[..., None]
        return study.Outcome({}, {**curves, "learning_mass": mass, "learning_log_dip": layers})

    assert np.all(bimodality_measures.prediction_gain(outcome(mass + dips)) > 0.05)
    by_mass = bimodality_measures.prediction_gain(outcome(mass + 0.1 * rng.normal(size=(8, 5))))
    assert abs(by_mass.mean()) < 0.02


def test_gains_must_ascend_and_hold_the_reference():
    with pytest.raises(ValueError, match="gains must ascend"):
        bimodality.Config(gains=(0.4, 0.2))
    with pytest.raises(ValueError, match="reference_gain"):
        bimodality.Config(gains=(0.2, 0.5))
