r"""Synaptic intelligence: a synapse is worth what it did for the loss on its way through a task.

Along the path of the parameters the loss falls by the integral of minus the gradient, which is a
sum over synapses. What each of them has contributed, over how far it went, is its importance; no
pass over the data, and no labels, are needed at a boundary::

    tx = path_integral(optax.adam(1e-3), strength=0.1)
    ...                                                     # train on the first task
    opt_state = consolidate(opt_state, params)
    ...                                                     # train on the second task

It is a wrapper because it has to see both the gradient of the loss and the step that is taken.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet import trees
from adaptivenet.chains import hand_on
from adaptivenet.consolidation.boundary import (
    check_share,
    check_strength,
    copied,
    nothing_yet,
    number,
)
from adaptivenet.posterior._arrays import known
from adaptivenet.posterior._states import cast
from adaptivenet.posterior.gaussian import Posterior

PyTree = Any
Number = Any  # a Python number, or a traced scalar

__all__ = ["PathIntegralState", "path_integral"]


class PathIntegralState(NamedTuple):
    """State of :func:`path_integral`.

    (It has no method ``posterior``: it would hide the belief of a variational optimizer within, and
    before the first boundary its precision is zero, which is no belief.)

    Attributes:
      inner: state of the optimizer.
      anchor: pytree of float32 (float64 for float64 parameters), the parameters where the task
        began; masked nodes for leaves that are not protected.
      omega: likewise, the importance from the tasks before.
      credit: likewise, what each synapse has contributed to the fall of the loss in this task; of
        either sign.
      damping: float scalar.
      decay: float scalar.
    """

    inner: Any
    anchor: PyTree
    omega: PyTree
    credit: PyTree
    damping: jax.Array
    decay: jax.Array

    @property
    def memory(self) -> Posterior:
        """Anchor and precision ``2 omega``, of the tasks before.

        ``penalty(params, memory, strength)`` of :mod:`adaptivenet.consolidation.elastic` is the
        surrogate loss.
        """
        return Posterior(self.anchor, jax.tree.map(lambda o: 2 * o, self.omega))

    def importance(self, params: PyTree) -> PyTree:
        """What ``omega`` would be if the task ended now.

        Args:
          params: the parameters.

        Returns:
          Pytree like ``omega``, non-negative.
        """

        def after(o: jax.Array, credit: jax.Array, anchor: jax.Array, param: jax.Array) -> Any:
            far = jnp.square(param.astype(o.dtype) - anchor) + cast(self.damping, o)
            return jnp.maximum(cast(self.decay, o) * o + credit / far, 0)

        return trees.map_synapses(after, self.omega, self.credit, self.anchor, params)

    def consolidated(self, params: PyTree, posterior: Any, **signals: Any) -> PathIntegralState:
        """The state after a boundary; no belief is needed."""
        del posterior, signals
        return self._replace(
            anchor=copied(self.anchor, params),
            omega=self.importance(params),
            credit=jax.tree.map(jnp.zeros_like, self.credit),
        )


def path_integral(
    inner: optax.GradientTransformation,
    strength: Number,
    *,
    damping: Number = 1e-3,
    decay: Number = 1.0,
    select: trees.Select = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Synaptic intelligence around an optimizer.

    To the gradient :math:`g` that comes in, that of the loss alone, the gradient of the surrogate
    loss :math:`c \sum_k \Omega_k (\theta_k - \tilde\theta_k)^2` is added, which makes
    :math:`g + 2 c \Omega (\theta - \tilde\theta)`, for the optimizer. With the step
    :math:`\delta` that comes out, as far as the dtype of the parameters takes it, each synapse is
    credited with :math:`\omega \leftarrow \omega - g \delta`. At a boundary

    .. math::
        \Omega \leftarrow \max\Big(0, d \, \Omega + \frac{\omega}{(\theta - \tilde\theta)^2 + \xi}
        \Big), \quad \tilde\theta \leftarrow \theta, \quad \omega \leftarrow 0

    with the decay :math:`d` and the damping :math:`\xi`. The maximum is not in the paper but in its
    authors' code: credit is negative where a synapse went uphill, and a negative penalty would push
    it away. (That code has a decay, too, but of a running mean: d times the old and 1 - d times the
    new.)

    Everything that changes the step should be within (a pruner as well: a cut is a step, credited
    with minus the gradient times minus the weight); what estimates a belief or hands on signals
    should be around it, as ``with_posterior(estimator, path_integral(chain, strength))``, because
    what is within sees the sum of both gradients. Extra arguments are handed on to ``inner``.

    Args:
      inner: an optimizer, or a chain.
      strength: c of the surrogate loss, at least 0.
      damping: xi, positive; it bounds the importance of synapses that have hardly moved. (The
        authors: 0.1 for Permuted MNIST, 0.001 for Split CIFAR-10.)
      decay: share of the importance that is kept at a boundary, in [0, 1]; 1 in the paper.
      select: regular expressions on the paths to protect; None takes all floating leaves.

    Returns:
      A transformation, whose updates are those of ``inner`` before the first boundary.

    Raises:
      TypeError: ``inner`` is no transformation.
      ValueError: a number out of range. At ``init``: ``select`` matches nothing. At ``update``: no
        parameters.

    References:
      Zenke, Poole and Ganguli, "Continual learning through synaptic intelligence", ICML 2017,
      arXiv:1703.04200, equations 3 (the path integral), 4 (the surrogate loss) and 5 (the
      importance).

    >>> from adaptivenet.consolidation.boundary import consolidate
    >>> tx, params = path_integral(optax.sgd(0.5), 1.0, damping=1.0), {"w": jnp.array([1.0, 0.0])}
    >>> updates, state = tx.update({"w": jnp.array([2.0, 0.0])}, tx.init(params), params)
    >>> params = optax.apply_updates(params, updates)  # a step of -1: credit 2, over 1^2 + 1
    >>> state = consolidate(state, params)
    >>> state.omega["w"].tolist(), state.anchor["w"].tolist()
    ([1.0, 0.0], [0.0, 0.0])
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            "path_integral(inner, strength) wraps an optimizer, such as optax.adam(1e-3) or "
            f"optax.chain(...), not {inner!r}."
        )
    check_strength("strength", strength)
    check_share("decay", decay)
    if known(damping) and not np.all(np.asarray(damping) > 0):
        raise ValueError(f"damping must be positive, not {damping}.")
    chain = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> PathIntegralState:
        nothing = nothing_yet(params, select)
        return PathIntegralState(
            inner=chain.init(params),
            anchor=copied(nothing, params),
            omega=nothing,
            credit=jax.tree.map(jnp.zeros_like, nothing),
            damping=number(damping),
            decay=number(decay),
        )

    def update(
        updates: PyTree, state: PathIntegralState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, PathIntegralState]:
        if params is None:
            raise ValueError(
                "path_integral() needs the parameters: call tx.update(grads, opt_state, params)."
            )

        def pull(o: jax.Array, grad: Any, param: jax.Array, anchor: jax.Array) -> jax.Array:
            force = cast(strength, o) * (2 * o) * (param.astype(o.dtype) - anchor)
            return jnp.where(o > 0, (grad.astype(o.dtype) + force).astype(grad.dtype), grad)

        def earn(c: jax.Array, grad: Any, param: jax.Array, step: Any) -> jax.Array:
            with jax.numpy_dtype_promotion("standard"):
                landed = (param + step).astype(param.dtype)
            moved = landed.astype(c.dtype) - param.astype(c.dtype)
            # What has not moved has earned nothing, whatever its gradient (a refused nan, say).
            return jnp.where(moved != 0, c - grad.astype(c.dtype) * moved, c)

        pulled = trees.merge_synapses(pull, state.omega, updates, params, state.anchor)
        steps, after = hand_on("path_integral()", chain, pulled, state.inner, params, extra)
        credit = trees.map_synapses(earn, state.credit, updates, params, steps)
        return steps, state._replace(
            inner=after,
            credit=credit,
            damping=number(damping),
            decay=number(decay),
        )

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
