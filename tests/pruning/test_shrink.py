"""Shrunk models against the masked ones that they come from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import adaptivenet as an
from adaptivenet import pruning
from adaptivenet.pruning.tracing.dead import cleared
from tests.pruning.architectures import OPS, Network

KEY = jax.random.key(0)


def close(one, other):
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * max(1, np.abs(one).max()))


def without(params, coupling, seed):
    """The parameters with random units of random groups at zero; and which."""
    rng = np.random.default_rng(seed)
    gone = {}
    for unit, group in zip(coupling.units, coupling.groups, strict=True):
        if group.why or rng.random() < 0.3:
            continue
        dead = rng.random(group.count) < rng.random()
        dead[rng.integers(group.count)] = False
        gone[unit] = dead
    leaves = [np.array(leaf) for leaf in jax.tree.leaves(params)]
    leaves = [cleared(leaf, node, gone) for leaf, node in zip(leaves, coupling.leaves, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), map(jnp.asarray, leaves)), gone


kinds = st.sampled_from(sorted(OPS))
names = st.lists(st.sampled_from(sorted({n for ops in OPS.values() for n in ops})), max_size=6)


@given(kinds, names, st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_random_networks_lose_random_units(kind, names, seed):
    net = Network(kind, names, seed)
    coupling = pruning.couple(net.apply, net.params, net.inputs)
    masked, _ = without(net.params, coupling, seed)
    small = pruning.shrink(net.apply, masked, net.inputs, spare=True)
    close(net.apply(masked, net.inputs), small.apply(small.params, net.inputs))
    more = jnp.concatenate([net.inputs, 2 * net.inputs, net.inputs[:1]])
    close(net.apply(masked, more), small.apply(small.params, more))


@given(kinds, names, st.integers(0, 2**16), st.sampled_from([0.7, 0.9, 0.97]))
@settings(max_examples=40, deadline=None)
def test_random_networks_lose_random_synapses(kind, names, seed, sparsity):
    net = Network(kind, names, seed)
    rng = np.random.default_rng(seed)
    masked = jax.tree.map(
        lambda leaf: jnp.where(
            rng.random(leaf.shape) < (sparsity if leaf.ndim > 1 else 0.2), 0, leaf
        ),
        net.params,
    )
    small = pruning.shrink(net.apply, masked, net.inputs, spare=True)
    close(net.apply(masked, net.inputs), small.apply(small.params, net.inputs))
    assert small.report.after.nonzero <= small.report.before.effective
    assert small.report.after.macs <= small.report.before.macs


@pytest.mark.parametrize("name", ["dense", "gated", "branches", "residual", "heads"])
def test_units_that_are_zero_are_taken_out(name):
    net = Network("flat", ["dense", name, "dense"], 3)
    coupling = pruning.couple(net.apply, net.params, net.inputs)
    masked, gone = without(net.params, coupling, 1)
    assert any(dead.any() for dead in gone.values())
    small = pruning.shrink(net.apply, masked, net.inputs)
    for unit, group in zip(coupling.units, coupling.groups, strict=True):
        if unit in gone:
            left = len(small.kept.get(group.name, range(group.count)))
            assert left <= int((~gone[unit]).sum()), group


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.Conv(8, (3, 3), use_bias=False)(x)
        h = nn.relu(nn.BatchNorm(use_running_average=True)(h))
        for _ in range(2):
            r = nn.relu(nn.GroupNorm(num_groups=None, group_size=1)(nn.Conv(16, (3, 3))(h)))
            h = nn.relu(h + nn.Conv(8, (3, 3))(r))
        h = nn.Conv(12, (3, 3), feature_group_count=4)(h)
        h = nn.relu(nn.Conv(12, (3, 3), feature_group_count=12, strides=2)(h))
        return nn.Dense(5)(nn.avg_pool(h, (2, 2), (2, 2)).mean((1, 2)))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.RNN(nn.OptimizedLSTMCell(16))(nn.Embed(30, 12)(tokens))
        return nn.Dense(4)(nn.RNN(nn.GRUCell(10))(x)[:, -1])


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(30, 16)
        x = embed(tokens) + self.param("position", nn.initializers.normal(1.0), (7, 16))
        for _ in range(2):
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(
                h, h, mask=nn.make_causal_mask(tokens)
            )
            x = x + nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(x))))
        return embed.attend(nn.LayerNorm()(x))


TOKENS = jax.random.randint(KEY, (2, 7), 0, 30)
FAMILIES = {
    "mlp": (
        an.models.mlp,
        an.models.mlp_init(KEY, (20, 32, 16, 5)),
        jax.random.normal(KEY, (3, 20)),
    ),
    "lenet5": (
        an.models.lenet5,
        an.models.lenet5_init(KEY, channels=(6, 8), hidden=20),
        jax.random.normal(KEY, (2, 784)),
    ),
    "residual": (Residual(), None, jax.random.normal(KEY, (2, 12, 12, 3))),
    "recurrent": (Recurrent(), None, TOKENS),
    "transformer": (Transformer(), None, TOKENS),
}


def family(name):
    apply, params, inputs = FAMILIES[name]
    if params is None:
        with jax.numpy_dtype_promotion("standard"):
            params = apply.init(KEY, inputs)
        apply = apply.apply

    def relaxed(params, *inputs):
        with jax.numpy_dtype_promotion("standard"):
            return apply(params, *inputs)

    return relaxed, params, inputs


# How many units each group has. The stream of the residual network is 4 groups of 2 channels, as a
# grouped convolution reads it; a depthwise one makes 4 groups of 3.
EXPECTED = {
    "mlp": [32, 16],
    "lenet5": [6, 8, 20],
    "residual": [2, 4, 16, 16, 3],
    "recurrent": [12, 16, 10],
    "transformer": [16, 4, 4, 4, 4, 4, 4, 32, 32],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_coupling_is_found_in_every_family(name):
    apply, params, inputs = family(name)
    found = pruning.couple(apply, params, inputs)
    assert sorted(group.count for group in found.free) == sorted(EXPECTED[name]), str(found)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_shrinks_and_gives_the_same(name):
    apply, params, inputs = family(name)
    coupling = pruning.couple(apply, params, inputs)
    masked, _ = without(params, coupling, 4)
    tx = optax.adam(1e-2)
    small = pruning.shrink(apply, masked, inputs, opt_state=tx.init(masked))
    close(apply(masked, inputs), small.apply(small.params, inputs))
    assert small.report.units, small.report
    assert small.report.after.parameters < small.report.before.parameters
    shapes = [leaf.shape for leaf in jax.tree.leaves(small.params)]
    assert [leaf.shape for leaf in jax.tree.leaves(small.opt_state[0].mu)] == shapes
    jitted = jax.jit(small.apply)(small.params, inputs)
    close(apply(masked, inputs), jitted)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_goes_on_as_that_of_the_masked_model(name):
    apply, params, inputs = family(name)
    coupling = pruning.couple(apply, params, inputs)
    masked, gone = without(params, coupling, 3)
    alive = jax.tree.unflatten(
        jax.tree.structure(masked),
        [cleared(np.ones(leaf.shape, bool), node, gone) for leaf, node in zip(
            jax.tree.leaves(masked), coupling.leaves, strict=True)],
    )  # fmt: skip
    tx = optax.adam(1e-2)
    target = jax.random.normal(KEY, apply(masked, inputs).shape)

    def train(apply, params, state, mask, steps):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda p: jnp.mean((apply(p, inputs) - target) ** 2))(params)
            grads = jax.tree.map(lambda g, m: jnp.where(m, g, 0), grads, mask)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        with jax.numpy_dtype_promotion("standard"):
            return jax.lax.scan(step, (params, state), length=steps)[0]

    masked, state = train(apply, masked, tx.init(masked), alive, 3)
    small = pruning.shrink(apply, masked, inputs, opt_state=state, constants=False)
    all_ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), small.params)
    one, _ = train(apply, masked, state, alive, 5)
    other, _ = train(small.apply, small.params, small.opt_state, all_ones, 5)
    one, other = np.asarray(apply(one, inputs)), np.asarray(small.apply(other, inputs))
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


def test_constant_units_go_into_the_bias_behind_them():
    params = an.models.mlp_init(KEY, (3, 4, 4, 2))
    params["dense1"]["bias"] = jnp.array([0.5, -1.0, 2.0, 0.25])
    params["dense1"]["kernel"] = params["dense1"]["kernel"].at[:, [0, 1, 2]].set(0)
    x = jax.random.normal(KEY, (5, 3))
    small = pruning.shrink(an.models.mlp, params, x)
    assert small.params["dense1"]["kernel"].shape == (3, 1)
    close(an.models.mlp(params, x), an.models.mlp(small.params, x))
    left = pruning.shrink(an.models.mlp, params, x, constants=False)
    # Unit 1 is negative and rectified away; the others give a constant and stay.
    assert left.params["dense1"]["kernel"].shape == (3, 3)


def test_a_constant_channel_stays_where_padding_makes_it_vary():
    def apply(params, x):
        for name in ("one", "two"):
            x = jax.lax.conv_general_dilated(
                x,
                params[name]["kernel"],
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = x + params[name]["bias"]
        return x

    shape = {"kernel": (3, 3, 2, 2), "bias": (2,)}
    params = {
        name: {key: jax.random.normal(jax.random.key(i), s) for key, s in shape.items()}
        for i, name in enumerate(("one", "two"))
    }
    params["one"]["kernel"] = params["one"]["kernel"].at[..., 0].set(0)
    x = jax.random.normal(KEY, (1, 4, 4, 2))
    small = pruning.shrink(apply, params, x)
    assert small.params["one"]["kernel"].shape == (3, 3, 2, 2)
    assert "place to place" in small.report.unabsorbed[0]
    close(apply(params, x), small.apply(small.params, x))


def test_effective_synapses_are_those_on_live_paths():
    rng = np.random.default_rng(0)
    params = an.models.mlp_init(KEY, (10, 12, 12, 3))
    params = {
        name: {"kernel": jnp.where(rng.random(layer["kernel"].shape) < 0.9, 0, layer["kernel"])}
        for name, layer in params.items()
    }
    masks = [np.asarray(layer["kernel"]) != 0 for layer in params.values()]
    live = pruning.effective_masks([jnp.asarray(mask) for mask in masks])
    report = pruning.shrink(an.models.mlp, params, jnp.ones((1, 10))).report
    assert report.before.nonzero == sum(int(mask.sum()) for mask in masks)
    assert report.before.effective == sum(int(mask.sum()) for mask in live)


def test_a_word_that_is_not_in_the_examples_keeps_its_meaning():
    params = {"embed": jnp.zeros((6, 4)).at[5].set(1.0).at[2, 0].set(1.0), "out": jnp.ones((4, 2))}

    def apply(params, tokens):
        return params["embed"][tokens] @ params["out"]

    tokens = jnp.array([[0, 2]])
    small = pruning.shrink(apply, params, tokens)
    assert small.params["embed"].shape == (6, 4)
    last = jnp.array([[5, 5]])
    close(apply(params, last), small.apply(small.params, last))


def test_macs_are_counted():
    x = jnp.ones((2, 5))
    report = pruning.shrink(an.models.mlp, an.models.mlp_init(KEY, (5, 7, 3)), x).report
    assert report.before.macs == report.after.macs == 2 * (5 * 7 + 7 * 3)
    params = an.models.lenet5_init(KEY)
    report = pruning.shrink(an.models.lenet5, params, jnp.ones((1, 784))).report
    assert report.before.macs == 576 * 25 * 20 + 64 * 500 * 50 + 800 * 500 + 5000
    assert report.before.bytes == 4 * 431_080


def test_a_group_that_would_vanish_is_named():
    params = an.models.mlp_init(KEY, (4, 3, 2))
    params["dense2"]["kernel"] = jnp.zeros((3, 2))
    with pytest.raises(ValueError, match=r"all 3 units of dense1/bias\[0\].*spare=True"):
        pruning.shrink(an.models.mlp, params, jnp.ones((1, 4)))
    small = pruning.shrink(an.models.mlp, params, jnp.ones((1, 4)), spare=True)
    assert small.params["dense1"]["kernel"].shape == (4, 1)


def test_shapes_that_depend_on_data_are_refused():
    def apply(params, x):
        return x[x > 0] @ params["w"]

    with pytest.raises(ValueError, match=r"cannot be traced.*depend on the values"):
        pruning.shrink(apply, {"w": jnp.ones((3, 2))}, jnp.ones(3))


def test_the_state_of_another_model_is_refused():
    params = an.models.mlp_init(KEY, (4, 3, 2))
    params["dense2"]["kernel"] = params["dense2"]["kernel"].at[0].set(0)
    other = optax.adam(1e-3).init(an.models.mlp_init(KEY, (4, 5, 2)))
    with pytest.raises(ValueError, match="state of another model"):
        pruning.shrink(an.models.mlp, params, jnp.ones((1, 4)), opt_state=other)


def test_what_is_no_array_is_named():
    with pytest.raises(TypeError, match="depth is a int"):
        pruning.shrink(an.models.mlp, {"depth": 3}, jnp.ones((1, 4)))


def test_without_a_dead_unit_nothing_changes():
    params = an.models.mlp_init(KEY, (4, 3, 2))
    small = pruning.shrink(an.models.mlp, params, jnp.ones((1, 4)))
    assert small.apply is an.models.mlp
    assert not small.kept
    jax.tree.map(np.testing.assert_array_equal, small.params, params)


def test_the_report_is_a_table():
    params = an.models.mlp_init(KEY, (4, 8, 2))
    params["dense2"]["kernel"] = params["dense2"]["kernel"].at[3:].set(0)
    text = str(pruning.shrink(an.models.mlp, params, jnp.ones((1, 4))).report)
    assert "8 -> 3" in text
    assert "parameters" in text
