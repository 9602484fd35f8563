"""A small variational autoencoder as pure functions: a generator for replay.

What is trained is a pytree, by any optimizer::

    params = init(key, features=784, latent=20, hidden=(400,), classes=10)
    value, grads = jax.value_and_grad(loss)(params, key, inputs, labels)
    inputs = dream(params, key, 128, labels)

With ``classes`` both networks are told the class, so that what is dreamt can be chosen; without,
``labels`` are left out everywhere. Inputs are ``[batch, features]``: pixels in [0, 1] for the
Bernoulli likelihood, any numbers for the Gaussian one. They may be features of a hidden layer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet.posterior._arrays import known
from adaptivenet.posterior._states import cast

PyTree = Any
Number = Any  # a Python number, or a traced scalar
Likelihood = Literal["bernoulli", "gaussian"]

__all__ = ["decode", "dream", "elbo", "encode", "init", "loss"]


def init(
    key: jax.Array,
    features: int,
    latent: int,
    *,
    hidden: Sequence[int] = (400,),
    classes: int = 0,
    dtype: Any = jnp.float32,
) -> PyTree:
    """Parameters of an encoder and a decoder of rectified units.

    Args:
      key: random key.
      features: numbers in an input.
      latent: dimension of the latent space.
      hidden: widths of the encoder's hidden layers; the decoder's are the same in reverse. Empty
        for linear networks.
      classes: the number of classes that both are told of; 0 for none.
      dtype: of the parameters.

    Returns:
      ``{"encoder": [layer, ...], "mean": layer, "log_variance": layer, "decoder": [layer, ...]}``
      with layers ``{"kernel": [inputs, outputs], "bias": [outputs]}``.

    Raises:
      ValueError: a size is not a positive integer.

    >>> params = init(jax.random.key(0), features=6, latent=2, hidden=(5,), classes=3)
    >>> params["encoder"][0]["kernel"].shape, params["decoder"][-1]["kernel"].shape
    ((9, 5), (5, 6))
    """
    sizes = (features, latent, *hidden)
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes) or classes < 0:
        raise ValueError(
            f"features, latent and hidden must be positive integers, and classes at least 0, not "
            f"{features}, {latent}, {tuple(hidden)} and {classes}."
        )
    into = (features + classes, *hidden)
    back = (latent + classes, *reversed(tuple(hidden)), features)
    shapes = [*itertools.pairwise(into), (into[-1], latent), (into[-1], latent)]
    shapes += itertools.pairwise(back)
    drawn = jax.nn.initializers.he_normal()
    layers = [
        {"kernel": drawn(own, shape, dtype), "bias": jnp.zeros(shape[1], dtype)}
        for own, shape in zip(jax.random.split(key, len(shapes)), shapes, strict=True)
    ]
    depth = len(into) - 1
    # A small kernel: variances start near 1, as the prior's.
    start = layers[depth + 1] | {"kernel": 0.1 * layers[depth + 1]["kernel"]}
    return {
        "encoder": layers[:depth],
        "mean": layers[depth],
        "log_variance": start,
        "decoder": layers[depth + 2 :],
    }


def encode(
    params: PyTree, inputs: jax.Array, labels: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The approximate posterior of the latent variables, a diagonal Gaussian.

    Args:
      params: see :func:`init`.
      inputs: ``[batch, features]``.
      labels: int ``[batch]`` or probabilities ``[batch, classes]``, for a conditional model.

    Returns:
      Means and log variances, each ``[batch, latent]``.

    Raises:
      ValueError: labels are missing or not wanted, or shapes do not fit.

    >>> mean, log_variance = encode(init(jax.random.key(0), 4, 2), jnp.ones((3, 4)))
    >>> mean.shape, log_variance.shape
    ((3, 2), (3, 2))
    """
    found = _told(params, inputs, labels, _features(params), "inputs")
    for layer in params["encoder"]:
        found = jax.nn.relu(_dense(layer, found))
    return _dense(params["mean"], found), _dense(params["log_variance"], found)


