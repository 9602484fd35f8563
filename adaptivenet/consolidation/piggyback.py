"""Piggyback: tasks as binary masks over one fixed network.

The backbone is never changed. A task trains a real-valued score for each synapse, and uses the
synapses whose score lies above a threshold: what is stored of it is one bit a synapse (and its
output layer, if it has one of its own). Nothing is forgotten, and nothing is learnt jointly::

    scores = piggyback.init(backbone)

    def loss(scores, batch):
        return task_loss(piggyback.apply_mask(backbone, scores), batch)

    grads = jax.grad(loss)(scores, batch)                    # any optimizer on the scores
    stored = piggyback.pack(piggyback.masks(scores))         # one bit a synapse

The effective parameters are exact zeros where the mask is off, so that
:mod:`adaptivenet.pruning` and the counts of :func:`adaptivenet.pruning.reparametrise.support` read
them as they read any sparse network.

References:
  Mallya, Davis and Lazebnik, "Piggyback: adapting a single network to multiple tasks by learning to
  mask weights", ECCV 2018, arXiv:1801.06519.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet import trees
from adaptivenet.posterior._arrays import known, wide_dtype

PyTree = Any

__all__ = ["apply_mask", "bits", "init", "masks", "pack", "unpack"]

# The values of the authors' code: all synapses start in the mask.
_START, _THRESHOLD = 1e-2, 5e-3


def init(
    params: PyTree,
    value: Any = _START,
    *,
    key: jax.Array | None = None,
    select: trees.Select = None,
) -> PyTree:
    """Scores to train for one task.

    Args:
      params: pytree of arrays, the backbone.
      value: score of every synapse to start from; above the threshold, the task starts from the
        backbone as it is.
      key: draws the scores uniformly from [0, 2 value) instead (the authors' uniform start is from
        [-value, value), with three quarters of the synapses off).
      select: as for :func:`adaptivenet.trees.select_leaves`.

    Returns:
      Pytree of float32 (float64 beside float64 parameters); masked nodes for leaves that are not
      synapses.

    Raises:
      ValueError, TypeError: as :func:`adaptivenet.trees.select_leaves`.

    >>> init({"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2)})["kernel"].tolist()
    [[0.009999..., 0.009999...]]
    """
    leaves, treedef = jax.tree.flatten(trees.synapses(params, select))
    value = jnp.asarray(value)

    def start(place: int, leaf: jax.Array) -> jax.Array:
        dtype = wide_dtype(leaf.dtype)
        if key is None:
            return jnp.zeros_like(leaf, dtype=dtype) + value.astype(dtype)
        draw = jax.random.uniform(jax.random.fold_in(key, place), leaf.shape, dtype)
        return 2.0 * value.astype(dtype) * draw

    return treedef.unflatten([start(place, leaf) for place, leaf in enumerate(leaves)])


def masks(scores: PyTree, threshold: Any = _THRESHOLD) -> PyTree:
    """The synapses that a task uses: those whose score is above the threshold.

    Args:
      scores: pytree of scores, as of :func:`init`.
      threshold: a number, possibly traced.

    Returns:
      Pytree of bool.

    >>> masks({"w": jnp.array([0.01, 0.0])})["w"].tolist()
    [True, False]
    """
    limit = jnp.asarray(threshold)
    return jax.tree.map(lambda s: s > limit.astype(s.dtype), scores)


def apply_mask(
    params: PyTree, scores: PyTree, threshold: Any = _THRESHOLD, *, fixed: bool = True
) -> PyTree:
    """The network of a task: the backbone where its mask is on, exact zeros elsewhere.

    Its derivative with respect to the scores is that of ``params * scores``: the step of the
    threshold passes as if it were the identity (straight-through), also where the mask is off.

    Args:
      params: pytree of arrays, the backbone.
      scores: as of :func:`init`; masked nodes for leaves that are not synapses, which stay.
      threshold: a number, possibly traced.
      fixed: whether no gradient reaches the synapses of the backbone; otherwise those in the mask
        get theirs. Leaves without scores (biases, norms, an output layer) keep theirs always.

    Returns:
      Pytree like ``params``.

    Raises:
      ValueError: the scores belong to another tree, or have other shapes.

    References:
      Mallya, Davis and Lazebnik, ECCV 2018: the masks and their gradient.

    >>> w, s = {"w": jnp.array([2.0, -3.0])}, {"w": jnp.array([0.01, 0.0])}
    >>> apply_mask(w, s)["w"].tolist()
    [2.0, 0.0]
    >>> jax.grad(lambda s: apply_mask(w, s)["w"].sum())(s)["w"].tolist()
    [2.0, -3.0]
    """
    names = iter(trees.paths(scores))
    limit = jnp.asarray(threshold)

    def use(score: jax.Array, weight: jax.Array) -> jax.Array:
        name = next(names)
        if jnp.shape(score) != jnp.shape(weight):
            raise ValueError(
                f"the scores of {name!r} have shape {jnp.shape(score)} where the parameters have "
                f"{jnp.shape(weight)}: make them by init(params)."
            )
        weight = jax.lax.stop_gradient(weight) if fixed else weight
        return _masked(weight, score, limit.astype(score.dtype))

    return trees.merge_synapses(use, scores, params)


@jax.custom_jvp
def _masked(weight: jax.Array, score: jax.Array, limit: jax.Array) -> jax.Array:
    return jnp.where(score > limit, weight, jnp.zeros_like(weight))


@_masked.defjvp
def _straight_through(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    weight, score, limit = primals
    of_weight, of_score, _ = tangents
    on = score > limit
    passing = weight * of_score.astype(weight.dtype)
    return _masked(*primals), jnp.where(on, of_weight, jnp.zeros_like(weight)) + passing


def pack(mask: PyTree) -> PyTree:
    """A mask as bits, eight in a byte: what is stored of a task.

    Args:
      mask: pytree of bool.

    Returns:
      Pytree of uint8 vectors ``[ceil(size / 8)]``, row-major, the first synapse in the highest bit.

    Raises:
      TypeError: a leaf is not bool.

    >>> pack({"w": jnp.array([[True, False], [True, True]])})["w"].tolist()
    [176]
    """

    def packed(name: str, leaf: Any) -> jax.Array:
        if jnp.asarray(leaf).dtype != jnp.bool_:
            raise TypeError(f"mask {name!r} has dtype {jnp.asarray(leaf).dtype}, not bool.")
        return jnp.packbits(jnp.asarray(leaf).reshape(-1))

    leaves, treedef = jax.tree.flatten(mask)
    pairs = zip(trees.paths(mask), leaves, strict=True)
    return treedef.unflatten([packed(name, leaf) for name, leaf in pairs])


def unpack(packed: PyTree, params: PyTree) -> PyTree:
    """The mask again.

    Args:
      packed: of :func:`pack`.
      params: pytree of arrays (or of their shapes) that has at least its leaves.

    Returns:
      Pytree of bool, shaped like the parameters.

    Raises:
      ValueError: the bits belong to another tree, or are of other sizes.

    >>> unpack({"w": jnp.array([176], jnp.uint8)}, {"w": jnp.zeros((2, 2))})["w"].tolist()
    [[True, False], [True, True]]
    """
    names = iter(trees.paths(packed))

    def mask(leaf: jax.Array, like: Any) -> jax.Array:
        name, shape = next(names), jnp.shape(like)
        size = int(np.prod(shape))
        if leaf.shape != (-(-size // 8),):
            raise ValueError(
                f"the bits of {name!r} have shape {leaf.shape}, which is not that of a leaf of "
                f"shape {shape}: {(-(-size // 8),)}."
            )
        return jnp.unpackbits(leaf, count=size).reshape(shape).astype(bool)

    return trees.map_synapses(mask, packed, params)


def bits(scores: PyTree, tasks: int = 1) -> int:
    """How many bits the masks of some tasks take: one a synapse and task, exactly.

    Args:
      scores: scores or a mask of one task, or their shapes.
      tasks: how many tasks.

    Returns:
      The number; leaves that a task has besides (its output layer) are not counted.

    Raises:
      ValueError: ``tasks`` is below 0.

    >>> bits(init({"kernel": jnp.ones((30, 20)), "bias": jnp.ones(20)}), tasks=3)
    1800
    """
    if not known(tasks) or isinstance(tasks, bool) or int(tasks) != tasks or tasks < 0:
        raise ValueError(f"tasks must be a number of tasks >= 0, not {tasks!r}.")
    return trees.size(scores) * int(tasks)
