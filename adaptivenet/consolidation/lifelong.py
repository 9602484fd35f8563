r"""Lifelong learning by one belief: prune what is uncertain, free it, protect what is precise.

At a boundary (:func:`adaptivenet.consolidation.boundary.consolidate`) the belief of the task just
learnt joins the memory, as in online elastic weight consolidation. The synapses that the memory is
least certain of are *released*: they become zero and their precision returns to the prior, so that
they are free capacity. All others are *claimed*, and held by their precision. What is free wakes,
at once or in part, and learns the next task::

    tx = lifelong(optax.adam(1e-3), strength=1 / n, fraction=0.5)
    for task in tasks:
        ...                                                    # train with tx, as ever
        belief = calibrate(params, fisher_diagonal(...), prior=1.0)
        opt_state = consolidate(opt_state, params, belief)
        params = landed(opt_state, params)                     # released ones are zero, now

**How the parameters change.** A boundary gives back a state, and released synapses are parameters.
The next update lands them: it is ``-p`` there, after which they are exact zeros, as behind a
pruner. So nothing can be forgotten or half done, in a scan or a population as in a loop.
:func:`landed` is the same step made at once, as a pure function, so that the network is tested as
it will be; calling it or not changes no later landing (the update is then ``-0``).

**Why it is a wrapper.** Protection is a gradient or a factor, on the one side of the optimizer or
the other; landing has to come last; and what the optimizer remembers of a synapse (its moments, or
the memory of another rule of consolidation inside) has to go when it is released. A chain member
can do one of these.

**Scale.** Every belief contains the prior once, of ``prior_precision`` (``calibrate`` and
``laplace`` make such beliefs); no precision is ever below it. For the strength see
:mod:`adaptivenet.consolidation.elastic`.

With task ids the view of one task is :func:`adaptivenet.consolidation.ownership.view` of the
state's owners, as in :mod:`adaptivenet.consolidation.packnet`; without them everything is used.

References:
  The parts are those of Mallya and Lazebnik, "PackNet", CVPR 2018 (release, keep, go on); Schwarz
  et al., "Progress & compress", ICML 2018, section 4 (the merged belief); Graves, "Practical
  variational inference for neural networks", NeurIPS 2011 (what is uncertain goes).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet import counts, selection, trees
from adaptivenet.chains import hand_on
from adaptivenet.consolidation._release import (
    Released,
    least,
    narrow,
    number,
    release,
    restarted,
)
from adaptivenet.consolidation.boundary import (
    as_posterior,
    check_share,
    check_strength,
    copied,
    nothing_yet,
)
from adaptivenet.consolidation.elastic import merge
from adaptivenet.consolidation.ownership import claim, free, nobody
from adaptivenet.counts import Share
from adaptivenet.moments import reset_moments
from adaptivenet.posterior._arrays import known
from adaptivenet.posterior._states import advanced, cast, check_positive, initial_key
from adaptivenet.posterior.gaussian import Posterior
from adaptivenet.pruning.masks import landing
from adaptivenet.pruning.regrowth import Regrowth, at_random
from adaptivenet.pruning.saliency import snr
from adaptivenet.pruning.scores import Score, supply

PyTree = Any
Number = Any  # a Python number, or a traced scalar
Protection = Literal["soft", "proximal", "hard", "metaplastic", "none"]

__all__ = ["LifelongState", "Released", "landed", "lifelong", "release", "restarted", "state_of"]


@jax.tree_util.register_static
@dataclass(frozen=True)
class Rule:
    """What a boundary needs and no array can hold.

    Attributes:
      score: what a synapse is worth.
      regrow: which of the free wake first.
      by_leaf: whether every leaf releases the same share.
      restarts: whether free synapses are drawn anew.
    """

    score: Score
    regrow: Regrowth
    by_leaf: bool
    restarts: bool


class LifelongState(NamedTuple):
    """State of :func:`lifelong`.

    Attributes:
      anchor: pytree of float32 (float64 for float64 parameters), the values remembered; masked
        nodes for leaves that are not floating.
      precision: likewise, how much each is protected; zero before the first boundary.
      owner: pytree of int32, the task that a synapse carries (the first whose boundary it survived)
        or -1; masked nodes for leaves that are not synapses. See :mod:`.ownership`.
      mask: pytree of bool, True where a synapse may be other than zero: free ones that have not
        woken are asleep.
      frozen: pytree of bool for ``protect="hard"``, else empty.
      task: int32 scalar, boundaries so far: the number of the task that is learnt now.
      pending: bool scalar, whether released synapses have still to land.
      fraction, wake, quantile: shares (``wake`` and ``quantile`` are empty where not used).
      decay, prior, restart: float32 scalars.
      key: uint32, data of the random key of the last boundary.
      rule: what no array can hold; no leaf.
      inner: state of the wrapped transformation.
    """

    anchor: PyTree
    precision: PyTree
    owner: PyTree
    mask: PyTree
    frozen: PyTree
    task: jax.Array
    pending: jax.Array
    fraction: Share
    wake: Share | tuple[()]
    quantile: Share | tuple[()]
    decay: jax.Array
    prior: jax.Array
    restart: jax.Array
    key: jax.Array
    rule: Rule
    inner: Any

    @property
    def memory(self) -> Posterior:
        """Anchor and precision, the belief of all tasks so far; a precision of zero is none."""
        return Posterior(self.anchor, self.precision)

    def landed(self, params: PyTree) -> PyTree:
        """The parameters with released synapses where the next update leaves them."""
        gone = trees.map_synapses(lambda o: (o < 0) & self.pending, self.owner)
        params = trees.merge_synapses(lambda g, p: jnp.where(g, jnp.zeros_like(p), p), gone, params)
        if not self.rule.restarts:
            return params
        key = jax.random.fold_in(jax.random.wrap_key_data(self.key), 1)
        woken = trees.map_synapses(lambda g, m: g & m, gone, self.mask)
        return restarted(key, params, woken, self.restart)

    def consolidated(self, params: PyTree, posterior: Any, **signals: Any) -> LifelongState:
        """The state after a boundary: merged, released, claimed, woken."""
        belief = as_posterior(posterior, params, "lifelong()")
        params = self.landed(params)
        both = merge(self.memory, belief, decay=self.decay, prior=self.prior)

        def floored(s: jax.Array, t: Any) -> jax.Array:
            return s if trees.is_masked(t) else jnp.maximum(s, cast(self.prior, s))

        def latest(a: jax.Array, t: Any, p: jax.Array) -> jax.Array:
            return a if trees.is_masked(t) else p.astype(a.dtype)

        precision = trees.map_synapses(floored, both.precision, belief.precision)
        anchor = trees.map_synapses(latest, self.anchor, belief.precision, params)
        key = advanced(self.key)
        now = jax.random.wrap_key_data(key)
        told = {"mask": self.mask, "step": self.task, **signals, "key": jax.random.fold_in(now, 0)}
        freed = least(
            narrow(self.owner, params),
            Posterior(narrow(belief.mean, anchor), narrow(belief.precision, precision)),
            self.fraction,
            self.rule.score,
            told,
            asleep=jax.tree.map(lambda m: ~m, self.mask),
            by_leaf=self.rule.by_leaf,
        )

        def back(f: jax.Array, x: jax.Array, to: Any) -> jax.Array:
            return jnp.where(f, cast(to, x), x)

        told["key"] = jax.random.fold_in(now, 2)
        state = self._replace(
            anchor=copied(
                self.anchor, trees.merge_synapses(lambda f, a: back(f, a, 0.0), freed, anchor)
            ),
            precision=trees.merge_synapses(lambda f, s: back(f, s, self.prior), freed, precision),
            owner=claim(self.owner, freed, self.task),
            mask=self._woken(params, freed, told),
            task=self.task + 1,
            pending=jnp.ones_like(self.pending),
            key=key,
        )
        return state if self.quantile == () else state._replace(frozen=_frozen(state))

    def _woken(self, params: PyTree, freed: PyTree, signals: Mapping[str, Any]) -> PyTree:
        """All that is claimed, and of what is free as much as may learn."""
        if not isinstance(self.wake, Share):
            return jax.tree.map(jnp.ones_like, freed)
        claimed = jax.tree.map(lambda f: ~f, freed)
        told = {name: narrow(freed, value) for name, value in signals.items()}
        told.update(mask=claimed, kept=claimed)
        zero = trees.map_synapses(lambda f, p: jnp.where(f, jnp.zeros_like(p), p), freed, params)
        priority = narrow(freed, supply(self.rule.regrow.priority, zero, told))
        count = counts.part(self.wake, number(freed))
        chosen = selection.top_mask(priority, count, where=freed)
        return jax.tree.map(lambda c, f, w: c | (f & w), claimed, freed, chosen)


def lifelong(
    inner: optax.GradientTransformation,
    strength: Number = 1.0,
    *,
    fraction: Number,
    protect: Protection = "soft",
    learning_rate: Number | None = None,
    quantile: Number = 0.5,
    score: Score = snr,
    prior_precision: Number = 1.0,
    decay: Number = 1.0,
    by_leaf: bool = False,
    wake: Number | None = None,
    regrow: Regrowth = at_random(),  # noqa: B008 (a constant)
    restart: Number = 0.0,
    select: trees.Select = None,
    seed: Any = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer so that boundaries release what is uncertain and protect the rest.

    With the merged precision :math:`h`, the anchor :math:`a` and the strength :math:`\lambda`,
    what is protected (everything that is believed of, biases as well) is held as ``protect`` says:

    - ``"soft"``: :math:`\lambda h (w - a)` is added to the gradient;
    - ``"proximal"``: behind the optimizer, the implicit step :math:`(w' + \eta \lambda h a) /
      (1 + \eta \lambda h)` of the same penalty, which is stable for any strength;
    - ``"metaplastic"``: updates are divided by :math:`1 + \lambda (h / h_0 - 1)` with the prior's
      precision :math:`h_0`, for a strength of 1 by :math:`h / h_0`: Bayes' step size;
    - ``"hard"``: claimed synapses (and other believed parameters) whose precision is above the
      quantile do not move; 0 freezes all of them, as PackNet does;
    - ``"none"``: not at all, or by a rule inside, whose memory of released synapses is reset.

    Before the first boundary it is the inner transformation.

    Args:
      inner: an optimizer; pruners and whatever else has to land last do not belong in it.
      strength: :math:`\lambda`, at least 0; not used by ``"hard"`` and ``"none"``.
      fraction: share of the synapses that is free after a boundary, in [0, 1).
      protect: see above.
      learning_rate: :math:`\eta` of the ``"proximal"`` step, that of the optimizer.
      quantile: for ``"hard"``, the share in [0, 1) of what is claimed that may still move.
      score: what a synapse is worth: :func:`adaptivenet.pruning.snr` of the merged belief, or any
        score, :func:`adaptivenet.pruning.magnitude` and :func:`adaptivenet.pruning.random` as
        controls.
      prior_precision: of the prior that every belief contains, > 0.
      decay: share of the earlier tasks' precision (beyond the prior) kept at a boundary, in [0, 1];
        0 where beliefs contain all that is known, as those of a variational optimizer do.
      by_leaf: release the same share of every leaf, instead of one contest of all.
      wake: share in [0, 1) of the free synapses that learn the next task; the others stay zero, in
        reserve. None wakes all.
      regrow: the rule whose ``priority`` chooses these, such as
        :func:`adaptivenet.pruning.by_gradient` (with ``consolidate(..., grads=...)``); its fraction
        is not used.
      restart: spread of new values for what wakes, relative to ``1 / sqrt(fan-in)``; 0 wakes at
        zero.
      select: as for :func:`adaptivenet.trees.select_leaves`, the synapses. Other leaves are
        protected only.
      seed: integer or random key; members of a population draw different numbers.

    Returns:
      A transformation. Its state gives ``owner``, ``task``, ``mask`` and ``memory``; see
      :func:`state_of`.

    Raises:
      TypeError: ``inner`` is no transformation.
      ValueError: a number or ``protect`` is out of range, a learning rate is missing; at
        ``init``: as :func:`adaptivenet.trees.select_leaves`; at ``update``: no parameters; at a
        boundary: no belief, or one that says nothing of a synapse.

    >>> tx = lifelong(optax.sgd(1.0), 2.0, fraction=0.5)
    >>> params = {"w": jnp.array([[1.0, 3.0]])}
    >>> belief = Posterior(params, {"w": jnp.array([[2.0, 4.0]])})
    >>> state = tx.init(params).consolidated(params, belief)
    >>> state.owner["w"].tolist(), state.precision["w"].tolist()
    ([[-1, 0]], [[1.0, 4.0]])
    >>> params = {"w": jnp.array([[1.0, 3.5]])}
    >>> updates, state = tx.update({"w": jnp.zeros((1, 2))}, state, params)
    >>> updates["w"].tolist()  # lands on zero; -2 * 4 * (3.5 - 3)
    [[-1.0, -4.0]]
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            "lifelong(inner, strength, fraction=...) wraps an optax transformation, such as "
            f"optax.adam(1e-3), not {inner!r}."
        )
    if protect not in ("soft", "proximal", "hard", "metaplastic", "none"):
        raise ValueError(
            f"protect={protect!r}; choose 'soft', 'proximal', 'hard', 'metaplastic' or 'none'."
        )
    if protect == "proximal" and learning_rate is None:
        raise ValueError("protect='proximal' takes an implicit step: give learning_rate=.")
    check_strength("strength", strength)
    check_strength("restart", restart)
    check_share("decay", decay)
    check_positive("prior_precision", prior_precision)
    restarts = not (known(restart) and np.all(np.asarray(restart) == 0))
    rule = Rule(score, regrow, by_leaf, restarts)
    try:
        hash(rule)
    except TypeError as error:
        raise TypeError(
            f"score= and regrow= are part of the program and must be hashable ({error}): give "
            "functions, and rules of plain numbers."
        ) from error
    chain = optax.with_extra_args_support(inner)

    def settings() -> dict[str, Any]:
        def single(value: Number) -> jax.Array:
            return jnp.array(value, jnp.float32, copy=True)

        return {
            "fraction": counts.as_share(fraction, "fraction"),
            "wake": () if wake is None else counts.as_share(wake, "wake"),
            "quantile": counts.as_share(quantile, "quantile") if protect == "hard" else (),
            "decay": single(decay),
            "prior": single(prior_precision),
            "restart": single(restart),
        }

    settings()  # refuses what is out of range

    def init(params: PyTree) -> LifelongState:
        owner, nothing = nobody(params, select), nothing_yet(params)
        return LifelongState(
            anchor=nothing,
            precision=jax.tree.map(jnp.zeros_like, nothing),
            owner=owner,
            mask=jax.tree.map(lambda o: jnp.ones_like(o, dtype=bool), owner),
            frozen=jax.tree.map(lambda h: jnp.zeros_like(h, dtype=bool), nothing)
            if protect == "hard"
            else (),
            task=jnp.zeros((), jnp.int32),
            pending=jnp.zeros((), bool),
            key=initial_key(seed, params),
            rule=rule,
            inner=chain.init(params),
            **settings(),
        )

    # Defined once, so that eager steps compile them once.
    def forget(inner: Any, params: PyTree, owner: PyTree) -> Any:
        return reset_moments(inner, params, free(owner), fresh=chain.init(params))

    def keep(inner: Any, params: PyTree, owner: PyTree) -> Any:
        del params, owner
        return inner

    def update(
        updates: PyTree, state: LifelongState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, LifelongState]:
        if params is None:
            raise ValueError(
                "lifelong() needs the parameters: call tx.update(grads, opt_state, params)."
            )
        if protect == "soft":
            updates = _pulled(updates, state, params, strength)
        updates, after = hand_on("lifelong()", chain, updates, state.inner, params, extra)
        if protect == "proximal":
            updates = _implicit(updates, state, params, strength, learning_rate)
        elif protect == "metaplastic":
            updates = _slowed(updates, state, strength)
        elif protect == "hard":
            updates = trees.merge_synapses(
                lambda f, u: jnp.where(f, jnp.zeros_like(u), u), state.frozen, updates
            )
        lands = trees.map_synapses(
            lambda m, o: m & ~((o < 0) & state.pending), state.mask, state.owner
        )
        moves = landing(updates, params, lands)
        there = state.landed(params)
        if restarts:
            moves = trees.merge_synapses(
                lambda stays, u, p, t: jnp.where(stays, u, (t - p).astype(u.dtype)),
                lands,
                moves,
                params,
                there,
            )
        after = jax.lax.cond(state.pending, forget, keep, after, there, state.owner)
        state = state._replace(inner=after, pending=jnp.zeros_like(state.pending), **settings())
        return moves, state

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def landed(opt_state: PyTree, params: PyTree) -> PyTree:
    """The parameters after a boundary: released synapses are zero at once (or drawn anew).

    The next update would do the same. Use it to test the network, or to measure a belief, between
    a boundary and the first step of the next task; later it changes nothing.

    Args:
      opt_state: state of a chain that holds one :func:`lifelong`.
      params: the parameters.

    Returns:
      The parameters.

    Raises:
      ValueError: the state holds no such state, or several.

    >>> tx, params = lifelong(optax.sgd(1.0), fraction=0.5), {"w": jnp.array([[1.0, 3.0]])}
    >>> state = tx.init(params).consolidated(params, Posterior(params, params))
    >>> landed(state, params)["w"].tolist()
    [[0.0, 3.0]]
    """
    return state_of(opt_state).landed(params)


def state_of(opt_state: PyTree) -> LifelongState:
    """The state of :func:`lifelong` within an optimizer state.

    Args:
      opt_state: state of a chain that holds one.

    Returns:
      The state.

    Raises:
      ValueError: it holds none, or several.

    >>> tx = lifelong(optax.sgd(1.0), fraction=0.5)
    >>> state_of((optax.EmptyState(), tx.init({"w": jnp.ones((1, 2))}))).task.item()
    0
    """

    def is_state(node: Any) -> bool:
        return isinstance(node, LifelongState)

    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
    if len(found) != 1:
        raise ValueError(
            f"the optimizer state holds {len(found)} states of lifelong(), not one: wrap the "
            "optimizer, an.consolidation.lifelong.lifelong(optax.adam(1e-3), fraction=...), and "
            "pass the state of that."
        )
    return found[0]


def _pulled(updates: PyTree, state: LifelongState, params: PyTree, strength: Number) -> PyTree:
    def pull(h: jax.Array, grad: Any, param: jax.Array, anchor: jax.Array) -> jax.Array:
        force = cast(strength, h) * h * (param.astype(h.dtype) - anchor)
        return jnp.where(h > 0, (grad.astype(h.dtype) + force).astype(grad.dtype), grad)

    return trees.merge_synapses(pull, state.precision, updates, params, state.anchor)


def _implicit(
    updates: PyTree, state: LifelongState, params: PyTree, strength: Number, rate: Number
) -> PyTree:
    def land(h: jax.Array, update: Any, param: jax.Array, anchor: jax.Array) -> jax.Array:
        there = param.astype(h.dtype) + update.astype(h.dtype)
        # k / (1 + k), for any k.
        share = 1.0 / (1.0 + 1.0 / (cast(rate, h) * cast(strength, h) * h))
        moved = update.astype(h.dtype) - share * (there - anchor)
        return jnp.where(h > 0, moved.astype(update.dtype), update)

    return trees.merge_synapses(land, state.precision, updates, params, state.anchor)


def _slowed(updates: PyTree, state: LifelongState, strength: Number) -> PyTree:
    def slow(h: jax.Array, update: Any) -> jax.Array:
        more = jnp.maximum(h / cast(state.prior, h) - 1.0, 0.0)
        return (update.astype(h.dtype) / (1.0 + cast(strength, h) * more)).astype(update.dtype)

    return trees.merge_synapses(slow, state.precision, updates)


def _frozen(state: LifelongState) -> PyTree:
    """What does not move: of all that is claimed, what is above the quantile of the precision."""
    owners = jax.tree.leaves(state.owner, is_leaf=trees.is_masked)
    precisions, treedef = jax.tree.flatten(state.precision, is_leaf=trees.is_masked)
    candidates = treedef.unflatten(
        [
            h if trees.is_masked(h) else (h > 0) & (True if trees.is_masked(o) else o >= 0)
            for h, o in zip(precisions, owners, strict=True)
        ]
    )
    total = number(candidates)
    assert isinstance(state.quantile, Share)
    count = total - counts.part(state.quantile, total)
    chosen = selection.top_mask(state.precision, count, where=candidates)
    return jax.tree.map(lambda c, s: c & s, candidates, chosen)
