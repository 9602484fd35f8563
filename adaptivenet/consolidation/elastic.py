r"""Elastic weight consolidation: what earlier tasks know of a synapse holds it in place.

The penalty is ``strength / 2 * sum(precision * (params - anchor)^2)``, with the precision of a
diagonal belief. Two transformations apply it: :func:`elastic` adds its gradient in front of the
optimizer, and :func:`proximal` takes an implicit step behind it, which is stable however stiff the
penalty is. A boundary (:func:`adaptivenet.consolidation.boundary.consolidate`) brings in a belief::

    tx = optax.chain(elastic(strength), optax.adam(1e-3))
    ...                                                     # train on the first task
    belief = Posterior(params, fisher_diagonal(apply, params, inputs))
    opt_state = consolidate(opt_state, params, belief)
    ...                                                     # train on the second task

**Scale.** The precision of a :class:`adaptivenet.posterior.Posterior` belongs to the log likelihood
*summed* over the examples that it has seen, while losses are mostly *means* over a batch. With n
examples in the task that is learnt now:

- a mean loss and a summed precision: ``strength = 1 / n`` is Bayes' rule;
- the papers' lambda goes with a Fisher information averaged over the N examples of the task before
  and a mean loss: ``strength = lambda`` with ``temper(belief, N)``, or ``strength = lambda / N``
  (:func:`adaptivenet.posterior.fisher` with its default ``examples=1`` is averaged already).

**Two forms.** ``"separate"`` keeps one quadratic a task, as the original does. A sum of quadratics
is a quadratic: the precisions add, and the anchor is the mean of the anchors weighted by them, so
that the memory is constant and nothing is lost (but a number that no gradient sees). ``"online"``
keeps the latest anchor alone, for the latest parameters were found under the penalty of all the
tasks before, which the separate form counts a second time. (With a decay, Schwarz et al. decay the
memory in the penalty as well as at the next boundary: theirs is ``strength = decay * lambda``.)

**Regrowth.** In a chain that resets what it remembers of woken synapses (``with_posterior``,
``with_signals``), a synapse that wakes is free: its precision is zero until the next boundary.

References:
  Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 114 (2017);
  Huszar, "Note on the quadratic penalties in elastic weight consolidation", PNAS 115 (2018),
  arXiv:1712.03847; Schwarz et al., "Progress & compress", ICML 2018, section 4 (online EWC);
  van de Ven, "On the computation of the Fisher information in continual learning", ICLR blog posts
  2025, for what conventions do to the strength.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet import trees
from adaptivenet.consolidation.boundary import (
    as_posterior,
    check_share,
    check_strength,
    copied,
    nothing_yet,
    number,
)
from adaptivenet.moments import Average, zeros
from adaptivenet.posterior._arrays import known, wide
from adaptivenet.posterior._states import cast
from adaptivenet.posterior.gaussian import Posterior

PyTree = Any
Number = Any  # a Python number, or a traced scalar
Form = Literal["online", "separate"]

__all__ = [
    "ElasticState",
    "ProximalState",
    "RootMeanSquare",
    "SeparateElasticState",
    "elastic",
    "merge",
    "penalty",
    "proximal",
]


class ElasticState(NamedTuple):
    """What :func:`elastic` remembers; every field is zero before the first boundary.

    Attributes:
      anchor: pytree of float32 (float64 for float64 parameters), the parameters remembered; masked
        nodes for leaves that are not protected.
      precision: likewise, how much each is protected.
      decay: float scalar, share of the data's precision that is kept at a boundary.
      prior: float scalar, precision of the prior that every belief contains.
      step: int32 scalar, updates so far.
    """

    anchor: PyTree
    precision: PyTree
    decay: jax.Array
    prior: jax.Array
    step: jax.Array

    form = "online"

    @property
    def memory(self) -> Posterior:
        """Anchor and precision, for :func:`penalty`; a precision of zero is no belief."""
        return Posterior(self.anchor, self.precision)

    def consolidated(self, params: PyTree, posterior: Any, **signals: Any) -> ElasticState:
        """The state after a boundary."""
        del signals
        return _merged(self, as_posterior(posterior, params, "elastic()"))


class SeparateElasticState(ElasticState):
    """What :func:`elastic` remembers in its separate form: the same fields as the other."""

    __slots__ = ()
    form = "separate"


class RootMeanSquare(NamedTuple):
    """The metric of Adam and RMSprop, for :func:`proximal` behind them.

    Attributes:
      decay: of the mean of squared gradients, Adam's ``b2``.
      eps: added to its root.
    """

    decay: Number = 0.999
    eps: Number = 1e-8


class ProximalState(NamedTuple):
    """State of :func:`proximal`.

    Attributes:
      memory: as of :func:`elastic`.
      squares: mean of squared gradients, where the metric asks for it.
    """

    memory: ElasticState
    squares: Average | tuple[()]


def elastic(
    strength: Number,
    *,
    form: Form = "online",
    decay: Number = 1.0,
    prior: Number = 0.0,
    every: int | None = None,
    select: trees.Select = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds ``strength * precision * (params - anchor)`` to the gradients: put it in front.

    Beside an adaptive optimizer the sum is rescaled as the gradient is, so that what training
    tends to is a minimum of loss plus penalty. With a plain gradient step of rate r the penalty is
    stable for ``r * strength * precision < 2`` only: see :func:`proximal`.

    Args:
      strength: of the penalty, at least 0; see the module for its scale.
      form: ``"online"`` (one anchor) or ``"separate"`` (one quadratic a task); see the module.
      decay: share of the precision of the data that is kept at a boundary, in [0, 1].
      prior: precision of the prior that every belief contains, so that it counts once over all
        boundaries; 0 adds beliefs as they are.
      every: updates between boundaries that come by themselves, with the belief of
        ``an.with_posterior(...)`` around the chain; None waits for
        :func:`adaptivenet.consolidation.boundary.consolidate`. The belief of a running mean holds
        data that were taken in before: a decay below 1 keeps the sum of ``n`` times the same belief
        at ``1 / (1 - decay)`` of it. (A population mapped by ``vmap`` pays for a boundary in every
        step.)
      select: regular expressions on the paths to protect; None takes all floating leaves.

    Returns:
      A transformation, which is the identity before the first boundary.

    Raises:
      ValueError: a number out of range, an unknown form. At ``init``: ``select`` matches nothing.
        At ``update``: no parameters, or ``every`` and no belief. At a boundary: no belief, one of
        other parameters, or one with a mean that is not finite or a precision below zero.

    References:
      See the module.

    >>> from adaptivenet.consolidation.boundary import consolidate
    >>> tx, params = elastic(10.0), {"w": jnp.array([1.0, 2.0])}
    >>> belief = Posterior(params, {"w": jnp.array([0.0, 3.0])})
    >>> state = consolidate(tx.init(params), params, belief)
    >>> grads, _ = tx.update({"w": jnp.zeros(2)}, state, {"w": jnp.array([2.0, 2.5])})
    >>> grads["w"].tolist()  # 10 * 3 * (2.5 - 2)
    [0.0, 15.0]
    """
    check_strength("strength", strength)
    kind = _kind(form, decay, prior, every)

    def init(params: PyTree) -> ElasticState:
        return _blank(kind, params, select, decay, prior)

    def update(
        updates: PyTree, state: ElasticState, params: PyTree | None = None, **signals: Any
    ) -> tuple[PyTree, ElasticState]:
        if params is None:
            raise ValueError(
                "elastic() needs the parameters: call tx.update(grads, opt_state, params)."
            )

        def pull(h: jax.Array, grad: Any, param: jax.Array, anchor: jax.Array) -> jax.Array:
            force = cast(strength, h) * h * (param.astype(h.dtype) - anchor)
            return jnp.where(h > 0, (grad.astype(h.dtype) + force).astype(grad.dtype), grad)

        pulled = trees.merge_synapses(pull, state.precision, updates, params, state.anchor)
        return pulled, _after("elastic()", state, params, signals, decay, prior, every)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def proximal(
    strength: Number,
    learning_rate: Number | Callable[[Any], Any],
    *,
    metric: RootMeanSquare | None = None,
    form: Form = "online",
    decay: Number = 1.0,
    prior: Number = 0.0,
    every: int | None = None,
    select: trees.Select = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Elastic weight consolidation by an implicit step: put it behind the optimizer.

    With :math:`w'` where the update would lead, the rate :math:`\eta`, strength :math:`\lambda`,
    precision :math:`h` and anchor :math:`a`, the update that comes out leads to

    .. math::
        \arg\min_w \sum \frac{d}{2 \eta} (w - w')^2 + \frac{\lambda}{2} h (w - a)^2
        = \frac{d w' + \eta \lambda h a}{d + \eta \lambda h}

    which lies between :math:`w'` and :math:`a` whatever the strength: nothing overshoots.

    **The metric** :math:`d` should be that of the optimizer's step. For gradient descent it is 1,
    and training tends to a minimum of loss plus penalty. Behind Adam, steps of size 1 in d are
    stable too, but the loss is divided by the root of its mean squared gradient and the penalty is
    not, so that the balance is that of another penalty (as weight decay in AdamW is another than in
    Adam). ``metric=RootMeanSquare(b2, eps)`` takes Adam's own metric for d, which has the right
    balance; it keeps mean squares of the raw gradients, for which the chain is to be wrapped in
    ``an.with_posterior`` or ``an.pruning.with_signals``.

    A pruner belongs behind it: what it cuts lands on zero.

    Args:
      strength: as for :func:`elastic`.
      learning_rate: that of the optimizer: a number, or a function of the count of updates.
      metric: None for the parameters' own, or :class:`RootMeanSquare`.
      form: as for :func:`elastic`.
      decay: as for :func:`elastic`.
      prior: as for :func:`elastic`.
      every: as for :func:`elastic`.
      select: as for :func:`elastic`.

    Returns:
      A transformation, which is the identity before the first boundary.

    Raises:
      ValueError: as :func:`elastic`; at ``update`` with a metric: no ``grads=``.
      TypeError: another metric.

    References:
      Parikh and Boyd, "Proximal algorithms", Foundations and Trends in Optimization 1 (2014),
      section 4.2 (proximal gradient descent); Kingma and Ba, "Adam", ICLR 2015.

    >>> from adaptivenet.consolidation.boundary import consolidate
    >>> tx, params = optax.chain(optax.sgd(0.1), proximal(1e9, 0.1)), {"w": jnp.array([1.0])}
    >>> state = consolidate(tx.init(params), params, Posterior(params, params))
    >>> updates, _ = tx.update({"w": jnp.array([-5.0])}, state, params)
    >>> round(updates["w"].item(), 6)  # held where it is
    0.0
    """
    check_strength("strength", strength)
    if not callable(learning_rate):
        check_strength("learning_rate", learning_rate)
    if metric is not None and not isinstance(metric, RootMeanSquare):
        raise TypeError(f"metric must be None or RootMeanSquare(decay, eps), not {metric!r}.")
    if metric is not None:
        check_share("metric.decay", metric.decay)
        check_strength("metric.eps", metric.eps)
    kind = _kind(form, decay, prior, every)

    def init(params: PyTree) -> ProximalState:
        memory = _blank(kind, params, select, decay, prior)
        squares = () if metric is None else Average(zeros(memory.precision), jnp.zeros(()))
        return ProximalState(memory, squares)

    def update(
        updates: PyTree, state: ProximalState, params: PyTree | None = None, **signals: Any
    ) -> tuple[PyTree, ProximalState]:
        if params is None:
            raise ValueError(
                "proximal() needs the parameters: call tx.update(grads, opt_state, params)."
            )
        memory, squares = state
        rate = learning_rate(memory.step) if callable(learning_rate) else learning_rate
        gains = memory.precision
        if metric is not None:
            eps, squares = metric.eps, _squared(metric, squares, signals)
            gains = trees.map_synapses(
                lambda h, v: h / (jnp.sqrt(v.astype(h.dtype)) + cast(eps, h)),
                gains,
                squares.reading,
            )

        def land(h: jax.Array, update: Any, param: jax.Array, anchor: jax.Array) -> jax.Array:
            there = param.astype(h.dtype) + update.astype(h.dtype)
            # k / (1 + k), for any k: what is too small or too large for the format as well.
            share = 1.0 / (1.0 + 1.0 / (cast(rate, h) * cast(strength, h) * h))
            moved = update.astype(h.dtype) - share * (there - anchor)
            with jax.numpy_dtype_promotion("standard"):
                dtype = jnp.promote_types(update.dtype, param.dtype)
            return jnp.where(h > 0, moved.astype(dtype), update.astype(dtype))

        updates = trees.merge_synapses(land, gains, updates, params, memory.anchor)
        memory = _after("proximal()", memory, params, signals, decay, prior, every)
        return updates, ProximalState(memory, squares)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def penalty(params: PyTree, memory: Any, strength: Number = 1.0) -> jax.Array:
    """``strength / 2 * sum(precision * (params - anchor)^2)``, a differentiable number.

    Args:
      params: pytree of arrays.
      memory: a :class:`Posterior`, or a state of this package that has one as its ``memory``.
      strength: a number.

    Returns:
      Scalar, float32 (float64 beside a float64 memory).

    Raises:
      ValueError: the memory belongs to other parameters.

    >>> memory = Posterior({"w": jnp.array([1.0])}, {"w": jnp.array([4.0])})
    >>> penalty({"w": jnp.array([3.0])}, memory, 0.5).item()  # 0.5 / 2 * 4 * 2^2
    4.0
    """
    held = getattr(memory, "memory", memory)

    def term(h: jax.Array, anchor: jax.Array, param: jax.Array) -> jax.Array:
        h = wide(h)
        return jnp.sum(h * jnp.square(param.astype(h.dtype) - anchor.astype(h.dtype)))

    terms = jax.tree.leaves(trees.map_synapses(term, held.precision, held.mean, params))
    if not terms:
        return jnp.zeros(())
    dtype = max((t.dtype for t in terms), key=lambda d: jnp.dtype(d).itemsize)
    total = jnp.sum(jnp.stack([t.astype(dtype) for t in terms]))
    return 0.5 * cast(strength, total) * total


def merge(
    old: Posterior,
    new: Posterior,
    *,
    form: Form = "online",
    decay: Number = 1.0,
    prior: Number = 0.0,
) -> Posterior:
    """One quadratic of two: what a boundary makes of the memory and a new belief.

    ``precision = decay * max(old - prior, 0) + new``; the anchor is the new mean (online), or the
    mean of both weighted by these precisions (separate), which is exact. Leaves of which the new
    belief says nothing stay as they are.

    Args:
      old: the memory.
      new: the belief of the task just learnt.
      form: as for :func:`elastic`.
      decay: as for :func:`elastic`.
      prior: as for :func:`elastic`.

    Returns:
      The memory after the boundary, in the dtypes of the old one.

    Raises:
      ValueError: a number out of range; the beliefs are of other parameters; a mean that is not
        finite or a precision that is not finite or below zero, where values are known.

    >>> first = Posterior({"w": jnp.array([0.0])}, {"w": jnp.array([1.0])})
    >>> second = Posterior({"w": jnp.array([4.0])}, {"w": jnp.array([3.0])})
    >>> both = merge(first, second, form="separate")
    >>> both.mean["w"].tolist(), both.precision["w"].tolist()
    ([3.0], [4.0])
    """
    _kind(form, decay, prior, None)
    _check(old.precision, new)

    def kept(s: jax.Array) -> jax.Array:
        return cast(decay, s) * jnp.maximum(s - cast(prior, s), 0)

    def add(s: jax.Array, t: Any) -> jax.Array:
        return s if trees.is_masked(t) else kept(s) + t.astype(s.dtype)

    def between(s: jax.Array, m: jax.Array, n: Any, t: Any) -> jax.Array:
        if trees.is_masked(t):
            return m
        n, t = n.astype(s.dtype), t.astype(s.dtype)
        total = kept(s) + t
        share = jnp.where(total > 0, t / jnp.where(total > 0, total, 1), 1)
        return m + (n - m) * share

    # In the dtypes of the old precision, whatever the means are in.
    mean = trees.map_synapses(lambda s, m: wide(m).astype(wide(s).dtype), old.precision, old.mean)
    precision = trees.map_synapses(wide, old.precision)
    if form == "online":
        anchor = copied(mean, trees.map_synapses(_beside, precision, new.mean, new.precision))
    else:
        anchor = trees.map_synapses(between, precision, mean, new.mean, new.precision)
    return Posterior(anchor, trees.map_synapses(add, precision, new.precision))


def _beside(s: jax.Array, n: Any, t: Any) -> Any:
    del s
    return t if trees.is_masked(t) else n


def _kind(form: str, decay: Number, prior: Number, every: Any) -> type[ElasticState]:
    if form not in ("online", "separate"):
        raise ValueError(f'form must be "online" or "separate", not {form!r}.')
    check_share("decay", decay)
    check_strength("prior", prior)
    if every is not None and known(every):
        whole = not isinstance(every, bool) and np.issubdtype(np.asarray(every).dtype, np.integer)
        if not whole or not np.all(np.asarray(every) >= 1):
            raise ValueError(f"every must be a number of updates >= 1, or None, not {every!r}.")
    return ElasticState if form == "online" else SeparateElasticState


def _blank(
    kind: type[ElasticState], params: PyTree, select: trees.Select, decay: Number, prior: Number
) -> ElasticState:
    nothing = nothing_yet(params, select)
    another = jax.tree.map(jnp.zeros_like, nothing)  # buffers may not be shared
    step = jnp.zeros((), jnp.int32)
    return kind(nothing, another, number(decay), number(prior), step)


def _after(
    who: str,
    state: ElasticState,
    params: PyTree,
    signals: Mapping[str, Any],
    decay: Number,
    prior: Number,
    every: Any,
) -> ElasticState:
    """The state after an update, which may be a boundary."""
    state = state._replace(
        decay=number(decay), prior=number(prior), step=optax.safe_increment(state.step)
    )
    if every is None:
        return state
    if signals.get("posterior") is None:
        raise ValueError(
            f"{who} with every= consolidates what is believed, and no posterior= reaches it: wrap "
            "the chain in an.with_posterior(estimator, ...), or leave every= out and call "
            "an.consolidation.consolidate(opt_state, params, belief) at boundaries."
        )
    belief = as_posterior(signals["posterior"], params, who)
    due = state.step % jnp.asarray(every).astype(jnp.int32) == 0
    return jax.lax.cond(due, _merged, _same, state, belief)


def _merged(state: ElasticState, belief: Posterior) -> ElasticState:
    both = merge(
        state.memory,
        Posterior(belief.mean, belief.precision),
        form=typing.cast("Form", state.form),
        decay=state.decay,
        prior=state.prior,
    )
    return state._replace(anchor=both.mean, precision=both.precision)


def _same(state: ElasticState, belief: Posterior) -> ElasticState:
    del belief
    return state


def _squared(
    metric: RootMeanSquare, squares: Average | tuple[()], signals: Mapping[str, Any]
) -> Average:
    grads = signals.get("grads")
    if grads is None:
        raise ValueError(
            "proximal(metric=RootMeanSquare(...)) keeps mean squares of the raw gradients, and no "
            "grads= reaches it: wrap the chain in an.pruning.with_signals(...) or "
            "an.with_posterior(estimator, ...)."
        )
    assert isinstance(squares, Average)
    new = trees.map_synapses(lambda v, g: jnp.square(g.astype(v.dtype)), squares.value, grads)
    return squares.then(metric.decay, new)


def _check(like: PyTree, belief: Posterior) -> None:
    """Refuses a belief that fits none of the leaves, or is none."""
    names, met = iter(trees.paths(like)), []

    def look(h: jax.Array, mean: Any, precision: Any) -> None:
        name = next(names)
        if trees.is_masked(mean) != trees.is_masked(precision):
            raise ValueError(f"the belief has a mean or a precision of {name!r}, but not both.")
        if trees.is_masked(precision):
            return
        met.append(name)
        for what, leaf, good in (
            ("mean", mean, np.isfinite),
            ("precision", precision, lambda x: np.isfinite(x) & (x >= 0)),
        ):
            if jnp.shape(leaf) != jnp.shape(h):
                raise ValueError(
                    f"the {what} of {name!r} has shape {jnp.shape(leaf)} where the memory has "
                    f"{jnp.shape(h)}: give a belief of the parameters that are updated."
                )
            if known(leaf) and getattr(leaf, "is_fully_addressable", True):
                bad = int(np.sum(~good(np.asarray(leaf, np.float64))))
                if bad:
                    raise ValueError(
                        f"the {what} of {name!r} is not finite"
                        f"{' and at least 0' if what == 'precision' else ''} ({bad} of "
                        f"{np.size(leaf)} elements): repair the belief before the boundary."
                    )

    trees.map_synapses(look, like, belief.mean, belief.precision)
    if not met:
        raise ValueError(
            f"the belief says nothing of the leaves that are protected "
            f"({', '.join(trees.paths(like)) or 'none'}): widen its select=, or the rule's."
        )
