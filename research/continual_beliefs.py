"""Learners that hold a belief of more than one number a synapse, or of what the network says."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

import adaptivenet as an
from research.continual_data import Examples
from research.continual_methods import FAR, At, Learner, Net, portion
from research.rounds import noisy

PyTree = Any
post, con = an.posterior, an.consolidation
PRIOR = 1.0  # precision of the prior, beside curvatures that are sums over examples


class Kronecker(Learner):
    """Online Laplace with Kronecker factors: one anchor, and one curvature for all tasks so far.

    A strength of 1 is Bayes' rule. The penalty is an implicit step for ten updates at once, or for
    256 examples where that is more.
    """

    needs_strength = True
    fades = True
    periodic = True

    @property
    def every(self) -> int:
        """Updates that share an implicit step."""
        return max(10, 256 // self.facts.batch_size)

    def optimizer(self) -> optax.GradientTransformation:
        """The step back towards the anchor comes last."""
        back = con.structured_proximal(
            self.strength / self.facts.fisher_examples,
            self.facts.rate,
            self.like,
            decay=self.keep,
            every=self.every,
        )
        return optax.chain(self.plain(), back)

    def like(self, params: PyTree) -> Any:
        """What its beliefs look like."""
        one, classes = jnp.zeros((1, self.facts.sizes[0])), jnp.ones(self.facts.sizes[-1], bool)
        return self.fitted(params, one, jnp.zeros(1, jnp.int32), classes)

    def fitted(self, params: PyTree, x: jax.Array, y: jax.Array, active: jax.Array) -> Any:
        """The Laplace approximation around some parameters, of some examples."""
        return post.laplace(
            lambda p, x: self.masked(p, x, active),
            params,
            x,
            y,
            likelihood="categorical",
            prior_precision=PRIOR,
            structure="kronecker",
            batch_size=min(1000, len(x)),
        )

    def boundary(self, net: Net, task: Examples, at: At) -> Net:
        """Remembers what the task needs."""
        number = self.facts.fisher_examples
        x, y = task.inputs[:number], task.targets[:number]
        belief = self.fitted(net.params, x, y, at.active)
        return net._replace(opt_state=con.consolidate(net.opt_state, net.params, belief))


class KroneckerPenalty(Kronecker):
    """The same penalty in the gradient, as its authors have it, before the optimizer."""

    def optimizer(self) -> optax.GradientTransformation:
        """The penalty's gradient goes through the optimizer."""
        strength = self.strength / self.facts.fisher_examples
        rule = con.structured_elastic(strength, self.like, decay=self.keep)
        return optax.chain(rule, self.plain())


class KroneckerAveraged(Kronecker):
    """The same belief around an average of the latest networks, nearer to a mode than the last one.

    The average reaches back some thousand examples; it is what is tested, and at a boundary what is
    remembered and learnt on from.
    """

    reach = 4000
    """examples that the average reaches back"""

    def begin(self, key: jax.Array) -> Net:
        """A fresh network, its own average."""
        net = super().begin(key)
        return net._replace(memory=net.params)

    def step(self, net: Net, x: jax.Array, y: jax.Array, at: At) -> Net:
        """One batch, and what it adds to the average."""
        net = super().step(net, x, y, at)
        share = min(1.0, self.facts.batch_size / self.reach)
        return net._replace(memory=optax.incremental_update(net.params, net.memory, share))

    def boundary(self, net: Net, task: Examples, at: At) -> Net:
        """Remembers what the task needs, around the average."""
        return super().boundary(net._replace(params=net.memory), task, at)

    def logits(self, net: Net, x: jax.Array, at: At) -> jax.Array:
        """Predictions of the average."""
        return super().logits(net._replace(params=net.memory), x, at)


