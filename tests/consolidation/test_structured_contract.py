"""The contract of structured elastic rules, with a boundary of their own after two steps."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adaptivenet as an
from adaptivenet.consolidation.boundary import consolidate
from adaptivenet.consolidation.kronecker_elastic import (
    structured_elastic,
    structured_proximal,
)
from adaptivenet.posterior import laplace
from tests.cells import every_cell

STRUCTURES = ("kronecker", "ekfac", "full", "diagonal")


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {
    "a": {"kernel": normal(3, 4, seed=1), "bias": normal(4, seed=2)},
    "b": {"kernel": normal(4, 2, seed=3), "bias": normal(2, seed=4)},
    "scale": normal(4, seed=5),
}
SIZE = 30


@functools.cache
def some(kernel_first):
    """A belief of the heads of the contract suite's networks, whose leaves come in two orders."""
    shapes = [(8, 16), (16,), (16, 4), (4,)] if kernel_first else [(16,), (8, 16), (4,), (16, 4)]
    leaves = [normal(*shape, seed=k, scale=0.3) for k, shape in enumerate(shapes)]

    def apply(leaves, x):
        kernels, biases = ([p for p in leaves if p.ndim == n] for n in (2, 1))
        return jnp.tanh(x @ kernels[0] + biases[0]) @ kernels[1] + biases[1]

    return laplace(
        apply, leaves, normal(5, 8), normal(5, 4), likelihood="gaussian", structure="kronecker",
        select=["2", "3"],
    ).gaussian  # fmt: skip


def some_of(params):
    return some(jax.tree.leaves(params)[0].ndim == 2)


def bounded(tx):
    """With a boundary after two steps. (Merging is tested above: the eigenvectors of equal
    eigenvalues depend on rounding, though what is made of them does not.)"""

    def init(params):
        return tx.init(params), jnp.zeros((), jnp.int32)

    def update(updates, state, params=None, **extra):
        inner, step = state
        inner = jax.lax.cond(
            step == 2, lambda s: consolidate(s, params, some_of(params)), lambda s: s, inner
        )
        updates, inner = tx.update(updates, inner, params, **extra)
        return updates, (inner, step + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def by_gradient(strength):
    return bounded(optax.chain(structured_elastic(strength * 0.01, some_of), optax.sgd(0.05)))


def implicitly(strength):
    rule = structured_proximal(strength * 0.1, 0.05, some_of, tasks=2, form="separate", steps=2)
    return bounded(optax.chain(optax.sgd(0.05), rule))


@pytest.fixture
def _beliefs():
    some(True), some(False)  # before anything is traced


@every_cell
@pytest.mark.usefixtures("_beliefs")
def test_the_contract(subject, mode):
    an.testing.check(by_gradient, subject=subject, mode=mode)


@pytest.mark.parametrize(
    ("subject", "mode"), list(zip(an.testing.SUBJECTS, an.testing.MODES, strict=True))
)
@pytest.mark.usefixtures("_beliefs")
def test_the_contract_of_the_implicit_step(subject, mode):
    an.testing.check(implicitly, subject=subject, mode=mode)


@pytest.mark.parametrize("make", [by_gradient, implicitly])
@pytest.mark.usefixtures("_beliefs")
def test_resumed_runs(make):
    an.testing.check_resume(make, subject="nnx_optimizer")


@pytest.mark.parametrize("make", [by_gradient, implicitly])
def test_what_the_contract_runs_protects_at_all(make):
    params = jax.tree.map(jnp.zeros_like, some(False).params)
    tx = make(0.5)
    state, nothing = tx.init(params), params
    for step in range(4):
        updates, state = tx.update(nothing, state, params)
        assert (float(jnp.max(jnp.abs(updates[3]))) > 1e-4) == (step >= 2)
