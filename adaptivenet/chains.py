"""Extra arguments on their way to the members of a chain: optax's own protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

PyTree = Any

__all__ = ["hand_on", "operands"]

# How Python and optax say that an extra argument is not welcome.
_REFUSALS = ("multiple values for argument", "Unexpected keyword", "unexpected keyword")


def hand_on(
    who: str,
    chain: optax.GradientTransformationExtraArgs,
    updates: PyTree,
    state: PyTree,
    params: PyTree,
    signals: Mapping[str, Any],
) -> tuple[PyTree, PyTree]:
    """Updates a chain with extra arguments; where a member refuses them, the error says what to do.

    Args:
      who: hands them on, for the message.
      chain: a transformation that takes extra arguments.
      updates: what comes into the chain.
      state: its state.
      params: the parameters.
      signals: the extra arguments.

    Returns:
      Updates and state.

    >>> chain = optax.with_extra_args_support(optax.scale(2.0))
    >>> hand_on("me()", chain, 3.0, chain.init(0.0), 0.0, {"grads": 3.0})[0]
    6.0
    """
    try:
        return chain.update(updates, state, params, **signals)
    except TypeError as error:
        if any(words in str(error) for words in _REFUSALS):
            error.add_note(
                f"A member of the chain refuses the extra arguments that {who} hands on "
                f"({', '.join(signals)}): wrap it in an.pruning.signals.accepting(member, ...) "
                "with the names of those that it needs, if any."
            )
        raise


def operands(signals: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Extra arguments that can be operands of a ``cond``, and those that can only be closed over.

    Args:
      signals: the extra arguments.

    Returns:
      Trees of arrays and numbers; and the others, functions say.

    >>> operands({"step": 3, "loss": print})
    ({'step': 3}, {'loss': <built-in function print>})
    """
    kinds = (jax.Array, np.ndarray, np.generic, int, float)
    arrays = {
        name: value
        for name, value in signals.items()
        if all(isinstance(leaf, kinds) for leaf in jax.tree.leaves(value))
    }
    return arrays, {name: value for name, value in signals.items() if name not in arrays}
