"""Networks trained in rounds: what the studies of pruning have in common.

A round is an event (a cut, a decay, a new mask) and then some steps of training. Everything is a
pure function of one network, to be vmapped over seeds and settings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import adaptivenet as an
from adaptivenet import models

PyTree = Any


class Task(NamedTuple):
    """Training data, and the data that accuracies are measured on, on the device."""

    inputs: jax.Array
    targets: jax.Array
    check_inputs: jax.Array
    check_targets: jax.Array


class Net(NamedTuple):
    """A network in training."""

    params: PyTree
    opt_state: PyTree


def task(data: Any, measured_on: str) -> Task:
    """Puts a data set on the device.

    Args:
      data: a data set with a validation part.
      measured_on: "validation" or "test".

    Returns:
      The task.
    """
    check = (
        data.validation if measured_on == "validation" else (data.test_inputs, data.test_targets)
    )
    arrays = map(jnp.asarray, (data.train_inputs, data.train_targets, *check))
    return Task(*arrays)


def accuracy(params: PyTree, task: Task) -> jax.Array:
    """Share of the check data that is classified rightly."""
    logits = models.mlp(params, task.check_inputs)
    return jnp.mean((jnp.argmax(logits, -1) == task.check_targets).astype(jnp.float32))


def noisy(params: PyTree, scales: PyTree, inputs: jax.Array, key: jax.Array) -> jax.Array:
    """Logits of an MLP under independent Gaussian parameters, drawn at every unit's sum."""
    hidden = inputs
    for number, (name, layer) in enumerate(params.items()):
        hidden = jax.nn.relu(hidden) if number else hidden
        hidden = an.posterior.meanfield.local_dense(
            hidden,
            layer["kernel"],
            scales[name]["kernel"],
            jax.random.fold_in(key, number),
            bias=layer.get("bias"),
            bias_scale=scales[name].get("bias"),
        )
    return hidden


def train(
    net: Net,
    key: jax.Array,
    task: Task,
    tx: Any,
    steps: int,
    *,
    batch_size: int = 128,
    masked: Callable[[PyTree], PyTree] = lambda params: params,
) -> Net:
    """Some steps on batches drawn by the key (the same key, the same batches).

    Args:
      net: the network.
      key: of the batches.
      task: the task.
      tx: an optax transformation.
      steps: how many.
      batch_size: examples a step.
      masked: the parameters that the forward pass sees; the gradient is taken there and applied to
        the parameters beneath (straight-through).

    Returns:
      The network after them.
    """
    examples = len(task.inputs)
    tx = optax.with_extra_args_support(tx)

    def loss(params: PyTree, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        logits = models.mlp(params, inputs)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))

    def step(net: Net, key: jax.Array) -> tuple[Net, None]:
        batch = jax.random.randint(key, (batch_size,), 0, examples)
        grads = jax.grad(loss)(masked(net.params), task.inputs[batch], task.targets[batch])
        updates, opt_state = tx.update(grads, net.opt_state, net.params)
        return Net(optax.apply_updates(net.params, updates), opt_state), None

    return jax.lax.scan(step, net, jax.random.split(key, steps))[0]


def kernels(params: PyTree) -> list[jax.Array]:
    """The kernels of the layers, from input to output."""
    return [layer["kernel"] for layer in params.values()]


def density(params: PyTree) -> jax.Array:
    """Share of the kernels' elements that are not zero."""
    alive = jnp.stack([jnp.sum(kernel != 0) for kernel in kernels(params)]).astype(jnp.float32)
    return jnp.sum(alive) / float(sum(kernel.size for kernel in kernels(params)))


def map_kernels(function: Callable[..., Any], params: PyTree, *rest: PyTree) -> PyTree:
    """Applies a function to each kernel; biases stay as they are in ``params``."""
    return {
        name: {**layer, "kernel": function(layer["kernel"], *(r[name]["kernel"] for r in rest))}
        for name, layer in params.items()
    }
