"""Losses and gradients that keep what remembered examples say.

What they rehearse comes from a memory (:func:`adaptivenet.consolidation.sleep.buffer.draw`) or
from a generator (:func:`adaptivenet.consolidation.sleep.replayed`), as a
:class:`adaptivenet.consolidation.sleep.Drawn` whose items are :class:`Remembered`::

    def loss(params):
        new = cross_entropy(apply(params, inputs), labels)
        return new + der_loss(apply, params, drawn, alpha=0.3, beta=0.5)

While the memory is empty, ``drawn.where`` is all False and every loss of it is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet import trees
from adaptivenet.consolidation import functional
from adaptivenet.consolidation.sleep.buffer import Drawn
from adaptivenet.posterior._arrays import known, wide
from adaptivenet.posterior._states import cast

PyTree = Any
Number = Any  # a Python number, or a traced scalar

__all__ = [
    "AgemState",
    "Remembered",
    "agem",
    "cross_entropy",
    "der_loss",
    "distillation",
    "mix",
    "project",
]


class Remembered(NamedTuple):
    """An example with what the network said of it.

    Attributes:
      inputs: ``[batch, ...]`` (one example for ``init`` of a memory: without the batch's axis).
      labels: int ``[batch]``.
      logits: ``[batch, classes]``, of the network when the example was stored.
    """

    inputs: Any
    labels: Any
    logits: Any


def cross_entropy(
    logits: jax.Array, labels: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    """The mean cross-entropy of a batch, in nats.

    Args:
      logits: ``[batch, classes]``.
      labels: int ``[batch]``, or probabilities ``[batch, classes]``.
      weights: ``[batch]``, numbers or bools; the mean is weighted by them, and 0 if all are 0.

    Returns:
      Scalar.

    >>> round(cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3])).item(), 4)  # log 4
    1.3863
    """
    logits, labels = wide(logits), jnp.asarray(labels)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        values = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    else:
        values = -jnp.sum(labels.astype(logits.dtype) * jax.nn.log_softmax(logits), axis=-1)
    return _mean(values, weights)


def distillation(
    logits: jax.Array,
    targets: jax.Array,
    *,
    temperature: Number = 2.0,
    weights: jax.Array | None = None,
) -> jax.Array:
    """The mean divergence from the softened answers of an older network, times ``T^2``.

    It is :func:`adaptivenet.consolidation.functional.distillation` averaged over a batch; the
    square keeps the size of the gradients as the temperature changes.

    Args:
      logits: ``[batch, classes]``.
      targets: ``[batch, classes]``, logits of the older network; no gradient goes into them. Where
        it had fewer classes, give those columns of the logits that it knows (van de Ven's code
        gives the other classes a target of zero).
      temperature: T, positive.
      weights: as for :func:`cross_entropy`.

    Returns:
      Scalar.

    Raises:
      ValueError: the temperature is not positive, or shapes differ.

    References:
      Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", arXiv:1503.02531,
      section 2; van de Ven and Tolias, "Generative replay with feedback connections as a general
      strategy for continual learning", arXiv:1809.10635.

    >>> logits, targets = jnp.array([[1.0, -1.0]]), jnp.zeros((1, 2))
    >>> jax.grad(distillation)(logits, targets, temperature=1.0).round(3)  # softmax - 1 / 2
    Array([[ 0.381, -0.381]], dtype=float32)
    """
    values = functional.distillation(logits, targets, temperature=temperature)
    return _mean(jnp.square(cast(temperature, values)) * values, weights)


def mix(batch: PyTree, drawn: Drawn, *, share: Number | None = None) -> tuple[PyTree, jax.Array]:
    """Experience replay: new and remembered examples in one batch, for one forward pass.

    Args:
      batch: pytree of ``[batch, ...]``, like the items of the memory.
      drawn: remembered examples.
      share: how much of the weight the remembered ones have, in [0, 1), if there are any; by
        default every example weighs the same.

    Returns:
      The examples, new ones first, and float32 weights that sum to 1.

    Raises:
      ValueError: the trees differ in structure, or the share is out of range.

    References:
      Chaudhry et al., "On tiny episodic memories in continual learning", arXiv:1902.10486.

    >>> batch, weights = mix(jnp.zeros(2), Drawn(jnp.ones(2), jnp.array([True, False])), share=0.5)
    >>> batch.tolist(), weights.tolist()
    ([0.0, 0.0, 1.0, 1.0], [0.25, 0.25, 0.5, 0.0])
    """
    if jax.tree.structure(batch) != jax.tree.structure(drawn.items):
        raise ValueError(
            f"the batch is {jax.tree.structure(batch)}, but what was drawn is "
            f"{jax.tree.structure(drawn.items)}: give both the same structure."
        )
    if (
        share is not None
        and known(share)
        and not np.all((np.asarray(share) >= 0) & (np.asarray(share) < 1))
    ):
        raise ValueError(f"share must be in [0, 1), not {share}.")
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch, drawn.items)
    old = drawn.where.astype(jnp.float32)
    new = jnp.ones(jax.tree.leaves(batch)[0].shape[0], jnp.float32)
    if share is not None:
        some = jnp.sum(old)
        part = jnp.where(some > 0, cast(share, jnp.float32), 0.0)
        new = new * (1.0 - part) / new.size
        old = old * part / jnp.maximum(some, 1.0)
    weights = jnp.concatenate([new, old])
    return both, weights / jnp.sum(weights)


def der_loss(
    apply: Callable[..., jax.Array],
    params: PyTree,
    drawn: Drawn,
    *,
    alpha: Number,
    beta: Number = 0.0,
    again: Drawn | None = None,
) -> jax.Array:
    """Dark experience replay, and with ``beta`` DER++: what is added to the loss of new examples.

    ``alpha`` times the mean squared difference of the logits from those that were stored, plus
    ``beta`` times the cross-entropy of the stored labels. (The mean is over examples and classes,
    as in the authors' code; the paper's norm is the sum over classes, so that its alpha is this one
    over the number of classes.)

    Args:
      apply: ``apply(params, inputs) -> logits``.
      params: the parameters.
      drawn: its items are :class:`Remembered`.
      alpha: weight of the logits.
      beta: weight of the labels.
      again: a second, independent draw for the labels, as in the authors' code; by default the
        first serves, which saves a forward pass.

    Returns:
      Scalar, zero if nothing was drawn.

    References:
      Buzzega et al., "Dark experience for general continual learning: a strong, simple baseline",
      NeurIPS 2020, arXiv:2004.07211, section 3, equation 6 (DER++).

    >>> items = Remembered(jnp.ones((1, 2)), jnp.array([0]), jnp.array([[1.0, 4.0]]))
    >>> drawn = Drawn(items, jnp.array([True]))
    >>> der_loss(lambda p, x: x * p, jnp.float32(1.0), drawn, alpha=0.5).item()  # (0 + 9) / 2 / 2
    2.25
    """
    first: Remembered = drawn.items
    logits = wide(apply(params, first.inputs))
    stored = jax.lax.stop_gradient(wide(first.logits).astype(logits.dtype))
    gaps = jnp.mean(jnp.square(logits - stored), axis=-1)
    total = cast(alpha, logits) * _mean(gaps, drawn.where)
    if known(beta) and not np.any(np.asarray(beta)):
        return total
    if again is not None:
        drawn = again
        logits = apply(params, again.items.inputs)
    values = cross_entropy(logits, drawn.items.labels, drawn.where)
    return total + cast(beta, total) * values.astype(total.dtype)


def project(grads: PyTree, reference: PyTree) -> PyTree:
    """The gradient without what would raise the loss of remembered examples, to first order.

    Where ``g . r < 0`` it is ``g - (g . r / r . r) r``, else ``g``: the nearest gradient whose
    descent does not climb the reference loss.

    Args:
      grads: pytree of gradients g; leaves that are not floating pass through.
      reference: pytree like it, the gradient r of the loss of remembered examples; of zeros
        nothing is asked.

    Returns:
      A pytree like ``grads``, of its dtypes.

    Raises:
      ValueError: the trees differ in leaves or shapes.

    References:
      Chaudhry et al., "Efficient lifelong learning with A-GEM", ICLR 2019, arXiv:1812.00420,
      equation 11.

    >>> project(jnp.array([1.0, -1.0]), jnp.array([0.0, 2.0])).tolist()
    [1.0, 0.0]
    """
    return _projected(grads, reference)[0]


class AgemState(NamedTuple):
    """State of :func:`agem`.

    Attributes:
      steps: int32, updates so far.
      conflicts: int32, in how many of them the gradient was turned.
    """

    steps: jax.Array
    conflicts: jax.Array


def agem() -> optax.GradientTransformationExtraArgs:
    """A-GEM as a member of a chain: :func:`project` before the optimizer.

    ``tx.update(grads, opt_state, params, reference_grads=...)`` needs the gradient of the loss of
    remembered examples; zeros while there are none, which is what any loss here gives for an empty
    memory.

    Returns:
      A transformation.

    Raises:
      ValueError: at ``update``: no ``reference_grads=``, or they do not fit the gradients.

    References:
      Chaudhry et al., ICLR 2019, algorithm 2 (in the appendix).

    >>> tx = optax.chain(agem(), optax.sgd(1.0))
    >>> params, grads = jnp.ones(2), jnp.array([1.0, -1.0])
    >>> updates, state = tx.update(
    ...     grads, tx.init(params), params, reference_grads=jnp.array([0.0, 2.0])
    ... )
    >>> updates.tolist(), int(state[0].conflicts)
    ([-1.0, -0.0], 1)
    """

    def init(params: PyTree) -> AgemState:
        del params
        return AgemState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree,
        state: AgemState,
        params: PyTree | None = None,
        *,
        reference_grads: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, AgemState]:
        del params, extra
        if reference_grads is None:
            raise ValueError(
                "agem() needs the gradient of the loss of remembered examples: call tx.update("
                "grads, opt_state, params, reference_grads=...), with zeros while there are none."
            )
        updates, conflict = _projected(updates, reference_grads)
        conflicts = state.conflicts + conflict.astype(jnp.int32)
        return updates, AgemState(jnp.asarray(optax.safe_increment(state.steps)), conflicts)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _projected(grads: PyTree, reference: PyTree) -> tuple[PyTree, jax.Array]:
    leaves, treedef = jax.tree.flatten(grads)
    others = _beside(grads, treedef, reference)
    pairs = []
    for name, g, r in zip(trees.paths(grads), leaves, others, strict=True):
        if jnp.shape(g) != jnp.shape(r):
            raise ValueError(
                f"the reference gradient of leaf {name!r} has the shape {jnp.shape(r)}; the "
                f"gradient has {jnp.shape(g)}."
            )
        if jnp.issubdtype(jnp.result_type(g), jnp.floating):
            pairs.append((wide(g), wide(r)))
    kind = jnp.float64 if any(g.dtype == jnp.float64 for g, _ in pairs) else jnp.float32
    zero = jnp.zeros((), kind)
    along = sum((jnp.sum(g * r).astype(kind) for g, r in pairs), start=zero)
    square = sum((jnp.sum(r * r).astype(kind) for _, r in pairs), start=zero)
    conflict = along < 0
    share = jnp.where(conflict, along / jnp.where(conflict, square, jnp.ones_like(square)), 0.0)
    turned = [
        (wide(g) - share.astype(wide(g).dtype) * wide(r)).astype(g.dtype)
        if jnp.issubdtype(jnp.result_type(g), jnp.floating)
        else g
        for g, r in zip(leaves, others, strict=True)
    ]
    # What is not in conflict stays as it is, also where the reference is inf or nan.
    turned = [
        jnp.where(conflict, new, old) if new is not old else old
        for new, old in zip(turned, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, turned), conflict


def _beside(grads: PyTree, treedef: Any, reference: PyTree) -> list[Any]:
    if jax.tree.structure(reference) != treedef:
        raise ValueError(
            f"the reference gradient has the leaves {', '.join(trees.paths(reference))}, but the "
            f"gradient has {', '.join(trees.paths(grads))}: take both of the same parameters."
        )
    return jax.tree.leaves(reference)


def _mean(values: jax.Array, weights: jax.Array | None) -> jax.Array:
    if weights is None:
        return jnp.mean(values)
    weights = jnp.asarray(weights).astype(values.dtype)
    if weights.shape != values.shape:
        raise ValueError(f"weights= has the shape {weights.shape}, the batch {values.shape}.")
    total = jnp.sum(weights)
    # Selected, not multiplied: what does not count may be anything.
    parts = jnp.where(weights == 0, jnp.zeros_like(values), weights * values)
    return jnp.sum(parts) / jnp.where(total > 0, total, jnp.ones_like(total))