class Unified(Kronecker):
    """One belief protects and prunes: its least certain half of the synapses is cut at a boundary.

    What protects a synapse is what keeps it: those the fewest standard deviations from zero are
    cut, and the belief of all tasks, given that they are zero, moves what is left to make up for
    them. They may grow again in the next task; every network that is tested has them at zero.
    """

    cut, corrections = 0.5, 50
    """of the synapses that are zero after a task; and steps of what makes up for them"""

    def remembered(self, opt_state: Any) -> Any:
        """The belief of all tasks so far."""
        return opt_state[1].memory

    def begin(self, key: jax.Array) -> Net:
        """A fresh network of which nothing is believed."""
        net = super().begin(key)
        return net._replace(memory=jax.tree.map(jnp.zeros_like, self.synapses(net.params)))

    def synapses(self, params: PyTree) -> PyTree:
        """The kernels."""
        return {name: {"kernel": layer["kernel"]} for name, layer in params.items()}

    def score(self, kernels: PyTree, precision: PyTree, key: jax.Array) -> PyTree:
        """What a synapse is worth: by how many standard deviations it is not zero."""
        del key
        return jax.tree.map(lambda w, s: jnp.abs(w) * jnp.sqrt(s), kernels, precision)

    def made_up(self, params: PyTree, memory: Any, mask: PyTree) -> PyTree:
        """The likeliest parameters, given what was cut."""
        return con.structured_conditional(params, memory, self.like, mask, steps=self.corrections)

    def boundary(self, net: Net, task: Examples, at: At) -> Net:
        """Takes the task in, cuts what nobody is certain of, and remembers what is left."""
        number = self.facts.fisher_examples
        belief = self.fitted(net.params, task.inputs[:number], task.targets[:number], at.active)
        memory = self.remembered(con.consolidate(net.opt_state, net.params, belief))
        diagonal = self.synapses(belief.gaussian.diagonal().precision)
        precision = jax.tree.map(lambda old, new: self.keep * old + new, net.memory, diagonal)
        kernels = self.synapses(net.params)
        score = self.score(kernels, precision, at.key)
        kept = round((1 - self.cut) * sum(leaf.size for leaf in jax.tree.leaves(kernels)))
        chosen = an.selection.top_mask(score, kept)
        mask = {
            name: {part: chosen[name].get(part, optax.MaskedNode()) for part in layer}
            for name, layer in net.params.items()
        }
        left = self.made_up(net.params, memory, mask)
        moved = dataclasses.replace(belief.gaussian, params=left)
        return Net(left, con.consolidate(net.opt_state, left, moved), precision)

    def capacity(self, net: Net) -> jax.Array:
        """The share of the synapses that are not zero."""
        kernels = self.synapses(net.params)
        return portion([jnp.sum(leaf != 0) for leaf in jax.tree.leaves(kernels)], kernels)


class UnifiedPenalty(Unified):
    """The same where the belief protects through the gradient, before the optimizer."""

    optimizer = KroneckerPenalty.optimizer

    def remembered(self, opt_state: Any) -> Any:
        """The belief of all tasks so far."""
        return opt_state[0]


class UnifiedMagnitude(Unified):
    """A control: the smallest are cut; the belief makes up for them all the same."""

    def score(self, kernels: PyTree, precision: PyTree, key: jax.Array) -> PyTree:
        """The magnitude."""
        del precision, key
        return jax.tree.map(jnp.abs, kernels)


class UnifiedRandom(Unified):
    """A control: any are cut; the belief makes up for them all the same."""

    def score(self, kernels: PyTree, precision: PyTree, key: jax.Array) -> PyTree:
        """Nothing but chance."""
        del precision
        keys = jax.random.split(key, len(kernels))
        return {
            name: {"kernel": jax.random.uniform(own, layer["kernel"].shape)}
            for own, (name, layer) in zip(keys, kernels.items(), strict=True)
        }


class UnifiedBare(Unified):
    """A control: the least certain are cut, and nothing makes up for them."""

    def made_up(self, params: PyTree, memory: Any, mask: PyTree) -> PyTree:
        """The parameters as they are, with zeros."""
        del memory
        return an.trees.merge_synapses(lambda m, p: jnp.where(m, p, 0.0), mask, params)


