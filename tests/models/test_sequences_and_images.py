"""The recurrent, attentive and residual networks beside Flax's layers, and how they shrink."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from adaptivenet import models, pruning
from adaptivenet.pruning.units import removable_groups

KEY = jax.random.key(0)


def close(one, other, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=tolerance, atol=tolerance)


def test_the_lstm_is_that_of_a_loop():
    params = models.lstm_init(KEY, 2, 3, 4)
    inputs = jax.random.normal(KEY, (5, 2))
    cells = jax.tree.map(np.asarray, params)["cells"]
    memory, output = np.zeros(3), np.zeros(3)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    for now in np.asarray(inputs):
        gates = now @ cells["kernel"] + output @ cells["carried"] + cells["bias"]
        i, f, g, o = gates[:3], gates[3:6], gates[6:9], gates[9:]
        memory = sigmoid(f) * memory + sigmoid(i) * np.tanh(g)
        output = sigmoid(o) * np.tanh(memory)
    expected = output @ np.asarray(params["readout"]["kernel"])
    close(models.lstm(params, inputs), expected)
    batch = jnp.stack([inputs, -inputs])
    close(models.lstm(params, batch)[0], expected)


def test_the_transformer_is_that_of_flax_layers():
    params = models.transformer_init(KEY, 11, 7, width=8, heads=2, blocks=2)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(KEY, leaf.shape), params)
    tokens = jax.random.randint(KEY, (3, 6), 0, 11)
    with jax.numpy_dtype_promotion("standard"):
        norm = nn.LayerNorm(epsilon=1e-5)
        attention = nn.MultiHeadDotProductAttention(num_heads=2, use_bias=False)
        x = params["embedding"][tokens] + params["position"][:6]
        for name in ("block1", "block2"):
            block = params[name]
            h = norm.apply({"params": block["norm1"]}, x)
            weights = {key: {"kernel": kernel} for key, kernel in block["attention"].items()}
            x = x + attention.apply({"params": weights}, h, mask=nn.make_causal_mask(tokens))
            h = norm.apply({"params": block["norm2"]}, x)
            h = nn.gelu(h @ block["hidden"]["kernel"] + block["hidden"]["bias"])
            x = x + h @ block["back"]["kernel"] + block["back"]["bias"]
        expected = norm.apply({"params": params["norm"]}, x) @ params["embedding"].T
    close(models.transformer(params, tokens), expected, 1e-4)
    close(models.transformer(params, tokens[0]), expected[0], 1e-4)


def test_the_transformer_sees_only_the_past():
    params = models.transformer_init(KEY, 11, 7, width=8, heads=2, blocks=2)
    tokens = jax.random.randint(KEY, (6,), 0, 11)
    changed = tokens.at[4].set((tokens[4] + 1) % 11)
    one, other = models.transformer(params, tokens), models.transformer(params, changed)
    close(one[:4], other[:4], 1e-6)
    assert float(jnp.abs(one[4:] - other[4:]).max()) > 1e-4


def test_the_residual_network_is_that_of_flax_layers():
    params, stats = models.resnet_init(KEY, 3, (4, 8), 5, depth=1)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(KEY, leaf.shape), params)
    x = jax.random.normal(KEY, (4, 8, 8, 3))

    def conv(weights, x, stride=1):
        size = weights["kernel"].shape
        layer = nn.Conv(size[-1], size[:2], strides=stride, use_bias=False)
        return layer.apply({"params": weights}, x)

    def norm(weights, known, x, train):
        layer = nn.BatchNorm(use_running_average=not train, momentum=0.9, use_fast_variance=False)
        state = {"params": weights, "batch_stats": known}
        return layer.apply(state, x, mutable=["batch_stats"])

    def whole(train):
        new = {}
        with jax.numpy_dtype_promotion("standard"):
            y, new["norm"] = norm(params["norm"], stats["norm"], conv(params["stem"], x), train)
            y = nn.relu(y)
            for name, stride in (("block1", 1), ("block2", 2)):
                block, known, new[name] = params[name], stats[name], {}
                h = conv(block["conv1"], y, stride)
                h, new[name]["norm1"] = norm(block["norm1"], known["norm1"], h, train)
                h = conv(block["conv2"], nn.relu(h))
                h, new[name]["norm2"] = norm(block["norm2"], known["norm2"], h, train)
                y = conv(block["shortcut"], y, stride) if "shortcut" in block else y
                y = nn.relu(y + h)
            return y.mean((1, 2)) @ params["readout"]["kernel"] + params["readout"]["bias"], new

    close(models.resnet(params, stats, x), whole(False)[0], 1e-4)
    logits, found = models.resnet(params, stats, x, train=True)
    expected, new = whole(True)
    close(logits, expected, 1e-4)
    close(found["block2"]["norm1"]["var"], new["block2"]["norm1"]["batch_stats"]["var"], 1e-4)
    close(found["norm"]["mean"], new["norm"]["batch_stats"]["mean"], 1e-4)


CASES = {
    "lstm": (models.lstm, models.lstm_init(KEY, 2, 6, 4), jnp.ones((2, 5, 2)), [6]),
    "transformer": (
        models.transformer,
        models.transformer_init(KEY, 11, 7, width=8, heads=2, blocks=1),
        jnp.zeros((2, 6), jnp.int32),
        [2, 4, 4, 8, 32],
    ),
    "resnet": (
        lambda p, x: models.resnet(*p, x),
        models.resnet_init(KEY, 3, (4, 8), 5),
        jnp.ones((2, 8, 8, 3)),
        [4, 4, 8, 8],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_their_units_are_found_and_taken_out(name):
    apply, params, inputs, counts = CASES[name]
    coupling = pruning.couple(apply, params, inputs)
    assert sorted(group.count for group in coupling.free) == counts, str(coupling)
    names = removable_groups(coupling, params, inputs)
    kept = {g.name: np.arange(g.count // 2) for g in coupling.free if g.name in names}
    assert len(kept) == len(counts) - (name == "transformer")  # its stream runs through norms
    masked = pruning.zero_units(coupling, params, kept)
    small = pruning.shrink(apply, masked, inputs)
    assert {n: len(k) for n, k in small.kept.items()} == {n: len(k) for n, k in kept.items()}
    close(apply(masked, inputs), small.apply(small.params, inputs))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"\[..., time, 2\], not \(5, 3\)"):
        models.lstm(models.lstm_init(KEY, 2, 3, 4), jnp.ones((5, 3)))
    params = models.transformer_init(KEY, 11, 7, width=8, heads=2)
    with pytest.raises(ValueError, match="8 tokens are more than the 7 positions"):
        models.transformer(params, jnp.zeros(8, jnp.int32))
    with pytest.raises(TypeError, match="whole numbers, got float32"):
        models.transformer(params, jnp.zeros(4))
    with pytest.raises(ValueError, match="3 heads do not divide a width of 8"):
        models.transformer_init(KEY, 11, 7, width=8, heads=3)
    with pytest.raises(ValueError, match=r"height, width, 3\], not \(8, 8, 3\)"):
        models.resnet(*models.resnet_init(KEY, 3, (4, 8), 5), jnp.ones((8, 8, 3)))
