"""Posterior to prior is Bayes' rule where mean-field is exact; coresets cover the examples."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adaptivenet import trees
from adaptivenet.consolidation.variational import (
    k_center,
    next_task,
    random_coreset,
    refine,
    remainder,
)
from adaptivenet.posterior import meanfield
from adaptivenet.posterior.gaussian import Posterior, isotropic

NOISE = 0.7  # standard deviation of the observations


def orthogonal(seed, scales, truth):
    """A task of linear regression with orthogonal regressors: mean-field is exact for it."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(12, len(scales))))
    inputs = basis * np.asarray(scales)
    return inputs, inputs @ np.asarray(truth) + NOISE * rng.normal(size=12)


TASKS = (
    orthogonal(0, [3.0, 1.0, 0.1], [2.0, -1.0, 0.5]),
    orthogonal(1, [0.2, 2.0, 1.0], [-1.0, 1.0, 0.5]),
)


def bayes(tasks, prior_precision=1.0):
    """Mean and precision of the posterior of all the tasks together."""
    precision = prior_precision + sum(np.sum(x**2, 0) for x, _ in tasks) / NOISE**2
    mean = sum(x.T @ y for x, y in tasks) / NOISE**2 / precision
    return mean, precision


def log_likelihood(params, inputs, targets):
    return -0.5 * jnp.sum(jnp.square(targets - inputs @ params["w"])) / NOISE**2


def train(fields, prior, data, steps=4000):
    """Maximises the ELBO itself, whose expectation has a closed form here: no draws."""
    inputs, targets = (jnp.asarray(d, jnp.float32) for d in data)

    def objective(fields):
        spread = jnp.square(meanfield.scales(fields)["w"])
        expected = log_likelihood(fields.mean, inputs, targets)
        expected = expected - 0.5 * jnp.sum(jnp.square(inputs) @ spread) / NOISE**2
        return meanfield.kl(fields, prior=prior) - expected

    tx = optax.adam(optax.cosine_decay_schedule(0.05, steps))

    def step(carry, _):
        fields, state = carry
        updates, state = tx.update(jax.grad(objective)(fields), state, fields)
        return (optax.apply_updates(fields, updates), state), None

    run = jax.jit(lambda fields: jax.lax.scan(step, (fields, tx.init(fields)), None, steps)[0][0])
    with jax.numpy_dtype_promotion("standard"):
        return run(fields)


PARAMS = {"w": jnp.zeros(3)}


def first_task():
    return train(meanfield.init(PARAMS, 0.3), isotropic(PARAMS, 1.0), TASKS[0])


