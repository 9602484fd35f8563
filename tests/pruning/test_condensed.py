"""Sparse layers against the dense masked product in float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptivenet.pruning.condensed.bcsr import pack_bcsr
from adaptivenet.pruning.condensed.blocks import block_matmul, block_product, pack_blocks
from adaptivenet.pruning.condensed.kernels import gathered_product, transposable_product
from adaptivenet.pruning.condensed.layers import (
    apply,
    pack_dense,
    pack_fan_in,
    stored_bytes,
    unpack,
)
from adaptivenet.pruning.condensed.nofm import pack_nofm


def drawn(seed, shape, density=0.3, dtype=np.float32):
    """A kernel and a mask; of weights kept, one in ten is zero, and some outputs have no inputs."""
    random = np.random.default_rng(seed)
    kernel = random.normal(size=shape) * (random.random(shape) > 0.1)
    mask = random.random(shape) < density * random.integers(0, 3, shape[1])
    return jnp.asarray(kernel, dtype), mask


def fullest(mask, m):
    """The smallest n for which n:m holds."""
    return max(int(mask.reshape(len(mask) // m, m, mask.shape[1]).sum(axis=1).max(initial=0)), 1)


FORMATS = {
    "dense": pack_dense,
    "fan-in": pack_fan_in,
    "bcsr": pack_bcsr,
    "n:4": lambda kernel, mask: pack_nofm(kernel, fullest(np.asarray(mask), 4), 4, mask),
    "blocks 4x2": lambda kernel, mask: pack_blocks(kernel, (4, 2), mask),
    "blocks 1x16": lambda kernel, mask: pack_blocks(kernel, (1, 16), mask),
}
EVERY = pytest.mark.parametrize("pack", FORMATS.values(), ids=FORMATS.keys())


def with_values(layer, values):
    return dataclasses.replace(layer, values=values)


def exact(kernel, mask, x):
    """The masked product in float64."""
    kernel = np.where(mask, np.asarray(kernel, np.float64), 0.0)
    return np.asarray(x, np.float64) @ kernel


@EVERY
@settings(max_examples=6)
@given(
    shape=st.sampled_from([(4, 16), (12, 16), (36, 16), (16, 32)]),
    batch=st.sampled_from([1, 3, 5, 70]),
    density=st.sampled_from([0.0, 0.1, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_what_is_packed_is_what_is_multiplied_and_differentiated(pack, shape, batch, density, seed):
    kernel, mask = drawn(seed, shape, density)
    layer = pack(kernel, mask)
    np.testing.assert_array_equal(unpack(layer), np.where(mask, kernel, 0.0))
    random = np.random.default_rng(seed + 1)
    x = jnp.asarray(random.normal(size=(batch, shape[0])), jnp.float32)
    weights = jnp.asarray(random.normal(size=(batch, shape[1])), jnp.float32)

    @jax.jit
    def run(layer, x):
        def loss(values, x):
            product = apply(with_values(layer, values), x)
            return jnp.sum(product * weights), product

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(layer.values, x)

    (to_values, to_x), product = run(layer, x)
    np.testing.assert_allclose(product, exact(kernel, mask, x), rtol=1e-5, atol=1e-4)
    dense = np.where(mask, np.asarray(kernel, np.float64), 0.0)
    np.testing.assert_allclose(to_x, np.asarray(weights) @ dense.T, rtol=1e-5, atol=1e-4)
    # The gradient is laid out as the values are, and so unpacks as they do.
    assert to_values.shape == layer.values.shape
    gradient = np.asarray(x, np.float64).T @ np.asarray(weights)
    spread = np.asarray(unpack(with_values(layer, to_values)))
    np.testing.assert_allclose(spread[mask], gradient[mask], rtol=1e-5, atol=1e-4)


@EVERY
def test_any_leading_axes(pack):
    kernel, mask = drawn(0, (8, 16))
    layer = pack(kernel, mask)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 8)), jnp.float32)
    for inputs in (x, x[0], x[0, 0], x[:, :0]):
        got = apply(layer, inputs)
        assert got.shape == (*inputs.shape[:-1], 16)
        np.testing.assert_allclose(got, exact(kernel, mask, inputs), rtol=1e-5, atol=1e-5)


@EVERY
@pytest.mark.parametrize("batch", [2, 5])
def test_samples_and_networks_under_vmap(pack, batch):
    kernel, mask = drawn(2, (8, 16))
    layer = pack(kernel, mask)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(3, batch, 8)), jnp.float32)
    expected = exact(kernel, mask, x)
    over_x = jax.jit(jax.vmap(apply, in_axes=(None, 0)))
    np.testing.assert_allclose(over_x(layer, x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        jax.vmap(over_x, in_axes=(None, 0))(layer, x[:, :, None])[:, :, 0],
        expected,
        rtol=1e-5,
        atol=1e-5,
    )
    # Networks of one mask, with values of their own.
    scales = jnp.array([1.0, -2.0, 0.5])
    layers = jax.vmap(lambda scale: with_values(layer, layer.values * scale))(scales)
    got = jax.jit(jax.vmap(apply))(layers, x)
    np.testing.assert_allclose(got, expected * scales[:, None, None], rtol=1e-5, atol=1e-5)

    def loss(layer, values, x):
        return jnp.sum(jnp.sin(apply(with_values(layer, values), x)))

    together = jax.vmap(jax.grad(loss, argnums=(1, 2)))(layers, layers.values, x)
    for member in range(3):
        one = jax.tree.map(lambda leaf: leaf[member], layers)  # noqa: B023
        alone = jax.grad(loss, argnums=(1, 2))(one, one.values, x[member])
        for many, single in zip(together, alone, strict=True):
            np.testing.assert_allclose(many[member], single, rtol=1e-5, atol=1e-5)


def test_networks_of_different_masks_are_stacked():
    kernels, masks = zip(*(drawn(seed, (8, 4)) for seed in range(3)), strict=True)
    fan_in = max(int(mask.sum(axis=0).max()) for mask in masks) + 1
    packed = [
        pack_fan_in(kernel, mask, fan_in=fan_in, drop_empty=False)
        for kernel, mask in zip(kernels, masks, strict=True)
    ]
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *packed)
    x = jnp.asarray(np.random.default_rng(4).normal(size=(3, 5, 8)), jnp.float32)
    expected = [exact(*member) for member in zip(kernels, masks, x, strict=True)]
    np.testing.assert_allclose(jax.vmap(apply)(layers, x), expected, rtol=1e-5, atol=1e-5)


@EVERY
def test_both_modes_of_differentiation_and_the_second_order(pack):
    kernel, mask = drawn(5, (4, 16), 0.5)
    layer, dense = pack(kernel, mask), np.where(mask, kernel, 0.0)
    random = np.random.default_rng(6)
    x, direction = (jnp.asarray(random.normal(size=(2, 4)), jnp.float32) for _ in range(2))

    def product(values, x):
        return apply(with_values(layer, values), x)

    other = jnp.asarray(random.normal(size=layer.values.shape), jnp.float32)
    _, tangent = jax.jvp(product, (layer.values, x), (other, direction))
    towards = np.asarray(unpack(with_values(layer, other)))
    expected = np.asarray(direction) @ dense + np.asarray(x) @ towards
    np.testing.assert_allclose(tangent, expected, rtol=1e-4, atol=1e-4)

    def loss(values, x):
        return jnp.sum(product(values, x) ** 2) / 2

    hessian = jax.jacfwd(jax.grad(loss, argnums=1), argnums=1)(layer.values, x)
    np.testing.assert_allclose(hessian[0, :, 0], dense @ dense.T, rtol=1e-4, atol=1e-4)
    twice = jax.grad(lambda values: jnp.sum(jax.grad(loss, argnums=1)(values, x)))(layer.values)
    direct = jax.grad(lambda kernel: jnp.sum(x @ kernel @ kernel.T))(jnp.asarray(dense))
    kept = np.asarray(unpack(with_values(layer, twice)))[mask]
    np.testing.assert_allclose(kept, direct[mask], rtol=1e-4, atol=1e-4)


@EVERY
def test_training_goes_on_as_under_the_mask(pack):
    kernel, mask = drawn(7, (8, 16), 0.5)
    layer = pack(kernel, mask)
    x = jnp.asarray(np.random.default_rng(8).normal(size=(6, 8)), jnp.float32)
    # What blocks, groups and dense layers store beyond the mask is held, as a pruner would.
    kept = pack(jnp.ones_like(kernel), mask).values
    if pack in (FORMATS["fan-in"], FORMATS["bcsr"]):
        kept = jnp.ones_like(kept)

    def loss(product):
        return jnp.mean((jnp.tanh(product) - 0.5) ** 2)

    @jax.jit
    def step(values, dense):
        ours = jax.grad(lambda v: loss(apply(with_values(layer, v), x)))(values)
        theirs = jax.grad(lambda w: loss(x @ w))(dense)
        return values - ours * kept, dense - jnp.where(mask, theirs, 0.0)

    values, dense = layer.values, jnp.where(mask, kernel, 0.0)
    for _ in range(4):
        values, dense = step(values, dense)
    np.testing.assert_allclose(unpack(with_values(layer, values)), dense, rtol=1e-5, atol=1e-5)


@EVERY
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("batch", [1, 8])
def test_half_precision_is_added_up_in_32_bits(pack, dtype, batch):
    kernel, mask = drawn(9, (64, 16), 0.5, dtype)
    layer = pack(kernel, mask)
    assert layer.values.dtype == dtype
    np.testing.assert_array_equal(unpack(layer), jnp.where(mask, kernel, jnp.zeros((), dtype)))
    x = jnp.asarray(np.random.default_rng(10).normal(size=(batch, 64)), dtype)
    got = apply(layer, x)
    assert got.dtype == dtype
    expected = exact(kernel, mask, x)
    error = np.abs(np.asarray(got, np.float64) - expected)
    assert (error <= float(jnp.finfo(dtype).eps) * np.abs(expected) + 1e-4).all()
    gradient = jax.grad(lambda v: apply(with_values(layer, v), x).sum())(layer.values)
    assert gradient.dtype == dtype


def test_dtypes_mix_as_those_of_dense_products():
    layer = pack_fan_in(jnp.eye(3))
    with pytest.raises(Exception, match="promotion"):
        apply(layer, jnp.ones(3, jnp.bfloat16))
    with jax.numpy_dtype_promotion("standard"):
        assert apply(layer, jnp.ones(3, jnp.bfloat16)).dtype == jnp.float32
        assert apply(layer, jnp.ones(3, jnp.int32)).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 8, 9, 11, 17, 26])
@pytest.mark.parametrize("batch", [1, 4, 65])
def test_any_number_of_terms(terms, batch):
    random = np.random.default_rng(terms)
    values = jnp.asarray(random.normal(size=(3, terms)), jnp.float32)
    indices = np.stack([random.permutation(26)[:terms] for _ in range(3)]).astype(np.uint8)
    x = jnp.asarray(random.normal(size=(batch, 26)), jnp.float32)
    expected = np.einsum("ot,bot->bo", values, np.asarray(x, np.float64)[:, indices])
    for product in (gathered_product, transposable_product):
        got = jax.jit(product)(values, x, jnp.asarray(indices))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [(1, 16), (2, 4), (4, 16), (8, 2), (16, 32)])
@pytest.mark.parametrize("batch", [1, 3, 4, 9])
def test_both_ways_to_multiply_blocks(block, batch):
    kernel, mask = drawn(11, (32, 32), 0.2)
    layer = pack_blocks(kernel, block, mask)
    x = jnp.asarray(np.random.default_rng(12).normal(size=(batch, 32)), jnp.float32)
    for product in (block_product, block_matmul):
        got = product(layer.values, x, layer.indices)
        np.testing.assert_allclose(got, exact(kernel, mask, x), rtol=1e-5, atol=1e-5)


def test_bytes_by_hand():
    mask = np.zeros((64, 32), bool)
    mask[::8] = True
    kernel = jnp.where(mask, 1.0, 0.0)
    assert stored_bytes(pack_dense(kernel)) == 64 * 32 * 4
    assert stored_bytes(pack_fan_in(kernel)) == 32 * 8 * (4 + 1)
    assert stored_bytes(pack_nofm(kernel, 1, 8)) == 32 * 8 * (4 + 1)
    assert stored_bytes(pack_bcsr(kernel)) == 32 * 8 * (4 + 4) + 33 * 4
    assert stored_bytes(pack_blocks(kernel, (1, 16))) == 2 * 8 * (16 * 4 + 1)
    half = pack_fan_in(jnp.asarray(kernel, jnp.bfloat16))
    assert stored_bytes(half) == 32 * 8 * (2 + 1)


@pytest.mark.parametrize(
    ("inputs", "full", "dtype"),
    [
        (255, False, np.uint8),
        (256, True, np.uint8),
        (256, False, np.uint16),  # the padding needs a number of its own
        (257, True, np.uint16),
        (65_536, True, np.uint16),
        (65_536, False, np.uint32),
    ],
)
@pytest.mark.parametrize("batch", [1, 4])
def test_indices_are_as_small_as_they_can_be(inputs, full, dtype, batch):
    kernel = np.zeros((inputs, 2), np.float32)
    kernel[[0, inputs - 1], 0] = 1.0, 2.0
    kernel[[3, inputs - 2][: 1 + full], 1] = 3.0
    layer = pack_fan_in(kernel)
    assert layer.indices.dtype == dtype
    np.testing.assert_array_equal(unpack(layer), kernel)
    x = jnp.tile(jnp.arange(inputs, dtype=jnp.float32) % 1000, (batch, 1))
    np.testing.assert_allclose(apply(layer, x), exact(kernel, True, x))


def test_padding_neither_counts_nor_learns():
    kernel = jnp.array([[1.0, 0.0], [2.0, 0.0], [3.0, 4.0]])
    x = jnp.array([[1.0, 10.0, 100.0]] * 5)
    layers = (pack_fan_in(kernel), pack_blocks(kernel, (1, 1)))
    for layer in layers:
        assert layer.indices[1].tolist() == [2, 3, 3]
        for batch in (1, 5):
            gradient = jax.grad(
                lambda v, layer=layer, batch=batch: apply(with_values(layer, v), x[:batch]).sum()
            )(layer.values)
            np.testing.assert_array_equal(
                gradient.reshape(2, 3), batch * np.array([[1, 10, 100], [100, 0, 0]])
            )


def test_outputs_without_inputs_are_not_stored():
    kernel = jnp.array([[0.0, 1.0, 0.0, 2.0], [0.0, 0.0, 0.0, 3.0]])
    layer = pack_fan_in(kernel)
    assert layer.values.shape == (2, 2)
    assert layer.positions is not None
    assert layer.positions.tolist() == [2, 0, 2, 1]
    np.testing.assert_array_equal(unpack(layer), kernel)
    x = jnp.array([[1.0, 10.0]])
    assert apply(layer, x).tolist() == [[0.0, 1.0, 0.0, 32.0]]
    assert jax.grad(lambda x: apply(layer, x).sum())(x).tolist() == [[3.0, 3.0]]
    stored = pack_fan_in(kernel, drop_empty=False)
    assert stored.positions is None
    assert stored.values.shape == (4, 2)


def test_the_mask_alone_says_what_was_kept():
    kernel, mask = jnp.array([[0.0, 5.0], [jnp.nan, 7.0]]), np.array([[True, False], [True, True]])
    layer = pack_fan_in(kernel, mask)
    assert layer.indices.tolist() == [[0, 1], [1, 2]]
    np.testing.assert_array_equal(unpack(layer), [[0.0, 0.0], [np.nan, 7.0]])
    # Without a mask, zeros are what was pruned.
    assert pack_fan_in(jnp.array([[0.0], [5.0]])).values.tolist() == [[5.0]]


@EVERY
@pytest.mark.parametrize("shape", [(0, 16), (4, 0), (4, 16)])
def test_layers_that_store_nothing(pack, shape):
    kernel, mask = jnp.zeros(shape), np.zeros(shape, bool)
    layer = pack(kernel, mask)
    np.testing.assert_array_equal(unpack(layer), kernel)
    for batch in (0, 1, 5):
        x = jnp.ones((batch, shape[0]))
        assert apply(layer, x).tolist() == [[0.0] * shape[1]] * batch
        assert jax.grad(lambda x: apply(layer, x).sum())(x).tolist() == jnp.zeros_like(x).tolist()


@EVERY
def test_a_layer_is_a_pytree(pack):
    kernel, mask = drawn(13, (8, 16))
    layer = pack(kernel, mask)
    leaves, treedef = jax.tree.flatten(layer)
    again = jax.tree.unflatten(treedef, leaves)
    np.testing.assert_array_equal(unpack(again), unpack(layer))
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert jax.jit(lambda layer: layer)(layer).shape == (8, 16)
    zeros = jax.tree.map(jnp.zeros_like, layer)
    assert not np.asarray(zeros.values).any()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: pack_fan_in(jnp.ones((3, 3, 2, 4))), ValueError, r"reshape\(-1"),
        (lambda: pack_dense(jnp.ones(3)), ValueError, r"shape \(3,\): .* \[inputs, outputs\]"),
        (lambda: pack_bcsr(jnp.ones((2, 2), int)), TypeError, "holds int32.*stores floats"),
        (lambda: pack_fan_in(jnp.ones((2, 2)), jnp.ones(2)), ValueError, r"mask has shape \(2,\)"),
        (lambda: pack_fan_in(jnp.eye(3).at[:, 1].set(1.0), fan_in=2), ValueError, "output 1 keeps"),
        (lambda: jax.jit(pack_fan_in)(jnp.eye(2)), TypeError, "pack outside jit"),
        (lambda: pack_nofm(jnp.ones((8, 2)), 2, 4), ValueError, r"output 0 keeps 4 of inputs 0 to"),
        (
            lambda: pack_nofm(jnp.zeros((8, 2)).at[4:7, 1].set(1.0), 2, 4),
            ValueError,
            r"output 1 keeps 3 of inputs 4 to 7 \(group 1\), not at most 2 of 4: .*NofM\(2, 4\)",
        ),
        (lambda: pack_nofm(jnp.ones((6, 2)), 2, 4), ValueError, "6 inputs .* divisible by m=4"),
        (lambda: pack_nofm(jnp.ones((8, 2)), 5, 4), ValueError, "n=5 and m=4"),
        (lambda: pack_nofm(jnp.ones((512, 2)), 1, 512), ValueError, "m <= 256"),
        (
            lambda: pack_blocks(jnp.ones((6, 4)), (4, 4)),
            ValueError,
            "4 inputs and 4 outputs do not",
        ),
        (lambda: pack_blocks(jnp.ones((4, 4)), (0, 4)), ValueError, "choose a block that does"),
        (lambda: apply(pack_dense(jnp.ones((3, 2))), jnp.ones((3, 2))), ValueError, r"\[..., 3\]"),
        (lambda: apply(pack_dense(jnp.ones((3, 2))), jnp.ones(())), ValueError, r"shape \(\)"),
    ],
)
def test_what_does_not_fit_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
