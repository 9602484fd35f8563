"""Moves what units that are the same for all inputs contribute into the biases behind them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from adaptivenet.pruning.tracing.facts import Facts
from adaptivenet.pruning.tracing.tape import Node, Step, Tape

# Through these an element of a parameter is still that element.
CARRYING = frozenset([
    "broadcast_in_dim", "convert_element_type", "copy", "expand_dims", "reshape", "squeeze",
    "transpose",
])  # fmt: skip
PRODUCTS = frozenset(["conv_general_dilated", "dot_general"])


def absorb(tape: Tape, leaves: Sequence[np.ndarray], facts: Facts) -> list[str]:
    """Zeroes the outgoing weights of constant units, and adds what they gave to a bias.

    Only a product of the unit with a parameter that goes into a sum with another parameter can be
    changed so, and only if both are used nowhere else.

    Args:
      tape: the function; its first inputs are the leaves.
      leaves: the parameters, changed in place.
      facts: of the function with these parameters.

    Returns:
      For every product of a constant unit that stays as it was, why.
    """
    ways = _Ways(tape, leaves)
    left: list[str] = []
    for step in tape.steps:
        if step.name not in PRODUCTS:
            continue
        for side in (0, 1):
            weights = ways.origin(step.ins[1 - side])
            source = step.ins[side]
            if weights is None or source.constant is not None:
                continue
            fact = facts.known[source]
            rest = tuple(d for d in range(fact.varies.ndim) if d not in _summed(step, side))
            # Zeros give nothing, and need not move.
            steady = np.asarray(~fact.varies.any(axis=rest) & fact.nonzero.any(axis=rest))
            if not steady.any():
                continue
            number, index = weights
            steadily = jnp.where(np.expand_dims(steady, rest), fact.value, 0)
            operands = [steadily, jnp.asarray(leaves[number].reshape(-1)[index])]
            operands = operands if side == 0 else operands[::-1]
            given = np.asarray(step.eqn.primitive.bind(*operands, **step.eqn.params))
            why = ways.into_bias(step.outs[0], given)
            if why:
                left.append(why)
            else:
                leaves[number].reshape(-1)[_outgoing(step, side, steady, index)] = 0
    return left


class _Ways:
    """Where the values of a function come from, and where they go."""

    def __init__(self, tape: Tape, leaves: Sequence[np.ndarray]) -> None:
        self.leaves = leaves
        self.number = {node: place for place, node in enumerate(tape.inputs[: len(leaves)])}
        self.made = {node: step for step in tape.steps for node in step.outs}
        self.readers: dict[Node, list[Step | None]] = defaultdict(list)
        for step in tape.steps:
            for node in step.ins:
                self.readers[node].append(step)
        for node in tape.outputs:
            self.readers[node].append(None)

    def reader(self, node: Node) -> Step | None:
        """The only step that reads a value; None if there is none, or another."""
        readers = self.readers[node]
        return readers[0] if len(readers) == 1 else None

    def origin(self, node: Node) -> tuple[int, np.ndarray] | None:
        """Which parameter a value is, used nowhere else, and which of its elements stand where."""
        if len(self.readers[node]) != 1:
            return None
        if node in self.number:
            leaf = self.leaves[self.number[node]]
            return self.number[node], np.arange(leaf.size).reshape(leaf.shape)
        step = self.made.get(node)
        if step is None or step.name not in CARRYING or len(step.ins) != 1:
            return None
        below = self.origin(step.ins[0])
        if below is None or step.name == "convert_element_type":
            return below
        number, index = below
        return number, np.asarray(step.eqn.primitive.bind(jnp.asarray(index), **step.eqn.params))

    def into_bias(self, product: Node, given: np.ndarray) -> str:
        """Adds to the bias behind a product what it gives; else says why not."""
        after = self.reader(product)
        while after is not None and after.name in ("convert_element_type", "copy"):
            product = after.outs[0]
            after = self.reader(product)
        if after is None:
            return "its product is used more than once, or is an output"
        if after.name not in ("add", "sub") or (after.name == "sub" and after.ins[1] is product):
            return f"its product goes into {after.name!r}, not into a sum with a bias"
        bias = self.origin(after.ins[1] if after.ins[0] is product else after.ins[0])
        if bias is None:
            return "what is added to its product is not a parameter used there alone"
        number, index = bias
        index = np.broadcast_to(index, given.shape).ravel()
        leaf = self.leaves[number]
        count = np.bincount(index, minlength=leaf.size)
        sums = np.bincount(index, given.ravel().astype(np.float64), leaf.size)
        mean = np.divide(sums, count, out=np.zeros_like(sums), where=count > 0)
        scale = max(1.0, float(np.abs(given).max()))
        if not np.allclose(mean[index], given.ravel(), rtol=1e-6, atol=1e-7 * scale):
            return "what it gives differs from place to place (padding, or one bias for many)"
        change = mean if after.name == "add" else -mean
        leaf[...] = (leaf.astype(np.float64) + change.reshape(leaf.shape)).astype(leaf.dtype)
        return ""


def _summed(step: Step, side: int) -> tuple[int, ...]:
    """Dimensions of an operand that a product sums over, other than those in space."""
    numbers: Any = step.eqn.params["dimension_numbers"]
    if step.name == "dot_general":
        return tuple(numbers[0][side])
    return (numbers.lhs_spec[1],) if side == 0 else ()


def _outgoing(step: Step, side: int, steady: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Elements of the parameter ``index`` that a steady unit multiplies."""
    numbers: Any = step.eqn.params["dimension_numbers"]
    if step.name == "dot_general":
        mine, other = numbers[0][side], numbers[0][1 - side]
        # The dimensions of ``steady`` are those of the operand, in ascending order.
        steady = np.transpose(steady, [sorted(mine).index(d) for d in mine])
        return np.moveaxis(index, other, range(len(other)))[steady].ravel()
    groups = step.eqn.params["feature_group_count"]
    by_output = np.moveaxis(index, numbers.rhs_spec[:2], (0, 1))
    chosen = np.repeat(steady.reshape(groups, -1), by_output.shape[0] // groups, axis=0)
    return by_output[chosen].ravel()
