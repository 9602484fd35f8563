"""The Laplace evidence (log marginal likelihood), and priors that are tuned to raise it.

With a prior of precision d_i on parameter w_i, the evidence of the data at the mode is
``log p(data | w) + sum_i (log d_i - d_i w_i^2) / 2 - log det(precision) / 2``. It asks for no
held-out data, and it prefers priors that pull parameters which the data do not need to zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptivenet.posterior._arrays import wide
from adaptivenet.posterior.laplace import Laplace
from adaptivenet.posterior.structured import DiagonalPosterior, FullPosterior, Gaussian

PyTree = Any

GRANULARITIES = ("one", "layer", "unit", "weight")
METHODS = ("mackay", "gradient")
LEAST, MOST = 1e-8, 1e12  # of a precision that is tuned

__all__ = ["GRANULARITIES", "Tuned", "effective_parameters", "log_evidence", "tune_prior"]


class Tuned(NamedTuple):
    """What :func:`tune_prior` returns.

    Attributes:
      laplace: with the prior that was found.
      log_evidence: before every step and at the end, ``[steps + 1]``.
    """

    laplace: Laplace
    log_evidence: jax.Array


def log_evidence(fit: Laplace) -> jax.Array:
    """The Laplace approximation of the log marginal likelihood, in nats.

    Exact if the outputs are linear in the parameters, the likelihood is gaussian, the structure is
    full and the mean is the mode. Differentiable with respect to the prior and the noise:
    ``jax.grad(lambda d: log_evidence(fit.with_prior(d)))``.

    Args:
      fit: of :func:`adaptivenet.posterior.laplace.laplace`; only the leaves that it believes
        something of have a prior.

    Returns:
      A scalar.

    References:
      MacKay, "Bayesian interpolation", Neural Computation 4 (1992); Immer et al.,
      "Scalable marginal likelihood estimation for model selection in deep learning", ICML 2021.

    >>> from adaptivenet.posterior.laplace import laplace
    >>> x, y = jnp.array([[1.0]]), jnp.array([[0.0]])
    >>> fit = laplace(lambda p, x: x * p["w"], {"w": jnp.zeros(1)}, x, y, likelihood="gaussian")
    >>> round(log_evidence(fit).item(), 4)  # of 0 under a normal of variance 1 + 1
    -1.2655
    """
    gaussian: Gaussian = fit.gaussian
    terms = [
        0.5 * (jnp.log(d) - d * jnp.square(w)).sum()
        for d, w in zip(gaussian.prior, gaussian._means(), strict=True)
    ]
    prior = sum(terms[1:], terms[0])
    return fit.log_likelihood + prior - 0.5 * gaussian.log_determinant()


def effective_parameters(fit: Laplace) -> jax.Array:
    """How many parameters the data determine: ``sum_i (1 - d_i Var(w_i))``, MacKay's gamma.

    Args:
      fit: of :func:`adaptivenet.posterior.laplace.laplace`.

    Returns:
      A scalar between 0 and the number of parameters.

    References:
      MacKay, "Bayesian interpolation", Neural Computation 4 (1992).
    """
    pairs = zip(fit.gaussian.prior, fit.gaussian._variances(), strict=True)
    return jnp.asarray(sum((1 - d * v).sum() for d, v in pairs))


def tune_prior(
    fit: Laplace,
    granularity: str = "layer",
    *,
    method: str = "mackay",
    steps: int = 30,
    learning_rate: Any = 0.1,
    noise: bool = False,
) -> Tuned:
    """Tunes the precision of the prior, and the noise, to raise the evidence.

    The data are not looked at again, and the mean stays: where the prior changes much, train with
    it and fit again. The precisions stay between 1e-8 and 1e12.

    Args:
      fit: where to start; its prior gives the first precisions (their mean over each group).
      granularity: one precision for "one" (all parameters), "layer" (a kernel with its bias; every
        other leaf), "unit" (the weights into a unit and its bias; every other leaf), or "weight"
        (structures diagonal and full only).
      method: "mackay", the fixed point ``d = gamma / sum w^2``, or "gradient", Adam on ``log d``.
      steps: of either.
      learning_rate: of Adam.
      noise: whether to tune the variance of the observations as well (gaussian only).

    Returns:
      The approximation with the new prior, and the evidence step by step.

    Raises:
      ValueError: an unknown name, a granularity that the structure does not have, noise of another
        likelihood.

    References:
      MacKay, "Bayesian interpolation", Neural Computation 4 (1992), and Bishop,
      "Pattern recognition and machine learning", 2006, equations 3.91, 3.92 and 3.95, for the
      fixed point; Immer et al., ICML 2021, for the gradient; Dhahri et al., "Shaving weights with
      Occam's razor", NeurIPS 2024, for precisions by layer and by unit as a way to sparse networks.

    >>> from adaptivenet.posterior.laplace import laplace
    >>> x, y = jnp.ones((50, 1)), jnp.full((50, 1), 2.0)
    >>> fit = laplace(lambda p, x: x * p["w"], {"w": 2 * jnp.ones(1)}, x, y, likelihood="gaussian")
    >>> round(tune_prior(fit, "one").laplace.gaussian.prior[0].item(), 3)  # about 1 / 2^2
    0.249
    """
    for what, name, names in (
        ("granularity", granularity, GRANULARITIES),
        ("method", method, METHODS),
    ):
        if name not in names:
            raise ValueError(f"{what} must be one of {', '.join(names)}, not {name!r}.")
    if steps < 0:
        raise ValueError(f"steps must be a number >= 0, not {steps}.")
    if noise and fit.likelihood != "gaussian":
        raise ValueError(f"noise=True: likelihood={fit.likelihood!r} has no noise.")
    groups = _Groups(fit.gaussian, granularity)
    shared = granularity in ("one", "layer")

    def at(state: Any) -> Laplace:
        logs, log_noise = state
        prior = groups.tree([jnp.exp(x) for x in logs])
        found = fit.with_prior(prior, shared=shared)
        return found.with_noise(jnp.exp(log_noise)) if noise else found

    optimizer = optax.adam(learning_rate)

    def step(carry: Any, _: None) -> Any:
        state, moments = carry
        now = at(state)
        logs, log_noise = state
        sums = groups.sums([jnp.square(w) for w in now.gaussian._means()])
        gammas = groups.sums(
            [1 - d * v for d, v in zip(now.gaussian.prior, now.gaussian._variances(), strict=True)]
        )
        gammas = [jnp.maximum(x, 0) for x in gammas]
        gamma = jnp.asarray(sum(x.sum() for x in gammas))
        if method == "mackay":
            pairs = zip(gammas, sums, strict=True)
            logs = [jnp.log(g + 1e-30) - jnp.log(s + 1e-30) for g, s in pairs]
            if noise:
                left = jnp.maximum(now.count - gamma, 1e-6 * now.count)
                log_noise = jnp.log(now.squares() / left)
        else:
            # The derivatives of minus the evidence by the logarithms.
            rows = zip(gammas, logs, sums, strict=True)
            down = [-0.5 * (g - jnp.exp(x) * s) for g, x, s in rows]
            fall = 0.5 * (now.count - now.squares() / now.noise - gamma)
            down = (down, fall if noise else jnp.zeros_like(log_noise))
            updates, moments = optimizer.update(down, moments)
            moved: Any = optax.apply_updates((logs, log_noise), updates)
            logs, log_noise = moved
        logs = [jnp.clip(x, math.log(LEAST), math.log(MOST)).astype(x.dtype) for x in logs]
        log_noise = jnp.clip(log_noise, math.log(LEAST), math.log(MOST)).astype(log_noise.dtype)
        return ((logs, log_noise), moments), log_evidence(now)

    means = groups.sums(fit.gaussian.prior)
    sizes = groups.sums([jnp.ones_like(d) for d in fit.gaussian.prior])
    start = [jnp.log(m / n) for m, n in zip(means, sizes, strict=True)], jnp.log(fit.noise)
    (state, _), trail = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
    found = at(state)
    return Tuned(found, jnp.append(trail, log_evidence(found)))


class _Groups:
    """Which parameters share a precision."""

    def __init__(self, gaussian: Gaussian, granularity: str) -> None:
        full = isinstance(gaussian, DiagonalPosterior | FullPosterior)
        if granularity == "weight" and not full:
            raise ValueError(
                "granularity='weight' needs structure='diagonal', 'full' or 'last_layer'."
            )
        if granularity == "unit" and getattr(gaussian, "exact", None) is not None:
            raise ValueError(
                "granularity='unit' needs structure='kronecker', 'diagonal' or 'full': ekfac has "
                "one precision a layer."
            )
        self.gaussian = gaussian
        places = dict(zip(gaussian.believed, gaussian.prior, strict=True))
        joined = {k for site in gaussian.sites for k in site.members}
        self.shapes: list[tuple[int, ...]] = []
        self.spread: list[Callable[[jax.Array], dict[int, jax.Array]]] = []
        if granularity == "one":
            self._add((), lambda x: {k: jnp.broadcast_to(x, d.shape) for k, d in places.items()})
            return
        if granularity == "weight":
            for k, d in places.items():
                self._add(d.shape, lambda x, k=k: {k: x})
            return
        for site in gaussian.sites:
            shape = (site.outputs,) if granularity == "unit" else ()
            self._add(shape, lambda x, site=site: site.leaves(jnp.broadcast_to(x, site.shape)))
        for k, d in places.items():
            if k not in joined:
                self._add((), lambda x, k=k, d=d: {k: jnp.broadcast_to(x, d.shape)})

    def _add(self, shape: tuple[int, ...], spread: Callable[..., dict[int, jax.Array]]) -> None:
        self.shapes.append(shape)
        self.spread.append(spread)

    def leaves(self, values: Sequence[jax.Array]) -> list[jax.Array]:
        """A value for each group as one for each parameter."""
        found: dict[int, jax.Array] = {}
        for spread, value in zip(self.spread, values, strict=True):
            found |= spread(value)
        pairs = zip(self.gaussian.believed, self.gaussian.prior, strict=True)
        return [found[k].astype(d.dtype) for k, d in pairs]

    def tree(self, values: Sequence[jax.Array]) -> PyTree:
        """The same, as a tree like the parameters."""
        leaves, treedef = jax.tree.flatten(self.gaussian.params)
        known = dict(zip(self.gaussian.believed, self.leaves(values), strict=True))
        return treedef.unflatten([known.get(k, 1.0) for k in range(len(leaves))])

    def sums(self, leaves: Sequence[jax.Array]) -> list[jax.Array]:
        """The sums of leaves over the groups: the transpose of :meth:`leaves`."""
        kind = jnp.result_type(*[x.dtype for x in leaves])
        zeros = [jnp.zeros(shape, kind) for shape in self.shapes]
        _, pull = jax.vjp(self.leaves, zeros)
        (found,) = pull(list(map(wide, leaves)))
        return found
