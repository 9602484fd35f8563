"""Regrowth: which dead synapses wake at an event.

A rule has a ``fraction``, the share of the kept synapses that gives way to woken ones at every
event (never more than there are others to wake: while all live, none gives way), and a
``priority``, a score of the dead. Woken synapses start from zero. A schedule that
steps back wakes by the same priority. A rule whose ``redistribute`` is True lets the woken synapses
of all leaves compete, so that capacity moves between layers.

A priority is called like a score; beside a score's signals it may ask for ``kept``, the mask after
the cut. Trees hold the synapses only, so biases, norms and other leaves never reach a rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet import trees
from adaptivenet.pruning import scores
from adaptivenet.pruning.schedules import Number, known

PyTree = Any
Fraction = Number | Callable[[Any], Any]

__all__ = [
    "AtRandom",
    "ByGradient",
    "ByMomentum",
    "Everything",
    "Homeostatic",
    "Regrowth",
    "at_random",
    "by_gradient",
    "by_momentum",
    "cosine_fraction",
    "everything",
    "homeostatic",
]


class Regrowth(Protocol):
    """Chooses the synapses to wake."""

    @property
    def fraction(self) -> Fraction:
        """Share of the kept synapses that gives way at every event, or a function of the step."""
        ...

    def priority(self, params: PyTree, **signals: Any) -> PyTree:
        """Scores of the dead; the largest wake first."""
        ...

    # A rule that redistributes may have ``shares`` as well, called like ``priority``: a pytree with
    # a number for each leaf, in proportion to which the woken are shared out among the leaves.


@dataclass(frozen=True)
class Everything:
    """Wakes all that is dead: see :func:`everything`."""

    fraction: Number = 0.0

    def priority(self, params: PyTree, **signals: Any) -> PyTree:
        """Not asked for: everything wakes."""
        return scores.magnitude(params, **signals)


@dataclass(frozen=True)
class AtRandom:
    """Wakes at random: see :func:`at_random`."""

    fraction: Fraction = 0.0
    redistribute: bool = False

    def priority(self, params: PyTree, *, key: jax.Array, **signals: Any) -> PyTree:
        """Uniform random numbers."""
        return scores.random(params, key=key, **signals)


@dataclass(frozen=True)
class ByGradient:
    """Wakes where the gradient is largest: see :func:`by_gradient`."""

    fraction: Fraction = 0.3
    redistribute: bool = False

    def priority(self, params: PyTree, *, grads: PyTree, **signals: Any) -> PyTree:
        """The absolute value of the gradient."""
        del params, signals
        return jax.tree.map(jnp.abs, grads)


@dataclass(frozen=True)
class ByMomentum:
    """Wakes where the running mean of the gradient is largest: see :func:`by_momentum`."""

    fraction: Fraction = 0.3
    redistribute: bool = True

    def priority(self, params: PyTree, *, momentum: PyTree, **signals: Any) -> PyTree:
        """The absolute momentum."""
        del params, signals
        return jax.tree.map(jnp.abs, momentum)

    def shares(self, params: PyTree, *, momentum: PyTree, mask: PyTree, **signals: Any) -> PyTree:
        """The mean absolute momentum of each leaf's living synapses, before the cut."""
        del params, signals

        def mean(momentum: jax.Array, living: jax.Array) -> jax.Array:
            size = jnp.sum(jnp.abs(momentum).astype(jnp.float32), where=living)
            number = jnp.sum(living, dtype=jnp.uint32).astype(jnp.float32)
            return size / jnp.maximum(number, 1.0)

        return jax.tree.map(mean, momentum, mask)


