"""Degree-preserving rewiring: the null model of every claim about the wiring of a mask."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adaptivenet.pruning.schedules import known

PyTree = Any

__all__ = ["Rewired", "rewire"]


class Rewired(NamedTuple):
    """What :func:`rewire` returns.

    Attributes:
      mask: the rewired mask.
      accepted: float32 ``[leaves]``, of the synapses in dispute (at columns that only one row of a
        pair has) the share that changed rows, on average over the trades; 0 where the degrees fix
        the leaf.
      moved: float32 ``[leaves]``, the share of synapses that are where there was none before.
    """

    mask: PyTree
    accepted: jax.Array
    moved: jax.Array


def rewire(mask: PyTree, key: jax.Array, *, trades: Any = 20) -> Rewired:
    """Rewires each leaf at random and keeps the degree of every unit on both sides exactly.

    A leaf is a bipartite graph between the rows and columns of ``[fan_in, fan_out]`` (kernels of
    more dimensions are reshaped to their last one; a vector is one row, which its degrees fix). A
    trade pairs all rows at random, and each pair deals the columns that only one of them has out
    anew: uniformly, so many to each as it had. One trade is many double-edge swaps at once, in a
    few array operations whatever the number of synapses, so it runs under jit and vmap where
    swaps one by one would take a loop as long as the list of edges.

    Trades are symmetric, every double-edge swap is a trade, and a trade that deals the same hands
    again stays where it is (the self-loop that a chain of swaps must count as a step, and may not
    draw again): the chain therefore tends to the uniform distribution over all masks with these
    degrees. Partners are drawn from all rows, so a few trades mix; the default is generous.

    Args:
      mask: pytree of bool; masked nodes for leaves that are not synapses.
      key: random key.
      trades: global trades, >= 1, possibly traced.

    Returns:
      The mask and how much it changed.

    Raises:
      ValueError: ``trades`` is below 1.

    References:
      Strona et al., "A fast and unbiased procedure to randomize ecological binary matrices with
      fixed row and column totals", Nature Communications 5 (2014), the pairwise trade (Curveball);
      Carstens, "Proof of uniform sampling of binary matrices with fixed row sums and column sums
      for the fast Curveball algorithm", Physical Review E 91 (2015); Carstens et al., "Parallel and
      I/O-efficient randomisation of massive networks using global Curveball trades", ESA 2018.

    >>> mask = {"kernel": jnp.array([[True, True, False], [False, False, True]])}
    >>> new = rewire(mask, jax.random.key(1)).mask["kernel"]
    >>> new.sum(axis=0).tolist(), new.sum(axis=1).tolist()
    ([1, 1, 1], [2, 1])
    """
    if known(trades) and not (jnp.ndim(trades) == 0 and int(trades) == trades and trades >= 1):
        raise ValueError(f"trades must be an integer >= 1, not {trades}.")
    leaves, treedef = jax.tree.flatten(mask)
    rewired, accepted, moved = [], [], []
    for place, leaf in enumerate(leaves):
        edges = leaf.reshape((-1, leaf.shape[-1]) if leaf.ndim else (1, 1))
        new, share = _rewire(edges, jax.random.fold_in(key, place), trades)
        rewired.append(new.reshape(leaf.shape))
        accepted.append(share)
        moved.append(_share(new & ~edges, edges))
    return Rewired(jax.tree.unflatten(treedef, rewired), jnp.stack(accepted), jnp.stack(moved))


def _rewire(edges: jax.Array, key: jax.Array, trades: Any) -> tuple[jax.Array, jax.Array]:
    pairs = edges.shape[0] // 2
    if not pairs:
        return edges, jnp.zeros((), jnp.float32)

    def trade(number: jax.Array, carry: Any) -> Any:
        edges, accepted = carry
        matching, dealing = jax.random.split(jax.random.fold_in(key, number))
        order = jax.random.permutation(matching, edges.shape[0])[: 2 * pairs]
        first, second = edges[order[:pairs]], edges[order[pairs:]]
        new = _deal(first, second, dealing)
        both = first & second
        other = both | (~new & (first ^ second))
        accepted = accepted + _share(new & ~first, first & ~second, second & ~first)
        edges = edges.at[order].set(jnp.concatenate([new, other]), unique_indices=True)
        return edges, accepted

    start = (edges, jnp.zeros((), jnp.float32))
    edges, accepted = jax.lax.fori_loop(0, jnp.asarray(trades, jnp.int32), trade, start)
    return edges, accepted / jnp.asarray(trades).astype(jnp.float32)


def _deal(first: jax.Array, second: jax.Array, key: jax.Array) -> jax.Array:
    """The first row of each pair after a trade; the second gets the rest."""
    open_ = first ^ second
    bits = jax.random.bits(key, first.shape, jnp.uint32) >> 1
    # Columns that are not open rank behind all that are.
    bits = jnp.where(open_, bits, jnp.uint32(2**32 - 1))
    rank = jnp.argsort(jnp.argsort(bits, axis=1), axis=1)
    hand = jnp.sum(first & ~second, axis=1, keepdims=True, dtype=rank.dtype)
    return (first & second) | (open_ & (rank < hand))


def _share(part: jax.Array, *whole: jax.Array) -> jax.Array:
    """Synapses of the part over half of what the wholes hold together (all of it, if one)."""
    number = sum(jnp.sum(x, dtype=jnp.float32) for x in whole)
    return len(whole) * jnp.sum(part, dtype=jnp.float32) / jnp.maximum(number, 1.0)
