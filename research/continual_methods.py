"""Learners: what the study of continual learning compares, each a few lines around one rule.

A learner has
four functions: ``begin(key)``, ``step(net, x, y, at)``, ``boundary(net, task, at)`` at the end of a
task, and ``logits(params, x, at)``. All are pure, and compiled once for all tasks and seeds.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import adaptivenet as an
from adaptivenet import models
from research.continual_data import Examples
from research.rounds import noisy

PyTree = Any
post, con = an.posterior, an.consolidation
FAR = -1e9


class Facts(NamedTuple):
    """What learners are told of the study: everything that their programs depend on."""

    sizes: tuple[int, ...]
    tasks: int
    bias: bool
    optimizer: str
    rate: float
    batch_size: int
    examples: int
    fisher_examples: int
    memory: int
    draws: int
    cumulative: bool
    spread: float
    initial: str = "glorot"


class At(NamedTuple):
    """Where a learner is.

    Attributes:
      task: number of the task, an int32 scalar.
      active: bool [classes], or [batch, classes]: what may be answered.
      key: for whatever is drawn.
      tested: number of the task that is tested, for learners that are told; None in training.
    """

    task: jax.Array
    active: jax.Array
    key: jax.Array
    tested: jax.Array | None = None


class Net(NamedTuple):
    """A network in training, and what its learner remembers beside the optimizer's state."""

    params: PyTree
    opt_state: PyTree
    memory: PyTree = ()


class Learner:
    """Plain training, which forgets; what all others start from.

    Args:
      facts: of the study.
      strength: of the rule.
      keep: share of the memory that is kept at a boundary, for rules whose memory fades.
    """

    needs_strength = False
    fades = False
    """whether a row may say how much of the memory is kept at a boundary"""
    told = True
    """whether it wants to know where tasks end"""
    periodic = False
    """whether, untold, it can take stock at any time, from ``fisher_examples`` alone"""

    def __init__(self, facts: Facts, strength: float, keep: float = 1.0) -> None:
        self.facts, self.strength, self.keep = facts, strength, keep
        self.tx = optax.with_extra_args_support(self.optimizer())

    @classmethod
    def bounded(cls) -> bool:
        """Whether the end of a task means something to it."""
        return cls.boundary is not Learner.boundary

    def optimizer(self) -> optax.GradientTransformation:
        """What the gradients go through."""
        return self.plain()

    def plain(self) -> optax.GradientTransformation:
        """The optimizer of the study."""
        make: Any = optax.adam if self.facts.optimizer == "adam" else optax.sgd
        return make(self.facts.rate)

    def begin(self, key: jax.Array) -> Net:
        """A fresh network."""
        params = models.mlp_init(key, self.facts.sizes)
        if not self.facts.bias:
            params = {name: {"kernel": layer["kernel"]} for name, layer in params.items()}
        if self.facts.initial == "fan_in":
            params = uniform(key, params, [1 / math.sqrt(fan) for fan in self.facts.sizes[:-1]])
        return Net(params, self.tx.init(params))

    def apply(self, params: PyTree, x: jax.Array) -> jax.Array:
        """All outputs of the network."""
        return models.mlp(params, x)

    def masked(self, params: PyTree, x: jax.Array, active: jax.Array) -> jax.Array:
        """Logits, of what may be answered."""
        return jnp.where(active, self.apply(params, x), FAR)

    def loss(self, params: PyTree, x: jax.Array, y: jax.Array, active: jax.Array) -> jax.Array:
        """Mean cross-entropy of a batch."""
        logits = self.masked(params, x, active)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    def step(self, net: Net, x: jax.Array, y: jax.Array, at: At) -> Net:
        """One batch."""
        grads = jax.grad(self.loss)(net.params, x, y, at.active)
        updates, opt_state = self.tx.update(grads, net.opt_state, net.params)
        return net._replace(params=optax.apply_updates(net.params, updates), opt_state=opt_state)

    def boundary(self, net: Net, task: Examples, at: At) -> Net:
        """The end of a task, of which ``task`` holds examples."""
        del task, at
        return net

    def logits(self, net: Net, x: jax.Array, at: At) -> jax.Array:
        """Predictions (logarithms of probabilities will do)."""
        return self.masked(net.params, x, at.active)

    def capacity(self, net: Net) -> jax.Array:
        """The share of the synapses that is taken, where a rule says so; else nan."""
        del net
        return jnp.float32(jnp.nan)


