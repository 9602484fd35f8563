"""Releasing synapses: zero, and as uncertain as the prior (the pure part of ``lifelong``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet import counts, selection, trees
from adaptivenet.consolidation.boundary import check_strength
from adaptivenet.counts import Share
from adaptivenet.moments import beside
from adaptivenet.posterior._arrays import known
from adaptivenet.posterior._states import cast, check_positive
from adaptivenet.posterior.gaussian import Posterior
from adaptivenet.pruning.saliency import snr
from adaptivenet.pruning.scores import Score, supply

PyTree = Any
Number = Any  # a Python number, or a traced scalar

__all__ = ["Released", "least", "narrow", "number", "release", "restarted"]


class Released(NamedTuple):
    """What :func:`release` gives back.

    Attributes:
      params: the parameters, zero where a synapse is free (or drawn anew).
      posterior: the belief, the prior where a synapse is free.
      freed: pytree of bool, the synapses that are free now, those that were so before included;
        masked nodes for leaves that are not synapses.
    """

    params: PyTree
    posterior: Posterior
    freed: PyTree


def release(
    params: PyTree,
    posterior: Any,
    fraction: Any,
    *,
    score: Score = snr,
    prior_precision: Number = 1.0,
    select: trees.Select = None,
    asleep: PyTree | None = None,
    by_leaf: bool = False,
    restart: Number = 0.0,
    key: jax.Array | None = None,
    **signals: Any,
) -> Released:
    """Sets the synapses that are worth least free: zero, and as uncertain as the prior.

    Args:
      params: pytree of arrays.
      posterior: a belief that has at least the synapses.
      fraction: share of the synapses that is free afterwards, in [0, 1), rounded to whole synapses.
        Those that were free before count (and stay free, should they be more).
      score: what a synapse is worth, a score of :mod:`adaptivenet.pruning`.
      prior_precision: precision that free synapses return to; their mean is 0.
      select: as for :func:`adaptivenet.trees.select_leaves`.
      asleep: pytree of bool, synapses that were free all the time; they go first.
      by_leaf: the same share of every leaf, instead of one contest of all.
      restart: spread of new values for free synapses, as :func:`restarted` draws them; 0 for zeros.
      key: random key, for a restart and for scores that ask for one.
      **signals: whatever else the score asks for.

    Returns:
      Parameters, belief, and what is free.

    Raises:
      ValueError: a number is out of range; the belief says nothing of a synapse; a signal or the
        key is missing.

    >>> params = {"w": jnp.array([[1.0, 2.0, -3.0]])}
    >>> belief = Posterior(params, {"w": jnp.array([[100.0, 4.0, 9.0]])})  # SNR 10, 4, 9
    >>> found = release(params, belief, 0.34, prior_precision=0.5)
    >>> found.params["w"].tolist(), found.posterior.precision["w"].tolist()
    ([[1.0, 0.0, -3.0]], [[100.0, 0.5, 9.0]])
    """
    check_positive("prior_precision", prior_precision)
    kept = trees.synapses(params, select)
    if key is None and not (known(restart) and np.all(np.asarray(restart) == 0)):
        raise ValueError("restart= draws new values: release() needs a random key=.")
    belief = Posterior(posterior.mean, posterior.precision)
    told = dict(signals)
    if key is not None:
        told["key"] = jax.random.fold_in(key, 0)
    share = counts.as_share(fraction, "fraction")
    freed = least(kept, belief, share, score, told, asleep=asleep, by_leaf=by_leaf)
    zero = trees.merge_synapses(lambda f, p: jnp.where(f, jnp.zeros_like(p), p), freed, params)
    if key is not None:
        zero = restarted(jax.random.fold_in(key, 1), zero, freed, restart)
    back = Posterior(
        trees.merge_synapses(lambda f, m: jnp.where(f, jnp.zeros_like(m), m), freed, belief.mean),
        trees.merge_synapses(
            lambda f, s: jnp.where(f, cast(prior_precision, s), s), freed, belief.precision
        ),
    )
    return Released(zero, back, freed)


def restarted(key: jax.Array, params: PyTree, freed: PyTree, spread: Number) -> PyTree:
    """Draws free synapses anew: normal of mean 0 and deviation ``spread / sqrt(fan-in)``.

    A unit whose synapses are all zero, on both sides, has no gradient: it would stay unused. The
    fan-in of a leaf is the product of all its axes but the last.

    Args:
      key: random key.
      params: pytree of arrays.
      freed: pytree of bool, what is to be drawn.
      spread: a number >= 0, possibly traced; 1 is the usual start of a network.

    Returns:
      The parameters, with the draws.

    >>> drawn = restarted(jax.random.key(0), {"w": jnp.zeros((4, 999))},
    ...                   {"w": jnp.ones((4, 999), bool)}, 1.0)
    >>> round(drawn["w"].std().item(), 1)
    0.5
    """
    check_strength("restart", spread)
    places = iter(range(len(jax.tree.leaves(freed))))

    def draw(mask: jax.Array, param: jax.Array) -> jax.Array:
        now = jax.random.fold_in(key, next(places))
        fan_in = max(math.prod(param.shape[:-1]), 1)
        scale = jnp.asarray(spread).astype(jnp.float32) * fan_in**-0.5
        values = scale * jax.random.normal(now, param.shape, jnp.float32)
        return jnp.where(mask, values.astype(param.dtype), param)

    return trees.merge_synapses(draw, freed, params)


def least(
    kept: PyTree,
    belief: Posterior,
    share: Share,
    score: Score,
    signals: Mapping[str, Any],
    *,
    asleep: PyTree | None = None,
    by_leaf: bool = False,
) -> PyTree:
    """Which synapses to free: those that are asleep, and of the others those worth least.

    Args:
      kept: the parameters, synapses only.
      belief: of at least these.
      share: of the synapses that is free afterwards.
      score: what a synapse is worth.
      signals: what it may ask for.
      asleep: pytree of bool, or None.
      by_leaf: the same share of every leaf.

    Returns:
      Pytree of bool.
    """
    _check_believed(kept, belief)
    told = {name: narrow(kept, value) for name, value in signals.items()}
    told["posterior"] = Posterior(narrow(kept, belief.mean), narrow(kept, belief.precision))
    scores = narrow(kept, supply(score, kept, told))

    def lowest(scores: PyTree, awake: PyTree) -> PyTree:
        total = counts.as_count(trees.size(awake))
        best = selection.top_mask(scores, total - counts.part(share, total), where=awake)
        return jax.tree.map(lambda b, a: ~(b & a), best, awake)

    if asleep is None:
        awake = jax.tree.map(lambda leaf: jnp.ones_like(leaf, dtype=bool), kept)
    else:
        awake = trees.map_synapses(lambda _, a: ~a, kept, asleep)
    if by_leaf:
        return trees.map_synapses(lambda a, s: lowest(s, a), awake, scores)
    return lowest(scores, awake)


def number(mask: PyTree) -> counts.Count:
    """How many are True, exactly."""
    total = counts.as_count(0)
    for leaf in jax.tree.leaves(mask):
        total = total + counts.as_count(jnp.sum(leaf, dtype=jnp.uint32))
    return total


def narrow(like: PyTree, value: Any) -> Any:
    """Of a tree shaped like the parameters, the leaves that are synapses; others as they are."""
    parts = beside(like, value)
    if parts is None or not jax.tree.leaves(like):
        return value
    marks, treedef = jax.tree.flatten(like, is_leaf=trees.is_masked)
    pairs = zip(marks, parts, strict=True)
    return treedef.unflatten([m if trees.is_masked(m) else part for m, part in pairs])


def _check_believed(kept: PyTree, posterior: Posterior) -> None:
    """Refuses a belief that lacks a synapse."""
    names = iter(trees.paths(kept))

    def look(leaf: jax.Array, mean: Any, precision: Any) -> None:
        name = next(names)
        if trees.is_masked(mean) or trees.is_masked(precision):
            raise ValueError(
                f"the belief says nothing of {name!r}, whose synapses are to be released by it: "
                "widen the belief, or leave the leaf out with select=."
            )
        if jnp.shape(precision) != jnp.shape(leaf):
            raise ValueError(
                f"the belief of {name!r} has shape {jnp.shape(precision)} where the parameters "
                f"have {jnp.shape(leaf)}."
            )

    trees.map_synapses(look, kept, posterior.mean, posterior.precision)
