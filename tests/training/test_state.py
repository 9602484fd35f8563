"""Training state: pure initialisation and the spelling of keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adaptivenet.training import TrainState, init_state
from adaptivenet.training.state import as_key, is_typed_key, like_key
from tests.training.problems import init_params, same_bits


def test_population_members_equal_single_ones():
    tx = optax.adam(1e-3)
    keys = jax.random.split(jax.random.key(3), 4)
    states = jax.vmap(lambda key: init_state(init_params, tx, key))(keys)
    assert states.step.shape == (4,)
    for member, key in enumerate(keys):
        own = jax.tree.map(lambda leaf, i=member: leaf[i], states)
        assert same_bits(own, init_state(init_params, tx, key))


def test_optimizer_does_not_change_parameters_or_key():
    a = init_state(init_params, optax.sgd(1.0), jax.random.key(3))
    b = init_state(init_params, optax.adam(1.0), jax.random.key(3))
    assert same_bits((a.params, a.key, a.step), (b.params, b.key, b.step))


def test_raw_and_typed_keys_start_the_same_run():
    typed = init_state(init_params, optax.sgd(1.0), jax.random.key(3))
    raw = init_state(init_params, optax.sgd(1.0), jax.random.key_data(jax.random.key(3)))
    assert same_bits(typed, raw)
    assert raw.key.dtype == jnp.uint32
    assert raw.key.shape == (2,)
    assert isinstance(raw, TrainState)


def test_keys_of_another_generator_stay_typed():
    state = init_state(init_params, optax.sgd(1.0), jax.random.key(3, impl="rbg"))
    assert is_typed_key(state.key)
    assert str(jax.random.key_impl(state.key)) == "rbg"


def test_keys_are_spelled_like_the_template():
    key = jax.random.key(1)
    raw = jax.random.key_data(key)
    assert is_typed_key(like_key(key, key))
    np.testing.assert_array_equal(like_key(key, raw), raw)
    np.testing.assert_array_equal(like_key(key, None), raw)
    with pytest.raises(TypeError, match=r"uint32 key data, got float32\[2\]"):
        as_key(jnp.ones(2))
