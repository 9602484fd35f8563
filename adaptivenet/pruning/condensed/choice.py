"""The choice of a sparse layer: every format that is exact and smaller is measured beside dense."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adaptivenet.pruning.condensed.bcsr import pack_bcsr
from adaptivenet.pruning.condensed.blocks import pack_blocks
from adaptivenet.pruning.condensed.layers import (
    Layer,
    apply,
    checked,
    pack_dense,
    pack_fan_in,
    stored_bytes,
)
from adaptivenet.pruning.condensed.nofm import pack_nofm

Measure = Callable[[Mapping[str, Callable[[], Any]], int], Mapping[str, Sequence[float]]]

__all__ = ["Choice", "Measure", "Measured", "choose", "interleaved", "propose"]

BLOCKS = ((64, 64), (32, 32), (16, 16), (8, 8), (1, 64), (1, 16))
GROUPS = (4, 8, 16)


class Measured(NamedTuple):
    """A line of the report.

    Attributes:
      format: name of the format.
      seconds: of the fastest call.
      ratio: to dense, below 1 where faster: the worse of that of the fastest calls and of the
        median over repeats.
      bytes: stored, indices among them.
    """

    format: str
    seconds: float
    ratio: float
    bytes: int


class Choice(NamedTuple):
    """What :func:`choose` returns.

    Attributes:
      layer: the layer chosen.
      format: its name.
      report: all formats measured, the fastest first.
    """

    layer: Layer
    format: str
    report: tuple[Measured, ...]


def propose(
    kernel: Any, mask: Any = None, *, blocks: Sequence[tuple[int, int]] = BLOCKS
) -> dict[str, Layer]:
    """Packs a kernel in every format that stores fewer bytes than the dense kernel.

    Args:
      kernel: floating, ``[inputs, outputs]``.
      mask: bool like the kernel, what was kept; by default what is not zero.
      blocks: blocks to try; those that do not divide the kernel are passed over.

    Returns:
      Layers by name: "dense" first, then "fan-in", "bcsr", "2:4" and its kin, "blocks 16x16" and
      its kin, as far as they apply; all are exact. Of n:m the smallest is proposed.

    Raises:
      TypeError: a kernel that is not floating, or that is traced.
      ValueError: a kernel of other than two dimensions, or a mask of another shape.

    >>> kernel = jax.numpy.zeros((64, 32)).at[::8].set(1.0)
    >>> list(propose(kernel, blocks=[(1, 16), (8, 8)]))
    ['dense', 'fan-in', 'bcsr', '1:8', 'blocks 1x16']
    """
    dense, kept = checked(kernel, mask)
    inputs, outputs = dense.shape
    layers: dict[str, Layer] = {
        "dense": pack_dense(dense, kept),
        "fan-in": pack_fan_in(dense, kept),
        "bcsr": pack_bcsr(dense, kept),
    }
    groups: dict[str, Layer] = {}
    for m in GROUPS:
        if inputs and inputs % m == 0:
            n = max(int(kept.reshape(inputs // m, m, outputs).sum(axis=1).max(initial=0)), 1)
            groups[f"{n}:{m}"] = pack_nofm(dense, n, m, kept)
    if groups:
        smallest = min(groups, key=lambda name: stored_bytes(groups[name]))
        layers[smallest] = groups[smallest]
    for height, width in blocks:
        if inputs % height == 0 and outputs % width == 0:
            layers[f"blocks {height}x{width}"] = pack_blocks(dense, (height, width), kept)
    limit = stored_bytes(layers["dense"])
    return {
        name: layer
        for name, layer in layers.items()
        if name == "dense" or stored_bytes(layer) < limit
    }


def interleaved(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Times functions in turns, so that a busy moment strikes all of them alike.

    Args:
      functions: without arguments, by name; what they return is waited for.
      repeats: timed rounds, after two that are not timed. Each begins with another function.

    Returns:
      Seconds of every call, by name, in the order of the rounds.

    >>> seconds = interleaved({"a": lambda: 1, "b": lambda: 2}, 3)
    >>> {name: len(times) for name, times in seconds.items()}
    {'a': 3, 'b': 3}
    """
    for _ in range(2):  # the first call compiles
        for function in functions.values():
            jax.block_until_ready(function())
    names, seconds = list(functions), {name: [] for name in functions}
    for repeat in range(repeats):
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            started = time.perf_counter()
            jax.block_until_ready(functions[name]())
            seconds[name].append(time.perf_counter() - started)
    return seconds


