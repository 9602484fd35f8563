"""Which axes every primitive of jax makes equal, and which it keeps whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adaptivenet.pruning.tracing.axes import (
    Atom,
    Axis,
    cut,
    fix,
    fresh,
    join,
    regroup,
    unify,
)
from adaptivenet.pruning.tracing.tape import Node, Step, Tape, record

# fmt: off
ELEMENTWISE = frozenset([
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "bessel_i0e", "bessel_i1e", "cbrt", "ceil", "clamp", "convert_element_type", "copy",
    "copy_p", "cos", "cosh", "device_put", "digamma", "div", "eq", "erf", "erf_inv", "erfc",
    "exp", "exp2", "expm1", "floor", "ge", "gt", "igamma", "igammac", "imag", "integer_pow",
    "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne",
    "neg", "nextafter", "not", "optimization_barrier", "or", "pow", "real", "reduce_precision",
    "relu", "rem", "round", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic",
    "shift_right_logical", "sharding_constraint", "sign", "sin", "sinh", "sqrt", "square",
    "stop_gradient", "sub", "tan", "tanh", "xor",
])
# Each unit of what remains is computed from all units of what goes: those have to stay.
MIXING = frozenset([
    "argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod",
    "reduce_xor",
])
ALONG = frozenset([
    "cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum", "rev",
])
# fmt: on

RULES: dict[str, Callable[[Step], None]] = {}


def rule(*names: str) -> Callable[[Callable[[Step], None]], Callable[[Step], None]]:
    """Registers the rule of some primitives."""

    def register(function: Callable[[Step], None]) -> Callable[[Step], None]:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def apply(step: Step) -> None:
    """Gives the results of a step their axes."""
    if step.name in ELEMENTWISE:
        _elementwise(step)
    elif step.name in RULES:
        RULES[step.name](step)
    else:
        _keep_all(step, f"enters {step.name!r}, of which nothing is known here")


def _keep_all(step: Step, why: str) -> None:
    for node in (*step.ins, *step.outs):
        for axis in node.axes:
            fix(axis, why)


def _meet(one: Axis, other: Axis, what: str) -> None:
    unify(one, other, f"meets units that are divided otherwise, in {what!r}")


def _elementwise(step: Step) -> None:
    if step.name == "optimization_barrier":
        for node, out in zip(step.ins, step.outs, strict=True):
            out.axes = list(node.axes)
        return
    shape = step.outs[0].aval.shape
    axes: list[Axis | None] = [None] * len(shape)
    for node in step.ins:
        # Scalars, and dimensions of one position, are broadcast.
        for place, axis in enumerate(node.axes):
            if node.aval.shape[place] != shape[place]:
                continue
            known = axes[place]
            if known is None:
                axes[place] = axis
            else:
                _meet(known, axis, step.name)
    for out in step.outs:
        out.axes = [fresh(n) if a is None else a for a, n in zip(axes, shape, strict=True)]


@rule("broadcast_in_dim")
def _broadcast(step: Step) -> None:
    source, out = step.ins[0], step.outs[0]
    out.axes = list(map(fresh, out.aval.shape))
    for place, to in enumerate(step.eqn.params["broadcast_dimensions"]):
        if source.aval.shape[place] == out.aval.shape[to]:
            out.axes[to] = source.axes[place]


@rule("reshape")
def _reshape(step: Step) -> None:
    source, out = step.ins[0], step.outs[0]
    why = f"is reshaped from {source.aval.shape} to {out.aval.shape}, across units"
    if step.eqn.params.get("dimensions") is not None:
        _keep_all(step, why)
    else:
        out.axes = regroup(source.axes, out.aval.shape, why)


@rule("squeeze")
def _squeeze(step: Step) -> None:
    gone = step.eqn.params["dimensions"]
    step.outs[0].axes = [a for d, a in enumerate(step.ins[0].axes) if d not in gone]


@rule("expand_dims")
def _expand(step: Step) -> None:
    axes = list(step.ins[0].axes)
    for place in sorted(step.eqn.params["dimensions"]):
        axes.insert(place, ())
    step.outs[0].axes = axes


@rule("transpose")
def _transpose(step: Step) -> None:
    step.outs[0].axes = [step.ins[0].axes[p] for p in step.eqn.params["permutation"]]


def _reduce(step: Step) -> None:
    gone = step.eqn.params["axes"]
    for place in gone:
        if step.name in MIXING:
            fix(step.ins[0].axes[place], f"goes through {step.name!r}")
    for out in step.outs:
        out.axes = [a for d, a in enumerate(step.ins[0].axes) if d not in gone]


for _name in (*MIXING, "reduce_sum"):
    RULES[_name] = _reduce


def _along(step: Step) -> None:
    dims = step.eqn.params.get("dimensions", (step.eqn.params.get("axis"),))
    for place in dims:
        fix(step.ins[0].axes[place], f"goes through {step.name!r}")
    step.outs[0].axes = list(step.ins[0].axes)


for _name in ALONG:
    RULES[_name] = _along


@rule("sort")
def _sort(step: Step) -> None:
    place = step.eqn.params["dimension"]
    _elementwise(step)
    for node in step.ins:
        fix(node.axes[place], "is sorted")
    for node, out in zip(step.ins, step.outs, strict=True):
        out.axes = list(node.axes)


@rule("iota")
def _iota(step: Step) -> None:
    place = step.eqn.params["dimension"]
    fix(step.outs[0].axes[place], "is counted by 'iota'")


@rule("concatenate")
def _concatenate(step: Step) -> None:
    place, out = step.eqn.params["dimension"], step.outs[0]
    first = step.ins[0].axes
    for node in step.ins[1:]:
        for d, (a, b) in enumerate(zip(first, node.axes, strict=True)):
            if d != place:
                _meet(a, b, step.name)
    out.axes = list(first)
    parts = []
    for node in step.ins:
        if not node.axes[place]:
            node.axes[place] = fresh_unit()
        parts.append(node.axes[place])
    out.axes[place] = join(parts)


def fresh_unit() -> Axis:
    """An axis of one position that has to stay."""
    return (Atom(1, "is a single position of a concatenation"),)


@rule("split")
def _split(step: Step) -> None:
    place, start = step.eqn.params["axis"], 0
    for out, count in zip(step.outs, step.eqn.params["sizes"], strict=True):
        _part(step, out, place, start, start + count)
        start += count


def _part(step: Step, out: Node, place: int, start: int, stop: int) -> None:
    source = step.ins[0].axes[place]
    found = cut(source, start, stop)
    out.axes = list(step.ins[0].axes)
    if found is None:
        why = f"is cut from {start} to {stop}, across units"
        fix(source, why)
        found = fresh(stop - start, why)
    out.axes[place] = found


@rule("slice")
def _slice(step: Step) -> None:
    p, out, source = step.eqn.params, step.outs[0], step.ins[0]
    axes = []
    strides = p["strides"] or (1,) * len(source.axes)
    bounds = zip(source.axes, p["start_indices"], p["limit_indices"], strides, strict=True)
    for axis, start, stop, stride in bounds:
        found = cut(axis, start, stop) if stride == 1 else None
        if found is None:
            why = f"is sliced {start}:{stop}:{stride}, across units"
            fix(axis, why)
            found = fresh(len(range(start, stop, stride)), why)
        axes.append(found)
    out.axes = axes


@rule("pad")
def _pad(step: Step) -> None:
    source, out = step.ins[0], step.outs[0]
    axes = []
    step.extra["pads"] = []
    for axis, (low, high, inner), count in zip(
        source.axes, step.eqn.params["padding_config"], out.aval.shape, strict=True
    ):
        if inner or low < 0 or high < 0:
            fix(axis, "is padded in its interior, or cropped")
            axes.append(fresh(count, "is padded in its interior, or cropped"))
            step.extra["pads"].append(None)
            continue
        before, after = ((fresh(n) or fresh_unit()) if n else None for n in (low, high))
        parts = [p for p in (before, axis if axis else None, after) if p is not None]
        if axis == () and (low or high):
            parts.insert(1 if low else 0, fresh_unit())
        axes.append(axis if not (low or high) else join(parts))
        step.extra["pads"].append((before, after))
    out.axes = axes


@rule("dot_general")
def _dot(step: Step) -> None:
    (lc, rc), (lb, rb) = step.eqn.params["dimension_numbers"]
    left, right = step.ins[0].axes, step.ins[1].axes
    for a, b in zip((*lc, *lb), (*rc, *rb), strict=True):
        _meet(left[a], right[b], step.name)
    free = [a for d, a in enumerate(left) if d not in (*lc, *lb)]
    free += [a for d, a in enumerate(right) if d not in (*rc, *rb)]
    step.outs[0].axes = [*(left[d] for d in lb), *free]


@rule("conv_general_dilated")
def _convolution(step: Step) -> None:
    p, (left, right), out = step.eqn.params, step.ins, step.outs[0]
    numbers, groups = p["dimension_numbers"], p["feature_group_count"]
    if p["batch_group_count"] != 1:
        _keep_all(step, "is convolved with groups in the batch")
        return
    (batch, features, *space), (given, taken, *window), (b, f, *places) = (
        numbers.lhs_spec,
        numbers.rhs_spec,
        numbers.out_spec,
    )
    why = "is a place in space"
    for node, dims in ((step.ins[0], space), (step.ins[1], window)):
        for d in dims:
            fix(node.axes[d], why)
    out.axes = list(map(fresh, out.aval.shape))
    out.axes[b] = left.axes[batch]
    for d in places:
        out.axes[d] = fresh(out.aval.shape[d], why)
    each = right.aval.shape[given] // groups
    group, mine = fresh(groups), fresh(each)
    step.extra["groups"] = group
    _meet(left.axes[features], (*group, *right.axes[taken]), step.name)
    _meet(right.axes[given], (*group, *mine), step.name)
    out.axes[f] = right.axes[given]


def _pool(step: Step) -> None:
    p, source, out = step.eqn.params, step.ins[0], step.outs[0]
    axes = []
    for d, (axis, window) in enumerate(zip(source.axes, p["window_dimensions"], strict=True)):
        through = window == 1 and p["window_strides"][d] == 1 and tuple(p["padding"][d]) == (0, 0)
        if not through:
            fix(axis, "is a place in space")
        axes.append(axis if through else fresh(out.aval.shape[d], "is a place in space"))
    for out in step.outs:
        out.axes = axes


for _name in ("reduce_window_max", "reduce_window_min", "reduce_window_sum", "reduce_window"):
    RULES[_name] = _pool


@rule("gather")
def _gather(step: Step) -> None:
    p, source, out = step.eqn.params, step.ins[0], step.outs[0]
    numbers, sizes = p["dimension_numbers"], p["slice_sizes"]
    gone = (*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ()))
    kept = [d for d in range(len(sizes)) if d not in gone]
    batch = [a for d, a in enumerate(step.ins[1].axes[:-1])]
    axes, at = [], iter(batch)
    for d in range(len(out.aval.shape)):
        if d not in numbers.offset_dims:
            axes.append(next(at, fresh(out.aval.shape[d])))
            continue
        source_dim = kept[numbers.offset_dims.index(d)]
        if sizes[source_dim] == source.aval.shape[source_dim]:
            axes.append(source.axes[source_dim])
        else:
            fix(source.axes[source_dim], "is indexed")
            axes.append(fresh(out.aval.shape[d], "is indexed"))
    for d in gone:
        fix(source.axes[d], "is indexed")
    for axis in step.ins[1].axes[-1:]:
        fix(axis, "is an index")
    out.axes = axes


@rule("dynamic_slice")
def _dynamic_slice(step: Step) -> None:
    source, out = step.ins[0], step.outs[0]
    out.axes = []
    for axis, whole, count in zip(
        source.axes, source.aval.shape, step.eqn.params["slice_sizes"], strict=True
    ):
        if count != whole:
            fix(axis, "is indexed")
        out.axes.append(axis if count == whole else fresh(count, "is indexed"))


@rule("dynamic_update_slice")
def _dynamic_update(step: Step) -> None:
    source, update, out = step.ins[0], step.ins[1], step.outs[0]
    for a, b, whole, count in zip(
        source.axes, update.axes, source.aval.shape, update.aval.shape, strict=True
    ):
        if whole == count:
            _meet(a, b, step.name)
        else:
            fix(a, "is indexed")
            fix(b, "is indexed")
    out.axes = list(source.axes)


@rule(
    "random_wrap",
    "random_unwrap",
    "random_bits",
    "random_fold_in",
    "random_seed",
    "threefry2x32",
    "random_split",
)
def _random(step: Step) -> None:
    for node in step.ins:
        for axis in node.axes:
            fix(axis, "is a key")


@rule("random_bits")
def _bits(step: Step) -> None:
    _random(step)
    keys = len(step.ins[0].axes)
    step.outs[0].axes = [*step.ins[0].axes, *map(fresh, step.outs[0].aval.shape[keys:])]


def deeper(step: Step) -> None:
    """Records what a scan, a while or a cond contains."""
    {"scan": _scan, "while": _while, "cond": _cond}[step.name](step)


def _body(closed: Any, inputs: list[Node]) -> Tape:
    return record(closed, inputs, apply, deeper)


def _same(outs: list[Node], ins: list[Node], what: str) -> None:
    for a, b in zip(outs, ins, strict=True):
        for one, other in zip(a.axes, b.axes, strict=True):
            _meet(one, other, what)


def _scan(step: Step) -> None:
    p = step.eqn.params
    consts, carries = p["num_consts"], p["num_carry"]
    closed = p["jaxpr"]
    length = fresh(p["length"], "is the length of a scan")
    inputs = []
    for place, (node, var) in enumerate(zip(step.ins, closed.jaxpr.invars, strict=True)):
        scanned = place >= consts + carries
        if scanned:
            _meet(node.axes[0], length, "scan")
        inputs.append(Node(var.aval, node.axes[1:] if scanned else node.axes))
    body = _body(closed, inputs)
    step.parts = [body]
    _same(body.outputs[:carries], inputs[consts : consts + carries], "scan")
    for place, (out, inner) in enumerate(zip(step.outs, body.outputs, strict=True)):
        out.axes = list(inner.axes) if place < carries else [length, *inner.axes]


def _while(step: Step) -> None:
    p = step.eqn.params
    first, second = p["cond_nconsts"], p["body_nconsts"]
    state = step.ins[first + second :]

    def inner(closed: Any, nodes: list[Node]) -> Tape:
        return _body(
            closed, [Node(v.aval, n.axes) for v, n in zip(closed.jaxpr.invars, nodes, strict=True)]
        )

    condition = inner(p["cond_jaxpr"], [*step.ins[:first], *state])
    body = inner(p["body_jaxpr"], [*step.ins[first : first + second], *state])
    step.parts = [condition, body]
    _same(body.outputs, state, "while")
    for out, node in zip(step.outs, state, strict=True):
        out.axes = list(node.axes)


def _cond(step: Step) -> None:
    for closed in step.eqn.params["branches"]:
        nodes = [
            Node(v.aval, n.axes) for v, n in zip(closed.jaxpr.invars, step.ins[1:], strict=True)
        ]
        step.parts.append(_body(closed, nodes))
    for part in step.parts[1:]:
        _same(part.outputs, step.parts[0].outputs, "cond")
    for out, inner in zip(step.outs, step.parts[0].outputs, strict=True):
        out.axes = list(inner.axes)
