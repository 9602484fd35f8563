"""What a traced function costs: multiplications, bytes, the memory of its activations."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from adaptivenet.pruning.tracing.axes import Keep
from adaptivenet.pruning.tracing.resized import shape
from adaptivenet.pruning.tracing.tape import Node, Step, Tape


def macs(tape: Tape, keep: Keep) -> int:
    """Multiply-accumulates of all products and convolutions.

    A scan counts as often as it is long, a while loop once, a cond as its dearest branch.

    Args:
      tape: a function.
      keep: which units of an atom stay.

    Returns:
      The number for the traced inputs, the batch included.
    """
    return sum(_macs(step, keep) for step in tape.steps)


def _macs(step: Step, keep: Keep) -> int:
    if step.name == "cond":
        return max(macs(part, keep) for part in step.parts)
    if step.parts:
        times = step.eqn.params["length"] if step.name == "scan" else 1
        return times * sum(macs(part, keep) for part in step.parts)
    if step.name == "dot_general":
        (contracted, _), _ = step.eqn.params["dimension_numbers"]
        left = shape(step.ins[0], keep)
        return math.prod(shape(step.outs[0], keep)) * math.prod(left[d] for d in contracted)
    if step.name == "conv_general_dilated":
        kernel = shape(step.ins[1], keep)
        outputs = step.eqn.params["dimension_numbers"].rhs_spec[0]
        each = math.prod(n for d, n in enumerate(kernel) if d != outputs)
        return math.prod(shape(step.outs[0], keep)) * each
    return 0


def peak_bytes(tape: Tape, keep: Keep) -> int:
    """The most bytes that intermediate values take together.

    Each value is counted from the step that makes it to the last one that reads it, as if nothing
    were fused; parameters and inputs are not counted, nor what a loop keeps within it.

    Args:
      tape: a function.
      keep: which units of an atom stay.

    Returns:
      Bytes.
    """
    last: dict[Node, int] = {}
    for number, step in enumerate(tape.steps):
        last.update(dict.fromkeys(step.ins, number))
    last.update(dict.fromkeys(tape.outputs, len(tape.steps)))
    alive: dict[Node, int] = {}
    most = 0
    for number, step in enumerate(tape.steps):
        alive.update((node, _bytes(node, keep)) for node in step.outs if node in last)
        most = max(most, sum(alive.values()))
        for node in step.ins:
            if last[node] == number:
                alive.pop(node, None)
    return most


def _bytes(node: Node, keep: Keep) -> int:
    return math.prod(shape(node, keep)) * itemsize(node.aval.dtype)


def itemsize(dtype: Any) -> int:
    """Bytes of one element; 0 of a random key, whose size jax does not tell."""
    try:
        return jnp.dtype(dtype).itemsize
    except TypeError:
        return 0
