"""What S3 measures: barriers between two networks, and how far two masks overlap."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet import models
from adaptivenet.pruning import lottery
from research import rounds
from research.lottery_arms import MEMBERS, PAIRS, stack

if TYPE_CHECKING:
    from research.lottery import Config


@partial(jax.jit, static_argnums=0)
def barriers(points: int, a: Any, b: Any, task: rounds.Task) -> tuple[jax.Array, ...]:
    """Barriers on the line between two networks.

    Args:
      points: positions on the line, ends included.
      a: a list of parameters at one end, each with a leading axis of seeds.
      b: those at the other.
      task: errors are those of the check data, losses those of the training data.

    Returns:
      Height in errors, height in losses ``[seeds, pairs]``, and the losses ``[seeds, pairs,
      points]``. Heights are above the straight line between the ends, since two ends that differ
      are no barrier.
    """

    def error(params: Any) -> jax.Array:
        return 1 - rounds.accuracy(params, task)

    def loss(params: Any) -> jax.Array:
        logits = models.mlp(params, task.inputs)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, task.targets))

    def pair(a: Any, b: Any) -> tuple[jax.Array, ...]:
        errors = lottery.barrier(error, a, b, points, batch_size=1)
        losses = lottery.barrier(loss, a, b, points, batch_size=1)
        return errors.height, losses.height, losses.losses

    return jax.vmap(jax.vmap(pair), out_axes=1)(stack(a), stack(b))


@jax.jit
def accuracies(params: Any, task: rounds.Task) -> jax.Array:
    """Accuracies ``[seeds, members]`` of a list of members."""
    each = jax.vmap(jax.vmap(rounds.accuracy, (0, None)), (0, None), out_axes=1)
    return each(stack(params), task)


def density(mask: Any) -> float:
    """Kept, as a share of all synapses (the same for every seed)."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(mask)]
    return sum(int(leaf.sum()) for leaf in leaves) / sum(leaf.size for leaf in leaves)


def overlap(a: Any, b: Any) -> np.ndarray:
    """How far two masks agree, by Jaccard's index, and what chance would give.

    Args:
      a: masks, with a leading axis of seeds.
      b: masks.

    Returns:
      ``[seeds, 2]``: common synapses as a share of those of either, and the same if each layer's
      were drawn at random (at the expected number in common).
    """
    common, chance, both = 0.0, 0.0, 0.0
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = (np.asarray(leaf).reshape(len(leaf), -1) for leaf in (x, y))
        common += (x & y).sum(1)
        chance += x.sum(1) * y.sum(1) / x.shape[1]
        both += x.sum(1) + y.sum(1)
    return np.stack([common / (both - common), chance / (both - chance)], -1)


def metrics(config: Config, curves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The numbers of each seed, from what was measured in each round.

    Args:
      config: the study's config.
      curves: name to ``[seeds, rounds, ...]``.

    Returns:
      Name to ``[seeds]``: accuracies at the last density and how far `rewound` is ahead
      (``beyond_...``), but at the density that may win for ``beyond_dense``; barriers as the mean
      of all rounds with a cut, without one (``..._dense``) and at the last density (``..._last``).
    """
    m = {}
    final = dict(zip(MEMBERS, curves["accuracy"][:, -1].T.astype(np.float64), strict=True))
    for arm in ("rewound", "original", "reinit", "random", "oneshot", "matched", "long", "kept"):
        m[f"{arm}_accuracy"] = final[f"{arm} a"]
    for arm in ("original", "reinit", "random", "oneshot", "matched", "long", "kept"):
        m[f"beyond_{arm}"] = m["rewound_accuracy"] - m[f"{arm}_accuracy"]
    ticket = curves["accuracy"][:, :, MEMBERS.index("rewound a")].astype(np.float64)
    m["dense_accuracy"], m["winning_accuracy"] = ticket[:, 0], ticket[:, config.winning_round]
    m["beyond_dense"] = m["winning_accuracy"] - m["dense_accuracy"]
    for what in ("error", "loss"):
        for place, arm in enumerate(PAIRS):
            values = curves[f"barrier_{what}"][:, :, place].astype(np.float64)
            m[f"{arm}_{what}_barrier"] = values[:, 1:].mean(1)
            m[f"{arm}_{what}_barrier_dense"] = values[:, 0]
            m[f"{arm}_{what}_barrier_last"] = values[:, -1]
        for arm in ("original", "random"):
            difference = m[f"rewound_{what}_barrier"] - m[f"{arm}_{what}_barrier"]
            m[f"{what}_barrier_beside_{arm}"] = difference
    for place, arm in enumerate(PAIRS[:2]):
        m[f"{arm}_overlap"], m[f"{arm}_chance"] = curves["overlap"][:, -1, place].T
    m["overlap_gain"] = m["rewound_overlap"] - m["original_overlap"]
    m["density"] = curves["density"][:, -1]
    m["winning_density"] = curves["density"][:, config.winning_round]
    return m
