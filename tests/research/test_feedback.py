"""S2: the parts whose answer is known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import feedback, rounds

CONFIG = feedback.Config(
    hidden=(6, 5), steps=3, before=4, reprieve=2, after=2, twin_steps=5, window=0.2, sample=50
)
SHAPES = {"dense1": (40, 6), "dense2": (6, 5), "dense3": (5, 10)}


def network():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        name: {"kernel": jax.random.normal(key, shape), "bias": jnp.zeros(shape[1])}
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


def task():
    inputs = jax.random.normal(jax.random.key(1), (32, 40))
    targets = jnp.arange(32) % 10
    return rounds.Task(inputs, targets, inputs, targets)


def test_the_shadow_trains_as_if_nothing_were_pruned():
    key, tx = jax.random.key(2), optax.adam(CONFIG.adam_rate)
    accuracy = feedback.watch(CONFIG, "adam", "shadow", key, network(), task())[3]
    net = rounds.Net(network(), tx.init(network()))
    for one in jax.random.split(key, 8):
        net = rounds.train(net, jax.random.split(one)[1], task(), tx, CONFIG.steps)
    assert accuracy == rounds.accuracy(net.params, task())


@pytest.mark.parametrize("arm", feedback.ARMS)
def test_the_reprieved_live_until_their_release_and_are_a_part_of_the_window(arm):
    found = feedback.watch(CONFIG, "sgd", arm, jax.random.key(3), network(), task())
    frames, shares, (near, forced, _, alive), _ = found
    assert np.all(np.asarray(shares)[4:6, 0] == 1.0)
    near, forced = np.asarray(near), np.asarray(forced)
    assert near.sum() == sum(
        round(0.5 * np.prod(s)) - round(0.3 * np.prod(s)) for s in SHAPES.values()
    )
    assert not np.any(forced & ~near)
    assert 0 < forced.sum() < near.sum()
    assert frames.alive.shape == (8, 50)
    assert np.asarray(alive).any()


def test_the_dense_twin_is_not_pruned_and_pruned_ones_differ():
    ends = [
        feedback.twin(CONFIG, "adam", future, jax.random.key(4), network(), task())[0]
        for future in feedback.FUTURES
    ]
    assert all(np.all(np.isfinite(end)) for end in ends)
    assert len({np.asarray(end).tobytes() for end in ends}) == 3


def test_matched_compares_equals_with_equals():
    rng = np.random.default_rng(0)
    n = 40_000
    ratio = rng.uniform(0, 1, n)
    # The kept are weaker, so that they die more although retention protects by 0.2.
    forced = rng.uniform(size=n) > ratio
    alive = rng.uniform(size=n) < 0.2 + 0.6 * ratio + 0.2 * forced
    everyone = np.ones(n, bool)
    assert alive[forced].mean() < alive[~forced].mean() + 0.05
    assert feedback.matched(everyone, forced, ratio, alive) == pytest.approx(0.2, abs=0.03)
    chance = rng.uniform(size=n) < 0.2 + 0.6 * ratio
    assert feedback.matched(everyone, forced, ratio, chance) == pytest.approx(0.0, abs=0.03)


def test_matched_has_no_answer_without_both_groups():
    nobody = np.zeros(5, bool)
    assert np.isnan(feedback.matched(~nobody, nobody, np.ones(5), nobody))
