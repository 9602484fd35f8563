"""IVON: a Gaussian belief about every parameter, learnt at about the cost of Adam.

The gradient is taken at parameters drawn from the belief, and what was drawn tells the curvature::

    tx = optax.chain(optax.clip_by_global_norm(1.0), ivon(0.1, ess=60_000))
    opt_state = tx.init(params)
    value, grads, extra = noisy_value_and_grad(loss, opt_state, params, inputs, labels)
    updates, opt_state = tx.update(grads, opt_state, params, **extra)
    params = optax.apply_updates(params, updates)  # the mean of the belief

The loss is a *mean* of negative log-likelihoods over examples.
:func:`adaptivenet.posterior.noisy_value_and_grad` draws, and finds the state wherever it lies in an
optimizer state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet import trees
from adaptivenet.posterior._arrays import known
from adaptivenet.posterior._states import (
    advanced,
    cast,
    check_positive,
    filled,
    floats,
    initial_key,
    noise_times_grads,
    normal,
    scalar,
)
from adaptivenet.posterior.gaussian import Posterior

PyTree = Any
Number = Any  # a Python number, or a traced scalar

__all__ = ["IvonState", "ivon", "scale_by_ivon"]


class IvonState(NamedTuple):
    """State of :func:`scale_by_ivon`.

    Attributes:
      step: int32, number of updates.
      momentum: pytree of float32 (float64 for float64 parameters), mean of the gradients; masked
        nodes for leaves that are not floating.
      hess: pytree likewise, the curvature of the mean loss.
      key: uint32, data of the random key that the next draw comes from.
      ess: the effective sample size.
      weight_decay: the precision of the prior, for each example.
    """

    step: jax.Array
    momentum: PyTree
    hess: PyTree
    key: jax.Array
    ess: jax.Array
    weight_decay: jax.Array

    def precision(self) -> PyTree:
        """``ess * (hess + weight_decay)``, the inverse variances."""
        return trees.map_synapses(
            lambda h: self.ess.astype(h.dtype) * (h + self.weight_decay.astype(h.dtype)), self.hess
        )

    def posterior(self, params: PyTree) -> Posterior:
        """The belief: its mean are the parameters."""
        return Posterior(floats(self.hess, params), self.precision())

    def noise(self, key: jax.Array) -> PyTree:
        """A draw from the belief, less its mean."""
        return normal(key, trees.map_synapses(jax.lax.rsqrt, self.precision()))


def scale_by_ivon(
    ess: Number,
    *,
    hess_init: Number = 1.0,
    b1: Number = 0.9,
    b2: Number = 0.99999,
    weight_decay: Number = 1e-4,
    clip_radius: Number = float("inf"),
    rescale: bool = True,
    seed: Any = 0,
) -> optax.GradientTransformationExtraArgs:
    """The direction of improved variational online Newton, for a learning rate to follow.

    ``update`` needs one of three extra arguments, each a pytree like the parameters: ``noise=``,
    what was added to them for the gradient; ``noisy_params=``, the parameters that the gradient was
    taken at; ``noise_grads=``, noise times raw gradient, averaged over draws. The last is what
    :func:`adaptivenet.posterior.noisy_value_and_grad` returns: it does not depend on what stands
    before this in a chain, whereas the products with ``noise=`` are taken with the gradient that
    arrives here.

    Inside ``optax.MultiSteps`` all micro-batches of an update have the same draw, as they must, if
    it comes from the state's key. ``noise=`` then uses the curvature of all of them,
    ``noise_grads=`` that of the last. (Call ``MultiSteps(...).update``; what its
    ``gradient_transformation()`` returns takes no extra arguments.)

    The parameters are the mean of the belief. In bfloat16 they round it; the state is float32.
    (``optax.inject_hyperparams`` makes numbers of the parameters' dtype, and ``b2`` in bfloat16 is
    1: give it ``hyperparam_dtype=jnp.float32``.)

    Args:
      ess: effective sample size, the number of examples that the loss is a mean over; less tempers.
      hess_init: curvature to start from. Too small a value lets the first draws be wild.
      b1: share of the past that the mean of gradients keeps, in [0, 1).
      b2: likewise of the curvature.
      weight_decay: precision of the prior divided by ``ess``; an L2 penalty of this strength.
      clip_radius: bound on each element of the direction, before the learning rate.
      rescale: multiply by ``hess_init + weight_decay``, which makes the first step that of gradient
        descent with the same learning rate.
      seed: integer, or a random key. It is folded with the parameters' bits, so that members of a
        population draw different numbers.

    Returns:
      A transformation whose state has the method ``posterior(params)``.

    Raises:
      ValueError: a number is out of range; at ``update``: no parameters, or not exactly one of the
        three extra arguments, or it belongs to another tree.

    References:
      Shen et al., "Variational learning is effective for large deep networks", ICML 2024,
      arXiv:2402.17641, algorithm 1.

    >>> tx, params = scale_by_ivon(ess=10.0, b2=0.5, weight_decay=0.1), {"w": jnp.array([2.0])}
    >>> _, state = tx.update(params, tx.init(params), params, noise={"w": jnp.array([0.3])})
    >>> state.posterior(params).precision["w"]  # 10 (h + 0.1), where h = 7.3636
    Array([74.636...], dtype=float32)
    """
    check_positive("ess", ess)
    check_positive("hess_init", hess_init)
    check_positive("weight_decay", weight_decay)
    check_positive("clip_radius", clip_radius)
    for name, decay in (("b1", b1), ("b2", b2)):
        if known(decay) and not np.all((np.asarray(decay) >= 0) & (np.asarray(decay) < 1)):
            raise ValueError(f"{name} must be in [0, 1), not {decay}.")

    def init(params: PyTree) -> IvonState:
        return IvonState(
            step=jnp.zeros((), jnp.int32),
            momentum=filled(params, 0.0),
            hess=filled(params, hess_init),
            key=initial_key(seed, params),
            ess=scalar(ess),
            weight_decay=scalar(weight_decay),
        )

    def update(
        updates: PyTree,
        state: IvonState,
        params: PyTree | None = None,
        *,
        noise: PyTree | None = None,
        noisy_params: PyTree | None = None,
        noise_grads: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, IvonState]:
        del extra
        products = noise_times_grads(
            "ivon()", state.hess, updates, params, noise, noisy_params, noise_grads
        )
        step = jnp.asarray(optax.safe_increment(state.step))

        def curvature(h: jax.Array, product: jax.Array) -> jax.Array:
            a = h + cast(weight_decay, h)
            rest = cast(1.0 - b2, h)
            gap = product * cast(ess, h) * a - h
            # The last term keeps h + weight_decay positive: at least half of what it was.
            return h + rest * gap + 0.5 * jnp.square(rest * gap) / a

        def direction(g: Any, m: jax.Array, h: jax.Array, p: jax.Array) -> jax.Array:
            decay = cast(weight_decay, h)
            mean = m / (1.0 - jnp.power(cast(b1, h), step.astype(h.dtype)))
            radius = cast(clip_radius, h)
            move = jnp.clip((mean + decay * p.astype(h.dtype)) / (h + decay), -radius, radius)
            if rescale:
                move = move * (cast(hess_init, h) + decay)
            return move.astype(g.dtype)

        momentum = trees.map_synapses(
            lambda m, g: m + cast(1.0 - b1, m) * (g.astype(m.dtype) - m), state.momentum, updates
        )
        hess = trees.map_synapses(curvature, state.hess, products)
        moves = trees.merge_synapses(
            lambda m, g, h, p: direction(g, m, h, p), momentum, updates, hess, params
        )
        return moves, IvonState(
            step=step,
            momentum=momentum,
            hess=hess,
            key=advanced(state.key),
            ess=scalar(ess),
            weight_decay=scalar(weight_decay),
        )

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def ivon(
    learning_rate: optax.ScalarOrSchedule,
    ess: Number,
    *,
    hess_init: Number = 1.0,
    b1: Number = 0.9,
    b2: Number = 0.99999,
    weight_decay: Number = 1e-4,
    clip_radius: Number = float("inf"),
    rescale: bool = True,
    seed: Any = 0,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer IVON: :func:`scale_by_ivon` and a learning rate.

    Args:
      learning_rate: a number or an optax schedule.
      ess: see :func:`scale_by_ivon`, as for all that follow.
      hess_init: curvature to start from.
      b1: share of the past that the mean of gradients keeps.
      b2: likewise of the curvature.
      weight_decay: precision of the prior divided by ``ess``.
      clip_radius: bound on each element of the direction.
      rescale: make the first step that of gradient descent.
      seed: integer, or a random key.

    Returns:
      The optimizer.

    Raises:
      ValueError: as :func:`scale_by_ivon`.

    References:
      Shen et al., arXiv:2402.17641, algorithm 1.

    >>> from adaptivenet.posterior.draws import noisy_value_and_grad
    >>> tx, params = ivon(0.1, ess=100), {"w": jnp.array([1.0, -2.0])}
    >>> state = tx.init(params)
    >>> _, grads, extra = noisy_value_and_grad(lambda p: jnp.sum(p["w"] ** 2), state, params)
    >>> updates, state = tx.update(grads, state, params, **extra)
    >>> jnp.sign(updates["w"]).tolist()
    [-1.0, 1.0]
    """
    return optax.chain(
        scale_by_ivon(
            ess,
            hess_init=hess_init,
            b1=b1,
            b2=b2,
            weight_decay=weight_decay,
            clip_radius=clip_radius,
            rescale=rescale,
            seed=seed,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )
