"""Synaptic homeostasis: in sleep synapses are scaled down, and what matters stands out.

The strength that synapses gained while awake is taken back, in proportion: relative sizes, which
hold what was learnt, stay, weak synapses come nearer to zero, and there is room to learn.
:func:`downscale` multiplies by one factor; :func:`homeostatic` brings each unit back to a set point
of its own. With ``sparing=`` a belief decides which synapses give way: those that are known
precisely hardly do, the others the more, for the same total.

A network of rectified units without biases decides as before when all of its layers are scaled
down, with less confidence. Layers before a normalisation do not feel the scale at all; it only
makes their next steps larger, relative to them.

References:
  Tononi and Cirelli, "Sleep and synaptic homeostasis: a hypothesis", Brain Research Bulletin 62
  (2003); "Sleep and the price of plasticity", Neuron 81 (2014).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet import trees
from adaptivenet.posterior._arrays import Axes, known, unit_shape, wide
from adaptivenet.posterior._states import cast
from adaptivenet.posterior.gaussian import Posterior, check

PyTree = Any
Number = Any  # a Python number, or a traced scalar
Norm = Literal["l1", "l2"]

__all__ = ["downscale", "homeostatic", "norms"]

_HALVINGS = 64  # of the logarithm of the pull: below the precision of float32


def downscale(
    params: PyTree,
    factor: Number,
    *,
    select: trees.Select = None,
    sparing: Posterior | None = None,
) -> PyTree:
    """Scales synapses down so that their total strength falls to a share of itself.

    Without a belief every synapse is multiplied by ``factor``. With one, a synapse of precision s
    is multiplied by ``s / (s + t)``: the mean of what is believed of it once a prior around zero of
    precision t is believed as well. One t serves all synapses, found such that the sum of absolute
    values falls by ``factor`` just the same.

    Args:
      params: pytree of arrays.
      factor: in (0, 1].
      select: which leaves are scaled, as for :func:`adaptivenet.trees.select_leaves`; by default
        floating leaves of two or more dimensions.
      sparing: a belief; its precisions are read.

    Returns:
      A pytree like ``params``.

    Raises:
      ValueError: the factor is out of range, the belief malformed, or it has no leaf for a synapse.

    References:
      Tononi and Cirelli (2003, 2014), see the module; the spared form is this library's.

    >>> downscale({"w": jnp.array([[2.0, -4.0]])}, 0.5)["w"].tolist()
    [[1.0, -2.0]]
    >>> params = {"w": jnp.array([[2.0, 2.0]])}
    >>> belief = Posterior(params, {"w": jnp.array([[9.0, 1.0]])})
    >>> downscale(params, 0.5, sparing=belief)["w"].round(4).tolist()  # t = 3
    [[1.5, 0.5]]
    """
    if known(factor) and not np.all((np.asarray(factor) > 0) & (np.asarray(factor) <= 1)):
        raise ValueError(f"factor must be in (0, 1], not {factor}.")
    chosen = trees.synapses(params, select)
    if sparing is None:
        return trees.merge_synapses(
            lambda w, p: (wide(p) * cast(factor, wide(p))).astype(p.dtype), chosen, params
        )
    precisions = _precisions(chosen, sparing)
    strengths = [jnp.abs(wide(w)) for w in jax.tree.leaves(chosen)]
    kind = jnp.float64 if any(w.dtype == jnp.float64 for w in strengths) else jnp.float32
    pairs = list(zip(strengths, jax.tree.leaves(precisions), strict=True))

    def total(pull: jax.Array) -> jax.Array:
        return _sum([w * _spared(s, pull) for w, s in pairs], kind)

    low = jnp.min(jnp.stack([jnp.min(s).astype(kind) for _, s in pairs]))
    high = jnp.max(jnp.stack([jnp.max(s).astype(kind) for _, s in pairs]))
    share = cast(factor, kind)
    pull = _solved(total, share, share * _sum(strengths, kind), low, high)
    scaled = trees.map_synapses(
        lambda w, s: (wide(w) * _spared(s, pull)).astype(w.dtype), chosen, precisions
    )
    return trees.merge_synapses(lambda new, old: new, scaled, params)


def homeostatic(
    params: PyTree,
    target: Number | PyTree,
    *,
    norm: Norm = "l1",
    axis: Axes = -1,
    select: trees.Select = None,
    upscale: bool = False,
    sparing: Posterior | None = None,
) -> PyTree:
    """Scales the synapses of each unit to a set point.

    Where the norm of what comes into a unit exceeds the target, its synapses are multiplied so that
    it is the target. With a belief they are multiplied by ``s / (s + t)``, as by
    :func:`downscale`, with a t of each unit's own.

    Args:
      params: pytree of arrays.
      target: the set point: a number, or a pytree with a number or an array that broadcasts to one
        a unit for each chosen leaf, such as :func:`norms` of the parameters before the day.
      norm: ``"l1"``, total strength, or ``"l2"``.
      axis: the axis (or axes) of a leaf that counts its units; the last, as in kernels
        ``[inputs, outputs]``, so that the synapses of a unit are its incoming ones.
      select: as for :func:`downscale`.
      upscale: whether units below the target are scaled up to it; always by one factor, and units
        without any strength stay.
      sparing: as for :func:`downscale`.

    Returns:
      A pytree like ``params``.

    Raises:
      ValueError: an unknown norm, a target that is negative or fits no leaf, a leaf without the
        axis; else as :func:`downscale`.

    References:
      Turrigiano, "The self-tuning neuron: synaptic scaling of excitatory synapses", Cell 135
      (2008), for set points of units; Tononi and Cirelli (2014), see the module.

    >>> homeostatic({"w": jnp.array([[3.0, 0.5], [-1.0, 0.25]])}, 2.0)["w"].tolist()
    [[1.5, 0.5], [-0.5, 0.25]]
    """
    chosen = trees.synapses(params, select)
    sizes = norms(params, norm=norm, axis=axis, select=select)
    goals = _targets(target, sizes)
    precisions = None if sparing is None else _precisions(chosen, sparing)

    def scale(w: jax.Array, size: jax.Array, goal: jax.Array, *belief: jax.Array) -> jax.Array:
        strong = wide(w)
        share = goal / jnp.where(size > 0, size, jnp.ones_like(size))
        share = jnp.where(size > 0, share, jnp.ones_like(share))
        falls = share < 1
        factor = share if upscale else jnp.minimum(share, 1.0)
        if belief:
            (s,) = belief
            units = _other_axes(w.shape, size.shape)

            def total(pull: jax.Array) -> jax.Array:
                return _size(strong * _spared(s, pull), norm, units)

            low = jnp.min(s, axis=units, keepdims=True)
            high = jnp.max(s, axis=units, keepdims=True)
            pull = _solved(total, jnp.where(falls, share, jnp.ones_like(share)), goal, low, high)
            factor = jnp.where(falls, _spared(s, pull), factor)
        return (strong * factor).astype(w.dtype)

    rest = (sizes, goals) if precisions is None else (sizes, goals, precisions)
    scaled = trees.map_synapses(scale, chosen, *rest)
    return trees.merge_synapses(lambda new, old: new, scaled, params)


def norms(
    params: PyTree, *, norm: Norm = "l1", axis: Axes = -1, select: trees.Select = None
) -> PyTree:
    """The strength of what comes into each unit.

    Args:
      params: pytree of arrays.
      norm: as for :func:`homeostatic`.
      axis: as for :func:`homeostatic`.
      select: as for :func:`homeostatic`.

    Returns:
      Pytree of float32 (float64) with one number a unit, in arrays that broadcast against the
      leaves (``[1, outputs]``); masked nodes for other leaves.

    Raises:
      ValueError: an unknown norm, or a leaf without the axis.

    >>> norms({"w": jnp.array([[3.0, 0.0], [-4.0, 1.0]])}, norm="l2")["w"].tolist()
    [[5.0, 1.0]]
    """
    if norm not in ("l1", "l2"):
        raise ValueError(f'norm must be "l1" or "l2", not {norm!r}.')
    chosen = trees.synapses(params, select)
    names = iter(trees.paths(chosen))

    def measure(w: jax.Array) -> jax.Array:
        shape = unit_shape(w.shape, axis, next(names))
        return _size(wide(w), norm, _other_axes(w.shape, shape))

    return trees.map_synapses(measure, chosen)


def _other_axes(shape: tuple[int, ...], units: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a for a, (n, u) in enumerate(zip(shape, units, strict=True)) if u != n or n == 1)


def _size(w: jax.Array, norm: Norm, axes: tuple[int, ...]) -> jax.Array:
    if norm == "l1":
        return jnp.sum(jnp.abs(w), axis=axes, keepdims=True)
    # Divided by the largest, so that squares neither overflow nor vanish.
    largest = jnp.max(jnp.abs(w), axis=axes, keepdims=True)
    unit = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    return unit * jnp.sqrt(jnp.sum(jnp.square(w / unit), axis=axes, keepdims=True))


def _sum(parts: list[jax.Array], kind: Any) -> jax.Array:
    return sum((jnp.sum(part).astype(kind) for part in parts), start=jnp.zeros((), kind))


def _spared(precision: jax.Array, pull: jax.Array) -> jax.Array:
    return precision / (precision + pull.astype(precision.dtype))


def _solved(
    total: Callable[[jax.Array], jax.Array],
    share: jax.Array,
    goal: jax.Array,
    low: jax.Array,
    high: jax.Array,
) -> jax.Array:
    """The pull t under which a strength is the goal, a share of what it is without: by bisection.

    ``s / (s + t)`` is the share itself at ``t = s (1 - share) / share``: the least and the largest
    precision give the bounds.
    """
    odds = (1.0 - share) / share
    tiny = jnp.finfo(odds.dtype).tiny
    start, end = (jnp.log(jnp.maximum(s * odds, tiny)) for s in (low, high))

    def halve(_: Any, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        middle = 0.5 * (bounds[0] + bounds[1])
        over = total(jnp.exp(middle)) > goal
        return jnp.where(over, middle, bounds[0]), jnp.where(over, bounds[1], middle)

    start, end = jax.lax.fori_loop(0, _HALVINGS, halve, (start, end))
    return jnp.where(share < 1, jnp.exp(0.5 * (start + end)), jnp.zeros_like(share))


def _precisions(chosen: PyTree, belief: Posterior) -> PyTree:
    check(belief)
    names = iter(trees.paths(chosen))

    def own(w: jax.Array, s: Any) -> jax.Array:
        name = next(names)
        if trees.is_masked(s) or jnp.shape(s) != w.shape:
            found = "nothing" if trees.is_masked(s) else f"a precision of shape {jnp.shape(s)}"
            raise ValueError(
                f"sparing= believes {found} of leaf {name!r} of shape {w.shape}: give a belief of "
                "these parameters, or leave the leaf out with select=."
            )
        return wide(s).astype(wide(w).dtype)

    return trees.map_synapses(own, chosen, belief.precision)


def _targets(target: Any, sizes: PyTree) -> PyTree:
    names = iter(trees.paths(sizes))

    def own(size: jax.Array, goal: Any) -> jax.Array:
        name = next(names)
        if trees.is_masked(goal):
            raise ValueError(f"target= has nothing for leaf {name!r}.")
        if known(goal) and not np.all(np.asarray(goal) >= 0):
            raise ValueError(f"target= of leaf {name!r} must not be negative.")
        try:
            return jnp.broadcast_to(cast(goal, size), size.shape)
        except ValueError as error:
            raise ValueError(
                f"target= has the shape {jnp.shape(goal)} for leaf {name!r}, whose units are "
                f"{size.shape}: give a number, or what norms(...) returns."
            ) from error

    if jax.tree_util.all_leaves([target]) and not isinstance(target, optax.MaskedNode):
        return trees.map_synapses(lambda size: own(size, target), sizes)
    return trees.map_synapses(own, sizes, target)