class Variational(Learner):
    """VCL: a mean-field belief, whose posterior is the next task's prior; draws at the units.

    The strength is the temperature of the divergence (1: Bayes' rule). Beliefs begin narrow.
    """

    needs_strength = True
    periodic = True
    prior, narrow = 0.1, 0.01

    def begin(self, key: jax.Array) -> Net:
        """A fresh belief around a fresh network."""
        net = super().begin(key)
        fields = post.meanfield.init(net.params, self.narrow)
        prior = post.isotropic(jax.tree.map(jnp.zeros_like, net.params), self.prior**-2)
        return Net(fields.mean, self.tx.init(fields), (fields.rho, prior))

    def believed(self, net: Net) -> Any:
        """The belief."""
        return post.meanfield.MeanField(net.params, net.memory[0])

    def members(self, fields: Any, x: jax.Array, at: At, draws: int) -> jax.Array:
        """Logarithms of the probabilities of several draws, [draws, batch, classes]."""
        scales = post.meanfield.scales(fields)
        keys = jax.random.split(at.key, draws)
        logits = jax.vmap(lambda key: noisy(fields.mean, scales, x, key))(keys)
        return jax.nn.log_softmax(jnp.where(at.active, logits, FAR))

    def step(self, net: Net, x: jax.Array, y: jax.Array, at: At) -> Net:
        """One batch: one draw a unit and example, and the exact divergence."""
        prior = net.memory[1]

        def loss(fields: Any) -> jax.Array:
            logs = self.members(fields, x, at, 1)
            fit = -jnp.mean(jnp.take_along_axis(logs, y[None, :, None], 2))
            far = post.meanfield.kl(fields, prior=prior)
            return fit + self.strength / self.facts.examples * far

        fields = self.believed(net)
        updates, opt_state = self.tx.update(jax.grad(loss)(fields), net.opt_state, fields)
        after: Any = optax.apply_updates(fields, updates)
        return Net(after.mean, opt_state, (after.rho, prior))

    def boundary(self, net: Net, task: Examples, at: At) -> Net:
        """The belief becomes the prior."""
        del task, at
        fields, prior = con.variational.next_task(self.believed(net))
        return Net(fields.mean, net.opt_state, (fields.rho, prior))

    def logits(self, net: Net, x: jax.Array, at: At) -> jax.Array:
        """The average prediction of several draws."""
        logs = self.members(self.believed(net), x, at, self.facts.draws)
        return jax.nn.logsumexp(logs, 0) - math.log(self.facts.draws)


class Functional(Learner):
    """FROMP: outputs at a few undecided examples of every task are held as the belief says.

    The memory of the study is shared among the tasks. A strength of 1 is Bayes' rule.
    """

    needs_strength = True

    @property
    def slots(self) -> int:
        """Examples a task."""
        number = self.facts.memory // self.facts.tasks
        if not number:
            raise ValueError(
                f"memory: fromp needs an example a task; give memory: {self.facts.tasks} at least."
            )
        return number

    def begin(self, key: jax.Array) -> Net:
        """A fresh network, and an empty memory."""
        net = super().begin(key)
        memory = con.functional.empty_memory(
            jnp.zeros(self.facts.sizes[0]),
            outputs=self.facts.sizes[-1],
            tasks=self.facts.tasks,
            slots=self.slots,
        )
        precision = jax.tree.map(lambda leaf: jnp.full_like(leaf, PRIOR), net.params)
        return net._replace(memory=(memory, precision))

    def step(self, net: Net, x: jax.Array, y: jax.Array, at: At) -> Net:
        """One batch, and all that is remembered."""
        memory, _ = net.memory
        strength = self.strength / self.facts.examples

        def loss(params: PyTree) -> jax.Array:
            held = con.functional.functional_penalty(self.apply, params, memory, strength=strength)
            return self.loss(params, x, y, at.active) + held

        updates, opt_state = self.tx.update(jax.grad(loss)(net.params), net.opt_state, net.params)
        return net._replace(params=optax.apply_updates(net.params, updates), opt_state=opt_state)

    def boundary(self, net: Net, task: Examples, at: At) -> Net:
        """Keeps undecided examples of the task; the belief takes in its curvature."""
        memory, precision = net.memory
        number = self.facts.fisher_examples
        x = task.inputs[:number]
        scale = self.facts.examples / len(x)
        curvature = post.fisher_diagonal(
            lambda p, x: self.masked(p, x, at.active), net.params, x, kind="exact"
        )
        precision = jax.tree.map(lambda s, f: s + scale * f, precision, curvature)
        places = con.functional.memorable(self.apply, net.params, x, self.slots, classes=at.active)
        memory = con.functional.remember(
            self.apply,
            net.params,
            post.Posterior(net.params, precision),
            memory,
            x[places],
            classes=at.active,
        )
        return net._replace(memory=(memory, precision))


class Cascade(Learner):
    """Benna and Fusi's synapses of six levels; the strength is the flow between the first two."""

    needs_strength = True
    told = False
    levels, base = 6, 3.0

    def optimizer(self) -> optax.GradientTransformation:
        """The beakers come last."""
        return optax.chain(
            self.plain(), con.cascade(self.levels, base=self.base, rate=self.strength)
        )


BELIEVING: dict[str, type[Learner]] = {
    "kronecker": Kronecker,
    "kronecker_penalty": KroneckerPenalty,
    "kronecker_averaged": KroneckerAveraged,
    "unified": Unified,
    "unified_penalty": UnifiedPenalty,
    "unified_magnitude": UnifiedMagnitude,
    "unified_random": UnifiedRandom,
    "unified_bare": UnifiedBare,
    "vcl": Variational,
    "fromp": Functional,
    "cascade": Cascade,
}
