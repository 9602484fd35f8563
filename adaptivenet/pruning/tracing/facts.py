"""What is known of every value for all inputs: which elements are zero, and which are constant.

An element that a mask holds at zero makes what it multiplies zero, whatever that is. Which units
could be taken out follows: those that add nothing to any sum over them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet.pruning.tracing.axes import Atom, Axis, atoms, whereabouts
from adaptivenet.pruning.tracing.moved import moved
from adaptivenet.pruning.tracing.rules import ELEMENTWISE
from adaptivenet.pruning.tracing.tape import Node, Step, Tape, run

# fmt: off
# Zero at zero.
ODD = frozenset([
    "abs", "asin", "asinh", "atan", "atanh", "cbrt", "ceil", "convert_element_type", "copy",
    "copy_p", "device_put", "erf", "erf_inv", "expm1", "floor", "imag", "log1p", "neg", "real",
    "reduce_precision", "relu", "round", "sharding_constraint", "sign", "sin", "sinh", "sqrt",
    "square", "stop_gradient", "tan", "tanh",
])
SUMS = frozenset([
    "add", "add_any", "max", "min", "or", "sub", "xor",
])
# Zero where all that they take is; the primitive itself tells what they take.
MOVING = frozenset([
    "broadcast_in_dim", "concatenate", "cumsum", "expand_dims", "pad", "reduce_max",
    "reduce_sum", "reduce_window_max", "reduce_window_sum", "reshape", "rev", "slice", "split",
    "squeeze", "transpose",
])
INDEXED = frozenset([
    "dynamic_slice", "gather", "dynamic_update_slice",
])
# fmt: on


@dataclass
class Fact:
    """What is known of an array.

    Attributes:
      value: for these inputs; None within loops.
      nonzero: bool, False where it is zero for all inputs.
      varies: bool, False where it is the same for all inputs.
    """

    value: Any
    nonzero: np.ndarray
    varies: np.ndarray


@dataclass
class Sum:
    """A sum over axes: which positions add something.

    Attributes:
      axes: of what is summed.
      adds: bool, one dimension an axis.
    """

    axes: list[Axis]
    adds: np.ndarray


@dataclass
class Facts:
    """What is known within a function.

    Attributes:
      known: of every value.
      sums: what is added up where.
      values: of the results of all steps, for the inputs at hand; none within loops.
    """

    known: dict[Node, Fact] = field(default_factory=dict)
    sums: list[Sum] = field(default_factory=list)
    values: dict[Node, Any] = field(default_factory=dict)

    def adding(self, atom: Atom) -> np.ndarray:
        """Which units of an atom add something to some sum: bool ``[count]``."""
        found = np.zeros(atom.count, bool)
        for one in self.sums:
            for place, axis in enumerate(one.axes):
                if not any(other is atom for other in atoms(axis)):
                    continue
                others = tuple(d for d in range(one.adds.ndim) if d != place)
                row = np.asarray(one.adds.any(axis=others))
                for which in whereabouts(axis, atom):
                    np.logical_or.at(found, which[which >= 0], row[which >= 0])
        return found


def learn(tape: Tape, given: Sequence[Fact]) -> Facts:
    """Follows zeros and constants through a function.

    Args:
      tape: the function.
      given: what is known of its inputs.

    Returns:
      What is known of all its values, and its sums.
    """
    facts = Facts(values=run(tape, [fact.value for fact in given]))
    _follow(tape, given, facts)
    return facts


def given(value: Any, *, varies: bool) -> Fact:
    """What is known of an input: of a parameter its value, of data nothing."""
    array = np.asarray(value)
    full = np.full(array.shape, varies)
    return Fact(value, full if varies else array != 0, full)


def _follow(tape: Tape, given: Sequence[Fact], facts: Facts) -> list[Fact]:
    known = facts.known
    known.update(zip(tape.inputs, given, strict=True))

    def find(node: Node) -> Fact:
        if node.constant is None:
            return known[node]
        return _constant(node.constant)

    for step in tape.steps:
        ins = list(map(find, step.ins))
        for node, fact in zip(step.outs, _step(step, ins, facts), strict=True):
            known[node] = fact
    return list(map(find, tape.outputs))


def _constant(value: Any) -> Fact:
    if hasattr(value, "dtype") and _is_key(value):
        full = np.ones(np.shape(value), bool)
        return Fact(value, full, ~full)
    array = np.asarray(value)
    return Fact(value, array != 0, np.zeros(array.shape, bool))


def _step(step: Step, ins: list[Fact], facts: Facts) -> list[Fact]:
    shapes = [node.aval.shape for node in step.outs]
    if step.name in ("scan", "while", "cond"):
        nonzero = _loop(step, ins, facts)
        varies = any(fact.varies.any() for fact in ins)
        values = [facts.values.get(node) for node in step.outs]
        return [Fact(v, n, np.full(n.shape, varies)) for v, n in zip(values, nonzero, strict=True)]
    values = [facts.values.get(node) for node in step.outs]
    nonzero = _nonzero(step, ins, shapes)
    varies = _varies(step, ins, shapes)
    found = []
    for value, n, v in zip(values, nonzero, varies, strict=True):
        v = v & n
        if value is not None and n.shape == np.shape(value) and not _is_key(value):
            n = n & (v | (np.asarray(value) != 0))
        found.append(Fact(value, n, v))
    _note(step, ins, facts)
    return found


def _is_key(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def _nonzero(step: Step, ins: list[Fact], shapes: list[Any]) -> list[np.ndarray]:
    name, masks = step.name, [fact.nonzero for fact in ins]
    if name in ODD or (name == "integer_pow" and step.eqn.params["y"] > 0):
        return [masks[0]]
    if name in ("mul", "and"):
        return [np.broadcast_to(masks[0] & masks[1], shapes[0])]
    if name in ("div", "rem"):
        return [np.broadcast_to(masks[0], shapes[0])]
    if name in SUMS:
        return [np.broadcast_to(masks[0] | masks[1], shapes[0])]
    if name == "select_n":
        return [np.broadcast_to(np.logical_or.reduce(masks[1:]), shapes[0])]
    if name == "optimization_barrier":
        return masks
    if name in MOVING or name in ("dot_general", "conv_general_dilated"):
        return moved(step, masks)
    if name in INDEXED:
        return [_indexed(step, masks, ins, shapes[0])]
    return [np.ones(shape, bool) for shape in shapes]


def _varies(step: Step, ins: list[Fact], shapes: list[Any]) -> list[np.ndarray]:
    name = step.name
    v, n = [fact.varies for fact in ins], [fact.nonzero for fact in ins]
    if name in ("mul", "and"):
        return [np.broadcast_to((v[0] & n[1]) | (n[0] & v[1]), shapes[0])]
    if name in ("dot_general", "conv_general_dilated"):
        one = moved(step, [v[0], n[1]])[0]
        return [one | moved(step, [n[0], v[1]])[0]]
    if name in MOVING:
        return moved(step, v)
    if name in INDEXED and _known_indices(step, ins):
        return [_indexed(step, v, ins, shapes[0])]
    if name in ELEMENTWISE:
        together = functools.reduce(np.logical_or, v)
        return [np.broadcast_to(together, shape) for shape in shapes]
    some = any(x.any() for x in v)
    return [np.full(shape, some) for shape in shapes]


def _known_indices(step: Step, ins: list[Fact]) -> bool:
    """Whether what is taken is the same for all inputs."""
    data = 2 if step.name == "dynamic_update_slice" else 1
    return all(f.value is not None and not f.varies.any() for f in ins[data:])


def _indexed(step: Step, masks: list[np.ndarray], ins: list[Fact], shape: Any) -> np.ndarray:
    """Where what is taken by indices, or put there, may be True."""
    name, source = step.name, masks[0]
    data = 2 if name == "dynamic_update_slice" else 1
    if _known_indices(step, ins):
        indices = [jnp.asarray(fact.value) for fact in ins[data:]]
        return moved(step, masks[:data], indices)[0]
    # The indices depend on the inputs: any of the positions may be meant.
    if name == "dynamic_update_slice":
        return source | bool(masks[1].any())
    sizes = step.eqn.params["slice_sizes"]
    cut = tuple(
        d for d, (n, whole) in enumerate(zip(sizes, source.shape, strict=True)) if n != whole
    )
    some = np.asarray(source.any(axis=cut, keepdims=True))
    if name == "dynamic_slice":
        return np.broadcast_to(some, shape)
    numbers = step.eqn.params["dimension_numbers"]
    gone = (*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ()))
    some = np.asarray(some.any(axis=gone))
    inserted = tuple(d for d in range(len(shape)) if d not in numbers.offset_dims)
    return np.broadcast_to(np.expand_dims(some, inserted), shape)


def _note(step: Step, ins: list[Fact], facts: Facts) -> None:
    """Writes down what a sum adds up."""
    if step.name == "reduce_sum":
        gone = step.eqn.params["axes"]
        rest = tuple(d for d in range(ins[0].nonzero.ndim) if d not in gone)
        facts.sums.append(
            Sum([step.ins[0].axes[d] for d in gone], np.asarray(ins[0].nonzero.any(axis=rest)))
        )
    if step.name == "dot_general":
        (lc, rc), (lb, rb) = step.eqn.params["dimension_numbers"]
        sides = [
            _shared(fact.nonzero, (*b, *c))
            for fact, b, c in zip(ins, (lb, rb), (lc, rc), strict=True)
        ]
        adds = np.asarray((sides[0] & sides[1]).any(axis=tuple(range(len(lb)))))
        facts.sums.append(Sum([step.ins[0].axes[d] for d in lc], adds))
    if step.name == "conv_general_dilated" and "groups" in step.extra:
        numbers = step.eqn.params["dimension_numbers"]
        groups = step.eqn.params["feature_group_count"]
        left = _shared(ins[0].nonzero, (numbers.lhs_spec[1],)).reshape(groups, -1)
        right = _shared(ins[1].nonzero, (numbers.rhs_spec[0], numbers.rhs_spec[1]))
        right = np.asarray(right.reshape(groups, -1, right.shape[1]).any(axis=1))
        facts.sums.append(Sum([step.ins[0].axes[numbers.lhs_spec[1]]], (left & right).ravel()))


def _shared(nonzero: np.ndarray, dims: Sequence[int]) -> np.ndarray:
    """Where anything is not zero, by some dimensions in this order."""
    rest = tuple(d for d in range(nonzero.ndim) if d not in dims)
    return np.transpose(nonzero.any(axis=rest), [sorted(dims).index(d) for d in dims])


def _loop(step: Step, ins: list[Fact], facts: Facts) -> list[np.ndarray]:
    """Zeros that hold in every round."""
    masks = [fact.nonzero for fact in ins]

    def run(part: Tape, nonzero: Sequence[np.ndarray]) -> tuple[list[np.ndarray], Facts]:
        inner = Facts()
        facts_in = [Fact(None, n, np.ones(n.shape, bool)) for n in nonzero]
        return [f.nonzero for f in _follow(part, facts_in, inner)], inner

    if step.name == "cond":
        results = [run(part, masks[1:]) for part in step.parts]
        for _, inner in results:
            facts.sums += inner.sums
        return [np.logical_or.reduce(each) for each in zip(*(r for r, _ in results), strict=True)]
    p = step.eqn.params
    if step.name == "scan":
        first, carries, body = p["num_consts"], p["num_carry"], step.parts[0]
        rest = [np.asarray(m.any(axis=0)) for m in masks[first + carries :]]
        consts, carry = masks[:first], masks[first : first + carries]
    else:
        a, b, body = p["cond_nconsts"], p["body_nconsts"], step.parts[1]
        consts, carry, rest, carries = masks[a : a + b], masks[a + b :], [], len(masks) - a - b
    while True:
        outs, inner = run(body, [*consts, *carry, *rest])
        wider = [c | o for c, o in zip(carry, outs[:carries], strict=True)]
        if all((w == c).all() for w, c in zip(wider, carry, strict=True)):
            break
        carry = wider
    facts.sums += inner.sums
    if step.name == "while":
        _, condition = run(step.parts[0], [*masks[:a], *carry])
        facts.sums += condition.sums
        return carry
    length = p["length"]
    return [*carry, *(np.broadcast_to(o, (length, *o.shape)) for o in outs[carries:])]
