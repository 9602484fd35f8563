"""The arms of the shrinking study: one network that is trained, cut, made smaller, and trained on.

Every number of the training follows from the seed. The state of the optimizer is cut with the
network, so that each phase goes on where the one before it ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adaptivenet as an
from adaptivenet.pruning.slimming import taken
from research.rounds import Task
from research.shrinking_subjects import Subject, stays_whole

if TYPE_CHECKING:
    from research.shrinking import Setting

PyTree = Any
Places = list[list[np.ndarray]]
p = an.pruning


class Net(NamedTuple):
    """A network in training, and where its arrays lie in those of the dense one."""

    variables: PyTree
    opt_state: PyTree
    places: Places
    costs: Any


class Course:
    """The training of the networks of one subject on one seed.

    Args:
      subject: the network.
      setting: how it is trained and cut.
      task: its data.
      seed: of everything random.
      step: a training step, of :func:`stepper`, shared by the courses of a subject.
    """

    def __init__(
        self, subject: Subject, setting: Setting, task: Task, seed: int, step: Any
    ) -> None:
        self.subject, self.setting, self.task, self.step = subject, setting, task, step
        self.key = jax.random.key(seed)
        self.steps = len(task.inputs) // setting.batch_size
        self.example = task.inputs[:2]
        self._removable: tuple[str, ...] = ()
        self._gradient = jax.jit(jax.grad(partial(loss, subject.apply)))
        if not self.steps:
            raise ValueError(
                f"batch_size={setting.batch_size}: the {len(task.inputs)} training examples of the "
                f"{subject.title} do not fill one batch; lower it."
            )

    def begin(self) -> Net:
        """The dense network as initialised."""
        variables = self.subject.init(jax.random.fold_in(self.key, 0), self.task)
        places = [[np.arange(n) for n in leaf.shape] for leaf in jax.tree.leaves(variables)]
        costs = p.shrink(self.subject.apply, variables, self.example).report.before
        return Net(variables, optimizer(self.setting).init(variables), places, costs)

    def train(self, net: Net, epochs: int, number: int, rate: float, done: Any) -> Net:
        """Trains for some epochs, the rate from its peak to zero along a cosine.

        Args:
          net: the network.
          epochs: passes over the training data.
          number: of the phase; the batches follow from it and from the seed.
          rate: the peak; it is reached after a tenth of the first phase, at once in later ones.
          done: called after each epoch.

        Returns:
          The network after it.
        """
        return self._phase(net, epochs, number, rate, done, {})

    def shrink(
        self, net: Net, dense: Net, share: float, number: int, done: Any, *, random: bool = False
    ) -> Net:
        """Takes units out until a share of the dense MACs is left, and trains on.

        Args:
          net: the network, possibly shrunk before.
          dense: the dense network.
          share: of the dense network's multiply-accumulates.
          number: of the phase.
          done: called after each epoch.
          random: whether the units are drawn, and not chosen by their score.

        Returns:
          The smaller network.
        """
        setting = self.setting
        whole = dense.costs.macs
        first, cuts = net.costs.macs / whole, setting.cuts
        # From share to share in equal ratios, over the first part of the phase.
        spread = setting.spread * setting.recover * self.steps
        plan = {
            round(spread * cut / cuts): first * (share / first) ** ((cut + 1) / cuts) * whole
            for cut in range(cuts)
        }

        def cut(net: Net, macs: float, place: int) -> Net:
            return self._cut(net, macs, 1000 * number + place, random)

        planned = {
            step: partial(cut, macs=macs, place=place)
            for place, (step, macs) in enumerate(plan.items())
        }
        return self._phase(net, setting.recover, number, setting.recover_rate, done, planned)

    def scratch(self, net: Net, epochs: int, done: Any) -> Net:
        """A network of the same widths, initialised and trained anew.

        Args:
          net: the network whose widths it takes.
          epochs: passes over the training data.
          done: called after each epoch.

        Returns:
          The network after the training.
        """
        drawn = self.subject.init(jax.random.fold_in(self.key, 7), self.task)
        leaves, treedef = jax.tree.flatten(drawn)
        small = []
        for path, leaf, axes in zip(an.trees.paths(drawn), leaves, net.places, strict=True):
            fewer = jnp.asarray(taken(leaf, axes))
            if path.endswith("kernel"):
                # The variance of what a unit sums up stays what the initialiser meant it to be.
                fewer = fewer * math.sqrt(math.prod(leaf.shape[:-1]) / math.prod(fewer.shape[:-1]))
            small.append(fewer)
        variables = treedef.unflatten(small)
        fresh = net._replace(variables=variables, opt_state=optimizer(self.setting).init(variables))
        return self.train(fresh, epochs, 0, self.setting.learning_rate, done)

    def masked(self, net: Net, dense: Net) -> PyTree:
        """The same network in the dense one's arrays, zero where units are gone."""
        wanted = jax.tree.leaves(dense.variables)
        leaves, treedef = jax.tree.flatten(net.variables)
        found = []
        for leaf, axes, old in zip(leaves, net.places, wanted, strict=True):
            wide = np.zeros(old.shape, leaf.dtype)
            wide[np.ix_(*axes)] = leaf
            found.append(jnp.asarray(wide))
        return treedef.unflatten(found)

    def _phase(
        self, net: Net, epochs: int, number: int, rate: float, done: Any, planned: dict[int, Any]
    ) -> Net:
        total = epochs * self.steps
        key = jax.random.fold_in(jax.random.fold_in(self.key, 1), number)
        warm = max(total // 10, 1) if number == 0 else 0
        for epoch in range(epochs):
            rows = np.asarray(
                jax.random.permutation(jax.random.fold_in(key, epoch), len(self.task.inputs))
            )
            rows = rows[: self.steps * self.setting.batch_size].reshape(self.steps, -1)
            for place in range(self.steps):
                now = epoch * self.steps + place
                if now in planned:
                    net = planned[now](net)
                share = (now - warm) / max(total - warm, 1)
                scale = (now + 1) / warm if now < warm else 0.5 * (1 + math.cos(math.pi * share))
                drawn = jax.random.fold_in(key, epochs + now)
                variables, opt_state = self.step(
                    net.variables, net.opt_state, drawn, jnp.float32(rate * scale), rows[place],
                    self.task.inputs, self.task.targets,
                )  # fmt: skip
                net = net._replace(variables=variables, opt_state=opt_state)
            jax.block_until_ready(net.variables)
            done()
        return net

    def _cut(self, net: Net, macs: float, number: int, random: bool) -> Net:
        """One cut: scores, a choice, and the smaller network."""
        key = jax.random.fold_in(jax.random.fold_in(self.key, 2), number)
        coupling = p.couple(self.subject.apply, net.variables, self.example)
        scores = self._scores(coupling, net.variables, key)
        if random:
            # Others of the same groups; how much each group loses is not left to chance.
            drawn = np.random.default_rng(np.asarray(jax.random.key_data(key)))
            scores = {name: drawn.permutation(values) for name, values in scores.items()}
        target = macs / net.costs.macs
        if target >= 1:
            return net
        kept = p.choose_units(
            coupling, scores, target, floor=self.setting.floor, multiple=self.setting.multiple
        )
        zeroed = p.zero_units(coupling, net.variables, kept)
        small = p.shrink(self.subject.apply, zeroed, self.example, opt_state=net.opt_state)
        if small.apply is not self.subject.apply:
            raise RuntimeError(f"{self.subject.title}: its function does not take smaller arrays.")
        within = small.coupling.places(small.kept)
        places = [
            [old[new] for old, new in zip(leaf, axes, strict=True)]
            for leaf, axes in zip(net.places, within, strict=True)
        ]
        return Net(small.params, small.opt_state, places, small.report.after)

    def _scores(self, coupling: Any, variables: PyTree, key: jax.Array) -> dict[str, np.ndarray]:
        """Scores of the units that may go, comparable between groups."""
        setting = self.setting
        if not self._removable:  # the same groups after every cut
            self._removable = p.removable_groups(coupling, variables, self.example)
        rows = jax.random.choice(
            key, len(self.task.inputs), (setting.calibration, setting.batch_size)
        )
        if setting.score == "magnitude":
            found = p.unit_scores(coupling, _learned(jnp.square, variables))
        else:
            each = [
                self._contributions(variables, self.task.inputs[r], self.task.targets[r])
                for r in rows
            ]
            if setting.score == "fisher":
                squares = jax.tree.map(lambda *g: sum(jnp.square(x) for x in g), *each)
                found = p.unit_scores(coupling, squares)
            else:
                summed = [p.unit_scores(coupling, one, normalise=False) for one in each]
                found = {}
                for name in summed[0]:
                    worth = np.mean([np.square(one[name]) for one in summed], axis=0)
                    found[name] = worth / (worth.mean() or 1.0)
        if setting.compete == "ranks":
            found = {name: _ranks(values) for name, values in found.items()}
        return {
            name: values
            for name, values in found.items()
            if name in self._removable and not stays_whole(self.subject, name)
        }

    def _contributions(self, variables: PyTree, inputs: jax.Array, targets: jax.Array) -> PyTree:
        """Parameters times gradients: what the loss would gain, to first order, without each."""
        grads = self._gradient(variables, inputs, targets)
        return _learned(jnp.multiply, variables, grads)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Places among the values, from 1 / count to 1: every group loses the same share."""
    return (1 + np.argsort(np.argsort(values, kind="stable"))) / len(values)


def stepper(subject: Subject, setting: Setting) -> Callable[..., Any]:
    """One step of training, compiled for every size of the network that it meets.

    Args:
      subject: the network.
      setting: how it is trained.

    Returns:
      ``(variables, opt_state, key, rate, rows, inputs, targets) -> (variables, opt_state)``.
    """
    tx = optimizer(setting)

    def objective(variables: PyTree, inputs: jax.Array, targets: jax.Array) -> Any:
        logits, after = subject.train(variables, inputs)
        return cross_entropy(logits, targets), after

    def step(
        variables: PyTree,
        opt_state: PyTree,
        key: jax.Array,
        rate: jax.Array,
        rows: jax.Array,
        inputs: jax.Array,
        targets: jax.Array,
    ) -> tuple[PyTree, PyTree]:
        inputs, targets = inputs[rows], targets[rows]
        if setting.flip:
            turned = jax.random.bernoulli(key, 0.5, (len(inputs), 1, 1, 1))
            inputs = jnp.where(turned, inputs[:, :, ::-1], inputs)
        grads, after = jax.grad(objective, has_aux=True)(variables, inputs, targets)
        updates, opt_state = tx.update(grads, opt_state, variables)
        # Statistics have no gradient: only what the forward pass found is new in them.
        variables = jax.tree.map(lambda v, u: v - rate * u, after, updates)
        return variables, opt_state

    return jax.jit(step)


def optimizer(setting: Setting) -> optax.GradientTransformation:
    """Adam's direction, with decoupled decay of kernels; the step multiplies it by the rate."""
    decay = optax.add_decayed_weights(
        setting.weight_decay, mask=partial(jax.tree.map, lambda leaf: leaf.ndim >= 2)
    )
    return optax.chain(optax.scale_by_adam(), decay)


def loss(
    apply: Callable[..., jax.Array], variables: PyTree, inputs: jax.Array, targets: jax.Array
) -> jax.Array:
    """Mean cross-entropy."""
    return cross_entropy(apply(variables, inputs), targets)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over examples, and over the places of a sequence."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def _learned(function: Callable[..., jax.Array], variables: PyTree, *rest: PyTree) -> PyTree:
    """Maps what is learned; running statistics count nothing."""
    paths = iter(an.trees.paths(variables))

    def each(leaf: jax.Array, *others: jax.Array) -> jax.Array:
        still = next(paths).startswith("stats/")
        return jnp.zeros_like(leaf) if still else function(leaf, *others)

    return jax.tree.map(each, variables, *rest)
