"""Curvature of several tasks in slots, and its algebra.

:mod:`adaptivenet.consolidation.kronecker_elastic` is made of this, and says what it is for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet import trees
from adaptivenet.consolidation.boundary import needs_belief
from adaptivenet.posterior._arrays import wide
from adaptivenet.posterior.kronecker import KroneckerPosterior
from adaptivenet.posterior.structured import DiagonalPosterior, FullPosterior, Gaussian
from adaptivenet.posterior.tracing import Site

PyTree = Any
Like = Any  # a Gaussian or a Laplace approximation, or a function from parameters to one

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
_ANCHOR_STEPS = 100  # of conjugate gradients, for the anchor of two quadratics that become one


class Curvature(NamedTuple):
    """Curvature of the data, in slots along the first axis; zero in slots that are empty.

    Attributes:
      inner: for each kernel with its bias (a last row) columns ``[slots, inputs, inputs]``.
      outer: for each kernel columns ``[slots, outputs, outputs]``.
      values: for each kernel the diagonal in the product of both, ``[slots, inputs, outputs]``.
      rest: for each leaf in no product the diagonal, ``[slots, *shape]``.
      full: nothing, or one matrix ``[slots, P, P]`` for all leaves.
    """

    inner: tuple[jax.Array, ...]
    outer: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    rest: tuple[jax.Array, ...]
    full: tuple[jax.Array, ...]


# --- what is known of a belief before there is one -----------------------------------------------


class Plan(NamedTuple):
    """Which leaves a belief is of, and how they hang together; static."""

    believed: tuple[int, ...]
    sites: tuple[Site, ...]  # none for a full matrix
    loose: tuple[int, ...]  # in no site
    names: tuple[str, ...]
    leaves: int  # of the parameters


class Plans:
    """The plans of ``like``, one for each structure of parameters."""

    def __init__(self, like: Like) -> None:
        if not callable(like):
            as_structured(like, TypeError)
        self.like = like
        self.found: dict[Any, Plan] = {}

    def shapes(self, params: PyTree) -> Gaussian:
        """The shapes of a belief of these parameters."""
        if not callable(self.like):
            return as_structured(self.like, TypeError)
        return as_structured(jax.eval_shape(self.like, params), TypeError)

    def __call__(self, params: PyTree) -> Plan:
        """The plan, checked against the parameters."""
        leaves, treedef = jax.tree.flatten(params)
        key = (treedef, tuple(jnp.shape(x) for x in leaves))
        if key not in self.found:
            gaussian = self.shapes(params)
            theirs = jax.tree.leaves(gaussian.params)
            if [jnp.shape(x) for x in theirs] != [jnp.shape(x) for x in leaves]:
                raise ValueError(
                    "like= is of parameters with the shapes "
                    f"{[tuple(jnp.shape(x)) for x in theirs]}, but those that are updated have "
                    f"{dict(zip(trees.paths(params), map(jnp.shape, leaves), strict=True))}: give "
                    "a belief of the same parameters (to protect some leaves only, fit it with "
                    "select=, not with optax.masked)."
                )
            self.found[key] = plan_of(gaussian)
        return self.found[key]


def as_structured(belief: Any, error: type[Exception] = ValueError) -> Gaussian:
    """The Gaussian of a belief, if it is one with a structure."""
    found = getattr(belief, "gaussian", belief)
    if isinstance(found, (KroneckerPosterior, FullPosterior, DiagonalPosterior)):
        return found
    if belief is None:
        raise needs_belief("structured_elastic()")
    raise error(
        "structured_elastic() and structured_proximal() take a belief with correlations, not "
        f"{type(belief).__name__}: give an.posterior.laplace(..., structure='kronecker').gaussian "
        "(for independent Gaussians there is elastic())."
    )


def plan_of(gaussian: Gaussian) -> Plan:
    """What is static of a belief."""
    sites = gaussian.sites if isinstance(gaussian, KroneckerPosterior) else ()
    joined = {k for site in sites for k in site.members}
    full = isinstance(gaussian, FullPosterior)
    loose = () if full else tuple(k for k in gaussian.believed if k not in joined)
    total = len(jax.tree.leaves(gaussian.params))
    return Plan(gaussian.believed, sites, loose, gaussian.names, total)


def contents(gaussian: Gaussian) -> tuple[Curvature, tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """The curvature of the data (without slots), the mean and the prior, by believed leaf."""
    leaves = jax.tree.leaves(gaussian.params)
    means = tuple(wide(leaves[k]) for k in gaussian.believed)
    nothing = Curvature((), (), (), (), ())
    if isinstance(gaussian, FullPosterior):
        curvature = nothing._replace(full=(gaussian.curvature,))
    elif isinstance(gaussian, DiagonalPosterior):
        curvature = nothing._replace(rest=gaussian.curvature)
    else:
        assert isinstance(gaussian, KroneckerPosterior)
        values = gaussian.exact
        if values is None:
            values = tuple(a[:, None] * g for (a, _), (g, _) in gaussian.bases)
        curvature = Curvature(
            inner=tuple(inner for (_, inner), _ in gaussian.bases),
            outer=tuple(outer for _, (_, outer) in gaussian.bases),
            values=tuple(jnp.maximum(v, 0) for v in values),
            rest=gaussian.factors.rest,
            full=(),
        )
    return curvature, means, gaussian.prior


# --- algebra -------------------------------------------------------------------------------------


def each(plan: Plan, curvature: Curvature, vectors: Sequence[jax.Array]) -> list[jax.Array]:
    """The curvature of every slot times a vector (of one slot, or one for all)."""
    given, found = dict(zip(plan.believed, vectors, strict=True)), {}
    bases = zip(plan.sites, curvature.inner, curvature.outer, curvature.values, strict=True)
    for site, inner, outer, values in bases:
        turned = _matmul(_matmul(inner.mT, _matrices(site, given)), outer)
        found |= jax.vmap(site.leaves)(_matmul(_matmul(inner, values * turned), outer.mT))
    for k, diagonal in zip(plan.loose, curvature.rest, strict=True):
        found[k] = diagonal * given[k]
    for matrix in curvature.full:
        flat = jnp.concatenate([v.reshape(v.shape[0], -1) for v in vectors], axis=1)
        product = _matmul(matrix, flat[..., None])[..., 0]
        found |= dict(zip(plan.believed, _cut(product, vectors), strict=True))
    return [found[k] for k in plan.believed]


def _matrices(site: Site, given: dict[int, jax.Array]) -> jax.Array:
    """Kernels with their biases as matrices, one a slot."""
    return jax.vmap(lambda *m: site.matrix(dict(zip(site.members, m, strict=True))))(
        *(given[k] for k in site.members)
    )


def _cut(flat: jax.Array, like: Sequence[jax.Array]) -> list[jax.Array]:
    """``[slots, P]`` as leaves ``[slots, *shape]``."""
    shapes = [x.shape[1:] for x in like]
    ends = np.cumsum([int(np.prod(s)) for s in shapes])[:-1]
    parts = jnp.split(flat, ends, axis=1)
    return [p.reshape(p.shape[0], *s) for p, s in zip(parts, shapes, strict=True)]


def scaled(curvature: Curvature, factor: jax.Array) -> Curvature:
    def times(several: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(x * factor.astype(x.dtype) for x in several)

    return curvature._replace(
        values=times(curvature.values), rest=times(curvature.rest), full=times(curvature.full)
    )


def as_one(curvature: Curvature) -> Curvature:
    """All slots as one, without a slot axis."""
    inner, outer, values = [], [], []
    for Qi, Qo, v in zip(curvature.inner, curvature.outer, curvature.values, strict=True):
        # The partial traces of the sum of (Qi (x) Qo) diag(v) (Qi (x) Qo)^T.
        _, left = jnp.linalg.eigh(_matmul(Qi * v.sum(axis=2)[:, None], Qi.mT).sum(axis=0))
        _, right = jnp.linalg.eigh(_matmul(Qo * v.sum(axis=1)[:, None], Qo.mT).sum(axis=0))
        turns = jnp.square(_matmul(left.mT, Qi)), jnp.square(_matmul(right.mT, Qo))
        inner.append(left)
        outer.append(right)
        values.append(_matmul(_matmul(turns[0], v), turns[1].mT).sum(axis=0))
    return Curvature(
        tuple(inner),
        tuple(outer),
        tuple(values),
        tuple(x.sum(axis=0) for x in curvature.rest),
        tuple(x.sum(axis=0) for x in curvature.full),
    )


def between(
    plan: Plan,
    curvature: Curvature,
    anchors: Sequence[jax.Array],
    prior: Sequence[jax.Array],
) -> list[jax.Array]:
    """Where two quadratics (and the prior, at the first anchor) are least together."""
    apart = [a[1:] - a[:1] for a in anchors]  # from the first anchor
    second = jax.tree.map(lambda x: x[1:], curvature)
    target = [x.sum(axis=0) for x in each(plan, second, apart)]
    times = functools.partial(_summed, plan, curvature, prior)
    step, _ = jax.scipy.sparse.linalg.cg(times, target, tol=1e-6, maxiter=_ANCHOR_STEPS)
    return [a[0] + s for a, s in zip(anchors, step, strict=True)]


@functools.partial(jax.jit, static_argnames=("plan", "steps"))
def implicit(
    plan: Plan,
    curvature: Curvature,
    summary: Curvature,
    prior: Sequence[jax.Array],
    gradient: Sequence[jax.Array],
    c: jax.Array,
    steps: int,
) -> list[jax.Array]:
    """``-c (I + c (H + prior))^{-1}`` times a gradient.

    Args:
      plan: of the belief.
      curvature: in slots; their sum is H.
      summary: about the same in one slot.
      prior: for each believed leaf ``[1, *shape]``.
      gradient: for each believed leaf.
      c: scalar, not negative.
      steps: of conjugate gradients, at most.

    Returns:
      For each believed leaf the step.
    """
    target = [-c * x for x in gradient]
    for matrix in curvature.full:
        flat = jnp.concatenate([x.ravel() for x in target])
        diagonal = jnp.concatenate([p.ravel() for p in prior])
        system = c * (matrix.sum(axis=0) + jnp.diag(diagonal))
        system = jnp.eye(flat.size, dtype=flat.dtype) + system
        found = jax.scipy.linalg.solve(system, flat, assume_a="pos")
        return [x[0] for x in _cut(found[None], [x[None] for x in target])]

    def times(vectors: Sequence[jax.Array]) -> list[jax.Array]:
        pulls = _summed(plan, curvature, prior, vectors)
        return [v + c * h for v, h in zip(vectors, pulls, strict=True)]

    nearly = functools.partial(_divided, plan, summary, prior, c)
    found, _ = jax.scipy.sparse.linalg.cg(times, target, tol=1e-6, maxiter=steps, M=nearly)
    return found


def solved(
    plan: Plan,
    curvature: Curvature,
    prior: Sequence[jax.Array],
    apart: Sequence[jax.Array],
    c: jax.Array,
) -> list[jax.Array]:
    """``-c (I + c (H + prior))^{-1} (H + prior)`` times a vector, in one slot's eigenbases.

    Exact where :func:`even` is true: the prior is the same number in every basis then.

    Args:
      plan: of the belief; not of a full matrix.
      curvature: of one slot.
      prior: for each believed leaf ``[1, *shape]``.
      apart: for each believed leaf ``[1, *shape]``, what is multiplied.
      c: scalar, not negative.

    Returns:
      For each believed leaf the step.
    """

    def times(values: jax.Array, vector: jax.Array) -> jax.Array:
        return -c * values / (1 + c * values) * vector

    return _spectral(plan, curvature, prior, apart, times)


def even(plan: Plan, prior: Sequence[jax.Array]) -> jax.Array:
    """Whether every kernel with its bias has one prior precision."""
    before = dict(zip(plan.believed, prior, strict=True))
    matrices = [_matrices(site, before) for site in plan.sites]
    return jnp.all(jnp.array([m.min() == m.max() for m in matrices], bool))


def conditional(
    plan: Plan,
    curvature: Curvature,
    summary: Curvature | None,
    prior: Sequence[jax.Array],
    gradient: Sequence[jax.Array],
    free: Sequence[jax.Array],
    steps: int,
) -> list[jax.Array]:
    """``-H^{-1}`` times a gradient, where all but the free numbers stay as they are.

    Args:
      plan: of the belief.
      curvature: in slots; their sum and the prior are H.
      summary: about the same in one slot, or None.
      prior: for each believed leaf ``[1, *shape]``.
      gradient: for each believed leaf.
      free: likewise, bool.
      steps: of conjugate gradients, at most.

    Returns:
      For each believed leaf the step; zero where it is not free.
    """
    stiff = 1e3  # I + c H is c H, nearly, where a prior of about 1 is part of H

    def only(vectors: Sequence[jax.Array]) -> list[jax.Array]:
        pairs = zip(free, vectors, strict=True)
        return [jnp.where(f, v, jnp.zeros_like(v)) for f, v in pairs]

    def within(
        linear: Callable[[Sequence[jax.Array]], list[jax.Array]],
    ) -> Callable[[Sequence[jax.Array]], list[jax.Array]]:
        def applied(vectors: Sequence[jax.Array]) -> list[jax.Array]:
            held = zip(vectors, only(vectors), only(linear(only(vectors))), strict=True)
            return [v - o + h for v, o, h in held]

        return applied

    times = within(functools.partial(_summed, plan, curvature, prior))
    nearly = None
    if summary is not None:
        c = jnp.asarray(stiff, gradient[0].dtype)

        def divided(vectors: Sequence[jax.Array]) -> list[jax.Array]:
            return [c * v for v in _divided(plan, summary, prior, c, vectors)]

        nearly = within(divided)
    target = only([-g for g in gradient])
    found, _ = jax.scipy.sparse.linalg.cg(times, target, tol=1e-6, maxiter=steps, M=nearly)
    return found


def _summed(
    plan: Plan,
    curvature: Curvature,
    prior: Sequence[jax.Array],
    vectors: Sequence[jax.Array],
) -> list[jax.Array]:
    """The curvature of all slots, and the prior, times one vector."""
    pulls = each(plan, curvature, [v[None] for v in vectors])
    return [h.sum(axis=0) + p[0] * v for h, p, v in zip(pulls, prior, vectors, strict=True)]


def _divided(
    plan: Plan,
    curvature: Curvature,
    prior: Sequence[jax.Array],
    c: jax.Array,
    vectors: Sequence[jax.Array],
) -> list[jax.Array]:
    """A vector divided by ``I + c (H + prior)``, of a single slot, with a mean prior by kernel."""

    def divided(values: jax.Array, vector: jax.Array) -> jax.Array:
        return vector / (1 + c * values)

    return _spectral(plan, curvature, prior, [v[None] for v in vectors], divided)


def _spectral(
    plan: Plan,
    curvature: Curvature,
    prior: Sequence[jax.Array],
    vectors: Sequence[jax.Array],
    function: Callable[[jax.Array, jax.Array], jax.Array],
) -> list[jax.Array]:
    """A function of the eigenvalues of a single slot, applied to a vector ``[1, *shape]``."""
    given, found = dict(zip(plan.believed, vectors, strict=True)), {}
    before = dict(zip(plan.believed, prior, strict=True))
    bases = zip(plan.sites, curvature.inner, curvature.outer, curvature.values, strict=True)
    for site, inner, outer, values in bases:
        turned = _matmul(_matmul(inner.mT, _matrices(site, given)), outer)
        turned = function(values + _matrices(site, before).mean(), turned)
        found |= jax.vmap(site.leaves)(_matmul(_matmul(inner, turned), outer.mT))
    for k, diagonal in zip(plan.loose, curvature.rest, strict=True):
        found[k] = function(diagonal + before[k], given[k])
    return [found[k][0] for k in plan.believed]
