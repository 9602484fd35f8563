"""Scores that ask how the loss would change: first order, second order, and from a belief.

All are computed in float32 (float64 where the parameters are), because products of small weights
and gradients vanish in float16. Signals are matched to the synapses by path, so that a gradient
tree may hold more leaves than are pruned.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet import trees
from adaptivenet.pruning.schedules import Number, known
from adaptivenet.pruning.scores import Score

PyTree = Any

__all__ = [
    "aligned",
    "fisher_tempered",
    "movement",
    "obd",
    "ordinal",
    "saliency",
    "snr",
    "taylor",
]


def aligned(params: PyTree, tree: PyTree, what: str, *, shapes: bool = True) -> list[Any]:
    """Finds the leaves of another tree that belong to the synapses, by path.

    Args:
      params: the synapses (masked nodes elsewhere).
      tree: pytree with a leaf at every path of ``params``, and possibly more.
      what: the words for ``tree`` in a message.
      shapes: whether the leaves must have the shapes of the synapses.

    Returns:
      One leaf of ``tree`` for each leaf of ``params``, in the order of ``jax.tree.leaves(params)``.

    Raises:
      ValueError: a path is missing or ambiguous, or a leaf has another shape.

    >>> aligned({"b": jnp.zeros(2)}, {"a": jnp.ones(3), "b": jnp.ones(2)}, "grads")[0].tolist()
    [1.0, 1.0]
    """
    names = trees.paths(tree)
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{what} have two leaves of the path {twice!r}; rename one.")
    there = dict(zip(names, jax.tree.leaves(tree), strict=True))
    found = []
    for name, param in zip(trees.paths(params), jax.tree.leaves(params), strict=True):
        if name not in there:
            raise ValueError(
                f"{what} have no leaf {name!r}, which is pruned; they have "
                f"{', '.join(names) or '(none)'}. Give a tree shaped like the parameters, or "
                "narrow select= of prune."
            )
        leaf = there[name]
        if shapes and jnp.shape(leaf) != jnp.shape(param):
            raise ValueError(
                f"{what} have shape {jnp.shape(leaf)} at {name!r}, but the parameter has "
                f"{jnp.shape(param)}."
            )
        found.append(leaf)
    return found


def wide(leaf: Any) -> jax.Array:
    """At least float32."""
    leaf = jnp.asarray(leaf)
    return leaf if leaf.dtype == jnp.float64 else leaf.astype(jnp.float32)


def _map(function: Any, params: PyTree, **signals: PyTree) -> PyTree:
    leaves, treedef = jax.tree.flatten(params)
    columns = [aligned(params, tree, name) for name, tree in signals.items()]
    return jax.tree.unflatten(
        treedef, [function(*map(wide, row)) for row in zip(leaves, *columns, strict=True)]
    )


def saliency(params: PyTree, *, grads: PyTree, **signals: Any) -> PyTree:
    """``|w g|``: to first order, how much the loss changes when the synapse is cut.

    Args:
      params: pytree of floating arrays.
      grads: gradients of the loss, as ``with_signals`` and ``with_posterior`` supply them; noisy
        for a single batch.
      **signals: not used.

    Returns:
      Scores of the same shapes, float32.

    Raises:
      ValueError: the gradients belong to other parameters.

    References:
      Mozer and Smolensky, "Skeletonization", NeurIPS 1988; Lee et al., "SNIP", ICLR 2019, eq. 5.

    >>> w = {"w": jnp.array([2.0, -3.0])}
    >>> saliency(w, grads={"w": jnp.array([-1.0, 0.5])})["w"].tolist()
    [2.0, 1.5]
    """
    del signals
    return _map(lambda w, g: jnp.abs(w * g), params, grads=grads)


def taylor(params: PyTree, *, grads: PyTree, **signals: Any) -> PyTree:
    """``(w g)^2``: the squared change of the loss, to first order, made to be summed over units.

    Single synapses it orders as :func:`saliency` does; a structure that sums its synapses' scores
    turns it into the importance of a unit. (The paper's other variant, the square of the sum over
    the unit, lets synapses cancel; a sum of non-negative scores cannot express it.)

    Args:
      params: pytree of floating arrays.
      grads: gradients of the loss.
      **signals: not used.

    Returns:
      Scores of the same shapes, float32.

    Raises:
      ValueError: the gradients belong to other parameters.

    References:
      Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019, the
      first-order criterion, summed over the parameters of a group.

    >>> w = {"w": jnp.array([2.0, -3.0])}
    >>> taylor(w, grads={"w": jnp.array([-1.0, 0.5])})["w"].tolist()
    [4.0, 2.25]
    """
    del signals
    return _map(lambda w, g: jnp.square(w * g), params, grads=grads)


def fisher_tempered(power: Number = 0.25) -> Score:
    """``|w| F^power``: magnitude, tempered by how much the loss depends on the synapse.

    With power 0 this is magnitude, with 1/2 the square root of optimal brain damage. F is taken
    relative to its largest value in the tree, a common factor that changes no order and keeps the
    result within float32 however small the gradients are.

    Args:
      power: exponent of the Fisher diagonal, >= 0, possibly traced.

    Returns:
      A score that asks for the signal ``fisher``: a running mean of squared gradients.

    Raises:
      ValueError: a negative power.

    References:
      LeCun et al., "Optimal brain damage", NeurIPS 1990, for power 1/2; the power 1/4 is ours.

    >>> score = fisher_tempered(0.5)
    >>> score({"w": jnp.array([-3.0, 4.0])}, fisher={"w": jnp.array([4.0, 1.0])})["w"].tolist()
    [3.0, 2.0]
    """
    if known(power) and not np.all(np.asarray(power) >= 0):
        raise ValueError(f"power must be a number >= 0, not {power}.")

    def score(params: PyTree, *, fisher: PyTree, **signals: Any) -> PyTree:
        del signals
        leaves, treedef = jax.tree.flatten(params)
        # A running mean is never negative, but its bias correction may round below zero.
        curved = [jnp.maximum(wide(leaf), 0) for leaf in aligned(params, fisher, "fisher")]
        largest = [jnp.max(leaf).astype(jnp.float32) for leaf in curved if leaf.size]
        top = jnp.max(jnp.stack(largest)) if largest else jnp.ones(())
        top = jnp.where((top > 0) & jnp.isfinite(top), top, jnp.ones_like(top))

        def temper(w: jax.Array, f: jax.Array) -> jax.Array:
            share = f / top.astype(f.dtype)
            weight = jnp.power(share, jnp.asarray(power).astype(f.dtype))
            return jnp.abs(wide(w)) * weight.astype(wide(w).dtype)

        return jax.tree.unflatten(treedef, list(map(temper, leaves, curved)))

    score.__name__ = score.__qualname__ = "fisher_tempered"
    return score


def obd(params: PyTree, *, fisher: PyTree, **signals: Any) -> PyTree:
    """``w^2 F / 2``: to second order, how much the loss rises when the synapse is cut.

    The diagonal of the Fisher information stands for that of the Hessian, from which it differs
    little near a minimum.

    Args:
      params: pytree of floating arrays.
      fisher: running mean of squared gradients.
      **signals: not used.

    Returns:
      Scores of the same shapes, float32, in the unit of the loss.

    Raises:
      ValueError: the Fisher diagonal belongs to other parameters.

    References:
      LeCun et al., "Optimal brain damage", NeurIPS 1990, eq. 5.

    >>> obd({"w": jnp.array([2.0])}, fisher={"w": jnp.array([3.0])})["w"].tolist()
    [6.0]
    """
    del signals
    return _map(lambda w, f: 0.5 * jnp.square(w) * jnp.maximum(f, 0), params, fisher=fisher)


def snr(params: PyTree, *, posterior: Any, **signals: Any) -> PyTree:
    """``|mean| sqrt(precision)``: how certain the posterior is that a synapse is not zero.

    Its square is twice the saliency of optimal brain damage with the precision as curvature.

    Args:
      params: pytree of floating arrays, which name the synapses.
      posterior: object with the pytrees ``mean`` and ``precision``.
      **signals: not used.

    Returns:
      Scores of the same shapes, float32.

    Raises:
      TypeError: ``posterior`` has no mean or no precision.
      ValueError: the posterior belongs to other parameters.

    References:
      Graves, "Practical variational inference for neural networks", NeurIPS 2011, section 7;
      Blundell et al., "Weight uncertainty in neural networks", ICML 2015, section 5.1.

    >>> from types import SimpleNamespace
    >>> belief = SimpleNamespace(mean={"w": jnp.array([-3.0])}, precision={"w": jnp.array([4.0])})
    >>> snr({"w": jnp.zeros(1)}, posterior=belief)["w"].tolist()
    [6.0]
    """
    del signals
    if not (hasattr(posterior, "mean") and hasattr(posterior, "precision")):
        raise TypeError(
            "posterior= must have the trees mean and precision, which "
            f"{type(posterior).__name__} has not."
        )
    return _map(
        lambda w, mean, precision: jnp.abs(mean) * jnp.sqrt(jnp.maximum(precision, 0)),
        params,
        **{"posterior means": posterior.mean, "posterior precisions": posterior.precision},
    )


def movement(params: PyTree, *, movement: PyTree, **signals: Any) -> PyTree:
    """Movement: a synapse that grew during training is worth more than one that shrank.

    The signal accumulates ``-w g``, which is positive where descent moves a weight away from zero.
    Selection needs non-negative scores, so the sums are passed through :func:`ordinal`: their order
    is kept and their size is not. Use it for single synapses; a structure that adds up scores wants
    :func:`taylor`.

    Args:
      params: pytree of floating arrays, which name the synapses.
      movement: pytree of sums of ``-w g`` over the updates so far, of either sign.
      **signals: not used.

    Returns:
      Non-negative scores in the order of the sums, float32.

    Raises:
      ValueError: the sums belong to other parameters.

    References:
      Sanh et al., "Movement pruning: adaptive sparsity by fine-tuning", NeurIPS 2020, eq. 4.

    >>> sums = {"w": jnp.array([-2.0, 0.0, 0.5, -0.1])}
    >>> jnp.argsort(movement({"w": jnp.ones(4)}, movement=sums)["w"]).tolist()
    [0, 3, 1, 2]
    """
    del signals
    return _map(lambda w, sums: ordinal(sums), params, movement=movement)


def ordinal(values: jax.Array) -> jax.Array:
    """Maps floats of either sign to non-negative floats in the same order.

    Non-negative float32 are half as many as all float32, so an exact map does not exist: this one
    drops the last bit, and only neighbours among finite float32 may become equal. Values that come
    from bfloat16 or float16 all stay distinct.

    Args:
      values: floating array; infinities and nan are allowed.

    Returns:
      Float32 of the same shape: minus infinity becomes 0, zero becomes 1.5, infinity and nan stay.

    >>> ordinal(jnp.array([-jnp.inf, -1.0, 0.0, 1.0, jnp.inf]))[jnp.array([0, 2, 4])].tolist()
    [0.0, 1.5, inf]
    """
    values = jnp.asarray(values).astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    top = jnp.uint32(1 << 31)
    # -0.0 is no less than 0.0. (Compared as bits, because processors take denormals for zeros.)
    bits = jnp.where(bits == top, jnp.zeros_like(bits), bits)
    # The usual order of floats as unsigned integers, halved, and moved so that the largest float
    # comes to lie on the largest float and infinity on infinity.
    rank = jnp.where(bits >= top, ~bits, bits | top) >> 1
    shift = jnp.uint32(1 << 22)
    rank = jnp.where(rank < shift, jnp.zeros_like(rank), rank - shift)
    mapped = jax.lax.bitcast_convert_type(rank, jnp.float32)
    return jnp.where(jnp.isnan(values), values, mapped)
