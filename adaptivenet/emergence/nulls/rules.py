"""Null models of a rule: the gradient off, the importance shuffled, the mask only recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet import trees
from adaptivenet.pruning import Pruner, Score
from adaptivenet.pruning.scores import supply

PyTree = Any

__all__ = ["no_learning", "shadow", "shuffled"]

# Signals that are made of gradients.
_LEARNT = ("grads", "posterior")


def no_learning(rule: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The no-learning map: a rule with the gradient off.

    Put it where the rule would stand, at the end of the chain. It discards the update of all that
    stands before it (an optimizer's weight decay too), so that parameters change by the rule alone.
    What a claim about learning finds here as well is forced by the rule. The signals ``grads`` and
    ``posterior``, which are made of gradients, are withheld from the rule; whatever else a score
    or schedule asks for (activations, a validation loss) is passed on.

    Args:
      rule: what :func:`adaptivenet.pruning.prune` returned, or any other transformation that acts
        on parameters, such as :func:`soft_threshold`.

    Returns:
      A transformation whose results do not depend on the gradients, with the state of ``rule``; a
      :class:`~adaptivenet.pruning.Pruner` if ``rule`` is one, for
      :func:`adaptivenet.pruning.revise`.

    Raises:
      TypeError: ``rule`` is no transformation.
      ValueError: at ``update`` or ``revise``, the rule asks for a signal that is withheld.

    >>> from adaptivenet.pruning import prune
    >>> tx = optax.chain(optax.adam(1.0), no_learning(prune(0.5)))
    >>> params = {"w": jnp.array([[1.0, -3.0], [0.2, 2.0]])}
    >>> updates, _ = tx.update({"w": jnp.full((2, 2), 9.0)}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["w"].tolist()
    [[0.0, -3.0], [0.0, 2.0]]
    """
    if not isinstance(rule, optax.GradientTransformation):
        raise TypeError(
            "no_learning() takes an optax transformation, such as an.pruning.prune(...), not "
            f"{rule!r}."
        )
    inner = optax.with_extra_args_support(rule)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **signals: Any
    ) -> tuple[PyTree, PyTree]:
        off = jax.tree.map(jnp.zeros_like, updates)
        return _withholding(signals, lambda rest: inner.update(off, state, params, **rest))

    if not isinstance(rule, Pruner):
        return optax.GradientTransformationExtraArgs(inner.init, update)

    def event(params: PyTree, state: PyTree, signals: Mapping[str, Any]) -> tuple[PyTree, PyTree]:
        return _withholding(signals, lambda rest: rule.event(params, state, rest))

    return _pruner(inner.init, update, event)


def _withholding(signals: Mapping[str, Any], call: Callable[[dict[str, Any]], Any]) -> Any:
    withheld = [name for name in _LEARNT if name in signals]
    try:
        return call({name: value for name, value in signals.items() if name not in _LEARNT})
    except ValueError as error:
        if withheld:
            error.add_note(
                f"no_learning() withholds {' and '.join(map(repr, withheld))}, which gradients "
                "make; a rule that needs that has no map without learning."
            )
        raise


def shadow(pruner: Pruner) -> Pruner:
    """The shadow mask: a pruner that watches dense training and never acts.

    Mask, record and schedule evolve as the pruner's would on the parameters it sees, and the update
    passes untouched: training is that of the chain without it, bit for bit. It tells what of a
    mask's history (ages, turnover, hazards) needs the mask to act. At an event dead synapses count
    as zero, as for any pruner: they do not come back by their dense weight. (A mask chosen anew
    each round from the dense parameters is what :func:`truncation` returns.)

    Its state is the pruner's, so :func:`adaptivenet.pruning.mask`,
    :func:`adaptivenet.pruning.record` and :func:`adaptivenet.pruning.revise` work; parameters do
    not land on that mask, by design.

    Args:
      pruner: what :func:`adaptivenet.pruning.prune` returned.

    Returns:
      A pruner of the same state that changes no update and, under ``revise``, no parameter.

    Raises:
      TypeError: ``pruner`` is not a pruner.

    >>> from adaptivenet.pruning import mask, prune
    >>> tx = optax.chain(optax.sgd(0.5), shadow(prune(0.5)))
    >>> params = {"w": jnp.array([[1.0, -3.0], [0.2, 2.0]])}
    >>> updates, state = tx.update({"w": jnp.ones((2, 2))}, tx.init(params), params)
    >>> updates["w"].tolist(), mask(state)["w"].tolist()
    ([[-0.5, -0.5], [-0.5, -0.5]], [[False, True], [False, True]])
    """
    if not isinstance(pruner, Pruner):
        raise TypeError(
            f"shadow() takes what an.pruning.prune(...) returned, not {type(pruner).__name__}."
        )

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **signals: Any
    ) -> tuple[PyTree, PyTree]:
        # Behind a barrier: fused with the event, the optimizer's arithmetic may be compiled to
        # other last bits. The pruner's own updates are thrown away, so any tree will do for them.
        seen = jax.lax.optimization_barrier(params)
        _, state = pruner.update(seen, state, seen, **signals)
        return updates, state

    def event(params: PyTree, state: PyTree, signals: Mapping[str, Any]) -> tuple[PyTree, PyTree]:
        return params, pruner.event(params, state, signals)[1]

    return _pruner(pruner.init, update, event)


