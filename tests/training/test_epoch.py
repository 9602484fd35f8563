"""The scanned epoch against a plain loop, and evaluation against numpy."""

from __future__ import annotations

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

from adaptivenet.models import mlp
from adaptivenet.training import TrainState, init_state, make_epoch, make_evaluate
from tests.training.problems import draw_data, init_params, loss, per_example, same_bits, single


def by_hand(tx, state, inputs, targets, batch_size):
    """The epoch as one would write it without scan; also returns the batches' rows."""
    inputs, targets = np.asarray(inputs), np.asarray(targets)
    next_key, order_key, step_key = jax.random.split(jax.random.wrap_key_data(state.key), 3)
    order = np.asarray(jax.random.permutation(order_key, len(inputs)))
    params, opt_state, values = state.params, state.opt_state, []
    rows = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rows = [row for row in rows if len(row) == batch_size]
    for number, row in enumerate(rows):
        key = jax.random.fold_in(step_key, number)
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(
            params, inputs[row], targets[row], key
        )
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        values.append((float(value), float(aux["accuracy"])))
    step = state.step + len(rows)
    return TrainState(params, opt_state, jax.random.key_data(next_key), step), np.array(values)


@pytest.mark.parametrize("batch_size", [16, 29, 203])
def test_epoch_is_the_plain_loop(batch_size):
    tx = optax.adam(1e-2)
    problem = single(tx, batch_size=batch_size)
    inputs, targets = problem.data[:2]
    state, expected_state = problem.state, problem.state
    for _ in range(2):
        state, metrics = problem.epoch(state, inputs, targets)
        expected_state, values = by_hand(tx, expected_state, inputs, targets, batch_size)
    # Compiled and uncompiled sums round differently, and nothing else may differ.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), state, expected_state
    )
    np.testing.assert_array_equal(state.key, expected_state.key)
    assert int(state.step) == 2 * (203 // batch_size)
    assert set(metrics) == {"loss", "accuracy"}
    np.testing.assert_allclose(metrics["loss"], values[:, 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], values[:, 1].mean(), rtol=1e-5)


def read_rows(params, inputs, targets, key):
    """A loss that tells which examples and which key it saw."""
    return jnp.sum(params * 0), {"rows": targets.astype(jnp.float32).sum(), "key": key_sum(key)}


def key_sum(key):
    return jax.random.uniform(key)


@pytest.mark.parametrize("tx", [optax.sgd(0.1), optax.adam(1e-3), optax.chain(optax.adamw(1.0))])
def test_every_arm_sees_the_same_batches_and_keys(tx):
    def recorded(tx):
        seen = []

        def signals(opt_state):
            return opt_state[-1]

        class Saw(optax.GradientTransformationExtraArgs):
            pass

        def update(updates, state, params=None, *, rows, key_value, **extra):
            return updates, (rows, key_value)

        saw = Saw(lambda params: (jnp.zeros((8,), jnp.int32), jnp.float32(0)), update)
        chain = optax.chain(tx, saw)
        state = init_state(lambda key: jnp.ones(()), chain, jax.random.key(5))
        epoch = make_epoch(
            read_rows,
            chain,
            batch_size=8,
            signals=signals,
            extra=lambda p, x, y, key: {"rows": y, "key_value": key_sum(key)},
        )
        inputs, targets = jnp.zeros((30, 1)), jnp.arange(30, dtype=jnp.int32)
        for _ in range(2):
            state, _, stacked = jax.jit(epoch)(state, inputs, targets)
            seen.append(jax.tree.map(np.asarray, stacked))
        return seen

    first, second = recorded(tx)
    reference = recorded(optax.identity())
    assert same_bits([first, second], reference)
    rows, keys = first
    assert rows.shape == (3, 8)
    assert len(np.unique(rows)) == 24  # no example twice in an epoch
    assert len(np.unique(np.concatenate([keys, second[1]]))) == 6  # no key twice
    assert (rows != second[0]).any()


def test_transformations_get_the_loss_as_value():
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, accumulation_size=1)
    tx = optax.chain(optax.sgd(0.0), plateau)
    state = init_state(init_params, tx, jax.random.key(0))
    epoch = jax.jit(make_epoch(loss, tx, batch_size=50))
    inputs, targets = draw_data()
    with jax.numpy_dtype_promotion("standard"):  # optax's rule mixes its own dtypes
        for _ in range(4):
            state, _ = epoch(state, inputs, targets)
    assert float(optax.tree_utils.tree_get(state, "scale")) < 1


