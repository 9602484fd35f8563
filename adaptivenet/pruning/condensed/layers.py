"""Sparse layers: pruned kernels that are stored, and multiplied, without their zeros.

A layer is packed from a dense kernel ``[inputs, outputs]`` and the mask of what was kept, outside
jit, as its shape depends on both. It is a pytree: `apply` multiplies a batch with it under jit,
vmap and grad, the gradient of ``layer.values`` is laid out as they are, so that training goes on
without the zeros, and `unpack` gives the kernel back exactly.

    layer = pack_fan_in(kernel, mask)
    loss = lambda values: jnp.sum(apply(dataclasses.replace(layer, values=values), x) ** 2)
    gradient = jax.grad(loss)(layer.values)

| layer | keeps |
|---|---|
| `FanInLayer` | the same number of inputs of every output |
| `NofMLayer` of :mod:`adaptivenet.pruning.condensed.nofm` | n of every m inputs |
| `BlockLayer` of :mod:`adaptivenet.pruning.condensed.blocks` | whole blocks |
| `BCSRLayer` of :mod:`adaptivenet.pruning.condensed.bcsr` | anything |
| `DenseLayer` | everything |

Which of them is faster than dense, if any, `choose` of :mod:`adaptivenet.pruning.condensed.choice`
measures. Backwards, blocks cost what is stored; the others, for more than a few samples, go through
a dense kernel. Give a batch to `apply` rather than to `jax.vmap`, which hides it from the layer.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet import trees
from adaptivenet.pruning.condensed.kernels import (
    bilinear,
    gathered_product,
    scatter,
    transposable_product,
)
from adaptivenet.pruning.schedules import known

__all__ = [
    "DenseLayer",
    "FanInLayer",
    "Layer",
    "apply",
    "pack_dense",
    "pack_fan_in",
    "stored_bytes",
    "unpack",
]


@dataclasses.dataclass(frozen=True)
class Layer:
    """Base of the sparse layers.

    Attributes:
      values: the weights stored, as the format lays them out.
      shape: (inputs, outputs) of the kernel.
    """

    values: jax.Array
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True}, kw_only=True)

    def product(self, values: jax.Array, x: jax.Array) -> jax.Array:
        """The product of ``x [batch, inputs]`` with weights of the same dtype; no axis is empty."""
        raise NotImplementedError

    def kernel(self) -> jax.Array:
        """The dense kernel ``[inputs, outputs]``."""
        raise NotImplementedError


def apply(layer: Layer, x: jax.Array) -> jax.Array:
    """Multiplies inputs with a sparse layer.

    Args:
      layer: a sparse layer.
      x: ``[..., inputs]``.

    Returns:
      ``[..., outputs]``, of the dtype of ``x @ kernel``. 16-bit floats are added up in 32 bits.

    Raises:
      ValueError: the last axis of x is not that of the inputs.

    >>> layer = pack_fan_in(jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]))
    >>> apply(layer, jnp.array([1.0, 10.0, 100.0])).tolist()
    [301.0, 20.0]
    """
    x = jnp.asarray(x)
    inputs, outputs = layer.shape
    if x.ndim == 0 or x.shape[-1] != inputs:
        raise ValueError(
            f"x has shape {x.shape}, and the layer takes [..., {inputs}]: its kernel has shape "
            f"{layer.shape}, inputs first."
        )
    dtype = jnp.result_type(layer.values, x)
    batch = math.prod(x.shape[:-1])
    if 0 in (batch, inputs, outputs, layer.values.size):
        return jnp.zeros((*x.shape[:-1], outputs), dtype)
    flat = x.reshape(batch, inputs).astype(dtype)
    product = layer.product(layer.values.astype(dtype), flat)
    return product.reshape(*x.shape[:-1], outputs)


def unpack(layer: Layer) -> jax.Array:
    """The dense kernel of a layer, zero wherever nothing is stored.

    Args:
      layer: a sparse layer.

    Returns:
      ``[inputs, outputs]``: what was packed, under its mask.

    >>> unpack(pack_fan_in(jnp.array([[1.0], [0.0]]))).tolist()
    [[1.0], [0.0]]
    """
    return layer.kernel()


def stored_bytes(layer: Layer) -> int:
    """Bytes of all arrays of a layer, indices among them.

    Args:
      layer: a sparse layer.

    Returns:
      Bytes in memory.

    >>> kernel = jnp.eye(4)
    >>> stored_bytes(pack_fan_in(kernel)), stored_bytes(pack_dense(kernel))
    (20, 64)
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layer))


@trees.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseLayer(Layer):
    """A dense kernel; the fallback, and the layer that others are measured against.

    It does not remember what was pruned: training on needs the mask in the optimizer.

    Attributes:
      values: ``[inputs, outputs]``.
      shape: (inputs, outputs).
    """

    def product(self, values: jax.Array, x: jax.Array) -> jax.Array:
        """A matrix product."""
        return x @ values

    def kernel(self) -> jax.Array:
        """The values themselves."""
        return self.values


def pack_dense(kernel: Any, mask: Any = None) -> DenseLayer:
    """A dense layer, zero where the mask is False.

    Args:
      kernel: floating, ``[inputs, outputs]``.
      mask: bool like the kernel, what was kept; by default what is not zero.

    Returns:
      The layer.

    Raises:
      TypeError: a kernel that is not floating, or that is traced.
      ValueError: a kernel of other than two dimensions, or a mask of another shape.

    >>> pack_dense(jnp.ones((1, 2)), jnp.array([[True, False]])).values.tolist()
    [[1.0, 0.0]]
    """
    dense, kept = checked(kernel, mask)
    return DenseLayer(jnp.asarray(np.where(kept, dense, np.zeros_like(dense))), shape=dense.shape)


