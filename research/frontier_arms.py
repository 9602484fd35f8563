"""The arms of the frontier: subjects, rules, and the training of a population under one rule.

A rule is spelled ``score``, ``score+regrowth``, and with ``*`` behind it if a dense teacher helps:
``magnitude``, ``obd+gradient``, ``fisher_tempered+gradient*``. Two controls cut nothing: ``dense``,
and ``l2``, which loses at every event as much of its Euclidean norm as a cut would take.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adaptivenet as an
from adaptivenet import models
from adaptivenet.emergence import nulls
from research.rounds import Net, Task, density, kernels

if TYPE_CHECKING:
    from research.frontier import Setting

PyTree = Any
p = an.pruning
signals = an.pruning.signals

CONTROLS = ("dense", "l2")
AT_START = ("snip", "grasp", "synflow")
SCORES: dict[str, Any] = {
    "random": p.random,
    "magnitude": p.magnitude,
    "lamp": p.lamp(),
    "saliency": p.saliency,
    "movement": p.movement,
    "wanda": p.wanda,
    "fisher_tempered": p.fisher_tempered(0.25),
    "obd": p.obd,
    "snr": p.snr,
}
REGROWTH: dict[str, Any] = {
    "random": p.at_random,
    "gradient": p.by_gradient,
    "momentum": p.by_momentum,
    "links": p.by_link_prediction,
}


class Subject(NamedTuple):
    """A network of the literature.

    Attributes:
      init: ``(key, features) -> params``.
      apply: ``(params, inputs, key=None, dropout=0.0) -> logits``.
    """

    init: Callable[..., PyTree]
    apply: Callable[..., jax.Array]


class Rule(NamedTuple):
    """A rule, read from its name."""

    score: str
    regrowth: str = ""
    taught: bool = False


class Belief(NamedTuple):
    """What the score ``snr`` asks for; precision is the Fisher diagonal plus that of a prior."""

    mean: PyTree
    precision: PyTree


def _perceptron(*widths: int) -> Subject:
    return Subject(lambda key, features: models.mlp_init(key, (features, *widths)), models.mlp)


def _lenet5(key: jax.Array, features: int) -> PyTree:
    if features != 784:
        raise ValueError(f"LeNet-5 takes images of 28 x 28 pixels, not {features} features.")
    return models.lenet5_init(key)


SUBJECTS = {
    "mlp": _perceptron(128, 64, 10),
    "lenet300": _perceptron(*models.LENET_300_100[1:]),
    # Rectified, as in the experiments of Sparse VD and of L0 gates that it is compared with.
    "lenet5": Subject(_lenet5, partial(models.lenet5, activation=jax.nn.relu)),
}


def read_rule(name: str) -> Rule:
    """Reads a rule's name.

    Args:
      name: such as ``obd+gradient*``.

    Returns:
      The rule.

    Raises:
      ValueError: a part is unknown.

    >>> read_rule("obd+gradient*")
    Rule(score='obd', regrowth='gradient', taught=True)
    """
    score, _, regrowth = name.removesuffix("*").partition("+")
    alone = score in (*CONTROLS, *AT_START)
    if not alone and score not in SCORES:
        known = ", ".join((*CONTROLS, *AT_START, *SCORES))
        raise ValueError(f"rule {name!r}: no score {score!r}; choose of {known}.")
    if regrowth and (alone or regrowth not in REGROWTH):
        why = "has no regrowth" if alone else f"no regrowth {regrowth!r}"
        raise ValueError(f"rule {name!r}: {why}; choose of {', '.join(REGROWTH)}.")
    return Rule(score, regrowth, name.endswith("*"))


def loss(
    subject: Subject,
    params: PyTree,
    inputs: jax.Array,
    targets: jax.Array,
    taught: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
    dropout: Any = 0.0,
    teaching: tuple[float, float] = (0.0, 1.0),
) -> jax.Array:
    """Cross-entropy; with a teacher's logits, mixed with the divergence from its soft answers.

    Args:
      subject: the network.
      params: its parameters.
      inputs: ``[batch, ...]``.
      targets: ``[batch]`` class numbers.
      taught: ``[batch, classes]``, the teacher's logits.
      key: of dropout.
      dropout: its rate.
      teaching: share of the teacher in the loss, and the temperature.

    Returns:
      The mean over the batch.

    References:
      Hinton et al., "Distilling the knowledge in a neural network", arXiv:1503.02531.
    """
    logits = subject.apply(params, inputs, key=key, dropout=dropout)
    hard = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))
    if taught is None:
        return hard
    share, heat = teaching
    soft = optax.softmax_cross_entropy(logits / heat, jax.nn.softmax(taught / heat))
    return (1 - share) * hard + share * heat**2 * jnp.mean(soft)


def shifted(key: jax.Array, images: jax.Array, most: int) -> jax.Array:
    """Moves every image by a whole number of pixels each way; what enters is 0.

    Args:
      key: of the draw.
      images: ``[batch, side * side]``.
      most: pixels in each direction, at the most.

    Returns:
      Images of the same shape.

    Raises:
      ValueError: the features are no square image.
    """
    side = math.isqrt(images.shape[-1])
    if side * side != images.shape[-1]:
        raise ValueError(f"shift: {images.shape[-1]} features are no square image.")
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * most + 1)

    def move(image: jax.Array, corner: jax.Array) -> jax.Array:
        wide = jnp.pad(image.reshape(side, side), most)
        return jax.lax.dynamic_slice(wide, (corner[0], corner[1]), (side, side)).ravel()

    return jax.vmap(move)(images, corners)


class Training:
    """Seeds x sparsities of one subject under one rule, as one program.

    Every function is pure; a network at ``[seed, sparsity]`` is what it would be alone, up to the
    rounding of batched products.
    """

    def __init__(self, setting: Setting, name: str, rule: str, examples: int) -> None:
        self.setting, self.subject, self.rule = setting, SUBJECTS[name], read_rule(rule)
        self.examples = examples
        self.steps = examples // setting.batch_size // setting.events
        if self.steps == 0:
            raise ValueError(
                f"{name}.batch_size={setting.batch_size}: {examples} training examples do not fill "
                f"a batch for each of {setting.events} events an epoch; lower one of them."
            )
        whole = self.steps * setting.epochs * setting.events
        self.start = round(setting.prune_start * whole)
        self.end = round(setting.prune_end * whole)
        self.rest = round(setting.grow_end * whole)
        self.rate = optax.warmup_cosine_decay_schedule(
            0.0, setting.learning_rate, min(setting.warmup, whole - 1), whole
        )
        begin = jax.vmap(jax.vmap(self.begin, (None, 0, None)), (0, None, None))
        chunk = jax.vmap(self.chunk, (0, 0, None, None, None, None, None))
        self._begin = jax.jit(begin)
        self._chunk = jax.jit(
            jax.vmap(chunk, (0, None, 0, 0, None, None, 0 if self.rule.taught else None))
        )
        self._shuffle = jax.jit(jax.vmap(self._order, (0, None)))

    def run(
        self,
        task: Task,
        keys: jax.Array,
        sparsities: tuple[float, ...],
        logits: jax.Array | None = None,
        done: Callable[[float], None] = lambda share: None,
    ) -> PyTree:
        """Trains all networks to the end.

        Args:
          task: the data.
          keys: ``[seeds]``.
          sparsities: one network each, for every seed.
          logits: ``[seeds, examples, classes]`` of the teachers, if the rule is taught.
          done: is told the share of the training that is done, after each epoch.

        Returns:
          The parameters, ``[seeds, sparsities, ...]``.
        """
        targets, events = jnp.asarray(sparsities, jnp.float32), self.setting.events
        net = self._begin(keys, targets, task)
        for epoch in range(self.setting.epochs):
            rows = self._shuffle(keys, jnp.int32(epoch))
            for part in range(events):
                number = jnp.int32(epoch * events + part)
                net = self._chunk(net, targets, keys, rows[:, part], number, task, logits)
            jax.block_until_ready(net.params)
            done((epoch + 1) / self.setting.epochs)
        return net.params

    def schedule(self, sparsity: Any) -> Any:
        """When how much is cut."""
        if self.rule.score in AT_START:
            return p.constant(sparsity)
        return p.polynomial(sparsity, self.start, self.end, power=self.setting.power)

    def pruner(self, sparsity: Any, score: Any = p.magnitude) -> Any:
        """The rule as a transformation; its events happen between chunks."""
        rule, regrow = self.rule, None
        if rule.regrowth:
            fraction = p.cosine_fraction(self.setting.fraction, self.rest)
            regrow = REGROWTH[rule.regrowth](fraction)
        score = SCORES.get(rule.score, score)
        return p.prune(self.schedule(sparsity), score=score, regrow=regrow, every=None)

    def optimizer(self, sparsity: Any) -> optax.GradientTransformation:
        """Adam, the pruner, and the signals that the rule asks for."""
        # Where few weights are left each has to go further in the same number of steps.
        faster = (1 - sparsity) ** -self.setting.rate_power
        adam = optax.adamw(
            lambda step: faster * self.rate(step), weight_decay=self.setting.weight_decay
        )
        if self.rule.score in CONTROLS:
            return adam
        kept: dict[str, Any] = {}
        if self.rule.score in ("fisher_tempered", "obd", "snr"):
            kept["fisher"] = signals.fisher(self.setting.decay)
        if self.rule.score == "movement":
            kept["movement"] = signals.movement()
        if self.rule.regrowth == "momentum":
            kept["momentum"] = signals.momentum(self.setting.decay)
        return p.with_signals(optax.chain(adam, self.pruner(sparsity)), **kept)

    def begin(self, key: jax.Array, sparsity: jax.Array, task: Task) -> Net:
        """A network as initialised, and cut at once if the rule does so."""
        params = self.subject.init(jax.random.fold_in(key, 0), task.inputs.shape[-1])
        tx = self.optimizer(sparsity)
        net = Net(params, tx.init(params))
        if self.rule.score not in AT_START:
            return net
        x, y = self._some(jax.random.fold_in(key, 1), task)
        if self.rule.score == "synflow":
            scores = p.synflow(self.subject.apply, params, x[:1], sparsity=sparsity, rounds=100)
        else:
            heat = 200.0 if self.rule.score == "grasp" else 1.0
            cooled = self.subject._replace(apply=lambda *a, **k: self.subject.apply(*a, **k) / heat)
            scores = getattr(p, self.rule.score)(partial(loss, cooled), params, x, y)
        return Net(*p.revise(self.pruner(sparsity, p.fixed(scores)), *net, reset=False))

    def event(
        self, net: Net, sparsity: jax.Array, key: jax.Array, step: jax.Array, task: Task
    ) -> Net:
        """A cut, and what wakes."""
        if self.rule.score == "dense" or self.rule.score in AT_START:
            return net
        if self.rule.score == "l2":
            return net._replace(params=self._decayed(net.params, sparsity, step))
        x, y = self._some(key, task)
        given: dict[str, Any] = {}
        if self.rule.score == "saliency" or self.rule.regrowth == "gradient":
            given["grads"] = jax.grad(partial(loss, self.subject))(net.params, x, y)
        if self.rule.score == "wanda":
            given["activations"] = p.input_norms(self.subject.apply, net.params, x)
        if self.rule.score == "snr":
            known = signals.readings(net.opt_state)["fisher"]
            curvature = self.examples * self.setting.batch_size
            precision = jax.tree.map(lambda f: curvature * f + self.setting.prior, known)
            given["posterior"] = Belief(net.params, precision)
        return Net(*p.revise(self.pruner(sparsity), *net, **given))

    def chunk(
        self,
        net: Net,
        sparsity: jax.Array,
        key: jax.Array,
        rows: jax.Array,
        number: jax.Array,
        task: Task,
        logits: jax.Array | None,
    ) -> Net:
        """An event, and the steps up to the next one."""
        of_event, of_steps = jax.random.split(jax.random.fold_in(key, number + 2))

        def cut(net: Net) -> Net:
            return self.event(net, sparsity, of_event, number * self.steps, task)

        # Before the schedule begins there is nothing to cut, nor anything to wake.
        net = jax.lax.cond(number * self.steps >= self.start, cut, lambda net: net, net)
        tx = optax.with_extra_args_support(self.optimizer(sparsity))
        setting = self.setting

        def step(net: Net, at: tuple[jax.Array, jax.Array]) -> tuple[Net, None]:
            rows, number = at
            drop = setting.dropout * density(net.params) ** setting.dropout_power
            inputs = task.inputs[rows]
            if setting.shift:
                of_shift = jax.random.fold_in(jax.random.fold_in(of_steps, number), 0)
                inputs = shifted(of_shift, inputs, setting.shift)
            grads = jax.grad(partial(loss, self.subject))(
                net.params,
                inputs,
                task.targets[rows],
                None if logits is None else logits[rows],
                key=jax.random.fold_in(of_steps, number) if setting.dropout else None,
                dropout=drop if setting.dropout else 0.0,
                teaching=(setting.teaching, setting.temperature),
            )
            updates, opt_state = tx.update(grads, net.opt_state, net.params)
            return Net(optax.apply_updates(net.params, updates), opt_state), None

        return jax.lax.scan(step, net, (rows, jnp.arange(self.steps)))[0]

    def _order(self, key: jax.Array, epoch: jax.Array) -> jax.Array:
        """Rows ``[events, steps, batch]`` of an epoch; the same for every rule and sparsity."""
        shape = (self.setting.events, self.steps, self.setting.batch_size)
        key = jax.random.fold_in(jax.random.fold_in(key, 1), epoch)
        return jax.random.permutation(key, self.examples)[: int(np.prod(shape))].reshape(shape)

    def _some(self, key: jax.Array, task: Task) -> tuple[jax.Array, jax.Array]:
        """Examples for an event's gradients and activations."""
        rows = jax.random.choice(key, self.examples, (self.setting.calibration,), replace=False)
        return task.inputs[rows], task.targets[rows]

    def _decayed(self, params: PyTree, sparsity: Any, step: jax.Array) -> PyTree:
        """The parameters, short of the norm that the next cut of the schedule would take."""
        weights = jnp.abs(jnp.concatenate([k.ravel() for k in kernels(params)]))
        schedule = self.schedule(sparsity)

        def left(step: jax.Array) -> jax.Array:
            kept = weights.size - jnp.round(schedule(step) * weights.size).astype(jnp.int32)
            mask = an.selection.top_mask({"w": weights}, kept)["w"]
            return jnp.sqrt(jnp.sum(jnp.square(weights), where=mask))

        return nulls.scale(params, left(step) / left(jnp.maximum(step - self.steps, 0)))


# Compiled once for all chunks of seeds.
training = functools.cache(Training)