def decode(params: PyTree, latents: jax.Array, labels: jax.Array | None = None) -> jax.Array:
    """What the latent variables stand for.

    Args:
      params: see :func:`init`.
      latents: ``[batch, latent]``.
      labels: as for :func:`encode`.

    Returns:
      ``[batch, features]``: logits of a Bernoulli likelihood, means of a Gaussian one.

    Raises:
      ValueError: as :func:`encode`.

    >>> decode(init(jax.random.key(0), 4, 2), jnp.ones((3, 2))).shape
    (3, 4)
    """
    size = params["mean"]["kernel"].shape[1]
    found = _told(params, latents, labels, size, "latents")
    for layer in params["decoder"][:-1]:
        found = jax.nn.relu(_dense(layer, found))
    return _dense(params["decoder"][-1], found)


def elbo(
    params: PyTree,
    key: jax.Array,
    inputs: jax.Array,
    labels: jax.Array | None = None,
    *,
    likelihood: Likelihood = "bernoulli",
    scale: Number = 1.0,
    samples: int = 1,
    beta: Number = 1.0,
) -> jax.Array:
    """The evidence lower bound of each input, in nats.

    ``E_q log p(x | z) - beta KL(q(z | x) || N(0, 1))``, the expectation estimated by reparametrised
    draws and the divergence exact.

    Args:
      params: see :func:`init`.
      key: random key.
      inputs: ``[batch, features]``.
      labels: as for :func:`encode`; the bound is then on ``log p(x | label)``.
      likelihood: ``"bernoulli"`` (inputs in [0, 1]; between them its cross-entropy) or
        ``"gaussian"``.
      scale: standard deviation of the Gaussian likelihood.
      samples: draws to average over.
      beta: factor of the divergence; 1 for a bound.

    Returns:
      ``[batch]``, of either sign for a density.

    Raises:
      ValueError: an unknown likelihood, a scale that is not positive, fewer than one sample; else
        as :func:`encode`.

    References:
      Kingma and Welling, "Auto-encoding variational Bayes", ICLR 2014, arXiv:1312.6114; Sohn, Lee
      and Yan, "Learning structured output representation using deep conditional generative models",
      NeurIPS 2015, for the conditioning.

    >>> params = jax.tree.map(jnp.zeros_like, init(jax.random.key(0), 4, 2))
    >>> elbo(params, jax.random.key(1), jnp.ones((1, 4)))  # -4 log 2
    Array([-2.7725...], dtype=float32)
    """
    _check(likelihood, scale)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}.")
    mean, log_variance = encode(params, inputs, labels)

    def fit(now: jax.Array) -> jax.Array:
        noise = jax.random.normal(now, mean.shape, mean.dtype)
        outputs = decode(params, mean + noise * jnp.exp(0.5 * log_variance), labels)
        return _log_likelihood(outputs, inputs.astype(outputs.dtype), likelihood, scale)

    expected = jnp.mean(jax.vmap(fit)(jax.random.split(key, samples)), axis=0)
    excess = jnp.exp(log_variance) + jnp.square(mean) - 1.0 - log_variance
    return expected - cast(beta, expected) * 0.5 * jnp.sum(excess, axis=-1)


