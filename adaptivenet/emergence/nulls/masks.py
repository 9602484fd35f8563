"""Null models of a mask: the cut alone, and the same number of synapses at random places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from adaptivenet import pruning, trees
from adaptivenet.counts import Count, as_count
from adaptivenet.pruning import Allocation, Global, Schedule, Score, magnitude
from adaptivenet.pruning.schedules import known

PyTree = Any

__all__ = ["random_mask", "truncation"]


def truncation(
    params: PyTree,
    sparsity: Any = None,
    *,
    k: Any = None,
    score: Score = magnitude,
    allocation: Allocation = Global(),  # noqa: B008 (a constant)
    select: trees.Select = None,
    seed: Any = 0,
    **signals: Any,
) -> tuple[PyTree, PyTree]:
    """The truncation null: the cut, and no training after it.

    Keeps exactly what a single event of :func:`adaptivenet.pruning.prune` keeps. What a claim about
    pruned networks finds here as well is made by the cut: cutting the small weights out of any
    distribution around zero leaves two humps.

    Args:
      params: pytree of arrays.
      sparsity: share to cut, in [0, 1), as for ``prune``; or give ``k``.
      k: number of synapses to keep, where the allocation is a single group (``Global()``).
      score: what a synapse is worth.
      allocation: how the target is shared out among leaves.
      select: as for ``prune``.
      seed: as for ``prune``; for scores that draw.
      **signals: what the score asks for, such as ``grads=``.

    Returns:
      The parameters, exactly zero where cut, and the mask.

    Raises:
      TypeError: not exactly one of ``sparsity`` and ``k``.
      ValueError: as ``prune``; or ``k`` is negative, above the number of synapses, or the
        allocation has several groups.

    >>> params, mask = truncation({"w": jnp.array([[1.0, -3.0], [0.2, 2.0]])}, k=2)
    >>> params["w"].tolist()
    [[0.0, -3.0], [0.0, 2.0]]
    """
    if (sparsity is None) == (k is None):
        raise TypeError("truncation() takes either a sparsity or k=, the number to keep.")
    schedule = pruning.constant(sparsity) if k is None else _Keep(k)
    if k is not None:
        kept = jax.tree.leaves(trees.synapses(params, select))
        if len(allocation.groups([leaf.size for leaf in kept])) > 1:
            raise ValueError(
                "k= counts the synapses of one group; with an allocation of several groups, such "
                "as Uniform(), give a sparsity."
            )
        size = trees.size(kept)
        if isinstance(k, float) or (known(k) and not 0 <= int(k) <= size):
            raise ValueError(f"k must be an integer from 0 to {size}, not {k}.")
    pruner = pruning.prune(
        schedule, score=score, allocation=allocation, select=select, every=None, seed=seed
    )
    params, state = pruning.revise(pruner, params, pruner.init(params), **signals)
    return params, state.mask


@trees.register_dataclass
@dataclass(frozen=True)
class _Number:
    """A demand for a number of synapses."""

    number: Count

    def keep(self, alive: Count, size: int) -> Count:
        del alive, size
        return self.number

    def value(self) -> jax.Array:
        return self.number.astype(jnp.float32)


@dataclass(frozen=True, eq=False)
class _Keep(Schedule):
    k: Any
    may_grow: bool = False

    def demand(self, step: Any, state: Any, signals: Mapping[str, Any]) -> tuple[Any, Any]:
        del step, signals
        return _Number(as_count(self.k)), state


def random_mask(mask: PyTree, key: jax.Array) -> PyTree:
    """A mask with as many living synapses in each leaf, at uniformly random places.

    Args:
      mask: pytree of bool; masked nodes for leaves that are not synapses.
      key: random key.

    Returns:
      A mask of the same structure and counts.

    >>> int(random_mask({"kernel": jnp.eye(4, dtype=bool)}, jax.random.key(0))["kernel"].sum())
    4
    """
    leaves, treedef = jax.tree.flatten(mask)
    moved = [
        jax.random.permutation(jax.random.fold_in(key, place), leaf.ravel()).reshape(leaf.shape)
        for place, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, moved)
