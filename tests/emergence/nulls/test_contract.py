"""The contract suite on the null models that act during training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest

from adaptivenet import pruning, testing
from adaptivenet.emergence import nulls


def rule(sparsity):
    return pruning.prune(pruning.cubic(sparsity, 0, 5), every=2)


def no_learning(sparsity):
    return optax.chain(optax.adam(1e-2), nulls.no_learning(rule(sparsity)))


def shuffled(sparsity):
    pruner = pruning.prune(sparsity, score=nulls.shuffled(pruning.magnitude), every=3)
    return optax.chain(optax.sgd(0.1), pruner)


def shadow(sparsity):
    """In a chain, its pruning state spelled as a plain tuple.

    Landing is what a shadow does not do, and is looked for by the type of the state; all else of
    the contract it keeps.
    """
    watcher = nulls.shadow(rule(sparsity))

    def update(updates, state, params=None, **signals):
        state = pruning.PruneState(*state)
        updates, state = watcher.update(updates, state, params, **signals)
        return updates, tuple(state)

    hider = optax.GradientTransformationExtraArgs(lambda p: tuple(watcher.init(p)), update)
    return optax.chain(optax.adam(1e-2), hider)


def uniform_decay(rate):
    return optax.chain(optax.sgd(0.1), nulls.uniform_decay(rate * 0.1))


def soft_threshold(rate):
    return optax.chain(optax.adam(1e-2), nulls.soft_threshold(rate * 0.01))


def pruned_and_decayed(rate):
    """Both may follow a pruner: what has landed stays where it is."""
    decays = nulls.uniform_decay(rate * 0.1), nulls.soft_threshold(rate * 0.01)
    return optax.chain(optax.sgd(0.1), rule(rate), *decays)


ALL = (no_learning, shuffled, shadow, uniform_decay, soft_threshold, pruned_and_decayed)
# Each in a single or in a batched way, all subjects and modes in turn; the shadow in both.
DIAGONAL = [
    (no_learning, "dict", "eager"),
    (shuffled, "list", "vmap_seeds"),
    (shadow, "linen", "jit"),
    (shadow, "dict", "vmap_strengths"),
    (uniform_decay, "nnx_state", "scan"),
    (soft_threshold, "nnx_optimizer", "vmap_strengths"),
    (pruned_and_decayed, "list", "scan"),
]


@pytest.mark.parametrize(("make", "subject", "mode"), DIAGONAL)
def test_the_diagonal(make, subject, mode):
    testing.check(make, subject=subject, mode=mode)


@pytest.mark.parametrize("make", [no_learning, shadow, soft_threshold])
def test_resumed_runs(make):
    testing.check_resume(make, steps=4)


def test_the_shadow_does_not_land():
    def make(sparsity):
        return optax.chain(optax.adam(1e-2), nulls.shadow(pruning.prune(sparsity)))

    with pytest.raises(testing.ContractError, match="not zero although the mask is False"):
        testing.check(make, subject="list", mode="jit", steps=2)


def test_what_is_on_the_diagonal_acts_at_all():
    """A contract that holds because nothing happens would prove nothing."""
    params = {"w": jnp.linspace(-0.5, 0.5, 64).reshape(8, 8)}

    def run(make):
        tx = optax.with_extra_args_support(make(0.5))

        def step(carry, _):
            params, state = carry
            updates, state = tx.update({"w": jnp.zeros((8, 8))}, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=3)[0]

    for make in ALL:
        after, state = jax.jit(run, static_argnums=0)(make)
        if make is shadow:
            assert not bool(state[-1][1]["w"].all())
        else:
            assert bool(jnp.any(after["w"] != params["w"]))
