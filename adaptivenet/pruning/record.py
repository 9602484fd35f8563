"""The record of an event: statistics that a scan stacks."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adaptivenet import trees
from adaptivenet.counts import Count, as_count, total

PyTree = Any

__all__ = ["Record"]


class Record(NamedTuple):
    """What the last event did. Counts are int32, or exact 64-bit counts for trees from 2^31 on.

    Attributes:
      event: bool, whether the last update was an event.
      step: int32, completed updates at the last event.
      target: float32, what the schedule asked for (sparsity, share cut or threshold).
      threshold: float32, the lowest score kept (of the first group of leaves).
      alive: synapses in the mask after the event.
      kept: synapses that survived the cut (without those woken).
      births: synapses woken.
      deaths: synapses cut.
      density: float32, kept / all.
      turnover: float32, (births + deaths) / all: the distance between the masks, where nothing
        wakes in the event that cut it.
      age: float32, mean age of the living in updates since they last woke; nan unless the
        transformation was built with ``ages=True``.
      nonfinite: parameters that cannot land on zero because they are inf or nan.
      layers: uint32 ``[leaves]``, ``kept`` of each prunable leaf, in the order of
        ``an.trees.paths(an.pruning.mask(opt_state))``.
    """

    event: Any
    step: Any
    target: Any
    threshold: Any
    alive: Any
    kept: Any
    births: Any
    deaths: Any
    density: Any
    turnover: Any
    age: Any
    nonfinite: Any
    layers: Any


def count_leaves(tree: PyTree) -> jax.Array:
    """The number of True of each leaf, uint32 ``[leaves]`` (a leaf has fewer than 2^32)."""
    return jnp.stack([jnp.sum(leaf, dtype=jnp.uint32) for leaf in jax.tree.leaves(tree)])


def narrow(count: Count, size: int) -> Any:
    """An int32 where every possible count fits, else the count itself."""
    return count.astype(jnp.int32) if size < 2**31 else count


def count(tree: PyTree) -> Any:
    """The exact number of True of a pytree of bool: int32, or a count for trees from 2^31 on."""
    return narrow(total(as_count(count_leaves(tree))), trees.size(tree))


def blank(mask: PyTree) -> Record:
    """The record before any event."""
    size = trees.size(mask)
    sizes = jnp.asarray([trees.size(leaf) for leaf in jax.tree.leaves(mask)], jnp.uint32)
    zero, everything = narrow(as_count(0), size), narrow(as_count(size), size)
    return Record(
        event=jnp.zeros((), bool),
        step=jnp.zeros((), jnp.int32),
        target=jnp.zeros((), jnp.float32),
        threshold=jnp.zeros((), jnp.float32),
        alive=everything,
        kept=everything,
        births=zero,
        deaths=zero,
        density=jnp.ones((), jnp.float32),
        turnover=jnp.zeros((), jnp.float32),
        age=jnp.full((), jnp.nan, jnp.float32),
        nonfinite=zero,
        layers=sizes,
    )
