"""Predictions that average over what is believed of the parameters.

Two ways: the outputs linearised in the parameters, whose distribution is a Gaussian in closed form
(:func:`linearised`, then :func:`regression` or :func:`probabilities`), and plain averages over
draws of the parameters (:func:`averaged`). A belief is what
:func:`adaptivenet.posterior.laplace.laplace` returns, or any ``Posterior(mean, precision)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp

from adaptivenet.posterior._arrays import wide
from adaptivenet.posterior.capture import Apply
from adaptivenet.posterior.laplace import LIKELIHOODS, as_gaussian

PyTree = Any

METHODS = ("probit", "sampled")

__all__ = ["Linearised", "Moments", "averaged", "linearised", "probabilities", "regression"]


class Linearised(NamedTuple):
    """A Gaussian over the outputs of each example.

    Attributes:
      mean: ``[examples, ...]``, the outputs at the mean of the parameters.
      covariance: ``[examples, K, K]`` with the K outputs of an example one behind the other.
    """

    mean: jax.Array
    covariance: jax.Array

    def variance(self) -> jax.Array:
        """Of each output, in the shape of the mean."""
        return jnp.diagonal(self.covariance, axis1=-2, axis2=-1).reshape(self.mean.shape)


class Moments(NamedTuple):
    """Mean and variance of a prediction, ``[examples, ...]`` each."""

    mean: jax.Array
    variance: jax.Array


def linearised(
    belief: Any,
    apply: Apply,
    inputs: PyTree,
    *,
    params: PyTree | None = None,
    batch_size: int | None = None,
) -> Linearised:
    """The outputs as a Gaussian, by their linearisation at the mean of the parameters.

    It is the prediction that belongs to a Laplace approximation with the generalised Gauss-Newton
    matrix, which is the curvature of the linearised network; exact if the outputs are linear in
    the parameters.

    Args:
      belief: a Laplace approximation or a posterior.
      apply: ``apply(params, inputs) -> outputs [examples, ...]``.
      inputs: ``[examples, ...]``.
      params: the parameters, where a posterior has masked leaves.
      batch_size: examples at a time; each takes a Jacobian, outputs times parameters. All by
        default.

    Returns:
      Mean and covariance of the outputs.

    Raises:
      TypeError, ValueError: as :func:`adaptivenet.posterior.laplace.as_gaussian`.

    References:
      Khan et al., "Approximate inference turns deep networks into Gaussian processes", NeurIPS
      2019; Immer et al., "Improving predictions of Bayesian neural nets via local linearization",
      AISTATS 2021.

    >>> from adaptivenet.posterior.gaussian import Posterior
    >>> belief = Posterior({"w": jnp.array([[2.0]])}, {"w": jnp.array([[4.0]])})
    >>> found = linearised(belief, lambda p, x: x @ p["w"], jnp.array([[3.0]]))
    >>> found.mean.tolist(), found.covariance.tolist()
    ([[6.0]], [[[2.25]]])
    """
    gaussian = as_gaussian(belief, params)
    leaves, treedef = jax.tree.flatten(gaussian.params)

    def one(example: PyTree) -> Linearised:
        def outputs(chosen: list[jax.Array]) -> jax.Array:
            new = list(leaves)
            for k, leaf in zip(gaussian.believed, chosen, strict=True):
                new[k] = leaf
            return apply(treedef.unflatten(new), jax.tree.map(lambda x: x[None], example))[0]

        mean, pull = jax.vjp(outputs, [leaves[k] for k in gaussian.believed])
        size = math.prod(mean.shape)
        units = jnp.eye(size, dtype=mean.dtype).reshape(size, *mean.shape)
        (rows,) = jax.vmap(pull)(units)
        rows = list(map(wide, rows))
        solved = jax.vmap(gaussian._solve)(rows)
        covariance = jnp.zeros((size, size), rows[0].dtype)
        for a, b in zip(rows, solved, strict=True):
            a, b = a.reshape(size, -1), b.reshape(size, -1)
            covariance += jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
        return Linearised(wide(mean), 0.5 * (covariance + covariance.T))

    count = jax.tree.leaves(inputs)[0].shape[0]
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be a number of examples >= 1, not {batch_size}.")
    return jax.lax.map(one, inputs, batch_size=min(batch_size or count, count))


def regression(found: Linearised, noise: Any = 0.0) -> Moments:
    """Mean and variance of what will be observed.

    Args:
      found: of :func:`linearised`.
      noise: variance of the observations; 0 gives the variance of the outputs themselves.

    Returns:
      Mean and variance, exact for the linearised model.

    Raises:
      ValueError: negative noise.

    >>> found = Linearised(jnp.array([[6.0]]), jnp.array([[[2.25]]]))
    >>> regression(found, 0.5).variance.tolist()
    [[2.75]]
    """
    if not isinstance(noise, jax.core.Tracer) and not noise >= 0:
        raise ValueError(f"noise is a variance, >= 0, not {noise}.")
    noise = jnp.asarray(noise).astype(found.covariance.dtype)
    return Moments(found.mean, found.variance() + noise)


def probabilities(
    found: Linearised,
    likelihood: str = "categorical",
    *,
    method: str = "probit",
    samples: int = 100,
    key: jax.Array | None = None,
) -> jax.Array:
    """Class probabilities of a Gaussian over logits.

    "probit" is MacKay's approximation: logits are divided by ``sqrt(1 + pi v / 8)`` with their
    variance v (each logit by its own, for several classes). "sampled" draws logits, with their
    covariances.

    Args:
      found: of :func:`linearised`.
      likelihood: "categorical" (softmax over the last axis) or "bernoulli" (sigmoid).
      method: "probit" or "sampled".
      samples: draws of the logits of each example.
      key: random key of the draws.

    Returns:
      Probabilities in the shape of the outputs.

    Raises:
      ValueError: an unknown name, gaussian, or no key.

    References:
      MacKay, "The evidence framework applied to classification networks", Neural Computation 4
      (1992); Daxberger et al., "Laplace redux", NeurIPS 2021.

    >>> found = Linearised(jnp.array([[2.0]]), jnp.array([[[8 / jnp.pi * 3]]]))
    >>> round(probabilities(found, "bernoulli").item(), 4)  # sigmoid(2 / sqrt(1 + 3))
    0.7311
    """
    squash = _squash(likelihood)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}.")
    if method == "probit":
        return squash(found.mean / jnp.sqrt(1 + math.pi / 8 * found.variance()))
    if key is None:
        raise ValueError("method='sampled' needs key=.")
    if samples < 1:
        raise ValueError(f"samples must be a number of draws >= 1, not {samples}.")
    # A root by eigenvalues, because the covariance may be singular.
    values, vectors = jnp.linalg.eigh(found.covariance)
    root = vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None, :]

    def draw(total: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        normal = jax.random.normal(key, root.shape[:2], root.dtype)
        moved = jnp.einsum("nij,nj->ni", root, normal, precision=jax.lax.Precision.HIGHEST)
        return total + squash(found.mean + moved.reshape(found.mean.shape)), None

    keys = jax.random.split(key, samples)
    return jax.lax.scan(draw, jnp.zeros_like(found.mean), keys)[0] / samples


def averaged(
    belief: Any,
    apply: Apply,
    inputs: PyTree,
    key: jax.Array,
    *,
    likelihood: str = "categorical",
    samples: int = 32,
    noise: Any = 0.0,
    params: PyTree | None = None,
) -> Moments:
    """The average prediction over draws of the parameters, without linearising.

    Args:
      belief: a Laplace approximation or a posterior.
      apply: ``apply(params, inputs) -> outputs [examples, ...]``.
      inputs: ``[examples, ...]``.
      key: random key.
      likelihood: "categorical" and "bernoulli" average probabilities, "gaussian" outputs.
      samples: draws, one after the other.
      noise: variance of the observations, added to the variance (gaussian only).
      params: the parameters, where a posterior has masked leaves.

    Returns:
      Mean and variance over the draws, of probabilities or outputs.

    Raises:
      ValueError, TypeError: an unknown likelihood, no draws, or as :func:`linearised`.

    >>> from adaptivenet.posterior.gaussian import Posterior
    >>> belief = Posterior({"w": jnp.array([[2.0]])}, {"w": jnp.array([[1e12]])})
    >>> apply = lambda p, x: x @ p["w"]
    >>> found = averaged(belief, apply, jnp.ones((1, 1)), jax.random.key(0), likelihood="gaussian")
    >>> found.mean.round(3).tolist(), found.variance.round(3).tolist()
    ([[2.0]], [[0.0]])
    """
    if likelihood == "gaussian":
        squash: Callable[[jax.Array], jax.Array] = lambda x: x  # noqa: E731
    else:
        squash = _squash(likelihood)
    if samples < 1:
        raise ValueError(f"samples must be a number of draws >= 1, not {samples}.")
    gaussian = as_gaussian(belief, params)

    def draw(state: Any, key: jax.Array) -> Any:
        # Welford's recurrence: no difference of large sums.
        count, mean, squares = state
        found = squash(wide(apply(gaussian.sample(key), inputs)))
        step = found - mean
        mean = mean + step / (count + 1)
        return (count + 1, mean, squares + step * (found - mean)), None

    shape = jax.eval_shape(lambda: wide(apply(gaussian.params, inputs)))
    zeros = jnp.zeros(shape.shape, shape.dtype)
    keys = jax.random.split(key, samples)
    (_, mean, squares), _ = jax.lax.scan(draw, (jnp.zeros((), shape.dtype), zeros, zeros), keys)
    variance = squares / samples
    if likelihood == "gaussian":
        variance = variance + jnp.asarray(noise).astype(variance.dtype)
    return Moments(mean, variance)


def _squash(likelihood: str) -> Callable[[jax.Array], jax.Array]:
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"likelihood must be one of {', '.join(LIKELIHOODS)}, not {likelihood!r}.")
    if likelihood == "gaussian":
        raise ValueError("likelihood='gaussian' has no probabilities: use regression().")
    return jax.nn.softmax if likelihood == "categorical" else jax.nn.sigmoid
