"""Whatever keeps a belief passes the contract suite inside of wrappers, and its belief moves.

A row of the table is a run within two of the four wrappers; two rows hold each estimator in all of
them, on Linen and on NNX, in bfloat16 and through orbax. Estimators that can share a chain share
the program; a failure names the leaf of the state, and so the estimator.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from adaptivenet import testing, trees
from adaptivenet.posterior import gaussian, meanfield
from adaptivenet.posterior.draws import noisy_value_and_grad
from adaptivenet.posterior.fisher import FisherState, SquaredGradient, fisher, squared_gradient
from adaptivenet.posterior.ivon import IvonState, ivon
from adaptivenet.posterior.mesu import MesuState, bgd, mesu
from adaptivenet.posterior.swag import SwagState, swag
from adaptivenet.posterior.transformation import held, with_posterior

# ------------------------------------------------------------------ what keeps a belief


def heeding():
    """A member of a chain that reads the belief it is handed: what is well known changes less."""

    def update(updates, state, params=None, *, posterior, **extra):
        slowed = trees.merge_synapses(
            lambda s, u: (u / (1.0 + s)).astype(u.dtype), posterior.precision, updates
        )
        return slowed, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def streaming(decay, floor, rank=2):
    return optax.chain(
        with_posterior(fisher(decay, examples=10.0), heeding()),
        with_posterior(squared_gradient(decay, examples=10.0), heeding()),
        optax.sgd(0.1),
        swag(1, rank=rank, floor=floor),
    )


def held_ivon(ess, b2=0.9):
    return with_posterior(held(), optax.chain(ivon(0.1, ess, b2=b2), heeding()))


class Kind(NamedTuple):
    """Estimators that run together.

    Attributes:
      names: theirs.
      build: makes the transformation.
      options: what it is made with, by the strength of the contract suite.
      states: the types of the states that hold their beliefs, outermost first; none where the
        belief is what is trained, a :class:`meanfield.MeanField`.
      told: the extra argument that they need, if any.
      static: the options that cannot be injected.
    """

    names: tuple[str, ...]
    build: Callable[..., optax.GradientTransformation]
    options: Callable[[Any], dict[str, Any]]
    states: tuple[type, ...] = ()
    told: str | None = None
    static: tuple[str, ...] = ()

    def beliefs(self, params, state):
        if not self.states:
            return [meanfield.posterior(params)]

        def holds(node):
            return callable(getattr(node, "posterior", None))

        nodes = list(filter(holds, jax.tree.leaves(state, is_leaf=holds)))
        assert tuple(map(type, nodes)) == self.states
        found = [node.posterior(params) for node in nodes]
        return [gaussian.find(state, params), *found[1:]]


STREAMING = Kind(
    ("fisher", "squared_gradient", "swag"),
    streaming,
    lambda s: {"decay": s, "floor": 1e-6 * s},
    (FisherState, FisherState, SwagState),
    "squared_grads",
    static=("rank",),
)
IVON = Kind(
    ("held", "ivon"), held_ivon, lambda s: {"ess": 50.0 * s}, (IvonState,), told="noise_grads"
)
MESU = Kind(
    ("mesu",),
    mesu,
    lambda s: {"window": 50.0 * s, "init_scale": 0.2},
    (MesuState,),
    told="noise_grads",
)
BGD = Kind(("bgd",), bgd, lambda s: {"init_scale": 0.3 * s}, (MesuState,), told="noise_grads")
MEANFIELD = Kind(("meanfield",), optax.sgd, lambda s: {"learning_rate": 0.1 * s, "momentum": 0.9})

KINDS = (STREAMING, IVON, MESU, BGD, MEANFIELD)

# ------------------------------------------------------------------ how it is run


class Told(NamedTuple):
    """State of :func:`telling`: the precisions at the start, and the state of what is told."""

    first: Any
    inner: Any


def telling(kind, inner):
    """What a training loop adds: the arguments that an estimator needs beside the gradients.

    The suite calls ``tx.update(grads, state, params)``; a loss that has these gradients, and half a
    square for curvature, stands for its own where one is needed at parameters that are drawn.
    """

    def init(params):
        state = inner.init(params)
        return Told([belief.precision for belief in kind.beliefs(params, state)], state)

    def update(grads, state, params=None):
        extra = {}
        if kind.told == "squared_grads":
            extra = {"squared_grads": jax.tree.map(jnp.square, grads)}
        if kind.told == "noise_grads":

            def loss(drawn):
                gaps = jax.tree.map(jnp.subtract, drawn, params)
                return optax.tree_utils.tree_vdot(grads, drawn) + 0.5 * (
                    optax.tree_utils.tree_norm(gaps, squared=True)
                )

            _, grads, extra = noisy_value_and_grad(loss, state.inner, params)
        updates, after = inner.update(grads, state.inner, params, **extra)
        return updates, Told(state.first, after)

    return optax.GradientTransformation(jax.jit(init), update)


def kernels(tree):
    return jax.tree.map(lambda leaf: leaf.ndim == 2, tree)


def biases(tree):
    return jax.tree.map(lambda leaf: leaf.ndim != 2, tree)


def chained_and_masked(kind, options):
    """Of the kernels only; the biases stay as they are."""
    return optax.chain(
        optax.clip(1.0),
        optax.masked(kind.build(**options), kernels),
        optax.masked(optax.set_to_zero(), biases),
    )


def accumulated_and_injected(kind, options):
    # Beside bfloat16 parameters, optax would make the options bfloat16, and a decay of 0.999 1.
    inject = optax.inject_hyperparams(kind.build, kind.static, hyperparam_dtype=jnp.float32)
    steps = optax.MultiSteps(inject(**options), every_k_schedule=2)
    # Not its gradient_transformation(), which drops extra arguments.
    return optax.GradientTransformationExtraArgs(steps.init, steps.update)


def bare(kind, options):
    return kind.build(**options)


KERNELS = {"dense1/kernel", "dense2/kernel"}
WRAPPERS = {
    chained_and_masked: KERNELS,
    accumulated_and_injected: {*KERNELS, "dense1/bias", "dense2/bias"},
}


@contextlib.contextmanager
def dressed(kind, dtype):
    """The subjects of the suite with parameters of a dtype, and of a belief if that is trained."""
    functional = testing._functional

    def dress(init, apply):
        def start(key):
            params = jax.tree.map(lambda p: p.astype(dtype), init(key))
            return params if kind.states else meanfield.init(params, 0.1)

        def run(params, inputs):
            if not kind.states:
                bits = jax.lax.bitcast_convert_type(inputs, jnp.uint32)
                params = meanfield.sample(params, jax.random.key(jnp.sum(bits, dtype=jnp.uint32)))
            return apply(params, inputs)

        return functional(start, run)

    build = testing._nnx_net

    def net(key):
        model = build(key)
        nnx.update(model, jax.tree.map(lambda p: p.astype(dtype), nnx.state(model, nnx.Param)))
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(testing, "_functional", dress)
        patch.setattr(testing, "_nnx_net", net)
        yield patch


def examined(kind, wrap, how, subject, dtype=jnp.float32):
    """Runs the contract; returns all parameters and states that it was left with."""

    def make(strength):
        return telling(kind, wrap(kind, kind.options(strength)))

    left = []
    with dressed(kind, dtype) as patch:
        if how == "resume":
            resume(make, subject, left, patch)
        else:
            landing = testing.check_landing

            def landed(params, opt_state, *, where=""):
                left.append(jax.device_get((params, opt_state)))
                landing(params, opt_state, where=where)

            patch.setattr(testing, "check_landing", landed)
            testing.check(make, subject=subject, mode=how, steps=4)
    return left


def resume(make, subject, left, patch):
    """Both checks of checkpoints for one program: they hold all, and a run goes on from them."""
    through, identical, of_name = testing._through_orbax, testing._identical, testing._subject

    def settled(name):
        kind = of_name(name)

        def start(tx, key):
            # Committed and strongly typed, as what comes back: else JAX compiles the step thrice.
            return jax.device_put(jax.device_get(kind.start(tx, key)), jax.devices()[0])

        return kind._replace(start=start)

    def restored(carry, folder):
        back = through(carry, folder)
        identical(carry, back, f"subject {subject!r}, checkpoint")
        return back

    def ended(whole, resumed, where):
        left.append(jax.device_get(resumed))
        identical(whole, resumed, where)

    patch.setattr(testing, "_subject", settled)
    patch.setattr(testing, "_through_orbax", restored)
    patch.setattr(testing, "_identical", ended)
    testing.check_resume(make, subject=subject, steps=7)


def learnt(kind, params, state):
    """For each belief, the paths at which it has moved; it must be a belief wherever it is."""
    moved = []
    compiled = jax.jit(Kind.beliefs, static_argnums=0)
    beliefs = jax.device_get(compiled(kind, params, state.inner))
    for (mean, precision), first in zip(beliefs, state.first, strict=True):
        moved.append(set())
        leaves = zip(
            trees.paths(precision), *map(jax.tree.leaves, (mean, precision, first)), strict=True
        )
        for path, centre, now, before in leaves:
            assert np.isfinite(centre).all(), f"the mean of {path!r} is not finite"
            proper = np.isfinite(now) & (now > 0)
            assert proper.all(), f"the precision of {path!r} is not finite and positive"
            assert now.dtype == np.float32
            if np.any(now != before):
                moved[-1].add(path)
    return moved


# ------------------------------------------------------------------ the table


class Row(NamedTuple):
    kind: Kind
    wrap: Callable[..., Any]
    how: str
    subject: str
    dtype: Any = jnp.float32

    def covers(self):
        library = self.subject.partition("_")[0]
        way = "orbax" if self.how == "resume" else "population"
        return {*self.wrap.__name__.split("_and_"), library, way, jnp.dtype(self.dtype).name}


# An nnx.Optimizer trains modules; of modules, MeanField takes the state.
ROWS = (
    Row(STREAMING, chained_and_masked, "vmap_strengths", "linen"),
    Row(STREAMING, accumulated_and_injected, "resume", "nnx_optimizer", jnp.bfloat16),
    Row(IVON, chained_and_masked, "vmap_seeds", "linen"),
    Row(IVON, accumulated_and_injected, "resume", "nnx_optimizer", jnp.bfloat16),
    Row(MESU, chained_and_masked, "vmap_strengths", "nnx_optimizer"),
    Row(MESU, accumulated_and_injected, "resume", "linen", jnp.bfloat16),
    Row(BGD, accumulated_and_injected, "resume", "nnx_state"),
    Row(BGD, chained_and_masked, "resume", "linen", jnp.bfloat16),
    Row(MEANFIELD, chained_and_masked, "resume", "nnx_state"),
    Row(MEANFIELD, accumulated_and_injected, "resume", "linen", jnp.bfloat16),
)


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: "-".join((*row.kind.names, row.how, row.subject))
)
def test_contract(row):
    left = examined(*row)
    assert len(left) == (1 if row.how == "resume" else 3)
    for params, state in left:
        found = params if row.kind.states else params.mean
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(row.dtype)}
        moved = learnt(row.kind, params, state)
        assert moved == [WRAPPERS[row.wrap]] * len(moved)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind.names))
def test_the_table_holds_every_pair(kind):
    covered = set().union(*(row.covers() for row in ROWS if row.kind == kind))
    wrappers = {"chained", "masked", "accumulated", "injected"}
    assert covered >= {*wrappers, "linen", "nnx", "orbax", "bfloat16", "float32"}


# ------------------------------------------------------------------ what must not pass


class Deaf(SquaredGradient):
    """A belief that ignores the steps."""

    def update(self, state, grads, params, **signals):
        return state


def around(estimator):
    def build(decay):
        del decay
        return with_posterior(estimator, optax.chain(optax.sgd(0.1), heeding()))

    return Kind(("wrong",), build, lambda s: {"decay": s}, (FisherState,))


def test_a_belief_that_ignores_the_steps_is_caught():
    kind = around(Deaf(0.9, 1.0, 1.0))
    ((params, state),) = examined(kind, bare, "resume", "dict")
    assert learnt(kind, params, state) == [set()]


def test_a_belief_that_is_kept_on_the_side_is_caught():
    """A Python counter, which advances once a trace."""
    calls = itertools.count(1)

    class Aside(SquaredGradient):
        def update(self, state, grads, params, **signals):
            after = super().update(state, grads, params, **signals)
            return after._replace(scale=after.scale * next(calls))

    with pytest.raises(testing.ContractError, match=r"mode 'scan': .* differs by up to"):
        examined(around(Aside(0.9, 1.0, 1.0)), bare, "scan", "dict")


def test_a_belief_that_is_none_or_moves_in_part_is_caught():
    kind = around(squared_gradient(prior=1.0))
    params = {"v": jnp.ones(2), "w": jnp.ones(2)}
    state = squared_gradient(prior=1.0).init(params)
    first = [state.posterior(params).precision]
    moved = state._replace(mean_square={"v": jnp.zeros(2), "w": jnp.array([0.0, 3.0])})
    assert learnt(kind, params, Told(first, moved)) == [{"w"}]
    for wrong in (-1.0, jnp.inf, jnp.nan):
        state = state._replace(mean_square={"v": jnp.zeros(2), "w": jnp.full(2, wrong)})
        with pytest.raises(AssertionError, match="precision of 'w' is not finite and positive"):
            learnt(kind, params, Told(first, state))