class Joint(Learner):
    """All tasks at once, after which there is nothing to forget: what the others aim at."""


# --- elastic weight consolidation, in its forms -------------------------------------------------


class Elastic(Learner):
    """EWC with the exact Fisher information, and one quadratic a task."""

    needs_strength = True
    periodic = True
    form = "separate"
    kind = "exact"

    def optimizer(self) -> optax.GradientTransformation:
        """The penalty's gradient goes through the optimizer, as the papers' does."""
        rule = con.elastic(self.strength, form=self.form, decay=self.keep)
        return optax.chain(rule, self.plain())

    def believed(self, net: Net, task: Examples, at: At) -> Any:
        """Fisher information averaged over examples, as the published strengths want it."""
        x, y = self.shown(task)
        precision = post.fisher_diagonal(
            lambda p, x: self.masked(p, x, at.active),
            net.params,
            x,
            y if self.kind == "empirical" else None,
            kind=self.kind,
        )
        return post.Posterior(net.params, jax.tree.map(lambda f: f / len(x), precision))

    def shown(self, task: Examples) -> tuple[jax.Array, jax.Array]:
        """The examples that a boundary looks at."""
        number = self.facts.fisher_examples
        return task.inputs[:number], task.targets[:number]

    def boundary(self, net: Net, task: Examples, at: At) -> Net:
        """Remembers what the task needs."""
        belief = self.believed(net, task, at)
        return net._replace(opt_state=con.consolidate(net.opt_state, net.params, belief))


class Online(Elastic):
    """Online EWC: one anchor, the latest."""

    form = "online"
    fades = True


