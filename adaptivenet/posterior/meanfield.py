"""Mean-field variational inference: a Gaussian for every parameter, trained by its ELBO.

What is trained is the pytree ``MeanField(mean, rho)``, by any optax optimizer; the standard
deviations are ``softplus(rho)``::

    fields = init(params, scale=0.02)

    def objective(fields, key, inputs, labels):
        return -elbo(fields, log_likelihood, key, inputs, labels, scale=n / len(inputs))

    value, grads = jax.value_and_grad(objective)(fields, key, inputs, labels)
    updates, opt_state = tx.update(grads, opt_state, fields)
    fields = optax.apply_updates(fields, updates)

``log_likelihood(params, *args)`` is summed over the batch. Layers written for it draw less noisy
gradients with :func:`local_dense` or :func:`flipout_dense`, to which :func:`kl` is added by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adaptivenet import trees
from adaptivenet.posterior._states import cast, check_positive, filled, normal, per_leaf, scalar
from adaptivenet.posterior.gaussian import Posterior

PyTree = Any
Number = Any  # a Python number, or a traced scalar

__all__ = [
    "MeanField",
    "elbo",
    "flipout_dense",
    "init",
    "kl",
    "local_dense",
    "posterior",
    "sample",
    "scales",
    "stochastic",
]


class MeanField(NamedTuple):
    """The parameters of the belief; a pytree, to be trained.

    (It has no method ``posterior``, because optimizers keep moments of the same type, which are no
    beliefs: see :func:`posterior`.)

    Attributes:
      mean: pytree like the parameters.
      rho: pytree of float32 (float64 for float64 parameters); masked nodes for leaves that are not
        floating.
    """

    mean: PyTree
    rho: PyTree


def init(params: PyTree, scale: Number | PyTree) -> MeanField:
    """A belief around given parameters.

    Args:
      params: pytree of arrays, the means.
      scale: standard deviations, a number or a pytree like the parameters.

    Returns:
      The parameters of the belief.

    Raises:
      ValueError: a scale is not positive, or does not fit the parameters.

    >>> fields = init({"w": jnp.ones(2)}, 0.1)
    >>> bool(jnp.allclose(scales(fields)["w"], 0.1))
    True
    """
    for part in jax.tree.leaves(scale):
        check_positive("scale", part)
    wide = per_leaf("scale", scale, filled(params, 0.0))
    # The inverse of softplus, log(exp(s) - 1), written so that it does not overflow.
    return MeanField(params, trees.map_synapses(lambda s: s + jnp.log(-jnp.expm1(-s)), wide))


def scales(fields: MeanField) -> PyTree:
    """The standard deviations of a belief, ``softplus(rho)``.

    Args:
      fields: the parameters of the belief.

    Returns:
      A pytree like ``fields.rho``.

    >>> scales(MeanField({"w": jnp.zeros(1)}, {"w": jnp.zeros(1)}))["w"]  # log 2
    Array([0.6931472], dtype=float32)
    """
    return trees.map_synapses(jax.nn.softplus, fields.rho)


def posterior(fields: MeanField) -> Posterior:
    """The belief, for pruning and protection.

    Args:
      fields: the parameters of the belief.

    Returns:
      Mean and precision, in float32; masked nodes for leaves that are not floating.

    >>> belief = posterior(init({"w": jnp.ones(1)}, 0.5))
    >>> round(belief.precision["w"].item(), 4)
    4.0
    """
    return Posterior(
        trees.map_synapses(lambda r, m: m.astype(r.dtype), fields.rho, fields.mean),
        trees.map_synapses(lambda s: 1.0 / jnp.square(s), scales(fields)),
    )


def sample(fields: MeanField, key: jax.Array) -> PyTree:
    """Draws parameters, differentiably (reparametrised).

    Args:
      fields: the parameters of the belief.
      key: random key.

    Returns:
      ``mean + softplus(rho) * normal``, a pytree like the parameters, of their dtypes.

    References:
      Blundell et al., "Weight uncertainty in neural networks", ICML 2015, section 3.2.

    >>> params = sample(init({"w": jnp.ones(1000)}, 0.1), jax.random.key(0))
    >>> 0.09 < jnp.std(params["w"]).item() < 0.11
    True
    """
    noise = normal(key, scales(fields))
    return trees.merge_synapses(
        lambda n, m: (m.astype(n.dtype) + n).astype(m.dtype), noise, fields.mean
    )


def kl(
    fields: MeanField,
    *,
    prior_mean: Number | PyTree = 0.0,
    prior_scale: Number | PyTree = 1.0,
    prior: Posterior | None = None,
) -> jax.Array:
    """Kullback-Leibler divergence from a Gaussian prior to the belief.

    Args:
      fields: the parameters of the belief.
      prior_mean: means of the prior, a number or a pytree like the parameters.
      prior_scale: standard deviations, likewise.
      prior: a belief instead of them, such as that after an earlier task.

    Returns:
      KL(belief || prior) in nats, summed over all parameters; a scalar.

    Raises:
      ValueError: the prior does not fit the parameters, or a scale is not positive.

    References:
      Kingma and Welling, "Auto-encoding variational Bayes", ICLR 2014, appendix B; Nguyen et al.,
      "Variational continual learning", ICLR 2018, for a belief as the prior.

    >>> kl(init({"w": jnp.array([3.0])}, 1.0)).item()  # 3^2 / 2
    4.5
    """
    if prior is not None:
        centre, precision = prior
    else:
        for part in jax.tree.leaves(prior_scale):
            check_positive("prior_scale", part)
        centre = per_leaf("prior_mean", prior_mean, fields.rho)
        precision = trees.map_synapses(
            lambda s: 1.0 / jnp.square(s), per_leaf("prior_scale", prior_scale, fields.rho)
        )

    def divergence(
        rho: jax.Array, mean: jax.Array, before: jax.Array, sharpness: jax.Array
    ) -> jax.Array:
        scale = jax.nn.softplus(rho)
        gap = mean.astype(rho.dtype) - before.astype(rho.dtype)
        spread = sharpness.astype(rho.dtype) * jnp.square(scale)
        pull = sharpness.astype(rho.dtype) * jnp.square(gap)
        return 0.5 * jnp.sum(spread + pull - 1.0 - jnp.log(spread))

    parts = trees.map_synapses(divergence, fields.rho, fields.mean, centre, precision)
    return jnp.sum(jnp.stack([scalar(part) for part in jax.tree.leaves(parts)]))


def elbo(
    fields: MeanField,
    log_likelihood: Callable[..., jax.Array],
    key: jax.Array,
    *args: Any,
    samples: int = 1,
    scale: Number = 1.0,
    temperature: Number = 1.0,
    prior_mean: Number | PyTree = 0.0,
    prior_scale: Number | PyTree = 1.0,
    prior: Posterior | None = None,
) -> jax.Array:
    """The evidence lower bound, estimated by draws from the belief.

    Args:
      fields: the parameters of the belief.
      log_likelihood: ``log_likelihood(params, *args)``, summed over the examples of a batch.
      key: random key.
      *args: passed on.
      samples: number of draws, averaged over.
      scale: factor of the likelihood, such as examples in all over examples in the batch.
      temperature: factor of the divergence; less than 1 is a cold posterior.
      prior_mean: see :func:`kl`, as for the two that follow.
      prior_scale: standard deviations of the prior.
      prior: a belief instead of them.

    Returns:
      A scalar, to be maximized: minimize its negative.

    Raises:
      ValueError: fewer than one sample; else as :func:`kl`.

    References:
      Blundell et al., ICML 2015, equation 2.

    >>> fields = init({"w": jnp.array([0.0])}, 1.0)
    >>> elbo(fields, lambda params: -2.0 + 0.0 * params["w"].sum(), jax.random.key(0)).item()
    -2.0
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}.")

    def one(now: jax.Array) -> jax.Array:
        return log_likelihood(sample(fields, now), *args)

    fit = jnp.mean(jax.vmap(one)(jax.random.split(key, samples)))
    penalty = kl(fields, prior_mean=prior_mean, prior_scale=prior_scale, prior=prior)
    return cast(scale, fit) * fit - cast(temperature, fit) * penalty.astype(fit.dtype)


