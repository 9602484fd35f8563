"""`prune`: the optax transformation that schedules scores, allocations, structures, regrowth."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet import trees
from adaptivenet.chains import operands
from adaptivenet.moments import beside, reset_moments, woken
from adaptivenet.posterior import gaussian as posterior
from adaptivenet.pruning import event as events
from adaptivenet.pruning import masks
from adaptivenet.pruning.allocations import Allocation, Global
from adaptivenet.pruning.record import (
    PruneState,
    Record,
    as_effective,
    as_quantiles,
    blank,
    measure,
    prune_states,
    score_quantiles,
)
from adaptivenet.pruning.regrowth import Regrowth
from adaptivenet.pruning.schedules import as_schedule, known
from adaptivenet.pruning.scores import Score, magnitude, required_signals, supply
from adaptivenet.pruning.signals import readings, resets
from adaptivenet.pruning.structures import Element, Structure

PyTree = Any

__all__ = ["PruneState", "Pruner", "mask", "prune", "record", "revise"]


class Pruner(optax.GradientTransformationExtraArgs):
    """What :func:`prune` returns: an optax transformation with an out-of-step event.

    Attributes:
      init: as in optax.
      update: as in optax.
      event: ``(params, state, signals) -> (params, state)``, used by :func:`revise`.
      needs: the signals that an event cannot do without.

    >>> isinstance(prune(0.5), optax.GradientTransformationExtraArgs)
    True
    """

    event: Any
    needs: tuple[str, ...] = ()


def prune(
    schedule: Any,
    *,
    score: Score = magnitude,
    structure: Structure = Element(),  # noqa: B008 (a constant)
    allocation: Allocation = Global(),  # noqa: B008 (a constant)
    regrow: Regrowth | None = None,
    select: trees.Select = None,
    every: Any = 1,
    seed: Any = 0,
    ages: bool = False,
    quantiles: Sequence[float] = (),
    effective: Sequence[str] | Callable[[PyTree], PyTree] | None = None,
) -> Pruner:
    """Prunes while it trains: put it at the end of an ``optax.chain``.

    The update it returns makes ``optax.apply_updates`` land on exact zeros wherever the mask is
    False. Events happen in the step, every ``every`` updates of the schedule's window, and score
    the parameters at which the gradient was taken; or out of the step, by :func:`revise` between
    scanned chunks, which a vmapped population should prefer (a batched ``cond`` runs both
    branches).

    Nothing that changes parameters or updates may come after it in the chain or around it:
    momentum, clipping, ``optax.contrib.mechanize``; the averages that
    ``schedule_free_eval_params`` and lookahead's slow weights hold are not pruned. A transformation
    cannot see the chain that it is in; :func:`adaptivenet.testing.check_landing` on what you will
    use finds all of these.

    Args:
      schedule: a schedule (:func:`cubic`, :func:`auto`, ...), a function from step to sparsity, or
        a constant sparsity.
      score: what a synapse is worth; see :mod:`adaptivenet.pruning.scores`.
      structure: what is cut as one.
      allocation: how the target is shared out among leaves.
      regrow: rule that wakes dead synapses; None wakes only when the schedule steps back, at
        random.
      select: regular expressions on paths; None takes floating leaves of two or more dimensions.
      every: updates between events; None for no events in the step (use :func:`revise`).
      seed: integer, or a random key (possibly traced). It is folded with the parameters' bits, so
        that members of a population draw different numbers.
      ages: keep each synapse's age (4 bytes a synapse) and record the mean.
      quantiles: record these quantiles of the scores of the living, before the cut.
      effective: record the effective density: the paths of the layers' kernels
        ``[inputs, outputs]`` from input to output, or a function that leaves on a mask only what
        lies on a live path.

    Returns:
      A transformation whose ``update`` takes further signals as keyword arguments: whatever the
      score, the rule and the schedule ask for by name. Of a signal shaped like the parameters they
      see the leaves that are synapses.

    Raises:
      ValueError: ``every`` is below 1, a quantile is outside [0, 1]; at ``init``: ``select`` or
        a pattern matches nothing, a leaf holds nan, the structure does not fit a leaf, or the
        largest target of the schedule, where it is known, is bound to leave nothing of a leaf; at
        ``update``: no parameters, a missing signal, or parameters of another tree.
      TypeError: the schedule is none, or a chosen leaf is not of a floating dtype.

    References:
      Zhu and Gupta, "To prune, or not to prune", arXiv:1710.01878; Lee et al., "JaxPruner",
      arXiv:2304.14082, for pruning as a wrapper of optax.

    >>> tx = optax.chain(optax.sgd(0.5), prune(0.5))
    >>> params = {"w": jnp.array([[1.0, -3.0], [0.2, 2.0]])}
    >>> grads = {"w": jnp.ones((2, 2))}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["w"].tolist()
    [[0.0, -3.5], [0.0, 1.5]]
    >>> mask(state)["w"].tolist()
    [[False, True], [False, True]]
    """
    plan = as_schedule(schedule)
    _check_every(every)
    ranks, live = as_quantiles(quantiles), as_effective(effective)
    # Where nothing wakes, survivors and mask are one: a copy fewer leaves the branch of each step.
    nothing_wakes = regrow is None and not plan.may_grow

    def init(params: PyTree) -> PruneState:
        if _is_lookahead(params):
            raise TypeError(
                "prune() cannot follow optax.lookahead: slow weights would be copied over pruned "
                "ones. Put it inside: optax.lookahead(optax.chain(optimizer, prune(...)), ...) "
                "prunes the fast weights."
            )
        kept = trees.synapses(params, select)
        trees.check_finite(kept)
        events.check(kept, structure=structure, allocation=allocation, target=plan.peak())
        mask_ = masks.full_mask(params, select)
        return PruneState(
            step=jnp.zeros((), jnp.int32),
            mask=mask_,
            survivors=() if nothing_wakes else masks.full_mask(params, select),
            born=jax.tree.map(lambda m: jnp.zeros_like(m, dtype=jnp.int32), mask_) if ages else (),
            schedule=plan.init(),
            key=_initial_key(seed, kept),
            record=blank(mask_, ranks),
        )

    def happen(params: PyTree, state: PruneState, signals: Mapping[str, Any]) -> PruneState:
        living = trees.map_synapses(
            lambda m, p: jnp.where(m, p, jnp.zeros_like(p)), state.mask, params
        )
        demand, schedule_state = plan.demand(state.step, state.schedule, signals)
        key = jax.random.wrap_key_data(state.key)
        key, now = jax.random.split(key)
        signals = {name: _narrow(state.mask, value) for name, value in signals.items()}
        signals["step"] = state.step
        outcome = events.cut_and_wake(
            living,
            state.mask,
            demand,
            score=score,
            structure=structure,
            allocation=allocation,
            regrow=regrow,
            may_grow=plan.may_grow,
            key=now,
            signals=signals,
        )
        found = state.record.quantiles
        if ranks:
            # The scores of the event once more, with the key that it gives them: compiled, they are
            # computed once.
            values = supply(
                score, living, {**signals, "mask": state.mask, "key": jax.random.split(now)[0]}
            )
            found = score_quantiles(values, state.mask, ranks)
        born = _born(state, outcome) if ages else ()
        return PruneState(
            step=state.step,
            mask=outcome.mask,
            survivors=() if nothing_wakes else outcome.kept,
            born=born,
            schedule=schedule_state,
            key=jax.random.key_data(key),
            record=measure(
                params,
                state,
                outcome.kept,
                outcome.mask,
                target=demand.value(),
                threshold=outcome.threshold,
                born=born,
                quantiles=found,
                effective=live,
            ),
        )

    # Defined here, with all they use as arguments, so that eager steps compile them only once.
    def rest(params: PyTree, state: PruneState, signals: Mapping[str, Any]) -> PruneState:
        del params, signals
        return state

    def update(
        updates: PyTree, state: PruneState, params: PyTree | None = None, **signals: Any
    ) -> tuple[PyTree, PruneState]:
        if params is None:
            raise ValueError(
                "prune() needs the parameters: call tx.update(grads, opt_state, params)."
            )
        state = state._replace(
            step=optax.safe_increment(state.step),
            record=state.record._replace(event=jnp.zeros((), bool)),
        )
        if every is None:
            return masks.landing(updates, params, state.mask), state

        due = plan.due(state.step, every, ongoing=regrow is not None)
        arrays, others = operands(signals)

        def closed(params: PyTree, state: PruneState, arrays: Mapping[str, Any]) -> Any:
            return happen(params, state, {**arrays, **others})

        state = jax.lax.cond(due, closed if others else happen, rest, params, state, arrays)
        kept = state.mask
        if not nothing_wakes:
            # At an event the woken land on zero too; afterwards they learn.
            kept = trees.map_synapses(lambda m, s: m & (s | ~due), state.mask, state.survivors)
        return masks.landing(updates, params, kept), state

    def event(params: PyTree, state: PruneState, signals: Mapping[str, Any]) -> Any:
        state = happen(params, state, signals)
        return masks.apply_mask(params, state.mask if nothing_wakes else state.survivors), state

    pruner = Pruner(init, update)  # pyright: ignore[reportArgumentType]
    pruner.event = event
    wanted = required_signals(score) + (required_signals(regrow.priority) if regrow else ())
    pruner.needs = tuple(name for name in wanted if name not in ("key", "mask", "step", "kept"))
    return pruner


def _narrow(mask: PyTree, value: Any) -> Any:
    """Of trees shaped like the parameters, anywhere in a signal, the leaves that are synapses.

    Biases, norms and the like have no place in a score; a rule that maps over scores and gradients
    together must not meet them in one and not in the other.
    """
    marks, treedef = jax.tree.flatten(mask, is_leaf=trees.is_masked)
    if not any(map(trees.is_masked, marks)):
        return value

    def cut(node: Any) -> Any:
        parts = beside(mask, node)
        if parts is None:
            return node
        chosen = [m if trees.is_masked(m) else p for m, p in zip(marks, parts, strict=True)]
        return jax.tree.unflatten(treedef, chosen)

    return jax.tree.map(cut, value, is_leaf=lambda node: beside(mask, node) is not None)


def _check_every(every: Any) -> None:
    if every is None or not known(every):
        return
    whole = not isinstance(every, bool) and np.issubdtype(np.asarray(every).dtype, np.integer)
    if not whole or not np.all(np.asarray(every) >= 1):
        raise ValueError(f"every must be a number of updates >= 1, or None, not {every!r}.")


def _is_lookahead(params: Any) -> bool:
    return isinstance(params, optax.LookaheadParams)


def _initial_key(seed: Any, kept: PyTree) -> jax.Array:
    if isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        key = seed
    else:
        key = jax.random.key(seed)
    # Members of a population have one program and one seed, but not the same parameters.
    for leaf in jax.tree.leaves(kept):
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
        key = jax.random.fold_in(key, jnp.sum(bits, dtype=jnp.uint32))
    return jax.random.key_data(key)


def _born(state: PruneState, outcome: events.Outcome) -> PyTree:
    def wake(was: jax.Array, kept: jax.Array, now: jax.Array, born: jax.Array) -> jax.Array:
        return jnp.where(now & ~(was & kept), state.step, born)

    return trees.map_synapses(wake, state.mask, outcome.kept, outcome.mask, state.born)


_states = prune_states


def _only_state(opt_state: PyTree) -> PruneState:
    found = _states(opt_state)
    if len(found) != 1:
        remedy = (
            "put an.pruning.prune(...) at the end of the chain and pass the state of that chain"
            if not found
            else "pass the part of the optimizer state that belongs to one of them"
        )
        raise ValueError(f"the optimizer state holds {len(found)} pruning states; {remedy}.")
    return found[0]


def mask(opt_state: PyTree) -> PyTree:
    """The mask within an optimizer state.

    Args:
      opt_state: state of a chain (of any nesting) that holds one :func:`prune`.

    Returns:
      Pytree of bool, True where a synapse may be other than zero; masked nodes elsewhere.

    Raises:
      ValueError: there is no pruning state in it, or more than one.

    >>> tx = optax.chain(optax.adam(1e-3), prune(0.5))
    >>> mask(tx.init({"w": jnp.ones((1, 2))}))["w"].tolist()
    [[True, True]]
    """
    return _only_state(opt_state).mask


def record(opt_state: PyTree) -> Record:
    """The record of the last event within an optimizer state; a scan stacks it.

    Args:
      opt_state: state of a chain that holds one :func:`prune`.

    Returns:
      The record.

    Raises:
      ValueError: there is no pruning state in it, or more than one.

    >>> tx = prune(0.5)
    >>> record(tx.init({"w": jnp.ones((1, 2))})).density.item()
    1.0
    """
    return _only_state(opt_state).record


def revise(
    pruner: Pruner,
    params: PyTree,
    opt_state: PyTree,
    *,
    reset: bool | optax.GradientTransformation | None = None,
    **signals: Any,
) -> tuple[PyTree, PyTree]:
    """An event out of the step: between scanned chunks, or for a vmapped population.

    Args:
      pruner: the transformation that :func:`prune` returned (built with ``every=None`` if all
        events are made this way).
      params: the parameters.
      opt_state: state of the chain that holds the pruner.
      reset: whether to reset what the chain's state remembers of synapses that wake, as
        :func:`adaptivenet.pruning.reset_moments` does: to zero if True, to what ``init`` gives if
        this is the transformation that made ``opt_state``. By default True where the chain is
        wrapped in ``with_signals(...)`` or ``with_posterior(...)`` (unless with ``reset=False``),
        and else False.
      **signals: what the score, the rule and the schedule ask for, such as ``validation_loss=``.
        Signals that ``with_signals(...)`` keeps in ``opt_state``, and a belief that it holds, are
        found there, unless given.

    Returns:
      Parameters, exactly zero where cut, and the optimizer state with the new mask. (For an
      ``nnx.Optimizer`` give ``nnx.as_pure`` of ``nnx.state(model, nnx.Param)`` and of its
      ``opt_state``, and put the results back with ``nnx.update``.)

    Raises:
      TypeError: ``pruner`` is not what :func:`prune` returned.
      ValueError: the state holds no pruning state, or more than one; gradients are asked for, which
        no state keeps.

    >>> pruner = prune(0.5, every=None)
    >>> tx = optax.chain(optax.sgd(0.1), pruner)
    >>> params = {"w": jnp.array([[1.0, 3.0]])}
    >>> params, state = revise(pruner, params, tx.init(params))
    >>> params["w"].tolist()
    [[0.0, 3.0]]
    """
    if not isinstance(pruner, Pruner):
        raise TypeError(
            f"revise() takes what an.pruning.prune(...) returned, not {type(pruner).__name__}: "
            "keep the pruner in a variable and put it into the chain."
        )
    state = _only_state(opt_state)
    if "grads" in pruner.needs and "grads" not in signals:
        raise ValueError(
            "the score or the regrowth rule asks for the signal 'grads', and gradients are not "
            "kept between steps: pass grads= to revise(...)."
        )
    if "posterior" in pruner.needs and "posterior" not in signals:
        with contextlib.suppress(ValueError):  # who asks for it says what to add
            signals["posterior"] = posterior.find(opt_state, params)
    params, state = pruner.event(params, state, {**readings(opt_state), **signals})

    def is_state(node: Any) -> bool:
        return isinstance(node, PruneState)

    opt_state = jax.tree.map(
        lambda node: state if is_state(node) else node, opt_state, is_leaf=is_state
    )
    if reset is None:
        reset = resets(opt_state)
    if reset is not False and jax.tree.leaves(state.survivors):
        fresh = None if reset is True else reset.init(params)
        born = woken(state.mask, state.survivors)
        opt_state = reset_moments(opt_state, params, born, fresh=fresh)
    return params, opt_state