def test_typed_keys_stay_typed_and_train_alike():
    problem = single()
    raw, metrics = problem.epoch(problem.state, *problem.data[:2])
    start = problem.state._replace(key=jax.random.wrap_key_data(problem.state.key))
    typed, same = problem.epoch(start, *problem.data[:2])
    assert jnp.issubdtype(typed.key.dtype, jax.dtypes.prng_key)
    assert same_bits((raw.params, metrics), (typed.params, same))
    np.testing.assert_array_equal(jax.random.key_data(typed.key), raw.key)


def test_epoch_runs_are_bit_identical():
    problem = single()
    once = problem.epoch(problem.state, *problem.data[:2])
    again = problem.epoch(problem.state, *problem.data[:2])
    assert same_bits(once, again)


def test_signals_are_stacked_by_step():
    tx = optax.adam(1e-2)
    state = init_state(init_params, tx, jax.random.key(0))
    epoch = make_epoch(loss, tx, batch_size=50, signals=lambda s: {"count": s[0].count})
    _, _, stacked = jax.jit(epoch)(state, *draw_data())
    np.testing.assert_array_equal(stacked["count"], [1, 2, 3, 4])


@settings(max_examples=15)
@given(count=st.integers(1, 40), batch_size=st.integers(1, 45), seed=st.integers(0, 99))
def test_evaluation_counts_every_example_once(count, batch_size, seed):
    inputs, targets = draw_data(count, seed=seed)
    params = init_params(jax.random.key(seed))
    metrics = make_evaluate(per_example, batch_size=batch_size)(params, inputs, targets)
    logits = np.asarray(mlp(params, inputs), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    right = int((logits.argmax(-1) == np.asarray(targets)).sum())
    # The count is exact, so the accuracy is the quotient rounded once.
    assert metrics["accuracy"] == np.float32(right) / np.float32(count)
    expected = -log_p[np.arange(count), np.asarray(targets)].mean()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


def test_large_counts_of_integers_are_exact():
    values = jnp.full(3_001, 2**19 + 1, jnp.int32)
    evaluate = make_evaluate(lambda params, x, y: {"value": x}, batch_size=1_000)
    total = 3_001 * (2**19 + 1)
    assert float(evaluate(None, values, values)["value"]) == np.float32(total) / np.float32(3_001)


def test_bfloat16_values_are_averaged_in_float32():
    values = jnp.concatenate([jnp.full(256, 1.0), jnp.full(1, 2.0)]).astype(jnp.bfloat16)
    mean = make_evaluate(lambda p, x, y: {"v": x}, batch_size=100)(None, values, values)["v"]
    assert mean.dtype == jnp.float32
    np.testing.assert_allclose(mean, 258 / 257, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_epoch(loss, optax.sgd(1.0), batch_size=0), "positive integer, got 0"),
        (lambda: make_epoch(loss, optax.sgd(1.0), batch_size=2.0), "positive integer, got 2.0"),
        (lambda: make_evaluate(per_example, batch_size=-1), "positive integer, got -1"),
        (
            lambda: single(batch_size=204).epoch(single().state, *draw_data()),
            "203 examples do not fill one batch of 204",
        ),
        (
            lambda: make_evaluate(per_example)(None, jnp.ones((3, 2)), jnp.ones(2)),
            "3 inputs but 2 targets",
        ),
        (lambda: make_evaluate(per_example)(None, jnp.ones((0, 2)), jnp.ones(0)), "empty"),
        (
            lambda: make_evaluate(lambda p, x, y: {"loss": x.mean()})(
                None, jnp.ones((3, 2)), jnp.ones(3)
            ),
            r"'loss' of shape \(\); one value an example is \(3,\)",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
