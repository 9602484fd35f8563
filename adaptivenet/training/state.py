"""What training carries from step to step: parameters, optimizer state, random key, step count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class TrainState(NamedTuple):
    """All that the next training step depends on.

    Every leaf may carry a leading population axis; `step.shape` tells which.

    Attributes:
        params: Pytree of parameters.
        opt_state: State of the optax transformation.
        key: Raw key data (uint32 `[2]`), which checkpoints, donates and maps like any array.
        step: Number of optimizer updates so far, int32 scalar.
    """

    params: Any
    opt_state: Any
    key: jax.Array
    step: jax.Array


def init_state(
    init_params: Callable[[jax.Array], Any], tx: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """Draws parameters and starts the optimizer.

    Pure and vmappable: `jax.vmap(lambda key: init_state(init_params, tx, key))(keys)` starts a
    population. The training key is split off before the optimizer sees anything, so every arm that
    starts from the same key sees the same parameters, batches and dropout masks.

    Args:
        init_params: `init_params(key) -> params`.
        tx: Any optax transformation.
        key: Random key, typed or raw.

    Returns:
        The state before the first step.

    >>> import jax, jax.numpy as jnp, optax
    >>> draw = lambda key: {"w": jax.random.normal(key, (3,))}
    >>> state = init_state(draw, optax.sgd(0.1), jax.random.key(0))
    >>> state.params["w"].shape, int(state.step), state.key.dtype
    ((3,), 0, dtype('uint32'))
    >>> keys = jax.random.split(jax.random.key(0), 5)
    >>> jax.vmap(lambda key: init_state(draw, optax.sgd(0.1), key))(keys).params["w"].shape
    (5, 3)
    """
    params_key, train_key = jax.random.split(as_key(key))
    params = init_params(params_key)
    return TrainState(params, tx.init(params), like_key(train_key, None), jnp.zeros((), jnp.int32))


def as_key(key: jax.Array) -> jax.Array:
    """Returns a typed key; raw key data are wrapped with the default generator.

    Args:
        key: Typed key, or raw uint32 key data.

    Returns:
        The same key, typed.

    Raises:
        TypeError: If `key` is neither.

    >>> import jax
    >>> bool(as_key(jax.random.key_data(jax.random.key(7))) == jax.random.key(7))
    True
    """
    key = jnp.asarray(key)
    if is_typed_key(key):
        return key
    if key.dtype != jnp.uint32:
        raise TypeError(
            f"a random key is a jax.random.key or uint32 key data, got {key.dtype}{list(key.shape)}"
        )
    return jax.random.wrap_key_data(key)


def like_key(key: jax.Array, template: jax.Array | None) -> jax.Array:
    """Spells a typed key the way `template` is spelled: typed stays typed, raw stays raw.

    Args:
        key: Typed key.
        template: Typed key, raw key data, or `None` for raw wherever raw can be wrapped again
            (keys of the default generator).

    Returns:
        `key` or its raw data.
    """
    if template is None:
        default = jax.random.key_impl(jax.random.key(0))
        return jax.random.key_data(key) if jax.random.key_impl(key) == default else key
    return key if is_typed_key(template) else jax.random.key_data(key)


def is_typed_key(leaf: Any) -> bool:
    """Tells whether a leaf is a typed random key array."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
