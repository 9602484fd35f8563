"""Effective density: synapses that lie on a live path from input to output."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

__all__ = ["effective_masks"]


def effective_masks(masks: Sequence[jax.Array]) -> list[jax.Array]:
    """Keeps only the synapses of a layered network on a path from an input to an output.

    A synapse whose unit has no living input, or no living output, carries nothing from the data to
    the answer, and counts as pruned in effective sparsity.

    Args:
      masks: bool ``[inputs, outputs]`` of each layer, from the input to the output.

    Returns:
      Bool masks of the same shapes.

    Raises:
      ValueError: consecutive layers do not fit.

    References:
      Vysogorets and Kempe, "Connectivity matters: neural network pruning through the lens of
      effective sparsity", arXiv:2107.02306.

    >>> first = jnp.array([[True, False], [False, False]])
    >>> second = jnp.array([[True], [True]])
    >>> [m.tolist() for m in effective_masks([first, second])]
    [[[True, False], [False, False]], [[True], [False]]]
    """
    for place, (before, after) in enumerate(itertools.pairwise(masks)):
        if before.ndim != 2 or after.ndim != 2 or before.shape[1] != after.shape[0]:
            raise ValueError(
                f"layer {place + 1} of shape {before.shape} does not feed layer {place + 2} of "
                f"shape {after.shape}; give [inputs, outputs] masks in order."
            )
    reached = jnp.ones(masks[0].shape[0], bool)
    fed = []
    for mask in masks:
        fed.append(mask & reached[:, None])
        reached = jnp.any(fed[-1], axis=0)
    useful = jnp.ones(masks[-1].shape[1], bool)
    live = []
    for mask in reversed(fed):
        live.append(mask & useful[None, :])
        useful = jnp.any(live[-1], axis=1)
    return live[::-1]
