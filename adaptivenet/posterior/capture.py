"""What goes into a kernel and what comes back to it, for every product with a kernel, in one pass.

A function ``apply(params, inputs)`` is traced for one example, and its products with a parameter
leaf are found (``dot_general`` and ``conv_general_dilated``, whatever layer classes wrote them,
also inside ``lax.scan``). A zero is added to the result of each: the gradient with respect to that
zero is the gradient at the pre-activations. With the inputs ``a`` and these gradients ``d`` the
gradient of the kernel for one example is ``sum_s a_s d_s^T`` over the positions s that share the
kernel (pixels of a convolution, steps of a sequence), which curvature needs and never has to build.

A bias that is added to the product belongs to it: its inputs are a last column of ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adaptivenet import trees
from adaptivenet.posterior._arrays import wide
from adaptivenet.posterior.tracing import Finder, Program, Site, run, written

PyTree = Any
Apply = Callable[[PyTree, Any], jax.Array]

__all__ = ["Captured", "Site", "Trace", "capture", "trace"]


class Captured(NamedTuple):
    """What :func:`capture` returns; dicts are by the path of the kernel, or of the leaf.

    Attributes:
      outputs: of the function.
      inputs: ``[batch, positions, inputs]``; with a bias the last column is ones.
      gradients: ``[batch, positions, outputs]``, at the pre-activations.
      others: per-example gradients ``[batch, *shape]`` of the leaves that stand in no product.
    """

    outputs: jax.Array
    inputs: dict[str, jax.Array]
    gradients: dict[str, jax.Array]
    others: dict[str, jax.Array]


class Trace:
    """A function whose products with kernels are known; made by :func:`trace`.

    Attributes:
      names: the paths of all leaves.
      sites: the products, in the order in which they are computed first.
      rest: places of the chosen leaves that belong to no site.
      others: why not, by path.
    """

    def __init__(self, program: Program, params: PyTree, chosen: Sequence[int]) -> None:
        leaves = jax.tree.leaves(params)
        self.names = trees.paths(params)
        self._program, self._dtypes = program, [leaf.dtype for leaf in leaves]
        self._finder = Finder(program, len(leaves))
        found = self._finder.sites(self.names, leaves, frozenset(chosen))
        self.sites = tuple(site for site, _ in found)
        self._products = [products for _, products in found]
        joined = {place for site in self.sites for place in site.members}
        self.rest = tuple(place for place in chosen if place not in joined)
        self.others = {self.names[place]: self._finder.reason(place) for place in self.rest}

    def last(self) -> Site:
        """The site whose product, with its bias, is the output.

        Raises:
          ValueError: the output is something else.
        """
        product = self._finder.last()
        for site, products in zip(self.sites, self._products, strict=True):
            if product in products and len(products) == 1 and not product.scans:
                return site
        raise ValueError(
            "the output of this function is not a product with a kernel of its own (plus a bias): "
            "name the leaves of its head with select=, such as select='readout'."
        )

    def pullback(
        self, params: PyTree, inputs: PyTree
    ) -> tuple[jax.Array, list[jax.Array], Callable[[jax.Array], Any]]:
        """Runs a batch forward.

        Args:
          params: the parameters.
          inputs: a batch, ``[batch, ...]``.

        Returns:
          The outputs ``[batch, ...]``; for each site its inputs ``[batch, positions, inputs]``;
          and a function from cotangents of the outputs to a pair: for each site the gradients
          ``[batch, positions, outputs]``, and for each leaf of ``rest`` those of each example.
        """
        leaves = jax.tree.leaves(params)
        size = jax.tree.leaves(inputs)[0].shape[0]
        zeros = [[p.zeros(size) for p in products] for products in self._products]
        rest = [jnp.broadcast_to(leaves[k], (size, *leaves[k].shape)) for k in self.rest]

        def one(zs: Any, rest: list[Any], example: PyTree) -> tuple[jax.Array, list[jax.Array]]:
            values, known = list(leaves), {}
            for place, leaf in zip(self.rest, rest, strict=True):
                values[place] = leaf
            for products, several in zip(self._products, zs, strict=True):
                known |= {p.step.number: z for p, z in zip(products, several, strict=True)}
            records: dict[int, Any] = {}
            (output,) = run(self._program, [*values, *jax.tree.leaves(example)], known, records)
            rows = [
                _with_ones(
                    jnp.concatenate([p.rows(records[p.step.number]) for p in products]), site
                )
                for site, products in zip(self.sites, self._products, strict=True)
            ]
            return output, rows

        outputs, pull, rows = jax.vjp(
            lambda zs, rest: jax.vmap(one)(zs, rest, inputs), zeros, rest, has_aux=True
        )

        def pulled(cotangent: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
            zs, rest = pull(cotangent.astype(outputs.dtype))
            deltas = [
                jnp.concatenate(
                    [jax.vmap(p.deltas)(z) for p, z in zip(products, several, strict=True)], axis=1
                )
                for products, several in zip(self._products, zs, strict=True)
            ]
            return list(map(wide, deltas)), list(map(wide, rest))

        return outputs, list(map(wide, rows)), pulled


def trace(apply: Apply, params: PyTree, inputs: PyTree, *, select: trees.Select = None) -> Trace:
    """Finds the products of a function with its kernels.

    A kernel is found if all its uses are products of one layout with something that is no
    parameter, after reshapes, transpositions and casts alone. Kernels of grouped convolutions,
    and those that are sliced, masked or tied to a look-up, are not; nor are leaves that are added
    or multiplied elementwise. These are named in ``others`` and are differentiated one example at
    a time, which takes a copy of them an example.

    Args:
      apply: ``apply(params, inputs) -> outputs``, whose examples do not depend on each other.
      params: the parameters.
      inputs: a batch, ``[batch, ...]`` or a pytree of such; only shapes and dtypes are read.
      select: regular expressions of the paths to look at; all floating leaves by default.

    Returns:
      The trace.

    Raises:
      ValueError: a pattern matches nothing, or the function does not map a batch to a batch.

    >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2), "scale": jnp.ones(2)}
    >>> apply = lambda p, x: p["scale"] * jnp.tanh(x @ p["kernel"] + p["bias"])
    >>> found = trace(apply, params, jnp.ones((5, 3)))
    >>> [(site.path, site.shape) for site in found.sites], found.others
    ([('kernel', (4, 2))], {'scale': 'it stands in mul'})
    """
    leaves = jax.tree.leaves(params)
    if select is None:
        chosen = [
            k for k, x in enumerate(leaves) if jnp.issubdtype(jnp.result_type(x), jnp.floating)
        ]
    else:
        picked = jax.tree.leaves(trees.select_leaves(params, select))
        chosen = [k for k, pick in enumerate(picked) if pick]
    if not chosen:
        raise ValueError("params holds no floating leaf.")
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(inputs)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"inputs must be a batch [batch, ...]; the first axes are {sorted(sizes)}."
        )

    def one(params: PyTree, example: PyTree) -> jax.Array:
        found = apply(params, jax.tree.map(lambda x: x[None], example))
        if not hasattr(found, "shape") or found.shape[:1] != (1,):
            what = getattr(found, "shape", type(found).__name__)
            raise ValueError(
                "apply(params, inputs) must map a batch [batch, ...] to one array [batch, ...]; "
                f"it maps a batch of 1 to {what}."
            )
        return found[0]

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params)
    example = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)), inputs
    )
    closed = jax.make_jaxpr(one)(shapes, example)
    return Trace(written(closed), shapes, chosen)


def capture(
    apply: Apply,
    params: PyTree,
    inputs: PyTree,
    cotangent: jax.Array | Callable[[jax.Array], jax.Array],
    *,
    select: trees.Select = None,
) -> Captured:
    """The inputs of every kernel and the gradients at its pre-activations, for a batch.

    One forward and one backward pass. ``sum_s inputs[n, s]^T gradients[n, s]`` is the gradient of
    the kernel (and, in its last row, of the bias) for example n.

    Args:
      apply: as for :func:`trace`.
      params: the parameters.
      inputs: a batch.
      cotangent: like the outputs: what to pull back; or a function that makes it of the outputs.
      select: as for :func:`trace`.

    Returns:
      The outputs, inputs, gradients, and per-example gradients of the leaves in no product.

    Raises:
      ValueError: as :func:`trace`.

    >>> params = {"kernel": jnp.array([[1.0], [2.0]]), "bias": jnp.zeros(1)}
    >>> apply = lambda p, x: x @ p["kernel"] + p["bias"]
    >>> found = capture(apply, params, jnp.array([[3.0, 4.0]]), lambda outputs: 2 * outputs)
    >>> found.inputs["kernel"].tolist(), found.gradients["kernel"].tolist()
    ([[[3.0, 4.0, 1.0]]], [[[22.0]]])
    """
    found = trace(apply, params, inputs, select=select)
    outputs, rows, pull = found.pullback(params, inputs)
    deltas, rest = pull(cotangent(outputs) if callable(cotangent) else jnp.asarray(cotangent))
    paths = [site.path for site in found.sites]
    return Captured(
        outputs=outputs,
        inputs=dict(zip(paths, rows, strict=True)),
        gradients=dict(zip(paths, deltas, strict=True)),
        others=dict(zip([found.names[k] for k in found.rest], rest, strict=True)),
    )


def _with_ones(rows: jax.Array, site: Site) -> jax.Array:
    if site.bias is None:
        return rows
    return jnp.concatenate([rows, jnp.ones((rows.shape[0], 1), rows.dtype)], axis=1)
