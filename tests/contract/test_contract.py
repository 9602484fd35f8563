"""The contract suite on the transformations of this library.

One transformation runs the full matrix of subjects and modes; the others run in a single and in a
batched way, each on another subject, at a fifth of the cost.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adaptivenet as an
from adaptivenet import pruning, testing


def cubic(sparsity):
    """Magnitude along a cubic, in the step: what most users run."""
    schedule = pruning.cubic(final=sparsity, start=0, end=5)
    return optax.chain(optax.adam(1e-2), pruning.prune(schedule, every=2))


def random_score(sparsity):
    return optax.chain(optax.sgd(0.1), pruning.prune(sparsity, score=pruning.random, every=3))


def founding_note(limit):
    """A threshold at every event; what falls below it goes on learning."""
    rule = pruning.prune(pruning.threshold(limit / 5), regrow=pruning.everything(), every=2)
    return optax.chain(optax.sgd(0.1, momentum=0.9), rule)


def percentile_uniform(share):
    schedule = pruning.percentile(share * 40)
    return optax.chain(optax.sgd(0.1), pruning.prune(schedule, allocation=pruning.Uniform()))


def evolving(sparsity):
    """Prunes and regrows, and keeps ages."""
    rule = pruning.prune(
        pruning.linear(sparsity, 0, 4), regrow=pruning.at_random(0.3), every=2, ages=True
    )
    return optax.chain(optax.adam(1e-2), rule)


def closed_loop(tolerance):
    """`auto` on a signal of its own: how far the weights have moved from one."""
    inner = optax.chain(optax.sgd(0.05), pruning.prune(pruning.auto(tolerance / 10), every=2))

    def update(updates, state, params=None, **signals):
        loss = optax.tree_utils.tree_norm(jax.tree.map(lambda p: p - 1.0, params), squared=True)
        return inner.update(updates, state, params, validation_loss=loss, **signals)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def accumulating(sparsity):
    """Gradients of two steps in one update, and none that is not finite."""
    chain = optax.chain(optax.sgd(0.1), pruning.prune(sparsity))
    steps = optax.MultiSteps(optax.apply_if_finite(chain, 3), every_k_schedule=2)
    return steps.gradient_transformation()


def rigl(sparsity):
    """Dynamic sparse training: constant density by layer, woken by the gradient."""
    rule = pruning.prune(
        sparsity,
        allocation=pruning.ErdosRenyiKernel(),
        regrow=pruning.by_gradient(0.3),
        every=2,
    )
    return pruning.with_signals(optax.chain(optax.adam(1e-2), rule))


def mixed_signals(sparsity):
    """A score of scores, on signals that estimators keep, and regrowth across layers."""
    rule = pruning.prune(
        pruning.cubic(sparsity, 0, 4),
        score=pruning.mix([(pruning.fisher_tempered(), 1.0), (pruning.lamp(), 1.0)]),
        regrow=pruning.by_momentum(0.2),
        every=2,
    )
    return pruning.with_signals(
        optax.chain(optax.sgd(0.1, momentum=0.9), rule),
        fisher=pruning.signals.fisher(0.9),
        momentum=pruning.signals.momentum(0.9),
    )


def constant_fan_in(sparsity):
    rule = pruning.prune(
        pruning.linear(sparsity, 0, 4),
        structure=pruning.FanIn(),
        allocation=pruning.Uniform(),
        every=2,
    )
    return optax.chain(optax.rmsprop(1e-2), rule)


def alternating(sparsity):
    """AC/DC: dense phases in which all wake, and sparse ones."""
    return optax.chain(optax.adam(1e-2), pruning.prune(pruning.ac_dc(sparsity, 2, 1, 5), every=2))


def linked(sparsity):
    """Wakes what completes paths of length three."""
    rule = pruning.prune(sparsity, regrow=pruning.by_link_prediction(0.2), every=3)
    return optax.chain(optax.sgd(0.1), rule)


def structured(sparsity):
    """Blocks beside a gradual N:M, cut and woken in cycles."""
    rule = pruning.prune(
        pruning.cyclic(sparsity * 0.5, sparsity, 4),
        structure=pruning.ByPath({"1": pruning.Block(2, 2)}, pruning.NofM(m=4)),
        every=2,
    )
    return optax.chain(optax.sgd(0.1), rule)


def budgeted(sparsity):
    """Units beside synapses of another cost, by a score of a score, in a sawtooth."""
    rule = pruning.prune(
        pruning.sawtooth(sparsity, 0, 4, period=2),
        score=pruning.lamp(pruning.fisher_tempered()),
        structure=pruning.ByPath({"1": pruning.Unit()}),
        allocation=pruning.Budget({"1": 3}),
        every=2,
    )
    chain = optax.chain(optax.sgd(0.1, momentum=0.9), rule)
    return pruning.with_signals(chain, fisher=pruning.signals.fisher(0.9))


def believing(sparsity):
    """Cut by what is believed, and woken by the gradient that comes with the belief."""
    rule = pruning.prune(
        pruning.cubic(sparsity, 0, 4),
        score=pruning.snr,
        regrow=pruning.by_gradient(0.2),
        every=2,
    )
    estimator = an.posterior.squared_gradient(0.9)
    return an.with_posterior(estimator, optax.chain(optax.adam(1e-2), rule))


OTHERS = {
    make.__name__: make
    for make in (
        random_score,
        founding_note,
        percentile_uniform,
        evolving,
        closed_loop,
        accumulating,
        rigl,
        mixed_signals,
        constant_fan_in,
        alternating,
        linked,
        structured,
        budgeted,
        believing,
    )
}


@pytest.mark.parametrize("mode", testing.MODES)
@pytest.mark.parametrize("subject", testing.SUBJECTS)
def test_the_full_matrix(subject, mode):
    testing.check(cubic, subject=subject, mode=mode)


DIAGONALS = [
    pytest.param(make, testing.SUBJECTS[(place + turn) % 5], mode, id=f"{name}-{mode}")
    for turn, (name, make) in enumerate(OTHERS.items())
    # "jit" and "scan" are compared with each other: one of them is enough here.
    for place, mode in enumerate(("scan", ("vmap_seeds", "vmap_strengths")[turn % 2]))
]


@pytest.mark.parametrize(("make", "subject", "mode"), DIAGONALS)
def test_the_diagonal(make, subject, mode):
    testing.check(make, subject=subject, mode=mode)


@pytest.mark.parametrize("subject", testing.SUBJECTS)
def test_checkpoints(subject):
    testing.check_checkpoint(evolving, subject=subject)


def test_checkpoints_with_a_belief():
    testing.check_checkpoint(believing, subject="nnx_optimizer")


@pytest.mark.parametrize(
    ("make", "subject"),
    [
        (cubic, "dict"),
        (random_score, "list"),
        (closed_loop, "nnx_state"),
        (evolving, "nnx_optimizer"),
        (accumulating, "linen"),
        (believing, "dict"),
    ],
)
def test_resumed_runs(make, subject):
    testing.check_resume(make, subject=subject)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_on_the_diagonal_prunes_at_all(name):
    """A contract that holds because nothing happens would prove nothing."""
    rng = np.random.default_rng(0)
    params = {w: jnp.asarray(rng.normal(size=(8, 8)).astype(np.float32)) for w in ("w1", "w2")}
    tx = optax.with_extra_args_support(OTHERS[name](0.5))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), jnp.stack([jnp.sum(leaf == 0) for leaf in params.values()])

    with jax.numpy_dtype_promotion("standard"):  # MultiSteps divides by its counter
        zeros = jax.lax.scan(step, (params, tx.init(params)), None, length=4)[1]
    assert int(zeros.max()) > 0
