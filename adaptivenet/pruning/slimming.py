"""Cuts whatever is shaped like the parameters as they were cut."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet import trees
from adaptivenet.moments import beside

PyTree = Any

__all__ = ["slim_like"]


def slim_like(tree: PyTree, params: PyTree, places: list[list[np.ndarray]]) -> PyTree:
    """Takes the same positions out of a tree as out of the parameters.

    Every part of the tree that has the structure of the parameters (whatever leaves a mask or a
    label took out of it) is cut: moments of any optimizer, masks, ages, running means of signals, a
    posterior, anchors. Scalars, keys and statistics of other shapes stay.

    Args:
      tree: an optimizer state, or any other pytree.
      params: the parameters before they were cut.
      places: which positions stay, one list a parameter with one array an axis.

    Returns:
      The tree with smaller arrays.

    Raises:
      ValueError: a part with the structure of the parameters holds an array of another shape, or
        nothing in a state that holds arrays has this structure: it is that of another model, or
        keeps statistics by rows and columns (adafactor, sm3), which cannot be cut.

    >>> import optax
    >>> params = {"w": jnp.ones((2, 3))}
    >>> state = optax.adam(1e-3).init(params)
    >>> cut = slim_like(state, params, [[np.array([0]), np.array([1, 2])]])
    >>> cut[0].mu["w"].shape
    (1, 2)
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
    alone = jax.tree_util.all_leaves([params])
    names = trees.paths(params)
    found = 0

    def stop(node: Any) -> bool:
        return beside(params, node) is not None

    def cut(node: Any) -> Any:
        nonlocal found
        parts = beside(params, node)
        if parts is None:
            return node
        smaller = []
        for name, part, shape, axes in zip(names, parts, shapes, places, strict=True):
            inner = jax.tree.leaves(part)
            if trees.is_masked(part) or not inner:
                continue
            fits = len(inner) == 1 and jnp.shape(inner[0]) == shape
            # Scalars, and the placeholders of one element that some optimizers keep, stay.
            single = len(inner) == 1 and jnp.size(inner[0]) == 1
            if not (fits or single or alone):
                raise ValueError(
                    f"the state holds {[jnp.shape(leaf) for leaf in inner]} for {name}, which has "
                    f"shape {shape}: it is the state of another model, or of an optimizer that "
                    "keeps rows and columns, which cannot be cut. Start it anew with init()."
                )
            smaller.append(taken(inner[0], axes) if fits else inner[0])
            found += fits
        return jax.tree.unflatten(jax.tree.structure(node), smaller)

    result = jax.tree.map(cut, tree, is_leaf=stop)
    arrays = [leaf for leaf in jax.tree.leaves(tree) if jnp.ndim(leaf) >= 1]
    if arrays and not found and any(shapes):
        raise ValueError(
            "nothing in the state is shaped like these parameters: it is the state of another "
            f"model. It holds arrays of {sorted({jnp.shape(leaf) for leaf in arrays})}."
        )
    return result


def taken(leaf: Any, axes: list[np.ndarray]) -> Any:
    """An array at the positions that stay, one array of them an axis."""
    for place, positions in enumerate(axes):
        if len(positions) != leaf.shape[place]:
            leaf = jnp.take(leaf, positions, axis=place)
    return leaf
