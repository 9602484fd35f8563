"""From a Flax NNX module to a pure function and a plain dict of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

Params = dict[str, Any]


def functional(module: nnx.Module) -> tuple[Callable[..., jax.Array], Params]:
    """Splits a module into `apply(params, inputs, key=None)` and its parameters.

    The parameters are a plain nested dict of arrays, so that paths read `dense1/kernel` and every
    tool for pytrees works on them. Whatever else the module holds (statistics, counters) is frozen
    into `apply` as it is now.

    Args:
        module: Any NNX module. If its `__call__` takes `key=`, the key is handed on.

    Returns:
        `(apply, params)`. `apply` is pure: it may be jitted, differentiated and vmapped over
        `params`, and it hands further keyword arguments on to the module.

    Raises:
        TypeError: If `module` is not an NNX module.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from adaptivenet.models import MLP
    >>> apply, params = functional(MLP((4, 3, 2), rngs=nnx.Rngs(0)))
    >>> sorted(params), params["dense1"]["kernel"].shape
    (['dense1', 'dense2'], (4, 3))
    >>> apply(params, jnp.ones((5, 4))).shape
    (5, 2)
    """
    if not isinstance(module, nnx.Module):
        raise TypeError(f"functional() takes a flax.nnx.Module, got {type(module).__name__}")
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def apply(
        params: Params, inputs: jax.Array, key: jax.Array | None = None, **options: Any
    ) -> jax.Array:
        # A fresh State each call: replace_by_pure_dict works in place.
        state = jax.tree.map(lambda leaf: leaf, template)
        nnx.replace_by_pure_dict(state, params)
        if key is not None:
            options["key"] = key
        return nnx.merge(graph, state, rest)(inputs, **options)

    template = params
    return apply, nnx.to_pure_dict(params)
