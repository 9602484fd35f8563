"""The long short-term memory: a pure function on a dict of parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, dict[str, jax.Array]]


def lstm(params: Params, inputs: jax.Array) -> jax.Array:
    """Reads a sequence with one layer of LSTM cells, and answers from its last state.

    Args:
        params: `{"cells": {"kernel": [features, 4 * hidden], "carried": [hidden, 4 * hidden],
            "bias": [4 * hidden]}, "readout": {"kernel": [hidden, outputs], "bias": [outputs]}}`;
            the gates lie one behind the other: input, forget, candidate, output.
        inputs: `[..., time, features]`, floating, `time` of at least one step.

    Returns:
        `[..., outputs]` (logits), in the kernels' dtype.

    Raises:
        ValueError: If the inputs do not fit the kernel.

    References:
        Hochreiter and Schmidhuber, "Long short-term memory", Neural Computation 9 (1997); Gers et
        al., "Learning to forget", Neural Computation 12 (2000).

    >>> import jax, jax.numpy as jnp
    >>> lstm(lstm_init(jax.random.key(0), 1, 8, 10), jnp.ones((3, 40, 1))).shape
    (3, 10)
    """
    cells = params["cells"]
    features = cells["kernel"].shape[0]
    if inputs.ndim < 2 or inputs.shape[-1] != features or not inputs.shape[-2]:
        raise ValueError(f"lstm() takes inputs [..., time, {features}], not {inputs.shape}")
    # What does not depend on the state is one product for all steps.
    driven = inputs.astype(cells["kernel"].dtype) @ cells["kernel"] + cells["bias"]

    def step(state: tuple[jax.Array, jax.Array], now: jax.Array) -> Any:
        memory, output = state
        gates = jnp.split(now + output @ cells["carried"], 4, axis=-1)
        taken, kept, given = (jax.nn.sigmoid(gates[place]) for place in (0, 1, 3))
        memory = kept * memory + taken * jnp.tanh(gates[2])
        return (memory, given * jnp.tanh(memory)), None

    start = jnp.zeros((*inputs.shape[:-2], cells["carried"].shape[0]), driven.dtype)
    (_, output), _ = jax.lax.scan(step, (start, start), jnp.moveaxis(driven, -2, 0))
    return output @ params["readout"]["kernel"] + params["readout"]["bias"]


def lstm_init(key: jax.Array, features: int, hidden: int, outputs: int) -> Params:
    """Draws the parameters of `lstm`.

    Glorot uniform kernels, orthogonal recurrent kernels, a bias of 1 for the forget gate.

    Args:
        key: Random key.
        features: Of the inputs.
        hidden: Cells.
        outputs: Of the readout.

    Returns:
        The parameters, float32.

    References:
        Jozefowicz et al., "An empirical exploration of recurrent network architectures", ICML
        2015, for the bias of the forget gate.

    >>> import jax
    >>> lstm_init(jax.random.key(0), 2, 3, 4)["cells"]["carried"].shape
    (3, 12)
    """
    first, last, *gates = jax.random.split(key, 6)
    glorot, orthogonal = jax.nn.initializers.glorot_uniform(), jax.nn.initializers.orthogonal()
    carried = jnp.concatenate([orthogonal(gate, (hidden, hidden)) for gate in gates], axis=1)
    return {
        "cells": {
            "kernel": glorot(first, (features, 4 * hidden)),
            "carried": carried,
            "bias": jnp.zeros(4 * hidden).at[hidden : 2 * hidden].set(1.0),
        },
        "readout": {"kernel": glorot(last, (hidden, outputs)), "bias": jnp.zeros(outputs)},
    }
