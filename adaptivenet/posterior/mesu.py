"""MESU: metaplasticity from synaptic uncertainty, learning that forgets through a window.

Every parameter has a standard deviation, which is its learning rate as well: what is known well
changes little. A prior pulls both back at the rate ``1 / window``, so that what was learnt about
``window`` batches ago fades, and room stays for what is new. Without a window (``window=inf``)
nothing fades: Bayesian gradient descent, FOO-VB with a diagonal covariance::

    tx = mesu(window=300_000, init_scale=0.05)
    opt_state = tx.init(params)
    value, grads, extra = noisy_value_and_grad(loss, opt_state, params, inputs, labels, samples=10)
    updates, opt_state = tx.update(grads, opt_state, params, **extra)
    params = optax.apply_updates(params, updates)  # the mean of the belief

The loss is a *sum* of negative log-likelihoods over the batch; for a mean, give ``batch_size=``.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet import trees
from adaptivenet.posterior._states import (
    advanced,
    cast,
    filled,
    initial_key,
    noise_times_grads,
    normal,
    per_leaf,
)
from adaptivenet.posterior.gaussian import Posterior

PyTree = Any
Number = Any  # a Python number, or a traced scalar

__all__ = ["MesuState", "bgd", "mesu"]

# The published rule is an expansion for small steps; where it would leave less of a standard
# deviation than this share in one step, it stops there.
_LEAST = 0.1


class MesuState(NamedTuple):
    """State of :func:`mesu`; the means are the parameters themselves.

    Attributes:
      scale: pytree of float32 (float64 for float64 parameters), standard deviations; masked nodes
        for leaves that are not floating.
      key: uint32, data of the random key that the next draw comes from.
    """

    scale: PyTree
    key: jax.Array

    def posterior(self, params: PyTree) -> Posterior:
        """The belief: its mean are the parameters."""
        mean = trees.map_synapses(lambda s, p: p.astype(s.dtype), self.scale, params)
        return Posterior(mean, trees.map_synapses(lambda s: 1.0 / jnp.square(s), self.scale))

    def noise(self, key: jax.Array) -> PyTree:
        """A draw from the belief, less its mean."""
        return normal(key, self.scale)


def mesu(
    window: Number,
    *,
    init_scale: Number | PyTree = None,
    prior_scale: Number | PyTree = 1.0,
    prior_mean: Number | PyTree = 0.0,
    form: Literal["published", "fixed_point"] = "published",
    mean_rate: Number = 1.0,
    scale_rate: Number = 1.0,
    clip: Number | None = None,
    batch_size: Number = 1,
    seed: Any = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Bayesian learning with a memory of a window of batches.

    With the gradient :math:`g` of the batch's negative log-likelihood and its derivative
    :math:`d` with respect to the standard deviation (noise times gradient, over sigma), the
    published rule is

    .. math::

       \Delta\mu = -\sigma^2 g + \frac{\sigma^2}{N \sigma_p^2} (\mu_p - \mu), \qquad
       \Delta\sigma = -\frac{\sigma^2}{2} d + \frac{\sigma}{2 N \sigma_p^2} (\sigma_p^2 - \sigma^2).

    It is the first-order expansion of a fixed point: the belief before the batch is raised to
    :math:`1 - 1/N`, the prior to :math:`1/N`, and their product has the variance
    :math:`v = ((1 - 1/N) / \sigma^2 + 1 / (N \sigma_p^2))^{-1}`. ``form="fixed_point"`` is that
    without expansion, :math:`\mu \to \mu - v g + v (\mu_p - \mu) / (N \sigma_p^2)` and
    :math:`\sigma \to \sqrt{v} \sqrt{1 + v d^2 / 4} - v d / 2`, which is positive always. For an
    infinite window it is FOO-VB (:func:`bgd`); the published form is FOO-VB to first order in
    :math:`\sigma d`. Draws are noise in :math:`d`: with few a batch, precisions come out too large.
    What is to be told of the draw is as for
    :func:`adaptivenet.posterior.ivon.scale_by_ivon`. This is an optimizer, not a direction: no
    learning rate follows it.

    Args:
      window: N, the number of batches remembered; ``float("inf")`` forgets nothing.
      init_scale: standard deviations to start from, a number or a pytree like the parameters; by
        default those of the prior, which are too wide for most networks.
      prior_scale: standard deviations of the prior, a number or a pytree like the parameters.
      prior_mean: its means, likewise.
      form: ``"published"`` or ``"fixed_point"``.
      mean_rate: factor of the change of the mean.
      scale_rate: factor of the change of the standard deviation, at most 1 for the fixed point.
      clip: bound on the absolute value of sigma times either derivative.
      batch_size: factor of the gradients; the number of examples where the loss is their mean.
      seed: integer, or a random key. It is folded with the parameters' bits, so that members of a
        population draw different numbers.

    Returns:
      A transformation whose state has the method ``posterior(params)``.

    Raises:
      ValueError: a number is out of range or ``form`` unknown; at ``init``: a pytree does not fit
        the parameters; at ``update``: no parameters, or nothing is told of the draw.

    References:
      Bonnet et al., "Bayesian continual learning and forgetting in neural networks", Nature
      Communications 16 (2025), arXiv:2504.13569, equation 11 (the means) and its companion for
      the standard deviations.

    >>> tx, params = mesu(100, init_scale=0.1), {"w": jnp.array([1.0])}
    >>> grads, noise = {"w": jnp.array([2.0])}, {"w": jnp.array([0.1])}
    >>> updates, state = tx.update(grads, tx.init(params), params, noise=noise)
    >>> updates["w"]  # -0.01 * 2 - 0.01 / 100
    Array([-0.0201], dtype=float32)
    >>> state.scale["w"]  # 0.1 - 0.01 * 0.5 * 2 + 0.1 / 200 * (1 - 0.01)
    Array([0.090495...], dtype=float32)
    """
    if form not in ("published", "fixed_point"):
        raise ValueError(f'form must be "published" or "fixed_point", not {form!r}.')
    start = prior_scale if init_scale is None else init_scale
    _positive("window", window, least=1.0)
    for name, value in (
        ("init_scale", start),
        ("prior_scale", prior_scale),
        ("mean_rate", mean_rate),
        ("scale_rate", scale_rate),
        ("clip", clip),
        ("batch_size", batch_size),
    ):
        _positive(name, value)

    def init(params: PyTree) -> MesuState:
        like = filled(params, 0.0)
        for name, value in (("prior_scale", prior_scale), ("prior_mean", prior_mean)):
            per_leaf(name, value, like)
        return MesuState(per_leaf("init_scale", start, like), initial_key(seed, params))

    def update(
        updates: PyTree,
        state: MesuState,
        params: PyTree | None = None,
        *,
        noise: PyTree | None = None,
        noisy_params: PyTree | None = None,
        noise_grads: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, MesuState]:
        del extra
        products = noise_times_grads(
            "mesu()", state.scale, updates, params, noise, noisy_params, noise_grads
        )
        scales = per_leaf("prior_scale", prior_scale, state.scale)
        means = per_leaf("prior_mean", prior_mean, state.scale)
        share = 1.0 / window

        def bounded(slope: jax.Array, scale: jax.Array) -> jax.Array:
            slope = slope * cast(batch_size, scale)
            if clip is None:
                return slope
            bound = cast(clip, scale) / scale
            return jnp.clip(slope, -bound, bound)

        def belief(scale: jax.Array, prior: jax.Array) -> jax.Array:
            """The variance that multiplies the gradients."""
            variance = jnp.square(scale)
            if form == "published":
                return variance
            n = cast(share, scale)
            return variance / ((1.0 - n) + n * variance / jnp.square(prior))

        def move(
            scale: jax.Array, grad: Any, param: jax.Array, prior: jax.Array, centre: jax.Array
        ) -> jax.Array:
            variance = belief(scale, prior)
            pull = cast(share, scale) / jnp.square(prior)
            step = pull * (centre - param.astype(scale.dtype))
            step = step - bounded(grad.astype(scale.dtype), scale)
            return (cast(mean_rate, scale) * variance * step).astype(grad.dtype)

        def narrow(scale: jax.Array, product: jax.Array, prior: jax.Array) -> jax.Array:
            slope = bounded(product / scale, scale)
            rate = cast(scale_rate, scale)
            if form == "fixed_point":
                root = jnp.sqrt(belief(scale, prior))
                half = 0.5 * root * slope
                # sqrt(1 + h^2) - h is 1 / (sqrt(1 + h^2) + h), which does not cancel for h > 0.
                factor = jnp.sqrt(1.0 + jnp.square(half))
                factor = jnp.where(half > 0, 1.0 / (factor + jnp.abs(half)), factor - half)
                return (1.0 - rate) * scale + rate * root * factor
            pull = cast(share, scale) * (1.0 - jnp.square(scale / prior))
            change = 0.5 * scale * (pull - scale * slope)
            return jnp.maximum(scale + rate * change, _LEAST * scale)

        moves = trees.merge_synapses(
            lambda s, g, *rest: move(s, g, *rest), state.scale, updates, params, scales, means
        )
        scale = trees.map_synapses(narrow, state.scale, products, scales)
        return moves, MesuState(scale, advanced(state.key))

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def bgd(
    init_scale: Number | PyTree,
    *,
    mean_rate: Number = 1.0,
    scale_rate: Number = 1.0,
    clip: Number | None = None,
    batch_size: Number = 1,
    seed: Any = 0,
) -> optax.GradientTransformationExtraArgs:
    """Bayesian gradient descent: FOO-VB with a diagonal covariance, which forgets nothing.

    It is the fixed point of :func:`mesu` for an infinite window.

    Args:
      init_scale: standard deviations of the first prior, a number or a pytree like the parameters.
      mean_rate: factor of the change of the mean.
      scale_rate: factor of the change of the standard deviation, at most 1.
      clip: bound on the absolute value of sigma times either derivative.
      batch_size: factor of the gradients; the number of examples where the loss is their mean.
      seed: integer, or a random key.

    Returns:
      A transformation whose state has the method ``posterior(params)``.

    Raises:
      ValueError: as :func:`mesu`.

    References:
      Zeno et al., "Task agnostic continual learning using online variational Bayes",
      arXiv:1803.10123, algorithm 1; "... with fixed-point updates", Neural Computation 33 (2021).

    >>> tx, params = bgd(0.1), {"w": jnp.array([1.0])}
    >>> grads, noise = {"w": jnp.array([2.0])}, {"w": jnp.array([0.0])}
    >>> updates, state = tx.update(grads, tx.init(params), params, noise=noise)
    >>> updates["w"], state.scale["w"]
    (Array([-0.02], dtype=float32), Array([0.1], dtype=float32))
    """
    return mesu(
        float("inf"),
        init_scale=init_scale,
        form="fixed_point",
        mean_rate=mean_rate,
        scale_rate=scale_rate,
        clip=clip,
        batch_size=batch_size,
        seed=seed,
    )


def _positive(name: str, value: Any, least: float = 0.0) -> None:
    for number in jax.tree.leaves(value):
        if isinstance(number, jax.core.Tracer):
            continue
        good = np.asarray(number) >= least if least else np.asarray(number) > 0
        if not np.all(good):
            bound = f"at least {least:g}" if least else "positive"
            raise ValueError(f"{name} must be {bound}, not {number}.")