@trees.register_dataclass
@dataclasses.dataclass(frozen=True)
class FanInLayer(Layer):
    """Every output stores the same number of inputs: constant fan-in, condensed.

    Attributes:
      values: ``[stored outputs, fan_in]``; outputs with fewer inputs are padded with zeros, whose
        gradient is zero. Outputs come first, so that the weights of each lie side by side.
      indices: ``[stored outputs, fan_in]``, unsigned, in ascending order; ``inputs`` at a padding.
      positions: ``[outputs]``, the row of each output, their number for one without inputs; None
        where all outputs are stored, in order.
      shape: (inputs, outputs).

    References:
      Lasby et al., "Dynamic sparse training with structured sparsity", ICLR 2024, for the condensed
      representation and the ablation of outputs.
    """

    indices: jax.Array
    positions: jax.Array | None = None

    def product(self, values: jax.Array, x: jax.Array) -> jax.Array:
        """Gathers the inputs of every weight."""
        product = bilinear(gathered_product, transposable_product, values, x, self.indices)
        return product if self.positions is None else _spread(product, self.positions)

    def kernel(self) -> jax.Array:
        """Scatters the values."""
        if self.values.size == 0:
            return jnp.zeros(self.shape, self.values.dtype)
        stored = scatter(self.values, self.indices, self.shape[0])
        return stored if self.positions is None else _spread(stored, self.positions)


def _spread(columns: jax.Array, positions: jax.Array) -> jax.Array:
    """Columns at their positions, zeros elsewhere."""
    return jnp.take(columns, positions, axis=1, mode="fill", fill_value=0)


def pack_fan_in(
    kernel: Any, mask: Any = None, *, fan_in: int | None = None, drop_empty: bool = True
) -> FanInLayer:
    """Packs a kernel by output, each with the same number of inputs.

    Args:
      kernel: floating, ``[inputs, outputs]``.
      mask: bool like the kernel, what was kept; by default what is not zero. A weight that is kept
        and zero, as one just woken, is stored only if the mask says so.
      fan_in: number of inputs to store of every output, at least that of the output with most,
        which is the default.
      drop_empty: whether outputs without inputs are left out, and written as zeros. (Layers that
        are to be stacked want the same arrays: give them one fan-in, and False here.)

    Returns:
      The layer.

    Raises:
      TypeError: a kernel that is not floating, or that is traced.
      ValueError: a kernel of other than two dimensions, a mask of another shape, or an output with
        more inputs than ``fan_in``.

    >>> layer = pack_fan_in(jnp.array([[1.0, 0.0, 0.0], [2.0, 0.0, 3.0]]))
    >>> layer.values.tolist(), layer.indices.tolist(), layer.positions.tolist()
    ([[1.0, 2.0], [3.0, 0.0]], [[0, 1], [1, 2]], [0, 2, 1])
    """
    dense, kept = checked(kernel, mask)
    inputs, outputs = dense.shape
    counts = kept.sum(axis=0)
    most = int(counts.max(initial=0))
    if fan_in is not None and fan_in < most:
        raise ValueError(
            f"output {int(counts.argmax())} keeps {most} inputs, more than fan_in={fan_in}: raise "
            "fan_in, or prune with the structure FanIn()."
        )
    terms = max(most if fan_in is None else fan_in, 1)
    empty = np.zeros(outputs, bool)
    if drop_empty and not counts.all():
        empty = counts == 0
        counts, dense, kept = counts[~empty], dense[:, ~empty], kept[:, ~empty]
    rows, columns = np.nonzero(kept.T)
    places = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    padded = bool((counts < terms).any())
    shape = (len(counts), terms)
    indices = np.full(shape, inputs if padded else 0, unsigned(inputs if padded else inputs - 1))
    indices[rows, places] = columns
    values = np.zeros(indices.shape, dense.dtype)
    values[rows, places] = dense[columns, rows]
    positions = None
    if empty.any():
        positions = np.full(outputs, len(counts), unsigned(len(counts)))
        positions[~empty] = np.arange(len(counts))
        positions = jnp.asarray(positions)
    return FanInLayer(jnp.asarray(values), jnp.asarray(indices), positions, shape=(inputs, outputs))


def unsigned(largest: int) -> Any:
    """The smallest unsigned dtype that holds a number."""
    return np.min_scalar_type(max(largest, 0))


def checked(kernel: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """The kernel and the mask as numpy arrays; raises as the packing functions do."""
    if not (known(kernel) and known(mask)):
        raise TypeError(
            "the kernel or the mask is traced: pack outside jit, vmap and grad (the shape of a "
            "sparse layer depends on the mask), and give the packed layer to the traced function."
        )
    dense = np.asarray(jnp.asarray(kernel))
    if not jnp.issubdtype(dense.dtype, jnp.floating):
        raise TypeError(f"the kernel holds {dense.dtype}: a sparse layer stores floats.")
    if dense.ndim != 2:
        raise ValueError(
            f"the kernel has shape {dense.shape}: a sparse layer takes [inputs, outputs]. Reshape "
            "that of a convolution, kernel.reshape(-1, kernel.shape[-1]), and its mask alike, and "
            "multiply patches laid out in that order."
        )
    kept = dense != 0 if mask is None else np.asarray(mask).astype(bool)
    if kept.shape != dense.shape:
        raise ValueError(f"mask has shape {kept.shape}, and the kernel {dense.shape}.")
    return dense, kept
