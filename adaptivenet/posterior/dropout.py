"""MC-dropout: the spread of predictions over random dropout masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from adaptivenet.posterior._arrays import wide_dtype

PyTree = Any
Number = Any  # a Python number, or a traced scalar

__all__ = ["Prediction", "mc_dropout"]


class Prediction(NamedTuple):
    """Moments of what a network says.

    Attributes:
      mean: pytree like its output, in float32 (float64 for a float64 output).
      variance: pytree likewise, of the draws about their mean (divided by ``samples - 1``): what
        the mask alone changes, without the noise of the observations.
    """

    mean: PyTree
    variance: PyTree


def mc_dropout(
    apply: Callable[..., PyTree],
    params: PyTree,
    inputs: Any,
    key: jax.Array,
    *,
    dropout: Number,
    samples: int = 30,
) -> Prediction:
    """Predicts with dropout left on, and averages over masks.

    Args:
      apply: ``apply(params, inputs, key=key, dropout=rate)``, such as
        :func:`adaptivenet.models.mlp.mlp`. To average probabilities rather than logits, let it
        return them.
      params: its parameters.
      inputs: its inputs.
      key: random key; it is split into one for each draw.
      dropout: rate, that of training.
      samples: number of draws, one after the other, at least 2.

    Returns:
      Mean and variance over the draws.

    Raises:
      ValueError: fewer than two samples, or a rate outside [0, 1).

    References:
      Gal and Ghahramani, "Dropout as a Bayesian approximation", ICML 2016, equations 6 and 9.

    >>> def apply(params, inputs, *, key, dropout):
    ...     kept = jax.random.bernoulli(key, 1 - dropout, inputs.shape)
    ...     return params * jnp.where(kept, inputs / (1 - dropout), 0.0)
    >>> args = (jnp.float32(2.0), jnp.ones(3), jax.random.key(0))
    >>> mc_dropout(apply, *args, dropout=0.0)
    Prediction(mean=Array([2., 2., 2.], dtype=float32), variance=Array([0., 0., 0.], dtype=float32))
    """
    if samples < 2:
        raise ValueError(f"samples must be at least 2 to have a variance, not {samples}.")
    if not isinstance(dropout, jax.core.Tracer) and not np.all(
        (np.asarray(dropout) >= 0) & (np.asarray(dropout) < 1)
    ):
        raise ValueError(f"dropout must be a rate in [0, 1), not {dropout}.")

    def one(now: jax.Array) -> PyTree:
        outputs = apply(params, inputs, key=now, dropout=dropout)
        return jax.tree.map(lambda x: x.astype(wide_dtype(x.dtype)), outputs)

    def add(moments: Any, turn: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        number, now = turn
        mean, spread = moments
        gaps = jax.tree.map(jnp.subtract, one(now), mean)
        mean = jax.tree.map(lambda m, g: m + g / number.astype(m.dtype), mean, gaps)
        spread = jax.tree.map(
            lambda s, g: s + jnp.square(g) * (1.0 - 1.0 / number.astype(s.dtype)), spread, gaps
        )
        return (mean, spread), None

    keys = jax.random.split(key, samples)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, keys[0]))
    turns = (jnp.arange(1, samples + 1), keys)
    mean, spread = jax.lax.scan(add, (zeros, zeros), turns)[0]
    return Prediction(mean, jax.tree.map(lambda s: s / (samples - 1), spread))
