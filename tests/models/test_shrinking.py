"""NNX modules that shrink, beside the masked ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from adaptivenet import models, pruning
from adaptivenet.models.functional import taken_apart
from adaptivenet.models.shrinking import TracedModule

KEY = jax.random.key(0)


class Convolutional(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.last = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.first(x)))
        return self.last(nnx.relu(self.depthwise(x)).mean((1, 2)))


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(30, 6, rngs=rngs)
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(6, 8, rngs=rngs))
        self.last = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, tokens):
        return self.last(self.rnn(self.embed(tokens))[:, -1])


class Attentive(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(30, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 8, decode=False, rngs=rngs)
        self.hidden = nnx.Linear(8, 12, rngs=rngs)
        self.last = nnx.Linear(12, 4, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        return self.last(nnx.gelu(self.hidden(x + self.attention(x)))).mean(1)


TOKENS = jax.random.randint(KEY, (2, 5), 0, 30)
CASES = {
    "mlp": (lambda rngs: models.MLP((6, 12, 8, 4), rngs=rngs), jax.random.normal(KEY, (2, 6))),
    "convolutional": (Convolutional, jax.random.normal(KEY, (2, 6, 6, 3))),
    "recurrent": (Recurrent, TOKENS),
    "attentive": (Attentive, TOKENS),
}


def halved(model, inputs, skip=()):
    """The module with half of the units of every group at zero."""
    params, rebuild = taken_apart(model, nnx.Not(nnx.RngState))
    coupling = pruning.couple(lambda p, *x: rebuild(p)(*x), params, inputs)
    kept = {
        g.name: np.arange(g.count // 2)
        for g in coupling.free
        if not any(part in g.name for part in skip)
    }
    return rebuild(pruning.zero_units(coupling, params, kept))


def close(one, other):
    np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_module_shrinks_and_goes_on_learning(name):
    make, inputs = CASES[name]
    with jax.numpy_dtype_promotion("standard"):
        # With fewer dimensions a head has another scale, and its class knows one number for all.
        model = halved(make(nnx.Rngs(0)), inputs, skip=("key/bias[1]", "out/kernel[1]"))
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

        def loss(model):
            return jnp.mean((model(inputs) - 1.0) ** 2)

        small = models.shrink(model, inputs, optimizer=optimizer)
        assert type(small.model) is type(model)
        assert small.report.after.parameters < small.report.before.parameters
        close(model(inputs), small.model(inputs))
        before = float(loss(small.model))
        for _ in range(3):
            small.optimizer.update(small.model, nnx.grad(loss)(small.model))
        assert float(loss(small.model)) < before


def test_what_an_optimizer_remembers_follows_its_units():
    make, inputs = CASES["mlp"]
    with jax.numpy_dtype_promotion("standard"):
        model = halved(make(nnx.Rngs(0)), inputs)
        optimizer = nnx.Optimizer(model, optax.sgd(1e-2, momentum=0.9), wrt=nnx.Param)
        grads = jax.tree.map(
            lambda leaf: jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape),
            nnx.state(model, nnx.Param),
        )
        optimizer.update(model, grads)
        for path in ("dense2", "dense3"):
            kernel = getattr(model, path).kernel
            half = kernel.shape[0] // 2
            kernel.set_value(kernel.get_value().at[half:].set(0))
        small = models.shrink(model, inputs, optimizer=optimizer)
    state = dict(nnx.to_flat_state(nnx.state(small.optimizer)))
    (trace,) = [v for p, v in state.items() if p[-2:] == ("dense2", "kernel")]
    expected = jnp.arange(12 * 8, dtype=jnp.float32).reshape(12, 8)[:6, :4]
    np.testing.assert_array_equal(trace.get_value(), expected)


def test_a_scale_that_would_change_is_traced():
    make, inputs = CASES["attentive"]
    with jax.numpy_dtype_promotion("standard"):
        model = make(nnx.Rngs(0))
        for part in (model.attention.query, model.attention.key):
            part.kernel.set_value(part.kernel.get_value().at[..., 1].set(0))
            part.bias.set_value(part.bias.get_value().at[..., 1].set(0))
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
        small = models.shrink(model, inputs, optimizer=optimizer)
        assert isinstance(small.model, TracedModule)
        close(model(inputs), small.model(inputs))

        def loss(model):
            return jnp.mean((model(inputs) - 1.0) ** 2)

        before = float(loss(small.model))
        for _ in range(3):
            small.optimizer.update(small.model, nnx.grad(loss)(small.model))
        assert float(loss(small.model)) < before
        more = jnp.concatenate([inputs, inputs])
        assert small.model(more).shape == (4, 4)


def test_the_optimizer_of_another_module_is_refused():
    make, inputs = CASES["mlp"]
    model = halved(make(nnx.Rngs(0)), inputs)
    other = nnx.Optimizer(
        models.MLP((6, 5, 4, 4), rngs=nnx.Rngs(0)), optax.adam(1.0), wrt=nnx.Param
    )
    with pytest.raises(ValueError, match="that of another module"):
        models.shrink(model, inputs, optimizer=other)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match="Linen module or a function use"):
        models.shrink(lambda x: x, jnp.ones(3))


def test_a_recurrent_module_is_functional():
    make, inputs = CASES["recurrent"]
    with jax.numpy_dtype_promotion("standard"):
        model = make(nnx.Rngs(0))
        apply, params = models.functional(model)
        close(jax.jit(apply)(params, inputs), model(inputs))
