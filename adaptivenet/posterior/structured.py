"""Gaussians on the parameters by the structure of their precision; what all have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet import trees
from adaptivenet.posterior._arrays import wide
from adaptivenet.posterior.gaussian import Posterior
from adaptivenet.posterior.tracing import Site

PyTree = Any

__all__ = ["DiagonalPosterior", "FullPosterior", "Gaussian", "prior_leaves", "standard_normal"]

_STATIC: dict[str, Any] = {"static": True}


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian on some leaves of the parameters: what all structures have in common.

    Attributes:
      params: the mean, and the leaves of which nothing is believed.
      prior: for each believed leaf the precision of its prior (of mean 0), of the leaf's shape.
      believed: places of the believed leaves.
      sites: kernels and their biases.
    """

    params: PyTree
    prior: tuple[jax.Array, ...]
    believed: tuple[int, ...] = field(metadata=_STATIC)
    sites: tuple[Site, ...] = field(metadata=_STATIC)

    @property
    def mean(self) -> PyTree:
        """Like the parameters; masked nodes where nothing is believed."""
        leaves = jax.tree.leaves(self.params)
        return self._tree([leaves[k] for k in self.believed])

    @property
    def prior_precision(self) -> PyTree:
        """Of each parameter; masked nodes where nothing is believed."""
        return self._tree(self.prior)

    @property
    def dimension(self) -> int:
        """How many parameters something is believed of."""
        return sum(x.size for x in self.prior)

    @property
    def names(self) -> tuple[str, ...]:
        """Paths of the believed leaves."""
        names = trees.paths(self.params)
        return tuple(names[k] for k in self.believed)

    def _tree(self, leaves: Sequence[Any]) -> PyTree:
        all_, treedef = jax.tree.flatten(self.params)
        known = dict(zip(self.believed, leaves, strict=True))
        return treedef.unflatten([known.get(k, optax.MaskedNode()) for k in range(len(all_))])

    def _picked(self, tree: PyTree) -> list[jax.Array]:
        """The believed leaves of a tree like the parameters."""
        treedef = jax.tree.structure(self.params)
        try:
            leaves = treedef.flatten_up_to(tree)
        except ValueError as error:
            raise ValueError(f"this tree is not like the parameters: {error}") from error
        masked = [
            n for n, k in zip(self.names, self.believed, strict=True) if trees.is_masked(leaves[k])
        ]
        if masked:
            raise ValueError(f"this tree has a masked node at {masked[0]!r}, which is believed.")
        return [wide(leaves[k]) for k in self.believed]

    def _means(self) -> list[jax.Array]:
        return self._picked(self.params)

    def _moved(self, steps: Sequence[jax.Array]) -> PyTree:
        leaves, treedef = jax.tree.flatten(self.params)
        for k, step in zip(self.believed, steps, strict=True):
            leaves[k] = (wide(leaves[k]) + step).astype(leaves[k].dtype)
        return treedef.unflatten(leaves)

    # What a structure supplies.

    def with_prior(self, prior_precision: Any, *, shared: bool = False) -> Any:
        """The same data with another prior."""
        raise NotImplementedError

    def scaled(self, factor: Any) -> Any:
        """With the curvature of the data multiplied, and the same prior."""
        raise NotImplementedError

    def _precision_diagonal(self) -> list[jax.Array]:
        raise NotImplementedError

    def _variances(self) -> list[jax.Array]:
        raise NotImplementedError

    def _times(self, leaves: list[jax.Array]) -> list[jax.Array]:
        raise NotImplementedError

    def _solve(self, leaves: list[jax.Array]) -> list[jax.Array]:
        raise NotImplementedError

    def _noise(self, key: jax.Array) -> list[jax.Array]:
        raise NotImplementedError

    def log_determinant(self) -> jax.Array:
        """Of the precision; differentiable with respect to the prior."""
        raise NotImplementedError

    # What follows from it.

    def diagonal(self, *, marginal: bool = False) -> Posterior:
        """The belief as independent Gaussians.

        Args:
          marginal: whether the precision is the inverse of the marginal variance; by default it is
            the diagonal of the precision matrix, which is what Kullback-Leibler divergence from
            independent Gaussians to this one chooses, and the curvature that saliencies need.

        Returns:
          The posterior.
        """
        if marginal:
            return Posterior(self.mean, self._tree([1 / x for x in self._variances()]))
        return Posterior(self.mean, self._tree(self._precision_diagonal()))

    def posterior(self, params: PyTree | None = None) -> Posterior:
        """As :meth:`diagonal`; the argument is ignored, states of estimators need it."""
        del params
        return self.diagonal()

    def variances(self) -> PyTree:
        """Marginal variances; masked nodes where nothing is believed."""
        return self._tree(self._variances())

    def times(self, vector: PyTree) -> PyTree:
        """The precision times a vector.

        Args:
          vector: a tree like the parameters; leaves of which nothing is believed are not read.

        Returns:
          Like it; masked nodes where nothing is believed.
        """
        return self._tree(self._times(self._picked(vector)))

    def solve(self, vector: PyTree) -> PyTree:
        """The covariance times a vector; as :meth:`times`."""
        return self._tree(self._solve(self._picked(vector)))

    def sample(self, key: jax.Array) -> PyTree:
        """A draw of the parameters; leaves of which nothing is believed stay as they are.

        Args:
          key: random key. ``jax.vmap(belief.sample)(jax.random.split(key, n))`` draws n.

        Returns:
          Parameters.
        """
        return self._moved(self._noise(key))

    def log_density(self, params: PyTree) -> jax.Array:
        """The normalized log density of a point, in nats; leaves not believed of are not read.

        Args:
          params: a tree like the parameters.

        Returns:
          Scalar.
        """
        apart = [x - m for x, m in zip(self._picked(params), self._means(), strict=True)]
        square = sum(
            jnp.vdot(x, y, precision=jax.lax.Precision.HIGHEST)
            for x, y in zip(apart, self._times(apart), strict=True)
        )
        constant = self.dimension * math.log(2 * math.pi)
        return 0.5 * (self.log_determinant() - square - constant)

    def widened(self) -> Self:
        """The same with a mean of 32 bits at least, so that draws are not rounded."""
        return replace(self, params=jax.tree.map(wide, self.params))


