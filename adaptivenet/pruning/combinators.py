"""Scores made of scores: normalise, mix, multiply, and the layer-adaptive LAMP.

A combined score asks for the signals that its members ask for. Statistics are taken over the
synapses that are alive: `prune` itself supplies the signal ``mask``; without it, all are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet.pruning.saliency import aligned, wide
from adaptivenet.pruning.schedules import Number, known
from adaptivenet.pruning.scores import Score, magnitude, required_signals, supply

PyTree = Any
By = Literal["mean", "max", "l2", "rank"]
Across = Literal["leaf", "tree"]

__all__ = ["lamp", "mix", "normalise", "product"]


def normalise(score: Score = magnitude, by: By = "mean", across: Across = "leaf") -> Score:
    """Divides a score by its size, so that leaves or different scores can be compared.

    Args:
      score: any score.
      by: "mean", "max" or "l2" (the root of the sum of squares) of the living synapses' scores; or
        "rank", the share of living synapses whose score is not larger, in (0, 1] (equal scores get
        equal ranks; it sorts, and counts exactly up to 2^24 synapses).
      across: "leaf" for each leaf by itself, "tree" for all together (which, but for "rank",
        changes no order within this score).

    Returns:
      A score, float32. Where all scores are zero they stay so; nan and infinite scores stay, and
      are left out of the statistics.

    Raises:
      ValueError: an unknown choice.

    >>> normalise(by="max")({"a": jnp.array([1.0, -4.0]), "b": jnp.array([3.0])})["a"].tolist()
    [0.25, 1.0]
    """
    _check_choice("by", by, ("mean", "max", "l2", "rank"))
    _check_choice("across", across, ("leaf", "tree"))

    def combine(params: PyTree, mask: PyTree | None, values: list[PyTree]) -> PyTree:
        return _normalised(params, mask, values[0], by, across)

    return _combined(f"normalise({_name(score)})", [score], combine)


def mix(
    scores: Mapping[Score, Number] | Sequence[tuple[Score, Number]],
    *,
    by: By | None = "mean",
    across: Across = "tree",
) -> Score:
    """The weighted sum of scores, each normalised first.

    Args:
      scores: weights by score, or pairs of score and weight; weights are >= 0, possibly traced.
      by: as for :func:`normalise`; None adds the scores as they are.
      across: as for :func:`normalise`.

    Returns:
      A score, float32. Members that draw at random get keys of their own.

    Raises:
      ValueError: no scores, a negative weight, only zero weights, or an unknown choice.

    >>> half = mix([(magnitude, 1.0), (lambda p, **signals: jax.tree.map(jnp.ones_like, p), 0.5)])
    >>> half({"w": jnp.array([1.0, -3.0])})["w"].tolist()
    [1.0, 2.0]
    """
    pairs = list(scores.items()) if isinstance(scores, Mapping) else list(scores)
    if not pairs:
        raise ValueError("mix() needs at least one score: give {score: weight} or pairs.")
    members, weights = zip(*pairs, strict=True)
    for member, weight in pairs:
        if known(weight) and not np.all(np.asarray(weight) >= 0):
            raise ValueError(f"the weight of {_name(member)} must be >= 0, not {weight}.")
    if all(known(weight) and not np.any(np.asarray(weight)) for weight in weights):
        raise ValueError("every weight of mix() is zero; give one that is not.")
    _check_normalisation(by, across)

    def combine(params: PyTree, mask: PyTree | None, values: list[PyTree]) -> PyTree:
        parts = [_normalised(params, mask, value, by, across) for value in values]

        def add(*leaves: jax.Array) -> jax.Array:
            terms = [
                jnp.asarray(weight).astype(leaf.dtype) * leaf
                for weight, leaf in zip(weights, leaves, strict=True)
            ]
            return sum(terms[1:], start=terms[0])

        return jax.tree.map(add, *parts)

    return _combined(f"mix({', '.join(map(_name, members))})", list(members), combine)


def product(
    *scores: Score,
    powers: Sequence[Number] | None = None,
    by: By | None = "mean",
    across: Across = "tree",
) -> Score:
    """The product of scores, each normalised first and raised to a power.

    Args:
      *scores: any scores.
      powers: one exponent a score, possibly traced; 1 by default.
      by: as for :func:`normalise`; across the tree it changes no order but keeps the product away
        from overflow. None multiplies the scores as they are.
      across: as for :func:`normalise`.

    Returns:
      A score, float32. Members that draw at random get keys of their own.

    Raises:
      ValueError: no scores, another number of powers, or an unknown choice.

    >>> product(magnitude, magnitude, powers=[1, 2], by=None)({"w": jnp.array([-2.0])})["w"].item()
    8.0
    """
    if not scores:
        raise ValueError("product() needs at least one score.")
    exponents = [1.0] * len(scores) if powers is None else list(powers)
    if len(exponents) != len(scores):
        raise ValueError(f"product() has {len(scores)} scores but {len(exponents)} powers.")
    _check_normalisation(by, across)

    def combine(params: PyTree, mask: PyTree | None, values: list[PyTree]) -> PyTree:
        parts = [_normalised(params, mask, value, by, across) for value in values]

        def multiply(*leaves: jax.Array) -> jax.Array:
            result = jnp.ones_like(leaves[0])
            for leaf, power in zip(leaves, exponents, strict=True):
                result = result * jnp.power(leaf, jnp.asarray(power).astype(leaf.dtype))
            return result

        return jax.tree.map(multiply, *parts)

    return _combined(f"product({', '.join(map(_name, scores))})", list(scores), combine)


def lamp(score: Score = magnitude) -> Score:
    """LAMP: each squared score over the sum of those in its leaf that are cut no earlier.

    Used with the allocation ``Global()`` it finds the sparsity of each layer by itself. Within a
    leaf the order is that of the score, equal scores by position, the first of them the best: so
    the best of every leaf has exactly 1, and no layer empties while another keeps two. A leaf is
    sorted (n log n), which gathers it where it is sharded.

    Args:
      score: the score to rescale; magnitude in the paper.

    Returns:
      A score in [0, 1], float32. Dead synapses have 0; nan stays.

    References:
      Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021, eq. 3.

    >>> lamp()({"w": jnp.array([1.0, -2.0, 2.0])})["w"].tolist()
    [0.1111111119389534, 1.0, 0.5]
    """

    def combine(params: PyTree, mask: PyTree | None, values: list[PyTree]) -> PyTree:
        leaves, treedef = jax.tree.flatten(values[0])
        alive = _alive(params, mask, leaves)
        return jax.tree.unflatten(treedef, list(map(_lamp, leaves, alive)))

    return _combined(f"lamp({_name(score)})", [score], combine)


def _lamp(leaf: jax.Array, alive: jax.Array) -> jax.Array:
    raw = wide(leaf)
    flat = jnp.where(alive & ~jnp.isnan(raw), raw, jnp.zeros_like(raw)).reshape(-1)
    if not flat.size:
        return raw
    order = jnp.argsort(-flat, stable=True)
    ordered = flat[order]
    # Relative to the largest, whose score is then exactly 1, and whose square cannot overflow.
    top = jnp.where(ordered[0] > 0, ordered[0], jnp.ones_like(ordered[0]))
    squares = jnp.square(ordered / top)
    # A parallel sum may round so that it decreases by a bit; it must not, to keep the order.
    sums = jax.lax.cummax(jnp.cumsum(squares))
    ranked = squares / jnp.where(sums > 0, sums, jnp.ones_like(sums))
    result = jnp.zeros_like(flat).at[order].set(ranked).reshape(raw.shape)
    return jnp.where(jnp.isnan(raw), raw, result)


def _normalised(
    params: PyTree, mask: PyTree | None, values: PyTree, by: By | None, across: Across
) -> PyTree:
    leaves, treedef = jax.tree.flatten(values)
    leaves = list(map(wide, leaves))
    if by is None or not leaves:
        return jax.tree.unflatten(treedef, leaves)
    counted = [
        (ok & jnp.isfinite(leaf)).reshape(-1)
        for ok, leaf in zip(_alive(params, mask, leaves), leaves, strict=True)
    ]
    flat = [leaf.reshape(-1) for leaf in leaves]
    if across == "tree":
        # Not joined but for ranks: a sharded tree needs one small sum, no gather.
        if by == "rank":
            results = _rank(_join(flat), _join(counted), flat)
        else:
            size = _size(flat, counted, by)
            results = [leaf / size.astype(leaf.dtype) for leaf in flat]
    elif by == "rank":
        results = [_rank(x, ok, [x])[0] for x, ok in zip(flat, counted, strict=True)]
    else:
        results = [x / _size([x], [ok], by) for x, ok in zip(flat, counted, strict=True)]
    shaped = [new.reshape(leaf.shape) for new, leaf in zip(results, leaves, strict=True)]
    return jax.tree.unflatten(treedef, shaped)


def _size(values: list[jax.Array], counted: list[jax.Array], by: By) -> jax.Array:
    dtype = jnp.float64 if all(leaf.dtype == jnp.float64 for leaf in values) else jnp.float32
    pairs = [
        jnp.where(ok, x, jnp.zeros_like(x)).astype(dtype)
        for x, ok in zip(values, counted, strict=True)
    ]
    top = jnp.max(jnp.stack([jnp.max(x, initial=0) for x in pairs]))
    top = jnp.where(top > 0, top, jnp.ones_like(top))
    if by == "max":
        return top
    # Relative to the largest, so that neither squares nor sums overflow or vanish.
    if by == "l2":
        return jnp.sqrt(sum(jnp.sum(jnp.square(x / top)) for x in pairs) + _only_zero(pairs)) * top
    number = sum(jnp.sum(ok.astype(dtype)) for ok in counted)
    share = sum(jnp.sum(x / top) for x in pairs) / jnp.maximum(number, jnp.ones((), dtype))
    return (share + _only_zero(pairs)) * top


def _only_zero(pairs: list[jax.Array]) -> jax.Array:
    """One where every score is zero (they are then divided by one), else zero."""
    some = jnp.any(jnp.stack([jnp.any(x > 0) for x in pairs]))
    return jnp.where(some, jnp.zeros((), pairs[0].dtype), jnp.ones((), pairs[0].dtype))


def _rank(values: jax.Array, counted: jax.Array, asked: list[jax.Array]) -> list[jax.Array]:
    among = jnp.sort(jnp.where(counted, values, jnp.full_like(values, jnp.inf)))
    number = jnp.maximum(jnp.sum(counted, dtype=jnp.int32), 1)
    results = []
    for leaf in asked:
        below = jnp.searchsorted(among, leaf.astype(among.dtype), side="right").astype(jnp.int32)
        share = jnp.minimum(below, number).astype(leaf.dtype) / number.astype(leaf.dtype)
        results.append(jnp.where(jnp.isnan(leaf), leaf, share))
    return results


def _join(leaves: list[jax.Array]) -> jax.Array:
    wanted = jnp.bool_ if leaves[0].dtype == jnp.bool_ else jnp.float32
    if any(leaf.dtype == jnp.float64 for leaf in leaves):
        wanted = jnp.float64
    return jnp.concatenate([leaf.astype(wanted) for leaf in leaves])


def _alive(params: PyTree, mask: PyTree | None, leaves: list[jax.Array]) -> list[jax.Array]:
    if mask is None:
        return [jnp.ones(jnp.shape(leaf), bool) for leaf in leaves]
    return aligned(params, mask, "mask leaves")


def _name(score: Score) -> str:
    return getattr(score, "__name__", type(score).__name__)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}; choose one of {', '.join(choices)}.")


def _check_normalisation(by: By | None, across: Across) -> None:
    if by is not None:
        _check_choice("by", by, ("mean", "max", "l2", "rank"))
    _check_choice("across", across, ("leaf", "tree"))


def _combined(
    name: str,
    members: list[Score],
    combine: Callable[[PyTree, PyTree | None, list[PyTree]], PyTree],
) -> Score:
    """A score of scores whose signature asks for the signals of all its members."""

    def score(params: PyTree, **signals: Any) -> PyTree:
        values = []
        for place, member in enumerate(members):
            own = dict(signals)
            if "key" in own and len(members) > 1:
                own["key"] = jax.random.fold_in(own["key"], place)
            values.append(supply(member, params, own))
        return combine(params, signals.get("mask"), values)

    kinds = inspect.Parameter
    wanted = dict.fromkeys(signal for member in members for signal in required_signals(member))
    signature = inspect.Signature(
        [
            kinds("params", kinds.POSITIONAL_OR_KEYWORD),
            *(kinds(signal, kinds.KEYWORD_ONLY) for signal in wanted),
            kinds("signals", kinds.VAR_KEYWORD),
        ]
    )
    score.__name__ = score.__qualname__ = name
    setattr(score, "__signature__", signature)  # noqa: B010 (unknown to type checkers)
    return score
