"""A traced function as a flat list of steps, and the uses of its parameters in it.

:mod:`adaptivenet.posterior.capture` is made of this.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from adaptivenet.posterior._arrays import wide

__all__ = ["Finder", "Product", "Program", "Site", "run", "written"]


@dataclass(frozen=True)
class Site:
    """A kernel, and the product it stands in.

    Attributes:
      path: of the kernel.
      kernel: its place among the leaves of the parameters.
      bias: the place of the bias that is added to the product, if one is.
      inputs: rows of the kernel as a matrix, without the bias.
      outputs: its columns.
      positions: how often an example uses the kernel; 1 for a dense layer on a vector.
    """

    path: str
    kernel: int
    bias: int | None
    inputs: int
    outputs: int
    positions: int
    views: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    bias_shape: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix: inputs, and one more if there is a bias, times outputs."""
        return self.inputs + (self.bias is not None), self.outputs

    @property
    def members(self) -> tuple[int, ...]:
        """The places of its leaves."""
        return (self.kernel,) if self.bias is None else (self.kernel, self.bias)

    def matrix(self, leaves: Mapping[int, Any] | Sequence[Any]) -> jax.Array:
        """Kernel and bias as one matrix ``[inputs (+ 1), outputs]``."""
        found = wide(leaves[self.kernel])
        for view in self.views:
            found = _view(found, view)
        if self.bias is None:
            return found
        return jnp.concatenate([found, wide(leaves[self.bias]).reshape(1, self.outputs)])

    def leaves(self, matrix: jax.Array) -> dict[int, jax.Array]:
        """The inverse of :meth:`matrix`: the leaves by their places."""
        found = matrix[: self.inputs]
        for kind, argument, before in reversed(self.views):
            if kind == "transpose":
                found = jnp.transpose(found, tuple(int(i) for i in np.argsort(argument)))
            else:
                found = found.reshape(before)
        if self.bias is None:
            return {self.kernel: found}
        return {self.kernel: found, self.bias: matrix[self.inputs].reshape(self.bias_shape)}


# --- the traced function as a flat list of steps -------------------------------------------------

# What only contains another jaxpr. (Functions with derivatives of their own are left whole.)
# fmt: off
_INLINED = frozenset([
    "checkpoint", "closed_call", "core_call", "core_closed_call", "jit", "pjit", "remat", "remat2",
])
# fmt: on


@dataclass(eq=False)
class Step:
    number: int
    eqn: Any
    ins: list[Any]  # places of values, or literals
    outs: list[int]
    body: Program | None = None

    @property
    def name(self) -> str:
        return self.eqn.primitive.name


@dataclass(eq=False)
class Program:
    """Steps from inputs to outputs; values go by numbers, of which each has its own."""

    inputs: list[int]
    steps: list[Step]
    outputs: list[Any]
    consts: dict[int, Any] = field(default_factory=dict)

    def numbers(self) -> Iterator[int]:
        """The numbers of all steps, also within scans."""
        for step in self.steps:
            yield step.number
            if step.body is not None:
                yield from step.body.numbers()


class _Literal(NamedTuple):
    value: Any


def written(closed: Any, count: Any = None) -> Program:
    """A closed jaxpr written out; every value has a number of its own, also within scans."""
    count = itertools.count() if count is None else count
    inputs = [next(count) for _ in closed.jaxpr.invars]
    program = Program(inputs, [], [])
    program.outputs = _write(program, closed.jaxpr, closed.consts, inputs, count)
    return program


def _write(program: Program, jaxpr: Any, consts: Any, inputs: list[Any], count: Any) -> list[Any]:
    env: dict[Any, Any] = dict(zip(jaxpr.invars, inputs, strict=True))
    for var, value in zip(jaxpr.constvars, consts, strict=True):
        env[var] = next(count)
        program.consts[env[var]] = value

    def find(atom: Any) -> Any:
        if isinstance(atom, jax.extend.core.Literal):
            return _Literal(atom.val)
        return env[atom]

    for eqn in jaxpr.eqns:
        ins = list(map(find, eqn.invars))
        inner = next((eqn.params[k] for k in ("jaxpr", "call_jaxpr") if k in eqn.params), None)
        if eqn.primitive.name in _INLINED and inner is not None:
            open_, known = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
            outs = _write(program, open_, known, ins, count)
        else:
            outs = [next(count) for _ in eqn.outvars]
            body = written(inner, count) if eqn.primitive.name == "scan" else None
            program.steps.append(Step(next(count), eqn, ins, outs, body))
        env.update(zip(eqn.outvars, outs, strict=True))
    return list(map(find, jaxpr.outvars))


