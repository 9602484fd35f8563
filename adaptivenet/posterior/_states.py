"""What transformations that hold a belief share: dtypes, keys, draws, and what they are told."""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet import trees
from adaptivenet.posterior._arrays import known, wide_dtype

PyTree = Any
Number = Any  # a Python number, or a traced scalar


def noise_times_grads(
    name: str,
    like: PyTree,
    grads: PyTree,
    params: PyTree | None,
    noise: PyTree | None,
    noisy_params: PyTree | None,
    noise_grads: PyTree | None,
) -> PyTree:
    """What ``update`` was told of the draw, as noise times gradient; shaped like ``like``."""
    if params is None:
        raise ValueError(f"{name} needs the parameters: call tx.update(grads, opt_state, params).")
    given = {"noise": noise, "noisy_params": noisy_params, "noise_grads": noise_grads}
    told = [kind for kind, value in given.items() if value is not None]
    if len(told) != 1:
        raise ValueError(
            f"{name} needs exactly one of noise=, noisy_params= and noise_grads=, not "
            f"{' and '.join(told) or 'none'}: take the gradient with noisy_value_and_grad(loss, "
            "opt_state, params, ...) and hand tx.update(grads, opt_state, params, **extra) what it "
            "returns. (A wrapper may have dropped it: use optax.MultiSteps(...).update, not its "
            "gradient_transformation().)"
        )
    drawn = given[told[0]]
    names = iter(trees.paths(like))

    def check(mine: jax.Array, theirs: Any) -> None:
        path = next(names)
        if trees.is_masked(theirs) or jnp.shape(theirs) != mine.shape:
            found = "nothing" if trees.is_masked(theirs) else f"shape {jnp.shape(theirs)}"
            raise ValueError(
                f"{told[0]}= has {found} for leaf {path!r} of shape {mine.shape}: draw from the "
                "state that is updated."
            )

    trees.map_synapses(check, like, drawn)
    if told[0] == "noise_grads":
        return trees.map_synapses(lambda h, x: x.astype(h.dtype), like, drawn)
    if told[0] == "noise":
        return trees.map_synapses(
            lambda h, n, g: n.astype(h.dtype) * g.astype(h.dtype), like, drawn, grads
        )
    return trees.map_synapses(
        lambda h, q, p, g: (q.astype(h.dtype) - p.astype(h.dtype)) * g.astype(h.dtype),
        like,
        drawn,
        params,
        grads,
    )


def filled(params: PyTree, value: Any) -> PyTree:
    """Copies of a number for the floating leaves of a tree; masked nodes for the others.

    They are float32, or float64 beside float64 parameters.
    """

    def fill(leaf: Any) -> Any:
        dtype = jnp.asarray(leaf).dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            return optax.MaskedNode()
        return jnp.zeros_like(leaf, dtype=wide_dtype(dtype)) + cast(value, wide_dtype(dtype))

    return jax.tree.map(fill, params)


def normal(key: jax.Array, scales: PyTree) -> PyTree:
    """Independent normal draws of mean zero with the given standard deviations."""
    leaves, treedef = jax.tree.flatten(scales)
    draws = [
        scale * jax.random.normal(jax.random.fold_in(key, place), scale.shape, scale.dtype)
        for place, scale in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, draws)


def initial_key(seed: Any, params: PyTree) -> jax.Array:
    """Data of a random key that differs between members of a population of the same seed."""
    is_key = isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)
    key = seed if is_key else jax.random.key(seed)
    for leaf in jax.tree.leaves(params):
        if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating):
            bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
            key = jax.random.fold_in(key, jnp.sum(bits, dtype=jnp.uint32))
    return jax.random.key_data(key)


def advanced(key: jax.Array) -> jax.Array:
    """The key data of the next step."""
    return jax.random.key_data(jax.random.split(jax.random.wrap_key_data(key))[0])


def cast(value: Number, like: Any) -> jax.Array:
    """A number in the dtype of an array, or in the dtype given."""
    return jnp.asarray(value).astype(getattr(like, "dtype", like))


def scalar(value: Number) -> jax.Array:
    """A number in the default floating dtype."""
    return cast(value, jnp.result_type(float))


def floats(like: PyTree, params: PyTree) -> PyTree:
    """Parameters in the dtypes of a state, where it has leaves."""
    return trees.map_synapses(lambda h, p: p.astype(h.dtype), like, params)


def check_positive(name: str, value: Number) -> None:
    """Refuses a number that is not positive, as far as it is known."""
    if known(value) and not np.all(np.asarray(value) > 0):
        raise ValueError(f"{name} must be positive, not {value}.")


def per_leaf(name: str, value: Number | PyTree, like: PyTree) -> PyTree:
    """A number, or a number for each leaf, spread over the leaves of a tree."""
    plain = jax.tree_util.all_leaves([value])

    def spread(leaf: jax.Array, own: Any) -> jax.Array:
        own = cast(own, leaf)
        if own.shape not in ((), leaf.shape):
            raise ValueError(
                f"{name}= has the shape {own.shape} where the parameters have {leaf.shape}; give "
                "a number, or a pytree of numbers or arrays like the parameters."
            )
        return jnp.broadcast_to(own, leaf.shape)

    if plain:
        return trees.map_synapses(lambda leaf: spread(leaf, value), like)
    return trees.map_synapses(spread, like, value)
