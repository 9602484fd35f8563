"""The sparse layer of blocks: only those that keep anything are stored, and multiplied.

A sparse layer as those of :mod:`adaptivenet.pruning.condensed`, whose `apply`, `unpack` and
`stored_bytes` take it. The structure to prune with is `Block`; blocks of one input and 16 or more
outputs are a constant fan-in that groups of outputs share, and the fastest on a CPU.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from adaptivenet import trees
from adaptivenet.pruning.condensed.kernels import FEW, LANES, bilinear, wide, widened
from adaptivenet.pruning.condensed.layers import Layer, checked, unsigned

__all__ = ["BlockLayer", "block_matmul", "block_product", "pack_blocks"]


@trees.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockLayer(Layer):
    """Only the blocks of a kernel that keep anything are stored, the same number in every column.

    Forward and backward passes cost what the blocks stored cost. Blocks of one input and many
    outputs are a constant fan-in that groups of outputs share.

    Attributes:
      values: ``[block columns, kept, b, c]``; columns with fewer blocks are padded with zeros,
        whose gradient is zero.
      indices: ``[block columns, kept]``, unsigned, the block of inputs of each, in ascending order;
        the number of blocks of inputs at a padding.
      shape: (inputs, outputs).

    References:
      Gray et al., "GPU kernels for block-sparse weights", 2017.
    """

    indices: jax.Array

    def product(self, values: jax.Array, x: jax.Array) -> jax.Array:
        """Gathers the inputs of every block, and multiplies."""
        return bilinear(block_product, block_matmul, values, x, self.indices)

    def kernel(self) -> jax.Array:
        """Scatters the blocks."""
        columns, _, height, width = self.values.shape
        inputs, outputs = self.shape
        # One row of blocks more, in which the paddings land.
        blocks = jnp.zeros((columns, inputs // height + 1, height, width), self.values.dtype)
        places = jnp.arange(columns, dtype=jnp.int32)[:, None]
        blocks = blocks.at[places, self.indices.astype(jnp.int32)].add(self.values)
        return blocks[:, :-1].transpose(1, 2, 0, 3).reshape(inputs, outputs)


def pack_blocks(kernel: Any, block: tuple[int, int], mask: Any = None) -> BlockLayer:
    """Packs the blocks of a kernel that keep anything.

    A block is stored whole: what was pruned within one that is kept trains on from zero.

    Args:
      kernel: floating, ``[inputs, outputs]``.
      block: (b, c), inputs and outputs of a block, which divide those of the kernel.
      mask: bool like the kernel, what was kept; by default what is not zero.

    Returns:
      The layer.

    Raises:
      TypeError: a kernel that is not floating, or that is traced.
      ValueError: a kernel of other than two dimensions, a mask of another shape, or a block that
        does not divide the kernel.

    >>> kernel = jnp.array([[1.0, 0.0], [2.0, 0.0], [0.0, 0.0], [0.0, 3.0]])
    >>> layer = pack_blocks(kernel, (2, 1))
    >>> layer.values[..., 0].tolist(), layer.indices.tolist()
    ([[[1.0, 2.0]], [[0.0, 3.0]]], [[0], [1]])
    """
    dense, kept = checked(kernel, mask)
    height, width = block
    if height < 1 or width < 1 or dense.shape[0] % height or dense.shape[1] % width:
        raise ValueError(
            f"blocks of {height} inputs and {width} outputs do not divide a kernel of shape "
            f"{dense.shape}: choose a block that does, or pad the kernel with zeros."
        )
    rows, columns = dense.shape[0] // height, dense.shape[1] // width

    def by_column(array: np.ndarray) -> np.ndarray:
        return array.reshape(rows, height, columns, width).transpose(2, 0, 1, 3)

    alive = by_column(kept).any(axis=(2, 3))
    counts = alive.sum(axis=1)
    most = max(int(counts.max(initial=0)), 1)
    column, row = np.nonzero(alive)
    places = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    none = rows if (counts < most).any() else 0
    indices = np.full((columns, most), none, unsigned(none or rows - 1))
    indices[column, places] = row
    weights = by_column(np.where(kept, dense, np.zeros_like(dense)))
    values = np.zeros((columns, most, height, width), dense.dtype)
    values[column, places] = weights[column, row]
    return BlockLayer(jnp.asarray(values), jnp.asarray(indices), shape=dense.shape)


def block_matmul(values: jax.Array, x: jax.Array, indices: jax.Array) -> jax.Array:
    """Products with blocks of a kernel: the inputs of each are gathered, then one batched matmul.

    Args:
      values: ``[columns, kept, inputs of a block, outputs of a block]``.
      x: ``[batch, inputs]``, of the same dtype.
      indices: integers ``[columns, kept]``, the block of inputs of each; the number of blocks of
        inputs stands for none.

    Returns:
      ``[batch, columns * outputs of a block]``.

    >>> values, indices = jnp.ones((1, 1, 2, 1)), jnp.array([[1]])
    >>> block_matmul(values, jnp.array([[1.0, 2.0, 3.0, 4.0]]), indices).tolist()
    [[7.0]]
    """
    columns, kept, height, width = values.shape
    batch, inputs = x.shape
    # The row of zeros is what an index of no block gathers, and the padding keeps XLA
    # from computing the inputs anew for every block.
    blocks = jnp.pad(x.reshape(batch, inputs // height, height), ((0, 0), (0, 1), (0, 0)))
    gathered = blocks.at[:, indices.astype(jnp.int32)].get(mode="promise_in_bounds")
    gathered = gathered.transpose(1, 0, 2, 3).reshape(columns, batch, kept * height)
    product = jnp.matmul(
        gathered,
        values.reshape(columns, kept * height, width),
        preferred_element_type=wide(x.dtype),
    )
    return product.transpose(1, 0, 2).reshape(batch, columns * width).astype(x.dtype)


def block_product(values: jax.Array, x: jax.Array, indices: jax.Array) -> jax.Array:
    """What :func:`block_matmul` computes, by the faster of two ways.

    Args:
      values: as for :func:`block_matmul`.
      x: as for :func:`block_matmul`.
      indices: as for :func:`block_matmul`.

    Returns:
      As :func:`block_matmul`; 16-bit floats are added up in 32 bits.

    >>> values, indices = jnp.ones((1, 1, 2, 1)), jnp.array([[1]])
    >>> block_product(values, jnp.array([[1.0, 2.0, 3.0, 4.0]]), indices).tolist()
    [[7.0]]
    """
    _, _, height, width = values.shape
    batch = x.shape[0]
    # A matmul of small blocks costs more in calls than in arithmetic.
    small = width < LANES or (batch > FEW and height > 1 and height * width <= LANES**2)
    if not small:
        return block_matmul(values, x, indices)
    x_wide, places = widened(x), indices.astype(jnp.int32)
    if batch > FEW:
        return _blocks_by_rows(values, x_wide, places).astype(x.dtype)
    return jnp.stack([_blocks_of_one(values, row, places) for row in x_wide]).astype(x.dtype)


def _blocks_by_rows(values: jax.Array, x: jax.Array, indices: jax.Array) -> jax.Array:
    columns, kept, height, width = values.shape
    batch, inputs = x.shape
    table = jnp.pad(x, ((0, 0), (0, height))).T.reshape(inputs // height + 1, height, batch)

    def add_blocks(place: jax.Array, sums: jax.Array) -> jax.Array:
        weights = widened(lax.dynamic_index_in_dim(values, place, 1, keepdims=False))
        chosen = lax.dynamic_index_in_dim(indices, place, 1, keepdims=False)
        rows = table.at[chosen].get(mode="promise_in_bounds")
        for row in range(height):
            sums = sums + rows[:, row, None, :] * weights[:, row, :, None]
        return sums

    sums = lax.fori_loop(0, kept, add_blocks, jnp.zeros((columns, width, batch), x.dtype))
    return sums.reshape(columns * width, batch).T


def _blocks_of_one(values: jax.Array, x: jax.Array, indices: jax.Array) -> jax.Array:
    columns, kept, height, width = values.shape
    table = jnp.pad(x.reshape(-1, height), ((0, 1), (0, 0)))

    def add_blocks(place: jax.Array, sums: jax.Array) -> jax.Array:
        weights = widened(lax.dynamic_index_in_dim(values, place, 1, keepdims=False))
        chosen = lax.dynamic_index_in_dim(indices, place, 1, keepdims=False)
        rows = table.at[chosen].get(mode="promise_in_bounds")
        for row in range(height):
            sums = sums + rows[:, row, None] * weights[:, row]
        return sums

    sums = lax.fori_loop(0, kept, add_blocks, jnp.zeros((columns, width), x.dtype))
    return sums.reshape(columns * width)
