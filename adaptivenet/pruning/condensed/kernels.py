"""Products with gathered weights: the arithmetic under the sparse layers.

Plain JAX, laid out so that XLA's CPU backend compiles each to a tight loop. What a product costs
there is one load of an input and one of a weight for each synapse and, at batch sizes above a few,
one vector instruction for each synapse and eight or sixteen samples. Three things are paid for
dearly, and avoided here: a weight matrix that is walked down its columns (a stride of 4,096 bytes
evicts itself from the first cache), a sum that waits for its own last term, and an operand of a
gather that XLA computes anew for every element it gathers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

__all__ = ["bilinear", "gathered_product", "scatter", "transposable_product"]

# Products of up to this many samples run one by one; above, samples are the vector dimension.
FEW = 3
# Samples that are multiplied together, so that what is gathered stays in the second cache.
_TILE = 64
# Multiples that fill vector registers; compiled for 4 or 8 samples, a loop is slower than for 16.
LANES = 16


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def bilinear(fast: Callable, plain: Callable, values: Any, x: Any, places: Any) -> jax.Array:
    """A product that is linear in the weights and in the inputs, differentiated by another form.

    Args:
      fast: ``fast(values, x, places)``, which computes it.
      plain: the same product out of operations that JAX can transpose; its derivatives are used.
      values: the weights, floating.
      x: the inputs, floating.
      places: where the weights belong; pytree of integers.

    Returns:
      ``fast(values, x, places)``; both modes of differentiation work, of any order.

    >>> times = lambda values, x, places: values * x
    >>> jax.grad(bilinear, argnums=2)(times, times, 2.0, 3.0, None).item()
    3.0
    """
    del plain
    return fast(values, x, places)


def _bilinear_jvp(fast: Callable, plain: Callable, primals: Any, tangents: Any) -> Any:
    values, x, places = primals
    out = bilinear(fast, plain, values, x, places)
    terms = []
    if not isinstance(tangents[0], SymbolicZero):
        terms.append(plain(tangents[0], x, places))
    if not isinstance(tangents[1], SymbolicZero):
        terms.append(plain(values, tangents[1], places))
    return out, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(out)


bilinear.defjvp(_bilinear_jvp, symbolic_zeros=True)


def scatter(values: jax.Array, indices: jax.Array, inputs: int) -> jax.Array:
    """The dense kernel of weights that are stored by output.

    Args:
      values: ``[outputs, terms]``.
      indices: integers ``[outputs, terms]``, the input of each; those not below ``inputs`` belong
        to none.
      inputs: how many there are.

    Returns:
      ``[inputs, outputs]``.

    >>> scatter(jnp.array([[5.0, 6.0]]), jnp.array([[2, 3]]), 3).tolist()
    [[0.0], [0.0], [5.0]]
    """
    outputs = jnp.arange(values.shape[0], dtype=jnp.int32)[:, None]
    dense = jnp.zeros((values.shape[0], inputs), values.dtype)
    # A sum, and not an assignment, as its transpose is a single gather.
    return dense.at[outputs, indices.astype(jnp.int32)].add(values, mode="drop").T


def transposable_product(values: jax.Array, x: jax.Array, indices: jax.Array) -> jax.Array:
    """What :func:`gathered_product` computes, out of operations that JAX can transpose.

    A few samples are gathered; more are multiplied with the dense kernel, whose transpose is two
    matrix products and a gather, where that of a gather of rows is a scatter of rows.

    Args:
      values: as for :func:`gathered_product`.
      x: as for :func:`gathered_product`.
      indices: as for :func:`gathered_product`.

    Returns:
      As :func:`gathered_product`.

    >>> values, indices = jnp.array([[2.0, 3.0]]), jnp.array([[0, 2]], jnp.uint8)
    >>> transposable_product(values, jnp.array([[1.0, 10.0, 100.0]]), indices).tolist()
    [[302.0]]
    """
    if x.shape[0] > FEW:
        return x @ scatter(values, indices, x.shape[1])
    gathered = jnp.take(x, indices.astype(jnp.int32), axis=1, mode="fill", fill_value=0)
    return jnp.sum(gathered * values, axis=-1)


def gathered_product(values: jax.Array, x: jax.Array, indices: jax.Array) -> jax.Array:
    """Products with a kernel of which every output stores the same number of weights.

    Args:
      values: ``[outputs, terms]``, at least one term.
      x: ``[batch, inputs]``, of the same dtype; neither axis empty.
      indices: unsigned integers ``[outputs, terms]``, the input of each weight; one that is not
        below ``inputs`` stands at a weight of zero.

    Returns:
      ``[batch, outputs]``, of the same dtype; 16-bit floats are added up in 32 bits.

    References:
      Lasby et al., "Dynamic sparse training with structured sparsity", ICLR 2024: SRigL, whose
      condensed representation this is.

    >>> values, indices = jnp.array([[2.0, 3.0]]), jnp.array([[0, 2]], jnp.uint8)
    >>> gathered_product(values, jnp.array([[1.0, 10.0, 100.0]]), indices).tolist()
    [[302.0]]
    """
    few = x.shape[0] <= FEW
    return (_one_by_one if few else _by_tiles)(values, widened(x), indices).astype(x.dtype)


def wide(dtype: Any) -> Any:
    """The float dtype that products of another are added up in: of 32 bits at least."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def widened(array: jax.Array) -> jax.Array:
    """An array in the dtype that its products are added up in."""
    return array.astype(wide(array.dtype))