class TestBayes:
    @pytest.mark.parametrize("scale", [None, 0.01])
    def test_two_tasks_in_turn_are_both_at_once(self, scale):
        fields, prior = next_task(first_task(), scale=scale)
        belief = meanfield.posterior(train(fields, prior, TASKS[1]))
        mean, precision = bayes(TASKS)
        np.testing.assert_allclose(belief.mean["w"], mean, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(belief.precision["w"], precision, rtol=1e-3)

    def test_with_the_prior_reset_the_first_task_is_forgotten(self):
        """Negative control: the second task alone comes out, however training starts."""
        fields, _ = next_task(first_task())
        belief = meanfield.posterior(train(fields, isotropic(PARAMS, 1.0), TASKS[1]))
        mean, precision = bayes(TASKS[1:])
        np.testing.assert_allclose(belief.mean["w"], mean, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(belief.precision["w"], precision, rtol=1e-3)
        both, sharp = bayes(TASKS)
        assert np.max(np.abs(mean - both) * np.sqrt(sharp)) > 3  # far, in posterior deviations

    def test_a_wider_prior_forgets_by_as_much(self):
        fields, prior = next_task(first_task(), widen=5.0)
        belief = meanfield.posterior(train(fields, prior, TASKS[1]))
        first, sharp = bayes(TASKS[:1])
        x, y = TASKS[1]
        precision = sharp / 5 + np.sum(x**2, 0) / NOISE**2
        mean = (sharp / 5 * first + x.T @ y / NOISE**2) / precision
        np.testing.assert_allclose(belief.mean["w"], mean, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(belief.precision["w"], precision, rtol=1e-3)


class TestNextTask:
    def test_the_prior_is_the_belief(self):
        fields = meanfield.init({"w": jnp.array([3.0, 1.0]), "ids": jnp.arange(2)}, 0.5)
        after, prior = next_task(fields)
        belief = meanfield.posterior(fields)
        np.testing.assert_array_equal(prior.mean["w"], belief.mean["w"])
        np.testing.assert_array_equal(prior.precision["w"], belief.precision["w"])
        assert trees.is_masked(prior.mean["ids"])
        assert after is fields
        assert float(meanfield.kl(after, prior=prior)) == pytest.approx(0.0, abs=1e-6)

    def test_the_fields_may_be_donated(self):
        fields = meanfield.init({"w": jnp.arange(4.0)}, 0.5)
        after, prior = next_task(fields)
        mine = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(prior)}
        assert not mine & {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after)}

    def test_heads_begin_anew(self):
        params = {"body": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones((2, 1))}}
        initial = (meanfield.init(params, 0.1), isotropic(params, 4.0))
        trained = meanfield.init(jax.tree.map(lambda p: 7.0 * p, params), 0.02)
        fields, prior = next_task(trained, heads="head", initial=initial, scale=0.05)
        assert float(fields.mean["body"]["kernel"][0, 0]) == 7.0
        assert float(fields.mean["head"]["kernel"][0, 0]) == 1.0
        spread = meanfield.scales(fields)
        np.testing.assert_allclose(spread["body"]["kernel"], 0.05, rtol=1e-4)
        np.testing.assert_allclose(spread["head"]["kernel"], 0.1, rtol=1e-4)
        np.testing.assert_allclose(prior.precision["body"]["kernel"], 2500.0, rtol=1e-3)
        np.testing.assert_allclose(prior.precision["head"]["kernel"], 4.0)
        np.testing.assert_allclose(prior.mean["head"]["kernel"], 0.0)

    def test_within_jit_and_over_widths(self):
        fields = meanfield.init(PARAMS, 0.5)
        priors = jax.jit(jax.vmap(lambda w: next_task(fields, widen=w)[1].precision["w"]))(
            jnp.array([1.0, 2.0])
        )
        np.testing.assert_allclose(priors[:, 0], [4.0, 2.0], rtol=1e-5)

    def test_errors(self):
        fields = meanfield.init(PARAMS, 0.5)
        for options, message in (
            ({"widen": 0.5}, r"widen must be at least 1, not 0\.5"),
            ({"scale": 0.0}, "scale must be positive"),
            ({"heads": "w"}, "heads= and initial= belong together"),
            ({"initial": (fields, isotropic(PARAMS, 1.0))}, "heads= and initial= belong together"),
            ({"heads": "x", "initial": (fields, isotropic(PARAMS, 1.0))}, "matches no leaf"),
        ):
            with pytest.raises(ValueError, match=message):
                next_task(fields, **options)


class TestRefine:
    def test_the_coreset_is_taken_into_the_belief(self):
        """By draws, hence the tolerance: belief times likelihood of the coreset."""
        mean, precision = bayes(TASKS[:1])
        params = {"w": jnp.asarray(mean, jnp.float32), "ids": jnp.arange(2)}
        fields = meanfield.init(params, {"w": jnp.asarray(precision**-0.5), "ids": 1.0})
        kept = tuple(jnp.asarray(d[:6], jnp.float32) for d in TASKS[1])
        tx = optax.adam(optax.cosine_decay_schedule(0.05, 1000))
        with jax.numpy_dtype_promotion("standard"):
            found = jax.jit(
                lambda: refine(
                    fields, log_likelihood, jax.random.key(0), *kept, tx=tx, steps=1000, samples=16
                )
            )()
        x, y = (np.asarray(d, np.float64) for d in kept)
        # Six rows are not orthogonal: mean-field takes the precision's diagonal, and the mean
        # of the correlated Gaussian.
        full = np.diag(precision) + x.T @ x / NOISE**2
        expected = np.linalg.solve(full, precision * mean + x.T @ y / NOISE**2)
        belief = meanfield.posterior(found)
        np.testing.assert_allclose(belief.precision["w"], np.diag(full), rtol=0.1)
        deviations = np.abs(np.asarray(belief.mean["w"]) - expected) * np.sqrt(np.diag(full))
        assert np.max(deviations) < 0.15
        np.testing.assert_array_equal(found.mean["ids"], params["ids"])

    def test_without_steps_or_likelihood_nothing_changes(self):
        fields = meanfield.init(PARAMS, 0.5)
        same = refine(
            fields, lambda p: 0.0 * p["w"].sum(), jax.random.key(0), tx=optax.sgd(0.1), steps=3
        )
        np.testing.assert_allclose(same.mean["w"], 0.0, atol=1e-6)
        np.testing.assert_allclose(meanfield.scales(same)["w"], 0.5, rtol=1e-5)
        with pytest.raises(ValueError, match="steps must not be negative"):
            refine(fields, lambda p: 0.0, jax.random.key(0), tx=optax.sgd(0.1), steps=-1)


