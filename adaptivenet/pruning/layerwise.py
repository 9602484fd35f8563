"""Layer-wise optimal brain surgeon: one-shot pruning that repairs the weights it keeps.

A layer is pruned so that its outputs on calibration inputs X change least, ``||X (W - W')||^2 =
trace((W - W')^T H (W - W'))`` with the Gram matrix ``H = X^T X``. Inputs are pruned in their order;
removing a weight moves those behind it so that they make up for it. All outputs share one factor
of H, so that a layer with 4,096 inputs and outputs takes well under a minute on two CPU cores.

This is a plain function of arrays, outside the training loop. Grams of a later layer should be
captured after the layers before it are pruned.
"""

from __future__ import annotations

import difflib
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet import selection, trees
from adaptivenet.counts import Share, as_count, as_share, part
from adaptivenet.pruning.schedules import Number, check_sparsity, known

PyTree = Any
NofM = tuple[int, int]

__all__ = ["Pruned", "obs", "obs_tree", "output_error", "refit"]


class Pruned(NamedTuple):
    """What :func:`obs` and :func:`obs_tree` return.

    Attributes:
      params: the new weight, or pytree of parameters; exactly zero where cut.
      mask: bool, True where a weight was kept; masked nodes for leaves that were not pruned.
    """

    params: PyTree
    mask: PyTree


