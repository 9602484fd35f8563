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
    params, rebuild = taken_apart(module, nnx.Param)

    def apply(
        params: Params, inputs: jax.Array, key: jax.Array | None = None, **options: Any
    ) -> jax.Array:
        if key is not None:
            options["key"] = key
        return rebuild(params)(inputs, **options)

    return apply, params


def taken_apart(module: nnx.Module, chosen: Any) -> tuple[Params, Callable[[Params], Any]]:
    """Some variables of a module, and the function that makes the module of their values.

    Args:
        module: Any NNX module.
        chosen: A filter of variables, such as `nnx.Param`.

    Returns:
        Their values as a nested dict, and `rebuild(values)`, a new module.
    """
    graph, mine, others = nnx.split(module, chosen, ...)

    def rebuild(params: Params) -> Any:
        # Fresh states each call: replace_by_pure_dict works in place, and so may the module.
        fresh, rest = (jax.tree.map(lambda leaf: leaf, state) for state in (mine, others))
        nnx.replace_by_pure_dict(fresh, params)
        return nnx.merge(graph, fresh, rest)

    return nnx.to_pure_dict(mine), rebuild
