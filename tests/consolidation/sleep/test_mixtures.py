"""Moments are exact, steps are expectation-maximization, and dreams are the Gaussians'."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from adaptivenet.consolidation.sleep import mixtures

observe = jax.jit(mixtures.observe)


def clusters(number=120, seed=0):
    """Two classes of two clusters each, correlated within a cluster."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=number)
    parts = rng.integers(2, size=number)
    centres = np.array([[[-3.0, 0.0, 1.0], [3.0, 0.0, 1.0]], [[0.0, -3.0, 0.0], [0.0, 3.0, 0.0]]])
    along = rng.normal(size=(number, 1)) * np.array([0.3, 0.3, 0.8])
    inputs = centres[labels, parts] + along + 0.2 * rng.normal(size=(number, 3))
    return inputs, labels


def test_one_gaussian_without_factors_holds_the_moments_of_each_class():
    inputs, labels = clusters()
    labels[:40] = np.minimum(labels[:40], 0)  # the second class comes later
    memory = mixtures.init(3, 3, floor=1e-6)
    for part in np.split(np.arange(120), 3):
        memory = observe(memory, jnp.asarray(inputs[part], jnp.float32), jnp.asarray(labels[part]))
    for c in range(2):
        own = inputs[labels == c]
        np.testing.assert_allclose(memory.means[c, 0], own.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(memory.noise[c, 0], own.var(0), rtol=1e-4)
    assert memory.seen.tolist() == [(labels == c).sum() for c in range(3)]
    assert memory.shares[:, 0].tolist() == [1, 1, 0]
    assert (mixtures.log_density(memory, jnp.zeros((1, 3)))[0, 2]) == -jnp.inf


def test_examples_that_do_not_count_leave_no_trace():
    inputs, labels = (jnp.asarray(x) for x in clusters(40))
    inputs = inputs.astype(jnp.float32)
    start = mixtures.init(3, 2, components=2, rank=1)
    keep = jnp.arange(40) % 2 == 0
    weighed = observe(start, inputs, labels, weights=keep)
    passed = observe(start, inputs, jnp.where(keep, labels, -1))
    for a, b in zip(jax.tree.leaves(weighed), jax.tree.leaves(passed), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert float(weighed.seen.sum()) == 20


def dense(memory, c, k):
    factors = np.asarray(memory.factors[c, k], np.float64)
    covariance = factors @ factors.T + np.diag(np.asarray(memory.noise[c, k], np.float64))
    return stats.multivariate_normal(np.asarray(memory.means[c, k], np.float64), covariance)


def slow_step(memory, inputs, labels, floor):
    """One step of expectation-maximization on a batch, example by example, in float64."""
    classes, several, features, rank = memory.factors.shape
    likelihood = 0.0
    found = {}
    for c in range(classes):
        own = inputs[labels == c]
        laws = [dense(memory, c, k) for k in range(several)]
        joint = np.stack(
            [np.log(memory.shares[c, k]) + law.logpdf(own) for k, law in enumerate(laws)], axis=1
        )
        likelihood += np.logaddexp.reduce(joint, axis=1).sum()
        take = np.exp(joint - np.logaddexp.reduce(joint, axis=1, keepdims=True))
        for k in range(several):
            load = np.asarray(memory.factors[c, k], np.float64)
            inverse = np.linalg.inv(laws[k].cov)
            xz, zz, xx = np.zeros((features, rank + 1)), np.zeros((rank + 1,) * 2), 0.0
            for r, x in zip(take[:, k], own, strict=True):
                z = np.append(load.T @ inverse @ (x - laws[k].mean), 1.0)
                second = np.outer(z, z)
                second[:rank, :rank] += np.eye(rank) - load.T @ inverse @ load
                xz += r * np.outer(x, z)
                zz += r * second
                xx += r * x**2
            loads = xz @ np.linalg.inv(zz)
            noise = (xx - (loads * xz).sum(1)) / take[:, k].sum()
            middle, spread = zz[:rank, -1] / zz[-1, -1], zz[:rank, :rank] / zz[-1, -1]
            root = np.linalg.cholesky(spread - np.outer(middle, middle))
            load, mean = loads[:, :rank] @ root, loads[:, -1] + loads[:, :rank] @ middle
            found[c, k] = mean, load, np.maximum(noise, floor), take[:, k].mean()
            # Means and variances are those of the examples, as far as the component explains them.
            own_mean = take[:, k] @ own / take[:, k].sum()
            variance = take[:, k] @ (own - own_mean) ** 2 / take[:, k].sum()
            np.testing.assert_allclose(mean, own_mean, rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose((load**2).sum(1) + noise, variance, rtol=1e-6)
    return found, likelihood


def test_full_batches_are_expectation_maximization():
    with jax.enable_x64(True):
        inputs, labels = clusters()
        told = jnp.asarray(inputs), jnp.asarray(labels)
        step = jax.jit(functools.partial(mixtures.observe, forgetting=0.0))
        memory = mixtures.init(3, 2, components=2, rank=1, floor=1e-4, seed=1, dtype=jnp.float64)
        memory = step(memory, *told)
        likelihoods = []
        for turn in range(12):
            after = step(memory, *told)
            if turn < 3:
                found, likelihood = slow_step(memory, inputs, labels, 1e-4)
                for (c, k), (mean, load, noise, share) in found.items():
                    np.testing.assert_allclose(after.means[c, k], mean, rtol=1e-7, atol=1e-8)
                    np.testing.assert_allclose(after.factors[c, k], load, rtol=1e-6, atol=1e-7)
                    np.testing.assert_allclose(after.noise[c, k], noise, rtol=1e-6)
                    np.testing.assert_allclose(after.shares[c, k], share, rtol=1e-7)
            densities = jax.jit(mixtures.log_density)(memory, told[0])
            own = np.asarray(densities)[np.arange(120), labels]
            if turn < 3:
                np.testing.assert_allclose(own.sum(), likelihood, rtol=1e-9)
            likelihoods.append(own.sum())
            memory = after
        assert (np.diff(likelihoods) > -1e-9).all()
        assert likelihoods[-1] > likelihoods[0] + 10


def learnt(seed=1, rank=1, components=2):
    inputs, labels = clusters(3000)
    memory = mixtures.init(3, 2, components=components, rank=rank, seed=seed)
    parts = np.tile(np.arange(3000).reshape(25, 120), (3, 1))

    def step(memory, part):
        x, y = part
        return mixtures.observe(memory, x, y, forgetting=0.8), None

    batches = jnp.asarray(inputs[parts], jnp.float32), jnp.asarray(labels[parts])
    return jax.jit(lambda m: jax.lax.scan(step, m, batches)[0])(memory)


def test_a_stream_finds_the_clusters_and_their_directions():
    memory = learnt()
    centres = np.sort(np.asarray(memory.means[0, :, 0]))
    np.testing.assert_allclose(centres, [-3, 3], atol=0.15)
    centres = np.sort(np.asarray(memory.means[1, :, 1]))
    np.testing.assert_allclose(centres, [-3, 3], atol=0.15)
    direction = np.array([0.3, 0.3, 0.8])
    covariance = np.outer(direction, direction) + 0.04 * np.eye(3)
    for c in range(2):
        for k in range(2):
            np.testing.assert_allclose(dense(memory, c, k).cov, covariance, atol=0.1)
    held_out, labels = clusters(500, seed=9)
    told = mixtures.log_density(memory, jnp.asarray(held_out, jnp.float32))
    assert (np.argmax(told, 1) == labels).mean() > 0.97
    # One Gaussian a class, whose means are nearly the same, tells them less well.
    single = mixtures.log_density(learnt(rank=0, components=1), jnp.asarray(held_out, jnp.float32))
    assert (np.argmax(single, 1) == labels).mean() < (np.argmax(told, 1) == labels).mean() + 0.001
    own = np.arange(500), labels
    assert told[own].mean() > single[own].mean() + 0.5


def test_dreams_have_the_moments_of_their_class():
    memory = learnt()
    labels = jnp.repeat(jnp.arange(2), 20_000)
    inputs, told = mixtures.dream(memory, jax.random.key(0), 40_000, labels)
    np.testing.assert_array_equal(told, labels)
    real, classes = clusters(20_000, seed=3)
    for c in range(2):
        dreamt, own = np.asarray(inputs)[labels == c], real[classes == c]
        np.testing.assert_allclose(dreamt.mean(0), own.mean(0), atol=0.12)
        np.testing.assert_allclose(np.cov(dreamt.T), np.cov(own.T), atol=0.4)


def test_labels_are_of_classes_that_were_seen():
    memory = mixtures.init(1, 4)
    x, y = jnp.array([[0.2], [0.4], [0.6], [5.0]]), jnp.array([1, 1, 1, 3])
    memory = observe(memory, x, y)
    for by_frequency, share in ((False, 0.5), (True, 0.25)):
        inputs, labels = mixtures.dream(
            memory, jax.random.key(0), 4000, low=0.3, high=2.0, by_frequency=by_frequency
        )
        counts = np.bincount(labels, minlength=4)
        assert counts[[0, 2]].tolist() == [0, 0]
        np.testing.assert_allclose(counts[3] / 4000, share, atol=0.04)
        assert inputs.min() == np.float32(0.3)
        assert inputs.max() == 2
    still, _ = mixtures.dream(memory, jax.random.key(0), 3, jnp.array([1, 3, 1]), grain=0.0)
    np.testing.assert_allclose(still[:, 0], [0.4, 5.0, 0.4], rtol=1e-6)


def test_populations_differ_and_repeat():
    inputs, labels = (jnp.asarray(x) for x in clusters(40))

    def run(seed):
        start = mixtures.init(3, 2, components=2, seed=seed)
        return mixtures.observe(start, inputs.astype(jnp.float32), labels).means

    several = jax.jit(jax.vmap(run))(jnp.array([0, 1, 0]))
    np.testing.assert_array_equal(several[0], several[2])
    assert (several[0] != several[1]).any()


def test_errors():
    memory = mixtures.init(2, 2)
    for make, message in (
        (lambda: mixtures.init(0, 2), "features must be a positive integer"),
        (lambda: mixtures.init(2, 2, rank=3), r"rank must be an integer in \[0, 2\]"),
        (lambda: mixtures.init(2, 2, floor=0.0), "floor must be positive"),
        (
            lambda: mixtures.observe(memory, jnp.ones((3, 4)), jnp.zeros(3, int)),
            r"inputs must be \[batch, 2\]",
        ),
        (lambda: mixtures.observe(memory, jnp.ones((3, 2)), jnp.zeros(3)), "must be 3 integers"),
        (
            lambda: mixtures.dream(memory, jax.random.key(0), 3, jnp.zeros(2, int)),
            "labels must be 3 integers",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()
