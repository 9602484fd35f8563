"""The condensed arm of the shrinking study: a smaller MLP whose first kernel is cut in blocks.

Where inputs cannot go, as an image's pixels cannot, units still need not look at all of them.
Blocks of one input and many outputs are cut while the smaller network trains on; what is left is
stored and multiplied without the zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adaptivenet as an
from adaptivenet import models
from adaptivenet.pruning import condensed
from research.rounds import Task
from research.shrinking_arms import loss

if TYPE_CHECKING:
    from research.shrinking import Blocks

PyTree = Any
p = an.pruning


def mlp(params: PyTree, inputs: jax.Array) -> jax.Array:
    """The perceptron on layers of any format.

    Args:
      params: as of ``models.mlp``, its kernels arrays or layers of ``pruning.condensed``.
      inputs: ``[batch, features]``.

    Returns:
      ``[batch, classes]`` (logits).
    """
    *hidden, last = params.values()
    for layer in hidden:
        inputs = jax.nn.relu(_times(layer["kernel"], inputs) + layer["bias"])
    return _times(last["kernel"], inputs) + last["bias"]


def train(blocks: Blocks, params: PyTree, task: Task, seed: int, done: Any) -> PyTree:
    """Trains a perceptron on while blocks of its first kernel are cut.

    Args:
      blocks: how.
      params: of the network as it is, trained and possibly shrunk.
      task: its data.
      seed: of the batches.
      done: called after each epoch.

    Returns:
      The parameters, arrays with zeros.
    """
    key = jax.random.fold_in(jax.random.key(seed), 3)
    examples = len(task.inputs)
    steps = examples // blocks.batch_size
    whole = steps * blocks.epochs
    faster = (1 - blocks.sparsity) ** -blocks.rate_power
    rate = optax.warmup_cosine_decay_schedule(
        0.0, faster * blocks.learning_rate, min(100, whole - 1), whole
    )
    pruner = p.prune(
        p.cubic(final=blocks.sparsity, start=whole // 10, end=whole // 2),
        score=p.fisher_tempered(0.25),
        structure=p.Block(*blocks.block),
        regrow=p.by_momentum(p.cosine_fraction(0.3, round(0.85 * whole))),
        every=max(steps // 2, 1),
        select="dense1/kernel",
    )
    tx = p.with_signals(
        optax.chain(optax.adamw(rate, weight_decay=blocks.weight_decay), pruner),
        fisher=p.signals.fisher(0.99),
        momentum=p.signals.momentum(0.99),
    )

    @jax.jit
    def epoch(net: tuple[PyTree, PyTree], key: jax.Array) -> tuple[PyTree, PyTree]:
        def step(net: tuple[PyTree, PyTree], rows: jax.Array) -> Any:
            params, opt_state = net
            grads = jax.grad(lambda q: loss(models.mlp, q, task.inputs[rows], task.targets[rows]))
            updates, opt_state = tx.update(grads(params), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        rows = jax.random.permutation(key, examples)[: steps * blocks.batch_size]
        return jax.lax.scan(step, net, rows.reshape(steps, blocks.batch_size))[0]

    net = params, tx.init(params)
    for number in range(blocks.epochs):
        net = jax.block_until_ready(epoch(net, jax.random.fold_in(key, 1 + number)))
        done()
    return net[0]


def condense(blocks: Blocks, params: PyTree) -> PyTree:
    """The same network without its zeros.

    Args:
      blocks: the size of a block.
      params: what :func:`train` returned.

    Returns:
      The parameters, with a layer of ``pruning.condensed`` in place of the first kernel.
    """
    first = params["dense1"]
    packed = condensed.pack_blocks(np.asarray(first["kernel"]), blocks.block)
    return {**params, "dense1": {**first, "kernel": packed}}


def stored(params: PyTree) -> int:
    """Bytes of all arrays, indices among them."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def products(params: PyTree) -> int:
    """Multiply-accumulates of one example."""
    kernels = [layer["kernel"] for layer in params.values()]
    return sum(
        int((kernel.values if isinstance(kernel, condensed.Layer) else kernel).size)
        for kernel in kernels
    )


def _times(kernel: Any, inputs: jax.Array) -> jax.Array:
    if isinstance(kernel, condensed.Layer):
        return condensed.apply(kernel, inputs)
    return jnp.matmul(inputs, kernel)
