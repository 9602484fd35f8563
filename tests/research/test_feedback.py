"""S2: the parts whose answer is known."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import feedback, feedback_arms, feedback_measures, rounds

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
    accuracy = feedback_arms.watch(CONFIG, "adam", "shadow", key, network(), task())[3]
    step = jax.jit(lambda net, key: rounds.train(net, key, task(), tx, CONFIG.steps))
    net = rounds.Net(network(), tx.init(network()))
    for one in jax.random.split(key, 8):
        net = step(net, jax.random.split(one)[1])
    assert accuracy == rounds.accuracy(net.params, task())


@pytest.mark.parametrize("arm", feedback_arms.ARMS)
def test_the_reprieved_live_until_their_release_and_are_a_part_of_the_window(arm):
    found = feedback_arms.watch(CONFIG, "sgd", arm, jax.random.key(3), network(), task())
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
        feedback_arms.twin(CONFIG, "adam", future, jax.random.key(4), network(), task())[0]
        for future in feedback_arms.FUTURES
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
    assert feedback_measures.matched(everyone, forced, ratio, alive) == pytest.approx(0.2, abs=0.03)
    chance = rng.uniform(size=n) < 0.2 + 0.6 * ratio
    assert feedback_measures.matched(everyone, forced, ratio, chance) == pytest.approx(
        0.0, abs=0.03
    )


def test_matched_has_no_answer_without_both_groups():
    nobody = np.zeros(5, bool)
    assert np.isnan(feedback_measures.matched(~nobody, nobody, np.ones(5), nobody))


def lives(slope, *, synapses=3_000, rounds=14, seed=0):
    """A path in which the log odds of dying fall with the magnitude, and by a slope with age."""
    rng = np.random.default_rng(seed)
    alive, died = np.zeros((2, rounds, synapses), bool)
    ages, ratios = np.zeros((2, rounds, synapses))
    living, age = np.ones(synapses, bool), np.zeros(synapses)
    for number in range(rounds):
        ratio = rng.uniform(0, 1, synapses)
        alive[number], ages[number], ratios[number] = living, age, ratio
        odds = -1 - 2 * ratio + slope * np.log1p(age)
        dies = living & (rng.uniform(size=synapses) < 1 / (1 + np.exp(-odds)))
        if number + 1 < rounds:
            died[number + 1] = dies
        # The dead come back in the next round, with age zero.
        age = np.where(dies | ~living, 0, age + 1)
        living = ~dies
    layers = np.arange(synapses) % 2
    return SimpleNamespace(
        alive=alive[None],
        died=died[None],
        age=ages[None],
        score=ratios[None],
        leaf=layers,
        names=("first", "second"),
    )


def test_the_hazard_finds_the_age_effect_that_is_there_and_none_that_is_not():
    config = feedback.Config(zone=1.0)
    paths = {"real": lives(-0.8), "shadow": lives(0.0, seed=1)}
    found = feedback_measures.observed(config, paths, 0)
    assert found["real"]["age"] == pytest.approx(-0.8, abs=0.15)
    assert found["real"]["frail"] == pytest.approx(-0.8, abs=0.25)
    assert found["shadow"]["age"] == pytest.approx(0.0, abs=0.1)
    assert found["real"]["gap"] > 0.05 > abs(found["shadow"]["gap"])


def test_hazards_are_compared_where_the_shadow_dies():
    paths = {"real": lives(-0.8), "shadow": lives(0.0, seed=1)}
    paths["shadow"].died &= np.roll(paths["shadow"].score, 1, axis=1) < 0.1
    whole = feedback_measures.observed(feedback.Config(zone=1.0), paths, 0)["real"]["age"]
    paths["real"].died &= np.roll(paths["real"].score, 1, axis=1) < 0.2
    assert feedback_measures.observed(feedback.Config(zone=1.0), paths, 0)["real"][
        "age"
    ] == pytest.approx(whole, abs=1e-9)


def test_no_deaths_in_the_shadow_leave_no_range_to_compare():
    paths = {"real": lives(-0.8), "shadow": lives(0.0, seed=1)}
    paths["shadow"].died[:] = False
    found = feedback_measures.observed(feedback.Config(), paths, 0)
    assert np.isnan(found["real"]["age"])
    assert np.isnan(found["shadow"]["frail"])
