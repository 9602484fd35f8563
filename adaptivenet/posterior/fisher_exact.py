"""The diagonal of the Fisher information, by example: exact, sampled and empirical.

No gradient of a single example is ever formed for a dense layer. Where a parameter W acts on an
example through one product ``y = x W`` with a single vector x, the example's gradient is
``x delta^T`` with ``delta = dL/dy``, so that the sum of its squares over examples is
``(x^2)^T (delta^2)``: one matrix product, as for the gradient itself. Such products are found in
the traced function, whatever it was written with (plain functions, Linen, NNX, Equinox), by two
rules: the parameter has one use, a ``dot_general``, and what it meets there has one position.
Whatever else there is (biases, normalisation, convolutions, weights shared over positions) goes
through per-example gradients by ``vmap``, which always hold. The function is traced for a single
example, so that examples are independent by construction.

With labels of the model's own, as the Fisher information has it, the expectation over labels is
exact in as many backward passes as the head has outputs: ``E[g g^T] = sum_s J^T s s^T J`` for the
columns s of a square root of the Hessian of the loss by the outputs. Only the part of the network
above the first layer is passed through, and the product above is needed once, after the sum over s.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.core
import jax.extend.core
import jax.numpy as jnp
import optax

from adaptivenet.posterior._arrays import wide_dtype

PyTree = Any
Likelihood = Literal["categorical", "gaussian", "bernoulli"]
Kind = Literal["exact", "sampled", "empirical"]

__all__ = ["fisher_diagonal"]

# Elements of per-example gradients that a batch may take when its size is left open: 256 MB.
_ELEMENTS = 2**26
_LARGEST_BATCH = 256


def fisher_diagonal(
    apply: Callable[[PyTree, Any], jax.Array],
    params: PyTree,
    inputs: PyTree,
    targets: Any = None,
    *,
    likelihood: Likelihood = "categorical",
    kind: Kind = "exact",
    key: jax.Array | None = None,
    samples: int = 1,
    batch: int | None = None,
) -> PyTree:
    """The diagonal of the Fisher information, summed over examples.

    ``sum_i E[(d log p(y | x_i) / dw)^2]``, squared for every example by itself. The labels y are

    - ``exact``: the model's own, ``y ~ p(y | x_i)``, all of them: one backward pass an output. For
      these likelihoods it is the diagonal of the generalised Gauss-Newton matrix as well.
    - ``sampled``: the model's own, ``samples`` drawn for each example: unbiased, and one backward
      pass a sample.
    - ``empirical``: the given targets, in one backward pass. It is not the Fisher information, and
      is far from it where the model does not fit the data.

    Make a belief of it with ``calibrate(params, diagonal, prior=...)``.

    Args:
      apply: ``apply(params, inputs) -> outputs [examples, ...]``: logits (categorical, bernoulli)
        or means (gaussian). It is called with one example at a time, under ``vmap``.
      params: pytree of arrays; leaves that are not floating get masked nodes.
      inputs: array or pytree of arrays, examples along the first axis.
      targets: for ``empirical`` only: integer classes ``[examples]``, or an array of the shape of
        the outputs (gaussian: any numbers; bernoulli: in [0, 1]).
      likelihood: ``categorical`` (outputs ``[examples, classes]``), ``bernoulli`` (independent
        logits) or ``gaussian`` (of variance one: divide the result by another variance).
      kind: whose labels.
      key: random key for ``sampled``. The draws of an example depend on its position only.
      samples: draws for each example.
      batch: examples at a time. None takes at most 256, fewer where parameters outside of dense
        layers are many: their per-example gradients stay below 256 MB.

    Returns:
      Pytree like ``params``, float32 (float64 for float64 parameters), non-negative.

    Raises:
      ValueError: a likelihood that does not fit the outputs or the targets, missing targets or key,
        an unknown word.

    References:
      Kunstner et al., "Limitations of the empirical Fisher approximation", NeurIPS 2019; Dangel et
      al., "BackPACK: packing more into backprop", ICLR 2020, section 2 (square root of the loss
      Hessian, and squared products); van de Ven, "On the computation of the Fisher information in
      continual learning", ICLR blog posts 2025.

    >>> w, x = {"w": jnp.zeros((1, 2))}, jnp.array([[2.0]])
    >>> fisher_diagonal(lambda p, x: x @ p["w"], w, x)["w"].round(4).tolist()  # x^2 p (1 - p)
    [[1.0, 1.0]]
    """
    for word, value, words in (
        ("likelihood", likelihood, ("categorical", "gaussian", "bernoulli")),
        ("kind", kind, ("exact", "sampled", "empirical")),
    ):
        if value not in words:
            raise ValueError(f"{word}={value!r}; choose one of {', '.join(words)}.")
    if samples < 1 or (batch is not None and batch < 1):
        raise ValueError(f"samples={samples} and batch={batch} must be positive.")
    inputs = jax.tree.map(jnp.asarray, inputs)
    number = examples(inputs, "inputs")
    out = _head(apply, params, inputs)
    _check_head(out, likelihood)
    if kind == "sampled" and key is None:
        raise ValueError("kind='sampled' draws labels: give key=jax.random.key(...).")
    if kind != "empirical" and targets is not None:
        raise ValueError(
            f"targets are for kind='empirical'; with kind={kind!r} the labels are the model's own."
        )
    if kind == "empirical":
        targets = _check_targets(targets, out, number, likelihood)
    try:
        hash(apply)
    except TypeError:  # callable objects that hold arrays
        held = apply
        apply = lambda params, inputs: held(params, inputs)  # noqa: E731
    return _summed(apply, likelihood, kind, samples, batch, params, inputs, targets, key)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _summed(
    apply: Callable[..., Any],
    likelihood: Likelihood,
    kind: Kind,
    samples: int,
    batch: int | None,
    params: PyTree,
    inputs: PyTree,
    targets: Any,
    key: Any,
) -> PyTree:
    def one(params: PyTree, example: PyTree) -> jax.Array:
        return apply(params, jax.tree.map(lambda x: x[None], example))[0]

    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), inputs)
    plan = Plan(one, params, first)
    number = examples(inputs, "inputs")
    if batch is None:
        batch = max(1, min(_LARGEST_BATCH, _ELEMENTS // max(1, plan.loose_size)))
    rows = _factors(likelihood, kind, samples)

    def body(part: PyTree, fresh: jax.Array, places: jax.Array) -> PyTree:
        inputs, targets = part
        keys = None if key is None else jax.vmap(jax.random.fold_in, (None, 0))(key, places)
        extra = (targets, keys, fresh)

        def cotangents(out: jax.Array, extra: Any) -> jax.Array:
            target, key, fresh = extra
            found = rows(out.astype(wide_dtype(out.dtype)), target, key)
            return jnp.where(fresh, found, jnp.zeros_like(found))

        return plan.squares(params, inputs, extra, cotangents)[1]

    sums = in_chunks(body, (inputs, targets), number, batch)
    return plan.tree(sums)


# --- the likelihoods -----------------------------------------------------------------------------


def _factors(likelihood: Likelihood, kind: Kind, samples: int) -> Callable[..., jax.Array]:
    """Rows s ``[rows, outputs]`` with ``sum_s (J^T s)^2`` the diagonal of an example's Fisher."""

    def mean(out: jax.Array) -> jax.Array:
        if likelihood == "categorical":
            return jax.nn.softmax(out)
        return jax.nn.sigmoid(out) if likelihood == "bernoulli" else out

    def exact(out: jax.Array, target: Any, key: Any) -> jax.Array:
        del target, key
        p, eye = mean(out), jnp.eye(out.size, dtype=out.dtype)
        if likelihood == "categorical":
            return jnp.sqrt(p)[:, None] * (eye - p)
        if likelihood == "bernoulli":
            eye = eye * jnp.sqrt(p * (1 - p)).ravel()
        return eye.reshape(-1, *out.shape)

    def sampled(out: jax.Array, target: Any, key: jax.Array) -> jax.Array:
        del target
        p = mean(out)
        if likelihood == "gaussian":
            rows = jax.random.normal(key, (samples, *out.shape), out.dtype)
        elif likelihood == "bernoulli":
            rows = jax.random.bernoulli(key, p, (samples, *out.shape)).astype(out.dtype) - p
        else:
            drawn = jax.random.categorical(key, out, shape=(samples,))
            rows = jax.nn.one_hot(drawn, out.size, dtype=out.dtype) - p
        return rows * (samples**-0.5)

    def empirical(out: jax.Array, target: jax.Array, key: Any) -> jax.Array:
        del key
        if likelihood == "categorical":
            return (jax.nn.one_hot(target, out.size, dtype=out.dtype) - mean(out))[None]
        return (target.astype(out.dtype) - mean(out))[None]

    return {"exact": exact, "sampled": sampled, "empirical": empirical}[kind]