def _padding(inputs: int) -> tuple[int, int]:
    """Entries to pad the inputs with, and the mask that keeps every index within them.

    After the mask LLVM sees that no index needs to be clamped. And a padded array is written to
    memory once, where XLA would fuse whatever computed it into the gather, for every element anew.
    """
    size = 1 << (inputs - 1).bit_length()
    return max(size - inputs, LANES), size - 1


def _one_by_one(values: jax.Array, x: jax.Array, indices: jax.Array) -> jax.Array:
    terms = values.shape[1]
    extra, mask = _padding(x.shape[1])
    padded = jnp.pad(x, ((0, 0), (0, extra)))
    # Three sums that do not wait for one another; more of them gain nothing.
    sums = min(3, terms)
    whole = terms // sums * sums
    zero = jnp.zeros((), x.dtype)

    def times(row: jax.Array, columns: Any) -> jax.Array:
        places = indices[:, columns] & indices.dtype.type(mask)
        return row.at[places].get(mode="promise_in_bounds") * widened(values[:, columns])

    def add(left: Any, right: Any) -> Any:
        return tuple(a + b for a, b in zip(left, right, strict=True))

    def product(row: jax.Array) -> jax.Array:
        # One reduction of several operands: a single loop that keeps all sums in registers.
        operands = tuple(times(row, slice(part, whole, sums)) for part in range(sums))
        parts = list(lax.reduce(operands, (zero,) * sums, add, (1,)))
        for part, column in enumerate(range(whole, terms)):
            parts[part] = parts[part] + times(row, column)
        return functools.reduce(jnp.add, parts)

    return jnp.stack([product(padded[sample]) for sample in range(x.shape[0])])


def _by_tiles(values: jax.Array, x: jax.Array, indices: jax.Array) -> jax.Array:
    batch = x.shape[0]
    tiles = -(-batch // _TILE)
    rows = -(-batch // (tiles * LANES)) * LANES
    padded = jnp.pad(x, ((0, tiles * rows - batch), (0, 0)))
    product = functools.partial(_by_rows, values, indices)
    if tiles == 1:
        return product(padded)[:batch]
    stacked = lax.map(product, padded.reshape(tiles, rows, x.shape[1]))
    return stacked.reshape(tiles * rows, values.shape[0])[:batch]


def _by_rows(values: jax.Array, indices: jax.Array, x: jax.Array) -> jax.Array:
    """Adds up rows of the transposed inputs, a few terms of all outputs at a time."""
    terms = values.shape[1]
    extra, mask = _padding(x.shape[1])
    table = jnp.pad(x, ((0, 0), (0, extra))).T
    # Of 5 to 8 terms a pass the number that leaves least over; two passes at least, as XLA inlines
    # a single one.
    size = min(range(8, 4, -1), key=lambda size: -terms % size) if terms > 8 else -(-terms // 2)

    def add_terms(step: jax.Array, sums: jax.Array) -> jax.Array:
        first = step * size
        places = lax.dynamic_slice_in_dim(indices, first, size, axis=1)
        weights = lax.dynamic_slice_in_dim(values, first, size, axis=1)
        for term in range(size):
            weight = widened(weights[:, term])
            if (
                terms % size
            ):  # the last slice begins earlier, with terms that are in the sum already
                new = jnp.minimum(first, terms - size) + term >= first
                weight = jnp.where(new, weight, jnp.zeros_like(weight))
            place = places[:, term] & places.dtype.type(mask)
            row = table.at[place].get(mode="promise_in_bounds")
            sums = sums + row * weight[:, None]
        return sums

    sums = jnp.zeros((values.shape[0], x.shape[0]), x.dtype)
    return lax.fori_loop(0, -(-terms // size), add_terms, sums).T
