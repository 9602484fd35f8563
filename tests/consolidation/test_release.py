"""Releasing synapses: which, how many, and what becomes of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptivenet import counts, pruning
from adaptivenet.consolidation.lifelong import release, restarted
from adaptivenet.posterior import Posterior
from tests.consolidation.lifelong_cases import precise, tree

# Eager calls compile the loops of a selection anew; these are compiled once a structure.
quick_release = jax.jit(release, static_argnames=("score", "by_leaf", "select"))


class TestRelease:
    @settings(max_examples=20)
    @given(seed=st.integers(0, 999), fraction=st.floats(0, 0.99), by_leaf=st.booleans())
    def test_exactly_the_lowest_scores(self, seed, fraction, by_leaf):
        params, precision = tree(seed), precise(tree(seed), seed + 1)
        share = counts.as_share(fraction)
        found = quick_release(
            params, Posterior(params, precision), share, prior_precision=0.25, by_leaf=by_leaf
        )
        score = {
            k: np.abs(np.asarray(params[k], np.float64)) * np.sqrt(np.asarray(precision[k]))
            for k in ("a", "c")
        }
        groups = [["a"], ["c"]] if by_leaf else [["a", "c"]]
        for names in groups:
            scores = np.concatenate([score[k].ravel() for k in names])
            freed = np.concatenate([np.asarray(found.freed[k]).ravel() for k in names])
            number = int(np.floor(fraction * scores.size + 0.5))
            assert freed.sum() == number
            if 0 < number < scores.size:
                assert scores[freed].max() < scores[~freed].min()
        for k in ("a", "c"):
            f = np.asarray(found.freed[k])
            np.testing.assert_array_equal(found.params[k], np.where(f, 0, params[k]))
            np.testing.assert_array_equal(found.posterior.mean[k], np.where(f, 0, params[k]))
            np.testing.assert_array_equal(
                found.posterior.precision[k], np.where(f, 0.25, precision[k])
            )
        for part in (found.params, found.posterior.mean):
            np.testing.assert_array_equal(part["bias"], params["bias"])
        np.testing.assert_array_equal(found.posterior.precision["bias"], precision["bias"])

    def test_what_was_free_counts(self):
        params = tree()
        asleep = {"a": jnp.zeros((4, 5), bool).at[0].set(True), "c": jnp.zeros((3, 2), bool)}
        asleep = {**asleep, "bias": optax.MaskedNode()}
        belief = Posterior(params, precise(params))
        # 26 synapses, 5 asleep: 13 are free afterwards; of 2 nothing more is released.
        for fraction, number in ((0.5, 13), (2 / 26, 5), (0.0, 5)):
            found = quick_release(params, belief, counts.as_share(fraction), asleep=asleep)
            assert sum(int(leaf.sum()) for leaf in jax.tree.leaves(found.freed)) == number
            assert bool(found.freed["a"][0].all())

    def test_any_score(self):
        params = tree()
        belief = Posterior(params, precise(params))
        found = release(params, belief, 0.5, score=pruning.magnitude)
        sizes = np.abs(np.concatenate([np.asarray(params[k]).ravel() for k in ("a", "c")]))
        freed = np.concatenate([np.asarray(found.freed[k]).ravel() for k in ("a", "c")])
        assert sizes[freed].max() < sizes[~freed].min()
        draws = [
            quick_release(
                params, belief, counts.as_share(0.5), score=pruning.random, key=jax.random.key(k)
            ).freed["a"]
            for k in (0, 0, 1)
        ]
        np.testing.assert_array_equal(draws[0], draws[1])
        assert (draws[0] != draws[2]).any()
        grads = jax.tree.map(jnp.ones_like, params)  # with the bias, which is no synapse
        found = release(params, belief, 0.5, score=pruning.taylor, grads=grads)
        assert sum(int(leaf.sum()) for leaf in jax.tree.leaves(found.freed)) == 13

    def test_restart(self):
        params = {"w": jnp.ones((16, 500))}
        belief = Posterior(params, params)
        found = release(params, belief, 0.5, restart=2.0, key=jax.random.key(0))
        drawn = np.asarray(found.params["w"])[np.asarray(found.freed["w"])]
        assert drawn.size == 4000
        assert drawn.std() == pytest.approx(0.5, rel=0.05)
        assert np.all(np.asarray(found.posterior.mean["w"])[np.asarray(found.freed["w"])] == 0)
        still = restarted(jax.random.key(0), params, {"w": jnp.zeros((16, 500), bool)}, 2.0)
        np.testing.assert_array_equal(still["w"], params["w"])

    def test_traced_fractions(self):
        params = tree()
        belief = Posterior(params, precise(params))
        fractions = jnp.array([0.0, 0.25, 0.5])
        freed = jax.jit(jax.vmap(lambda f: release(params, belief, f).freed))(fractions)
        numbers = sum(leaf.reshape(3, -1).sum(1) for leaf in jax.tree.leaves(freed))
        assert numbers.tolist() == [0, 7, 13]  # 6.5 is rounded up

    def test_errors(self):
        params = tree()
        belief = Posterior(params, params)
        with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\)"):
            release(params, belief, 1.0)
        with pytest.raises(ValueError, match="prior_precision must be positive"):
            release(params, belief, 0.5, prior_precision=0.0)
        with pytest.raises(ValueError, match=r"release\(\) needs a random key="):
            release(params, belief, 0.5, restart=1.0)
        with pytest.raises(ValueError, match=r"random\(\) asks for the signal 'key'"):
            release(params, belief, 0.5, score=pruning.random)
        some = {**params, "c": optax.MaskedNode()}
        with pytest.raises(ValueError, match="belief says nothing of 'c'"):
            release(params, Posterior(some, some), 0.5)
        with pytest.raises(ValueError, match=r"belief of 'c' has shape \(2,\)"):
            release(params, Posterior(params, {**params, "c": jnp.ones(2)}), 0.5)


# Quadratic tasks: the loss of a task is sum(h / 2 * (w - c)^2).
