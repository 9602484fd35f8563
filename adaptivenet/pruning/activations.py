"""What flows into each synapse: norms and Gram matrices of inputs, captured on any model.

``apply(params, *inputs)`` is traced to a jaxpr, which is then evaluated with an eye on each product
(``dot_general``, ``conv_general_dilated``) of a parameter with something that depends on the
inputs. It makes no difference how the model was written: plain functions, Flax Linen, NNX,
Equinox. Parameters are followed through what only moves their numbers about (transposes, reshapes,
slices, concatenations), through elementwise functions that do not depend on the inputs (casts,
masks, scales), and into jit, checkpoint, custom derivatives and scan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet import trees
from adaptivenet.pruning.products import Spy, Value, evaluate, whole
from adaptivenet.pruning.saliency import aligned, wide

PyTree = Any

__all__ = ["input_grams", "input_norms", "wanda"]


def wanda(params: PyTree, *, activations: PyTree, **signals: Any) -> PyTree:
    """``|w| ||x||``: magnitude times the norm of the input that the synapse multiplies.

    The paper compares synapses of the same output only: use a structure that does, such as constant
    fan-in. Shared out globally, the score also compares layers.

    Args:
      params: pytree of floating arrays.
      activations: pytree of norms by path, as :func:`input_norms` returns; a vector belongs to the
        inputs of a kernel whose last axis is the output (``[..., inputs, outputs]``).
      **signals: not used.

    Returns:
      Scores of the shapes of ``params``, float32.

    Raises:
      ValueError: norms are missing for a synapse, or do not fit its kernel.

    References:
      Sun et al., "A simple and effective pruning approach for large language models", ICLR 2024,
      eq. 1.

    >>> kernel = {"kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]])}
    >>> wanda(kernel, activations={"kernel": jnp.array([10.0, 1.0])})["kernel"].tolist()
    [[10.0, 20.0], [3.0, 0.5]]
    """
    del signals
    leaves, treedef = jax.tree.flatten(params)
    norms = aligned(params, activations, "activations", shapes=False)
    scores = []
    for name, weight, norm in zip(trees.paths(params), leaves, norms, strict=True):
        norm = wide(norm)
        shape = jnp.shape(weight)
        if norm.ndim == 1 and len(shape) > 1 and norm.size == math.prod(shape[:-1]):
            norm = norm.reshape((*shape[:-1], 1))
        fits = norm.ndim == len(shape)
        if not fits or any(a not in (1, b) for a, b in zip(norm.shape, shape, strict=True)):
            raise ValueError(
                f"activations have shape {norm.shape} at {name!r}, which does not fit a kernel of "
                f"shape {shape}: give one norm an input, or what input_norms returns."
            )
        scores.append(jnp.abs(wide(weight)) * norm)
    return jax.tree.unflatten(treedef, scores)


def input_norms(
    apply: Callable[..., Any], params: PyTree, *inputs: Any, select: trees.Select = None
) -> PyTree:
    """The Euclidean norm of what each synapse multiplies, over examples and positions.

    Args:
      apply: ``apply(params, *inputs)``, the model's forward pass.
      params: pytree of arrays.
      *inputs: a batch of calibration data; give it here rather than close over it. Several batches
        combine as the root of the sum of squares.
      select: which leaves are synapses, as for `prune`.

    Returns:
      Float32 norms in the shape of each kernel, with size 1 along the axes on which they do not
      depend: ``[inputs, 1]`` for a kernel ``[inputs, outputs]``, ``[height, width, channels, 1]``
      for a convolution; masked nodes for leaves that are not synapses. A parameter that is used
      several times gets the norm over all its uses, in full shape where each is of a part.

    Raises:
      ValueError: a synapse multiplies nothing that depends on the inputs (an embedding that is
        looked up, say), or only within a while loop, a cond or the like; or a selection error.

    References:
      Sun et al., "A simple and effective pruning approach for large language models", ICLR 2024.

    >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
    >>> model = lambda p, x: jax.nn.relu(x @ p["kernel"] + p["bias"])
    >>> input_norms(model, params, jnp.array([[3.0, 0.0], [4.0, 1.0]]))["kernel"].tolist()
    [[5.0], [1.0]]
    """

    def finish(shape: tuple[int, ...], parts: list[_Part], name: str) -> jax.Array:
        del name
        squares = [_spread(part, shape) for part in parts]
        return jnp.sqrt(sum(squares[1:], start=squares[0]))

    return _capture(apply, params, inputs, select, finish, grams=False)


def input_grams(
    apply: Callable[..., Any], params: PyTree, *inputs: Any, select: trees.Select = None
) -> PyTree:
    """Gram matrices ``X^T X`` of the inputs of each kernel, for layer-wise reconstruction.

    Args:
      apply: ``apply(params, *inputs)``, the model's forward pass.
      params: pytree of arrays.
      *inputs: a batch of calibration data; those of several batches add up.
      select: which leaves are synapses, as for `prune`.

    Returns:
      Float32 ``[fan_in, fan_in]`` for each kernel, in the (row-major) order of its input axes: that
      of ``kernel.reshape(-1, outputs)`` for dense kernels ``[inputs, outputs]`` and convolutions
      ``[height, width, channels, outputs]``. Batched kernels (experts, depthwise convolutions) have
      their batch axes in front. Masked nodes for leaves that are not synapses.

    Raises:
      ValueError: as :func:`input_norms`; or a kernel has no single Gram matrix, because its inputs
        differ between outputs (grouped convolutions) or uses (tied weights, one transposed).

    References:
      Hassibi and Stork, "Second order derivatives for network pruning: optimal brain surgeon",
      NeurIPS 1992; Frantar and Alistarh, "SparseGPT", ICML 2023.

    >>> params = {"kernel": jnp.ones((2, 3))}
    >>> gram = input_grams(lambda p, x: x @ p["kernel"], params, jnp.array([[3.0, 1.0]]))
    >>> gram["kernel"].tolist()
    [[9.0, 3.0], [3.0, 1.0]]
    """

    def finish(shape: tuple[int, ...], parts: list[_Part], name: str) -> jax.Array:
        found = [_gram(part, shape, name) for part in parts]
        if len({(axes, gram.shape) for gram, axes in found}) > 1:
            raise ValueError(
                f"leaf {name!r} is used in products along different axes and has no single Gram "
                "matrix; leave it out with select=."
            )
        return sum((gram for gram, _ in found[1:]), start=found[0][0])

    return _capture(apply, params, inputs, select, finish, grams=True)


class _Part(NamedTuple):
    """A product as one leaf sees it.

    Attributes:
      table: for each element of the leaf, its place in the raveled [batch, fan_in], or -1 for none;
        of size 1 along axes that do not matter. None where elements occur several times.
      pairs: positions and places, where there is no table.
      stat: statistic of the inputs.
    """

    table: np.ndarray | None
    pairs: Any
    stat: jax.Array


def _capture(
    apply: Callable[..., Any],
    params: PyTree,
    inputs: tuple[Any, ...],
    select: trees.Select,
    finish: Callable[[tuple[int, ...], list[_Part], str], jax.Array],
    *,
    grams: bool,
) -> PyTree:
    chosen = jax.tree.leaves(trees.select_leaves(params, select))
    leaves, treedef = jax.tree.flatten(params)
    names = trees.paths(params)
    closed = jax.make_jaxpr(apply)(params, *inputs)
    starts: list[int] = []
    arguments, end = [], 0
    for leaf, is_synapse in zip(leaves, chosen, strict=True):
        starts.append(end)
        arguments.append(Value(leaf, whole(end, jnp.shape(leaf)) if is_synapse else None))
        end += math.prod(jnp.shape(leaf)) if is_synapse else 0
    arguments += [Value(leaf, data=True) for leaf in jax.tree.leaves(inputs)]
    spy = Spy(grams)
    evaluate(closed, arguments, spy)

    shapes = [jnp.shape(leaf) for leaf in leaves]
    parts: list[list[_Part]] = [[] for _ in leaves]
    # One by one: the positions of a large kernel take more memory than the kernel.
    for hit in spy.hits:
        index = hit.trail.index(())
        for place in _present(index, starts, chosen):
            parts[place].append(_part(index, hit.stat, starts[place], shapes[place]))
    for place, name in enumerate(names):
        if chosen[place] and not parts[place]:
            _complain(place, name, spy, starts, chosen)
    results = [
        finish(shapes[place], parts[place], names[place]) if chosen[place] else optax.MaskedNode()
        for place in range(len(leaves))
    ]
    return jax.tree.unflatten(treedef, results)


def _complain(
    place: int, name: str, spy: Spy, starts: Sequence[int], chosen: Sequence[bool]
) -> None:
    hint = ""
    for trail, kind in spy.lost:
        if place in _present(trail.index(()), starts, chosen):
            hint = f" (it was last seen to enter {kind!r})"
    raise ValueError(
        f"leaf {name!r} multiplies nothing that depends on the inputs, in a product or a "
        f"convolution{hint}. Leave it out with select=, or check that apply(params, *inputs) uses "
        "both of its arguments."
    )


def _present(index: np.ndarray, starts: Sequence[int], chosen: Sequence[bool]) -> list[int]:
    """The leaves that have elements among these positions."""
    if not index.size or index.max() < 0:
        return []
    low, high = index[index >= 0].min() if index.min() < 0 else index.min(), index.max()
    first = np.searchsorted(starts, low, side="right") - 1
    last = np.searchsorted(starts, high, side="right")
    ends = [*starts[1:], np.inf]
    return [
        place
        for place in range(first, last)
        if chosen[place] and ((index >= starts[place]) & (index < ends[place])).any()
    ]


def _part(index: np.ndarray, stat: jax.Array, start: int, shape: tuple[int, ...]) -> _Part:
    size = math.prod(shape)
    inside = (index >= start) & (index < start + size)
    rows = np.arange(math.prod(index.shape[:2])).reshape(*index.shape[:2], 1)
    places = np.broadcast_to(rows, index.shape)[inside]
    positions = index[inside] - start
    table = np.full(size, -1, dtype=np.int64)
    table[positions] = places
    if np.count_nonzero(table >= 0) != positions.size:
        return _Part(None, (positions, places), stat)
    table = table.reshape(shape)
    for axis in range(len(shape)):
        first = np.take(table, [0], axis=axis)
        if (table == first).all():
            table = first
    return _Part(table.copy(), None, stat)


def _spread(part: _Part, shape: tuple[int, ...]) -> jax.Array:
    stat, table = part.stat.reshape(-1), part.table
    if table is None:
        positions, places = part.pairs
        total = jnp.zeros(math.prod(shape), stat.dtype)
        return total.at[positions].add(stat[places]).reshape(shape)
    found = stat[np.maximum(table, 0)]
    return found if (table >= 0).all() else jnp.where(table >= 0, found, jnp.zeros_like(found))


def _gram(part: _Part, shape: tuple[int, ...], name: str) -> tuple[jax.Array, tuple[int, ...]]:
    table = part.table
    batch, fan_in = part.stat.shape[:2]
    problem = ValueError(
        f"leaf {name!r} of shape {shape} has no single Gram matrix: its inputs differ between its "
        "outputs (a grouped convolution?), or it takes part in a product only in part. Leave it "
        "out with select=."
    )
    if table is None or (table < 0).any():
        raise problem
    group, column = table // fan_in, table % fan_in
    batch_axes = tuple(
        axis for axis in range(table.ndim) if (group != np.take(group, [0], axis=axis)).any()
    )
    order = (*batch_axes, *(axis for axis in range(table.ndim) if axis not in batch_axes))
    sizes = tuple(table.shape[axis] for axis in batch_axes)
    group, column = (x.transpose(order).reshape(math.prod(sizes), -1) for x in (group, column))
    if (group != group[:, :1]).any() or math.prod(sizes) > batch:
        raise problem
    used = tuple(axis for axis, length in enumerate(table.shape) if length > 1)
    in_order = np.arange(batch * fan_in).reshape(batch, fan_in)
    if np.array_equal(group * fan_in + column, in_order):
        gram = part.stat  # in order, as it nearly always is
    else:
        gram = part.stat[group[:, :1, None], column[:, :, None], column[:, None, :]]
    return gram.reshape(*sizes, *gram.shape[1:]), used
