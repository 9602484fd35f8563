"""A small decoder-only transformer: a pure function on a dict of parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]


def transformer(params: Params, tokens: jax.Array) -> jax.Array:
    """Predicts the next token at every position of a sequence.

    Blocks of causal attention and of a two-layer perceptron, each behind a layer norm and added to
    the stream; the readout is the embedding, transposed.

    Args:
        params: `{"embedding": [tokens, width], "position": [longest, width], "block1":
            {"attention": {"query", "key", "value": [width, heads, size], "out":
            [heads, size, width]}, "norm1", "norm2": {"scale", "bias": [width]}, "hidden":
            {"kernel": [width, wide], "bias"}, "back": {"kernel": [wide, width], "bias"}}, ...,
            "norm": {"scale", "bias"}}`.
        tokens: Whole numbers `[..., time]`, time no longer than the positions.

    Returns:
        `[..., time, tokens]` (logits).

    Raises:
        TypeError: If the tokens are not whole numbers.
        ValueError: If the sequence is longer than the positions.

    References:
        Vaswani et al., "Attention is all you need", NeurIPS 2017; Radford et al., "Language models
        are unsupervised multitask learners", 2019, for norms before the blocks; Press and Wolf,
        "Using the output embedding to improve language models", EACL 2017, for the tied readout.

    >>> import jax, jax.numpy as jnp
    >>> params = transformer_init(jax.random.key(0), 11, 7, width=8, heads=2, blocks=1)
    >>> transformer(params, jnp.zeros((3, 5), int)).shape
    (3, 5, 11)
    """
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"transformer() takes whole numbers, got {tokens.dtype}")
    time, longest = tokens.shape[-1], params["position"].shape[0]
    if time > longest:
        raise ValueError(f"{time} tokens are more than the {longest} positions that were learned")
    stream = params["embedding"][tokens] + params["position"][:time]
    for number in range(1, 1 + sum(name.startswith("block") for name in params)):
        block = params[f"block{number}"]
        stream = stream + _attended(block["attention"], _normed(block["norm1"], stream))
        hidden = _normed(block["norm2"], stream) @ block["hidden"]["kernel"]
        hidden = jax.nn.gelu(hidden + block["hidden"]["bias"])
        stream = stream + hidden @ block["back"]["kernel"] + block["back"]["bias"]
    return _normed(params["norm"], stream) @ params["embedding"].T


def transformer_init(
    key: jax.Array,
    tokens: int,
    longest: int,
    *,
    width: int = 64,
    heads: int = 4,
    blocks: int = 2,
    wide: int | None = None,
) -> Params:
    """Draws the parameters of `transformer`.

    Normal of standard deviation 0.02, and less by the root of the number of sums for what is added
    to the stream.

    Args:
        key: Random key.
        tokens: Size of the vocabulary.
        longest: Positions.
        width: Of the stream.
        heads: Of attention; they divide the width.
        blocks: How many.
        wide: Hidden units of each perceptron; 4 times the width by default.

    Returns:
        The parameters, float32.

    Raises:
        ValueError: If the heads do not divide the width.

    >>> import jax
    >>> sorted(transformer_init(jax.random.key(0), 11, 7, width=8, heads=2))
    ['block1', 'block2', 'embedding', 'norm', 'position']
    """
    if width % heads:
        raise ValueError(f"{heads} heads do not divide a width of {width}")
    wide = 4 * width if wide is None else wide
    draws = iter(jax.random.split(key, 2 + 6 * blocks))

    def normal(*shape: int, scale: float = 0.02) -> jax.Array:
        return scale * jax.random.normal(next(draws), shape)

    def norm() -> dict[str, jax.Array]:
        return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

    added, size = 0.02 / (2 * blocks) ** 0.5, width // heads
    params: Params = {"embedding": normal(tokens, width), "position": normal(longest, width)}
    for number in range(1, blocks + 1):
        params[f"block{number}"] = {
            "attention": {
                "query": normal(width, heads, size),
                "key": normal(width, heads, size),
                "value": normal(width, heads, size),
                "out": normal(heads, size, width, scale=added),
            },
            "norm1": norm(),
            "norm2": norm(),
            "hidden": {"kernel": normal(width, wide), "bias": jnp.zeros(wide)},
            "back": {"kernel": normal(wide, width, scale=added), "bias": jnp.zeros(width)},
        }
    params["norm"] = norm()
    return params


def _normed(norm: dict[str, jax.Array], stream: jax.Array) -> jax.Array:
    centred = stream - jnp.mean(stream, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-5) * norm["scale"] + norm["bias"]


def _attended(weights: dict[str, jax.Array], stream: jax.Array) -> jax.Array:
    """Causal attention of several heads."""
    query, key, value = (
        jnp.einsum("...td,dhe->...hte", stream, weights[name]) for name in ("query", "key", "value")
    )
    scores = jnp.einsum("...hte,...hse->...hts", query, key) / jnp.sqrt(
        jnp.asarray(query.shape[-1], query.dtype)
    )
    time = stream.shape[-2]
    past = jnp.tril(jnp.ones((time, time), bool))
    shares = jax.nn.softmax(jnp.where(past, scores, -jnp.inf), axis=-1)
    mixed = jnp.einsum("...hts,...hse->...hte", shares, value)
    return jnp.einsum("...hte,hed->...td", mixed, weights["out"])
