"""The two LeNets that the literature of compression is measured on.

`LENET_300_100` is the widths of an `MLP`: 266,200 weights. `LeNet5` is the variant that Caffe
ships, with 430,500 weights, which differs from LeCun's LeNet-5 of 1998 (60,000).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from adaptivenet.models.functional import functional

Params = dict[str, dict[str, jax.Array]]

LENET_300_100 = (784, 300, 100, 10)


def lenet5(
    params: Params,
    inputs: jax.Array,
    *,
    key: jax.Array | None = None,
    dropout: Any = 0.0,
    activation: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Applies LeNet-5-Caffe: two convolutions with max-pooling, a hidden layer, a readout.

    The convolutions (5x5, no padding) are matrix products of patches: XLA's own convolution is slow
    inside a scan on a CPU, and a vmap over parameters stays one batched product.

    Args:
        params: `{"conv1": {"kernel": [5, 5, 1, c1], "bias": [c1]}, "conv2": {"kernel":
            [5, 5, c1, c2], "bias": [c2]}, "dense1": {"kernel": [16 * c2, hidden], "bias"},
            "dense2": {"kernel": [hidden, outputs], "bias"}}`.
        inputs: `[..., 784]` pixels row by row, or `[..., 28, 28, 1]`, floating.
        key: Random key of the hidden layer's dropout mask; without one nothing is dropped.
        dropout: Probability of dropping a hidden unit, in `[0, 1)`; may be traced.
        activation: Monotone, after each convolution's pooling; none, as in Caffe, or `jax.nn.relu`,
            as in the experiments of Sparse VD and of L0 gates.

    Returns:
        `[..., outputs]` (logits), in the kernels' dtype.

    Raises:
        ValueError: If the inputs are not images of 28 x 28.
        TypeError: If the inputs are not floating.

    References:
        LeCun et al., "Gradient-based learning applied to document recognition", Proc. IEEE 86
        (1998); Jia et al., "Caffe: convolutional architecture for fast feature embedding", 2014.
        Molchanov et al., "Variational dropout sparsifies deep neural networks", arXiv:1701.05369.

    >>> import jax, jax.numpy as jnp
    >>> lenet5(lenet5_init(jax.random.key(0)), jnp.zeros((3, 784))).shape
    (3, 10)
    """
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise TypeError(
            f"lenet5() takes floating inputs, got {inputs.dtype}; scale them first, "
            "for example inputs.astype('float32') / 255"
        )
    if inputs.shape[-1:] == (784,):
        inputs = inputs.reshape(*inputs.shape[:-1], 28, 28, 1)
    if inputs.shape[-3:] != (28, 28, 1):
        raise ValueError(
            f"lenet5() takes images [..., 784] or [..., 28, 28, 1], not {inputs.shape}"
        )
    hidden = inputs.astype(params["conv1"]["kernel"].dtype)
    for name in ("conv1", "conv2"):
        hidden = _halved(_convolved(hidden, **params[name]))
        hidden = hidden if activation is None else activation(hidden)
    hidden = hidden.reshape(*hidden.shape[:-3], -1)
    hidden = jax.nn.relu(hidden @ params["dense1"]["kernel"] + params["dense1"]["bias"])
    if key is not None:
        keep = jax.random.bernoulli(key, 1 - dropout, hidden.shape)
        hidden = jnp.where(keep, hidden / (1 - dropout), jnp.zeros((), hidden.dtype))
    return hidden @ params["dense2"]["kernel"] + params["dense2"]["bias"]


class LeNet5(nnx.Module):
    """LeNet-5-Caffe as an NNX module with attributes `conv1`, `conv2`, `dense1`, `dense2`.

    Calling it runs the pure function `lenet5` on its parameters. Glorot uniform kernels, zero
    biases.

    Args:
        channels: Of the two convolutions.
        hidden: Width of the hidden layer.
        outputs: Number of classes.
        param_dtype: Dtype of the parameters, and of the computation.
        rngs: Source of the initial parameters.

    >>> from flax import nnx
    >>> model = LeNet5(rngs=nnx.Rngs(0))
    >>> sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)) if leaf.ndim > 1)
    430500
    """

    def __init__(
        self,
        channels: tuple[int, int] = (20, 50),
        hidden: int = 500,
        outputs: int = 10,
        *,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {
            "kernel_init": jax.nn.initializers.glorot_uniform(),
            "bias_init": jax.nn.initializers.zeros,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        first, second = channels
        self.conv1 = nnx.Conv(1, first, (5, 5), padding="VALID", **options)
        self.conv2 = nnx.Conv(first, second, (5, 5), padding="VALID", **options)
        self.dense1 = nnx.Linear(16 * second, hidden, **options)
        self.dense2 = nnx.Linear(hidden, outputs, **options)

    def __call__(self, inputs: jax.Array, **options: Any) -> jax.Array:
        """Maps `[..., 784]` or `[..., 28, 28, 1]` to `[..., outputs]`; options of `lenet5`."""
        return lenet5(nnx.to_pure_dict(nnx.state(self, nnx.Param)), inputs, **options)


def lenet5_init(key: jax.Array, **options: Any) -> Params:
    """Draws the parameters of a `LeNet5` as a plain dict.

    Args:
        key: Random key, typed or raw.
        **options: `channels`, `hidden`, `outputs` and `param_dtype` of `LeNet5`.

    Returns:
        The same numbers as `LeNet5(rngs=nnx.Rngs(key))` holds.

    >>> import jax
    >>> lenet5_init(jax.random.key(0), channels=(2, 3))["conv2"]["kernel"].shape
    (5, 5, 2, 3)
    """
    return functional(LeNet5(rngs=nnx.Rngs(key), **options))[1]


def _convolved(inputs: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Convolution without padding, `[..., h, w, c]`, as a product of patches and kernel."""
    high, wide, taken, given = kernel.shape
    rows, columns = inputs.shape[-3] - high + 1, inputs.shape[-2] - wide + 1
    shifts = [
        inputs[..., i : i + rows, j : j + columns, :] for i in range(high) for j in range(wide)
    ]
    patches = jnp.concatenate(shifts, axis=-1)
    return patches @ kernel.reshape(high * wide * taken, given) + bias


def _halved(inputs: jax.Array) -> jax.Array:
    """The largest of each 2 x 2 pixels, `[..., h, w, c]` with even h and w."""
    *leading, rows, columns, channels = inputs.shape
    pairs = inputs.reshape(*leading, rows // 2, 2, columns // 2, 2, channels)
    return jnp.max(pairs, axis=(-4, -2))
