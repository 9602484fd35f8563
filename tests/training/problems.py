"""A small classification problem, and its pieces for training."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet.models import mlp, mlp_init
from adaptivenet.training import init_state, make_epoch, make_evaluate, over_population

SIZES = (6, 16, 3)


def draw_data(count: int = 203, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Inputs `[count, 6]` and labels that a random linear map gives."""
    draw = np.random.default_rng(seed)
    inputs = draw.normal(size=(count, SIZES[0])).astype(np.float32)
    labels = (inputs @ np.random.default_rng(9).normal(size=(SIZES[0], SIZES[-1]))).argmax(-1)
    return jnp.asarray(inputs), jnp.asarray(labels, jnp.int32)


def init_params(key):
    return mlp_init(key, SIZES)


def loss(params, inputs, targets, key):
    logits = mlp(params, inputs, key=key, dropout=0.2)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return losses.mean(), {"accuracy": (logits.argmax(-1) == targets).mean()}


def per_example(params, inputs, targets):
    logits = mlp(params, inputs)
    return {
        "loss": optax.softmax_cross_entropy_with_integer_labels(logits, targets),
        "accuracy": logits.argmax(-1) == targets,
    }


class Problem(NamedTuple):
    """What `fit` takes."""

    state: object
    epoch: object
    evaluate: object
    data: tuple[jax.Array, ...]

    def arguments(self):
        return {"epoch": self.epoch, "evaluate": self.evaluate, "data": self.data}


def population(members: int = 2, tx=None, method="vmap", batch_size: int = 16) -> Problem:
    tx = optax.adam(1e-2) if tx is None else tx
    keys = jax.random.split(jax.random.key(0), members)
    return Problem(
        jax.vmap(lambda key: init_state(init_params, tx, key))(keys),
        over_population(
            make_epoch(loss, tx, batch_size=batch_size), (0, None, None), method=method
        ),
        over_population(make_evaluate(per_example, batch_size=32), (0, None, None), method=method),
        (*draw_data(), *draw_data(77, seed=1)),
    )


def single(tx=None, batch_size: int = 16) -> Problem:
    tx = optax.adam(1e-2) if tx is None else tx
    return Problem(
        init_state(init_params, tx, jax.random.key(0)),
        jax.jit(make_epoch(loss, tx, batch_size=batch_size)),
        jax.jit(make_evaluate(per_example, batch_size=32)),
        (*draw_data(), *draw_data(77, seed=1)),
    )


def same_bits(a, b) -> bool:
    """Whether two trees of arrays agree bit for bit."""
    flat_a, tree_a = jax.tree.flatten(a)
    flat_b, tree_b = jax.tree.flatten(b)

    def raw(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        return array.dtype, array.shape, array.tobytes()

    return tree_a == tree_b and all(map(lambda x, y: raw(x) == raw(y), flat_a, flat_b))