class TestCoresets:
    def greedy(self, points, count, first):
        chosen = [first]
        while len(chosen) < count:
            nearest = [min(np.sum((p - points[c]) ** 2) for c in chosen) for p in points]
            chosen.append(int(np.argmax(nearest)))
        return chosen

    def radius(self, points, chosen):
        return max(min(np.linalg.norm(p - points[c]) for c in chosen) for p in points)

    def test_k_center_is_the_greedy_choice(self):
        points = np.random.default_rng(0).normal(size=(30, 2, 2)).astype(np.float32)
        run = jax.jit(k_center, static_argnums=1)
        for seed in range(3):
            got = run(jnp.asarray(points), 7, jax.random.key(seed)).tolist()
            assert got == self.greedy(points.reshape(30, -1), 7, got[0])

    def test_k_center_covers_within_twice_the_best(self):
        """Against all choices; a random one does worse on clusters (negative control)."""
        rng = np.random.default_rng(1)
        centres = np.array([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
        points = np.concatenate(
            [c + 0.3 * rng.normal(size=(n, 2)) for c, n in zip(centres, (12, 2, 1), strict=True)]
        )
        best = min(self.radius(points, c) for c in itertools.combinations(range(15), 3))
        randoms = []
        for seed in range(6):
            key = jax.random.key(seed)
            mine = self.radius(points, k_center(jnp.asarray(points, jnp.float32), 3, key).tolist())
            assert mine <= 2 * best + 1e-5
            randoms.append(self.radius(points, random_coreset(key, 15, 3).tolist()))
        assert max(randoms) > 4 * best

    def test_copies_are_not_chosen_twice(self):
        chosen = k_center(jnp.zeros((5, 3)), 5, jax.random.key(0)).tolist()
        assert sorted(chosen) == [0, 1, 2, 3, 4]

    def test_random_coresets_differ_and_what_is_left_is_the_rest(self):
        keys = jax.random.split(jax.random.key(0), 5)
        sets = jax.vmap(lambda k: random_coreset(k, 20, 6))(keys)
        rest = jax.vmap(lambda c: remainder(c, 20))(sets)
        assert len({tuple(sorted(s)) for s in sets.tolist()}) > 1
        for kept, others in zip(sets.tolist(), rest.tolist(), strict=True):
            assert sorted(kept + others) == list(range(20))
            assert others == sorted(others)

    def test_errors(self):
        for bad in (
            lambda: random_coreset(jax.random.key(0), 3, 4),
            lambda: k_center(jnp.ones((3, 1)), 0, jax.random.key(0)),
        ):
            with pytest.raises(ValueError, match="count must be between 1 and the 3 examples"):
                bad()
        with pytest.raises(ValueError, match="holds a position twice"):
            remainder(jnp.array([1, 1]), 5)
        with pytest.raises(ValueError, match="3 positions are chosen of 2 examples"):
            remainder(jnp.array([0, 1, 2]), 2)


def test_priors_are_beliefs():
    assert isinstance(next_task(meanfield.init(PARAMS, 0.1))[1], Posterior)