def _head(apply: Callable[..., Any], params: PyTree, inputs: PyTree) -> Any:
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), inputs)
    out = jax.eval_shape(apply, params, one)
    if not isinstance(out, jax.ShapeDtypeStruct):
        raise ValueError(
            "apply(params, inputs) must return one array, the outputs, not "
            f"{jax.tree.structure(out)}: wrap it in a function that does."
        )
    if not out.shape or out.shape[0] != 1 or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(
            "apply(params, inputs) must return floating outputs with examples along the first "
            f"axis; for one example it returns {out.dtype} of shape {out.shape}."
        )
    return out


def _check_head(out: Any, likelihood: Likelihood) -> None:
    if likelihood != "categorical":
        return
    if len(out.shape) != 2:
        raise ValueError(
            "likelihood='categorical' takes a head of outputs [examples, classes], but an example "
            f"has outputs of shape {out.shape[1:]}: have apply return the logits of one "
            "prediction, or choose likelihood='bernoulli' or 'gaussian'."
        )
    if out.shape[1] < 2:
        raise ValueError(
            "likelihood='categorical' takes a head of two or more classes, but an example has one "
            "output, which is certain: choose likelihood='bernoulli' for a single logit, or "
            "'gaussian'."
        )


def _check_targets(targets: Any, out: Any, number: int, likelihood: Likelihood) -> jax.Array:
    if targets is None:
        raise ValueError("kind='empirical' takes the labels of the data: give targets.")
    targets = jnp.asarray(targets)
    if likelihood == "categorical":
        wanted, kind, least, most = (number,), jnp.integer, 0, out.shape[1] - 1
    else:
        wanted, kind, least, most = (number, *out.shape[1:]), None, 0, 1
    if targets.shape != wanted or (kind and not jnp.issubdtype(targets.dtype, kind)):
        words = "integer classes" if kind else "targets like the outputs,"
        raise ValueError(
            f"likelihood={likelihood!r} takes {words} of shape {wanted}, not {targets.dtype} of "
            f"shape {targets.shape}."
        )
    if likelihood != "gaussian" and not isinstance(targets, jax.core.Tracer):
        low, high = float(jnp.min(targets)), float(jnp.max(targets))
        if not (least <= low and high <= most):
            raise ValueError(
                f"likelihood={likelihood!r} takes targets from {least} to {most} for this head; "
                f"these go from {low:g} to {high:g}."
            )
    return targets


