"""Finds the products of parameters with inputs in a traced function.

A jaxpr is evaluated as usual, and along with each value goes its trail: which parameters its
elements are. Where a followed value and one that depends on the inputs meet in a product, a
statistic of the latter is noted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

__all__ = ["Hit", "Spy", "Trail", "Value", "evaluate", "whole"]


class Trail(NamedTuple):
    """Where the elements of a value come from.

    Attributes:
      index: gives each element's position among all synapses of the tree, -1 for none; it is called
        only where a product is found, so that nothing large is kept. Its argument holds the
        iteration numbers of the enclosing scans, outermost first.
      loops: which of these numbers matter.
    """

    index: Callable[[tuple[int, ...]], np.ndarray]
    loops: frozenset[int] = frozenset()


class Value(NamedTuple):
    """A value within the function.

    Attributes:
      value: the array.
      trail: which parameters it consists of, if any.
      data: whether it depends on the inputs.
    """

    value: Any
    trail: Trail | None = None
    data: bool = False


class Hit(NamedTuple):
    """A product of parameters with something that depends on the inputs.

    Attributes:
      trail: positions ``[batch, fan_in, outputs]`` of the parameters.
      stat: what they multiply: sums of squares ``[batch, fan_in]``, or of all products
        ``[batch, fan_in, fan_in]``.
    """

    trail: Trail
    stat: jax.Array


class Spy:
    """Collects the products, and the primitives in which parameters are lost from sight."""

    def __init__(self, grams: bool) -> None:
        self.grams = grams
        self.hits: list[Hit] = []
        self.lost: list[tuple[Trail, str]] = []


def whole(start: int, shape: tuple[int, ...]) -> Trail:
    """The trail of a parameter whose elements are numbered from a start."""
    size = math.prod(shape)
    return Trail(lambda at: np.arange(start, start + size, dtype=np.int64).reshape(shape))


# Elementwise: the result is at the place of its operand.
# fmt: off
_ELEMENTWISE = frozenset([
    "abs", "add", "and", "asinh", "atan", "ceil", "clamp", "convert_element_type", "copy",
    "copy_p", "cos", "cosh", "device_put", "div", "exp", "exp2", "expm1", "floor", "integer_pow",
    "log", "log1p", "logistic", "max", "min", "mul", "neg", "pow", "reduce_precision", "round",
    "rsqrt", "select_n", "sharding_constraint", "sign", "sin", "sinh", "sqrt", "square", "sub",
    "tan", "tanh",
])
# What only contains another jaxpr.
_INLINED = frozenset([
    "checkpoint", "closed_call", "core_call", "core_closed_call", "custom_jvp_call",
    "custom_vjp_call", "custom_vjp_call_jaxpr", "jit", "pjit", "remat", "remat2",
])
# fmt: on


def evaluate(jaxpr: Any, arguments: Sequence[Value], spy: Spy, depth: int = 0) -> list[Value]:
    """Evaluates a jaxpr, open or closed, and notes the products with parameters.

    Args:
      jaxpr: what ``jax.make_jaxpr`` returns, or a part of it.
      arguments: its inputs.
      spy: where products are noted.
      depth: how many scans enclose it.

    Returns:
      Its results.

    >>> spy = Spy(grams=False)
    >>> weight, x = jnp.ones((2, 3)), jnp.array([[3.0, 1.0]])
    >>> closed = jax.make_jaxpr(lambda w, x: x @ w)(weight, x)
    >>> out = evaluate(closed, [Value(weight, whole(0, (2, 3))), Value(x, data=True)], spy)
    >>> out[0].value.tolist(), spy.hits[0].stat.tolist()
    ([[4.0, 4.0, 4.0]], [[9.0, 1.0]])
    """
    env: dict[Any, Value] = {}
    constants = map(Value, getattr(jaxpr, "consts", ()))
    env.update(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *arguments), strict=True))

    def read(atom: Any) -> Value:
        return Value(atom.val) if isinstance(atom, jax.extend.core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        operands = list(map(read, eqn.invars))
        name = eqn.primitive.name
        with eqn.ctx.manager:
            if name in _INLINED:
                results = evaluate(_inner(eqn), operands, spy, depth)
            elif name == "scan":
                results = _scan(eqn, operands, spy, depth)
            else:
                results = _apply(eqn, operands, spy, depth)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _inner(eqn: Any) -> Any:
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in eqn.params:
            return eqn.params[key]
    raise NotImplementedError(f"the primitive {eqn.primitive.name!r} holds no known jaxpr.")


def _apply(eqn: Any, operands: list[Value], spy: Spy, depth: int) -> list[Value]:
    name = eqn.primitive.name
    data = any(operand.data for operand in operands)
    before = len(spy.hits)
    if name == "dot_general":
        _note_dot(eqn, operands, spy)
    elif name == "conv_general_dilated":
        _note_convolution(eqn, operands, spy)
    out = eqn.primitive.bind(
        *(operand.value for operand in operands), **eqn.primitive.get_bind_params(eqn.params)
    )
    values = list(out) if eqn.primitive.multiple_results else [out]
    if name == "optimization_barrier":
        return [Value(v, x.trail, x.data) for v, x in zip(values, operands, strict=True)]
    moves = None if data else _moves(eqn, operands)
    if moves is None:
        if len(spy.hits) == before:
            spy.lost += [(operand.trail, name) for operand in operands if operand.trail]
        return [Value(value, data=data) for value in values]
    loops = frozenset[int]().union(*(x.trail.loops for x in operands if x.trail))
    return [Value(value, Trail(move, loops)) for value, move in zip(values, moves, strict=True)]


def _moves(eqn: Any, operands: list[Value]) -> list[Callable[[Any], np.ndarray]] | None:
    """How the positions of parameters move from the operands to each result."""
    name, of = eqn.primitive.name, eqn.params
    followed = [operand for operand in operands if operand.trail]
    if not followed:
        return None
    shapes = [jnp.shape(operand.value) for operand in operands]
    shape = eqn.outvars[0].aval.shape
    if name == "concatenate":

        def join(at: Any) -> np.ndarray:
            pieces = [
                operand.trail.index(at) if operand.trail else np.full(size, -1, np.int64)
                for operand, size in zip(operands, shapes, strict=True)
            ]
            return np.concatenate(pieces, axis=of["dimension"])

        return [join]
    if len(followed) != 1:
        return None  # a product of two parameters, say: no element has a single origin
    trail = followed[0].trail
    assert trail is not None  # for type checkers
    origin = trail.index

    def through(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], np.ndarray]:
        return lambda at: function(origin(at))

    if name in _ELEMENTWISE and jnp.shape(followed[0].value) == shape:
        return [origin]
    if name == "reshape" and of.get("dimensions") is None:
        return [through(lambda x: x.reshape(shape))]
    if name == "squeeze":
        return [through(lambda x: x.reshape(shape))]
    if name == "transpose":
        return [through(lambda x: x.transpose(of["permutation"]))]
    if name == "rev":
        return [through(lambda x: np.flip(x, of["dimensions"]))]
    if name == "broadcast_in_dim" and len(operands) == 1:
        axes = of["broadcast_dimensions"]

        def widen(x: np.ndarray) -> np.ndarray:
            sizes = [1] * len(shape)
            for axis, size in zip(axes, x.shape, strict=True):
                sizes[axis] = size
            return np.broadcast_to(x.reshape(sizes), shape)

        return [through(widen)]
    if name == "slice":
        steps = of["strides"] or (1,) * len(shape)
        window = tuple(map(slice, of["start_indices"], of["limit_indices"], steps))
        return [through(lambda x: x[window])]
    if name in ("split", "unstack"):
        axis = of["axis"]
        sizes = of["sizes"] if name == "split" else (1,) * len(eqn.outvars)
        ends = np.cumsum([0, *sizes])

        def piece(place: int) -> Callable[[np.ndarray], np.ndarray]:
            part = eqn.outvars[place].aval.shape
            wanted = np.arange(ends[place], ends[place + 1])
            return lambda x: np.take(x, wanted, axis=axis).reshape(part)

        return [through(piece(place)) for place in range(len(sizes))]
    return None


def _scan(eqn: Any, operands: list[Value], spy: Spy, depth: int) -> list[Value]:
    """Scans with an accumulator a product; what a parameter is in the carry is not followed."""
    body, of = eqn.params["jaxpr"], eqn.params
    # Sliced operands have an axis more than the body sees, stacked results likewise: this tells
    # constants, carry and slices apart in every version of the primitive.
    slices = sum(
        len(var.aval.shape) < jnp.ndim(operand.value)
        for var, operand in zip(body.invars, operands, strict=True)
    )
    stacks = sum(
        len(inner.aval.shape) < len(outer.aval.shape)
        for inner, outer in zip(body.outvars, eqn.outvars, strict=True)
    )
    carried = len(eqn.outvars) - stacks
    first, second = len(operands) - slices - carried, len(operands) - slices
    constants, start, sliced = operands[:first], operands[first:second], operands[second:]
    data = any(operand.data for operand in operands)
    spy.lost += [(operand.trail, "the carry of scan") for operand in start if operand.trail]

    def slicing(operand: Value) -> Trail | None:
        trail = operand.trail
        if trail is None:
            return None
        return Trail(lambda at: trail.index(at[:depth])[at[depth]], trail.loops | {depth})

    def within(operand: Value) -> Trail | None:
        trail = operand.trail
        return trail and trail._replace(index=lambda at: trail.index(at[:depth]))

    found: list[Hit] = []
    lost: list[tuple[Trail, str]] = []

    def step(carry: Any, now: Any) -> Any:
        own = Spy(spy.grams)
        arguments = [
            *(Value(c.value, within(c), c.data) for c in constants),
            *(Value(value, data=data) for value in carry),
            *(Value(value, slicing(x), x.data) for value, x in zip(now, sliced, strict=True)),
        ]
        results = [result.value for result in evaluate(body, arguments, own, depth + 1)]
        found[:], lost[:] = own.hits, own.lost
        return results[:carried], (results[carried:], [hit.stat for hit in own.hits])

    carry, (stacked, stats) = jax.lax.scan(
        step,
        [x.value for x in start],
        [x.value for x in sliced],
        length=of["length"],
        reverse=of["reverse"],
        unroll=of["unroll"],
    )
    for hit, stat in zip(found, stats, strict=True):
        spy.hits.append(_after(hit, stat, depth))
    spy.lost += [
        (Trail(lambda at, index=trail.index: index((*at, 0))), kind) for trail, kind in lost
    ]
    return [Value(value, data=data) for value in (*carry, *stacked)]


def _after(hit: Hit, stat: jax.Array, depth: int) -> Hit:
    """A product within a scan, seen from outside: its iterations are summed, or a batch."""
    trail, length = hit.trail, stat.shape[0]
    if depth not in trail.loops:
        return Hit(trail._replace(index=lambda at: trail.index((*at, 0))), jnp.sum(stat, axis=0))

    def all_steps(at: tuple[int, ...]) -> np.ndarray:
        return np.concatenate([trail.index((*at, step)) for step in range(length)])

    return Hit(Trail(all_steps, trail.loops - {depth}), stat.reshape(-1, *stat.shape[2:]))


def _note_dot(eqn: Any, operands: list[Value], spy: Spy) -> None:
    contracted, batched = eqn.params["dimension_numbers"]
    for side in (0, 1):
        weight, other = operands[side], operands[1 - side]
        if weight.trail is None or not other.data:
            continue
        # [batch, contracted, free] of both.
        trail = _regrouped(weight.trail, batched[side], contracted[side])
        values = other.value
        axes = _axes(values.ndim, batched[1 - side], contracted[1 - side])
        values = jnp.transpose(values, axes)
        shape = values.shape
        one, two = len(batched[side]), len(batched[side]) + len(contracted[side])
        sizes = [math.prod(s) for s in (shape[:one], shape[one:two], shape[two:])]
        spy.hits.append(Hit(trail, _statistic(values.reshape(sizes), spy.grams)))


def _axes(ndim: int, batch: Sequence[int], contracted: Sequence[int]) -> tuple[int, ...]:
    free = (axis for axis in range(ndim) if axis not in {*batch, *contracted})
    return (*batch, *contracted, *free)


def _regrouped(trail: Trail, batch: Sequence[int], contracted: Sequence[int]) -> Trail:
    def index(at: tuple[int, ...]) -> np.ndarray:
        raw = trail.index(at)
        moved = raw.transpose(_axes(raw.ndim, batch, contracted))
        one, two = len(batch), len(batch) + len(contracted)
        parts = (moved.shape[:one], moved.shape[one:two], moved.shape[two:])
        return moved.reshape([math.prod(part) for part in parts])

    return trail._replace(index=index)


def _statistic(values: jax.Array, grams: bool) -> jax.Array:
    """Sums over the last axis of [batch, fan_in, examples]: of squares, or of all products."""
    values = values.astype(jnp.float32)
    if not grams:
        return jnp.sum(jnp.square(values), axis=-1)
    return jnp.einsum("bik,bjk->bij", values, values, precision=jax.lax.Precision.HIGHEST)


def _note_convolution(eqn: Any, operands: list[Value], spy: Spy) -> None:
    images, kernel = operands
    if kernel.trail is None or not images.data:
        return
    of = eqn.params
    if of["batch_group_count"] != 1:
        return  # what the gradient of a convolution is made of, no layer
    groups = of["feature_group_count"]
    numbers = of["dimension_numbers"]
    values = jnp.transpose(images.value, numbers.lhs_spec).astype(jnp.float32)
    out_axis, in_axis, *window = numbers.rhs_spec
    shape = tuple(kernel.value.shape[axis] for axis in window)
    # Squares add up over the examples before the patches are cut, which are many times as large.
    values = values if spy.grams else jnp.sum(jnp.square(values), axis=0, keepdims=True)
    patches = jax.lax.conv_general_dilated_patches(
        values,
        shape,
        of["window_strides"],
        of["padding"],
        lhs_dilation=of["lhs_dilation"],
        rhs_dilation=of["rhs_dilation"],
        precision=jax.lax.Precision.HIGHEST,
    )
    # [examples, channels * window, positions] as [groups, window * channels, examples * positions]
    channels = values.shape[1] // groups
    patches = patches.reshape(len(values), groups, channels, math.prod(shape), -1)
    patches = patches.transpose(1, 3, 2, 0, 4).reshape(groups, channels * math.prod(shape), -1)
    stat = _statistic(patches, True) if spy.grams else jnp.sum(patches, axis=-1)
    trail = kernel.trail

    def index(at: tuple[int, ...]) -> np.ndarray:
        moved = trail.index(at).transpose(*window, in_axis, out_axis)
        moved = moved.reshape(-1, groups, moved.shape[-1] // groups)
        return moved.transpose(1, 0, 2)

    spy.hits.append(Hit(trail._replace(index=index), stat))
