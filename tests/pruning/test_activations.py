"""Captured inputs: by hand for dense layers, by im2col for convolutions, on any kind of model."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adaptivenet import pruning, trees
from adaptivenet.pruning import activations

SIZES = (3, 5, 4, 2)


def init(key, sizes=SIZES):
    return {
        f"dense{layer}": {
            "kernel": jax.random.normal(jax.random.fold_in(key, layer), pair),
            "bias": jax.random.normal(jax.random.fold_in(key, 10 + layer), pair[1:]),
        }
        for layer, pair in enumerate(itertools.pairwise(sizes))
    }


def apply(params, inputs):
    hidden = inputs
    for place in range(len(params)):
        layer = params[f"dense{place}"]
        hidden = hidden @ layer["kernel"] + layer["bias"]
        hidden = jax.nn.relu(hidden) if place + 1 < len(params) else hidden
    return hidden


def by_hand(params, inputs):
    """The input of each layer, in numpy."""
    hidden, found = np.asarray(inputs, np.float64), {}
    for place in range(len(params)):
        layer = params[f"dense{place}"]
        found[f"dense{place}"] = hidden
        hidden = hidden @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"])
        hidden = np.maximum(hidden, 0)
    return found


PARAMS = init(jax.random.key(0))
INPUTS = jax.random.normal(jax.random.key(1), (7, 3))


def check(got_norms, got_grams, expected, rtol=1e-5):
    """Norms [inputs, 1] and Gram matrices [inputs, inputs] of matrices [examples, inputs]."""
    norms = np.sqrt((expected**2).sum(axis=0))[:, None]
    np.testing.assert_allclose(got_norms, norms, rtol=rtol)
    np.testing.assert_allclose(got_grams, expected.T @ expected, rtol=rtol, atol=1e-4)
    assert got_norms.dtype == got_grams.dtype == jnp.float32


def test_plain_functions():
    norms = activations.input_norms(apply, PARAMS, INPUTS)
    grams = activations.input_grams(apply, PARAMS, INPUTS)
    for name, expected in by_hand(PARAMS, INPUTS).items():
        check(norms[name]["kernel"], grams[name]["kernel"], expected)
        assert isinstance(norms[name]["bias"], optax.MaskedNode)
        assert isinstance(grams[name]["bias"], optax.MaskedNode)


def test_linen():
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            hidden = inputs
            for place, width in enumerate(SIZES[1:]):
                hidden = nn.Dense(width, name=f"dense{place}")(hidden)
                hidden = nn.relu(hidden) if place + 2 < len(SIZES) else hidden
            return hidden

    net = Net()
    for wrapped in (
        lambda p, x: net.apply({"params": p}, x),
        jax.jit(lambda p, x: net.apply({"params": p}, x)),
    ):
        same(activations.input_norms(wrapped, PARAMS, INPUTS), "norms")
        same(activations.input_grams(wrapped, PARAMS, INPUTS), "grams")


def test_nnx():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            for place, pair in enumerate(itertools.pairwise(SIZES)):
                setattr(self, f"dense{place}", nnx.Linear(*pair, rngs=rngs))

        def __call__(self, inputs):
            hidden = inputs
            for place in range(len(SIZES) - 1):
                hidden = getattr(self, f"dense{place}")(hidden)
                hidden = jax.nn.relu(hidden) if place + 2 < len(SIZES) else hidden
            return hidden

    model = Net(nnx.Rngs(0))
    graph, state = nnx.split(model, nnx.Param)
    for name, layer in PARAMS.items():
        for part, value in layer.items():
            state[name][part].set_value(value)
    norms = activations.input_norms(lambda s, x: nnx.merge(graph, s)(x), state, INPUTS)
    grams = activations.input_grams(lambda s, x: nnx.merge(graph, s)(x), state, INPUTS)
    same(norms, "norms")
    same(grams, "grams")
    # An nnx.State of norms serves as the signal of a Linen-like tree: paths decide.
    scores = activations.wanda(trees.synapses(PARAMS), activations=norms)
    expected = activations.wanda(
        trees.synapses(PARAMS), activations=activations.input_norms(apply, PARAMS, INPUTS)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), scores, expected)


def same(got, kind):
    """Equal to what the plain function gives, path by path."""
    capture = {"norms": activations.input_norms, "grams": activations.input_grams}[kind]
    expected = capture(apply, PARAMS, INPUTS)
    assert trees.paths(got) == trees.paths(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_equinox():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(3, 2, 5, depth=2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)

    def forward(params, inputs):
        return jax.vmap(eqx.combine(params, static))(inputs)

    norms = activations.input_norms(forward, params, INPUTS)
    grams = activations.input_grams(forward, params, INPUTS)
    hidden = np.asarray(INPUTS, np.float64)
    for place, layer in enumerate(model.layers):
        # Weights are [outputs, inputs] here.
        norm, gram = norms.layers[place].weight, grams.layers[place].weight
        assert norm.shape == (1, layer.weight.shape[1])
        check(norm.T, gram, hidden)
        hidden = np.maximum(hidden @ np.asarray(layer.weight).T + np.asarray(layer.bias), 0)


MOVES = {
    "transposed": lambda w, x: x @ w.T,
    "on the left": lambda w, x: (w @ x.T).T,
    "reshaped": lambda w, x: x @ w.T.reshape(2, 3, 4).reshape(6, 4),
    "masked": lambda w, x: x @ (w * jnp.eye(4, 6)).T,
    "cast": lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16).T,
    "scaled": lambda w, x: x @ (jnp.tanh(w) / 3.0 + 1.0).T,
    "reversed": lambda w, x: x @ jnp.flip(jnp.flip(w, 1), 1).T,
    "sliced": lambda w, x: jnp.concatenate([x @ w[:1].T, x @ w[1:].T], axis=-1),
    "split": lambda w, x: jnp.concatenate([x @ part.T for part in jnp.split(w, 2)], axis=-1),
    "joined": lambda w, x: x @ jnp.concatenate([w, jnp.ones((2, 6))]).T,
    "fused inputs": lambda w, x: (
        jnp.concatenate([jnp.ones((len(x), 2)), x], axis=1)
        @ jnp.concatenate([jnp.ones((2, 4)), w.T])
    ),
    "einsum": lambda w, x: jnp.einsum("bi,oi->ob", x, w),
    "in jit": jax.jit(lambda w, x: x @ w.T),
    "in checkpoint": jax.checkpoint(lambda w, x: jnp.sin(x @ w.T)),
    "vmapped": lambda w, x: jax.vmap(lambda row: w @ row)(x),
    "example by example": lambda w, x: jax.lax.map(lambda row: w @ row, x),
    "a loop": lambda w, x: sum(w @ row for row in x),
}


@pytest.mark.parametrize("name", MOVES)
def test_parameters_are_followed(name):
    """A parameter [outputs, inputs], however it reaches the product."""
    w = jax.random.normal(jax.random.key(2), (4, 6))
    x = jax.random.normal(jax.random.key(3), (5, 6))
    norm = activations.input_norms(MOVES[name], w, x)
    gram_of = activations.input_grams
    expected = np.asarray(x, np.float64)
    rtol = 1e-2 if name == "cast" else 1e-5
    norms = np.sqrt((expected**2).sum(axis=0))[None]
    parts = name in ("sliced", "split")
    assert norm.shape == (4 if parts else 1, 6)
    np.testing.assert_allclose(norm, np.broadcast_to(norms, norm.shape), rtol=rtol)
    if parts:  # two products with some of the outputs each
        with pytest.raises(ValueError, match="takes part in a product only in part"):
            gram_of(MOVES[name], w, x)
    else:
        atol = 0.1 if name == "cast" else 1e-4
        np.testing.assert_allclose(
            gram_of(MOVES[name], w, x), expected.T @ expected, rtol=rtol, atol=atol
        )


def test_a_custom_gradient_is_looked_into():
    @jax.custom_vjp
    def layer(w, x):
        return x @ w

    layer.defvjp(lambda w, x: (layer(w, x), (w, x)), lambda saved, g: (g, g))
    x = jnp.array([[3.0, 1.0], [4.0, 2.0]])
    got = activations.input_norms(layer, jnp.ones((2, 2)), x)
    np.testing.assert_allclose(got, [[5.0], [5**0.5]], rtol=1e-6)


def test_several_uses_add_up():
    w = jnp.eye(3) * 2.0
    x = jax.random.normal(jax.random.key(0), (4, 3))

    def twice(w, x):
        return (x @ w) @ w

    expected = np.concatenate([np.asarray(x, np.float64), 2 * np.asarray(x, np.float64)])
    check(activations.input_norms(twice, w, x), activations.input_grams(twice, w, x), expected)


def test_a_tied_transposed_weight_has_norms_of_both_uses_and_no_gram():
    w = jax.random.normal(jax.random.key(0), (3, 2))
    x = jax.random.normal(jax.random.key(1), (4, 3))

    def autoencoder(w, x):
        return (x @ w) @ w.T

    code = np.asarray(x @ w, np.float64)
    squares = (np.asarray(x, np.float64) ** 2).sum(0)[:, None] + (code**2).sum(0)[None]
    got = activations.input_norms(autoencoder, w, x)
    np.testing.assert_allclose(got, np.sqrt(squares), rtol=1e-5)
    with pytest.raises(ValueError, match="along different axes and has no single Gram"):
        activations.input_grams(autoencoder, w, x)


def test_kernels_of_several_axes():
    """Attention-like: [features, heads, size] and [heads, size, features]."""
    q = jax.random.normal(jax.random.key(0), (4, 2, 3))
    o = jax.random.normal(jax.random.key(1), (2, 3, 4))
    x = jax.random.normal(jax.random.key(2), (5, 4))

    def forward(params, x):
        hidden = jnp.einsum("bf,fhs->bhs", x, params["q"])
        return jnp.einsum("bhs,hsf->bf", hidden, params["o"])

    hidden = np.einsum("bf,fhs->bhs", x, q).astype(np.float64)
    norms = activations.input_norms(forward, {"q": q, "o": o}, x)
    assert norms["q"].shape == (4, 1, 1)
    assert norms["o"].shape == (2, 3, 1)
    np.testing.assert_allclose(norms["q"][:, 0, 0], np.linalg.norm(x, axis=0), rtol=1e-5)
    np.testing.assert_allclose(norms["o"][..., 0], np.linalg.norm(hidden, axis=0), rtol=1e-5)
    grams = activations.input_grams(forward, {"q": q, "o": o}, x)
    flat = hidden.reshape(5, 6)
    np.testing.assert_allclose(grams["o"], flat.T @ flat, rtol=1e-4, atol=1e-4)


def test_batched_kernels():
    """Experts: one product each."""
    w = jax.random.normal(jax.random.key(0), (3, 4, 2))
    x = jax.random.normal(jax.random.key(1), (3, 5, 4))

    def forward(w, x):
        return jnp.einsum("ebi,eio->ebo", x, w)

    norms = activations.input_norms(forward, w, x)
    np.testing.assert_allclose(norms[..., 0], np.linalg.norm(x, axis=1), rtol=1e-5)
    grams = activations.input_grams(forward, w, x)
    np.testing.assert_allclose(grams, np.einsum("ebi,ebj->eij", x, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_recurrent_network_sums_over_time(reverse):
    params = {
        "in": jax.random.normal(jax.random.key(0), (3, 4)),
        "hidden": 0.5 * jax.random.normal(jax.random.key(1), (4, 4)),
    }
    x = jax.random.normal(jax.random.key(2), (6, 2, 3))  # time, batch, features

    def forward(params, x):
        def step(h, now):
            h = jnp.tanh(now @ params["in"] + h @ params["hidden"])
            return h, h.sum()

        return jax.lax.scan(step, jnp.zeros((2, 4)), x, reverse=reverse)

    hidden, states = np.zeros((2, 4)), []
    for now in np.asarray(x, np.float64)[:: -1 if reverse else 1]:
        states.append(hidden)
        hidden = np.tanh(now @ np.asarray(params["in"]) + hidden @ np.asarray(params["hidden"]))
    norms = activations.input_norms(forward, params, x)
    grams = activations.input_grams(forward, params, x)
    check(norms["in"], grams["in"], np.asarray(x, np.float64).reshape(-1, 3))
    check(norms["hidden"], grams["hidden"], np.concatenate(states))


@pytest.mark.parametrize("reverse", [False, True])
def test_layers_stacked_for_a_scan_are_kept_apart(reverse):
    w = jax.random.normal(jax.random.key(0), (3, 4, 4))
    x = jax.random.normal(jax.random.key(1), (5, 4))

    def forward(w, x):
        return jax.lax.scan(lambda h, k: (jax.nn.relu(h @ k), None), x, w, reverse=reverse)[0]

    norms = activations.input_norms(forward, w, x)
    grams = activations.input_grams(forward, w, x)
    assert norms.shape == (3, 4, 1)
    assert grams.shape == (3, 4, 4)
    hidden = np.asarray(x, np.float64)
    for layer in range(3)[:: -1 if reverse else 1]:
        check(norms[layer], grams[layer], hidden)
        hidden = np.maximum(hidden @ np.asarray(w[layer]), 0)


def test_a_scan_over_layers_within_a_scan_over_time():
    w = 0.5 * jax.random.normal(jax.random.key(0), (2, 3, 3))
    x = jax.random.normal(jax.random.key(1), (4, 5, 3))

    def forward(w, x):
        def layer(h, k):
            return jnp.tanh(h @ k), None

        def step(h, now):
            return jax.lax.scan(layer, h + now, w)[0], None

        return jax.lax.scan(step, jnp.zeros((5, 3)), x)[0]

    rows, hidden = [[], []], np.zeros((5, 3))
    for now in np.asarray(x, np.float64):
        hidden = hidden + now
        for layer in range(2):
            rows[layer].append(hidden)
            hidden = np.tanh(hidden @ np.asarray(w[layer]))
    norms = activations.input_norms(forward, w, x)
    grams = activations.input_grams(forward, w, x)
    for layer in range(2):
        check(norms[layer], grams[layer], np.concatenate(rows[layer]))


def test_fused_gates_of_a_linen_lstm():
    """OptimizedLSTMCell joins eight kernels into two before the products."""
    from flax import linen as nn

    net = nn.RNN(nn.OptimizedLSTMCell(4), name="rnn")
    x = jax.random.normal(jax.random.key(0), (2, 5, 3))
    variables = net.init(jax.random.key(1), x)
    outputs = net.apply(variables, x)
    norms = activations.input_norms(net.apply, variables, x)
    grams = activations.input_grams(net.apply, variables, x)
    before = np.concatenate([np.zeros((2, 1, 4)), np.asarray(outputs[:, :-1])], axis=1)
    cells = norms["params"]["cell"]
    for gate in "ifgo":
        check(
            cells[f"i{gate}"]["kernel"],
            grams["params"]["cell"][f"i{gate}"]["kernel"],
            np.asarray(x, np.float64).reshape(-1, 3),
        )
        check(
            cells[f"h{gate}"]["kernel"],
            grams["params"]["cell"][f"h{gate}"]["kernel"],
            before.reshape(-1, 4),
            rtol=1e-4,
        )


def patches_by_hand(images, kernel, strides, padding, dilation=(1, 1)):
    """im2col in numpy: rows [examples * positions, height * width * channels]."""
    images = np.pad(np.asarray(images, np.float64), [(0, 0), *padding, (0, 0)])
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    starts = [
        range(0, images.shape[axis + 1] - spans[axis] + 1, strides[axis]) for axis in range(2)
    ]
    rows = []
    for example, top, left in itertools.product(range(len(images)), *starts):
        window = images[
            example, top : top + spans[0] : dilation[0], left : left + spans[1] : dilation[1]
        ]
        rows.append(window.ravel())
    return np.stack(rows)


@pytest.mark.parametrize(
    ("strides", "padding", "dilation"),
    [
        ((1, 1), [(0, 0), (0, 0)], (1, 1)),
        ((2, 1), [(1, 1), (0, 2)], (1, 1)),
        ((1, 1), [(1, 1), (1, 1)], (2, 1)),
    ],
)
def test_convolutions(strides, padding, dilation):
    images = jax.random.normal(jax.random.key(0), (2, 6, 5, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 2, 3, 4))

    def forward(kernel, images):
        return jax.lax.conv_general_dilated(
            images,
            kernel,
            strides,
            padding,
            rhs_dilation=dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    rows = patches_by_hand(images, (3, 2), strides, padding, dilation)
    # The rows are what the kernel multiplies: its product is the convolution.
    by_hand = rows @ np.asarray(kernel).reshape(-1, 4)
    np.testing.assert_allclose(
        np.ravel(forward(kernel, images)), np.ravel(by_hand), rtol=1e-4, atol=1e-4
    )
    norms = activations.input_norms(forward, kernel, images)
    grams = activations.input_grams(forward, kernel, images)
    assert norms.shape == (3, 2, 3, 1)
    check(norms.reshape(-1, 1), grams, rows, rtol=1e-4)


def test_grouped_and_depthwise_convolutions():
    images = jax.random.normal(jax.random.key(0), (2, 5, 5, 4))

    def forward(kernel, images):
        return jax.lax.conv_general_dilated(
            images,
            kernel,
            (1, 1),
            "VALID",
            feature_group_count=4 // kernel.shape[2],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def rows_of(group, width):
        part = np.asarray(images)[..., group * width : (group + 1) * width]
        return patches_by_hand(part, (2, 2), (1, 1), [(0, 0), (0, 0)])

    grouped = jnp.ones((2, 2, 2, 6))  # two groups of three outputs
    norms = activations.input_norms(forward, grouped, images)
    assert norms.shape == (2, 2, 2, 6)
    for output in range(6):
        expected = np.linalg.norm(rows_of(output // 3, 2), axis=0)
        np.testing.assert_allclose(np.ravel(norms[..., output]), expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"no single Gram matrix: .* \(a grouped convolution\?\)"):
        activations.input_grams(forward, grouped, images)

    depthwise = jnp.ones((2, 2, 1, 4))
    grams = activations.input_grams(forward, depthwise, images)
    assert grams.shape == (4, 4, 4)
    for channel in range(4):
        rows = rows_of(channel, 1)
        np.testing.assert_allclose(grams[channel], rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_a_linen_convolution():
    from flax import linen as nn

    net = nn.Conv(4, (3, 3), padding="SAME")
    images = jax.random.normal(jax.random.key(0), (2, 5, 5, 3))
    variables = net.init(jax.random.key(1), images)
    rows = patches_by_hand(images, (3, 3), (1, 1), [(1, 1), (1, 1)])
    norms = activations.input_norms(net.apply, variables, images)["params"]["kernel"]
    grams = activations.input_grams(net.apply, variables, images)["params"]["kernel"]
    check(norms.reshape(-1, 1), grams, rows, rtol=1e-4)


def test_wanda_is_magnitude_times_norm():
    norms = activations.input_norms(apply, PARAMS, INPUTS)
    scores = activations.wanda(trees.synapses(PARAMS), activations=norms)
    for name, expected in by_hand(PARAMS, INPUTS).items():
        weight = np.abs(np.asarray(PARAMS[name]["kernel"], np.float64))
        norm = np.linalg.norm(expected, axis=0)[:, None]
        np.testing.assert_allclose(scores[name]["kernel"], weight * norm, rtol=1e-5)
        # A plain vector a kernel will do.
    vectors = jax.tree.map(lambda leaf: leaf[:, 0], norms)
    again = activations.wanda(trees.synapses(PARAMS), activations=vectors)
    jax.tree.map(np.testing.assert_array_equal, scores, again)


def test_wanda_is_what_an_output_loses():
    """Of a single-layer network: the norm of the change of the output when the synapse is cut."""
    w = {"w": jax.random.normal(jax.random.key(0), (3, 2))}
    x = jax.random.normal(jax.random.key(1), (6, 3))
    norms = activations.input_norms(lambda p, x: x @ p["w"], w, x)
    scores = activations.wanda(w, activations=norms)["w"]
    for place in np.ndindex(3, 2):
        without = w["w"].at[place].set(0.0)
        lost = np.linalg.norm(x @ w["w"] - x @ without)
        np.testing.assert_allclose(scores[place], lost, rtol=1e-4)


def test_wanda_within_prune():
    params = {"kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]]), "bias": jnp.ones(2)}

    def forward(p, x):
        return x @ p["kernel"] + p["bias"]

    norms = activations.input_norms(forward, params, jnp.array([[10.0, 1.0]]))
    pruner = pruning.prune(0.5, score=activations.wanda, every=None)
    pruned, _ = pruning.revise(pruner, params, pruner.init(params), activations=norms)
    assert pruned["kernel"].tolist() == [[1.0, -2.0], [0.0, 0.0]]
    step = pruning.prune(0.5, score=activations.wanda)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, state = jax.jit(step.update)(zero, step.init(params), params, activations=norms)
    assert optax.apply_updates(params, updates)["kernel"].tolist() == pruned["kernel"].tolist()
    with pytest.raises(ValueError, match=r"wanda\(\) asks for the signal 'activations'"):
        step.update(zero, state, params)


def test_under_jit_and_vmap():
    members = [init(jax.random.key(seed)) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    for capture in (activations.input_norms, activations.input_grams):

        def run(params, inputs, capture=capture):
            return capture(apply, params, inputs)

        together = jax.jit(jax.vmap(run, in_axes=(0, None)))(stacked, INPUTS)
        for place, params in enumerate(members):
            one = jax.tree.map(lambda leaf: leaf[place], together)  # noqa: B023 (used at once)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
                one,
                run(params, INPUTS),
            )


def test_what_multiplies_no_input_is_named():
    params = {"embed": jnp.ones((7, 3)), "dense": {"kernel": jnp.ones((3, 2))}}
    tokens = jnp.array([1, 5])

    def forward(p, tokens):
        return p["embed"][tokens] @ p["dense"]["kernel"]

    message = r"leaf 'embed' multiplies nothing .* \(it was last seen to enter 'gather'\)\. Leave"
    with pytest.raises(ValueError, match=message):
        activations.input_norms(forward, params, tokens)
    got = activations.input_norms(forward, params, tokens, select="kernel")
    assert trees.paths(got) == ("dense/kernel",)
    np.testing.assert_allclose(got["dense"]["kernel"], 2**0.5 * np.ones((3, 1)), rtol=1e-6)


@pytest.mark.parametrize(
    ("forward", "kind"),
    [
        (lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x), "cond"),
        (
            lambda w, x: jax.lax.fori_loop(0, x.shape[0], lambda i, h: h @ w, x),
            "carry of scan|while",
        ),
        (lambda w, x: x * (w @ w), "dot_general"),
        (lambda w, x: x @ (w * x[0]), "mul"),
    ],
)
def test_what_is_not_looked_into_is_named(forward, kind):
    w = jnp.ones((3, 3))
    if "while" in kind:
        forward = lambda w, x: jax.lax.while_loop(lambda h: h[0, 0] < 5, lambda h: h @ w, x)  # noqa: E731
    with pytest.raises(ValueError, match=f"it was last seen to enter '({kind})'"):
        activations.input_norms(forward, w, jnp.ones((3, 3)))


def test_inputs_that_are_closed_over_are_not_seen():
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="check that apply"):
        activations.input_norms(lambda p: x @ p["w"], {"w": jnp.ones((3, 2))})


def test_an_added_parameter_is_no_weight():
    """Positions are added to what the inputs gave; what follows is data, not a parameter."""
    params = {"positions": jnp.ones((4, 3)), "kernel": jnp.full((3, 2), 2.0)}
    x = jax.random.normal(jax.random.key(0), (4, 3))

    def forward(p, x):
        return (x + p["positions"]) @ p["kernel"]

    got = activations.input_norms(forward, params, x, select="kernel")["kernel"]
    np.testing.assert_allclose(got[:, 0], np.linalg.norm(x + 1, axis=0), rtol=1e-5)
    with pytest.raises(ValueError, match=r"'positions' multiplies nothing .* enter 'add'"):
        activations.input_norms(forward, params, x)


def test_norms_that_do_not_fit_are_refused_by_path():
    params = {"dense": {"kernel": jnp.ones((3, 2))}}
    for wrong in (jnp.ones(4), jnp.ones((2, 1)), jnp.ones((3, 2, 1))):
        with pytest.raises(ValueError, match=r"at 'dense/kernel', which does not fit a kernel of"):
            activations.wanda(params, activations={"dense": {"kernel": wrong}})
    with pytest.raises(ValueError, match=r"activations have no leaf 'dense/kernel'"):
        activations.wanda(params, activations={"dense": {"kernel": optax.MaskedNode()}})


def test_bfloat16_sums_in_float32():
    x = jnp.ones((1000, 2), jnp.bfloat16)
    got = activations.input_norms(lambda w, x: x @ w, jnp.ones((2, 2), jnp.bfloat16), x)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, 1000**0.5, rtol=1e-6)
