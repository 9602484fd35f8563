"""The sparse layer of n:m structures: of every m consecutive inputs, n are stored.

A sparse layer as those of :mod:`adaptivenet.pruning.condensed`, whose `apply`, `unpack` and
`stored_bytes` take it. At n/m of a half, as 2:4, it saves memory and no time on a CPU.
"""

from __future__ import annotations

import dataclasses
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
from adaptivenet.pruning.condensed.layers import Layer, checked, unsigned

__all__ = ["NofMLayer", "pack_nofm"]


@trees.register_dataclass
@dataclasses.dataclass(frozen=True)
class NofMLayer(Layer):
    """Of every m consecutive inputs of an output n are stored: 2:4 and its kin.

    Attributes:
      values: ``[outputs, inputs / m * n]``, group by group; zeros fill up a group with fewer.
      positions: uint8 like the values, the place of each within its group; no place is taken
        twice, and so a zero that fills up a group trains on like any other weight.
      n: how many of each group are stored.
      m: size of the groups.
      shape: (inputs, outputs).

    References:
      Mishra et al., "Accelerating sparse deep neural networks", arXiv:2104.08378.
    """

    positions: jax.Array
    n: int = dataclasses.field(metadata={"static": True}, kw_only=True)
    m: int = dataclasses.field(metadata={"static": True}, kw_only=True)

    @property
    def indices(self) -> jax.Array:
        """The input of each value, ``[outputs, inputs / m * n]``."""
        dtype = unsigned(self.shape[0] - 1)
        firsts = np.arange(self.positions.shape[-1]) // self.n * self.m
        return self.positions.astype(dtype) + firsts.astype(dtype)

    def product(self, values: jax.Array, x: jax.Array) -> jax.Array:
        """Gathers the inputs of every weight."""
        return bilinear(gathered_product, transposable_product, values, x, self.indices)

    def kernel(self) -> jax.Array:
        """Scatters the values."""
        return scatter(self.values, self.indices, self.shape[0])


def pack_nofm(kernel: Any, n: int, m: int, mask: Any = None) -> NofMLayer:
    """Packs a kernel that keeps at most n of every m consecutive inputs of each output.

    Args:
      kernel: floating, ``[inputs, outputs]``.
      n: how many to store of each group.
      m: size of the groups, at most 256; it divides the inputs.
      mask: bool like the kernel, what was kept; by default what is not zero.

    Returns:
      The layer.

    Raises:
      TypeError: a kernel that is not floating, or that is traced.
      ValueError: a kernel of other than two dimensions, a mask of another shape, inputs that m does
        not divide, or a group that keeps more than n.

    >>> layer = pack_nofm(jnp.array([[0.0], [1.0], [2.0], [0.0]]), 1, 2)
    >>> layer.values.tolist(), layer.positions.tolist()
    ([[1.0, 2.0]], [[1, 0]])
    """
    dense, kept = checked(kernel, mask)
    inputs, outputs = dense.shape
    if not 1 <= n <= m <= 256:
        raise ValueError(f"n of m needs 1 <= n <= m <= 256, not n={n} and m={m}.")
    if inputs % m:
        raise ValueError(
            f"the {inputs} inputs of a kernel of shape {dense.shape} are not divisible by m={m}: "
            "choose another m, or pad the kernel with rows of zeros."
        )
    groups = kept.T.reshape(outputs, inputs // m, m)
    counts = groups.sum(axis=-1)
    if (counts > n).any():
        output, group = (int(place) for place in np.argwhere(counts > n)[0])
        raise ValueError(
            f"output {output} keeps {int(counts[output, group])} of inputs {group * m} to "
            f"{group * m + m - 1} (group {group}), not at most {n} of {m}: prune with the "
            f"structure NofM({n}, {m}), or pack in another format."
        )
    # Those kept first, and then as many others as are missing; in the order of the inputs.
    order = np.argsort(~groups, axis=-1, kind="stable")[..., :n]
    order = np.sort(order, axis=-1)
    weights = np.where(kept, dense, np.zeros_like(dense)).T.reshape(groups.shape)
    values = np.take_along_axis(weights, order, axis=-1).reshape(outputs, inputs // m * n)
    positions = order.astype(np.uint8).reshape(values.shape)
    return NofMLayer(jnp.asarray(values), jnp.asarray(positions), n=n, m=m, shape=(inputs, outputs))
