"""Early stopping against a plain Python rule, member by member."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from adaptivenet.training import EarlyStopping


def by_hand(losses, patience, min_epochs, min_delta, start_epoch):
    """Epoch of the best weights, its value, and the epoch after which the member stopped."""
    best, best_epoch, wait, stopped = math.inf, -1, 0, None
    for epoch, loss in enumerate(losses):
        if stopped is not None or epoch < start_epoch:
            continue
        if loss < best - min_delta:
            best, best_epoch, wait = loss, epoch, 0
        else:
            wait += 1
        if wait >= patience and epoch + 1 >= min_epochs:
            stopped = epoch
    return best_epoch, best, stopped


losses = st.lists(
    st.lists(
        st.integers(0, 8).map(float) | st.sampled_from([math.nan, math.inf]),
        min_size=12,
        max_size=12,
    ),
    min_size=1,
    max_size=4,
)


@given(
    table=losses,
    patience=st.integers(1, 4),
    min_epochs=st.integers(0, 12),
    min_delta=st.sampled_from([0.0, 1.0]),
    start_epoch=st.integers(0, 5),
    mode=st.sampled_from(["min", "max"]),
)
def test_population_is_the_plain_rule(table, patience, min_epochs, min_delta, start_epoch, mode):
    members = len(table)
    rule = EarlyStopping(patience, "loss", min_epochs, min_delta, start_epoch, mode)
    sign = 1 if mode == "min" else -1
    state = rule.init({"w": jnp.full((members, 2), -1.0)}, (members,))
    stops = [None] * members
    for epoch in range(12):
        metric = jnp.asarray([sign * row[epoch] for row in table], jnp.float32)
        state = rule.update(
            state, epoch, {"loss": metric}, {"w": jnp.full((members, 2), float(epoch))}
        )
        for member in range(members):
            if state.stopped[member] and stops[member] is None:
                stops[member] = epoch
    for member, row in enumerate(table):
        epoch, value, stop = by_hand(row, patience, min_epochs, min_delta, start_epoch)
        assert int(state.epoch[member]) == epoch
        assert float(state.value[member]) == sign * value
        assert stops[member] == stop
        np.testing.assert_array_equal(state.params["w"][member], float(epoch))


def test_single_network_and_jit_give_the_same():
    rule = EarlyStopping(patience=1)
    update = jax.jit(rule.update)
    for step in (rule.update, update):
        state = rule.init({"w": jnp.zeros((2, 2))})
        for epoch, loss in enumerate([1.0, 2.0]):
            metrics = {"validation_loss": jnp.float32(loss)}
            state = step(state, epoch, metrics, {"w": jnp.full((2, 2), epoch, jnp.float32)})
        assert bool(state.stopped)
        assert state.stopped.shape == ()
        assert int(state.epoch) == 0
        np.testing.assert_array_equal(state.params["w"], 0)


def test_missing_metric_is_named():
    rule = EarlyStopping(patience=1, metric="validation_los")
    with pytest.raises(KeyError, match="'validation_los'; there are validation_loss"):
        rule.update(rule.init({}), 0, {"validation_loss": jnp.float32(0)}, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "patience must be at least 1"),
        ({"patience": 1, "min_epochs": -1}, "must not be negative"),
        ({"patience": 1, "start_epoch": -1}, "must not be negative"),
        ({"patience": 1, "min_delta": -0.1}, "min_delta"),
        ({"patience": 1, "min_delta": math.nan}, "min_delta"),
        ({"patience": 1, "mode": "least"}, '"min" or "max"'),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EarlyStopping(**options)
