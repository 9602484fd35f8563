"""Which synapses are used when memories are replayed, and the pruning of those that are not.

What is replayed in sleep runs through the network again; a synapse that carries none of it has no
part in what is remembered::

    use = reactivations(apply, params, draw, key, batches=50)
    params, mask = prune_unused(params, use, fraction=0.2)

:func:`reactivation` is the score of one batch, and serves
:func:`adaptivenet.pruning.prune` as well, by ``score=an.pruning.fixed(use)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet import trees
from adaptivenet.counts import as_share
from adaptivenet.posterior._arrays import known
from adaptivenet.posterior.capture import trace
from adaptivenet.pruning import demands, event, initial, masks
from adaptivenet.pruning.allocations import Allocation, Global
from adaptivenet.pruning.structures import Element, Structure

PyTree = Any
Number = Any  # a Python number, or a traced scalar
Kind = Literal["flow", "coactivation", "contribution"]

__all__ = ["prune_unused", "pruning_of_unused", "reactivation", "reactivations"]


def reactivation(
    apply: Callable[..., jax.Array],
    params: PyTree,
    inputs: PyTree,
    *,
    kind: Kind = "coactivation",
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    weights: jax.Array | None = None,
    select: trees.Select = None,
) -> PyTree:
    """How much each synapse is used by a batch: a mean over its examples.

    With the input x of a synapse w, the drive h of its unit and the network's output o:

    - ``"flow"``: ``|x w|``, what the synapse carries;
    - ``"coactivation"``: ``|x w a(h)|``, what it carries to units that are active;
    - ``"contribution"``: ``|x w d|`` with ``d = d(|o|^2 / 2) / dh``: how far the size of the output
      depends on it, to first order.

    A kernel that an example uses at several positions (a convolution) adds them up.

    Args:
      apply: ``apply(params, inputs) -> outputs``, whose examples do not depend on each other;
        kernels are found in it as by :func:`adaptivenet.posterior.capture.trace`.
      params: the parameters.
      inputs: a batch, ``[batch, ...]``.
      kind: see above.
      activation: a, what a unit makes of its drive, for ``"coactivation"``.
      weights: ``[batch]``, numbers or bools that weigh the mean, such as ``drawn.where``.
      select: which kernels, as for :func:`adaptivenet.trees.select_leaves`.

    Returns:
      Pytree of float32 (float64), not negative, for every kernel; masked nodes for other leaves.

    Raises:
      ValueError: an unknown kind, a chosen leaf that is no kernel, or as ``trace``.

    References:
      Nere, Hashmi, Cirelli and Tononi, "Sleep-dependent synaptic down-selection (I)", Frontiers in
      Neurology 4 (2013), for the selection by reactivation in sleep; Molchanov et al., "Importance
      estimation for neural network pruning", CVPR 2019, for products with gradients.

    >>> params = {"kernel": jnp.array([[2.0, -1.0]]), "bias": jnp.zeros(2)}
    >>> apply = lambda p, x: jax.nn.relu(x @ p["kernel"] + p["bias"])
    >>> reactivation(apply, params, jnp.array([[3.0]]))["kernel"].tolist()  # 6 * 6, 3 * 0
    [[36.0, 0.0]]
    """
    if kind not in ("flow", "coactivation", "contribution"):
        raise ValueError(f'kind must be "flow", "coactivation" or "contribution", not {kind!r}.')
    found = trace(apply, params, inputs)
    leaves, treedef = jax.tree.flatten(params)
    chosen = jax.tree.leaves(trees.select_leaves(params, select))
    places = {site.kernel for site in found.sites}
    for place, name in enumerate(found.names):
        if chosen[place] and place not in places:
            why = found.others.get(name, "it is the bias of another")
            raise ValueError(
                f"leaf {name!r} is no kernel of a product of its own ({why}): leave it out with "
                "select=."
            )
    outputs, rows, pull = found.pullback(params, inputs)
    share = _shares(weights, outputs.shape[0])
    deltas: list[Any] = pull(outputs)[0] if kind == "contribution" else [None] * len(rows)
    scores: list[Any] = [optax.MaskedNode()] * len(leaves)
    for site, row, delta in zip(found.sites, rows, deltas, strict=True):
        if not chosen[site.kernel]:
            continue
        matrix = site.matrix(leaves)
        if kind == "flow":
            active = jnp.ones((*row.shape[:2], site.outputs), row.dtype)
        elif kind == "coactivation":
            active = jnp.abs(activation(row @ matrix.astype(row.dtype)))
        else:
            active = jnp.abs(delta)
        weighed = jnp.abs(row) * share.astype(row.dtype)[:, None, None]
        used = jnp.einsum("npi,npo->io", weighed, active.astype(row.dtype))
        used = used * jnp.abs(matrix).astype(row.dtype)
        scores[site.kernel] = site.leaves(used)[site.kernel]
    return jax.tree.unflatten(treedef, scores)


def reactivations(
    apply: Callable[..., jax.Array],
    params: PyTree,
    draw: Callable[[jax.Array], PyTree],
    key: jax.Array,
    *,
    batches: int,
    **options: Any,
) -> PyTree:
    """The mean of :func:`reactivation` over replayed batches.

    Args:
      apply: as for :func:`reactivation`.
      params: the parameters.
      draw: ``draw(key) -> inputs``, a batch from a memory or a generator.
      key: random key.
      batches: how many are replayed, one after the other.
      **options: of :func:`reactivation`.

    Returns:
      Scores, as :func:`reactivation`.

    Raises:
      ValueError: fewer than one batch; else as :func:`reactivation`.

    >>> params, apply = {"kernel": jnp.array([[2.0, -1.0]])}, lambda p, x: x @ p["kernel"]
    >>> use = reactivations(
    ...     apply, params, lambda key: jnp.ones((4, 1)), jax.random.key(0), batches=2, kind="flow"
    ... )
    >>> use["kernel"].tolist()
    [[2.0, 1.0]]
    """
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
        raise ValueError(f"batches must be a positive integer, not {batches!r}.")

    def one(now: jax.Array) -> PyTree:
        return reactivation(apply, params, draw(now), **options)

    def more(total: PyTree, now: jax.Array) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, one(now)), None

    keys = jax.random.split(key, batches)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, keys[0]))
    total, _ = jax.lax.scan(more, zeros, keys)
    return jax.tree.map(lambda x: x / batches, total)


def prune_unused(
    params: PyTree,
    score: PyTree,
    *,
    fraction: Number | None = None,
    threshold: Number | None = None,
    mask: PyTree | None = None,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> tuple[PyTree, PyTree]:
    """Cuts the living synapses that were used least.

    Args:
      params: pytree of arrays.
      score: how much each synapse was used, as :func:`reactivations` returns; leaves without a
        score are not pruned.
      fraction: the share of the living that is cut, in [0, 1); or
      threshold: what was used less than this is cut.
      mask: pytree of bool like the score, which synapses live; all by default. Those that do not
        stay dead.
      structure: what is cut as one; single synapses by default.
      allocation: which leaves compete; all by default (:class:`adaptivenet.pruning.Global`).

    Returns:
      The parameters, exactly zero where cut, and the mask.

    Raises:
      ValueError: not one of fraction and threshold, or out of range; trees that do not fit.

    >>> params = {"w": jnp.array([[5.0, 1.0]])}
    >>> params, mask = prune_unused(params, {"w": jnp.array([[0.0, 2.0]])}, fraction=0.5)
    >>> params["w"].tolist(), mask["w"].tolist()
    ([[0.0, 1.0]], [[False, True]])
    """
    if (fraction is None) == (threshold is None):
        raise ValueError("prune_unused() takes one of fraction= and threshold=.")
    if threshold is not None and known(threshold) and not np.all(np.asarray(threshold) >= 0):
        raise ValueError(f"threshold must be at least 0, not {threshold}.")
    chosen = trees.map_synapses(lambda _, p: p, score, params)
    if mask is None:
        mask = jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), chosen)
    demand: demands.Demand
    if fraction is not None:
        demand = demands.OfAlive(as_share(fraction, "fraction"))
    else:
        demand = demands.AtLeast(threshold)
    structure = Element() if structure is None else structure
    allocation = Global() if allocation is None else allocation
    event.check(chosen, structure=structure, allocation=allocation)
    outcome = event.cut_and_wake(
        chosen,
        mask,
        demand,
        score=initial.fixed(score),
        structure=structure,
        allocation=allocation,
        regrow=None,
        may_grow=False,
        key=jax.random.key(0),  # nothing is drawn
        signals={},
    )
    return masks.apply_mask(params, outcome.mask), outcome.mask


def pruning_of_unused(
    apply: Callable[..., jax.Array],
    draw: Callable[[jax.Array], PyTree],
    *,
    batches: int,
    fraction: Number | None = None,
    threshold: Number | None = None,
    mask: PyTree | None = None,
    allocation: Allocation | None = None,
    **options: Any,
) -> Callable[[PyTree, jax.Array], tuple[PyTree, dict[str, PyTree]]]:
    """A part of a sleep phase: replays, then prunes what was not used.

    Args:
      apply: as for :func:`reactivations`.
      draw: as for :func:`reactivations`.
      batches: as for :func:`reactivations`.
      fraction: as for :func:`prune_unused`.
      threshold: as for :func:`prune_unused`.
      mask: as for :func:`prune_unused`.
      allocation: as for :func:`prune_unused`.
      **options: of :func:`reactivation`.

    Returns:
      ``part(params, key) -> (params, {"mask": mask, "use": scores})`` for
      :func:`adaptivenet.consolidation.sleep.sleep`.

    >>> part = pruning_of_unused(
    ...     lambda p, x: x @ p["w"], lambda key: jnp.ones((2, 1)), batches=1, fraction=0.5
    ... )
    >>> part({"w": jnp.array([[2.0, -1.0]])}, jax.random.key(0))[0]["w"].tolist()
    [[2.0, 0.0]]
    """

    def prune_unused_synapses(params: PyTree, key: jax.Array) -> tuple[PyTree, dict[str, PyTree]]:
        use = reactivations(apply, params, draw, key, batches=batches, **options)
        params, alive = prune_unused(
            params, use, fraction=fraction, threshold=threshold, mask=mask, allocation=allocation
        )
        return params, {"mask": alive, "use": use}

    return prune_unused_synapses


def _shares(weights: jax.Array | None, number: int) -> jax.Array:
    """What each example counts in the mean."""
    if weights is None:
        return jnp.full(number, 1.0 / number, jnp.float32)
    weights = jnp.asarray(weights).astype(jnp.float32)
    if weights.shape != (number,):
        raise ValueError(f"weights= must be {number} numbers, not of the shape {weights.shape}.")
    total = jnp.sum(weights)
    return weights / jnp.where(total > 0, total, jnp.ones_like(total))
