"""Saliency at initialisation: scores of an untrained network, from a loss or from none.

These are functions of a loss (or of the network) and the parameters; :func:`fixed` makes a score
of what they return::

    scores = snip(loss, params, images, labels)
    tx = optax.chain(optax.adam(1e-3), prune(one_shot(0.95, step=1), score=fixed(scores)))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from adaptivenet import selection, trees
from adaptivenet.counts import as_count, as_share
from adaptivenet.pruning.demands import Sparsity
from adaptivenet.pruning.masks import full_mask
from adaptivenet.pruning.saliency import aligned, ordinal, wide
from adaptivenet.pruning.schedules import Number, check_sparsity
from adaptivenet.pruning.scores import Score

PyTree = Any

__all__ = ["fixed", "grasp", "snip", "synflow"]


def snip(
    loss: Callable[..., jax.Array], params: PyTree, *batch: Any, select: trees.Select = None
) -> PyTree:
    """SNIP: ``|w dL/dw|``, as a share of its sum over all synapses.

    Args:
      loss: ``loss(params, *batch)`` returns a scalar.
      params: pytree of arrays, as initialised.
      *batch: further arguments of the loss; about ten examples of each class are usual.
      select: which leaves are synapses, as for `prune`.

    Returns:
      Scores, float32, that add up to 1; masked nodes for leaves that are not synapses.

    Raises:
      ValueError, TypeError: as :func:`adaptivenet.trees.select_leaves`.

    References:
      Lee et al., "SNIP: single-shot network pruning based on connection sensitivity", ICLR 2019,
      eq. 6.

    >>> params, batch = {"w": jnp.ones((1, 2))}, jnp.array([1.0, 3.0])
    >>> snip(lambda p, x: jnp.sum(p["w"] * x), params, batch)["w"].tolist()
    [[0.25, 0.75]]
    """
    kept, partial = _restricted(loss, params, batch, select)
    grads = jax.grad(partial)(kept)
    raw = jax.tree.map(lambda w, g: jnp.abs(wide(w) * wide(g)), kept, grads)
    total = sum(jnp.sum(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(raw))
    total = jnp.where(total > 0, total, jnp.ones_like(total))
    return jax.tree.map(lambda leaf: leaf / total.astype(leaf.dtype), raw)


def grasp(
    loss: Callable[..., jax.Array], params: PyTree, *batch: Any, select: trees.Select = None
) -> PyTree:
    """GraSP: keeps the synapses without which the gradient's norm would fall.

    The paper removes the largest ``-w (H g)`` (H is the Hessian and g the gradient), so a synapse
    is worth ``w (H g)``, of either sign. :func:`adaptivenet.pruning.saliency.ordinal` makes the
    scores non-negative in the same order, and drops their size. The paper divides the logits by
    200 within the loss; do so in ``loss``.

    Args:
      loss: ``loss(params, *batch)`` returns a scalar; differentiated twice.
      params: pytree of arrays, as initialised.
      *batch: further arguments of the loss.
      select: which leaves are synapses, as for `prune`; g and H are restricted to them.

    Returns:
      Non-negative scores, float32; masked nodes for leaves that are not synapses.

    Raises:
      ValueError, TypeError: as :func:`adaptivenet.trees.select_leaves`.

    References:
      Wang et al., "Picking winning tickets before training by preserving gradient flow", ICLR
      2020, eq. 8.

    >>> params = {"w": jnp.array([[1.0, -2.0, 0.5]])}
    >>> worth = grasp(lambda p: jnp.sum(p["w"] ** 3), params)["w"]  # w (H g) = 18 w^4
    >>> jnp.argsort(worth[0]).tolist()
    [2, 0, 1]
    """
    kept, partial = _restricted(loss, params, batch, select)
    gradient = jax.grad(partial)
    grads = gradient(kept)
    curved = jax.jvp(gradient, (kept,), (grads,))[1]
    return jax.tree.map(lambda w, h: ordinal(wide(w) * wide(h)), kept, curved)


def synflow(
    apply: Callable[..., jax.Array],
    params: PyTree,
    *inputs: Any,
    sparsity: Number,
    rounds: int = 100,
    select: trees.Select = None,
) -> PyTree:
    """SynFlow: how much of the flow through the network passes each synapse; needs no data.

    With ``|params|`` for the parameters and ones for the input, R is the sum of the outputs, and a
    synapse's score is ``|w| dR/d|w|``. In each of ``rounds`` rounds the lowest are cut, by an
    exponential schedule, and the rest scored again, so that no layer empties before the others.

    Scores are divided by R, so that each layer of a chain adds up to at most 1 and gradients stay
    within float32. Where R itself exceeds float32, the input is scaled by 2^-100, which changes no
    order as long as biases are zero. Activations must pass positive numbers on (relu and its kin);
    normalisation layers should be in their evaluation mode.

    Args:
      apply: ``apply(params, *inputs)`` returns an array.
      params: pytree of arrays, as initialised.
      *inputs: arrays, or ``jax.ShapeDtypeStruct``: only their shapes and dtypes count, and a batch
        of one is enough.
      sparsity: what will be asked of `prune`, in [0, 1), possibly traced.
      rounds: rounds of scoring, >= 1.
      select: which leaves are synapses, as for `prune`.

    Returns:
      Scores of the last round, float32; zero for what was cut before. The ``sparsity`` asked of
      `prune` with them is that of the last round.

    Raises:
      ValueError: a number out of range; outside of jit, a flow that is zero or exceeds float32.

    References:
      Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic
      flow", NeurIPS 2020, eq. 2 and algorithm 1.

    >>> net = lambda p, x: x @ p["a"] @ p["b"]
    >>> params = {"a": jnp.array([[1.0, -3.0]]), "b": jnp.array([[2.0], [2.0]])}
    >>> synflow(net, params, jnp.ones((1, 1)), sparsity=0.5, rounds=1)["a"].tolist()
    [[0.25, 0.75]]
    """
    check_sparsity(sparsity, "sparsity")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds must be an integer >= 1, not {rounds!r}.")
    kept = trees.synapses(params, select)
    ones = [jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), leaf) for leaf in inputs]
    positive = jax.tree.map(_absolute, params)

    def flow(weights: PyTree, scale: jax.Array) -> jax.Array:
        scaled = jax.tree.map(
            lambda x: x * scale.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            ones,
        )
        full = trees.merge_synapses(lambda w, p: w, weights, positive)
        out = apply(full, *scaled)
        return sum((jnp.sum(wide(x)) for x in jax.tree.leaves(out)), start=jnp.zeros(()))

    absolute = jax.tree.map(jnp.abs, kept)
    whole = flow(absolute, jnp.ones(()))
    scale = jnp.where(jnp.isfinite(whole), jnp.ones(()), jnp.full((), 2.0**-100))
    _check_flow(flow(absolute, scale))  # cutting can only lower it

    def score(mask: PyTree) -> PyTree:
        weights = jax.tree.map(lambda m, w: jnp.where(m, w, jnp.zeros_like(w)), mask, absolute)
        total, pull = jax.vjp(lambda w: flow(w, scale), weights)
        share = jnp.where(total > 0, 1 / total, jnp.zeros_like(total))
        (grads,) = pull(share)
        return jax.tree.map(lambda w, g: wide(w) * wide(g), weights, grads)

    size = trees.size(kept)
    density = 1 - jnp.asarray(sparsity).astype(jnp.float32)

    def cut(place: Any, mask: PyTree) -> PyTree:
        exponent = (jnp.asarray(place).astype(jnp.float32) + 1) / rounds
        demand = Sparsity(as_share(1 - jnp.power(density, exponent)))
        return selection.top_mask(score(mask), demand.keep(as_count(size), size), where=mask)

    mask = full_mask(params, select)
    if rounds > 1:
        mask = jax.lax.fori_loop(0, rounds - 1, cut, mask)
    return score(mask)


def fixed(scores: PyTree) -> Score:
    """A score that was computed before: returns a given tree at every event.

    Args:
      scores: pytree of non-negative floats with a leaf at the path of every synapse; what
        :func:`snip`, :func:`grasp` and :func:`synflow` return, or anything else. Paths are
        compared, not containers: scores of a Linen dict serve an NNX module with the same names.

    Returns:
      A score.

    Raises:
      ValueError: a score is negative or nan (where its value is known); at an event: a synapse's
        path is missing in the tree, or has another shape there.
      TypeError: a leaf is not floating.

    >>> fixed({"w": jnp.array([3.0, 1.0])})({"w": jnp.zeros(2)})["w"].tolist()
    [3.0, 1.0]
    """
    for name, leaf in zip(trees.paths(scores), jax.tree.leaves(scores), strict=True):
        if not jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating):
            raise TypeError(f"score {name!r} has dtype {jnp.asarray(leaf).dtype}, not a float.")
        if not isinstance(leaf, jax.core.Tracer):
            with jax.ensure_compile_time_eval():
                negative = int(jnp.sum(jnp.asarray(leaf) < 0))
            if negative:
                raise ValueError(
                    f"score {name!r} holds {negative} negative numbers; scores are >= 0. "
                    "an.pruning.ordinal(...) makes them so and keeps their order."
                )
    trees.check_finite(scores, "score")

    def score(params: PyTree, **signals: Any) -> PyTree:
        del signals
        found = [jnp.asarray(leaf) for leaf in aligned(params, scores, "fixed scores")]
        return jax.tree.unflatten(jax.tree.structure(params), found)

    score.__name__ = score.__qualname__ = "fixed"
    return score


def _restricted(
    loss: Callable[..., jax.Array], params: PyTree, batch: tuple[Any, ...], select: trees.Select
) -> tuple[PyTree, Callable[[PyTree], jax.Array]]:
    """The synapses, and the loss as a function of them alone."""
    kept = trees.synapses(params, select)

    def partial(weights: PyTree) -> jax.Array:
        return loss(trees.merge_synapses(lambda w, p: w, weights, params), *batch)

    return kept, partial


def _absolute(leaf: Any) -> Any:
    return jnp.abs(leaf) if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating) else leaf


def _check_flow(total: jax.Array) -> None:
    if isinstance(total, jax.core.Tracer):
        return
    if not bool(jnp.isfinite(total)):
        raise ValueError(
            "synflow: the flow through the network exceeds float32; scale its parameters down (the "
            "order of the scores of a chain of layers does not depend on that)."
        )
    if not bool(total > 0):
        raise ValueError(
            "synflow: no flow reaches the outputs. Use activations that pass positive numbers on, "
            "return logits rather than probabilities, and check that no layer is all zero."
        )