def obs(
    weight: jax.Array,
    gram: jax.Array,
    sparsity: Number | None = None,
    *,
    structure: NofM | None = None,
    mask: jax.Array | None = None,
    block: int = 128,
    damping: Number = 0.01,
    refine: int = 0,
) -> Pruned:
    """Prunes one kernel with optimal-brain-surgeon updates of the weights kept (SparseGPT).

    Exactly one of ``sparsity``, ``structure`` and ``mask`` says what is cut. With a sparsity, each
    block of inputs loses the same share of its weights: those of least ``w^2 / [F^-1]_ii``, where F
    is the Gram matrix of the inputs not yet passed, and w has been updated for all that was cut in
    the blocks before. With a diagonal Gram matrix nothing is updated, and with the identity and a
    single block the result is magnitude pruning.

    Weights before the one cut are not moved any more, which is what makes the method fast;
    ``refine`` moves all that were kept towards the optimum for the mask that was found.

    Args:
      weight: floating kernel, inputs before outputs: ``[in, out]``, a convolution's ``[H, W, I,
        O]``, or any shape whose leading axes make up the inputs.
      gram: ``[in, in]``, ``X^T X`` of the layer's inputs (or its mean over samples). For a
        convolution these are patches, flattened like the leading axes of the kernel.
      sparsity: share of the weights to cut, in [0, 1), possibly traced; the count is exact.
      structure: (n, m) keeps the best n of every m consecutive inputs of each output, chosen when
        their turn comes.
      mask: bool like ``weight``, the weights to keep.
      block: inputs among which a sparsity is shared out evenly, and which are updated at once. With
        a structure, rounded up to a multiple of m.
      damping: added to the diagonal of the Gram matrix, as a share of its mean; >= 0.
      refine: steps of :func:`refit` afterwards; each costs one product with the Gram matrix.

    Returns:
      The new weight, of the same shape and dtype (all arithmetic is float32), and its mask. Inputs
      that are always zero are pruned first; weights kept there are left as they are.

    Raises:
      ValueError: not exactly one rule, shapes that do not fit, a sparsity outside [0, 1), an m that
        does not divide the inputs, or a negative damping.

    References:
      Hassibi and Stork, "Second order derivatives for network pruning: optimal brain surgeon",
      NIPS 1992; Frantar and Alistarh, "SparseGPT: massive language models can be accurately pruned
      in one-shot", ICML 2023, algorithm 1.

    >>> twins = jnp.array([[1.0, 1.0], [1.0, 1.0]])  # two inputs that are always equal
    >>> new, mask = obs(jnp.array([[1.0], [2.0]]), twins, 0.5, damping=1e-5)
    >>> new.round(2).tolist(), mask.tolist()
    ([[0.0], [3.0]], [[False], [True]])
    """
    if sum(rule is not None for rule in (sparsity, structure, mask)) != 1:
        raise ValueError("give exactly one of sparsity=, structure= and mask=.")
    weight, gram = jnp.asarray(weight), jnp.asarray(gram)
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(f"weight must be floating, not {weight.dtype}.")
    inputs = _inputs(weight.shape, gram.shape)
    if block < 1:
        raise ValueError(f"block must be a number of inputs >= 1, not {block}.")
    _check_damping(damping)
    if refine < 0:
        raise ValueError(f"refine must be a number of steps >= 0, not {refine}.")
    if structure is not None:
        n, m = structure
        if not 0 < n <= m:
            raise ValueError(f"structure=({n}, {m}) must keep n of m with 0 < n <= m.")
        if inputs % m:
            raise ValueError(f"structure=({n}, {m}): {m} does not divide the {inputs} inputs.")
        block = -(-block // m) * m
    if sparsity is not None:
        check_sparsity(sparsity, "sparsity")
        sparsity = as_share(sparsity)
    if mask is not None:
        if jnp.shape(mask) != weight.shape:
            raise ValueError(f"mask has shape {jnp.shape(mask)}, not {weight.shape}.")
        mask = jnp.asarray(mask).astype(bool).reshape(inputs, -1)
    if weight.size > trees.LARGEST_LEAF:
        raise ValueError(f"a weight has at most {trees.LARGEST_LEAF} elements, not {weight.size}.")
    trees.check_finite({"weight": weight, "gram": gram}, "argument")
    new, kept = _prune(
        weight.reshape(inputs, -1), gram, sparsity, mask, damping, structure=structure, block=block
    )
    if known(new) and not bool(jnp.all(jnp.isfinite(new))):
        raise ValueError(
            f"the Gram matrix, damped by {damping}, is not positive definite in float32 (inputs "
            "that depend on each other, or fewer samples than inputs): raise damping=."
        )
    new, kept = new.reshape(weight.shape), kept.reshape(weight.shape)
    if refine:
        new = refit(weight, kept, gram, start=new, steps=refine, damping=damping)
    return Pruned(new, kept)


def _inputs(shape: tuple[int, ...], gram: tuple[int, ...]) -> int:
    """The number of inputs: leading axes of the kernel that make up the Gram matrix."""
    if len(gram) != 2 or gram[0] != gram[1]:
        raise ValueError(f"gram must be a square matrix [in, in], not of shape {gram}.")
    if not any(math.prod(shape[:axes]) == gram[0] for axes in range(1, len(shape))):
        raise ValueError(
            f"gram of shape {gram} does not fit a weight of shape {shape}: the leading axes of the "
            "weight must make up its rows (inputs before outputs)."
        )
    return gram[0]


def _check_damping(damping: Number) -> None:
    if known(damping) and not np.all(np.asarray(damping) >= 0):
        raise ValueError(f"damping must be >= 0, not {damping}.")


def _damped(gram: jax.Array, dead: jax.Array, damping: Any) -> jax.Array:
    """The Gram matrix with a larger diagonal; inputs that are always zero stand by themselves."""
    size = gram.shape[0]
    diagonal = jnp.diagonal(gram)
    # The mean over inputs that are alive, so that dead ones do not weaken the damping.
    alive = jnp.maximum(size - jnp.sum(dead, dtype=jnp.int32), 1).astype(jnp.float32)
    extra = jnp.asarray(damping).astype(jnp.float32) * jnp.sum(diagonal) / alive
    diagonal = jnp.where(dead, jnp.float32(1), diagonal + extra)
    places = jnp.arange(size)
    return gram.at[places, places].set(diagonal)


def _factor(damped: jax.Array) -> jax.Array:
    """The upper triangular U with ``U^T U = H^-1``, without forming the inverse.

    Row i of U holds, from i on, the update that removing input i asks of those behind it.
    """
    # With H reversed as M M^T, H = R R^T for the upper R = M reversed, and U is R^-1. The inverse
    # of a factor keeps twice the digits that the factor of an inverse would.
    factor = jnp.linalg.cholesky(damped[::-1, ::-1], symmetrize_input=False)[::-1, ::-1]
    return jax.lax.linalg.triangular_solve(
        factor, jnp.eye(damped.shape[0], dtype=jnp.float32), left_side=True, lower=False
    )


@functools.partial(jax.jit, static_argnames=("structure", "block"))
def _prune(
    weight: jax.Array,
    gram: jax.Array,
    sparsity: Share | None,
    keep: jax.Array | None,
    damping: Any,
    *,
    structure: NofM | None,
    block: int,
) -> tuple[jax.Array, jax.Array]:
    inputs, outputs = weight.shape
    gram = gram.astype(jnp.float32)
    dead = jnp.diagonal(gram) <= 0
    upper = _factor(_damped(gram, dead, damping))
    block = min(block, inputs)
    blocks = -(-inputs // block)
    padding = blocks * block - inputs
    group = structure[1] if structure is not None else block

    # Rows that fill up the last block have weight zero, and nobody is updated for them.
    rows = jnp.pad(weight.astype(jnp.float32), ((0, padding), (0, 0)))
    upper = jnp.pad(upper, ((0, padding), (0, padding)))
    pivots = jnp.where(jnp.arange(blocks * block) < inputs, jnp.diagonal(upper), jnp.float32(1))
    dead = jnp.pad(dead, (0, padding), constant_values=True)
    given = None if keep is None else jnp.pad(keep, ((0, padding), (0, 0)))

    def choose(values: jax.Array, first: jax.Array) -> jax.Array:
        """Which weights of a group of inputs, from the first on, to keep."""
        if given is not None:
            return jax.lax.dynamic_slice_in_dim(given, first, group)
        pivot = jax.lax.dynamic_slice_in_dim(pivots, first, group)
        unseen = jax.lax.dynamic_slice_in_dim(dead, first, group)
        # The root of w^2 / U_ii^2: of the same order, and it neither overflows nor vanishes.
        score = jnp.where(unseen[:, None], jnp.float32(0), jnp.abs(values) / pivot[:, None])
        if structure is not None:
            return _best(score, structure[0])
        assert sparsity is not None
        real = first + jnp.arange(group, dtype=jnp.int32) < inputs
        # What is cut up to a block is rounded, not what is cut in it: the total is exact.
        before, after = (
            as_count(jnp.minimum(first + more, inputs).astype(jnp.uint32) * jnp.uint32(outputs))
            for more in (0, group)
        )
        cut = part(sparsity, after) - part(sparsity, before)
        where = jnp.broadcast_to(real[:, None], score.shape)
        return selection.top_mask(score, (after - before) - cut, where=where)

    def prune_block(rows: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
        here = jax.lax.dynamic_slice_in_dim(rows, first, block)
        ahead = jax.lax.dynamic_slice_in_dim(upper, first, block)
        inner = jax.lax.dynamic_slice_in_dim(ahead, first, block, axis=1)

        def prune_row(row: jax.Array, state: Any) -> Any:
            here, kept, errors = state
            value = here[row]
            error = jnp.where(kept[row], jnp.float32(0), value / pivots[first + row])
            # Earlier rows are not touched: their entries in U are zero.
            here = here - inner[row][:, None] * error
            here = here.at[row].set(jnp.where(kept[row], value, jnp.float32(0)))
            return here, kept, errors.at[row].set(error)

        def prune_group(place: jax.Array, state: Any) -> Any:
            here, kept, errors = state
            start = place * group
            chosen = choose(jax.lax.dynamic_slice_in_dim(here, start, group), first + start)
            kept = jax.lax.dynamic_update_slice_in_dim(kept, chosen, start, axis=0)
            return jax.lax.fori_loop(start, start + group, prune_row, (here, kept, errors))

        state = (here, jnp.zeros(here.shape, bool), jnp.zeros_like(here))
        here, kept, errors = jax.lax.fori_loop(0, block // group, prune_group, state)
        # What lies behind the block is updated once for all of its rows.
        behind = jnp.arange(blocks * block) >= first + block
        rows = rows - jnp.where(behind, ahead, jnp.float32(0)).T @ errors
        rows = jax.lax.dynamic_update_slice_in_dim(rows, here, first, axis=0)
        return rows, kept

    firsts = jnp.arange(0, blocks * block, block, dtype=jnp.int32)
    with jax.default_matmul_precision("highest"):
        rows, kept = jax.lax.scan(prune_block, rows, firsts)
    mask = kept.reshape(blocks * block, outputs)[:inputs]
    return jnp.where(mask, rows[:inputs], jnp.float32(0)).astype(weight.dtype), mask


def _best(score: jax.Array, number: int) -> jax.Array:
    """The largest of each column, as many as given; of equals the first."""
    place = jnp.arange(score.shape[0])
    earlier = (place[:, None] < place)[:, :, None]
    beaten = (score[:, None] > score) | ((score[:, None] == score) & earlier)
    return jnp.sum(beaten, axis=0, dtype=jnp.int32) < number


def refit(
    weight: jax.Array,
    mask: jax.Array,
    gram: jax.Array,
    *,
    start: jax.Array | None = None,
    steps: int = 32,
    damping: Number = 0.01,
) -> jax.Array:
    """Moves the weights kept towards those that change a layer's outputs least, for a given mask.

    Conjugate gradients on ``trace((W - W')^T H (W - W'))`` over all W' that are zero where the mask
    is False; the damped error falls with every step, and is least after as many steps as inputs.

    Args:
      weight: floating kernel before pruning, inputs before outputs, as for :func:`obs`.
      mask: bool like ``weight``, the weights kept.
      gram: ``[in, in]``, ``X^T X``.
      start: the pruned weight to start from; ``weight`` under the mask by default.
      steps: of conjugate gradients; each costs one product with the Gram matrix.
      damping: as for :func:`obs`; it draws the weights towards those before pruning.

    Returns:
      The new weight, like ``weight``; exactly zero where the mask is False.

    Raises:
      ValueError: shapes that do not fit, or a negative damping.

    References:
      Meng et al., "ALPS: improved optimization for highly sparse one-shot pruning for large
      language models", NeurIPS 2024, section 3.3 and algorithm 2.

    >>> gram = jnp.array([[2.0, 1.0], [1.0, 2.0]])
    >>> mask = jnp.array([[True], [False]])
    >>> refit(jnp.array([[1.0], [1.0]]), mask, gram, steps=2, damping=0.0).tolist()
    [[1.5], [0.0]]
    """
    weight, gram, mask = jnp.asarray(weight), jnp.asarray(gram), jnp.asarray(mask)
    inputs = _inputs(weight.shape, gram.shape)
    _check_damping(damping)
    start = weight if start is None else jnp.asarray(start)
    for name, other in (("mask", mask), ("start", start)):
        if other.shape != weight.shape:
            raise ValueError(f"{name} has shape {other.shape}, not {weight.shape}.")
    flat = [leaf.reshape(inputs, -1) for leaf in (weight, mask.astype(bool), start)]
    return _refit(*flat, gram, steps, damping).reshape(weight.shape)


@jax.jit
def _refit(
    weight: jax.Array, mask: jax.Array, start: jax.Array, gram: jax.Array, steps: Any, damping: Any
) -> jax.Array:
    gram = gram.astype(jnp.float32)
    damped = _damped(gram, jnp.diagonal(gram) <= 0, damping)
    scale = 1.0 / jnp.diagonal(damped)[:, None]
    zero = jnp.float32(0)
    wide = weight.astype(jnp.float32)

    def inner(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(a * b, axis=0)

    def divide(a: jax.Array, b: jax.Array) -> jax.Array:
        # A column that has arrived stays where it is.
        return jnp.where(b > 0, a / jnp.where(b > 0, b, jnp.float32(1)), zero)

    def descend(_: Any, state: Any) -> Any:
        current, residual, direction, size = state
        image = jnp.where(mask, damped @ direction, zero)
        stride = divide(size, inner(direction, image))
        current, residual = current + stride * direction, residual - stride * image
        scaled = scale * residual
        again = inner(residual, scaled)
        return current, residual, scaled + divide(again, size) * direction, again

    with jax.default_matmul_precision("highest"):
        current = jnp.where(mask, start.astype(jnp.float32), zero)
        residual = jnp.where(mask, damped @ (wide - current), zero)
        scaled = scale * residual
        state = (current, residual, scaled, inner(residual, scaled))
        current = jax.lax.fori_loop(0, steps, descend, state)[0]
    return jnp.where(mask, current, zero).astype(weight.dtype)


def output_error(
    weight: jax.Array, pruned: jax.Array, gram: jax.Array, *, relative: bool = False
) -> jax.Array:
    """How far a layer's outputs on the calibration inputs move: ``||X (W - W')||^2``.

    Args:
      weight: kernel, inputs before outputs, as for :func:`obs`.
      pruned: the kernel it is replaced with, of the same shape.
      gram: ``[in, in]``, ``X^T X``.
      relative: as a share of ``||X W||^2``.

    Returns:
      Float32 scalar, >= 0 up to rounding.

    Raises:
      ValueError: the shapes do not fit.

    >>> output_error(jnp.array([[1.0], [2.0]]), jnp.array([[0.0], [2.0]]), 4 * jnp.eye(2)).item()
    4.0
    """
    if jnp.shape(weight) != jnp.shape(pruned):
        raise ValueError(f"pruned has shape {jnp.shape(pruned)}, not {jnp.shape(weight)}.")
    inputs = _inputs(jnp.shape(weight), jnp.shape(gram))
    gram = jnp.asarray(gram).astype(jnp.float32)

    def energy(matrix: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return jnp.sum(matrix * (gram @ matrix))

    flat = jnp.asarray(weight).astype(jnp.float32).reshape(inputs, -1)
    error = energy(flat - jnp.asarray(pruned).astype(jnp.float32).reshape(inputs, -1))
    return error / energy(flat) if relative else error


def obs_tree(
    params: PyTree,
    grams: PyTree,
    sparsity: Number | None = None,
    *,
    structure: NofM | None = None,
    masks: PyTree | None = None,
    block: int = 128,
    damping: Number = 0.01,
    refine: int = 0,
) -> Pruned:
    """Prunes every kernel of a pytree whose Gram matrix is given, each by :func:`obs`.

    Args:
      params: pytree of arrays.
      grams: Gram matrices ``[in, in]`` by path: a dict such as ``{"dense1/kernel": H}``, or a
        pytree that has the paths of ``params`` where there is one (masked nodes or nothing
        elsewhere). Leaves without one stay as they are.
      sparsity: as for :func:`obs`, of each kernel.
      structure: as for :func:`obs`.
      masks: pytree of bool, the weights to keep, as any allocation may have shared them out; masked
        nodes where there is no Gram matrix.
      block: as for :func:`obs`.
      damping: as for :func:`obs`.
      refine: as for :func:`obs`.

    Returns:
      The new parameters, and the mask with masked nodes for leaves that were not pruned.

    Raises:
      ValueError: as :func:`obs`, with the path; no Gram matrix, or one for a path that is no leaf.

    >>> params = {"dense": {"kernel": jnp.array([[1.0], [2.0]]), "bias": jnp.ones(1)}}
    >>> new, mask = obs_tree(params, {"dense/kernel": jnp.eye(2)}, 0.5)
    >>> new["dense"]["kernel"].tolist(), trees.paths(mask)
    ([[0.0], [2.0]], ('dense/kernel',))
    """
    leaves, treedef = jax.tree.flatten(params)
    names = trees.paths(params)
    given = dict(zip(trees.paths(grams), jax.tree.leaves(grams), strict=True))
    keep = (
        {} if masks is None else dict(zip(trees.paths(masks), jax.tree.leaves(masks), strict=True))
    )
    if not given:
        raise ValueError("grams holds no Gram matrix; capture those of the layers to prune.")
    for name in (*given, *keep):
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name!r} is no leaf of the parameters.{hint}")
    if masks is not None and keep.keys() != given.keys():
        odd = ", ".join(sorted(keep.keys() ^ given.keys()))
        raise ValueError(f"masks and grams must name the same leaves; only one of them has: {odd}.")
    new, cut = list(leaves), [optax.MaskedNode() for _ in leaves]
    for place, name in enumerate(names):
        if name not in given:
            continue
        try:
            new[place], cut[place] = obs(
                leaves[place],
                given[name],
                sparsity,
                structure=structure,
                mask=keep.get(name),
                block=block,
                damping=damping,
                refine=refine,
            )
        except ValueError as error:
            raise ValueError(f"leaf {name!r}: {error}") from error
    return Pruned(jax.tree.unflatten(treedef, new), jax.tree.unflatten(treedef, cut))
