"""The belief in a chain: an estimator keeps it, and every inner transformation is handed it.

:func:`with_posterior` does for a belief what :func:`adaptivenet.pruning.with_signals` does for
signals: extra arguments, which is optax's own protocol, so that no transformation looks into the
state of another::

    tx = with_posterior(
        squared_gradient(0.99), optax.chain(optax.adam(1e-3), prune(..., score=an.pruning.snr))
    )
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import optax

from adaptivenet.chains import hand_on
from adaptivenet.moments import Resetting
from adaptivenet.posterior.gaussian import Posterior, find

PyTree = Any

__all__ = ["Estimator", "Held", "PosteriorState", "held", "with_posterior"]


class Estimator(Protocol):
    """Keeps a belief up to date, step by step.

    Its state should be a NamedTuple with a method ``posterior(params)``, so that
    :func:`adaptivenet.posterior.find` reads it between steps.
    """

    def init(self, params: PyTree) -> Any:
        """The state before the first gradient."""
        ...

    def update(self, state: Any, grads: PyTree, params: PyTree, **signals: Any) -> Any:
        """The state after one more gradient, taken at ``params``."""
        ...

    def posterior(self, state: Any, params: PyTree) -> Posterior:
        """The belief."""
        ...


@dataclass(frozen=True)
class Held:
    """The belief that the inner transformation holds itself: see :func:`held`."""

    def init(self, params: PyTree) -> optax.EmptyState:
        """Nothing."""
        del params
        return optax.EmptyState()

    def update(
        self, state: optax.EmptyState, grads: PyTree, params: PyTree, **signals: Any
    ) -> optax.EmptyState:
        """Nothing."""
        del grads, params, signals
        return state

    def posterior(self, state: Any, params: PyTree) -> Posterior:
        """The belief found in a state: that of the inner transformation."""
        return find(state, params)


def held() -> Held:
    """An estimator for chains that hold a belief themselves, as a variational optimizer does.

    What is handed on is the belief of the inner state as it was before the step, which is the one
    that the gradients were taken under.

    Returns:
      An estimator for :func:`with_posterior`; at ``init`` the state of the inner transformation
      must hold a belief (a NamedTuple with a method ``posterior(params)``).

    >>> import jax.numpy as jnp
    >>> from adaptivenet.posterior.fisher import squared_gradient
    >>> inner = with_posterior(squared_gradient(), optax.sgd(0.1))
    >>> state = with_posterior(held(), inner).init({"w": jnp.ones(2)})
    >>> find(state, {"w": jnp.ones(2)}).mean["w"].tolist()
    [1.0, 1.0]
    """
    return Held()


class PosteriorState(NamedTuple):
    """State of :func:`with_posterior`.

    Attributes:
      estimate: state of the estimator. (It comes first: of two beliefs, the outer one is found.)
      inner: state of the chain.
      resets: not empty where the state of the chain forgets synapses that wake.
    """

    estimate: Any
    inner: Any
    resets: tuple[Any, ...] = ()


def with_posterior(
    estimator: Estimator, inner: optax.GradientTransformation, *, reset: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Keeps a belief about the parameters, and hands it to every inner transformation.

    In every step the estimator takes in the gradients as they arrive here, at the parameters that
    they were taken at; then ``posterior=`` (a :class:`Posterior`) and ``grads=`` go to all members
    of the chain. Extra arguments that the caller passes go through, to the estimator as well, and
    win over these two. (Inside ``optax.MultiSteps`` gradients are the accumulated ones.)

    **Woken synapses.** Where a pruner regrows, what the chain remembers of a synapse that wakes is
    set to what ``init`` gives, as :func:`adaptivenet.pruning.with_signals` does. The estimate is
    left alone: the belief of such a synapse is what was seen of its place while it was dead. For a
    belief that begins again from the prior, put ``with_signals(with_posterior(...))`` around.

    Args:
      estimator: an object with ``init``, ``update`` and ``posterior``, such as
        :func:`adaptivenet.posterior.fisher.squared_gradient`, or :func:`held`.
      inner: a chain, such as an optimizer and a pruner.
      reset: whether to reset moments of woken synapses; in steps without an event nothing is
        computed for it.

    Returns:
      The transformation; :func:`adaptivenet.posterior.find` reads the belief from its state.

    Raises:
      TypeError: ``inner`` is no transformation, or the estimator is none.
      ValueError: at ``init``: the estimator is :func:`held`, and the inner state holds no belief.
        At ``update``: no parameters.

    >>> import jax.numpy as jnp
    >>> from adaptivenet.posterior.fisher import squared_gradient
    >>> from adaptivenet.pruning import prune, snr
    >>> chain = optax.chain(optax.sgd(0.0), prune(0.5, score=snr))
    >>> tx, params = with_posterior(squared_gradient(0.9), chain), {"w": jnp.array([[3.0, 1.0]])}
    >>> _, state = tx.update({"w": jnp.array([[0.1, 2.0]])}, tx.init(params), params)
    >>> state.inner[-1].mask["w"].tolist()  # 3 * 0.1 < 1 * 2
    [[False, True]]
    """
    parts = ("init", "update", "posterior")
    if isinstance(estimator, type) or not all(
        callable(getattr(estimator, part, None)) for part in parts
    ):
        missing = [part for part in parts if not callable(getattr(estimator, part, None))]
        raise TypeError(
            f"{estimator!r} is no estimator of a posterior"
            + (f" (it lacks {', '.join(missing)})" if missing else " (it is a class)")
            + ": give one such as an.posterior.squared_gradient(0.99)."
        )
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            "with_posterior(estimator, inner) wraps an optax transformation, such as "
            f"optax.chain(...), not {inner!r}."
        )
    chain = optax.with_extra_args_support(inner)
    holding = isinstance(estimator, Held)

    def init(params: PyTree) -> PosteriorState:
        resets = (optax.EmptyState(),) if reset else ()
        state = PosteriorState(estimator.init(params), chain.init(params), resets)
        if holding:
            _found(state.inner, params)
        return state

    def update(
        updates: PyTree, state: PosteriorState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, PosteriorState]:
        if params is None:
            raise ValueError(
                "with_posterior() needs the parameters: call tx.update(grads, opt_state, params)."
            )
        # An outer wrapper's `grads=` are for the members; the estimator has its own.
        told = {name: value for name, value in extra.items() if name not in _POSITIONAL}
        estimate = estimator.update(state.estimate, updates, params, **told)
        belief = estimator.posterior(state.inner if holding else estimate, params)
        signals = {"grads": updates, "posterior": belief, **extra}
        updates, after = hand_on("with_posterior()", chain, updates, state.inner, params, signals)
        after = resetting(state.inner, after, params) if reset else after
        return updates, PosteriorState(estimate, after, state.resets)

    resetting = Resetting(chain.init)
    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


# What the estimator is given by position.
_POSITIONAL = ("state", "grads", "params")


def _found(inner: PyTree, params: PyTree) -> None:
    try:
        find(inner, params)
    except ValueError as error:
        raise ValueError(
            "held() hands on the belief of the inner transformation, but its state holds none "
            "(no part of it has a method posterior(params)): give an estimator, such as "
            "an.posterior.squared_gradient(0.99), or an inner transformation that keeps a belief."
        ) from error
