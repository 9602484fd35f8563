"""No learning, and shuffled importance."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptivenet import pruning
from adaptivenet.emergence import nulls

STEPS = 5


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "dense1": {"kernel": rng.normal(size=(4, 6)), "bias": np.ones(6)},
        "dense2": {"kernel": rng.normal(size=(6, 3)), "bias": np.ones(3)},
    }


def as_arrays(tree, dtype=jnp.float32):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def evolving():
    schedule = pruning.cubic(final=0.6, start=0, end=4)
    return pruning.prune(schedule, regrow=pruning.at_random(0.3), every=2, ages=True)


def founding_note():
    return pruning.prune(pruning.threshold(0.5), regrow=pruning.everything(), every=2)


def sparse_by_chance():
    return pruning.prune(pruning.linear(0.5, 0, 4), score=pruning.random)


RULES = {
    "evolving": evolving,
    "founding_note": founding_note,
    "sparse_by_chance": sparse_by_chance,
    "soft_threshold": lambda: nulls.soft_threshold(0.2),
    "uniform_decay": lambda: nulls.uniform_decay(0.1),
}


def scan(tx, params, gradients):
    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), gradients)[0]


# One program a rule, whatever the gradients are.
programs = {
    name: jax.jit(
        lambda params, gradients, make=make: scan(
            optax.chain(optax.adamw(0.1), nulls.no_learning(make())), params, gradients
        )
    )
    for name, make in RULES.items()
}


def gradient_sequence(seed, spoilt):
    rng = np.random.default_rng(seed)
    out = jax.tree.map(
        lambda leaf: rng.normal(scale=10, size=(STEPS, *leaf.shape)).astype(np.float32),
        parameters(),
    )
    out["dense1"]["kernel"][0, 0, 0] = spoilt
    return out


class TestNoLearning:
    @pytest.mark.parametrize("rule", RULES)
    @given(
        st.integers(0, 2**32),
        st.integers(0, 2**32),
        st.sampled_from([0.0, np.nan, np.inf, -1e38]),
    )
    @settings(max_examples=15)
    def test_any_two_gradient_sequences_give_identical_parameters(self, rule, one, other, spoilt):
        params = as_arrays(parameters())
        first, state = programs[rule](params, gradient_sequence(one, 0.0))
        second, other_state = programs[rule](params, gradient_sequence(other, spoilt))
        same(first, second)
        same(state[-1], other_state[-1])  # of the rule; Adam's moments differ

    @pytest.mark.parametrize("rule", RULES)
    def test_it_is_the_rule_on_parameters_that_do_not_learn(self, rule):
        params = as_arrays(parameters())
        zeros = jax.tree.map(lambda p: jnp.zeros((STEPS, *p.shape)), params)
        expected, state = jax.jit(
            lambda params: scan(optax.with_extra_args_support(RULES[rule]()), params, zeros)
        )(params)
        got, got_state = programs[rule](params, gradient_sequence(1, 0.0))
        same(got, expected)
        same(got_state[-1], state)
        moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), got, params)
        assert moved["dense1"] == {"kernel": True, "bias": False}

    def test_revise_makes_the_pruners_events(self):
        params = as_arrays(parameters())
        pruner = pruning.prune(0.5, score=pruning.random, every=None, seed=3)
        off = nulls.no_learning(pruner)
        assert isinstance(off, pruning.Pruner)
        same(
            pruning.revise(off, params, off.init(params)),
            pruning.revise(pruner, params, pruner.init(params)),
        )

    def test_signals_that_gradients_do_not_make_are_passed_on(self):
        def by_activity(params, *, activity, **signals):
            return jax.tree.map(lambda p: jnp.full_like(p, 2.0) * activity, params)

        pruner = nulls.no_learning(pruning.prune(pruning.auto(0.1), score=by_activity))
        params = as_arrays(parameters())
        signals = {"activity": jnp.float32(1.0), "validation_loss": jnp.float32(1.0)}
        state = pruner.init(params)
        _, state = pruner.update(params, state, params, grads=params, posterior=(), **signals)
        assert int(pruning.record(state).alive) < 42
        _, revised = pruning.revise(pruner, params, state, posterior=(), **signals)
        assert int(pruning.record(revised).alive) < int(pruning.record(state).alive)

    @pytest.mark.parametrize("signal", ["grads", "posterior"])
    def test_a_rule_that_needs_gradients_has_no_such_map(self, signal):
        namespace: dict = {}
        exec(f"def learnt(params, *, {signal}, **signals): return {signal}", namespace)
        pruner = nulls.no_learning(pruning.prune(0.5, score=namespace["learnt"]))
        params = as_arrays(parameters())
        state = pruner.init(params)
        calls = (
            lambda **given: pruner.update(params, state, params, **given),
            lambda **given: pruning.revise(pruner, params, state, **given),
        )
        for call in calls:
            with pytest.raises(ValueError, match=f"asks for the signal '{signal}'") as caught:
                call(**{signal: params})
            # (JAX may add notes of its own.)
            assert f"withholds '{signal}'" in "".join(caught.value.__notes__)
            with pytest.raises(ValueError) as caught:
                call()
            assert "withholds" not in "".join(getattr(caught.value, "__notes__", ()))

    def test_what_is_no_transformation_is_refused(self):
        with pytest.raises(TypeError, match=r"takes an optax transformation.*magnitude"):
            nulls.no_learning(pruning.magnitude)
        off = nulls.no_learning(optax.sgd(0.1))
        with pytest.raises(TypeError, match=r"revise\(\) takes"):
            pruning.revise(off, {}, ())


shuffle = {
    across: jax.jit(
        lambda params, mask, seed, across=across: nulls.shuffled(pruning.magnitude, across=across)(
            params, key=jax.random.key(seed), mask=mask
        )
    )
    for across in (False, True)
}


class TestShuffled:
    @given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.booleans())
    @settings(max_examples=30)
    def test_the_multiset_of_scores_is_kept_exactly(self, seed, density, across):
        rng = np.random.default_rng(seed)
        shapes = {"a": (3, 5), "b": (2, 2, 2), "c": (7, 1)}
        params = {k: rng.normal(size=s).round(1).astype(np.float32) for k, s in shapes.items()}
        mask = {k: rng.random(s) < density for k, s in shapes.items()}
        dealt = jax.device_get(shuffle[across](params, mask, jnp.uint32(seed)))

        def living(tree):
            parts = {k: np.sort(tree[k][mask[k]]) for k in shapes}
            return {"all": np.sort(np.concatenate(list(parts.values())))} if across else parts

        scores = {k: np.abs(p) for k, p in params.items()}
        for name, values in living(scores).items():
            np.testing.assert_array_equal(living(dealt)[name], values)
        for name in shapes:
            np.testing.assert_array_equal(dealt[name][~mask[name]], scores[name][~mask[name]])

    @pytest.mark.parametrize("across", [False, True])
    def test_every_order_is_equally_likely(self, across):
        """Four living of six: chi-square over the 24 orders, of 12,000 draws with fixed keys."""
        params = {"w": jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])}
        mask = {"w": jnp.array([[True, False, True], [True, True, False]])}
        score = nulls.shuffled(pruning.magnitude, across=across)
        keys = jax.random.split(jax.random.key(0), 12_000)
        drawn = jax.vmap(lambda key: score(params, key=key, mask=mask)["w"])(keys)
        rows = np.asarray(drawn)[:, np.asarray(mask["w"])].astype(int)
        orders = list(itertools.permutations((1, 3, 4, 5)))
        counts = np.array([np.all(rows == order, axis=1).sum() for order in orders])
        assert counts.sum() == len(rows)
        # 23 degrees of freedom: 49.7 is exceeded once in a thousand.
        assert np.sum((counts - 500.0) ** 2) / 500.0 < 49.7

    def test_each_leaf_loses_as_many_as_without_it(self):
        params = as_arrays(parameters())
        masks = []
        for score in (pruning.magnitude, nulls.shuffled(pruning.magnitude)):
            pruner = pruning.prune(0.7, score=score)
            masks.append(pruning.revise(pruner, params, pruner.init(params))[1].mask)
        counts = [[int(m.sum()) for m in jax.tree.leaves(mask)] for mask in masks]
        assert counts[0] == counts[1]
        assert any(bool(jnp.any(a != b)) for a, b in zip(*map(jax.tree.leaves, masks), strict=True))

    def test_events_and_members_draw_anew(self):
        def member(key):
            params = {"w": jax.random.normal(key, (8, 8))}
            pruner = pruning.prune(0.25, score=nulls.shuffled(pruning.magnitude), every=None)
            state = pruner.init(params)
            masks = []
            for _ in range(2):
                _, revised = pruning.revise(pruner, params, state)
                masks.append(revised.mask["w"])
                state = state._replace(key=revised.key)
            return jnp.stack(masks)

        masks = jax.jit(jax.vmap(member))(jax.random.split(jax.random.key(0), 2)).reshape(4, -1)
        assert masks.sum(axis=1).tolist() == [48] * 4
        assert len({tuple(row.tolist()) for row in masks}) == 4

    def test_dtypes(self):
        params = {"a": jnp.ones((2, 2), jnp.bfloat16), "b": jnp.ones((2, 2), jnp.float32)}
        key = jax.random.key(0)
        kept = jax.jit(nulls.shuffled(pruning.magnitude))(params, key=key)
        assert [x.dtype for x in kept.values()] == [jnp.bfloat16, jnp.float32]
        widened = jax.jit(nulls.shuffled(pruning.magnitude, across=True))(params, key=key)
        assert {x.dtype for x in widened.values()} == {jnp.dtype(jnp.float32)}

    def test_what_is_missing_is_said(self):
        def wanda(params, *, activations, **signals): ...

        score = nulls.shuffled(wanda)
        assert score.__name__ == "shuffled(wanda)"
        with pytest.raises(ValueError, match=r"wanda\(\) asks for the signal 'activations'"):
            score({"w": jnp.ones((2, 2))}, key=jax.random.key(0))
        with pytest.raises(TypeError, match="takes a score"):
            nulls.shuffled("magnitude")
