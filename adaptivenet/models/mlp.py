"""The multilayer perceptron: a pure function on a dict of parameters, and its NNX module.

`MLP((784, 128, 64, 10), dropout=0.3)` is the network of the founding note ("the founding MLP").
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from flax import nnx

from adaptivenet.models.functional import functional

Params = dict[str, dict[str, jax.Array]]
Initializer = Callable[..., jax.Array]

_LAYER = re.compile(r"dense([1-9]\d*)")


def mlp(
    params: Params,
    inputs: jax.Array,
    *,
    key: jax.Array | None = None,
    dropout: Any = 0.0,
    dropout_after: Sequence[int] = (1,),
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
) -> jax.Array:
    """Applies a multilayer perceptron.

    Each layer but the last is followed by the activation, and the layers named in `dropout_after`
    then by inverted dropout (kept units are scaled by `1 / (1 - dropout)`).

    Args:
        params: `{"dense1": {"kernel": [inputs, outputs], "bias": [outputs]}, "dense2": ...}`.
            A layer may lack its bias.
        inputs: `[features]` or `[..., features]`, floating. Computation runs in the kernels' dtype.
        key: Random key of the dropout masks. Without a key nothing is dropped (inference).
        dropout: Probability of dropping a unit, in `[0, 1)`; may be traced, to follow a schedule.
        dropout_after: Layers, counted from 1, after which units are dropped.
        activation: Elementwise nonlinearity.

    Returns:
        `[..., outputs]` (logits), in the kernels' dtype.

    Raises:
        ValueError: If the parameters are not `dense1` ... `denseN`, the inputs do not fit the first
            kernel, or a rate or a layer is out of range.
        TypeError: If the inputs are not floating.

    References:
        Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
        JMLR 15 (2014).

    >>> import jax, jax.numpy as jnp
    >>> layer = {"kernel": jnp.array([[1.0, -1.0], [0.0, 2.0]]), "bias": jnp.zeros(2)}
    >>> mlp({"dense1": layer, "dense2": layer}, jnp.array([3.0, 1.0]))
    Array([ 3., -3.], dtype=float32)
    """
    names = _layer_names(params)
    _check_dropout(dropout, dropout_after, len(names))
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise TypeError(
            f"mlp() takes floating inputs, got {inputs.dtype}; scale them first, "
            "for example inputs.astype('float32') / 255"
        )
    features = params["dense1"]["kernel"].shape[0]
    if inputs.ndim == 0 or inputs.shape[-1] != features:
        raise ValueError(
            f"inputs of shape {inputs.shape} do not fit dense1/kernel, "
            f"which takes {features} features in the last dimension"
        )
    hidden = inputs
    for number, name in enumerate(names, start=1):
        kernel = params[name]["kernel"]
        hidden = hidden.astype(kernel.dtype) @ kernel
        if "bias" in params[name]:
            hidden = hidden + params[name]["bias"].astype(kernel.dtype)
        if number == len(names):
            break
        hidden = activation(hidden)
        if key is not None and number in dropout_after and _may_drop(dropout):
            keep = jax.random.bernoulli(jax.random.fold_in(key, number), 1 - dropout, hidden.shape)
            hidden = jnp.where(keep, hidden / (1 - dropout), jnp.zeros((), hidden.dtype))
    return hidden


class MLP(nnx.Module):
    """A multilayer perceptron as an NNX module with attributes `dense1` ... `denseN`.

    Calling it runs the pure function `mlp` on its parameters. Keras's defaults: Glorot uniform
    kernels, zero biases, ReLU.

    Args:
        sizes: Widths from input to output, for example `(784, 128, 64, 10)`.
        dropout: Probability of dropping a unit, in `[0, 1)`; acts only when a call gets a key.
        dropout_after: Layers, counted from 1, after which units are dropped.
        activation: Elementwise nonlinearity between layers.
        kernel_init: Initializer of the kernels.
        bias_init: Initializer of the biases.
        param_dtype: Dtype of the parameters, and of the computation.
        rngs: Source of the initial parameters.

    Raises:
        ValueError: If there are fewer than two sizes, a size is not a positive integer, or a rate
            or a layer is out of range.

    References:
        Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural
        networks", AISTATS 2010.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> model = MLP((784, 128, 64, 10), dropout=0.3, rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((2, 784))).shape
    (2, 10)
    >>> sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    109386
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        dropout: float = 0.0,
        dropout_after: Sequence[int] = (1,),
        activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
        kernel_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        sizes = tuple(sizes)
        if len(sizes) < 2:
            raise ValueError(f"sizes must name at least an input and an output, got {sizes}")
        if any(not isinstance(size, int) or size < 1 for size in sizes):
            raise ValueError(f"sizes must be positive integers, got {sizes}")
        _check_dropout(dropout, dropout_after, len(sizes) - 1)
        self.sizes = sizes
        self.dropout = float(dropout)
        self.dropout_after = tuple(dropout_after)
        self.activation = activation
        for number, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes), start=1):
            layer = nnx.Linear(
                fan_in,
                fan_out,
                kernel_init=kernel_init or jax.nn.initializers.glorot_uniform(),
                bias_init=bias_init or jax.nn.initializers.zeros,
                param_dtype=param_dtype,
                rngs=rngs,
            )
            setattr(self, f"dense{number}", layer)

    def __call__(self, inputs: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Maps `[..., features]` to `[..., outputs]`; drops units only when given a key."""
        return mlp(
            nnx.to_pure_dict(nnx.state(self, nnx.Param)),
            inputs,
            key=key,
            dropout=self.dropout,
            dropout_after=self.dropout_after,
            activation=self.activation,
        )


def mlp_init(key: jax.Array, sizes: Sequence[int], **options: Any) -> Params:
    """Draws the parameters of an `MLP` as a plain dict.

    Pure, so `jax.vmap(lambda key: mlp_init(key, sizes))(keys)` draws a population.

    Args:
        key: Random key, typed or raw.
        sizes: Widths from input to output.
        **options: `kernel_init`, `bias_init` and `param_dtype` of `MLP`.

    Returns:
        `{"dense1": {"kernel", "bias"}, ...}`, the same numbers as
        `MLP(sizes, rngs=nnx.Rngs(key))` holds.

    Raises:
        ValueError: As `MLP` does.

    >>> import jax
    >>> params = mlp_init(jax.random.key(0), (4, 3, 2))
    >>> params["dense2"]["kernel"].shape, params["dense2"]["bias"]
    ((3, 2), Array([0., 0.], dtype=float32))
    """
    return functional(MLP(sizes, rngs=nnx.Rngs(key), **options))[1]


def _layer_names(params: Params) -> list[str]:
    names = [f"dense{number}" for number in range(1, len(params) + 1)]
    if not names or set(params) != set(names):
        strangers = sorted(name for name in params if not _LAYER.fullmatch(name))
        detail = f"; not understood: {', '.join(strangers)}" if strangers else ""
        raise ValueError(
            f"mlp() takes parameters named dense1 to denseN, got {sorted(params)}{detail}"
        )
    return names


def _known(rate: Any) -> bool:
    return not isinstance(rate, jax.core.Tracer)


def _may_drop(rate: Any) -> bool:
    return not _known(rate) or rate > 0


def _check_dropout(dropout: Any, dropout_after: Sequence[int], layers: int) -> None:
    if _known(dropout) and not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    if _may_drop(dropout) and any(not 1 <= number < layers for number in dropout_after):
        raise ValueError(
            f"dropout_after must name hidden layers from 1 to {layers - 1}, "
            f"got {tuple(dropout_after)}"
        )