class Batched(Elastic):
    """EWC with squares of mini-batch gradients in the place of the Fisher information."""

    def believed(self, net: Net, task: Examples, at: At) -> Any:
        """What some libraries do: gradients are averaged before they are squared."""
        x, y = self.shown(task)
        each = self.facts.batch_size
        number = max(len(x) // each, 1)
        slope = jax.grad(self.loss)

        def square(rows: Any) -> PyTree:
            return jax.tree.map(jnp.square, slope(net.params, *rows, at.active))

        rows = jax.tree.map(lambda a: a[: number * each].reshape(number, -1, *a.shape[1:]), (x, y))
        squares = jax.lax.map(square, rows)
        return post.Posterior(net.params, jax.tree.map(lambda s: s.mean(0), squares))


class Proximal(Elastic):
    """EWC whose penalty is an implicit step, in Adam's metric where Adam trains."""

    def optimizer(self) -> optax.GradientTransformation:
        """The step back towards the anchor comes last."""
        adam = self.facts.optimizer == "adam"
        back = con.proximal(
            self.strength,
            self.facts.rate,
            form=self.form,
            metric=con.RootMeanSquare() if adam else None,
        )
        return an.pruning.with_signals(optax.chain(self.plain(), back))


class Aware(Elastic):
    """MAS: importance by what the outputs feel."""

    form = "online"
    fades = True

    def optimizer(self) -> optax.GradientTransformation:
        """The paper's penalty has no half."""
        rule = con.elastic(2 * self.strength, form=self.form, decay=self.keep)
        return optax.chain(rule, self.plain())

    def believed(self, net: Net, task: Examples, at: At) -> Any:
        """Importance of the examples of the task."""
        return con.memory_aware.importance(
            lambda p, x: jnp.where(at.active, self.apply(p, x), 0.0),
            net.params,
            self.shown(task)[0],
        )


class Path(Learner):
    """SI: importance by what each synapse did for the loss."""

    needs_strength = True
    periodic = True
    damping = 0.1

    def optimizer(self) -> optax.GradientTransformation:
        """A wrapper around the optimizer."""
        return con.path_integral(self.plain(), self.strength, damping=self.damping)

    def boundary(self, net: Net, task: Examples, at: At) -> Net:
        """No data are needed."""
        del task, at
        return net._replace(opt_state=con.consolidate(net.opt_state, net.params))


# --- Bayesian learners --------------------------------------------------------------------------


class Mesu(Learner):
    """MESU with a window, in batches; its draws are taken at the units (local reparametrisation).

    Means begin uniformly within twice the standard deviation that they begin with, which is the
    spread of the study over the root of the fan-in (published: 2).
    """

    needs_strength = True
    told = False

    def optimizer(self) -> optax.GradientTransformation:
        """One rule for means and standard deviations."""
        return post.mesu(
            self.strength,
            init_scale=self._scales(),
            batch_size=self.facts.batch_size,
        )

    def _limits(self) -> list[float]:
        return [2 * self.facts.spread / math.sqrt(fan) for fan in self.facts.sizes[:-1]]

    def _scales(self) -> PyTree:
        parts = ("kernel", "bias") if self.facts.bias else ("kernel",)
        return {
            f"dense{number}": dict.fromkeys(parts, limit / 2)
            for number, limit in enumerate(self._limits(), 1)
        }

    def begin(self, key: jax.Array) -> Net:
        """A fresh network."""
        params = uniform(key, super().begin(key).params, self._limits())
        return Net(params, self.tx.init(params))

    def widths(self, net: Net) -> PyTree:
        """Standard deviations, as they are now."""
        return net.opt_state.scale

    def capacity(self, net: Net) -> jax.Array:
        """The share of the parameters that are known to half of the start's deviation."""
        begun = jax.tree.leaves(self._scales())
        sure = [
            jnp.sum(s < b / 2)
            for s, b in zip(jax.tree.leaves(self.widths(net)), begun, strict=True)
        ]
        return portion(sure, net.params)

    def members(self, mean: PyTree, scales: PyTree, x: jax.Array, at: At) -> jax.Array:
        """Logarithms of the probabilities of several draws, [draws, batch, classes]."""
        keys = jax.random.split(at.key, self.facts.draws)
        logits = jax.vmap(lambda key: noisy(mean, scales, x, key))(keys)
        return jax.nn.log_softmax(jnp.where(at.active, logits, FAR))

    def step(self, net: Net, x: jax.Array, y: jax.Array, at: At) -> Net:
        """One batch: gradients by means and by standard deviations, averaged over draws."""
        scales = self.widths(net)

        def loss(mean: PyTree, scales: PyTree) -> jax.Array:
            logs = self.members(mean, scales, x, at)
            return -jnp.mean(jnp.take_along_axis(logs, y[None, :, None], 2))

        grads, slopes = jax.grad(loss, (0, 1))(net.params, scales)
        told = jax.tree.map(jnp.multiply, scales, slopes)
        updates, state = self.tx.update(grads, net.opt_state, net.params, noise_grads=told)
        return net._replace(params=optax.apply_updates(net.params, updates), opt_state=state)

    def logits(self, net: Net, x: jax.Array, at: At) -> jax.Array:
        """The average prediction of several draws."""
        logs = self.members(net.params, self.widths(net), x, at)
        return jax.nn.logsumexp(logs, 0) - math.log(self.facts.draws)


class Bgd(Mesu):
    """FOO-VB with a diagonal covariance: as MESU, but nothing fades."""

    needs_strength = False

    def optimizer(self) -> optax.GradientTransformation:
        """One rule for means and standard deviations."""
        return post.bgd(self._scales(), batch_size=self.facts.batch_size)


def uniform(key: jax.Array, params: PyTree, limits: list[float]) -> PyTree:
    """Parameters of a layer drawn between plus and minus a limit, one a layer."""
    found = {}
    for number, ((name, layer), limit) in enumerate(zip(params.items(), limits, strict=True)):
        own = jax.random.fold_in(key, number)
        found[name] = {
            part: jax.random.uniform(
                jax.random.fold_in(own, place), leaf.shape, minval=-limit, maxval=limit
            )
            for place, (part, leaf) in enumerate(layer.items())
        }
    return found


def portion(counts: list[jax.Array], tree: PyTree) -> jax.Array:
    """The sum of some counts, one a leaf, over the elements of a tree; a float32 scalar."""
    total = sum(leaf.size for leaf in jax.tree.leaves(tree))
    return jnp.sum(jnp.stack(counts)).astype(jnp.float32) / total