@trees.register_dataclass
@dataclass(frozen=True)
class DiagonalPosterior(Gaussian):
    """Independent Gaussians.

    Attributes:
      curvature: for each believed leaf the diagonal of the data's curvature.
    """

    curvature: tuple[jax.Array, ...]

    def with_prior(self, prior_precision: Any, *, shared: bool = False) -> DiagonalPosterior:
        """The same data with another prior, a number or a pytree that broadcasts to the leaves."""
        del shared
        prior, _ = prior_leaves(prior_precision, self.params, self.believed)
        return replace(self, prior=tuple(prior))

    def scaled(self, factor: Any) -> DiagonalPosterior:
        """With the curvature of the data multiplied by a number, and the same prior."""
        return replace(self, curvature=tuple(x * factor for x in self.curvature))

    def _precision_diagonal(self) -> list[jax.Array]:
        return [c + p for c, p in zip(self.curvature, self.prior, strict=True)]

    def _variances(self) -> list[jax.Array]:
        return [1 / x for x in self._precision_diagonal()]

    def _times(self, leaves: list[jax.Array]) -> list[jax.Array]:
        return [x * p for x, p in zip(leaves, self._precision_diagonal(), strict=True)]

    def _solve(self, leaves: list[jax.Array]) -> list[jax.Array]:
        return [x / p for x, p in zip(leaves, self._precision_diagonal(), strict=True)]

    def _noise(self, key: jax.Array) -> list[jax.Array]:
        draws = standard_normal(key, self.prior)
        return [x / jnp.sqrt(p) for x, p in zip(draws, self._precision_diagonal(), strict=True)]

    def log_determinant(self) -> jax.Array:
        """Of the precision; differentiable with respect to the prior."""
        return jnp.asarray(sum(jnp.log(p).sum() for p in self._precision_diagonal()))