def run(program: Program, inputs: list[Any], zs: dict[int, Any], records: dict[int, Any]) -> Any:
    """Evaluates a program; adds to the products what ``zs`` holds for them, notes their inputs."""
    env: dict[int, Any] = dict(zip(program.inputs, inputs, strict=True)) | program.consts
    for step in program.steps:
        ins = [ref.value if isinstance(ref, _Literal) else env[ref] for ref in step.ins]
        within = [] if step.body is None else [n for n in step.body.numbers() if n in zs]
        if step.body is not None and within:
            outs = _scanned(step, ins, {n: zs[n] for n in within}, records)
        else:
            params = step.eqn.primitive.get_bind_params(step.eqn.params)
            outs = step.eqn.primitive.bind(*ins, **params)
            outs = list(outs) if step.eqn.primitive.multiple_results else [outs]
        if step.number in zs:
            outs = [outs[0] + zs[step.number]]
            records[step.number] = ins
        env.update(zip(step.outs, outs, strict=True))
    return [ref.value if isinstance(ref, _Literal) else env[ref] for ref in program.outputs]


def _scanned(step: Step, ins: list[Any], zs: dict[int, Any], records: dict[int, Any]) -> list[Any]:
    given, body = step.eqn.params, step.body
    assert body is not None
    fixed, carried = _counts(step.eqn)
    consts, carry, xs = ins[:fixed], ins[fixed : fixed + carried], ins[fixed + carried :]

    def each(carry: list[Any], now: Any) -> Any:
        xs, zs = now
        noted: dict[int, Any] = {}
        outs = run(body, [*consts, *carry, *xs], zs, noted)
        return outs[:carried], (outs[carried:], noted)

    carry, (ys, noted) = jax.lax.scan(
        each, carry, (xs, zs), length=given["length"], reverse=given["reverse"]
    )
    records.update(noted)
    return [*carry, *ys]


def _counts(scan: Any) -> tuple[int, int]:
    """How many constants and carried values a scan has, by their shapes.

    Versions of jax name these numbers differently. What a scan goes through, and what it stacks,
    has one dimension less within.
    """
    inner = scan.params["jaxpr"].jaxpr
    ins = zip(scan.invars, inner.invars, strict=True)
    outs = zip(scan.outvars, inner.outvars, strict=True)
    passed = sum(len(a.aval.shape) != len(b.aval.shape) for a, b in ins)
    carried = sum(len(a.aval.shape) == len(b.aval.shape) for a, b in outs)
    return len(scan.invars) - passed - carried, carried


# --- finding kernels in it -----------------------------------------------------------------------


class _Origin(NamedTuple):
    """A value that is a leaf, seen through views."""

    leaf: int
    views: tuple[Any, ...] = ()
    spread: bool = False  # whether elements are repeated


class Product:
    """A step that multiplies a leaf with something."""

    def __init__(self, step: Step, side: int, origin: _Origin, scans: tuple[int, ...]) -> None:
        self.step, self.side, self.origin, self.scans = step, side, origin, scans
        p, self.out = step.eqn.params, step.eqn.outvars[0].aval
        shape = step.eqn.invars[side].aval.shape
        if step.name == "dot_general":
            contracted, _ = p["dimension_numbers"]
            mine, self.summed = tuple(contracted[side]), tuple(contracted[1 - side])
            free = tuple(d for d in range(len(shape)) if d not in mine)
            kept = len(self.out.shape) - len(free)
            self.features = tuple(range(kept, len(self.out.shape)))
            if side == 0:
                self.features = tuple(range(len(free)))
        else:
            numbers = p["dimension_numbers"]
            mine, free = tuple(numbers.rhs_spec[1:]), (numbers.rhs_spec[0],)
            self.window = tuple(shape[d] for d in numbers.rhs_spec[2:])
            self.features = (numbers.out_spec[1],)
        self.inputs = math.prod(shape[d] for d in mine)
        self.outputs = math.prod(shape[d] for d in free)
        order = (*mine, *free)
        turned = tuple(shape[d] for d in order)
        self.views = (
            *origin.views,
            ("transpose", order, shape),
            ("reshape", (self.inputs, self.outputs), turned),
        )
        self.positions = math.prod((*scans, *self.out.shape)) // max(self.outputs, 1)

    def zeros(self, size: int) -> jax.Array:
        """What is added to the result, for a batch of this size."""
        return jnp.zeros((size, *self.scans, *self.out.shape), self.out.dtype)

    def deltas(self, z: jax.Array) -> jax.Array:
        """Gradients at the result ``[*scans, *out]`` as ``[positions, outputs]``."""
        z = z.reshape(-1, *self.out.shape)
        last = tuple(range(1 + len(self.out.shape) - len(self.features), 1 + len(self.out.shape)))
        z = jnp.moveaxis(z, tuple(d + 1 for d in self.features), last)
        return z.reshape(-1, self.outputs)

    def rows(self, operands: Sequence[Any]) -> jax.Array:
        """What the kernel was multiplied with, ``[*scans, ...]``, as ``[positions, inputs]``."""
        other = operands[1 - self.side]
        shape = self.step.eqn.invars[1 - self.side].aval.shape
        other = jax.vmap(self._rows)(other.reshape(-1, *shape))
        return other.reshape(-1, self.inputs)

    def _rows(self, other: jax.Array) -> jax.Array:
        if self.step.name == "dot_general":
            free = [d for d in range(other.ndim) if d not in self.summed]
            return jnp.transpose(other, (*free, *self.summed)).reshape(-1, self.inputs)
        p = self.step.eqn.params
        images = jnp.transpose(other, p["dimension_numbers"].lhs_spec)
        patches = jax.lax.conv_general_dilated_patches(
            images,
            self.window,
            p["window_strides"],
            p["padding"],
            p["lhs_dilation"],
            p["rhs_dilation"],
            precision=jax.lax.Precision.HIGHEST,
        )
        # The pixels in the order of the result: images first and space as its layout has them.
        out = p["dimension_numbers"].out_spec
        order = [int(d) for d in np.argsort((out[0], *out[2:]))]
        patches = jnp.moveaxis(patches, 1, -1)
        return jnp.transpose(patches, (*order, patches.ndim - 1)).reshape(-1, self.inputs)


