"""Curvature as Kronecker factors: KFAC and EKFAC, and the Gaussian that they make.

For a kernel as a matrix ``W [inputs, outputs]`` (a bias that is added to its product is a last
row) the generalised Gauss-Newton matrix of the data is approximated by ``A (x) G``: A is the mean
of ``a a^T`` over the rows that enter the product, G the sum of ``d d^T`` over the gradients d that
come back to it. Where an example uses a kernel at several positions (pixels, steps), the *expand*
setting takes every position for an example of its own, and the *reduce* setting averages the rows
and sums the gradients over the positions first. Leaves that stand in no product keep their
diagonal.

References:
  Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature",
  ICML 2015; Grosse and Martens, "A Kronecker-factored approximate Fisher matrix for convolution
  layers", ICML 2016; Eschenhagen et al., "Kronecker-factored approximate curvature for modern
  neural network architectures", NeurIPS 2023; George et al., "Fast approximate natural gradient
  descent in a Kronecker-factored eigenbasis", NeurIPS 2018.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from adaptivenet import trees
from adaptivenet.posterior.capture import Trace
from adaptivenet.posterior.structured import Gaussian, prior_leaves, standard_normal
from adaptivenet.posterior.tracing import Site

PyTree = Any
Columns = Callable[[jax.Array, Any], tuple[int, Callable[[Any], jax.Array]]]

__all__ = ["Factors", "KroneckerPosterior", "factors", "kronecker", "moments", "summed"]

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class Factors(NamedTuple):
    """Sums over the data that the curvature is made of.

    Attributes:
      inputs: for each site A, ``[inputs, inputs]``.
      outputs: for each site G, ``[outputs, outputs]``.
      rest: for each leaf in no product the diagonal.
    """

    inputs: tuple[jax.Array, ...]
    outputs: tuple[jax.Array, ...]
    rest: tuple[jax.Array, ...]


def summed(
    function: Callable[[PyTree, PyTree], PyTree], params: PyTree, data: PyTree, batch: int | None
) -> PyTree:
    """The sum of a function of batches over all data, a batch at a time, as one compiled program.

    Args:
      function: of the parameters and a batch, a pytree of sums over its examples.
      params: the parameters.
      data: pytree of arrays ``[examples, ...]``.
      batch: examples at a time; None takes all at once.

    Returns:
      The sums.

    Raises:
      ValueError: the batch is not positive.

    >>> summed(lambda scale, x: scale * x.sum(), 2, jnp.arange(10), 4).item()
    90
    """
    size = jax.tree.leaves(data)[0].shape[0]
    if batch is not None and batch < 1:
        raise ValueError(f"batch_size must be a number of examples >= 1, not {batch}.")
    if batch is None or batch >= size:
        return jax.jit(function)(params, data)
    whole = size - size % batch

    def over(params: PyTree, data: PyTree) -> PyTree:
        chunks = jax.tree.map(lambda x: x[:whole].reshape(-1, batch, *x.shape[1:]), data)
        first = jax.tree.map(lambda x: x[0], chunks)
        start = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, params, first)
        )

        def add(total: PyTree, chunk: PyTree) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, function(params, chunk)), None

        total, _ = jax.lax.scan(add, start, chunks)
        if whole < size:
            last = function(params, jax.tree.map(lambda x: x[whole:], data))
            total = jax.tree.map(jnp.add, total, last)
        return total

    return jax.jit(over)(params, data)


def factors(
    found: Trace,
    params: PyTree,
    inputs: PyTree,
    columns: Columns,
    *,
    extra: PyTree = (),
    batch_size: int | None = None,
    sharing: str = "expand",
) -> Factors:
    """Kronecker factors of the curvature, summed over the data.

    Args:
      found: the traced function.
      params: the parameters.
      inputs: all data, ``[examples, ...]``.
      columns: of the outputs of a batch (and its ``extra``) how many cotangents to pull back, and
        the function that gives the k-th; the sum of their squares is the curvature of the loss.
      extra: pytree ``[examples, ...]`` that is handed to ``columns``.
      batch_size: examples at a time; None takes all at once.
      sharing: "expand" or "reduce", for kernels that an example uses more than once.

    Returns:
      The factors; ``A (x) G`` with the mean A and the sum G approximates the sum over the data.

    Raises:
      ValueError: another ``sharing``.
    """
    if sharing not in ("expand", "reduce"):
        raise ValueError(f"sharing must be 'expand' or 'reduce', not {sharing!r}.")
    reduce = sharing == "reduce"
    size = jax.tree.leaves(inputs)[0].shape[0]

    def batch(params: PyTree, data: Any) -> Factors:
        outputs, rows, pull = found.pullback(params, data[0])
        if reduce:
            rows = [x.mean(axis=1, keepdims=True) for x in rows]
        A = tuple(_einsum("nsi,nsj->ij", x, x) for x in rows)

        def each(cotangent: jax.Array) -> Any:
            deltas, rest = pull(cotangent)
            if reduce:
                deltas = [x.sum(axis=1, keepdims=True) for x in deltas]
            G = tuple(_einsum("nsi,nsj->ij", x, x) for x in deltas)
            return G, tuple(jnp.square(x).sum(axis=0) for x in rest)

        return Factors(A, *_over(columns(outputs, data[1]), each))

    total = summed(batch, params, (inputs, extra), batch_size)
    counts = [size * (1 if reduce else site.positions) for site in found.sites]
    return total._replace(inputs=tuple(A / n for A, n in zip(total.inputs, counts, strict=True)))


def moments(
    found: Trace,
    params: PyTree,
    inputs: PyTree,
    columns: Columns,
    *,
    bases: Sequence[tuple[jax.Array, jax.Array]] | None = None,
    extra: PyTree = (),
    batch_size: int | None = None,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """The exact diagonal of the curvature, in the given bases, summed over the data.

    A kernel that an example uses once costs one product of squares, ``(a^2)^T sum_k (d_k^2)``, for
    all its examples and cotangents; others take a matrix an example.

    Args:
      found: the traced function.
      params: the parameters.
      inputs: all data, ``[examples, ...]``.
      columns: as for :func:`factors`.
      bases: for each site orthonormal columns for its inputs and its outputs; without, the
        diagonal is that of the parameters themselves.
      extra: as for :func:`factors`.
      batch_size: examples at a time; None takes all at once.

    Returns:
      For each site ``[inputs, outputs]``, and for each leaf in no product its diagonal.
    """

    def batch(given: Any, data: Any) -> Any:
        params, bases = given
        outputs, rows, pull = found.pullback(params, data[0])
        if bases is not None:
            rows = [_einsum("nsi,ij->nsj", x, Q) for x, (Q, _) in zip(rows, bases, strict=True)]

        def each(cotangent: jax.Array) -> Any:
            deltas, rest = pull(cotangent)
            if bases is not None:
                deltas = [
                    _einsum("nsi,ij->nsj", x, Q) for x, (_, Q) in zip(deltas, bases, strict=True)
                ]
            sums = []
            for a, d in zip(rows, deltas, strict=True):
                if d.shape[1] == 1:  # added up over the cotangents first
                    sums.append(jnp.square(d[:, 0]))
                else:
                    sums.append(jnp.square(_einsum("nsi,nso->nio", a, d)).sum(axis=0))
            return tuple(sums), tuple(jnp.square(x).sum(axis=0) for x in rest)

        sums, rest = _over(columns(outputs, data[1]), each)
        return tuple(
            _einsum("ni,no->io", jnp.square(a[:, 0]), d) if a.shape[1] == 1 else d
            for a, d in zip(rows, sums, strict=True)
        ), rest

    return summed(batch, (params, bases), (inputs, extra), batch_size)


def _over(columns: tuple[int, Callable[[Any], jax.Array]], each: Callable[..., PyTree]) -> PyTree:
    """The sum over cotangents."""
    count, column = columns
    if count == 1:
        return each(column(0))
    start = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda k: each(column(k)), 0)
    )

    def add(total: PyTree, k: jax.Array) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, each(column(k))), None

    return jax.lax.scan(add, start, jnp.arange(count))[0]


# --- Gaussians -----------------------------------------------------------------------------------


class _Block(NamedTuple):
    """The precision of a site, ``S (Qi (x) Qo) diag(e) (Qi (x) Qo)^T S``."""

    inner: jax.Array  # Qi
    outer: jax.Array  # Qo
    values: jax.Array  # e, [inputs, outputs]
    left: jax.Array  # S is left (x) right
    right: jax.Array

    def turned(self, x: jax.Array, function: Callable[[jax.Array], jax.Array]) -> jax.Array:
        x = _einsum("ia,io,ob->ab", self.inner, x, self.outer)
        return _einsum("ia,ab,ob->io", self.inner, function(x), self.outer)

    @property
    def scale(self) -> jax.Array:
        return self.left[:, None] * self.right

    def diagonal(self, values: jax.Array) -> jax.Array:
        return _einsum("ia,ab,ob->io", self.inner**2, values, self.outer**2)


@trees.register_dataclass
@dataclass(frozen=True)
class KroneckerPosterior(Gaussian):
    """A Gaussian whose precision is a Kronecker product and a prior for each kernel.

    The prior is exact: its precision is one number a kernel, or a product of one number an input
    and one an output (so, one precision a unit).

    Attributes:
      factors: sums over the data.
      bases: eigenvalues and eigenvectors of the factors, for each site.
      exact: second moments in the eigenbasis, for each site (EKFAC); None for KFAC.
      blocks: precisions, made of these.
      shared: for each site, whether its kernel and bias have one prior precision.
    """

    factors: Factors
    bases: tuple[Any, ...]
    exact: tuple[jax.Array, ...] | None
    blocks: tuple[_Block, ...]
    shared: tuple[bool, ...] = field(metadata={"static": True})

    def with_prior(self, prior_precision: Any, *, shared: bool = False) -> KroneckerPosterior:
        """The same data with another prior, without another pass over them.

        Args:
          prior_precision: as for :func:`adaptivenet.posterior.laplace.laplace`.
          shared: promises that the prior has one number for each kernel with its bias, where that
            cannot be seen because it is traced; it saves an eigendecomposition.

        Returns:
          The posterior. (Of all that it computes, only ``log_determinant`` is to be differentiated
          with respect to a prior that is not shared.)

        Raises:
          ValueError: the prior is not positive, or of a form that this structure cannot have.
        """
        prior, one = prior_leaves(prior_precision, self.params, self.believed)
        known = dict(zip(self.believed, prior, strict=True))
        alike = tuple(one or shared or _alike(site, known) for site in self.sites)
        blocks = []
        for k, site in enumerate(self.sites):
            if not alike[k] and self.exact is not None:
                raise ValueError(
                    f"ekfac needs one prior precision for {site.path!r} and its bias (and to see "
                    "it, outside of jit): use structure='kronecker' or 'diagonal'."
                )
            wanted = site.matrix(known)
            if alike[k]:
                blocks.append(self._shared(k, wanted))
            else:
                blocks.append(self._whitened(k, site, wanted))
        return replace(self, prior=tuple(prior), blocks=tuple(blocks), shared=alike)

    def _shared(self, k: int, prior: jax.Array) -> _Block:
        (a, Qi), (g, Qo) = self.bases[k]
        values = a[:, None] * g if self.exact is None else self.exact[k]
        one = [jnp.ones_like(x) for x in (a, g)]
        return _Block(Qi, Qo, values + prior[0, 0], *one)

    def _whitened(self, k: int, site: Site, prior: jax.Array) -> _Block:
        """A (x) G + D = S (A' (x) G' + I) S with S the root of D, a product of two diagonals."""
        left, right = prior[:, 0] / prior[0, 0], prior[0]
        if not isinstance(prior, jax.core.Tracer):
            with jax.ensure_compile_time_eval():
                off = float(jnp.max(jnp.abs(left[:, None] * right / prior - 1)))
            if off > 1e-4:
                raise ValueError(
                    f"the prior precision of {site.path!r} (with its bias) must be a product of "
                    "one number an input and one an output: use structure='diagonal', or one "
                    "precision a unit for the kernel and the same for its bias."
                )
        left, right = jnp.sqrt(left), jnp.sqrt(right)
        A = self.factors.inputs[k] / (left[:, None] * left)
        G = self.factors.outputs[k] / (right[:, None] * right)
        (a, Qi), (g, Qo) = _eigen(A), _eigen(G)
        return _Block(Qi, Qo, a[:, None] * g + 1, left, right)

    def scaled(self, factor: Any) -> KroneckerPosterior:
        """With the curvature of the data multiplied by a number, and the same prior."""
        f = self.factors
        scaled = f._replace(
            outputs=tuple(x * factor for x in f.outputs), rest=tuple(x * factor for x in f.rest)
        )
        bases = tuple((inner, (g * factor, Qo)) for inner, (g, Qo) in self.bases)
        exact = None if self.exact is None else tuple(x * factor for x in self.exact)
        blocks = []
        for k, block in enumerate(self.blocks):
            data = block.values - (self._prior_matrix(k)[0, 0] if self.shared[k] else 1)
            blocks.append(block._replace(values=block.values + data * (factor - 1)))
        return replace(self, factors=scaled, bases=bases, exact=exact, blocks=tuple(blocks))

    def _prior_matrix(self, k: int) -> jax.Array:
        return self.sites[k].matrix(dict(zip(self.believed, self.prior, strict=True)))

    def _leafwise(
        self,
        on_block: Callable[[_Block, jax.Array], jax.Array],
        on_rest: Callable[[jax.Array, jax.Array], jax.Array],
        leaves: Sequence[jax.Array],
    ) -> list[jax.Array]:
        """Functions of blocks and of the precisions of other leaves, over leaves."""
        known, found = dict(zip(self.believed, leaves, strict=True)), {}
        for site, block in zip(self.sites, self.blocks, strict=True):
            found |= site.leaves(on_block(block, site.matrix(known)))
        for place, precision in self._rest().items():
            found[place] = on_rest(precision, known[place])
        return [found[place] for place in self.believed]

    def _rest(self) -> dict[int, jax.Array]:
        joined = {place for site in self.sites for place in site.members}
        places = [place for place in self.believed if place not in joined]
        prior = dict(zip(self.believed, self.prior, strict=True))
        return {k: f + prior[k] for k, f in zip(places, self.factors.rest, strict=True)}

    def _precision_diagonal(self) -> list[jax.Array]:
        return self._leafwise(
            lambda b, _: b.diagonal(b.values) * b.scale**2, lambda p, _: p, self.prior
        )

    def _variances(self) -> list[jax.Array]:
        return self._leafwise(
            lambda b, _: b.diagonal(1 / b.values) / b.scale**2, lambda p, _: 1 / p, self.prior
        )

    def _times(self, leaves: list[jax.Array]) -> list[jax.Array]:
        return self._leafwise(
            lambda b, x: b.turned(x * b.scale, lambda y: y * b.values) * b.scale,
            lambda p, x: p * x,
            leaves,
        )

    def _solve(self, leaves: list[jax.Array]) -> list[jax.Array]:
        return self._leafwise(
            lambda b, x: b.turned(x / b.scale, lambda y: y / b.values) / b.scale,
            lambda p, x: x / p,
            leaves,
        )

    def _noise(self, key: jax.Array) -> list[jax.Array]:
        return self._leafwise(
            lambda b, x: (
                _einsum("ia,ab,ob->io", b.inner, x / jnp.sqrt(b.values), b.outer) / b.scale
            ),
            lambda p, x: x / jnp.sqrt(p),
            standard_normal(key, self.prior),
        )

    def log_determinant(self) -> jax.Array:
        """Of the precision; differentiable with respect to the prior."""
        total = sum(jnp.log(p).sum() for p in self._rest().values())
        for b in self.blocks:
            total += jnp.log(b.values).sum() + 2 * jnp.log(b.scale).sum()
        # The derivative by a prior precision is the marginal variance. To differentiate the
        # eigenvectors instead would divide by differences of eigenvalues, of which many are 0.
        total = jax.lax.stop_gradient(total)
        for variance, prior in zip(self._variances(), self.prior, strict=True):
            change = prior - jax.lax.stop_gradient(prior)
            total += (jax.lax.stop_gradient(variance) * change).sum()
        return jnp.asarray(total)


def kronecker(
    found: Trace,
    params: PyTree,
    inputs: PyTree,
    columns: Columns,
    *,
    prior_precision: Any = 1.0,
    exact: bool = False,
    extra: PyTree = (),
    batch_size: int | None = None,
    sharing: str = "expand",
) -> KroneckerPosterior:
    """KFAC, or with ``exact`` EKFAC, of a traced function and a prior.

    EKFAC keeps the eigenvectors of the factors and takes the exact second moments of per-example
    gradients in that basis for eigenvalues, with a second pass over the data; no other choice of
    eigenvalues in this basis is nearer to the exact block in the Frobenius norm.

    Args:
      found: the traced function.
      params: the parameters.
      inputs: all data, ``[examples, ...]``.
      columns: as for :func:`factors`.
      prior_precision: as for :func:`adaptivenet.posterior.laplace.laplace`.
      exact: whether to take exact second moments.
      extra: as for :func:`factors`.
      batch_size: examples at a time; None takes all at once.
      sharing: "expand" or "reduce".

    Returns:
      The posterior.

    Raises:
      ValueError: as :func:`factors` and :meth:`KroneckerPosterior.with_prior`.

    >>> from adaptivenet.posterior.capture import trace
    >>> params, x = {"kernel": jnp.zeros((2, 1))}, jnp.array([[1.0, 2.0]])
    >>> apply = lambda p, x: x @ p["kernel"]
    >>> columns = lambda outputs, _: (1, lambda k: jnp.ones_like(outputs))  # of squared errors
    >>> belief = kronecker(trace(apply, params, x), params, x, columns)
    >>> belief.times({"kernel": jnp.array([[1.0], [0.0]])})["kernel"].round(4).tolist()
    [[2.0], [2.0]]
    """
    given: dict[str, Any] = {"extra": extra, "batch_size": batch_size}
    sums = factors(found, params, inputs, columns, sharing=sharing, **given)
    bases = tuple((_eigen(A), _eigen(G)) for A, G in zip(sums.inputs, sums.outputs, strict=True))
    squares = None
    if exact:
        turned = [(Qi, Qo) for (_, Qi), (_, Qo) in bases]
        squares, _ = moments(found, params, inputs, columns, bases=turned, **given)
    believed = tuple(sorted({*found.rest, *(k for site in found.sites for k in site.members)}))
    blank = KroneckerPosterior(
        params=params,
        prior=(),
        believed=believed,
        sites=found.sites,
        factors=sums,
        bases=bases,
        exact=squares,
        blocks=(),
        shared=(),
    )
    return blank.with_prior(prior_precision)


def _eigen(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, vectors = jnp.linalg.eigh(matrix)
    return jnp.maximum(values, 0), vectors


def _alike(site: Site, known: dict[int, jax.Array]) -> bool:
    """Whether kernel and bias have one and the same precision, as far as can be seen."""
    if any(isinstance(known[k], jax.core.Tracer) for k in site.members):
        return False
    values = np.concatenate([np.asarray(known[k]).ravel() for k in site.members])
    return bool((values == values[0]).all())
