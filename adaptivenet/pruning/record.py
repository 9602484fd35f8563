"""The record of an event: statistics that a scan stacks; and the state that holds it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet import selection, trees
from adaptivenet.counts import Count, as_count, as_share, part, total
from adaptivenet.pruning.effective import effective_masks

PyTree = Any

__all__ = ["PruneState", "Record", "layered"]


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
      turnover: float32, (births + deaths) / all. A synapse that is woken in the event that cut it
        counts twice.
      age: float32, mean age of the living in updates since they last woke; nan unless the
        transformation was built with ``ages=True``.
      nonfinite: parameters that cannot land on zero because they are inf or nan.
      layers: uint32 ``[leaves]``, ``kept`` of each prunable leaf, in the order of
        ``an.trees.paths(an.pruning.mask(opt_state))``.
      distance: float32, share of the synapses at which the mask differs from the one before (the
        Hamming distance over the size); at most ``turnover``.
      unit_deaths: uint32 ``[leaves]``, output units (indices of the last axis) whose last synapse
        died at this event.
      quantiles: float32 ``[quantiles]``, scores of the synapses that were alive before the cut, at
        the ranks that ``prune(quantiles=...)`` asked for; nan before the first event, and ``()``
        where none were asked for.
      effective: float32, effective density: survivors on a live path from input to output / all;
        nan unless the transformation was built with ``effective=``.
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
    distance: Any
    unit_deaths: Any
    quantiles: Any
    effective: Any


class PruneState(NamedTuple):
    """State of :func:`prune`; found by name with ``optax.tree_utils.tree_get(state, "mask")``.

    Attributes:
      step: int32, completed updates.
      mask: pytree of bool; masked nodes for leaves that are not synapses.
      survivors: pytree of bool, what of ``mask`` survived the cut of the last event: the others
        were woken by it (``()`` where nothing can wake: the mask is all there is).
      born: pytree of int32, the update at which a synapse last woke (``()`` without ``ages``).
      schedule: state of a closed-loop schedule.
      key: uint32, data of the random key.
      record: what the last event did.
    """

    step: jax.Array
    mask: PyTree
    survivors: PyTree
    born: PyTree
    schedule: Any
    key: jax.Array
    record: Record


def prune_states(opt_state: PyTree) -> list[PruneState]:
    """All pruning states within an optimizer state, in the order of its leaves."""

    def is_state(node: Any) -> bool:
        return isinstance(node, PruneState)

    return [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]


def count_leaves(tree: PyTree) -> jax.Array:
    """The number of True of each leaf, uint32 ``[leaves]`` (a leaf has fewer than 2^32)."""
    return jnp.stack([jnp.sum(leaf, dtype=jnp.uint32) for leaf in jax.tree.leaves(tree)])


def narrow(count: Count, size: int) -> Any:
    """An int32 where every possible count fits, else the count itself."""
    return count.astype(jnp.int32) if size < 2**31 else count


def _count(tree: PyTree) -> Count:
    return total(as_count(count_leaves(tree)))


def blank(mask: PyTree, quantiles: Sequence[float] = ()) -> Record:
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
        distance=jnp.zeros((), jnp.float32),
        unit_deaths=jnp.zeros_like(sizes),
        # Not an empty array, which orbax cannot save.
        quantiles=jnp.full(len(quantiles), jnp.nan, jnp.float32) if quantiles else (),
        effective=jnp.full((), jnp.nan, jnp.float32),
    )


def measure(
    params: PyTree,
    before: PruneState,
    kept: PyTree,
    mask: PyTree,
    *,
    target: jax.Array,
    threshold: jax.Array,
    born: PyTree,
    quantiles: Any,
    effective: Callable[[PyTree], PyTree] | None,
) -> Record:
    """The record of an event.

    Args:
      params: the parameters before the cut.
      before: the state before the event.
      kept: pytree of bool, the survivors.
      mask: pytree of bool, the new mask.
      target: what the schedule asked for.
      threshold: the lowest score kept.
      born: when each synapse last woke, or ``()``.
      quantiles: float32 ``[quantiles]``, of the scores, or ``()``.
      effective: leaves on a mask what lies on a live path, or None.

    Returns:
      The record.
    """
    size = trees.size(mask)
    layers = count_leaves(kept)
    survivors = total(as_count(layers))
    deaths = _count(trees.map_synapses(lambda old, new: old & ~new, before.mask, kept))
    alive, births, changed = survivors, as_count(0), deaths
    if mask is not kept:  # else nothing woke
        alive = _count(mask)
        births = _count(trees.map_synapses(lambda new, old: new & ~old, mask, kept))
        changed = _count(trees.map_synapses(lambda old, new: old ^ new, before.mask, mask))
    nonfinite = trees.map_synapses(lambda m, p: ~m & ~jnp.isfinite(p), kept, params)
    age = before.record.age
    if jax.tree.leaves(born):
        ages = trees.map_synapses(
            lambda m, b: jnp.sum(jnp.where(m, before.step - b, 0).astype(jnp.float32)), mask, born
        )
        age = sum(jax.tree.leaves(ages)) / jnp.maximum(alive.astype(jnp.float32), 1.0)
    live = before.record.effective
    if effective is not None:
        live = _count(effective(kept)).astype(jnp.float32) / jnp.float32(size)
    lost = trees.map_synapses(lambda old, new: _units(old) & ~_units(new), before.mask, mask)
    return Record(
        event=jnp.ones((), bool),
        step=before.step,
        target=target,
        threshold=threshold,
        alive=narrow(alive, size),
        kept=narrow(survivors, size),
        births=narrow(births, size),
        deaths=narrow(deaths, size),
        density=survivors.astype(jnp.float32) / jnp.float32(size),
        turnover=(births.astype(jnp.float32) + deaths.astype(jnp.float32)) / jnp.float32(size),
        age=age,
        nonfinite=narrow(_count(nonfinite), size),
        layers=layers,
        distance=changed.astype(jnp.float32) / jnp.float32(size),
        unit_deaths=count_leaves(lost),
        quantiles=quantiles,
        effective=live,
    )


def _units(mask: jax.Array) -> jax.Array:
    """Which output units have a living synapse."""
    # On CPU several times as fast as `any` of bool.
    return jnp.max(mask.astype(jnp.uint8), axis=tuple(range(mask.ndim - 1))) > 0


def as_quantiles(values: Any) -> tuple[float, ...]:
    """Checks the quantiles that are asked for: numbers in [0, 1]."""
    found = tuple(float(value) for value in np.ravel(np.asarray(values, np.float64)))
    for value in found:
        if not (math.isfinite(value) and 0 <= value <= 1):
            raise ValueError(f"quantiles must be in [0, 1], not {value:g}; 0.5 is the median.")
    return found


def score_quantiles(scores: PyTree, mask: PyTree, quantiles: Sequence[float]) -> jax.Array:
    """Quantiles of the scores of the living, exact, without sorting.

    Args:
      scores: pytree of non-negative floats.
      mask: pytree of bool, what is alive.
      quantiles: one or more numbers in [0, 1]; of n living, q takes the one at rank
        ``round(q (n - 1))`` from the lowest (half up).

    Returns:
      float32 ``[quantiles]``; nan where nothing lives.

    >>> w = {"w": jnp.array([[1.0, 2.0, 5.0, 9.0]])}
    >>> alive = {"w": jnp.array([[True, True, True, False]])}
    >>> score_quantiles(w, alive, (0.5,)).tolist()
    [2.0]
    """
    alive = _count(mask)
    some = jnp.any(alive.limbs > 0)
    found = []
    for value in quantiles:
        last = alive - as_count(1)
        rank = last if value == 1 else part(as_share(value, "quantile"), last)
        chosen = selection.select(scores, alive - rank, where=mask).threshold.astype(jnp.float32)
        found.append(jnp.where(some, chosen, jnp.nan))
    return jnp.stack(found)


def layered(*names: str) -> Callable[[PyTree], PyTree]:
    """Live paths through the dense layers of a network, for ``prune(effective=...)``.

    Args:
      *names: paths of the layers' kernels ``[inputs, outputs]``, from the input to the output.

    Returns:
      A function that leaves on a mask only what lies on a path through all these layers; other
      leaves stay as they are.

    Raises:
      ValueError: when called: a path that is no prunable leaf, or layers that do not fit.

    References:
      Vysogorets and Kempe, "Connectivity matters: neural network pruning through the lens of
      effective sparsity", arXiv:2107.02306.

    >>> mask = {"a": jnp.array([[True, False]]), "b": jnp.array([[True], [True]])}
    >>> layered("a", "b")(mask)["b"].tolist()
    [[True], [False]]
    """

    def live(mask: PyTree) -> PyTree:
        leaves, treedef = jax.tree.flatten(mask)
        places = dict(zip(trees.paths(mask), range(len(leaves)), strict=True))
        for name in names:
            if name not in places:
                raise ValueError(
                    f"effective= names the layer {name!r}, which is no prunable leaf; these are: "
                    f"{', '.join(places)}."
                )
        found = effective_masks([leaves[places[name]] for name in names])
        for name, leaf in zip(names, found, strict=True):
            leaves[places[name]] = leaf
        return jax.tree.unflatten(treedef, leaves)

    return live


def as_effective(value: Any) -> Callable[[PyTree], PyTree] | None:
    """Makes a function of a mask of what ``prune(effective=...)`` was given."""
    if value is None or callable(value):
        return value
    if isinstance(value, str | Mapping) or not all(isinstance(name, str) for name in value):
        raise TypeError(
            "effective= takes the paths of the layers from input to output, such as "
            f"['dense1/kernel', 'dense2/kernel'], or a function of the mask, not {value!r}."
        )
    return layered(*value)
