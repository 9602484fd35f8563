"""Lottery tickets: iterative magnitude pruning with rewinding, and linear mode connectivity.

Pure functions between the rounds of a loop that trains, prunes and goes back::

    mask = an.pruning.full_mask(params)
    for _ in range(rounds_to(0.95, rate=0.2)):
        params = train(rewind(params, early, mask), mask)  # to the end, pruned synapses held at 0
        mask = imp_round(params, mask, rate=0.2)
    ticket = rewind(params, early, mask)

A round begins with a *new* optimizer state, ``opt_state = tx.init(rewound)``: moments, and the step
of a learning-rate schedule, belong to the run that was left (a schedule that goes on from the
rewinding step k is one that is shifted by k). To hold pruned synapses at zero while training, let
the chain end in ``prune(0.0, every=None)`` and give its state the mask with :func:`with_mask`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet import trees
from adaptivenet.counts import as_share
from adaptivenet.pruning import event, masks, transformation
from adaptivenet.pruning.allocations import Allocation, Global
from adaptivenet.pruning.demands import OfAlive
from adaptivenet.pruning.schedules import Number, known
from adaptivenet.pruning.scores import Score, magnitude
from adaptivenet.pruning.structures import Element, Structure

PyTree = Any

__all__ = ["Barrier", "barrier", "imp_round", "interpolate", "rewind", "rounds_to", "with_mask"]


def rewind(params: PyTree, early: PyTree, mask: PyTree, *, rest: bool = True) -> PyTree:
    """Goes back to early weights where a synapse is alive; exact zeros elsewhere.

    Args:
      params: pytree of arrays, the trained parameters.
      early: pytree of the same structure: the parameters at initialization, or after the k first
        steps.
      mask: pytree of bool; masked nodes for leaves that are not synapses.
      rest: rewind the other leaves (biases, norms) as well, as the authors do; False keeps those
        of ``params``.

    Returns:
      Parameters like ``params`` (shapes and dtypes).

    Raises:
      ValueError: the trees or the shapes of their leaves differ; the message names the leaf.

    References:
      Frankle and Carbin, "The lottery ticket hypothesis", ICLR 2019 (k = 0); Frankle et al.,
      "Linear mode connectivity and the lottery ticket hypothesis", ICML 2020 (k > 0).

    >>> trained = {"w": jnp.array([[5.0, 6.0]]), "b": jnp.array([7.0])}
    >>> start = {"w": jnp.array([[1.0, 2.0]]), "b": jnp.array([0.0])}
    >>> mask = masks.full_mask(trained) | {"w": jnp.array([[True, False]])}
    >>> back = rewind(trained, start, mask)
    >>> back["w"].tolist(), back["b"].tolist()
    ([[1.0, 0.0]], [0.0])
    """
    _check_alike(params, early, "early")
    early = jax.tree.map(lambda p, e: jnp.asarray(e).astype(jnp.asarray(p).dtype), params, early)
    if not rest:
        early = trees.merge_synapses(lambda m, p, e: e, mask, params, early)
    return masks.apply_mask(early, mask)


def imp_round(
    params: PyTree,
    mask: PyTree,
    rate: Number,
    *,
    score: Score = magnitude,
    allocation: Allocation = Global(),  # noqa: B008 (a constant)
    structure: Structure = Element(),  # noqa: B008 (a constant)
    key: jax.Array | None = None,
    **signals: Any,
) -> PyTree:
    """The mask of the next round: cuts a share of the synapses that are alive.

    Args:
      params: pytree of arrays, trained under ``mask``.
      mask: the mask so far.
      rate: share of the living synapses to cut (of the tree, or of each leaf, as the allocation
        says), in [0, 1); possibly traced.
      score: what a synapse is worth.
      allocation: how the cut is shared out among leaves.
      structure: what is cut as one.
      key: random key, for scores that draw.
      **signals: what the score asks for by name.

    Returns:
      The next mask: a part of the last, exactly ``round(rate * alive)`` synapses smaller.

    Raises:
      ValueError: the rate is outside [0, 1), a signal is missing, or the mask belongs to another
        tree.

    References:
      Frankle and Carbin, "The lottery ticket hypothesis", ICLR 2019 (rate 0.2 a round).

    >>> params = {"w": jnp.array([[1.0, -4.0, 2.0, 3.0]])}
    >>> first = imp_round(params, masks.full_mask(params), 0.5)
    >>> first["w"].tolist(), imp_round(params, first, 0.5)["w"].tolist()
    ([[False, True, False, True]], [[False, True, False, False]])
    """
    if known(rate) and not np.all((np.asarray(rate) >= 0) & (np.asarray(rate) < 1)):
        raise ValueError(f"rate must be a share of the living in [0, 1), not {rate}.")
    living = trees.map_synapses(lambda m, p: jnp.where(m, p, jnp.zeros_like(p)), mask, params)
    outcome = event.cut_and_wake(
        living,
        mask,
        OfAlive(as_share(rate, "rate")),
        score=score,
        structure=structure,
        allocation=allocation,
        regrow=None,
        may_grow=False,
        key=jax.random.key(0) if key is None else key,
        signals=signals,
    )
    return outcome.mask


def rounds_to(sparsity: float, rate: float) -> int:
    """How many rounds of :func:`imp_round` reach a sparsity.

    Args:
      sparsity: the target, in [0, 1).
      rate: share of the living cut in a round, in (0, 1).

    Returns:
      The least n with ``1 - (1 - rate) ** n >= sparsity`` (up to the rounding of the arguments).

    Raises:
      ValueError: an argument is out of range.

    >>> rounds_to(0.488, 0.2), rounds_to(0.95, 0.2), rounds_to(0.0, 0.2)
    (3, 14, 0)
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), not {sparsity}.")
    if not 0 < rate < 1:
        raise ValueError(f"rate must be in (0, 1), not {rate}.")
    rounds = math.log1p(-sparsity) / math.log1p(-rate)
    nearest = round(rounds)
    # 0.488 and 0.2 have no exact binary form: three rounds are meant, not four.
    return nearest if abs(rounds - nearest) <= 1e-9 * max(rounds, 1.0) else math.ceil(rounds)


