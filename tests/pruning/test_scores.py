"""Scores, and the signals that they ask for by name."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adaptivenet import pruning
from adaptivenet.pruning import scores


def test_magnitude_is_exact_in_every_dtype():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        values = {"w": jnp.array([-2.5, -0.0, 3.0], dtype), "b": optax.MaskedNode()}
        got = pruning.magnitude(values, step=3)
        assert got["w"].dtype == dtype
        assert got["w"].tolist() == [2.5, 0.0, 3.0]
        assert not np.signbit(np.asarray(got["w"]).astype(np.float32)).any()


def test_random_draws_are_uniform_and_new_for_every_leaf_and_key():
    tree = {"a": jnp.zeros((40, 50), jnp.bfloat16), "b": [jnp.zeros((40, 50))]}
    first = pruning.random(tree, key=jax.random.key(0))
    again = pruning.random(tree, key=jax.random.key(0))
    other = pruning.random(tree, key=jax.random.key(1))
    assert first["a"].dtype == jnp.float32
    np.testing.assert_array_equal(first["a"], again["a"])
    assert not np.any(first["a"] == first["b"][0])
    assert np.mean(first["a"] == other["a"]) < 0.01
    for leaf in jax.tree.leaves(first):
        assert 0 <= leaf.min() < 0.01
        assert 0.99 < leaf.max() < 1
        # Standard error of the mean of 2,000 draws: 0.0065.
        assert abs(float(leaf.mean()) - 0.5) < 0.03


def test_required_signals():
    def score(params, scale=1.0, *, grads, decay=0.9, key, **signals): ...

    assert scores.required_signals(score) == ("grads", "key")
    assert scores.required_signals(functools.partial(score, grads=1)) == ("key",)
    assert scores.required_signals(pruning.magnitude) == ()
    assert scores.required_signals(dict.fromkeys) == ()


def test_supply_gives_what_is_accepted_and_no_more():
    def strict(params, *, key, step=7):
        return params, key, step

    signals = {"key": "k", "grads": "g"}
    assert scores.supply(strict, "p", signals) == ("p", "k", 7)
    assert scores.supply(strict, "p", {**signals, "step": 3}) == ("p", "k", 3)

    def loose(params, **signals):
        return signals

    assert scores.supply(loose, "p", signals) == signals

    class Score:
        def __call__(self, params, *, grads):
            return params, grads

    assert scores.supply(Score(), "p", signals) == ("p", "g")


@pytest.mark.parametrize(
    ("signal", "remedy"),
    [
        ("posterior", r"wrap the chain in an\.with_posterior\(estimator, \.\.\.\)"),
        ("grads", r"wrap the chain in an\.pruning\.with_signals\(\.\.\.\), or pass grads="),
        ("activations", r"pass activations= \(captured on the model's inputs\)"),
        ("importance", r"pass importance= to tx\.update\(\.\.\.\) or revise"),
    ],
)
def test_a_missing_signal_says_what_to_add(signal, remedy):
    space = {}
    exec(f"def wanting(params, *, {signal}, **signals): return params", space)
    pruner = pruning.prune(0.5, score=space["wanting"])
    params = {"w": jnp.ones((2, 2))}
    state = pruner.init(params)
    message = rf"wanting\(\) asks for the signal '{signal}', which nobody supplies: {remedy}"
    with pytest.raises(ValueError, match=message):
        pruner.update(params, state, params)
    if signal == "grads":
        message = "gradients are not kept between steps: pass grads= to revise"
    with pytest.raises(ValueError, match=message):
        pruning.revise(pruner, params, state)


def test_a_signal_that_is_supplied_decides():
    def by_gradient(params, *, grads, **signals):
        return jax.tree.map(lambda p, g: jnp.abs(p * g), params, grads)

    pruner = pruning.prune(0.5, score=by_gradient)
    params = {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
    grads = {"w": jnp.array([[9.0, 5.0, 1.0, 0.0]])}
    _, state = pruner.update(grads, pruner.init(params), params, grads=grads)
    assert pruning.mask(state)["w"].tolist() == [[True, True, False, False]]


def test_scores_are_given_key_mask_and_step():
    seen = {}

    def nosy(params, *, key, mask, step, **signals):
        seen.update(key=key.shape, mask=mask["w"].dtype, step=step.dtype, more=set(signals))
        return jax.tree.map(jnp.abs, params)

    pruner = pruning.prune(0.5, score=nosy)
    params = {"w": jnp.ones((2, 2))}
    pruner.update(params, pruner.init(params), params, loss=jnp.float32(1.0), text="words")
    assert seen == {"key": (), "mask": bool, "step": jnp.int32, "more": {"loss", "text"}}


def test_a_score_of_another_shape_is_refused():
    def wrong(params, **signals):
        return jax.tree.map(lambda p: jnp.abs(p).sum(0), params)

    pruner = pruning.prune(0.5, score=wrong)
    params = {"w": jnp.ones((2, 3))}
    message = r"score wrong\(\) must return leaves shaped like the synapses, \[\(2, 3\)\], not"
    with pytest.raises(ValueError, match=message):
        pruner.update(params, pruner.init(params), params)


def test_members_of_a_population_draw_different_numbers():
    pruner = pruning.prune(0.5, score=pruning.random, every=None)

    def member(weights):
        _, state = pruning.revise(pruner, weights, pruner.init(weights))
        _, again = pruning.revise(pruner, weights, state)
        return pruning.mask(state)["w"], pruning.mask(again)["w"]

    batch = {"w": jax.random.normal(jax.random.key(0), (4, 10, 10))}
    masks, later = jax.jit(jax.vmap(member))(batch)
    assert masks.sum(axis=(1, 2)).tolist() == [50] * 4
    different = {tuple(np.ravel(member)) for member in np.asarray(masks)}
    assert len(different) == 4
    # One event after another draws anew too (what is dead stays dead: the target is the same).
    np.testing.assert_array_equal(masks, later)


def test_events_draw_anew():
    draws = []

    def spy(params, *, key, **signals):
        draw = pruning.random(params, key=key)
        jax.debug.callback(lambda value: draws.append(float(value)), draw["w"][0, 0])
        return draw

    pruner = pruning.prune(0.5, score=spy)
    params = {"w": jnp.ones((2, 2))}
    state = pruner.init(params)
    for _ in range(3):
        _, state = pruner.update(params, state, params)
    jax.effects_barrier()
    assert len(set(draws)) == 3