def stochastic(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function of parameters one of a belief, which draws them anew in every call.

    Args:
      apply: ``apply(params, *args, **kwargs)``.

    Returns:
      ``drawn(fields, *args, draw=key, **kwargs)``. (Not ``key=``, which may be the function's.)

    >>> doubled = stochastic(lambda params, x: params["w"] * x)
    >>> doubled(init({"w": jnp.float32(3.0)}, 1e-6), 2.0, draw=jax.random.key(0)).round(2)
    Array(6., dtype=float32)
    """

    def drawn(fields: MeanField, *args: Any, draw: jax.Array, **kwargs: Any) -> Any:
        return apply(sample(fields, draw), *args, **kwargs)

    return drawn


def local_dense(
    inputs: jax.Array,
    mean: jax.Array,
    scale: jax.Array,
    key: jax.Array,
    *,
    bias: jax.Array | None = None,
    bias_scale: jax.Array | None = None,
) -> jax.Array:
    """A dense product with a Gaussian kernel, drawn at its outputs (local reparametrisation).

    Every example has a kernel of its own, without its being made, so that the noise of the
    gradient falls with the batch.

    Args:
      inputs: ``[..., features]``.
      mean: ``[features, outputs]``, the kernel's means.
      scale: likewise, its standard deviations.
      key: random key.
      bias: ``[outputs]``, the bias's means.
      bias_scale: likewise, its standard deviations; the bias is certain without them.

    Returns:
      ``[..., outputs]``, of the inputs' dtype. It is the mean exactly where the variance is 0, and
      gradients there are 0 and not nan.

    Raises:
      ValueError: shapes do not fit.

    References:
      Kingma et al., "Variational dropout and the local reparameterization trick", NeurIPS 2015,
      equation 6.

    >>> kernel = jnp.array([[1.0], [2.0]])
    >>> local_dense(jnp.array([[3.0, 4.0]]), kernel, 0.0 * kernel, jax.random.key(0))
    Array([[11.]], dtype=float32)
    """
    _check_dense("local_dense", inputs, mean, scale, bias, bias_scale)
    kind = inputs.dtype
    centre = inputs @ mean.astype(kind)
    variance = jnp.square(inputs) @ jnp.square(scale).astype(kind)
    if bias is not None:
        centre = centre + bias.astype(kind)
    if bias_scale is not None:
        variance = variance + jnp.square(bias_scale).astype(kind)
    certain = variance == 0
    spread = jnp.sqrt(jnp.where(certain, jnp.ones_like(variance), variance))
    spread = jnp.where(certain, jnp.zeros_like(variance), spread)
    return centre + spread * jax.random.normal(key, centre.shape, kind)


def flipout_dense(
    inputs: jax.Array,
    mean: jax.Array,
    scale: jax.Array,
    key: jax.Array,
    *,
    bias: jax.Array | None = None,
    bias_scale: jax.Array | None = None,
) -> jax.Array:
    """A dense product with a Gaussian kernel, one draw of which is decorrelated by random signs.

    All examples share one draw of the deviations; each flips their signs by a random row and
    column of its own, so that every example's kernel has the right distribution and any two are
    uncorrelated. It serves any distribution that is symmetric about its mean, and its draw is of
    weights, at twice the cost of a product.

    Args:
      inputs: ``[..., features]``.
      mean: ``[features, outputs]``, the kernel's means.
      scale: likewise, its standard deviations.
      key: random key.
      bias: ``[outputs]``, the bias's means.
      bias_scale: likewise, its standard deviations; the bias is certain without them.

    Returns:
      ``[..., outputs]``, of the inputs' dtype.

    Raises:
      ValueError: shapes do not fit.

    References:
      Wen et al., "Flipout: efficient pseudo-independent weight perturbations on mini-batches", ICLR
      2018, equation 4.

    >>> kernel = jnp.array([[1.0], [2.0]])
    >>> flipout_dense(jnp.array([[3.0, 4.0]]), kernel, 0.0 * kernel, jax.random.key(0))
    Array([[11.]], dtype=float32)
    """
    _check_dense("flipout_dense", inputs, mean, scale, bias, bias_scale)
    kind = inputs.dtype
    draw, rows, columns, shift = jax.random.split(key, 4)
    deviation = (scale * jax.random.normal(draw, scale.shape, scale.dtype)).astype(kind)
    into = jax.random.rademacher(rows, inputs.shape, kind)
    out = jax.random.rademacher(columns, (*inputs.shape[:-1], mean.shape[1]), kind)
    result = inputs @ mean.astype(kind) + ((inputs * into) @ deviation) * out
    if bias is not None:
        result = result + bias.astype(kind)
    if bias_scale is not None:
        noise = jax.random.normal(shift, bias_scale.shape, bias_scale.dtype) * bias_scale
        # The bias's input is 1, with a sign of its own: that of the column serves.
        result = result + noise.astype(kind) * out
    return result


def _check_dense(name: str, inputs: Any, mean: Any, scale: Any, bias: Any, bias_scale: Any) -> None:
    if mean.ndim != 2 or scale.shape != mean.shape:
        raise ValueError(
            f"{name}() takes mean and scale of one shape [features, outputs], not {mean.shape} and "
            f"{scale.shape}."
        )
    if inputs.ndim < 1 or inputs.shape[-1] != mean.shape[0]:
        raise ValueError(
            f"{name}() takes inputs [..., {mean.shape[0]}] for a kernel {mean.shape}, not "
            f"{inputs.shape}."
        )
    for what, part in (("bias", bias), ("bias_scale", bias_scale)):
        if part is not None and part.shape != mean.shape[1:]:
            raise ValueError(f"{name}() takes {what} {mean.shape[1:]}, not {part.shape}.")