def with_mask(opt_state: PyTree, mask: PyTree) -> PyTree:
    """Puts a mask into an optimizer state: what is False there is held at zero from now on.

    Args:
      opt_state: state of a chain that holds one :func:`adaptivenet.pruning.prune`. Built as
        ``prune(0.0, every=None)`` it never changes the mask by itself.
      mask: pytree of bool with the structure of the state's own.

    Returns:
      The state with the mask in it; the record stays that of the last event.

    Raises:
      ValueError: there is no pruning state, or more than one, or the mask belongs to another tree.

    >>> import optax
    >>> tx = optax.chain(optax.sgd(1.0), transformation.prune(0.0, every=None))
    >>> params = {"w": jnp.array([[1.0, 0.0]])}
    >>> state = with_mask(tx.init(params), {"w": jnp.array([[True, False]])})
    >>> updates, state = tx.update({"w": jnp.ones((1, 2))}, state, params)
    >>> optax.apply_updates(params, updates)["w"].tolist()
    [[0.0, 0.0]]
    """
    own = transformation.mask(opt_state)
    trees.map_synapses(lambda old, new: None, own, mask)
    _check_alike(own, mask, "mask")

    def is_state(node: Any) -> bool:
        return isinstance(node, transformation.PruneState)

    return jax.tree.map(
        lambda node: node._replace(mask=mask) if is_state(node) else node,
        opt_state,
        is_leaf=is_state,
    )


