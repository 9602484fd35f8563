"""The belief reaches every member of a chain, whatever is around it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adaptivenet import pruning, trees
from adaptivenet.posterior.fisher import fisher, squared_gradient
from adaptivenet.posterior.gaussian import Posterior, find
from adaptivenet.posterior.transformation import PosteriorState, held, with_posterior
from adaptivenet.pruning import signals

PARAMS = {"a": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.array([0.5, 2.0])}
GRADS = {"a": jnp.linspace(2.0, -1.0, 6).reshape(2, 3), "b": jnp.array([-1.0, 0.1])}


def spy(seen):
    """A member of a chain that notes the extra arguments it is given."""

    def update(updates, state, params=None, **extra):
        seen.append(extra)
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


class Belief(NamedTuple):
    """A state that holds a belief: the number of steps as precision."""

    steps: Any

    def posterior(self, params):
        precision = jax.tree.map(lambda p: jnp.full_like(p, self.steps), params)
        return Posterior(jax.tree.map(jnp.zeros_like, params), precision)


def holding():
    """An inner transformation that keeps a belief itself, as a variational optimizer does."""

    def update(updates, state, params=None, **extra):
        return updates, Belief(state.steps + 1.0)

    return optax.GradientTransformationExtraArgs(lambda params: Belief(jnp.float32(1)), update)


class TestHandingOn:
    def test_belief_and_raw_gradients_reach_every_member(self):
        seen = []
        chain = optax.chain(spy(seen), optax.clip(0.001), optax.chain(optax.sgd(0.1), spy(seen)))
        tx = with_posterior(squared_gradient(0.5, prior=2.0, examples=10), chain)
        _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, value=3.0)
        assert len(seen) == 2
        expected = jax.tree.map(lambda g: 10 * jnp.square(g) + 2, GRADS)
        for extra in seen:
            assert set(extra) == {"grads", "posterior", "value"}
            same(extra["grads"], GRADS)
            same(extra["posterior"].mean, PARAMS)
            same(extra["posterior"].precision, expected)
        assert isinstance(state, PosteriorState)
        same(find((state,), PARAMS).precision, expected)

    def test_what_the_caller_passes_goes_through_and_wins(self):
        seen = []
        tx = with_posterior(fisher(0.5), spy(seen))
        squares = jax.tree.map(jnp.ones_like, PARAMS)
        mine = {"grads": "mine", "posterior": "mine too", "squared_grads": squares}
        _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, **mine)
        assert seen[0]["grads"] == "mine"
        assert seen[0]["posterior"] == "mine too"
        np.testing.assert_allclose(find(state, PARAMS).precision["b"], [1.0, 1.0])

    def test_a_score_that_asks_for_a_belief(self):
        """The whole chain, in jit: the pruner cuts by |w| sqrt(F)."""
        pruner = pruning.prune(0.5, score=pruning.snr, select="a")
        tx = with_posterior(squared_gradient(0.0), optax.chain(optax.sgd(0.0), pruner))
        _, state = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS)
        scores = np.abs(PARAMS["a"] * GRADS["a"])
        np.testing.assert_array_equal(
            pruning.mask(state)["a"], scores >= np.sort(scores.ravel())[3]
        )
        with pytest.raises(ValueError, match=r"'posterior', which nobody supplies.*with_posterior"):
            pruner.update(GRADS, pruner.init(PARAMS), PARAMS)

    def test_one_within_another_and_within_signals(self):
        seen = []
        inner = with_posterior(squared_gradient(0.0), spy(seen))
        tx = with_posterior(squared_gradient(0.0), optax.chain(optax.scale(10.0), inner))
        _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
        np.testing.assert_allclose(seen[0]["posterior"].precision["b"], [1.0, 0.01], rtol=1e-5)
        np.testing.assert_allclose(find(state, PARAMS).precision["b"], [1.0, 0.01], rtol=1e-5)
        within = find(state.inner, PARAMS)  # that of the inner one, which saw scaled gradients
        np.testing.assert_allclose(within.precision["b"], [100.0, 1.0], rtol=1e-5)
        for wrap in (
            lambda tx: signals.with_signals(
                with_posterior(squared_gradient(), tx), n=signals.fisher()
            ),
            lambda tx: with_posterior(
                squared_gradient(), signals.with_signals(tx, n=signals.fisher())
            ),
        ):
            seen.clear()
            tx = wrap(spy(seen))
            _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
            assert set(seen[0]) == {"grads", "posterior", "n"}
            same(seen[0]["grads"], GRADS)
            same(find(state, PARAMS).mean, PARAMS)

    def test_moments_of_woken_synapses(self):
        """Reset, unless it is asked not to; the belief restarts with signals around it."""
        params = {"w": jnp.array([[4.0, 3.0, 0.2, 0.1]])}
        grads = {"w": jnp.array([[0.0, 0.0, 1.0, 5.0]])}
        rule = pruning.prune(0.5, regrow=pruning.by_gradient(0.5))
        chain = optax.chain(optax.sgd(0.1, momentum=0.9), rule)
        estimator = squared_gradient(0.5, prior=1.0)
        for tx, belief, last in (
            (with_posterior(estimator, chain), 26.0, 0),
            (with_posterior(estimator, signals.with_signals(chain)), 26.0, 0),
            (with_posterior(estimator, chain, reset=False), 26.0, 5),
            (signals.with_signals(with_posterior(estimator, chain)), 1.0, 0),
        ):
            _, state = tx.update(grads, tx.init(params), params)
            assert pruning.mask(state)["w"].tolist() == [[True, False, False, True]]
            assert optax.tree_utils.tree_get(state, "trace")["w"].tolist() == [[0, 0, 1, last]]
            assert find(state, params).precision["w"].tolist() == [[1.0, 1.0, 2.0, belief]]

    def test_an_event_between_steps_finds_the_belief(self):
        rule = pruning.prune(0.5, score=pruning.snr, every=None)
        tx = with_posterior(squared_gradient(0.9), optax.chain(optax.sgd(0.0), rule))
        _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
        params, after = pruning.revise(rule, PARAMS, state)
        scores = np.abs(np.asarray(PARAMS["a"]) * np.asarray(GRADS["a"]))
        kept = scores >= np.sort(scores.ravel())[3]
        np.testing.assert_array_equal(pruning.mask(after)["a"], kept)
        np.testing.assert_array_equal(params["a"], np.where(kept, PARAMS["a"], 0))
        given = pruning.revise(rule, PARAMS, state, posterior=find(state, PARAMS))
        same((params, after), given)
        with pytest.raises(ValueError, match=r"'posterior', which nobody supplies.*with_posterior"):
            pruning.revise(rule, PARAMS, optax.chain(rule).init(PARAMS))

    @pytest.mark.parametrize("reset", [False, True])
    def test_an_event_between_steps_resets_what_wakes(self, reset):
        params = {"w": jnp.array([[4.0, 3.0, 0.2, 0.1]])}
        grads = {"w": jnp.array([[0.0, 0.0, 1.0, 5.0]])}
        rule = pruning.prune(0.5, regrow=pruning.by_gradient(0.5), every=None)
        chain = optax.chain(optax.sgd(0.1, momentum=0.9), rule)
        tx = with_posterior(squared_gradient(0.5), chain, reset=reset)
        _, state = tx.update(grads, tx.init(params), params)
        _, state = pruning.revise(rule, params, state, grads=grads)
        assert pruning.mask(state)["w"].tolist() == [[True, False, False, True]]
        last = 0 if reset else 5
        assert optax.tree_utils.tree_get(state, "trace")["w"].tolist() == [[0, 0, 1, last]]


class TestHeld:
    def test_the_belief_before_the_step(self):
        seen = []
        tx = with_posterior(held(), optax.chain(holding(), spy(seen)))
        state = tx.init(PARAMS)
        for step in (1.0, 2.0):
            _, state = tx.update(GRADS, state, PARAMS)
            assert seen[-1]["posterior"].precision["b"].tolist() == [step, step]
        assert find(state, PARAMS).precision["b"].tolist() == [3.0, 3.0]

    def test_an_estimator_around_it_counts(self):
        tx = with_posterior(squared_gradient(0.0), holding())
        _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
        np.testing.assert_allclose(find(state, PARAMS).precision["b"], [1.0, 0.01], rtol=1e-5)

    def test_an_inner_transformation_without_one(self):
        with pytest.raises(
            ValueError, match=r"held\(\) hands on the belief of the inner.*holds none"
        ):
            with_posterior(held(), optax.adam(0.1)).init(PARAMS)


class TestWrappers:
    def test_multi_steps(self):
        """Around it, the estimator sees accumulated gradients, once in two steps."""
        tx = optax.MultiSteps(with_posterior(squared_gradient(0.5), optax.sgd(0.1)), 2)
        state = tx.init(PARAMS)
        for grads in (GRADS, jax.tree.map(lambda g: 3 * g, GRADS)):
            with jax.numpy_dtype_promotion("standard"):
                _, state = jax.jit(tx.update)(grads, state, PARAMS)
        expected = jax.tree.map(lambda g: 4 * g**2 + 1e-12, GRADS)
        got = find(state, PARAMS).precision
        jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-5), got, expected)

    def test_inject_hyperparams(self):
        make = optax.inject_hyperparams(
            lambda decay, prior: with_posterior(
                squared_gradient(decay, prior=prior), optax.sgd(0.1)
            )
        )
        tx = make(decay=0.5, prior=3.0)
        _, state = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS)
        np.testing.assert_allclose(find(state, PARAMS).precision["b"], [4.0, 3.01], rtol=1e-5)
        state.hyperparams["prior"] = jnp.float32(1.0)
        _, state = jax.jit(tx.update)(GRADS, state, PARAMS)
        np.testing.assert_allclose(find(state, PARAMS).precision["b"], [2.0, 1.01], rtol=1e-5)

    def test_a_part_of_the_parameters(self):
        """Squares of all parameters are handed in; the estimator takes its part."""
        seen = []
        tx = optax.masked(with_posterior(fisher(0.5), spy(seen)), {"a": False, "b": True})
        squares = jax.tree.map(jnp.square, GRADS)
        _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, squared_grads=squares)
        belief = find(state, PARAMS)
        assert trees.paths(belief.mean) == trees.paths(belief.precision) == ("b",)
        np.testing.assert_allclose(belief.precision["b"], squares["b"], rtol=1e-5)
        assert trees.paths(seen[0]["posterior"].mean) == ("b",)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_low_precision_parameters(self, dtype):
        params = {"w": jnp.ones((2, 2), dtype), "ids": jnp.arange(2)}
        tx = with_posterior(squared_gradient(0.9), optax.identity())
        grads = {"w": jnp.full((2, 2), 1e-4, dtype), "ids": np.zeros(2, jax.dtypes.float0)}
        state = tx.init(params)
        for _ in range(3):
            _, state = tx.update(grads, state, params)
        belief = find(state, params)
        assert belief.precision["w"].dtype == jnp.float32
        assert belief.mean["w"].dtype == dtype
        assert trees.is_masked(belief.mean["ids"])
        square = float(grads["w"][0, 0]) ** 2  # less than float16 holds
        np.testing.assert_allclose(belief.precision["w"], np.full((2, 2), square), rtol=1e-3)


class TestRefusals:
    def test_what_is_no_transformation_or_estimator(self):
        with pytest.raises(TypeError, match=r"wraps an optax transformation.*not 3"):
            with_posterior(squared_gradient(), 3)
        with pytest.raises(
            TypeError, match=r"is no estimator of a posterior \(it lacks posterior\)"
        ):
            with_posterior(optax.sgd(0.1), squared_gradient())  # the wrong way round
        with pytest.raises(TypeError, match="it lacks init, update, posterior"):
            with_posterior(0.9, optax.sgd(0.1))
        with pytest.raises(TypeError, match="it lacks posterior"):
            with_posterior(signals.fisher(), optax.sgd(0.1))
        with pytest.raises(TypeError, match="it is a class"):
            with_posterior(type(held()), optax.sgd(0.1))

    def test_updates(self):
        tx = with_posterior(squared_gradient(), optax.sgd(0.1))
        with pytest.raises(ValueError, match=r"with_posterior\(\) needs the parameters"):
            tx.update(GRADS, tx.init(PARAMS))

    def test_members_that_refuse_arguments(self):
        def update(updates, state, params=None, *, value=None):
            return updates, state

        picky = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
        tx = with_posterior(squared_gradient(), picky)
        with pytest.raises(TypeError) as caught:
            tx.update(GRADS, tx.init(PARAMS), PARAMS)
        assert "accepting(member" in caught.value.__notes__[0]
        assert "grads, posterior" in caught.value.__notes__[0]
        tx = with_posterior(squared_gradient(), signals.accepting(picky, "value"))
        tx.update(GRADS, tx.init(PARAMS), PARAMS, value=1.0)
