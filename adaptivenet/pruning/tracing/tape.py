"""A traced function as a list of steps whose values have symbolic axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from adaptivenet.pruning.tracing.axes import Axis, fresh

__all__ = ["Node", "Step", "Tape", "bind", "contracted", "record", "run"]

# What only contains another jaxpr.
# fmt: off
INLINED = frozenset([
    "checkpoint", "closed_call", "core_call", "core_closed_call", "custom_jvp_call",
    "custom_vjp_call", "custom_vjp_call_jaxpr", "jit", "pjit", "remat", "remat2",
])
# fmt: on


class Node:
    """A value within the function.

    Attributes:
      aval: shape and dtype.
      axes: one symbolic axis a dimension.
      constant: the array, of a value that the trace closed over; else None.
    """

    __slots__ = ("aval", "axes", "constant")

    def __init__(self, aval: Any, axes: Sequence[Axis] | None = None, constant: Any = None) -> None:
        self.aval = aval
        shape = getattr(aval, "shape", ())
        self.axes: list[Axis] = list(map(fresh, shape) if axes is None else axes)
        self.constant = constant


@dataclass
class Step:
    """One operation.

    Attributes:
      name: of the primitive; ``relu`` for the rectifier, whose own derivative at 0 is kept.
      eqn: the traced equation.
      ins: its operands.
      outs: its results.
      parts: what it repeats or chooses between: of a scan the body, of a while the condition and
        the body, of a cond the branches.
      extra: axes that only its parameters speak of.
    """

    name: str
    eqn: Any
    ins: list[Node]
    outs: list[Node]
    parts: list[Tape] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Tape:
    """Steps from inputs to outputs.

    Attributes:
      inputs: parameters, then data.
      steps: in order.
      outputs: the leaves of what the function returns.
      compiled: what :func:`run` has compiled.
    """

    inputs: list[Node]
    steps: list[Step]
    outputs: list[Node]
    compiled: Any = None


Rule = Callable[[Step], None]


def record(closed: Any, inputs: Sequence[Node], rule: Rule, deeper: Callable[..., None]) -> Tape:
    """Writes down a closed jaxpr.

    Args:
      closed: a closed jaxpr.
      inputs: its inputs, with their axes.
      rule: gives the results of a step their axes.
      deeper: the same for a step with parts, which it records.

    Returns:
      The tape; what merely contains another jaxpr is written out.
    """
    steps: list[Step] = []
    outputs = _write(closed.jaxpr, closed.consts, list(inputs), steps, rule, deeper)
    return Tape(list(inputs), steps, outputs)


def _write(
    jaxpr: Any,
    consts: Sequence[Any],
    inputs: list[Node],
    steps: list[Step],
    rule: Rule,
    deeper: Callable[..., None],
) -> list[Node]:
    env: dict[Any, Node] = dict(zip(jaxpr.invars, inputs, strict=True))
    for var, value in zip(jaxpr.constvars, consts, strict=True):
        env[var] = Node(var.aval, constant=value)

    def find(atom: Any) -> Node:
        if isinstance(atom, jax.extend.core.Literal):
            return Node(atom.aval, constant=atom.val)
        return env[atom]

    for eqn in jaxpr.eqns:
        name, ins = eqn.primitive.name, list(map(find, eqn.invars))
        if name in INLINED and not _rectifier(eqn):
            inner = contained(eqn)
            open_, known = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
            outs = _write(open_, known, ins, steps, rule, deeper)
        else:
            outs = [Node(var.aval) for var in eqn.outvars]
            step = Step("relu" if name in INLINED else name, eqn, ins, outs)
            (deeper if name in ("scan", "while", "cond") else rule)(step)
            steps.append(step)
        env.update(zip(eqn.outvars, outs, strict=True))
    return list(map(find, jaxpr.outvars))


def contracted(step: Step) -> list[tuple[Node, tuple[int, ...]]]:
    """The dimensions that a step sums over, those in space aside, of each operand that it does."""
    p = step.eqn.params
    if step.name == "reduce_sum":
        return [(step.ins[0], tuple(p["axes"]))]
    if step.name == "dot_general":
        return list(zip(step.ins, map(tuple, p["dimension_numbers"][0]), strict=True))
    if step.name == "conv_general_dilated":
        return [(step.ins[0], (p["dimension_numbers"].lhs_spec[1],))]
    return []


def contained(eqn: Any) -> Any:
    """The jaxpr that an equation contains."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in eqn.params:
            return eqn.params[key]
    raise NotImplementedError(f"the primitive {eqn.primitive.name!r} holds no known jaxpr.")


def _rectifier(eqn: Any) -> bool:
    """Whether it is ``jax.nn.relu``, whose derivative at 0 is not that of a maximum."""
    if eqn.primitive.name != "custom_jvp_call":
        return False
    inner = contained(eqn)
    inner = getattr(inner, "jaxpr", inner)
    while len(inner.eqns) == 1 and inner.eqns[0].primitive.name in ("jit", "pjit"):
        inner = contained(inner.eqns[0]).jaxpr
    if len(inner.eqns) != 1 or inner.eqns[0].primitive.name != "max" or len(inner.invars) != 1:
        return False
    bounds = [v.val for v in inner.eqns[0].invars if isinstance(v, jax.extend.core.Literal)]
    return len(bounds) == 1 and np.ndim(bounds[0]) == 0 and float(bounds[0]) == 0.0


def run(tape: Tape, inputs: Sequence[Any]) -> dict[Node, Any]:
    """Evaluates all steps, as one compiled program.

    Args:
      tape: a function.
      inputs: its inputs.

    Returns:
      The values of the inputs and of the results of all steps.
    """
    nodes = [node for step in tape.steps for node in step.outs]
    if tape.compiled is None:

        def whole(inputs: Sequence[Any]) -> list[Any]:
            env: dict[Node, Any] = dict(zip(tape.inputs, inputs, strict=True))
            for step in tape.steps:
                ins = [env[n] if n.constant is None else n.constant for n in step.ins]
                env.update(zip(step.outs, bind(step, ins), strict=True))
            return [env[node] for node in nodes]

        tape.compiled = jax.jit(whole)
    found = tape.compiled([jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in inputs])
    return {**dict(zip(tape.inputs, inputs, strict=True)), **dict(zip(nodes, found, strict=True))}


def bind(step: Step, ins: Sequence[Any], **changed: Any) -> list[Any]:
    """Evaluates one step, with some of its parameters changed."""
    if step.name == "relu":
        return [jax.nn.relu(ins[0])]
    found = step.eqn.primitive.bind(*ins, **{**step.eqn.params, **changed})
    return list(found) if step.eqn.primitive.multiple_results else [found]