class Finder:
    """Looks for the uses of the leaves in a program."""

    def __init__(self, program: Program, count: int) -> None:
        self.program, self.count = program, count
        self.products: dict[int, list[Product]] = defaultdict(list)
        self.added: dict[int, list[tuple[Step, int, _Origin]]] = defaultdict(list)
        self.other: dict[int, list[str]] = defaultdict(list)
        self.readers: dict[int, list[Step]] = defaultdict(list)
        self.returned: Counter[int] = Counter()
        self.maker: dict[int, Step] = {}
        origins = {program.inputs[k]: _Origin(k) for k in range(count)}
        self._walk(program, origins, ())

    def _walk(self, program: Program, origins: dict[int, _Origin], scans: tuple[int, ...]) -> None:
        for step in program.steps:
            for ref in {r for r in step.ins if isinstance(r, int)}:
                self.readers[ref].append(step)
            for out in step.outs:
                self.maker[out] = step
            found = [origins.get(r) if isinstance(r, int) else None for r in step.ins]
            if step.body is not None:
                self._into(step, found, scans)
                continue
            leaves = [(k, origin) for k, origin in enumerate(found) if origin is not None]
            for side, origin in leaves:
                seen = _seen(step, origin)
                if seen is not None:
                    origins[step.outs[0]] = seen
                elif len(leaves) == 1 and _multiplies(step, side) and not origin.spread:
                    self.products[origin.leaf].append(Product(step, side, origin, scans))
                elif len(leaves) == 1 and step.name in ("add", "add_any"):
                    self.added[origin.leaf].append((step, side, origin))
                else:
                    self.other[origin.leaf].append(f"stands in {step.name}")
        for ref in program.outputs:
            if isinstance(ref, int):
                self.returned[ref] += 1
                if ref in origins:
                    self.other[origins[ref].leaf].append("is returned")

    def _into(self, step: Step, found: list[Any], scans: tuple[int, ...]) -> None:
        body, given = step.body, step.eqn.params
        assert body is not None
        inner: dict[int, _Origin] = {}
        for place, origin in enumerate(found):
            if origin is None:
                continue
            if place < _counts(step.eqn)[0]:
                inner[body.inputs[place]] = origin
            else:
                self.other[origin.leaf].append("goes through a scan step by step")
        self._walk(body, inner, (*scans, given["length"]))

    def sites(
        self, names: Sequence[str], leaves: Sequence[Any], chosen: frozenset[int]
    ) -> list[tuple[Site, list[Product]]]:
        """The kernels among the chosen leaves, each with the products it stands in."""
        found, joined = [], set()
        for leaf, products in self.products.items():  # in the order of their first use
            first = products[0]
            if leaf not in chosen or self.other[leaf] or self.added[leaf]:
                continue
            if any(p.views != first.views for p in products):
                continue
            bias = self._bias(products, leaves)
            bias = bias if bias in chosen and bias not in joined else None
            joined.add(bias)
            site = Site(
                path=names[leaf],
                kernel=leaf,
                bias=bias,
                inputs=first.inputs,
                outputs=first.outputs,
                positions=sum(p.positions for p in products),
                views=first.views,
                bias_shape=() if bias is None else tuple(leaves[bias].shape),
            )
            found.append((site, products))
        return found

    def _bias(self, products: list[Product], leaves: Sequence[Any]) -> int | None:
        """The leaf that is added to all these products, to each unit one element, and only here."""
        sums = [self._sum(product) for product in products]
        for leaf, added in self.added.items():
            if self.other[leaf] or leaf in self.products or len(added) != len(products):
                continue
            shape, origins = tuple(leaves[leaf].shape), {s.number: o for s, _, o in added}
            met = [origins.keys() & sums_of for sums_of in sums]
            if len(set().union(*met)) == len(products) and all(
                len(numbers) == 1 and _one_a_unit(product, origins[numbers.pop()], shape)
                for product, numbers in zip(products, met, strict=True)
            ):
                return leaf
        return None

    def _sum(self, product: Product) -> set[int]:
        """The additions, one after the other, that a product enters and that nothing else reads."""
        (result,) = product.step.outs
        found: set[int] = set()
        while len(self.readers[result]) == 1 and not self.returned[result]:
            (step,) = self.readers[result]
            out = step.eqn.outvars[0].aval
            if step.name not in ("add", "add_any") or out.shape != product.out.shape:
                break
            found.add(step.number)
            (result,) = step.outs
        return found

    def reason(self, leaf: int) -> str:
        """Why a leaf is no kernel."""
        if self.other[leaf]:
            return f"it {self.other[leaf][0]}"
        if self.added[leaf]:
            return "it is added, but not to a product whose kernel is found"
        if self.products[leaf]:
            return "it stands in products of different layouts"
        return "it is not used"

    def last(self) -> Product | None:
        """The product that is the output, but for a leaf that is added and for views."""
        (ref,) = self.program.outputs
        made = {p.step.outs[0]: p for products in self.products.values() for p in products}
        biases = {step.number: side for uses in self.added.values() for step, side, _ in uses}
        while ref in self.maker and ref not in made:
            step = self.maker[ref]
            if step.name in _VIEWS:
                ref = step.ins[0]
            elif step.number in biases:
                ref = step.ins[1 - biases[step.number]]
            else:
                return None
        return made.get(ref)


