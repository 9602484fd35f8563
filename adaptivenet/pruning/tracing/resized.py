"""Evaluates a traced function whose arrays have lost units.

What the function wrote as a number, such as the divisor of a mean, stays as it was: the result is
that of the original with zeros where units were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet.pruning.tracing.axes import Axis, Keep, positions
from adaptivenet.pruning.tracing.tape import Node, Step, Tape, bind


def slim(value: Any, axes: Sequence[Axis], keep: Keep) -> Any:
    """An array without the units that went."""
    for place, axis in enumerate(axes):
        left = positions(axis, keep)
        if len(left) != value.shape[place]:
            value = jnp.take(jnp.asarray(value), left, axis=place)
    return value


def evaluate(tape: Tape, inputs: Sequence[Any], keep: Keep) -> list[Any]:
    """Evaluates a tape on smaller arrays.

    Args:
      tape: the function, traced with arrays of the old sizes.
      inputs: its inputs, without the units that went.
      keep: which units of an atom stay.

    Returns:
      Its outputs.
    """
    env: dict[Node, Any] = dict(zip(tape.inputs, inputs, strict=True))

    def find(node: Node) -> Any:
        return env[node] if node.constant is None else slim(node.constant, node.axes, keep)

    for step in tape.steps:
        outs = _step(step, list(map(find, step.ins)), keep)
        env.update(zip(step.outs, outs, strict=True))
    return list(map(find, tape.outputs))


def shape(node: Node, keep: Keep) -> tuple[int, ...]:
    """What is left of the shape of a value."""
    return tuple(len(positions(axis, keep)) for axis in node.axes)


def _step(step: Step, ins: list[Any], keep: Keep) -> list[Any]:
    if step.name in ("scan", "while", "cond"):
        return _loop(step, ins, keep)
    adapt = ADAPT.get(step.name)
    with step.eqn.ctx.manager:
        return bind(step, ins, **({} if adapt is None else adapt(step, keep)))


def _slice(step: Step, keep: Keep) -> dict[str, Any]:
    p, starts, limits = step.eqn.params, [], []
    for axis, start, limit in zip(
        step.ins[0].axes, p["start_indices"], p["limit_indices"], strict=True
    ):
        left = positions(axis, keep)
        starts.append(int(np.searchsorted(left, start)))
        limits.append(int(np.searchsorted(left, limit)))
    return {"start_indices": tuple(starts), "limit_indices": tuple(limits)}


def _pad(step: Step, keep: Keep) -> dict[str, Any]:
    found = []
    for old, new in zip(step.eqn.params["padding_config"], step.extra["pads"], strict=True):
        if new is None:
            found.append(old)
            continue
        low, high = (0 if axis is None else len(positions(axis, keep)) for axis in new)
        found.append((low, high, 0))
    return {"padding_config": tuple(found)}


def _gather(step: Step, keep: Keep) -> dict[str, Any]:
    now, old = shape(step.ins[0], keep), step.ins[0].aval.shape
    sizes = step.eqn.params["slice_sizes"]
    return {
        "slice_sizes": tuple(n if s == o else s for n, o, s in zip(now, old, sizes, strict=True))
    }


def _dimensions(name: str) -> Callable[[Step, Keep], dict[str, Any]]:
    return lambda step, keep: {name: shape(step.outs[0], keep)}


ADAPT: dict[str, Callable[[Step, Keep], dict[str, Any]]] = {
    "broadcast_in_dim": _dimensions("shape"),
    "reshape": _dimensions("new_sizes"),
    "iota": _dimensions("shape"),
    "dynamic_slice": _dimensions("slice_sizes"),
    "random_bits": lambda step, keep: {"shape": shape(step.outs[0], keep)[len(step.ins[0].axes) :]},
    "split": lambda step, keep: {
        "sizes": tuple(shape(out, keep)[step.eqn.params["axis"]] for out in step.outs)
    },
    "slice": _slice,
    "pad": _pad,
    "gather": _gather,
    "conv_general_dilated": lambda step, keep: {
        "feature_group_count": len(positions(step.extra["groups"], keep))
        if "groups" in step.extra
        else step.eqn.params["feature_group_count"]
    },
}


def _loop(step: Step, ins: list[Any], keep: Keep) -> list[Any]:
    p, parts = step.eqn.params, step.parts
    if step.name == "cond":
        branches = [lambda *a, part=part: evaluate(part, a, keep) for part in parts]
        return jax.lax.switch(ins[0], branches, *ins[1:])
    if step.name == "while":
        a, b = p["cond_nconsts"], p["body_nconsts"]
        first, second, state = ins[:a], ins[a : a + b], ins[a + b :]
        return jax.lax.while_loop(
            lambda s: evaluate(parts[0], [*first, *s], keep)[0],
            lambda s: evaluate(parts[1], [*second, *s], keep),
            state,
        )
    first, carries = p["num_consts"], p["num_carry"]

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        outs = evaluate(parts[0], [*ins[:first], *carry, *xs], keep)
        return outs[:carries], outs[carries:]

    carry, stacked = jax.lax.scan(
        body,
        ins[first : first + carries],
        ins[first + carries :],
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    return [*carry, *stacked]