def interpolate(a: PyTree, b: PyTree, alpha: Number) -> PyTree:
    """The point ``(1 - alpha) * a + alpha * b`` on the line between two parameter pytrees.

    Args:
      a: pytree of arrays, the point at 0.
      b: the point at 1, of the same structure and shapes.
      alpha: position on the line, a scalar; possibly traced.

    Returns:
      Parameters with the dtypes of ``a``, computed in float32. The ends are exact, and what is zero
      at both ends is zero between them. Leaves that are not floating are those of ``a``.

    Raises:
      ValueError: the trees or the shapes of their leaves differ.

    >>> interpolate({"w": jnp.array([0.0, 4.0])}, {"w": jnp.array([2.0, 0.0])}, 0.25)["w"].tolist()
    [0.5, 3.0]
    """
    _check_alike(a, b, "b")

    def between(x: Any, y: Any) -> jax.Array:
        x, y = jnp.asarray(x), jnp.asarray(y)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
        share = jnp.asarray(alpha).astype(wide)
        return ((1 - share) * x.astype(wide) + share * y.astype(wide)).astype(x.dtype)

    return jax.tree.map(between, a, b)


class Barrier(NamedTuple):
    """What :func:`barrier` found.

    Attributes:
      height: scalar, the largest excess of the loss over its reference; about 0 where two networks
        are linearly connected.
      alphas: float32 ``[points]``, positions on the line from 0 to 1.
      losses: ``[points]``, the loss there.
    """

    height: jax.Array
    alphas: jax.Array
    losses: jax.Array


def barrier(
    loss: Callable[[PyTree], Any],
    a: PyTree,
    b: PyTree,
    points: int = 11,
    *,
    reference: Literal["line", "mean"] = "line",
    batch_size: int | None = None,
) -> Barrier:
    """The barrier of a loss on the straight line between two networks.

    Args:
      loss: function of the parameters alone: a loss, or an error rate (the authors' choice).
      a: pytree of parameters, one end.
      b: the other end.
      points: positions evaluated, both ends included, >= 2.
      reference: what the loss is compared with: "line", the straight line between the losses of
        the ends, or "mean", the mean of both, whose barrier is at least half their difference.
      batch_size: positions evaluated at a time, to bound the memory; None for all.

    Returns:
      The height and the losses that it was found in. The height is never negative.

    Raises:
      ValueError: fewer than two points, an unknown reference, or trees that differ.

    References:
      Frankle et al., "Linear mode connectivity and the lottery ticket hypothesis", ICML 2020,
      section 2 ("mean"); Entezari et al., "The role of permutation invariance in linear mode
      connectivity of neural networks", ICLR 2022 ("line").

    >>> double_well = lambda p: jnp.square(jnp.square(p["w"]) - 1.0)
    >>> found = barrier(double_well, {"w": jnp.float32(-1.0)}, {"w": jnp.float32(1.0)})
    >>> found.height.item(), found.losses[0].item()
    (1.0, 0.0)
    """
    if points < 2:
        raise ValueError(f"points must be at least 2, not {points}.")
    if reference not in ("line", "mean"):
        raise ValueError(f"reference={reference!r}; choose 'line' or 'mean'.")
    alphas = jnp.linspace(0.0, 1.0, points, dtype=jnp.float32)

    def at(alpha: jax.Array) -> jax.Array:
        return jnp.asarray(loss(interpolate(a, b, alpha)))

    losses = (
        jax.vmap(at)(alphas)
        if batch_size is None
        else jax.lax.map(at, alphas, batch_size=batch_size)
    )
    first, last = losses[0], losses[-1]
    share = alphas.astype(losses.dtype)
    level = (1 - share) * first + share * last if reference == "line" else (first + last) / 2
    return Barrier(jnp.max(losses - level), alphas, losses)


def _check_alike(a: PyTree, b: PyTree, what: str) -> None:
    """Refuses a tree of another structure, or with leaves of other shapes."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        raise ValueError(
            f"{what} is another tree: its leaves are {', '.join(trees.paths(b)) or '(none)'}, "
            f"not {', '.join(trees.paths(a))}."
        )
    for name, x, y in zip(trees.paths(a), jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.shape(x) != jnp.shape(y):
            raise ValueError(
                f"leaf {name!r} of {what} has shape {jnp.shape(y)}, not {jnp.shape(x)}."
            )
