"""Learners with room: what is released, protected and regrown, and rules that share a network out.

Rows of the first kind use the whole network for every task, and are not told which is tested. Those
that are told (PackNet, Piggyback, HAT, ``lifelong_ids``) read ``at.tested``; their docstrings say
so. All have the network of the other rows; masks and embeddings come on top, and are counted in the
bytes of state.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import adaptivenet as an
from research.continual_data import Examples
from research.continual_methods import At, Elastic, Learner, Mesu, Net, portion

PyTree = Any
con, post, pruning = an.consolidation, an.posterior, an.pruning
life, own, hat = con.lifelong, con.ownership, con.hat


def asked(at: At) -> jax.Array:
    """The task whose network is wanted: the one that is tested, or else the one that is learnt."""
    return at.task if at.tested is None else at.tested


# --- prune, protect, regrow ---------------------------------------------------------------------


class Lifelong(Elastic):
    """Prune, protect, regrow: the least certain share is zeroed and freed after every task.

    The strength is on the scale of the rows of EWC (of a Fisher information that is averaged over
    examples): 1 is Bayes' rule where all tasks have as many examples. What is kept is held as by
    online EWC, so that the release is all that differs.
    """

    score: Any = staticmethod(pruning.snr)
    fraction = 0.05
    protect: Any = "soft"
    quantile = 0.0
    prior = 1.0
    by_leaf = False
    retrained = 0.0

    def optimizer(self) -> optax.GradientTransformation:
        """A wrapper around the optimizer."""
        return self.wrapped(self.plain(), self.strength / self.facts.examples)

    def wrapped(self, inner: optax.GradientTransformation, force: float) -> Any:
        """The rule around an optimizer, at a strength for summed precisions."""
        return life.lifelong(
            inner,
            force,
            fraction=self.fraction,
            protect=self.protect,
            learning_rate=self.facts.rate,
            quantile=self.quantile,
            score=self.score,
            prior_precision=self.prior,
            by_leaf=self.by_leaf,
        )

    def share(self, task: jax.Array) -> Any:
        """The share of the synapses that is free after a task."""
        del task
        return self.fraction

    def believed(self, net: Net, task: Examples, at: At) -> Any:
        """The Laplace approximation of the task on the diagonal."""
        mean = super().believed(net, task, at).precision
        return post.calibrate(net.params, mean, prior=self.prior, examples=self.facts.examples)

    def boundary(self, net: Net, task: Examples, at: At) -> Net:
        """Remembers, releases, and lands what was released."""
        free = an.counts.as_share(self.share(at.task), "fraction")

        def bounded(net: Net) -> Any:
            state = net.opt_state._replace(fraction=free)
            return con.consolidate(state, net.params, self.believed(net, task, at))

        if self.retrained:  # what will be released is worth nothing from now on
            gone = own.free(bounded(net).owner)
            net = relearnt(self, net, task, at, self.retrained, lambda p: emptied(p, gone))
        state = bounded(net)
        return net._replace(params=life.landed(state, net.params), opt_state=state)

    def capacity(self, net: Net) -> jax.Array:
        """The share of the synapses that a task owns."""
        return owned(life.state_of(net.opt_state).owner)


class LifelongSlow(Lifelong):
    """What is kept is pulled back, and its steps are divided by its precision besides.

    With precision h, steps shrink as 1 / (1 + slow strength h), h averaged over examples.
    """

    protect = "metaplastic"
    slow = 60.0

    def optimizer(self) -> optax.GradientTransformation:
        """The pull comes before the optimizer, the slowing behind it."""
        force = self.strength / self.facts.examples
        inner = optax.chain(con.elastic(force, prior=self.prior), self.plain())
        return self.wrapped(inner, self.slow * force)


class LifelongMagnitude(Lifelong):
    """A control: the smallest are released, whatever is believed of them."""

    score = staticmethod(pruning.magnitude)


class LifelongRandom(Lifelong):
    """A control: any are released."""

    score = staticmethod(pruning.random)


class LifelongIds(Lifelong):
    """Told at test which task it is: without the synapses that later tasks claimed.

    A share of the synapses that grows evenly from task to task is claimed, so that at the end none
    is free; after pruning it learns on for half of a pass, as PackNet does. What is claimed is held
    softly: a task does not see what later ones add, and may gain from what they improve.
    """

    periodic = False
    retrained = 0.5

    def share(self, task: jax.Array) -> Any:
        """None after the last task."""
        done = (task + 1).astype(jnp.float32) / self.facts.tasks
        return 1.0 - done

    def logits(self, net: Net, x: jax.Array, at: At) -> jax.Array:
        """Of what the task sees."""
        seen = viewed(net.params, life.state_of(net.opt_state), asked(at))
        return self.masked(seen, x, at.active)


class LifelongIdsMagnitude(LifelongIds):
    """A control: the smallest are released. Told at test which task it is."""

    score = staticmethod(pruning.magnitude)


class LifelongIdsRandom(LifelongIds):
    """A control: any are released. Told at test which task it is."""

    score = staticmethod(pruning.random)


def owned(owner: PyTree) -> jax.Array:
    """The share of the synapses that some task owns."""
    return portion([jnp.sum(o >= 0) for o in jax.tree.leaves(owner)], owner)


def viewed(params: PyTree, state: Any, task: jax.Array) -> PyTree:
    """The network of a task by owners; all of it while the task is learnt."""
    seen = own.view(params, state.owner, task)
    return jax.tree.map(lambda s, p: jnp.where(task < state.task, s, p), seen, params)


def emptied(params: PyTree, gone: PyTree) -> PyTree:
    """Zeros where something is gone."""
    return an.trees.merge_synapses(lambda g, p: jnp.where(g, 0.0, p), gone, params)


def relearnt(
    learner: Learner,
    net: Net,
    task: Examples,
    at: At,
    passes: float,
    kept: Callable[[PyTree], PyTree] = lambda params: params,
) -> Net:
    """Learns a task further, after it was pruned.

    Args:
      learner: takes the steps.
      net: to start from.
      task: its examples.
      at: where the learner is.
      passes: over the task.
      kept: what is done to the parameters before the first step and after every one.

    Returns:
      The network.
    """
    each = learner.facts.batch_size
    steps = max(int(passes * learner.facts.examples) // each, 1)

    def step(net: Net, key: jax.Array) -> tuple[Net, None]:
        rows = jax.random.randint(key, (each,), 0, learner.facts.examples)
        net = learner.step(net, task.inputs[rows], task.targets[rows], at._replace(key=key))
        return net._replace(params=kept(net.params)), None

    net = net._replace(params=kept(net.params))
    return jax.lax.scan(step, net, jax.random.split(at.key, steps))[0]


# --- the same with a variational belief ---------------------------------------------------------


class LifelongBayes(Mesu):
    """Prune, protect, regrow by the belief that training itself keeps (Bayesian gradient descent).

    Every example counts as often as the strength says (1 is Bayes' rule); means move as if once.
    They begin like those of the other rows, standard deviations at ``wide`` over the root of the
    fan-in, and what is released is as wide again. Nothing has to be measured at a boundary.
    """

    needs_strength = True
    told = True
    score: Any = staticmethod(pruning.snr)
    fraction = 0.1
    wide = 1.0

    def _scales(self) -> PyTree:
        fans = self.facts.sizes[:-1]
        parts = ("kernel", "bias") if self.facts.bias else ("kernel",)
        return {
            f"dense{n}": dict.fromkeys(parts, self.wide * fan**-0.5)
            for n, fan in enumerate(fans, 1)
        }

    def optimizer(self) -> optax.GradientTransformation:
        """The belief of the inner rule is all that is known: nothing is merged, or held besides."""
        inner = post.bgd(
            self._scales(),
            batch_size=self.strength * self.facts.batch_size,
            mean_rate=1.0 / self.strength,
        )
        return life.lifelong(
            inner,
            fraction=self.fraction,
            protect="none",
            score=self.score,
            prior_precision=1.0,
            decay=0.0,
        )

    def begin(self, key: jax.Array) -> Net:
        """A fresh network, with means like those of the other rows."""
        return Learner.begin(self, key)

    def widths(self, net: Net) -> PyTree:
        """Standard deviations; what has just been released is zero for certain."""
        state = net.opt_state
        gone = an.trees.map_synapses(
            lambda o, m: (o < 0) & (state.pending | ~m), state.owner, state.mask
        )
        return an.trees.merge_synapses(
            lambda g, s: jnp.where(g, jnp.zeros_like(s), s), gone, state.inner.scale
        )

    def share(self, task: jax.Array) -> Any:
        """The share of the synapses that is free after a task."""
        del task
        return self.fraction

    def capacity(self, net: Net) -> jax.Array:
        """The share of the synapses that a task owns."""
        return owned(net.opt_state.owner)

    def boundary(self, net: Net, task: Examples, at: At) -> Net:
        """Releases, and lands what was released."""
        del task
        free = an.counts.as_share(self.share(at.task), "fraction")
        belief = net.opt_state.inner.posterior(net.params)
        state = con.consolidate(net.opt_state._replace(fraction=free), net.params, belief)
        return net._replace(params=life.landed(state, net.params), opt_state=state)


# --- a network shared out: the tested task is told ----------------------------------------------


class PackNet(Learner):
    """PackNet: told at test which task it is, and then uses the weights of it and of earlier ones.

    The weights that are left are shared out evenly among the tasks that are left: every task owns
    as many of each layer. After pruning it learns on for half of a pass, as in the paper, which the
    other rows do not; every task has a new optimizer. Biases are those of the first task.
    """

    retrained = 0.5

    def optimizer(self) -> optax.GradientTransformation:
        """What is held lands behind the optimizer."""
        return optax.chain(self.plain(), con.packnet.packnet(1.0 - 1.0 / self.facts.tasks))

    def fraction(self, task: Any) -> Any:
        """The share of what a task trained that is left for later ones."""
        left = jnp.maximum(self.facts.tasks - jnp.asarray(task), 1)
        return 1.0 - 1.0 / left.astype(jnp.float32)

    def boundary(self, net: Net, task: Examples, at: At) -> Net:
        """Prunes, learns on, goes on to the next task."""
        _, state = net.opt_state
        free = an.counts.as_share(self.fraction(at.task), "fraction")
        state = con.consolidate(state._replace(fraction=free), net.params)
        net = net._replace(opt_state=(self.plain().init(net.params), state))
        net = relearnt(self, net, task, at, self.retrained)
        state = con.consolidate(net.opt_state[1], net.params)
        return net._replace(opt_state=(self.plain().init(net.params), state))

    def logits(self, net: Net, x: jax.Array, at: At) -> jax.Array:
        """Of what the task sees."""
        return self.masked(viewed(net.params, net.opt_state[1], asked(at)), x, at.active)

    def capacity(self, net: Net) -> jax.Array:
        """The share of the weights that a task owns."""
        return owned(net.opt_state[1].owner)


class PackNetTenth(PackNet):
    """PackNet where every task keeps a tenth of what is left (told at test which task it is).

    Early tasks own more than late ones, which see all that came before; the last has all the rest.
    """

    def fraction(self, task: Any) -> Any:
        """Nine tenths, but nothing after the last task."""
        return jnp.where(jnp.asarray(task) + 1 < self.facts.tasks, 0.9, 0.0)


class Piggyback(Learner):
    """Piggyback: told at test which task it is, and then uses its mask over one fixed network.

    The network is the one that the first task trained (the paper's is trained on ImageNet): the
    first task has all of it, and every other a mask.
    """

    def begin(self, key: jax.Array) -> Net:
        """A fresh network, with scores that let all of it pass, and room for masks."""
        net = super().begin(key)
        scores = con.piggyback.init(net.params)
        return Net(
            net.params,
            (net.opt_state, self.tx.init(scores)),
            (scores, own.snapshots(net.params, self.facts.tasks)),
        )

    def step(self, net: Net, x: jax.Array, y: jax.Array, at: At) -> Net:
        """One batch, for the network or for the scores."""

        def first(net: Net) -> Net:
            plain = Learner.step(self, net._replace(opt_state=net.opt_state[0]), x, y, at)
            return plain._replace(opt_state=(plain.opt_state, net.opt_state[1]))

        def later(net: Net) -> Net:
            scores, kept = net.memory

            def loss(scores: PyTree) -> jax.Array:
                return self.loss(con.piggyback.apply_mask(net.params, scores), x, y, at.active)

            updates, state = self.tx.update(jax.grad(loss)(scores), net.opt_state[1], scores)
            memory = (optax.apply_updates(scores, updates), kept)
            return net._replace(opt_state=(net.opt_state[0], state), memory=memory)

        return jax.lax.cond(at.task == 0, first, later, net)

    def boundary(self, net: Net, task: Examples, at: At) -> Net:
        """Keeps the mask; the next task begins with all of the network."""
        del task
        scores, kept = net.memory
        kept = kept.take(at.task, con.piggyback.masks(scores))
        scores = con.piggyback.init(net.params)
        state = (net.opt_state[0], self.tx.init(scores))
        return net._replace(opt_state=state, memory=(scores, kept))

    def logits(self, net: Net, x: jax.Array, at: At) -> jax.Array:
        """Of the masked network: by scores while the task is learnt, by its bits afterwards."""
        (scores, kept), task = net.memory, asked(at)
        now = con.piggyback.apply_mask(net.params, scores)
        seen = jax.tree.map(
            lambda s, n: jnp.where(kept.taken[task], s, n), kept.view(net.params, task), now
        )
        return self.masked(seen, x, at.active)


class Hat(Learner):
    """HAT: told at test which task it is, and then uses the units that it attends to.

    The strength weighs the regulariser. Parameters that join no unit to another (the last biases)
    are those of the first task: the paper has an output layer a task instead.
    """

    needs_strength = True
    largest = 400.0
    faster = 10.0
    """rate of the embeddings over that of the parameters"""

    @functools.cached_property
    def units(self) -> Any:
        """Hidden units: the outputs of a layer, and the inputs of the next."""
        sizes = self.facts.sizes
        shapes: dict[str, Any] = {
            f"dense{n}": {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[1])}
            for n, shape in enumerate(itertools.pairwise(sizes), 1)
        }
        parts = ("kernel", "bias") if self.facts.bias else ("kernel",)
        return hat.units_of(
            {
                one: [*((f"{one}/{part}", -1) for part in parts), (f"{two}/kernel", 0)]
                for one, two in itertools.pairwise(shapes)
            },
            shapes,
        )

    def optimizer(self) -> optax.GradientTransformation:
        """What is guarded is held behind the optimizer, which may have momentum."""
        return optax.chain(self.plain(), hat.hat_gradients(self.units))

    def quick(self) -> optax.GradientTransformation:
        """The optimizer of the embeddings."""
        return optax.chain(self.plain(), optax.scale(self.faster))

    def begin(self, key: jax.Array) -> Net:
        """A fresh network, embeddings of all tasks, and the number of the batch."""
        net = super().begin(key)
        tables = hat.init(jax.random.fold_in(key, 1), self.units, self.facts.tasks)
        state = (net.opt_state, self.quick().init(tables))
        return Net(net.params, state, (tables, jnp.int32(0)))

    def step(self, net: Net, x: jax.Array, y: jax.Array, at: At) -> Net:
        """One batch, for parameters and embeddings."""
        (state, quick), (tables, number) = net.opt_state, net.memory
        batches = max(self.facts.examples // self.facts.batch_size, 1)
        scale = hat.anneal(number % batches, batches, self.largest)
        before = hat.held(state)

        def loss(params: PyTree, tables: Any) -> jax.Array:
            now = hat.attention(tables, at.task, scale)
            data = self.loss(hat.gated(params, self.units, now), x, y, at.active)
            return data + self.strength * hat.regulariser(now, before)

        grads, slopes = jax.grad(loss, (0, 1))(net.params, tables)
        updates, state = self.tx.update(grads, state, net.params)
        joined = hat.factors(net.params, self.units, before)
        updates = jax.tree.map(
            lambda f, u: jnp.where(at.task == 0, u, 0.0) if an.trees.is_masked(f) else u,
            joined,
            updates,
            is_leaf=an.trees.is_masked,
        )
        slopes = hat.compensate(slopes, tables, scale, self.largest)
        moves, quick = self.quick().update(slopes, quick, tables)
        tables = hat.clip(optax.apply_updates(tables, moves))
        params = optax.apply_updates(net.params, updates)
        return Net(params, (state, quick), (tables, number + 1))

    def boundary(self, net: Net, task: Examples, at: At) -> Net:
        """Guards what the task attends to; the next one has new optimizers."""
        del task
        tables, number = net.memory
        now = hat.attention(tables, at.task, self.largest)
        state = con.consolidate(net.opt_state[0], net.params, attention=now)
        state = (self.plain().init(net.params), state[1])
        quick = self.quick().init(tables)
        return net._replace(opt_state=(state, quick), memory=(tables, jnp.zeros_like(number)))

    def logits(self, net: Net, x: jax.Array, at: At) -> jax.Array:
        """Of the units that the task attends to."""
        now = hat.attention(net.memory[0], asked(at), self.largest)
        return self.masked(hat.gated(net.params, self.units, now), x, at.active)

    def capacity(self, net: Net) -> jax.Array:
        """The share of the units that some task attends to."""
        held = jax.tree.leaves(hat.held(net.opt_state[0]))
        return portion([jnp.sum(a > 0.5) for a in held], held)


LIFELONG: dict[str, type[Learner]] = {
    "lifelong": Lifelong,
    "lifelong_slow": LifelongSlow,
    "lifelong_magnitude": LifelongMagnitude,
    "lifelong_random": LifelongRandom,
    "lifelong_ids": LifelongIds,
    "lifelong_ids_magnitude": LifelongIdsMagnitude,
    "lifelong_ids_random": LifelongIdsRandom,
    "lifelong_bayes": LifelongBayes,
    "packnet": PackNet,
    "packnet_tenth": PackNetTenth,
    "piggyback": Piggyback,
    "hat": Hat,
}
