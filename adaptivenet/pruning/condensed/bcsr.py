"""The sparse layer of any mask: compressed sparse rows.

A sparse layer as those of :mod:`adaptivenet.pruning.condensed`, whose `apply`, `unpack` and
`stored_bytes` take it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse

from adaptivenet import trees
from adaptivenet.pruning.condensed.kernels import bilinear, widened
from adaptivenet.pruning.condensed.layers import Layer, checked

__all__ = ["BCSRLayer", "pack_bcsr"]


@trees.register_dataclass
@dataclasses.dataclass(frozen=True)
class BCSRLayer(Layer):
    """Compressed sparse rows of the transposed kernel, multiplied by `jax.experimental.sparse`.

    Attributes:
      values: ``[stored]``, output by output.
      indices: ``[stored]``, int32, the input of each, in ascending order within an output.
      starts: ``[outputs + 1]``, int32, where the values of each output begin.
      shape: (inputs, outputs).
    """

    indices: jax.Array
    starts: jax.Array

    def product(self, values: jax.Array, x: jax.Array) -> jax.Array:
        """A product of sparse rows with the transposed inputs."""
        return bilinear(_bcsr_product, _bcsr_through_dense, values, x, (self.indices, self.starts))

    def kernel(self) -> jax.Array:
        """Scatters the values."""
        return _bcsr_dense(self.values, self.shape[0], self.indices, self.starts)


def _bcsr_product(values: jax.Array, x: jax.Array, places: Any) -> jax.Array:
    # The kernel of the library knows no 16-bit floats.
    shape = (places[1].shape[0] - 1, x.shape[1])
    matrix = sparse.BCSR(
        (widened(values), *places), shape=shape, indices_sorted=True, unique_indices=True
    )
    return (matrix @ widened(x).T).T.astype(x.dtype)


def _bcsr_dense(values: jax.Array, inputs: int, indices: jax.Array, starts: jax.Array) -> jax.Array:
    outputs = starts.shape[0] - 1
    rows = jnp.repeat(
        jnp.arange(outputs, dtype=jnp.int32),
        jnp.diff(starts),
        total_repeat_length=values.shape[0],
    )
    return jnp.zeros((outputs, inputs), values.dtype).at[rows, indices].add(values).T


def _bcsr_through_dense(values: jax.Array, x: jax.Array, places: Any) -> jax.Array:
    return x @ _bcsr_dense(values, x.shape[1], *places)


def pack_bcsr(kernel: Any, mask: Any = None) -> BCSRLayer:
    """Packs a kernel as compressed sparse rows, one for each output.

    Args:
      kernel: floating, ``[inputs, outputs]``.
      mask: bool like the kernel, what was kept; by default what is not zero.

    Returns:
      The layer.

    Raises:
      TypeError: a kernel that is not floating, or that is traced.
      ValueError: a kernel of other than two dimensions, or a mask of another shape.

    >>> layer = pack_bcsr(jnp.array([[1.0, 0.0], [2.0, 3.0]]))
    >>> layer.values.tolist(), layer.indices.tolist(), layer.starts.tolist()
    ([1.0, 2.0, 3.0], [0, 1, 1], [0, 2, 3])
    """
    dense, kept = checked(kernel, mask)
    rows, columns = np.nonzero(kept.T)
    starts = np.concatenate([[0], np.cumsum(kept.sum(axis=0))])
    return BCSRLayer(
        jnp.asarray(dense[columns, rows]),
        jnp.asarray(columns.astype(np.int32)),
        jnp.asarray(starts.astype(np.int32)),
        shape=dense.shape,
    )