# --- many examples -------------------------------------------------------------------------------


def examples(tree: PyTree, what: str) -> int:
    """The number of examples of a pytree, or an error that names it."""
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(tree)}
    if len(sizes) != 1 or sizes & {(), (0,)}:
        listing = ", ".join(str(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree))
        raise ValueError(
            f"{what} must be arrays with the same number of examples, at least one, along the "
            f"first axis; their shapes are {listing or '(none)'}."
        )
    return sizes.pop()[0]


def in_chunks(body: Callable[..., PyTree], data: PyTree, number: int, batch: int) -> PyTree:
    """Sums ``body(part, fresh, places)`` over parts of a batch of examples.

    The last part reaches back to be as long as the others; ``fresh`` is False at what it repeats.
    """
    if batch >= number:
        places = jnp.arange(number)
        return body(data, jnp.ones(number, bool), places)

    def step(total: PyTree, chunk: jax.Array) -> tuple[PyTree, None]:
        start = jnp.minimum(chunk * batch, number - batch)
        places = start + jnp.arange(batch)
        part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, batch), data)
        return jax.tree.map(jnp.add, total, body(part, places >= chunk * batch, places)), None

    def first() -> PyTree:
        part = jax.tree.map(lambda x: x[:batch], data)
        return body(part, jnp.ones(batch, bool), jnp.arange(batch))

    shapes = jax.eval_shape(first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(step, zeros, jnp.arange(-(-number // batch)))[0]


# --- one example ---------------------------------------------------------------------------------

# What only contains another jaxpr. (Custom derivatives are left whole.)
# fmt: off
_INLINED = frozenset([
    "checkpoint", "closed_call", "core_call", "core_closed_call", "jit", "pjit", "remat", "remat2",
])
# fmt: on


class _Mark(NamedTuple):
    """A value that is a parameter, moved about: which one, and by what."""

    leaf: int
    moves: tuple[Callable[[Any], Any], ...] = ()


class _Product(NamedTuple):
    """The one product through which a parameter acts on an example."""

    mark: _Mark
    eqn: Any
    side: int

    def pull(self, param: Any, x: jax.Array, delta: jax.Array) -> jax.Array:
        """``sum_b x_b delta_b^T`` in the layout of the parameter."""
        dtype = wide_dtype(param.dtype)

        def forward(weight: jax.Array) -> jax.Array:
            for move in self.mark.moves:
                weight = move(weight)

            def one(x: jax.Array) -> jax.Array:
                pair = (weight, x) if self.side == 0 else (x, weight)
                return jax.lax.dot_general(
                    *pair,
                    self.eqn.params["dimension_numbers"],
                    precision=jax.lax.Precision.HIGHEST,
                )

            return jax.vmap(one)(x.astype(dtype))

        like = jax.ShapeDtypeStruct(param.shape, dtype)
        return jax.linear_transpose(forward, like)(delta.astype(dtype))[0]


class Plan:
    """A traced function of parameters and one example, and how its gradients are squared.

    Args:
      function: ``function(params, example) -> array``.
      params: pytree of arrays or their shapes.
      example: pytree of shapes, without an axis of examples.

    Attributes:
      dense: leaves that act through one product with one vector.
      loose: the other floating leaves.
    """

    def __init__(self, function: Callable[..., Any], params: PyTree, example: PyTree) -> None:
        shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(jnp.shape(p), p.dtype), params)
        leaves, self.treedef = jax.tree.flatten(shapes)
        self.closed = jax.make_jaxpr(function)(shapes, example)
        self.floating = [
            place for place, p in enumerate(leaves) if jnp.issubdtype(p.dtype, jnp.floating)
        ]
        found: dict[int, _Product] = {}
        uses: list[int] = []
        marks = [_Mark(n) if n in self.floating else None for n in range(len(leaves))]
        marks += [None] * (len(self.closed.jaxpr.invars) - len(leaves))
        ends = _analyse(self.closed, marks, [0], found, uses)
        uses += [end.leaf for end in ends if end]
        self.products = {n: p for n, p in found.items() if uses.count(p.mark.leaf) == 1}
        self.dense = [product.mark.leaf for product in self.products.values()]
        self.loose = [place for place in self.floating if place not in self.dense]
        self.loose_size = sum(math.prod(leaves[place].shape) for place in self.loose)

    def squares(
        self,
        params: PyTree,
        batch: PyTree,
        extra: PyTree,
        cotangents: Callable[[jax.Array, Any], jax.Array],
        linear: bool = False,
    ) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
        """Sums of squared per-example gradients over a batch.

        Args:
          params: the parameters.
          batch: examples along the first axis.
          extra: pytree with the same axis, handed to ``cotangents``.
          cotangents: ``cotangents(output, extra) -> [rows, ...output]`` of one example; the squares
            of all rows add up.
          linear: whether to sum the gradients themselves as well (of a single row).

        Returns:
          The outputs of all examples, the squares and the gradients of the floating leaves.
        """
        leaves = jax.tree.leaves(params)

        def one(example: PyTree, extra: Any) -> Any:
            def forward(bumps: list[jax.Array], loose: list[jax.Array]) -> Any:
                filled = list(leaves)
                for place, leaf in zip(self.loose, loose, strict=True):
                    filled[place] = leaf
                caught: dict[int, jax.Array] = {}
                bump = {
                    place: (1 - product.side, bump)
                    for (place, product), bump in zip(self.products.items(), bumps, strict=True)
                }
                arguments = [*filled, *jax.tree.leaves(example)]
                [out] = _evaluate(self.closed, arguments, [0], bump, caught)
                return out, [caught[place] for place in self.products]

            bumps = [
                jnp.zeros(p.eqn.outvars[0].aval.shape, p.eqn.outvars[0].aval.dtype)
                for p in self.products.values()
            ]
            loose = [leaves[place] for place in self.loose]
            out, pull, caught = jax.vjp(forward, bumps, loose, has_aux=True)
            rows = cotangents(out, extra).astype(out.dtype)

            def square(grads: Any) -> Any:
                return jax.tree.map(lambda g: jnp.square(g.astype(wide_dtype(g.dtype))), grads)

            if len(rows) == 1:
                grads = pull(rows[0])
                return out, caught, square(grads), grads if linear else None
            shapes = jax.eval_shape(lambda: square(pull(rows[0])))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

            def add(total: Any, row: jax.Array) -> Any:
                return jax.tree.map(jnp.add, total, square(pull(row))), None

            return out, caught, jax.lax.scan(add, zeros, rows)[0], None

        out, caught, squared, grads = jax.vmap(one)(batch, extra)
        wide = [jnp.square(x.astype(wide_dtype(x.dtype))) for x in caught]
        sums = self._gather(leaves, wide, squared)
        return out, sums, self._gather(leaves, caught, grads) if linear else []

    def _gather(self, leaves: Sequence[Any], xs: Sequence[Any], pulled: Any) -> list[jax.Array]:
        deltas, loose = pulled
        sums = dict(
            zip(
                self.loose,
                (jnp.sum(g.astype(wide_dtype(g.dtype)), axis=0) for g in loose),
                strict=True,
            )
        )
        for product, x, delta in zip(self.products.values(), xs, deltas, strict=True):
            place = product.mark.leaf
            sums[place] = product.pull(leaves[place], x, delta)
        return [sums[place] for place in self.floating]

    def tree(self, sums: Sequence[jax.Array]) -> PyTree:
        """A pytree like the parameters; masked nodes for leaves that are not floating."""
        filled: list[Any] = [optax.MaskedNode()] * self.treedef.num_leaves
        for place, leaf in zip(self.floating, sums, strict=True):
            filled[place] = leaf
        return jax.tree.unflatten(self.treedef, filled)


def _open(jaxpr: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    """The variables of a jaxpr, closed or not, constants first; and the constants."""
    return (*jaxpr.constvars, *jaxpr.invars), getattr(jaxpr, "consts", ())


def _inner(eqn: Any) -> Any:
    return eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]


def _analyse(
    jaxpr: Any,
    marks: Sequence[_Mark | None],
    counter: list[int],
    found: dict[int, _Product],
    uses: list[int],
) -> list[_Mark | None]:
    """Follows parameters to the products they meet, by the order in which equations are visited.

    Every use of a parameter is noted, whatever it is, so that one with a single use that is a
    product is known to act through nothing else.
    """
    variables, consts = _open(jaxpr)
    env = dict(zip(variables, (*[None] * len(consts), *marks), strict=True))

    def read(atom: Any) -> _Mark | None:
        return None if isinstance(atom, jax.extend.core.Literal) else env.get(atom)

    for eqn in jaxpr.eqns:
        counter[0] += 1
        seen = list(map(read, eqn.invars))
        results: Sequence[_Mark | None] = [None] * len(eqn.outvars)
        if eqn.primitive.name in _INLINED:
            results = _analyse(_inner(eqn), seen, counter, found, uses)
        elif any(seen):
            move = _move(eqn)
            if move is not None and seen[0]:
                results = [seen[0]._replace(moves=(*seen[0].moves, move))]
            else:
                uses += [mark.leaf for mark in seen if mark]
                side = _product_side(eqn, seen)
                mark = None if side is None else seen[side]
                if side is not None and mark:
                    found[counter[0]] = _Product(mark, eqn, side)
        env.update(zip(eqn.outvars, results, strict=True))
    return list(map(read, jaxpr.outvars))


def _evaluate(
    jaxpr: Any,
    arguments: Sequence[Any],
    counter: list[int],
    bumps: dict[int, tuple[int, jax.Array]],
    caught: dict[int, jax.Array],
) -> list[Any]:
    """Evaluates a jaxpr; adds a bump to each chosen product, and keeps one of its operands."""
    variables, consts = _open(jaxpr)
    env = dict(zip(variables, (*consts, *arguments), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jax.extend.core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        counter[0] += 1
        place = counter[0]
        values = list(map(read, eqn.invars))
        with eqn.ctx.manager:
            if eqn.primitive.name in _INLINED:
                results = _evaluate(_inner(eqn), values, counter, bumps, caught)
            else:
                out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
                results = list(out) if eqn.primitive.multiple_results else [out]
        if place in bumps:
            operand, bump = bumps[place]
            results, caught[place] = [results[0] + bump], values[operand]
        env.update(zip(eqn.outvars, results, strict=True))
    return list(map(read, jaxpr.outvars))


def _move(eqn: Any) -> Callable[[Any], Any] | None:
    """What an equation does to a parameter if it only moves its numbers about."""
    name, of = eqn.primitive.name, eqn.params
    before, after = eqn.invars[0].aval, eqn.outvars[0].aval
    if name == "transpose":
        return lambda w: jnp.transpose(w, of["permutation"])
    if name in ("copy", "copy_p"):
        return lambda w: w
    if name == "convert_element_type":
        return (lambda w: w) if jnp.issubdtype(after.dtype, jnp.floating) else None
    shapes = name == "squeeze" or (name == "reshape" and of.get("dimensions") is None)
    grows = name == "broadcast_in_dim" and math.prod(before.shape) == math.prod(after.shape)
    return (lambda w: w.reshape(after.shape)) if shapes or grows else None


def _product_side(eqn: Any, seen: Sequence[_Mark | None]) -> int | None:
    """Which operand of a product is a parameter that meets a single vector."""
    if eqn.primitive.name != "dot_general" or all(seen):
        return None
    side = 0 if seen[0] else 1
    contracted, batched = eqn.params["dimension_numbers"]
    shape = eqn.invars[1 - side].aval.shape
    free = [size for axis, size in enumerate(shape) if axis not in contracted[1 - side]]
    return None if any(batched) or math.prod(free) != 1 else side
