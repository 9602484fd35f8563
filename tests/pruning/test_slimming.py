"""States of optimizers cut like their parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adaptivenet import pruning
from adaptivenet.pruning.slimming import slim_like

PARAMS = {"a": {"bias": jnp.arange(3.0), "kernel": jnp.ones((2, 3))}, "b": jnp.ones((3, 4))}
PLACES = [[np.array([0, 2])], [np.arange(2), np.array([0, 2])], [np.array([0, 2]), np.arange(4)]]
SMALL = {"a": {"bias": jnp.array([0.0, 2.0]), "kernel": jnp.ones((2, 2))}, "b": jnp.ones((2, 4))}

OPTIMIZERS = {
    "adam": optax.adam(1e-3),
    "adamw": optax.adamw(1e-3),
    "rmsprop": optax.rmsprop(1e-3, momentum=0.9),
    "lion": optax.lion(1e-3),
    "unfactored adafactor": optax.adafactor(1e-3),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "accumulated": optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
    "masked": optax.masked(optax.adam(1e-3), {"a": True, "b": False}),
    "partitioned": optax.partition(
        {"x": optax.adam(1e-3), "y": optax.sgd(0.1)}, {"a": "x", "b": "y"}
    ),
    "pruned": optax.chain(optax.adam(1e-3), pruning.prune(0.5, ages=True)),
    "with signals": pruning.with_signals(
        optax.chain(optax.adam(1e-3), pruning.prune(0.5, score=pruning.obd)),
        fisher=pruning.signals.fisher(0.9),
    ),
    "scheduled": optax.contrib.schedule_free_adamw(1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_cut_state_is_that_of_the_small_parameters(name):
    tx = OPTIMIZERS[name]
    given, wanted = tx.init(PARAMS), tx.init(SMALL)
    found = slim_like(given, PARAMS, PLACES)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert jnp.shape(one) == jnp.shape(other)
    with jax.numpy_dtype_promotion("standard"):
        optax.with_extra_args_support(tx).update(SMALL, found, SMALL)


def test_values_follow_their_units():
    tx = optax.sgd(0.1, momentum=0.9)
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    cut = slim_like(state, PARAMS, PLACES)
    assert optax.tree_utils.tree_get(cut, "trace")["a"]["bias"].tolist() == [0.0, 2.0]


@pytest.mark.parametrize("tx", [optax.sgd(0.1), optax.identity()])
def test_a_state_without_arrays_stays(tx):
    state = tx.init(PARAMS)
    assert slim_like(state, PARAMS, PLACES) == state


def test_the_state_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"another\s+model"):
        slim_like(optax.adam(1e-3).init({"c": jnp.ones(5)}), PARAMS, PLACES)
    wider = {"a": {"bias": jnp.ones(5), "kernel": jnp.ones((2, 5))}, "b": jnp.ones((5, 4))}
    with pytest.raises(ValueError, match=r"\(5,\).*a/bias.*\(3,\).*another model"):
        slim_like(optax.adam(1e-3).init(wider), PARAMS, PLACES)


def test_rows_and_columns_cannot_be_cut():
    params = {"w": jnp.ones((256, 128))}
    state = optax.adafactor(1e-3).init(params)
    with pytest.raises(ValueError, match="rows and columns"):
        slim_like(state, params, [[np.arange(4), np.arange(4)]])
