"""A small residual network for images: a pure function on parameters and running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]


def resnet(
    params: Params, stats: Params, inputs: jax.Array, *, train: bool = False, decay: float = 0.9
) -> Any:
    """Applies a residual network of basic blocks with batch norm.

    A stem of 3x3, then blocks of two 3x3 convolutions whose result is added to the stream; where a
    block widens the stream it halves the image, and the stream goes through a 1x1 convolution. The
    mean over the image is read out.

    Args:
        params: `{"stem": {"kernel": [3, 3, channels, width]}, "norm": {"scale", "bias"}, "block1":
            {"conv1": {"kernel"}, "norm1", "conv2", "norm2", "shortcut": {"kernel"}}, ...,
            "readout": {"kernel": [width, outputs], "bias"}}`; a block without "shortcut" keeps the
            stream's width.
        stats: `{"norm": {"mean", "var"}, "block1": {"norm1": ..., "norm2": ...}, ...}`.
        inputs: `[batch, height, width, channels]`, floating.
        train: Whether to normalise by the batch, and to return new statistics.
        decay: Share of the running statistics that stays.

    Returns:
        `[batch, outputs]` (logits); with `train`, a pair of these and the new statistics.

    Raises:
        ValueError: If the inputs are no batch of images with the stem's channels.

    References:
        He et al., "Deep residual learning for image recognition", CVPR 2016, section 4.2; Ioffe and
        Szegedy, "Batch normalization", ICML 2015.

    >>> import jax, jax.numpy as jnp
    >>> params, stats = resnet_init(jax.random.key(0), 3, (4, 8), 10)
    >>> resnet(params, stats, jnp.ones((2, 8, 8, 3))).shape
    (2, 10)
    """
    channels = params["stem"]["kernel"].shape[2]
    if inputs.ndim != 4 or inputs.shape[-1] != channels:
        raise ValueError(f"resnet() takes [batch, height, width, {channels}], not {inputs.shape}")
    found: Params = {}

    def norm(weights: Params, known: Params, x: jax.Array) -> tuple[jax.Array, Params]:
        mean, var = known["mean"], known["var"]
        if train:
            mean = jnp.mean(x, (0, 1, 2))
            var = jnp.mean(jnp.square(x - mean), (0, 1, 2))
            known = {
                "mean": decay * known["mean"] + (1 - decay) * mean,
                "var": decay * known["var"] + (1 - decay) * var,
            }
        scale = weights["scale"] * jax.lax.rsqrt(var + 1e-5)
        return x * scale + (weights["bias"] - mean * scale), known

    x = _convolved(inputs, params["stem"]["kernel"])
    x, found["norm"] = norm(params["norm"], stats["norm"], x)
    x = jax.nn.relu(x)
    for number in range(1, 1 + sum(name.startswith("block") for name in params)):
        name = f"block{number}"
        block, known, new = params[name], stats[name], {}
        stride = 2 if "shortcut" in block else 1
        y = _convolved(x, block["conv1"]["kernel"], stride)
        y, new["norm1"] = norm(block["norm1"], known["norm1"], y)
        y = _convolved(jax.nn.relu(y), block["conv2"]["kernel"])
        y, new["norm2"] = norm(block["norm2"], known["norm2"], y)
        if "shortcut" in block:
            x = _convolved(x, block["shortcut"]["kernel"], stride)
        x, found[name] = jax.nn.relu(x + y), new
    logits = jnp.mean(x, (1, 2)) @ params["readout"]["kernel"] + params["readout"]["bias"]
    return (logits, found) if train else logits


def resnet_init(
    key: jax.Array, channels: int, widths: Sequence[int], outputs: int, *, depth: int = 1
) -> tuple[Params, Params]:
    """Draws the parameters of `resnet`, and fresh statistics.

    Args:
        key: Random key.
        channels: Of the images.
        widths: Of the stream, stage by stage; each stage but the first halves the image.
        outputs: Number of classes.
        depth: Blocks a stage.

    Returns:
        Parameters and statistics, float32; He normal kernels.

    References:
        He et al., "Delving deep into rectifiers", ICCV 2015.

    >>> import jax
    >>> params, stats = resnet_init(jax.random.key(0), 3, (4, 8), 10, depth=2)
    >>> [name for name in params if "shortcut" in params[name]]
    ['block3']
    """
    draws = iter(jax.random.split(key, 2 + 3 * depth * len(widths)))
    normal = jax.nn.initializers.he_normal()

    def norm(width: int) -> Params:
        return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

    def fresh(width: int) -> Params:
        return {"mean": jnp.zeros(width), "var": jnp.ones(width)}

    params: Params = {"stem": {"kernel": normal(next(draws), (3, 3, channels, widths[0]))}}
    params["norm"], stats = norm(widths[0]), {"norm": fresh(widths[0])}
    before, number = widths[0], 0
    for width in widths:
        for _ in range(depth):
            number += 1
            block: Params = {
                "conv1": {"kernel": normal(next(draws), (3, 3, before, width))},
                "norm1": norm(width),
                "conv2": {"kernel": normal(next(draws), (3, 3, width, width))},
                "norm2": norm(width),
            }
            if before != width:
                block["shortcut"] = {"kernel": normal(next(draws), (1, 1, before, width))}
            params[f"block{number}"] = block
            stats[f"block{number}"] = {"norm1": fresh(width), "norm2": fresh(width)}
            before = width
    readout = jax.nn.initializers.glorot_uniform()(next(draws), (widths[-1], outputs))
    params["readout"] = {"kernel": readout, "bias": jnp.zeros(outputs)}
    return params, stats


def _convolved(inputs: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        inputs, kernel, (stride, stride), "SAME", dimension_numbers=numbers
    )
