"""Learners that rehearse: from a bounded memory, from the old network, from dreams, in sleep."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

import adaptivenet as an
from research.continual_data import Examples
from research.continual_methods import FAR, At, Learner, Net

PyTree = Any
post, slp = an.posterior, an.consolidation.sleep


class Rehearsal(Learner):
    """Experience replay: as many remembered examples as new ones, from a reservoir."""

    told = False

    def begin(self, key: jax.Array) -> Net:
        """A fresh network, and an empty memory."""
        if not self.facts.memory:
            raise ValueError("memory: rows that rehearse need room; give memory: 1000, say.")
        net = super().begin(key)
        features, classes = self.facts.sizes[0], self.facts.sizes[-1]
        one = slp.Remembered(jnp.zeros(features), jnp.int32(0), jnp.zeros(classes))
        memory = slp.buffer.init((one, jnp.zeros(classes, bool)), self.facts.memory, key)
        return net._replace(memory=memory)

    def rehearsed(
        self, params: PyTree, x: jax.Array, y: jax.Array, at: At, drawn: Any
    ) -> jax.Array:
        """The loss of a batch of new and remembered examples."""
        old, active = drawn.items
        here = jnp.broadcast_to(at.active, active.shape)
        # Where all classes compete, those that came later do so as well.
        active = here if self.facts.cumulative else active
        new, weights = slp.mix((x, y, here), drawn._replace(items=(old.inputs, old.labels, active)))
        return slp.cross_entropy(self.masked(params, new[0], new[2]), new[1], weights)

    def slope(self, net: Net, x: jax.Array, y: jax.Array, at: At, drawn: Any) -> Any:
        """The gradient, and what the optimizer is told beside it."""
        return jax.grad(self.rehearsed)(net.params, x, y, at, drawn), {}

    def step(self, net: Net, x: jax.Array, y: jax.Array, at: At) -> Net:
        """One batch, which the memory then sees as well."""
        drawn = slp.buffer.draw(net.memory, at.key, self.facts.batch_size)
        grads, told = self.slope(net, x, y, at, drawn)
        updates, opt_state = self.tx.update(grads, net.opt_state, net.params, **told)
        logits = self.apply(net.params, x)
        active = jnp.broadcast_to(at.active, logits.shape)
        memory = slp.buffer.add(net.memory, (slp.Remembered(x, y, logits), active))
        return Net(optax.apply_updates(net.params, updates), opt_state, memory)


class Dark(Rehearsal):
    """DER++: remembered logits are matched, and remembered labels learnt; beta is 1/2."""

    needs_strength = True
    beta = 0.5

    def rehearsed(
        self, params: PyTree, x: jax.Array, y: jax.Array, at: At, drawn: Any
    ) -> jax.Array:
        """The loss of the new examples, and of remembered ones."""
        old, active = drawn.items
        active = at.active if self.facts.cumulative else active
        logits = self.apply(params, old.inputs)
        gaps = jnp.mean(jnp.square(logits - jax.lax.stop_gradient(old.logits)), -1)
        number = jnp.maximum(jnp.sum(drawn.where.astype(jnp.float32)), 1.0)
        dark = jnp.sum(jnp.where(drawn.where, gaps, 0.0)) / number
        known = slp.cross_entropy(jnp.where(active, logits, FAR), old.labels, drawn.where)
        return self.loss(params, x, y, at.active) + self.strength * dark + self.beta * known


class Projected(Rehearsal):
    """A-GEM: gradients that would raise the loss of remembered examples are projected."""

    def optimizer(self) -> optax.GradientTransformation:
        """The projection comes first."""
        return optax.chain(slp.agem(), self.plain())

    def slope(self, net: Net, x: jax.Array, y: jax.Array, at: At, drawn: Any) -> Any:
        """The gradient of the new examples; that of remembered ones is told beside it."""
        old, active = drawn.items
        active = at.active if self.facts.cumulative else active

        def remembered(params: PyTree) -> jax.Array:
            logits = self.masked(params, old.inputs, active)
            return slp.cross_entropy(logits, old.labels, drawn.where)

        grads = jax.grad(self.loss)(net.params, x, y, at.active)
        return grads, {"reference_grads": jax.grad(remembered)(net.params)}


class Distilled(Learner):
    """LwF: the network before the task says what its inputs are, and is imitated there."""

    needs_strength = True
    heat = 2.0

    def begin(self, key: jax.Array) -> Net:
        """A fresh network, and nothing to imitate yet."""
        net = super().begin(key)
        classes = jnp.zeros(self.facts.sizes[-1], bool)
        return net._replace(memory=(jax.tree.map(jnp.copy, net.params), classes))

    def step(self, net: Net, x: jax.Array, y: jax.Array, at: At) -> Net:
        """One batch."""
        old, known = net.memory
        answers = jnp.where(known, self.apply(old, x), FAR)
        any_known = jnp.any(known).astype(jnp.float32)

        def loss(params: PyTree) -> jax.Array:
            logits = jnp.where(known, self.apply(params, x), FAR)
            imitated = slp.distillation(logits, answers, temperature=self.heat)
            return self.loss(params, x, y, at.active) + self.strength * any_known * imitated

        updates, opt_state = self.tx.update(jax.grad(loss)(net.params), net.opt_state, net.params)
        return net._replace(params=optax.apply_updates(net.params, updates), opt_state=opt_state)

    def boundary(self, net: Net, task: Examples, at: At) -> Net:
        """The network as it is now is what the next task imitates."""
        del task
        _, known = net.memory
        return net._replace(memory=(jax.tree.map(jnp.copy, net.params), known | at.active))


class Dreaming(Learner):
    """Generative replay from mixtures of factor analysers by class, with distilled answers.

    Awake it learns and observes; the old network answers the dreams. Nothing is stored.
    """

    components, rank, heat = 20, 10, 2.0

    def begin(self, key: jax.Array) -> Net:
        """A fresh network, a generator that has seen nothing, and nothing to imitate."""
        net = super().begin(key)
        memory = slp.mixtures.init(
            self.facts.sizes[0],
            self.facts.sizes[-1],
            components=self.components,
            rank=min(self.rank, self.facts.sizes[0]),
            seed=key,
        )
        return net._replace(memory=(memory, jax.tree.map(jnp.copy, net.params)))

    def step(self, net: Net, x: jax.Array, y: jax.Array, at: At) -> Net:
        """One batch, and as many dreams."""
        generator, old = net.memory
        dream = functools.partial(
            slp.mixtures.dream, generator, number=self.facts.batch_size, low=0.0, high=1.0
        )
        drawn = slp.replayed(dream, self.apply, old)(at.key)
        known = generator.seen > 0
        answers = jnp.where(known, drawn.items.logits, FAR)

        def loss(params: PyTree) -> jax.Array:
            logits = jnp.where(known, self.apply(params, drawn.items.inputs), FAR)
            replay = slp.distillation(logits, answers, temperature=self.heat)
            new = self.loss(params, x, y, at.active)
            return jnp.where(
                at.task > 0, slp.generative.balanced(new, replay, tasks=at.task + 1), new
            )

        updates, opt_state = self.tx.update(jax.grad(loss)(net.params), net.opt_state, net.params)
        return net._replace(params=optax.apply_updates(net.params, updates), opt_state=opt_state)

    def observed(self, generator: Any, task: Examples) -> Any:
        """The generator after some passes over a task, in large batches."""
        each = min(1000, self.facts.examples)
        number = self.facts.examples // each
        rows = jnp.arange(number * each).reshape(number, each)

        def observe(generator: Any, rows: jax.Array) -> tuple[Any, None]:
            found = slp.mixtures.observe(generator, task.inputs[rows], task.targets[rows])
            return found, None

        return jax.lax.scan(observe, generator, rows)[0]

    def boundary(self, net: Net, task: Examples, at: At) -> Net:
        """Observes the task, and keeps the network to imitate."""
        del at
        generator = self.observed(net.memory[0], task)
        return net._replace(memory=(generator, jax.tree.map(jnp.copy, net.params)))


class Night(Dreaming):
    """Awake it learns the task alone; asleep it dreams of all classes, and learns from these."""

    nights = 1000

    def step(self, net: Net, x: jax.Array, y: jax.Array, at: At) -> Net:
        """One batch, without any replay."""
        return Learner.step(self, net, x, y, at)

    def boundary(self, net: Net, task: Examples, at: At) -> Net:
        """Observes the task, then sleeps."""
        generator = self.observed(net.memory[0], task)
        known = generator.seen > 0
        dream = functools.partial(
            slp.mixtures.dream, generator, number=self.facts.batch_size, low=0.0, high=1.0
        )

        def loss(params: PyTree, drawn: tuple[jax.Array, jax.Array]) -> jax.Array:
            return slp.cross_entropy(jnp.where(known, self.apply(params, drawn[0]), FAR), drawn[1])

        phase = {"replay": slp.replay(loss, self.plain(), lambda k: dream(k), steps=self.nights)}
        params, _ = slp.sleep(net.params, phase, at.key)
        return Net(params, self.tx.init(params), (generator, params))


class NoiseDriven(Learner):
    """SRC: asleep, noise with the mean of what was learnt as its rates drives a network of spikes.

    As published, the network has no biases, and no example is stored; the strength is the gain of
    its layers in sleep (published: 55.9), thresholds are the published ones. It sleeps after every
    task but the first.
    """

    needs_strength = True
    nights = 15_000
    first, inner, last = 14.5, 44.6, 38.0
    """thresholds of the layers"""

    def begin(self, key: jax.Array) -> Net:
        """A fresh network without biases, and the sum of the tasks' mean inputs."""
        net = super().begin(key)
        params = {name: {"kernel": layer["kernel"]} for name, layer in net.params.items()}
        return Net(params, self.tx.init(params), jnp.zeros(self.facts.sizes[0]))

    def boundary(self, net: Net, task: Examples, at: At) -> Net:
        """Sleeps."""
        seen = net.memory + task.inputs[: self.facts.examples].mean(0)
        shown = task.inputs[: self.facts.fisher_examples]
        sizes = slp.layer_scales(net.params, shown)
        slept, _ = slp.sleep_replay(
            net.params,
            at.key,
            seen / (at.task + 1).astype(seen.dtype),
            steps=self.nights,
            scales=[self.strength * size for size in sizes],
            thresholds=(self.first, *(self.inner,) * (len(sizes) - 2), self.last),
        )
        awake = at.task == 0
        params = jax.tree.map(lambda w, s: jnp.where(awake, w, s), net.params, slept)
        return Net(params, net.opt_state, seen)


REPLAYING: dict[str, type[Learner]] = {
    "er": Rehearsal,
    "derpp": Dark,
    "agem": Projected,
    "lwf": Distilled,
    "dreams": Dreaming,
    "night": Night,
    "src": NoiseDriven,
}
