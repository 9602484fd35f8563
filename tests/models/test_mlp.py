"""The MLP against a plain numpy computation, and its NNX and Linen faces."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings

from adaptivenet.models import MLP, functional, mlp, mlp_init

FOUNDING = (784, 128, 64, 10)


def by_hand(params, inputs):
    hidden = np.asarray(inputs, np.float64)
    for number in range(1, len(params) + 1):
        layer = params[f"dense{number}"]
        hidden = hidden @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"])
        if number < len(params):
            hidden = np.maximum(hidden, 0)
    return hidden


def test_founding_mlp_has_the_parameters_of_the_note():
    params = mlp_init(jax.random.key(0), FOUNDING)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 109_386
    assert {k: v["kernel"].shape for k, v in params.items()} == {
        "dense1": (784, 128),
        "dense2": (128, 64),
        "dense3": (64, 10),
    }
    assert all(type(layer) is dict for layer in params.values())


@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=2, max_size=5),
    batch=st.sampled_from([(), (1,), (3,), (2, 3)]),
    seed=st.integers(0, 2**31 - 1),
)
def test_forward_equals_numpy(sizes, batch, seed):
    draw = np.random.default_rng(seed)
    params = {
        f"dense{i}": {
            "kernel": jnp.asarray(draw.normal(size=(a, b)), jnp.float32),
            "bias": jnp.asarray(draw.normal(size=b), jnp.float32),
        }
        for i, (a, b) in enumerate(itertools.pairwise(sizes), start=1)
    }
    inputs = jnp.asarray(draw.normal(size=(*batch, sizes[0])), jnp.float32)
    outputs = mlp(params, inputs)
    assert outputs.shape == (*batch, sizes[-1])
    np.testing.assert_allclose(outputs, by_hand(params, inputs), rtol=1e-4, atol=1e-4)


def test_more_than_nine_layers_stay_in_order():
    params = mlp_init(jax.random.key(0), [3] * 13)
    inputs = jnp.ones((2, 3))
    np.testing.assert_allclose(mlp(params, inputs), by_hand(params, inputs), rtol=1e-4, atol=1e-6)


def test_initial_values_are_those_of_keras():
    params = mlp_init(jax.random.key(1), FOUNDING)
    for layer, (a, b) in zip(params.values(), [(784, 128), (128, 64), (64, 10)], strict=True):
        limit = np.sqrt(6 / (a + b))
        kernel = np.asarray(layer["kernel"])
        assert np.abs(kernel).max() <= limit
        assert np.abs(kernel).max() > 0.95 * limit
        assert abs(kernel.std() - limit / np.sqrt(3)) < 0.1 * limit
        assert not layer["bias"].any()


def test_initialisers_and_dtype_can_be_chosen():
    ones = jax.nn.initializers.ones
    params = mlp_init(jax.random.key(0), (2, 3), kernel_init=ones, bias_init=ones)
    assert (params["dense1"]["kernel"] == 1).all()
    assert (params["dense1"]["bias"] == 1).all()
    params = mlp_init(jax.random.key(0), (4, 3, 2), param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert mlp(params, jnp.ones((2, 4))).dtype == jnp.bfloat16


def test_dropout_needs_a_key_and_keeps_the_mean():
    params = {
        "dense1": {"kernel": jnp.eye(2000), "bias": jnp.zeros(2000)},
        "dense2": {"kernel": jnp.eye(2000), "bias": jnp.zeros(2000)},
    }
    inputs = jnp.ones(2000)
    assert (mlp(params, inputs, dropout=0.3) == 1).all()
    dropped = np.asarray(mlp(params, inputs, dropout=0.3, key=jax.random.key(0)))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1) / np.float32(0.7)}
    assert abs(np.mean(dropped == 0) - 0.3) < 5 * np.sqrt(0.21 / 2000)
    again = np.asarray(mlp(params, inputs, dropout=0.3, key=jax.random.key(0)))
    assert (dropped == again).all()
    other = np.asarray(mlp(params, inputs, dropout=0.3, key=jax.random.key(1)))
    assert (dropped != other).any()


def test_dropout_acts_after_the_layers_named():
    eye = {"kernel": jnp.eye(500), "bias": jnp.zeros(500)}
    params = {"dense1": eye, "dense2": eye, "dense3": eye}
    key = jax.random.key(3)
    once = mlp(params, jnp.ones(500), dropout=0.5, dropout_after=(2,), key=key)
    assert set(np.unique(once)) == {0, 2}
    twice = mlp(params, jnp.ones(500), dropout=0.5, dropout_after=(1, 2), key=key)
    assert set(np.unique(twice)) == {0, 4}
    # Each layer has its own mask.
    assert np.mean(np.asarray(twice) == 0) > 0.6


def test_module_is_the_pure_function():
    model = MLP(FOUNDING, dropout=0.3, rngs=nnx.Rngs(0))
    inputs = jax.random.normal(jax.random.key(1), (5, 784))
    apply, params = functional(model)
    for key in (None, jax.random.key(2)):
        expected = mlp(params, inputs, key=key, dropout=0.3)
        np.testing.assert_array_equal(model(inputs, key=key), expected)
        np.testing.assert_array_equal(apply(params, inputs, key), expected)
    drawn = mlp_init(jax.random.key(7), FOUNDING)
    _, same = functional(MLP(FOUNDING, rngs=nnx.Rngs(jax.random.key(7))))
    jax.tree.map(np.testing.assert_array_equal, drawn, same)


def test_functional_does_not_touch_the_module_and_takes_new_parameters():
    model = MLP((3, 4, 2), rngs=nnx.Rngs(0))
    apply, params = functional(model)
    before = jax.tree.map(np.asarray, params)
    inputs = jnp.ones((2, 3))
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    np.testing.assert_allclose(apply(other, inputs), by_hand(other, inputs), rtol=1e-5)
    np.testing.assert_array_equal(apply(params, inputs), model(inputs))
    jax.tree.map(np.testing.assert_array_equal, before, functional(model)[1])
    grads = jax.jit(jax.grad(lambda p: apply(p, inputs).sum()))(params)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    np.testing.assert_array_equal(grads["dense2"]["bias"], [2, 2])


def test_functional_refuses_other_things():
    with pytest.raises(TypeError, match=r"nnx\.Module, got dict"):
        functional({})  # pyright: ignore[reportArgumentType]


def test_population_by_vmap():
    keys = jax.random.split(jax.random.key(0), 3)
    population = jax.vmap(lambda key: mlp_init(key, (4, 3, 2)))(keys)
    for member, key in enumerate(keys):
        single = mlp_init(key, (4, 3, 2))
        jax.tree.map(
            lambda a, b, i=member: np.testing.assert_array_equal(a[i], b), population, single
        )
    inputs = jnp.ones((5, 4))
    outputs = jax.vmap(mlp, (0, None))(population, inputs)
    assert outputs.shape == (3, 5, 2)
    assert len(np.unique(np.asarray(outputs)[:, 0, 0])) == 3


def test_linen_users_are_served_by_the_bridge():
    model = nnx.bridge.ToLinen(MLP, args=((4, 3, 2),), kwargs={"dropout": 0.5})
    inputs = jnp.ones((2, 4))
    variables = model.init(jax.random.key(0), inputs)
    params = variables["params"]
    assert sorted(params) == ["dense1", "dense2"]
    expected = mlp(params, inputs)
    np.testing.assert_array_equal(model.apply(variables, inputs), expected)
    key = jax.random.key(5)
    np.testing.assert_array_equal(
        model.apply(variables, inputs, key=key), mlp(params, inputs, key=key, dropout=0.5)
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mlp_init(jax.random.key(0), (3,)), ValueError, "at least an input and an output"),
        (lambda: mlp_init(jax.random.key(0), (3, 0)), ValueError, "positive integers"),
        (lambda: MLP((3, 2, 1), dropout=1.0, rngs=nnx.Rngs(0)), ValueError, r"\[0, 1\), got 1.0"),
        (
            lambda: MLP((3, 2, 1), dropout=0.5, dropout_after=(2,), rngs=nnx.Rngs(0)),
            ValueError,
            "hidden layers from 1 to 1",
        ),
        (
            lambda: mlp({"layer": {"kernel": jnp.ones((2, 2))}}, jnp.ones(2)),
            ValueError,
            "not understood: layer",
        ),
        (
            lambda: mlp(mlp_init(jax.random.key(0), (3, 2)), jnp.ones((2, 4))),
            ValueError,
            r"shape \(2, 4\) do not fit dense1/kernel, which takes 3",
        ),
        (
            lambda: mlp(mlp_init(jax.random.key(0), (3, 2)), jnp.ones(3, jnp.uint8)),
            TypeError,
            "uint8; scale them first",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
