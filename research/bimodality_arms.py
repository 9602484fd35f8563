"""The arms of S1: networks that are cut at once, or that forget softly, and their nulls."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

import adaptivenet as an
from adaptivenet.emergence import nulls
from research import rounds

if TYPE_CHECKING:
    from research.bimodality import Config

HARD = ("truncation", "oneshot", "gradual", "random")
SOFT = ("learning", "brief", "labels", "shuffled", "no_learning", "decay", "l1")


@partial(jax.jit, static_argnums=0)
def dense(config: Config, key: jax.Array, task: Any) -> Any:
    """One network, trained without any pruning."""
    of_init, of_batches = jax.random.split(key)
    params = an.models.mlp_init(of_init, (task.inputs.shape[1], *config.hidden, 10))
    adam = optax.adam(config.learning_rate)
    net = rounds.Net(params, adam.init(params))
    return rounds.train(net, of_batches, task, adam, config.dense_steps).params


@partial(jax.jit, static_argnums=(0, 1))
def hard(config: Config, arm: str, key: jax.Array, params: Any, task: Any) -> Any:
    """An arm of hard pruning: the parameters at its end."""
    p, whole = an.pruning, config.rounds * config.steps
    schedule = {
        "oneshot": p.constant,
        "random": p.constant,
        "gradual": partial(p.cubic, start=0, end=whole * 2 // 3),
    }
    adam = optax.adam(config.learning_rate)
    pruner = None
    if arm in schedule:
        score = p.random if arm == "random" else p.magnitude
        pruner = p.prune(
            schedule[arm](config.sparsity), score=score, allocation=p.Uniform(), every=None
        )
    tx = adam if pruner is None else optax.chain(adam, pruner)

    def one(net: Any, key: jax.Array) -> tuple[Any, None]:
        if pruner is not None:
            net = rounds.Net(*p.revise(pruner, *net))
        return rounds.train(net, key, task, tx, config.steps), None

    net = rounds.Net(params, tx.init(params))
    net = jax.lax.scan(one, net, jax.random.split(key, config.rounds))[0]
    if arm == "truncation":  # of the network that was trained as long, without being cut
        return nulls.truncation(net.params, config.sparsity, allocation=p.Uniform())[0]
    return net.params


def rate_of(kernel: jax.Array, mass: jax.Array) -> jax.Array:
    """The soft threshold that leaves a given sum of magnitudes (by bisection)."""

    def halve(_: int, ends: Any) -> Any:
        middle = (ends[0] + ends[1]) / 2
        more = jnp.sum(jnp.maximum(jnp.abs(kernel) - middle, 0)) > mass
        return jnp.where(more, middle, ends[0]), jnp.where(more, ends[1], middle)

    low, high = jax.lax.fori_loop(0, 30, halve, (jnp.zeros(()), jnp.max(jnp.abs(kernel))))
    return (low + high) / 2


@partial(jax.jit, static_argnums=(0, 1))
def soft(config: Config, arm: str, gain: Any, key: jax.Array, params: Any, task: Any) -> Any:
    """An arm of soft forgetting: the lowest share loses a part each round, and goes on learning."""
    adam = optax.adam(config.learning_rate)
    steps = {"no_learning": 0, "brief": config.steps // 4}.get(arm, config.steps)

    def forget(params: Any, key: jax.Array) -> Any:
        def leaf(kernel: jax.Array) -> jax.Array:
            score = jnp.abs(kernel)
            if arm == "shuffled":
                score = nulls.shuffled(an.pruning.magnitude)({"w": kernel}, key=key)["w"]
            kept = an.selection.top_mask({"w": score}, round((1 - config.sparsity) * kernel.size))[
                "w"
            ]
            return jnp.where(kept, kernel, kernel * (1 - gain))

        forgot = rounds.map_kernels(leaf, params)
        if arm == "decay":  # all weights of a layer alike, by as much norm as forgetting takes
            return rounds.map_kernels(
                lambda w, f: nulls.scale({"w": w}, nulls.matched_decay({"w": w}, {"w": f}))["w"],
                params,
                forgot,
            )
        if arm == "l1":  # all by one amount, that takes as much of sum |w|
            return rounds.map_kernels(
                lambda w, f: nulls.soft_thresholded({"w": w}, rate_of(w, jnp.sum(jnp.abs(f))))["w"],
                params,
                forgot,
            )
        return forgot

    def one(net: Any, key: jax.Array) -> tuple[Any, None]:
        of_event, of_batches = jax.random.split(key)
        net = net._replace(params=forget(net.params, of_event))
        return rounds.train(net, of_batches, task, adam, steps), None

    net = rounds.Net(params, adam.init(params))
    return jax.lax.scan(one, net, jax.random.split(key, config.rounds))[0].params
