"""The arms of S2: twins with different futures, and rounds in which the mask is chosen anew."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

import adaptivenet as an
from adaptivenet.emergence import trajectories
from research import rounds

if TYPE_CHECKING:
    from research.feedback import Config

OPTIMIZERS = ("adam", "sgd")
FUTURES = ("dense", "pruned", "random")
ARMS = ("real", "shadow")


def optimizer(config: Config, name: str) -> optax.GradientTransformation:
    """One of the two optimizers."""
    if name == "adam":
        return optax.adam(config.adam_rate)
    decay = optax.add_decayed_weights(config.sgd_decay)
    return optax.chain(decay, optax.sgd(config.sgd_rate, momentum=0.9))


def kept(kernel: jax.Array, share: float) -> jax.Array:
    """The strongest share of a layer."""
    return an.selection.top_mask({"w": jnp.abs(kernel)}, round(share * kernel.size))["w"]


@partial(jax.jit, static_argnums=(0, 1))
def dense(config: Config, name: str, key: jax.Array, task: Any) -> Any:
    """One network, trained without any pruning."""
    of_init, of_batches = jax.random.split(key)
    params = an.models.mlp_init(of_init, (task.inputs.shape[1], *config.hidden, 10))
    tx = optimizer(config, name)
    net = rounds.Net(params, tx.init(params))
    return rounds.train(net, of_batches, task, tx, config.dense_steps).params


@partial(jax.jit, static_argnums=(0, 1, 2))
def twin(config: Config, name: str, future: str, key: jax.Array, params: Any, task: Any) -> Any:
    """A future of the network: growth of its strong synapses by layer, and accuracy."""
    p = an.pruning
    score = p.random if future == "random" else p.magnitude
    pruner = p.prune(config.sparsity, score=score, allocation=p.Uniform(), every=None)
    tx = optax.chain(optimizer(config, name), pruner)
    net = rounds.Net(params, tx.init(params))
    if future != "dense":
        net = rounds.Net(*p.revise(pruner, *net))
    strong = [kept(w, 1 - config.sparsity) for w in rounds.kernels(params)]
    if future == "random":  # those strong ones that chance has left
        strong = [s & (w != 0) for s, w in zip(strong, rounds.kernels(net.params), strict=True)]
    end = rounds.train(net, key, task, tx, config.twin_steps).params
    pairs = zip(strong, rounds.kernels(params), rounds.kernels(end), strict=True)
    sums = [(jnp.sum(jnp.abs(b), where=s), jnp.sum(jnp.abs(a), where=s)) for s, a, b in pairs]
    return jnp.stack([late / early - 1 for late, early in sums]), rounds.accuracy(end, task)


@partial(jax.jit, static_argnums=(0, 1, 2))
def watch(config: Config, name: str, arm: str, key: jax.Array, params: Any, task: Any) -> Any:
    """Rounds in which the mask is chosen anew by magnitude, and every weight goes on learning.

    In the arm "real" the forward pass sees the masked weights (straight-through gradients), in the
    arm "shadow" the dense ones: there the mask is only recorded.
    """
    tx, share = optimizer(config, name), 1 - config.sparsity
    first, release = config.before, config.before + config.reprieve
    empty = rounds.map_kernels(lambda w: jnp.zeros(w.shape, bool), params)
    empty = {layer: {"kernel": leaf["kernel"]} for layer, leaf in empty.items()}

    def on(function: Any, *trees: Any) -> Any:
        return {name: {"kernel": function(*(t[name]["kernel"] for t in trees))} for name in params}

    def one(carry: Any, at: Any) -> Any:
        net, state, near, forced, ratio_then, alive_then = carry
        number, key = at
        of_half, of_batches = jax.random.split(key)
        mask = on(lambda w: kept(w, share), net.params)
        ratio = on(
            lambda w, m: jnp.log(jnp.abs(w) / jnp.min(jnp.where(m, jnp.abs(w), jnp.inf))),
            net.params,
            mask,
        )
        wider = on(lambda w: kept(w, share + config.window), net.params)
        half = on(
            lambda w: jax.random.bernoulli(jax.random.fold_in(of_half, w.size), 0.5, w.shape),
            net.params,
        )
        now = number == first
        near = on(lambda old, w, m: jnp.where(now, w & ~m, old), near, wider, mask)
        forced = on(lambda old, n, h: jnp.where(now, n & h, old), forced, near, half)
        reprieved = (number >= first) & (number < release)
        mask = on(lambda m, f: m | (f & reprieved), mask, forced)
        state, frame = recorder.update(state, on(lambda w: w, net.params), mask, ratio)

        def share_alive(group: Any) -> jax.Array:
            alive, member = (
                jnp.concatenate(list(map(jnp.ravel, jax.tree.leaves(t)))) for t in (mask, group)
            )
            return jnp.mean(alive.astype(jnp.float32), where=member)

        spared = on(lambda n, f: n & ~f, near, forced)
        shares = jnp.stack([share_alive(forced), share_alive(spared)])
        ratio_then = on(lambda old, new: jnp.where(number == release, new, old), ratio_then, ratio)
        alive_then = on(lambda old, m: jnp.where(number == release + 1, m, old), alive_then, mask)

        def masked(params: Any) -> Any:
            if arm == "shadow":
                return params
            return rounds.map_kernels(lambda w, m: jnp.where(m, w, jnp.zeros_like(w)), params, mask)

        net = rounds.train(net, of_batches, task, tx, config.steps, masked=masked)
        return (net, state, near, forced, ratio_then, alive_then), (frame, shares)

    whole = release + config.after
    net = rounds.Net(params, tx.init(params))
    begin = on(lambda w: kept(w, share), params)
    recorder = recorder_of(config, params)
    zeros = on(lambda w: jnp.zeros(w.shape, jnp.float32), params)
    carry = (net, recorder.init(begin), empty, empty, zeros, empty)
    keys = jax.random.split(key, whole)
    carry, (frames, shares) = jax.lax.scan(one, carry, (jnp.arange(whole), keys))
    net, _, near, forced, ratio_then, alive_then = carry
    flat = [
        jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(t)])
        for t in (near, forced, ratio_then, alive_then)
    ]
    final = rounds.map_kernels(
        lambda w, m: jnp.where(m, w, jnp.zeros_like(w)),
        net.params,
        on(lambda w: kept(w, share), net.params),
    )
    return frames, shares, flat, rounds.accuracy(net.params if arm == "shadow" else final, task)


def recorder_of(config: Config, params: Any) -> trajectories.Recorder:
    """Follows a sample of the synapses; the same one wherever shapes are the same."""
    kernels = {name: {"kernel": layer["kernel"]} for name, layer in params.items()}
    return trajectories.Recorder(kernels, sample=config.sample, seed=0)