def choose(
    kernel: Any,
    batch: int,
    *,
    mask: Any = None,
    blocks: Sequence[tuple[int, int]] = BLOCKS,
    repeats: int = 30,
    margin: float = 0.05,
    calls: int = 1,
    measure: Measure = interleaved,
) -> Choice:
    """Chooses the sparse layer that is fastest for a kernel and a batch size, on this machine.

    Every format that `propose` proposes is timed, jitted, in turns with the dense product. One that
    is faster than dense by the margin, in the fastest call and in the median round, must be so
    again when measured with dense alone: the fastest of many may owe its rank to luck. Where none
    is, the dense layer is chosen, so that the choice is not slower than dense.

    Args:
      kernel: floating, ``[inputs, outputs]``.
      batch: samples of a call.
      mask: bool like the kernel, what was kept; by default what is not zero.
      blocks: as for :func:`propose`.
      repeats: timed rounds of each measurement.
      margin: share of the time of dense by which a format must be faster.
      calls: products that a timed call does one after the other, in one program: more than 1 where
        the layer is part of a larger program and a call from Python would cost more than it.
      measure: ``measure(functions, repeats)`` gives seconds by name, one a round.

    Returns:
      The layer, its name and the report. Only the forward pass is timed.

    Raises:
      TypeError: a kernel that is not floating, or that is traced.
      ValueError: a kernel of other than two dimensions, a mask of another shape, a batch, repeats
        or calls below 1, or a margin outside [0, 1).

    >>> clock = lambda functions, repeats: {
    ...     name: [1.0 if name == "dense" else 0.5] * repeats for name in functions}
    >>> kernel = jax.numpy.eye(32)
    >>> choose(kernel, 1, blocks=[], measure=clock).format
    'fan-in'
    """
    if min(batch, repeats, calls) < 1:
        raise ValueError(
            f"batch, repeats and calls must be at least 1, not {batch}, {repeats} and {calls}."
        )
    if not 0 <= margin < 1:
        raise ValueError(f"margin is a share in [0, 1), not {margin}.")
    layers = propose(kernel, mask, blocks=blocks)
    dense = layers["dense"]
    x = jax.random.normal(jax.random.key(0), (batch, dense.shape[0]), dense.values.dtype)
    multiply = jax.jit(apply)
    if calls > 1:
        x = jnp.broadcast_to(x, (calls, *x.shape))
        multiply = jax.jit(lambda layer, many: jax.lax.map(partial(apply, layer), many))

    def timed(names: Sequence[str]) -> Mapping[str, Sequence[float]]:
        # The layer is an argument: constants would be folded, and compiled into other programs.
        functions = {name: lambda name=name: multiply(layers[name], x) for name in names}
        return measure(functions, repeats)

    seconds = timed(list(layers))
    report = [
        Measured(name, min(seconds[name]), _ratio(seconds, name), stored_bytes(layer))
        for name, layer in layers.items()
    ]
    report.sort(key=lambda line: line.ratio)
    chosen = "dense"
    for line in report:
        if line.ratio > 1 - margin:
            break
        if _ratio(timed(["dense", line.format]), line.format) <= 1 - margin:
            chosen = line.format
            break
    return Choice(layers[chosen], chosen, tuple(report))


def _ratio(seconds: Mapping[str, Sequence[float]], name: str) -> float:
    """Of the times of a format to those of dense, the worse of two estimates."""
    pairs = zip(seconds[name], seconds["dense"], strict=True)
    fastest = min(seconds[name]) / min(seconds["dense"])
    return max(fastest, statistics.median(a / b for a, b in pairs))
