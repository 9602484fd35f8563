"""Scores: how much each synapse is worth keeping.

A score is a plain function ``score(params, **signals)`` that returns a pytree of non-negative
floats shaped like ``params``; the larger, the more worth keeping. ``params`` hold the synapses
only (masked nodes elsewhere), where the gradient was taken. A score names the signals it needs as
keyword-only arguments without default; one that nobody supplies is an error that says what to add.

Supplied by :func:`adaptivenet.pruning.prune` itself: ``key`` (a random key of this event),
``mask``, ``step``. Every extra argument of ``tx.update(...)`` or ``revise(...)`` is passed on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
Score = Callable[..., PyTree]

__all__ = ["Score", "magnitude", "random", "required_signals", "supply"]

_REMEDIES = {
    "posterior": "wrap the chain in an.with_posterior(estimator, ...)",
    "grads": "wrap the chain in an.pruning.with_signals(...), or pass grads= to update or revise",
    "activations": "pass activations= (captured on the model's inputs) to update or revise",
} | {
    name: f"wrap the chain: an.pruning.with_signals(chain, {name}=an.pruning.signals.{name}()), or "
    f"pass {name}= to update or revise"
    for name in ("fisher", "momentum", "movement")
}


def magnitude(params: PyTree, **signals: Any) -> PyTree:
    """The absolute value of each synapse.

    Args:
      params: pytree of floating arrays.
      **signals: not used.

    Returns:
      ``|params|``, of the same shapes and dtypes.

    References:
      Han et al., "Learning both weights and connections for efficient neural networks", NeurIPS
      2015.

    >>> magnitude({"kernel": jnp.array([-2.0, 0.5])})["kernel"].tolist()
    [2.0, 0.5]
    """
    del signals
    return jax.tree.map(jnp.abs, params)


def random(params: PyTree, *, key: jax.Array, **signals: Any) -> PyTree:
    """A uniform random number for each synapse: the null model of every other score.

    Args:
      params: pytree of floating arrays.
      key: a random key; events draw anew, and members of a population draw different numbers.
      **signals: not used.

    Returns:
      Uniform draws from [0, 1), float32, of the same shapes.

    >>> random({"kernel": jnp.zeros(3)}, key=jax.random.key(0))["kernel"].shape
    (3,)
    """
    del signals
    leaves, treedef = jax.tree.flatten(params)
    draws = [
        jax.random.uniform(jax.random.fold_in(key, place), leaf.shape, jnp.float32)
        for place, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, draws)


def required_signals(function: Callable[..., Any]) -> tuple[str, ...]:
    """The signals that a score or regrowth rule asks for by name.

    Args:
      function: a score.

    Returns:
      Names of its keyword-only arguments that have no default.

    >>> required_signals(random)
    ('key',)
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(
        parameter.name
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
    )


def supply(function: Callable[..., Any], params: PyTree, signals: Mapping[str, Any]) -> Any:
    """Calls a score with the signals at hand.

    Args:
      function: a score or a priority of regrowth.
      params: its first argument.
      signals: what is at hand, by name; those it does not accept are left out.

    Returns:
      What the function returns.

    Raises:
      ValueError: the function asks for a signal that nobody supplies.

    >>> def snr(params, *, posterior, **signals): ...
    >>> supply(snr, {}, {})
    Traceback (most recent call last):
      ...
    ValueError: snr() asks for the signal 'posterior', which nobody supplies: wrap the chain in \
an.with_posterior(estimator, ...).
    """
    name = getattr(function, "__name__", type(function).__name__)
    for wanted in required_signals(function):
        if wanted not in signals:
            remedy = _REMEDIES.get(wanted, f"pass {wanted}= to tx.update(...) or revise(...)")
            raise ValueError(
                f"{name}() asks for the signal {wanted!r}, which nobody supplies: {remedy}."
            )
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return function(params, **signals)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return function(params, **signals)
    return function(params, **{k: v for k, v in signals.items() if k in parameters})