def _pruner(init: Any, update: Any, event: Any) -> Pruner:
    pruner = Pruner(init, update)
    pruner.event = event
    return pruner


def shuffled(score: Score, *, across: bool = False) -> Score:
    """The shuffled importance: a score whose values are dealt out anew, at random.

    Each event permutes the scores of the living synapses, uniformly, within each leaf; dead ones
    keep theirs, so that no living synapse gets the zero of a dead one. The multiset of each leaf's
    scores stays exactly, and with it the number that an event takes from each leaf. What a claim
    finds here as well does not come from *which* synapse is important.

    Args:
      score: the score to shuffle.
      across: permute over the whole tree instead, which takes away what leaves differ in as well.

    Returns:
      A score, which asks for the signal ``key`` and uses ``mask`` if given (pruners supply both).

    Raises:
      TypeError: ``score`` cannot be called.

    >>> from adaptivenet.pruning import magnitude
    >>> dealt = shuffled(magnitude)({"w": jnp.array([3.0, -1.0, 2.0])}, key=jax.random.key(0))
    >>> sorted(dealt["w"].tolist())
    [1.0, 2.0, 3.0]
    """
    if not callable(score):
        raise TypeError(f"shuffled() takes a score such as an.pruning.magnitude, not {score!r}.")

    def permuted(params: PyTree, *, key: jax.Array, **signals: Any) -> PyTree:
        score_key, key = jax.random.split(key)
        raw = supply(score, params, {**signals, "key": score_key})
        leaves, treedef = jax.tree.flatten(raw)
        flat = [leaf.ravel() for leaf in leaves]
        if signals.get("mask") is None:
            alive = [jnp.ones(leaf.shape, bool) for leaf in flat]
        else:
            mask = trees.map_synapses(lambda m, _: m.ravel(), signals["mask"], raw)
            alive = jax.tree.leaves(mask)
        if across:
            # float32 holds every 16-bit float exactly.
            dtype = flat[0].dtype if len({leaf.dtype for leaf in flat}) == 1 else jnp.float32
            joined = jnp.concatenate([leaf.astype(dtype) for leaf in flat])
            ends = np.cumsum([leaf.size for leaf in flat])[:-1].tolist()
            flat = jnp.split(_permute(joined, jnp.concatenate(alive), key), ends)
        else:
            flat = [
                _permute(values, living, jax.random.fold_in(key, place))
                for place, (values, living) in enumerate(zip(flat, alive, strict=True))
            ]
        dealt = [x.reshape(leaf.shape) for x, leaf in zip(flat, leaves, strict=True)]
        return jax.tree.unflatten(treedef, dealt)

    name = getattr(score, "__name__", type(score).__name__)
    permuted.__name__ = permuted.__qualname__ = f"shuffled({name})"
    return permuted


def _permute(values: jax.Array, living: jax.Array, key: jax.Array) -> jax.Array:
    """A uniform permutation of the living values; the dead ones stay where they are."""
    order = jax.random.permutation(key, values.size)
    # The living come first: in their own order, and in random order.
    targets = jnp.argsort(~living, stable=True)
    sources = order[jnp.argsort(~living[order], stable=True)]
    moved = jnp.zeros_like(values).at[targets].set(values[sources], unique_indices=True)
    return jnp.where(living, moved, values)
