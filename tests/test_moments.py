"""What an optimizer remembers of woken synapses is forgotten, and nothing else is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptivenet import moments, pruning, trees
from adaptivenet.moments import Average, reset_moments
from adaptivenet.pruning import signals
from adaptivenet.pruning.record import prune_states
from adaptivenet.pruning.regrowth import at_random

PARAMS = {
    "a": {"kernel": jnp.arange(1.0, 13.0).reshape(4, 3), "bias": jnp.ones(3)},
    "b": {"kernel": jnp.arange(-6.0, 0.0).reshape(3, 2)},
}
GRADS = jax.tree.map(lambda p: jnp.cos(p) + 2.0, PARAMS)
BORN = {
    "a": {
        "kernel": jnp.zeros((4, 3), bool).at[0, 1].set(True).at[3, 2].set(True),
        "bias": optax.MaskedNode(),
    },
    "b": {"kernel": jnp.zeros((3, 2), bool).at[1, 0].set(True)},
}


def trained(tx, steps=2):
    state = tx.init(PARAMS)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        for _ in range(steps):
            _, state = tx.update(GRADS, state, PARAMS)
    return state


def compare(before, after, born, start=0.0):
    """Of a parameter-like tree: its start where born, and the same bits elsewhere."""

    def leaf(mark, old, new):
        old, new, mark = np.asarray(old), np.asarray(new), np.asarray(mark)
        assert np.all(old[mark] != start)
        assert np.all(new[mark] == np.asarray(start, new.dtype))
        np.testing.assert_array_equal(old[~mark], new[~mark])
        return 0

    trees.map_synapses(leaf, born, before, after)


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


# How each state spells its parameter-like parts.
KEPT = {
    "adam": (optax.adam(0.1), ("mu", "nu")),
    "amsgrad": (optax.amsgrad(0.1), ("mu", "nu", "nu_max")),
    "momentum": (optax.sgd(0.1, momentum=0.9), ("trace",)),
    "rmsprop": (optax.rmsprop(0.1), ("nu",)),
    "lion": (optax.lion(0.1), ("mu",)),
    "adadelta": (optax.adadelta(0.1), ("e_g", "e_x")),
    "chain": (optax.chain(optax.clip(1.0), optax.chain(optax.adam(0.1))), ("mu", "nu")),
    "inject_hyperparams": (optax.inject_hyperparams(optax.adam)(learning_rate=0.1), ("mu", "nu")),
    "MultiSteps": (optax.MultiSteps(optax.adam(0.1), 3), ("acc_grads",)),
    "masked": (optax.masked(optax.adam(0.1), lambda p: jax.tree.map(jnp.ndim, p)), ("mu", "nu")),
    "low precision": (optax.adam(0.1, mu_dtype=jnp.bfloat16), ("mu", "nu")),
    "apply_if_finite": (optax.apply_if_finite(optax.adam(0.1), 3), ("mu", "nu")),
}


@pytest.mark.parametrize("name", KEPT)
def test_zero_exactly_where_born_and_unchanged_elsewhere(name):
    tx, fields = KEPT[name]
    if name == "masked":
        tx = optax.masked(optax.adam(0.1), {"a": True, "b": {"kernel": True}})
    before = trained(tx)
    for after in (
        reset_moments(before, PARAMS, BORN),
        jax.jit(reset_moments)(before, PARAMS, BORN),
    ):
        assert jax.tree.structure(before) == jax.tree.structure(after)
        for field in fields:
            trees_ = [optax.tree_utils.tree_get(state, field) for state in (before, after)]
            compare(*trees_, BORN)
            # Biases are no synapses.
            same(trees_[0]["a"]["bias"], trees_[1]["a"]["bias"])
        counts = [optax.tree_utils.tree_get_all_with_path(s, "count") for s in (before, after)]
        assert [np.asarray(x) for _, x in counts[0]] == [np.asarray(x) for _, x in counts[1]]


def test_parts_of_a_partition():
    tx = optax.partition(
        {"one": optax.adam(0.1), "two": optax.sgd(0.1, momentum=0.5)},
        {"a": {"kernel": "one", "bias": "two"}, "b": {"kernel": "two"}},
    )
    before = trained(tx)
    after = reset_moments(before, PARAMS, BORN)
    for state in ("one", "two"):
        pair = [optax.tree_utils.tree_get(s.inner_states[state], "count", default=0)
                for s in (before, after)]  # fmt: skip
        assert np.all(pair[0] == pair[1])
    mu = [optax.tree_utils.tree_get(s, "mu")["a"]["kernel"] for s in (before, after)]
    compare(*mu, BORN["a"]["kernel"])
    trace = [optax.tree_utils.tree_get(s, "trace") for s in (before, after)]
    compare(*(t["b"]["kernel"] for t in trace), BORN["b"]["kernel"])
    same(trace[0]["a"]["bias"], trace[1]["a"]["bias"])


@pytest.mark.parametrize(
    "tx",
    [
        optax.masked(optax.adam(0.1), {"a": True, "b": False}),
        optax.partition({"x": optax.adam(0.1), "y": optax.set_to_zero()}, {"a": "x", "b": "y"}),
    ],
    ids=["masked", "partition"],
)
def test_a_masked_node_may_stand_for_a_whole_layer(tx):
    """What optax does where a mask or a label is given for a subtree."""
    before = trained(tx)
    after = reset_moments(before, PARAMS, BORN)
    for name in ("mu", "nu"):
        pair = [optax.tree_utils.tree_get(s, name) for s in (before, after)]
        assert trees.is_masked(pair[0]["b"])
        compare(*(leaf["a"]["kernel"] for leaf in pair), BORN["a"]["kernel"])
        same(pair[0]["a"]["bias"], pair[1]["a"]["bias"])


def test_a_mask_may_have_one_for_a_whole_layer_too():
    """What a pruner within such a wrapper knows of the parameters."""
    born = {"a": BORN["a"], "b": optax.MaskedNode()}
    before = trained(optax.adam(0.1))
    after = reset_moments(before, PARAMS, born)
    pair = [optax.tree_utils.tree_get(s, "mu") for s in (before, after)]
    compare(*(leaf["a"]["kernel"] for leaf in pair), BORN["a"]["kernel"])
    same(pair[0]["b"], pair[1]["b"])


@pytest.mark.parametrize(
    ("tx", "field", "start"),
    [
        (optax.adagrad(0.1, initial_accumulator_value=0.25), "sum_of_squares", 0.25),
        (optax.rprop(0.125), "step_sizes", 0.125),
        (optax.yogi(0.1), "nu", 1e-6),
    ],
)
def test_fresh_values_are_those_of_init(tx, field, start):
    before = trained(tx, steps=3)
    after = reset_moments(before, PARAMS, BORN, fresh=tx.init(PARAMS))
    compare(
        *(optax.tree_utils.tree_get(s, field) for s in (before, after)), BORN, np.float32(start)
    )


def test_what_is_not_stored_by_synapse_stays():
    """Rows and columns of adafactor, axes of sm3, a flattened state."""
    for tx in (
        optax.adafactor(0.1, min_dim_size_to_factor=2),
        optax.sm3(0.1, momentum=0.0),
        optax.flatten(optax.adam(0.1)),
    ):
        before = trained(tx)
        after = reset_moments(before, PARAMS, BORN)
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            if np.shape(old) not in ((4, 3), (3, 2)):
                np.testing.assert_array_equal(np.asarray(old), np.asarray(new))


def test_a_pair_of_equal_matrices_in_a_tuple_is_not_mixed_up():
    """The state of a chain of two is a tuple of two, as the parameters are."""
    params = (jnp.ones((2, 2)), jnp.full((2, 2), 2.0))
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), optax.trace(0.5))
    _, before = tx.update(params, tx.init(params), params)
    born = (jnp.array([[True, False], [False, False]]), jnp.zeros((2, 2), bool))
    after = reset_moments(before, params, born)
    for old, new in zip(before, after, strict=True):
        compare(
            optax.tree_utils.tree_get(old, "trace"), optax.tree_utils.tree_get(new, "trace"), born
        )


def test_parameters_that_are_one_array():
    params = jnp.arange(1.0, 5.0).reshape(2, 2)
    tx = optax.adam(0.1)
    with jax.numpy_dtype_promotion("standard"):
        _, before = tx.update(params, tx.init(params), params)
    born = jnp.array([[True, False], [False, True]])
    after = reset_moments(before, params, born)
    compare((before[0].mu, before[0].nu), (after[0].mu, after[0].nu), (born, born))


@given(seed=st.integers(0, 999), share=st.floats(0, 1))
def test_any_pattern_of_births(seed, share):
    rng = np.random.default_rng(seed)
    born = trees.map_synapses(lambda b: jnp.asarray(rng.random(b.shape) < share), BORN)
    state = optax.TraceState(trace=jax.tree.map(lambda p: p + 0.5, PARAMS))
    compare(state.trace, reset_moments(state, PARAMS, born).trace, born)


def test_averages_stay_and_totals_start_anew():
    tx = signals.with_signals(
        optax.sgd(0.1, momentum=0.9), fisher=signals.fisher(0.9), movement=signals.movement()
    )
    _, before = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    after = reset_moments(before, PARAMS, BORN)
    same(before.estimates["fisher"], after.estimates["fisher"])
    compare(*(s.estimates["movement"].value for s in (before, after)), BORN)
    compare(*(optax.tree_utils.tree_get(s.inner, "trace") for s in (before, after)), BORN)


def regrowing(optimizer, **options):
    pruner = pruning.prune(0.5, regrow=at_random(0.5), **options)
    return optax.chain(optimizer, pruner)


def born_of(state):
    [found] = prune_states(state)
    return moments.woken(found.mask, found.survivors), found


class TestInTheStep:
    """`with_signals` resets at an event: Adam beside the same Adam without a reset."""

    def check(self, make, steps=4, events=(2, 4)):
        """The run without resets up to each event tells what the moments were."""
        tx, bare = (signals.with_signals(make(), reset=reset) for reset in (True, False))
        state, params = tx.init(PARAMS), PARAMS
        seen = []
        with jax.numpy_dtype_promotion("standard"):
            update, other = jax.jit(tx.update), jax.jit(bare.update)
            for number in range(1, steps + 1):
                updates, after = update(GRADS, state, params)
                _, unreset = other(GRADS, state._replace(resets=()), params)
                born, found = born_of(after)
                if bool(found.record.event) and number in events:
                    seen.append(number)
                    assert int(found.record.births) > 0
                    for name in ("mu", "nu"):
                        pair = [optax.tree_utils.tree_get(s, name) for s in (unreset, after)]
                        compare(*pair, born)
                        same(pair[0]["a"]["bias"], pair[1]["a"]["bias"])
                else:
                    same(unreset.inner, after.inner)
                state, params = after, optax.apply_updates(params, updates)
        assert tuple(seen) == events

    def test_adam(self):
        self.check(lambda: regrowing(optax.adam(0.1), every=2))

    def test_inject_hyperparams(self):
        adam = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
        self.check(lambda: regrowing(adam, every=2))

    def test_multi_steps_inside_resets_once(self):
        """The record of an event stays on while gradients accumulate; the reset must not."""

        def make():
            chain = regrowing(optax.adam(0.1), every=1)
            return optax.MultiSteps(chain, 2).gradient_transformation()

        self.check(make, steps=6, events=(2, 4, 6))

    def test_multi_steps_around(self):
        inner = signals.with_signals(regrowing(optax.adam(0.1), every=1))
        tx = optax.MultiSteps(inner, 2)
        state, params = tx.init(PARAMS), PARAMS
        with jax.numpy_dtype_promotion("standard"):
            for number in range(1, 5):
                updates, state = tx.update(GRADS, state, params)
                params = optax.apply_updates(params, updates)
                if number % 2 == 0:
                    born, found = born_of(state)
                    assert int(found.record.births) == 5
                    for name in ("mu", "nu"):
                        found = optax.tree_utils.tree_get(state, name)
                        zero = trees.map_synapses(lambda b, m: bool((m[b] == 0).all()), born, found)
                        assert all(jax.tree.leaves(zero))

    def test_under_vmap_it_is_the_loop(self):
        params = {"w": jnp.arange(1.0, 9.0).reshape(2, 4), "bias": jnp.ones(4)}

        def member(seed):
            pruner = pruning.prune(0.5, regrow=at_random(0.5), every=2, seed=seed)
            tx = signals.with_signals(optax.chain(optax.sgd(0.1, momentum=0.9), pruner))

            def step(carry, _):
                params, state = carry
                updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
                return (optax.apply_updates(params, updates), state), None

            (params_, state), _ = jax.lax.scan(step, (params, tx.init(params)), None, length=4)
            [found] = prune_states(state)
            trace = optax.tree_utils.tree_get(state, "trace")
            return params_["w"], trace["w"], trace["bias"], found.mask["w"] & ~found.survivors["w"]

        seeds = jnp.arange(3)
        together = jax.jit(jax.vmap(member))(seeds)
        for place, seed in enumerate(seeds):
            alone = jax.jit(member)(seed)
            for one, many in zip(alone, together, strict=True):
                np.testing.assert_allclose(one, many[place], rtol=1e-6)
            _, trace, bias, born = alone
            assert int(born.sum()) == 2
            np.testing.assert_array_equal(np.asarray(trace)[np.asarray(born)], 0)
            assert np.all(np.asarray(bias) != 0)

    def test_adagrad_starts_again_from_its_initial_value(self):
        tx = signals.with_signals(
            regrowing(optax.adagrad(0.1, initial_accumulator_value=0.25), every=1)
        )
        _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
        born, _ = born_of(state)
        sums = optax.tree_utils.tree_get(state, "sum_of_squares")
        for mark, leaf in zip(jax.tree.leaves(born), (sums["a"]["kernel"], sums["b"]["kernel"]),
                              strict=True):  # fmt: skip
            np.testing.assert_array_equal(np.asarray(leaf)[np.asarray(mark)], np.float32(0.25))

    def test_two_pruners_of_a_partition(self):
        tx = signals.with_signals(
            optax.partition(
                {
                    "a": regrowing(optax.sgd(0.1, momentum=0.9), every=1),
                    "b": regrowing(optax.adam(0.1), every=3),
                },
                {"a": {"kernel": "a", "bias": "a"}, "b": {"kernel": "b"}},
            )
        )
        with jax.numpy_dtype_promotion("standard"):
            _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
        first, second = prune_states(state)
        born = first.mask["a"]["kernel"] & ~first.survivors["a"]["kernel"]
        assert int(born.sum()) == 3
        trace = optax.tree_utils.tree_get(state, "trace")["a"]["kernel"]
        np.testing.assert_array_equal(np.asarray(trace == 0), np.asarray(born))
        assert not bool(second.record.event)
        mu = optax.tree_utils.tree_get(state.inner.inner_states["b"], "mu")
        assert np.all(np.asarray(mu["b"]["kernel"]) != 0)


class TestOutOfStep:
    """`revise` has the state alone."""

    def run(self, wrap, **options):
        pruner = pruning.prune(0.5, regrow=at_random(0.5), every=None)
        tx = wrap(optax.chain(optax.adam(0.1), pruner))
        before = trained(tx)
        if "reset" in options and options["reset"] == "tx":
            options["reset"] = tx
        _, after = pruning.revise(pruner, PARAMS, before, **options)
        return before, after

    @pytest.mark.parametrize(
        ("wrap", "options"),
        [
            (signals.with_signals, {}),
            (lambda tx: tx, {"reset": True}),
            (lambda tx: tx, {"reset": "tx"}),
            (lambda tx: signals.with_signals(tx, reset=False), {"reset": True}),
            (lambda tx: optax.masked(signals.with_signals(tx), True), {}),
        ],
    )
    def test_it_resets(self, wrap, options):
        before, after = self.run(wrap, **options)
        born, found = born_of(after)
        assert int(found.record.births) == 5
        for name in ("mu", "nu"):
            compare(*(optax.tree_utils.tree_get(s, name) for s in (before, after)), born)

    @pytest.mark.parametrize(
        ("wrap", "options"),
        [
            (lambda tx: tx, {}),
            (lambda tx: signals.with_signals(tx, reset=False), {}),
            (signals.with_signals, {"reset": False}),
        ],
    )
    def test_it_does_not(self, wrap, options):
        before, after = self.run(wrap, **options)
        for name in ("mu", "nu"):
            same(*(optax.tree_utils.tree_get(s, name) for s in (before, after)))


def test_what_is_refused():
    state = optax.TraceState(trace=PARAMS)
    with pytest.raises(ValueError, match="belongs to another tree"):
        reset_moments(state, PARAMS, {"c": jnp.ones(3, bool)})
    with pytest.raises(ValueError, match=r"born= has a leaf of shape \(2,\) where"):
        reset_moments(state, {"w": jnp.ones((2, 2))}, {"w": jnp.ones(2, bool)})
    with pytest.raises(ValueError, match="fresh= is not a state of the transformation"):
        reset_moments(state, PARAMS, BORN, fresh=optax.adam(0.1).init(PARAMS))


def test_an_average_is_adams_bias_corrected_moment():
    values = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    average = Average(jnp.zeros(3), jnp.zeros(()))
    ema = np.zeros(3)
    for step, value in enumerate(values, 1):
        average = average.then(0.9, jnp.asarray(value))
        ema = 0.9 * ema + 0.1 * value.astype(np.float64)
        np.testing.assert_allclose(average.reading, ema / (1 - 0.9**step), rtol=1e-5, atol=1e-6)
    latest = average.then(0.0, jnp.asarray(values[0]))
    np.testing.assert_allclose(latest.reading, values[0], rtol=1e-6)


def test_leaves_that_are_not_floating_have_no_average():
    tree = {"w": jnp.ones(2, jnp.bfloat16), "ids": jnp.arange(3)}
    zero = moments.zeros(tree)
    assert zero["w"].dtype == jnp.float32
    assert trees.is_masked(zero["ids"])