@dataclass(frozen=True)
class Homeostatic:
    """Wakes at the units that lack most: see :func:`homeostatic`."""

    fraction: Fraction = 0.3
    fan_in: Number | Literal["mean"] | None = None
    fan_out: Number | Literal["mean"] | None = None
    activity: Number | None = None
    redistribute: bool = False

    def priority(
        self,
        params: PyTree,
        *,
        mask: PyTree,
        key: jax.Array,
        kept: PyTree | None = None,
        activity: PyTree | None = None,
        **signals: Any,
    ) -> PyTree:
        """What a synapse would make up for, after those of its units that come before it."""
        del signals
        if self.activity is not None and activity is None:
            raise ValueError(
                "homeostatic(activity=...) asks for the signal 'activity', which nobody supplies: "
                "pass activity=, the mean activity [outputs] of the units of each leaf, to update "
                "or revise."
            )
        each, treedef = jax.tree.flatten(mask)
        keys = jax.tree.unflatten(treedef, list(jax.random.split(key, len(each))))
        rates = (mask,) if self.activity is None else (mask, activity)
        return trees.map_synapses(self._leaf, mask if kept is None else kept, keys, *rates)

    def _leaf(
        self, kept: jax.Array, key: jax.Array, mask: jax.Array, rates: jax.Array | None = None
    ) -> jax.Array:
        links, before = (leaf.reshape(-1, leaf.shape[-1]) for leaf in (kept, mask))
        noise_key, *queue_keys = jax.random.split(key, 3)
        total = jax.random.uniform(noise_key, links.shape, jnp.float32) * 2.0**-16  # ties at random
        for axis, target in ((0, self.fan_in), (1, self.fan_out)):
            if target is None:
                continue
            if isinstance(target, str):
                degrees = jnp.sum(before, axis=axis, dtype=jnp.int32).astype(jnp.float32)
                goal = jnp.mean(degrees)
            else:
                goal = jnp.asarray(target).astype(jnp.float32)
            living = jnp.sum(links, axis=axis, keepdims=True, dtype=jnp.int32).astype(jnp.float32)
            queue = _queue(links, queue_keys[axis], axis)
            lack = (goal - living - queue) / jnp.maximum(goal, 1.0)
            total = total + jnp.clip(lack, 0.0, 1.0)
        if rates is not None:
            goal = jnp.asarray(self.activity).astype(jnp.float32)
            if rates.shape != links.shape[1:]:
                raise ValueError(
                    f"activity= has a leaf of shape {rates.shape} for synapses of shape "
                    f"{mask.shape}; give one number an output, {links.shape[1:]}."
                )
            lack = jnp.clip((goal - rates.astype(jnp.float32)) / goal, 0.0, 1.0)
            # What a synapse will do to the activity is not known: shares by the odd numbers.
            total = total + lack[None, :] / (2.0 * _queue(links, queue_keys[0], 0) + 1.0)
        return total.reshape(kept.shape)


def _queue(links: jax.Array, key: jax.Array, axis: int) -> jax.Array:
    """For each dead synapse, how many dead ones of its unit come before it, in random order.

    The units pass through one shuffled order, each from a random place on and round: any set of
    synapses is then as likely to come first as any other, and only that one order is sorted.
    """
    of_order, of_start = jax.random.split(key)
    places, units = links.shape[axis], links.shape[1 - axis]
    order = jax.random.permutation(of_order, places)
    dead = jnp.moveaxis(~links, axis, 0)[order].astype(jnp.int32)
    upto = jnp.cumsum(dead, axis=0)
    before = upto - dead
    start = jax.random.randint(of_start, (1, units), 0, places)
    queue = before - jnp.take_along_axis(before, start, axis=0)
    queue = jnp.where(queue < 0, queue + upto[-1], queue)
    return jnp.moveaxis(queue[jnp.argsort(order)], 0, axis).astype(jnp.float32)


@dataclass(frozen=True)
class Cosine:
    """A fraction that falls along half a cosine: see :func:`cosine_fraction`."""

    initial: Number
    end: Number

    def __call__(self, step: Any) -> jax.Array:
        """The fraction at a step."""
        end = jnp.maximum(jnp.asarray(self.end).astype(jnp.float32), 1.0)
        done = jnp.clip(jnp.asarray(step).astype(jnp.float32) / end, 0.0, 1.0)
        half = jnp.asarray(self.initial).astype(jnp.float32) * 0.5
        return jnp.where(done >= 1.0, 0.0, half * (1.0 + jnp.cos(done * math.pi)))


def cosine_fraction(initial: Number, end: Number) -> Cosine:
    """A fraction that falls along half a cosine to zero: regrowth that comes to rest.

    ``f(t) = initial / 2 * (1 + cos(pi t / end))``, and 0 from ``end`` on.

    Args:
      initial: the fraction at step 0, in [0, 1).
      end: the step from which nothing is woken any more, >= 1.

    Returns:
      A function of the step, for the ``fraction`` of any rule.

    Raises:
      ValueError: a number out of range.

    References:
      Evci et al., "Rigging the lottery", ICML 2020, section 3 (update schedule), after Dettmers and
      Zettlemoyer, arXiv:1907.04840.

    >>> [round(cosine_fraction(0.4, 100)(step).item(), 3) for step in (0, 50, 100, 200)]
    [0.4, 0.2, 0.0, 0.0]
    """
    check_fraction(initial, "initial")
    if known(end) and not np.all(np.asarray(end) >= 1):
        raise ValueError(f"end must be a step >= 1, not {end}.")
    return Cosine(initial, end)


def everything() -> Everything:
    """Wakes every synapse right after it was cut, at zero: an event forgets, and nothing is lost.

    The founding design note's rule is ``prune(threshold(0.05), regrow=everything(), ...)``: weights
    below the threshold are set to zero and go on learning. The mask is then all True, and sparsity
    is what the last event left at zero.

    Returns:
      The rule.

    >>> everything().fraction
    0.0
    """
    return Everything()


def at_random(fraction: Fraction = 0.0, *, redistribute: bool = False) -> AtRandom:
    """Wakes dead synapses at random (SET).

    Args:
      fraction: share of the kept synapses, the lowest scored, that give way to woken ones at every
        event (never more than there are others to wake), in [0, 1), or a function of the step such
        as :func:`cosine_fraction`. The total kept is what the schedule asks for.
      redistribute: let the dead of all leaves compete, whatever the allocation.

    Returns:
      The rule.

    Raises:
      ValueError: the fraction is outside [0, 1).

    References:
      Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
      connectivity inspired by network science", Nature Communications 9 (2018): SET.

    >>> at_random(0.3).fraction
    0.3
    """
    check_fraction(fraction)
    return AtRandom(fraction, redistribute)