@trees.register_dataclass
@dataclass(frozen=True)
class FullPosterior(Gaussian):
    """A Gaussian with all correlations.

    Attributes:
      curvature: ``[P, P]`` of the data, with the believed leaves one behind the other.
      root: lower triangular Cholesky factor of the precision.
    """

    curvature: jax.Array
    root: jax.Array

    def with_prior(self, prior_precision: Any, *, shared: bool = False) -> FullPosterior:
        """The same data with another prior, a number or a pytree that broadcasts to the leaves."""
        del shared
        prior, _ = prior_leaves(prior_precision, self.params, self.believed)
        return replace(self, prior=tuple(prior))._rooted()

    def scaled(self, factor: Any) -> FullPosterior:
        """With the curvature of the data multiplied by a number, and the same prior."""
        return replace(self, curvature=self.curvature * factor)._rooted()

    def _rooted(self) -> FullPosterior:
        return replace(self, root=jnp.linalg.cholesky(self.precision()))

    def precision(self) -> jax.Array:
        """The precision matrix, ``[P, P]``."""
        return self.curvature + jnp.diag(_joined(self.prior))

    def covariance(self) -> jax.Array:
        """The covariance matrix, ``[P, P]``."""
        return jax.scipy.linalg.cho_solve(
            (self.root, True), jnp.eye(self.dimension, dtype=self.root.dtype)
        )

    def _split(self, vector: jax.Array) -> list[jax.Array]:
        ends = np.cumsum([x.size for x in self.prior])[:-1]
        parts = jnp.split(vector, ends)
        return [part.reshape(x.shape) for part, x in zip(parts, self.prior, strict=True)]

    def _precision_diagonal(self) -> list[jax.Array]:
        return self._split(jnp.diagonal(self.precision()))

    def _variances(self) -> list[jax.Array]:
        half = jax.scipy.linalg.solve_triangular(
            self.root, jnp.eye(self.dimension, dtype=self.root.dtype), lower=True
        )
        return self._split(jnp.square(half).sum(axis=0))

    def _times(self, leaves: list[jax.Array]) -> list[jax.Array]:
        return self._split(
            jnp.matmul(self.precision(), _joined(leaves), precision=jax.lax.Precision.HIGHEST)
        )

    def _solve(self, leaves: list[jax.Array]) -> list[jax.Array]:
        return self._split(jax.scipy.linalg.cho_solve((self.root, True), _joined(leaves)))

    def _noise(self, key: jax.Array) -> list[jax.Array]:
        draw = _joined(standard_normal(key, self.prior))
        return self._split(
            jax.scipy.linalg.solve_triangular(self.root, draw, lower=True, trans="T")
        )

    def log_determinant(self) -> jax.Array:
        """Of the precision; differentiable with respect to the prior."""
        return 2 * jnp.log(jnp.diagonal(self.root)).sum()


def standard_normal(key: jax.Array, leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """A draw for each leaf."""
    keys = jax.random.split(key, len(leaves))
    return [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]


def prior_leaves(
    prior_precision: Any, params: PyTree, believed: Sequence[int]
) -> tuple[list[jax.Array], bool]:
    """A prior as one array for each believed leaf, and whether it is a single number."""
    leaves, treedef = jax.tree.flatten(params)
    names = trees.paths(params)
    one = jax.tree.structure(prior_precision) == jax.tree.structure(0) and not jnp.ndim(
        prior_precision
    )
    given = [prior_precision] * len(leaves)
    if not one:
        try:
            given = treedef.flatten_up_to(prior_precision)
        except ValueError as error:
            raise ValueError(
                "prior_precision must be a number, or a pytree like the parameters with numbers "
                f"or arrays that broadcast to the leaves: {error}"
            ) from error
    found = []
    for k in believed:
        if trees.is_masked(given[k]):
            raise ValueError(f"prior_precision has a masked node at {names[k]!r}: give a number.")
        kind = wide(jnp.zeros((), leaves[k].dtype)).dtype
        value = jnp.asarray(given[k]).astype(kind)
        if not isinstance(value, jax.core.Tracer):
            with jax.ensure_compile_time_eval():
                fine = bool(jnp.all((value > 0) & jnp.isfinite(value)))
            if not fine:
                raise ValueError(
                    f"the prior precision of {names[k]!r} must be positive and finite."
                )
        try:
            found.append(jnp.broadcast_to(value, leaves[k].shape))
        except ValueError as error:
            raise ValueError(
                f"the prior precision of {names[k]!r} has shape {value.shape}, which does not "
                f"broadcast to {leaves[k].shape}."
            ) from error
    return found, one


def _joined(leaves: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate([x.ravel() for x in leaves])