_COPIES = ("convert_element_type", "copy", "copy_p")
_VIEWS = ("reshape", "squeeze", "expand_dims", "transpose", *_COPIES)


def _seen(step: Step, origin: _Origin) -> _Origin | None:
    """What a leaf becomes in a step that only moves its elements; None for any other step."""
    before = tuple(step.eqn.invars[0].aval.shape)
    after = tuple(step.eqn.outvars[0].aval.shape)
    p = step.eqn.params
    if step.name == "broadcast_in_dim":
        placed = [1] * len(after)
        for size, dimension in zip(before, p["broadcast_dimensions"], strict=True):
            placed[dimension] = size
        views = (*origin.views, ("reshape", tuple(placed), before))
        if tuple(placed) == after:
            return _Origin(origin.leaf, views, origin.spread)
        return _Origin(origin.leaf, (*views, ("broadcast", after, tuple(placed))), True)
    if step.name not in _VIEWS:
        return None
    if step.name == "transpose":
        view = ("transpose", tuple(p["permutation"]), before)
    elif step.name in _COPIES:
        return origin if jnp.issubdtype(step.eqn.outvars[0].aval.dtype, jnp.floating) else None
    else:
        if p.get("dimensions") is not None and step.name == "reshape":
            return None
        view = ("reshape", after, before)
    return _Origin(origin.leaf, (*origin.views, view), origin.spread)


def _multiplies(step: Step, side: int) -> bool:
    """Whether a step is a plain product with a kernel on this side."""
    p = step.eqn.params
    if step.name == "dot_general":
        contracted, batched = p["dimension_numbers"]
        return bool(contracted[side]) and not batched[0]
    plain = side == 1 and step.name == "conv_general_dilated"
    return plain and p["feature_group_count"] == 1 and p["batch_group_count"] == 1


def _one_a_unit(product: Product, origin: _Origin, shape: tuple[int, ...]) -> bool:
    """Whether what is added is the leaf's k-th element at the k-th unit, at every position."""
    size, out = math.prod(shape), tuple(product.out.shape)
    if size != product.outputs:
        return False
    index: Any = np.arange(size).reshape(shape)
    for view in origin.views:
        index = _view(index, view)
    try:
        index = np.broadcast_to(index, out)
    except ValueError:
        return False
    last = range(len(out) - len(product.features), len(out))
    index = np.moveaxis(index, product.features, tuple(last)).reshape(-1, size)
    return bool((index == np.arange(size)).all())


def _view(array: Any, view: tuple[str, tuple[int, ...], tuple[int, ...]]) -> Any:
    kind, argument, _ = view
    if kind == "broadcast":
        return np.broadcast_to(array, argument)
    return array.transpose(argument) if kind == "transpose" else array.reshape(argument)