def by_gradient(fraction: Fraction = 0.3, *, redistribute: bool = False) -> ByGradient:
    """Wakes the dead synapses at which the loss is steepest (RigL).

    Asks for the signal ``grads``: wrap the chain in ``with_signals(...)``, or pass ``grads=`` to
    ``update`` or ``revise``. Pruned parameters are exact zeros in a dense forward pass, so their
    gradients are the true derivatives that RigL asks for.

    Args:
      fraction: as for :func:`at_random`.
      redistribute: let the dead of all leaves compete, whatever the allocation; by default leaves
        that do not share a count keep theirs, as in RigL.

    Returns:
      The rule.

    Raises:
      ValueError: the fraction is outside [0, 1).

    References:
      Evci et al., "Rigging the lottery: making all tickets winners", ICML 2020, section 3.

    >>> by_gradient(0.2).priority({"w": 0.0}, grads={"w": jnp.float32(-3.0)})["w"].item()
    3.0
    """
    check_fraction(fraction)
    return ByGradient(fraction, redistribute)


def by_momentum(fraction: Fraction = 0.3, *, redistribute: bool = True) -> ByMomentum:
    """Wakes the dead synapses of the largest momentum, and moves capacity between leaves (SNFS).

    Asks for the signal ``momentum``: ``with_signals(chain, momentum=signals.momentum(0.9))``. With
    ``redistribute``, woken synapses are shared out among all leaves in proportion to the mean
    absolute momentum of each leaf's living synapses before the cut; within a leaf, the dead of
    the largest absolute momentum wake.

    Args:
      fraction: as for :func:`at_random`.
      redistribute: share out among all leaves; otherwise leaves that do not share a count keep
        theirs, and the largest momentum wins within those that do.

    Returns:
      The rule.

    Raises:
      ValueError: the fraction is outside [0, 1).

    References:
      Dettmers and Zettlemoyer, "Sparse networks from scratch: faster training without losing
      performance", arXiv:1907.04840, section 3.2: SNFS.

    >>> by_momentum(0.5).redistribute
    True
    """
    check_fraction(fraction)
    return ByMomentum(fraction, redistribute)


def homeostatic(
    fraction: Fraction = 0.3,
    *,
    fan_in: Number | Literal["mean"] | None = None,
    fan_out: Number | Literal["mean"] | None = None,
    activity: Number | None = None,
    redistribute: bool = False,
) -> Homeostatic:
    """Wakes synapses at the units that are furthest below their target.

    A unit that lacks inputs gets as many as it lacks, largest lack first; a unit that is less
    active than its target gets a share of the woken synapses in proportion to what it lacks. Lacks
    are relative to the target; those of several targets add up. What is left is woken at random.

    Args:
      fraction: as for :func:`at_random`.
      fan_in: living synapses that an output (the last axis) should have, > 0; or "mean": the mean
        over the leaf's outputs before the cut.
      fan_out: living synapses that an input (all other axes) should have, likewise.
      activity: activity that an output should have, > 0, in the unit of the signal ``activity``: a
        pytree like the parameters with ``[outputs]`` for each leaf of synapses (a mean firing rate,
        or the share of inputs to which it responds).
      redistribute: let the dead of all leaves compete, whatever the allocation.

    Returns:
      The rule.

    Raises:
      ValueError: no target, one that is not positive, or a fraction outside [0, 1); at the event:
        the signal is missing or of another shape.

    References:
      Butz and van Ooyen, "A simple rule for dendritic spine and axonal bouton formation can account
      for cortical reorganization after focal retinal lesions", PLoS Computational Biology 9 (2013).

    >>> homeostatic(0.2, fan_in=16).fan_in
    16
    """
    check_fraction(fraction)
    targets = {"fan_in": fan_in, "fan_out": fan_out, "activity": activity}
    if all(target is None for target in targets.values()):
        raise ValueError("homeostatic() needs a target: fan_in=, fan_out= or activity=.")
    for name, target in targets.items():
        if target is None or not known(target) or (target == "mean" and name != "activity"):
            continue
        if isinstance(target, str) or not np.all(np.asarray(target) > 0):
            raise ValueError(f"{name} must be positive, not {target!r}.")
    return Homeostatic(fraction, fan_in, fan_out, activity, redistribute)


def check_fraction(fraction: Fraction, name: str = "fraction") -> None:
    """Refuses a fraction outside [0, 1), where its value is known."""
    if callable(fraction) or not known(fraction):
        return
    if not np.all((np.asarray(fraction) >= 0) & (np.asarray(fraction) < 1)):
        raise ValueError(f"{name} must be in [0, 1), not {fraction}.")