def loss(
    params: PyTree,
    key: jax.Array,
    inputs: jax.Array,
    labels: jax.Array | None = None,
    *,
    weights: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """The negative mean of :func:`elbo`, to be minimized.

    Args:
      params: see :func:`init`.
      key: random key.
      inputs: ``[batch, features]``.
      labels: as for :func:`encode`.
      weights: ``[batch]``, numbers or bools that weigh the mean.
      **options: of :func:`elbo`.

    Returns:
      Scalar, in nats.

    Raises:
      ValueError: as :func:`elbo`.

    >>> params = jax.tree.map(jnp.zeros_like, init(jax.random.key(0), 4, 2))
    >>> loss(params, jax.random.key(1), jnp.ones((1, 4))).item()
    2.7725...
    """
    values = elbo(params, key, inputs, labels, **options)
    if weights is None:
        return -jnp.mean(values)
    weights = jnp.asarray(weights).astype(values.dtype)
    return -jnp.sum(weights * values) / jnp.maximum(jnp.sum(weights), 1e-12)


def dream(
    params: PyTree,
    key: jax.Array,
    number: int,
    labels: jax.Array | None = None,
    *,
    likelihood: Likelihood = "bernoulli",
    scale: Number = 0.0,
) -> jax.Array:
    """Draws inputs from the model.

    Args:
      params: see :func:`init`.
      key: random key.
      number: how many.
      labels: as for :func:`encode`, ``[number]``.
      likelihood: as for :func:`elbo`.
      scale: standard deviation of the noise of a Gaussian likelihood; the default leaves it out, as
        for the Bernoulli one, whose probabilities are returned.

    Returns:
      ``[number, features]``.

    Raises:
      ValueError: an unknown likelihood, or labels that do not fit.

    References:
      Shin et al., "Continual learning with deep generative replay", NeurIPS 2017, section 3 (where
      the generator is an adversarial one).

    >>> dream(init(jax.random.key(0), 4, 2), jax.random.key(1), 3).shape
    (3, 4)
    """
    _check(likelihood, 1.0)
    kernel = params["mean"]["kernel"]
    shade, grain = jax.random.split(key)
    latents = jax.random.normal(shade, (number, kernel.shape[1]), kernel.dtype)
    outputs = decode(params, latents, labels)
    if likelihood == "bernoulli":
        return jax.nn.sigmoid(outputs)
    return outputs + cast(scale, outputs) * jax.random.normal(grain, outputs.shape, outputs.dtype)


def _log_likelihood(
    outputs: jax.Array, inputs: jax.Array, likelihood: Likelihood, scale: Number
) -> jax.Array:
    if likelihood == "bernoulli":
        # x log s(o) + (1 - x) log s(-o), without overflow.
        return jnp.sum(inputs * outputs - jax.nn.softplus(outputs), axis=-1)
    wide = cast(scale, outputs)
    constant = jnp.log(wide) + 0.5 * math.log(2.0 * math.pi)
    return -jnp.sum(0.5 * jnp.square((inputs - outputs) / wide) + constant, axis=-1)


def _dense(layer: PyTree, inputs: jax.Array) -> jax.Array:
    return inputs.astype(layer["kernel"].dtype) @ layer["kernel"] + layer["bias"]


def _features(params: PyTree) -> int:
    return params["decoder"][-1]["kernel"].shape[1]


def _told(
    params: PyTree, values: jax.Array, labels: jax.Array | None, own: int, what: str
) -> jax.Array:
    """Values beside the class."""
    latent = params["mean"]["kernel"].shape[1]
    classes = params["decoder"][0]["kernel"].shape[0] - latent
    dtype = params["mean"]["kernel"].dtype
    if values.ndim != 2 or values.shape[1] != own:
        raise ValueError(f"{what} must be [batch, {own}], not {values.shape}.")
    if classes == 0:
        if labels is not None:
            raise ValueError(
                "this model knows no classes: leave labels out, or give init(..., "
                "classes=) their number."
            )
        return values.astype(dtype)
    if labels is None:
        raise ValueError(f"this model is told one of {classes} classes: give labels.")
    labels = jnp.asarray(labels)
    if jnp.issubdtype(labels.dtype, jnp.integer) and labels.shape == values.shape[:1]:
        labels = jax.nn.one_hot(labels, classes, dtype=dtype)
    if labels.shape != (values.shape[0], classes):
        raise ValueError(
            f"labels must be {values.shape[0]} integers, or probabilities [{values.shape[0]}, "
            f"{classes}], not {labels.dtype}{list(labels.shape)}."
        )
    return jnp.concatenate([values.astype(dtype), labels.astype(dtype)], axis=1)


def _check(likelihood: str, scale: Number) -> None:
    if likelihood not in ("bernoulli", "gaussian"):
        raise ValueError(f'likelihood must be "bernoulli" or "gaussian", not {likelihood!r}.')
    if known(scale) and not np.all(np.asarray(scale) > 0):
        raise ValueError(f"scale must be positive, not {scale}.")
