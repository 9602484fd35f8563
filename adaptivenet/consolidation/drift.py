r"""Boundaries that nobody announces: a stream of losses tells when the task has changed.

A *detector* is a pair of pure functions, ``init() -> state`` and ``update(state, value) -> (state,
alarm)``, that scan and map over a population. (Values that are not finite pass without a trace.)
Cumulative sums (:func:`page_hinkley`, :func:`cusum`) add up small excesses, :func:`novelty` looks
at one value at a time; :func:`adaptivenet.consolidation.changepoint.changepoint` is Bayes' rule for
when the last change was.

:func:`on_drift` is a wrapper that makes every alarm a boundary: the rules of consolidation in the
chain take note without being told::

    tx = on_drift(optax.chain(elastic(1.0), optax.adam(1e-3)), cusum(), delay=200)
    tx = with_posterior(fisher(0.999), tx)
    value, grads = jax.value_and_grad(loss)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params, value=value)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptivenet import trees
from adaptivenet.chains import hand_on, operands
from adaptivenet.consolidation.boundary import (
    check_share,
    check_strength,
    consolidate,
    copied,
    nothing_yet,
)
from adaptivenet.posterior._states import check_positive, scalar
from adaptivenet.posterior.gaussian import Posterior

PyTree = Any
Number = Any  # a Python number, or a traced scalar

__all__ = [
    "CusumState",
    "Detector",
    "NoveltyState",
    "OnDriftState",
    "PageHinkleyState",
    "cusum",
    "novelty",
    "on_drift",
    "page_hinkley",
]


class Detector(NamedTuple):
    """Tells from a stream of numbers when it changes.

    Attributes:
      init: ``init() -> state``.
      update: ``update(state, value) -> (state, alarm)``; ``alarm`` is a bool scalar.
    """

    init: Callable[[], Any]
    update: Callable[[Any, Any], tuple[Any, jax.Array]]


def guarded(
    init: Callable[[], Any], step: Callable[[Any, jax.Array], tuple[Any, jax.Array]]
) -> Detector:
    """A detector of its two functions, which values that are not finite do not reach.

    Args:
      init: makes the state.
      step: takes the state and a finite scalar.

    Returns:
      A detector.
    """

    def update(state: Any, value: Any) -> tuple[Any, jax.Array]:
        value = scalar(value)
        good = jnp.isfinite(value)
        after, alarm = step(state, jnp.where(good, value, 0.0))
        after = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, state)
        return after, alarm & good

    return Detector(init, update)


def _restarted(alarm: jax.Array, init: Callable[[], Any], state: Any) -> Any:
    """The state, or that of the beginning after an alarm: what follows is another regime."""
    return jax.tree.map(lambda new, old: jnp.where(alarm, new, old), init(), state)


def increment(count: jax.Array) -> jax.Array:
    """The next number of an int32 counter, which stays at the largest."""
    return jnp.asarray(optax.safe_increment(count))


def _zeros(number: int) -> list[jax.Array]:
    return [jnp.zeros((), jnp.result_type(float)) for _ in range(number)]


# --- cumulative sums -----------------------------------------------------------------------------


class PageHinkleyState(NamedTuple):
    """State of :func:`page_hinkley`: scalars.

    Attributes:
      count: int32, values since the last alarm.
      mean: their mean.
      total: the cumulative sum of what they exceed the running mean by, less ``delta`` each.
      least: its minimum so far.
    """

    count: jax.Array
    mean: jax.Array
    total: jax.Array
    least: jax.Array


def page_hinkley(threshold: Number, *, delta: Number = 0.005, warmup: Number = 30) -> Detector:
    r"""The test of Page and Hinkley: alarms when values have been above their mean for long.

    With :math:`m_t = \sum_{i \le t} (x_i - \bar x_i - \delta)` and the mean :math:`\bar x_i` of
    the values so far, it alarms when :math:`m_t - \min_{i \le t} m_i` exceeds the threshold, and
    begins anew. Threshold and delta have the unit of the values.

    Args:
      threshold: positive; the larger, the fewer false alarms and the longer the delay.
      delta: excess that is tolerated, such as half of the smallest jump that matters; not negative.
      warmup: values before the first alarm, and between alarms.

    Returns:
      A detector.

    Raises:
      ValueError: a number is out of range.

    References:
      Page, "Continuous inspection schemes", Biometrika 41 (1954); Hinkley, "Inference about the
      change-point from cumulative sum tests", Biometrika 58 (1971).

    >>> detector = page_hinkley(3.0, warmup=2)
    >>> _, alarms = jax.lax.scan(detector.update, detector.init(), jnp.array([0, 0, 0, 4.0, 4.0]))
    >>> alarms.tolist()
    [False, False, False, False, True]
    """
    check_positive("threshold", threshold)
    check_strength("delta", delta)
    check_strength("warmup", warmup)

    def init() -> PageHinkleyState:
        mean, total, least = _zeros(3)
        return PageHinkleyState(jnp.zeros((), jnp.int32), mean, total, least + jnp.inf)

    def step(state: PageHinkleyState, value: jax.Array) -> tuple[PageHinkleyState, jax.Array]:
        count = increment(state.count)
        mean = state.mean + (value - state.mean) / count.astype(value.dtype)
        total = state.total + (value - mean - scalar(delta))
        state = PageHinkleyState(count, mean, total, jnp.minimum(state.least, total))
        alarm = (state.total - state.least > scalar(threshold)) & (
            count.astype(value.dtype) > scalar(warmup)
        )
        return _restarted(alarm, init, state), alarm

    return guarded(init, step)


class CusumState(NamedTuple):
    """State of :func:`cusum`: scalars.

    Attributes:
      count: int32, values since the last alarm.
      mean: of the values that the reference was taken from.
      squares: the sum of their squared deviations.
      high: the cumulative sum for a rise.
      low: the cumulative sum for a fall.
    """

    count: jax.Array
    mean: jax.Array
    squares: jax.Array
    high: jax.Array
    low: jax.Array


def cusum(
    threshold: Number = 10.0,
    *,
    slack: Number = 0.5,
    warmup: int = 50,
    reference: tuple[Number, Number] | None = None,
    two_sided: bool = False,
) -> Detector:
    r"""Cumulative sums of standardised values, against a reference that is fixed.

    :math:`S_t = \max(0, S_{t-1} + z_t - k)` with :math:`z = (x - \mu) / \sigma`; it alarms when S
    exceeds the threshold. Mean and deviation are those of the first ``warmup`` values, which never
    alarm, and are taken anew after an alarm. For normal values and a known reference false alarms
    are about ``exp(2 k threshold) / (2 k^2)`` steps apart (a reference of few values makes them
    more frequent), and a rise by d deviations is found in ``threshold / (d - k)``.

    Args:
      threshold: in standard deviations, positive.
      slack: k, in standard deviations, not negative; half of the smallest rise that matters.
      warmup: values that the reference is taken from, at least 2.
      reference: mean and standard deviation, where they are known; there is no warm-up then.
      two_sided: whether a fall alarms as well. (Losses fall while a network learns.)

    Returns:
      A detector.

    Raises:
      ValueError: a number is out of range.

    References:
      Page, "Continuous inspection schemes", Biometrika 41 (1954); Siegmund, "Sequential analysis",
      Springer 1985, for the distances between alarms.

    >>> detector = cusum(3.0, reference=(0.0, 1.0))
    >>> _, alarms = jax.lax.scan(detector.update, detector.init(), jnp.array([0.0, 2.0, 2.0, 2.0]))
    >>> alarms.tolist()  # sums 0, 1.5, 3.0, 4.5
    [False, False, False, True]
    """
    check_positive("threshold", threshold)
    check_strength("slack", slack)
    if reference is None and warmup < 2:
        raise ValueError(f"warmup must be at least 2, not {warmup}: it sets the reference.")
    if reference is not None:
        check_positive("the standard deviation of reference", reference[1])

    def init() -> CusumState:
        return CusumState(jnp.zeros((), jnp.int32), *_zeros(4))

    def step(state: CusumState, value: jax.Array) -> tuple[CusumState, jax.Array]:
        count = increment(state.count)
        if reference is None:
            watching = state.count >= warmup
            gap = value - state.mean
            mean = state.mean + gap / count.astype(value.dtype)
            squares = state.squares + gap * (value - mean)
            mean = jnp.where(watching, state.mean, mean)
            squares = jnp.where(watching, state.squares, squares)
            deviation = jnp.sqrt(squares / (warmup - 1))
        else:
            watching, mean, squares = jnp.ones((), bool), state.mean, state.squares
            mean, deviation = scalar(reference[0]), scalar(reference[1])
        # A reference that does not vary at all makes any difference infinite, and none nothing.
        z = jnp.where(value == mean, 0.0, (value - mean) / deviation)
        k = scalar(slack)
        high = jnp.where(watching, jnp.maximum(state.high + z - k, 0.0), 0.0)
        low = jnp.where(watching, jnp.maximum(state.low - z - k, 0.0), 0.0)
        worst = jnp.maximum(high, low) if two_sided else high
        alarm = worst > scalar(threshold)
        return _restarted(alarm, init, CusumState(count, mean, squares, high, low)), alarm

    return guarded(init, step)


class NoveltyState(NamedTuple):
    """State of :func:`novelty`: scalars.

    Attributes:
      count: int32, values since the last alarm.
      mean: running mean.
      variance: running variance.
      score: how many standard deviations the last value was above the mean of those before it.
    """

    count: jax.Array
    mean: jax.Array
    variance: jax.Array
    score: jax.Array


def novelty(threshold: Number = 6.0, *, decay: Number = 0.99, warmup: int = 50) -> Detector:
    """Alarms at a value that is far above the running mean of those before it.

    Mean and variance are exponential averages, plain ones until these have as many values as they
    average over. After an alarm they are taken anew.

    Args:
      threshold: in standard deviations, positive.
      decay: of the averages, in [0, 1].
      warmup: values before an alarm, at least 2.

    Returns:
      A detector; the state's ``score`` is a measure of novelty in itself.

    Raises:
      ValueError: a number is out of range.

    >>> detector = novelty(6.0, warmup=4)
    >>> values = jnp.array([1.0, 2.0, 1.0, 2.0, 1.0, 9.0])
    >>> _, alarms = jax.lax.scan(detector.update, detector.init(), values)
    >>> alarms.tolist()
    [False, False, False, False, False, True]
    """
    check_positive("threshold", threshold)
    check_share("decay", decay)
    if warmup < 2:
        raise ValueError(f"warmup must be at least 2, not {warmup}.")

    def init() -> NoveltyState:
        return NoveltyState(jnp.zeros((), jnp.int32), *_zeros(3))

    def step(state: NoveltyState, value: jax.Array) -> tuple[NoveltyState, jax.Array]:
        count = increment(state.count)
        gap = value - state.mean
        score = jnp.where(gap == 0, 0.0, gap / jnp.sqrt(state.variance))
        score = jnp.where(state.count >= warmup, score, 0.0)
        rate = jnp.maximum(1.0 - scalar(decay), 1.0 / count.astype(value.dtype))
        mean = state.mean + rate * gap
        variance = (1.0 - rate) * (state.variance + rate * jnp.square(gap))
        alarm = score > scalar(threshold)
        after = _restarted(alarm, init, NoveltyState(count, mean, variance, score))
        return after._replace(score=score), alarm

    return guarded(init, step)


# --- boundaries by themselves --------------------------------------------------------------------


class OnDriftState(NamedTuple):
    """State of :func:`on_drift`.

    Attributes:
      detector: state of the detector.
      inner: state of the chain.
      alarm: bool scalar, whether the last update was a boundary.
      alarms: int32 scalar, how many there were.
      age: int32 scalar, updates so far.
      snapshots: the parameters as they were, an older and a newer copy, where there is a delay.
    """

    detector: Any
    inner: Any
    alarm: jax.Array
    alarms: jax.Array
    age: jax.Array
    snapshots: tuple[PyTree, ...] = ()


def on_drift(
    inner: optax.GradientTransformation,
    detector: Detector,
    *,
    act: Callable[..., PyTree] = consolidate,
    delay: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Makes every alarm of a detector a boundary: no one has to say that the task has changed.

    Every update tells the detector the loss, ``value=``. When it alarms,
    :func:`adaptivenet.consolidation.boundary.consolidate` is called on the state of the chain
    before this update goes through it, in a ``lax.cond``. The belief is the extra argument
    ``posterior=`` where an outer :func:`adaptivenet.posterior.with_posterior` hands one on, else
    that in the state of the chain.

    **Delay.** When the alarm rings, the parameters have learnt the new task for as long as it took
    to find out. With ``delay`` what is remembered are the parameters of ``delay`` to ``2 delay``
    updates before (at first, of the beginning), which takes two copies of them. The mean of a
    :class:`Posterior` is moved there; its precision is that of now.

    Args:
      inner: a chain with a rule of consolidation in it.
      detector: such as :func:`cusum`.
      act: ``act(inner_state, params, posterior, **signals) -> inner_state``, which must keep
        structure and dtypes.
      delay: updates, about the detector's delay, or more; 0 remembers the parameters of now.

    Returns:
      A transformation, whose ``update`` needs ``value=``; what else it is told goes on to the
      members of the chain, and to the rules.

    Raises:
      TypeError: ``inner`` is no transformation, or ``detector`` none.
      ValueError: a negative delay; at ``init``: nothing in the chain consolidates. At ``update``:
        no parameters, no value, or a rule needs a belief and there is none.

    References:
      Aljundi, Kelchtermans and Tuytelaars, "Task-free continual learning", CVPR 2019, for
      boundaries taken from the loss (there from its plateaus).

    >>> from adaptivenet.consolidation.elastic import elastic
    >>> tx = on_drift(optax.chain(elastic(1.0), optax.sgd(0.1)), cusum(3.0, reference=(0.0, 1.0)))
    >>> params = {"w": jnp.ones(1)}
    >>> state, belief = tx.init(params), Posterior(params, params)
    >>> for loss in (0.0, 9.0):
    ...     _, state = tx.update(params, state, params, value=loss, posterior=belief)
    >>> state.alarms.item(), state.inner[0].anchor["w"].tolist()
    (1, [1.0])
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"on_drift(inner, detector) wraps an optax transformation, not {inner!r}: give "
            "optax.chain(...)."
        )
    if not all(callable(getattr(detector, part, None)) for part in ("init", "update")):
        raise TypeError(
            f"{detector!r} is no detector: give one such as an.consolidation.cusum(), or a pair "
            "with init() and update(state, value)."
        )
    if delay < 0:
        raise ValueError(f"delay must not be negative, not {delay}.")
    chain = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> OnDriftState:
        state = chain.init(params)
        if act is consolidate:
            _check_consolidates(state)
        empty = nothing_yet(params)
        snapshots = tuple(copied(empty, params) for _ in range(2 if delay else 0))
        zero = jnp.zeros((), jnp.int32)
        return OnDriftState(
            detector.init(), state, jnp.zeros((), bool), zero, jnp.zeros_like(zero), snapshots
        )

    # Defined here, with all that it uses as arguments, so that eager steps compile it only once.
    def boundary(
        before: PyTree, params: PyTree, snapshots: tuple[PyTree, ...], signals: dict[str, Any]
    ) -> PyTree:
        told = dict(signals)
        belief = told.pop("posterior", None)
        if delay:
            params = trees.merge_synapses(
                lambda old, now: old.astype(now.dtype), snapshots[0], params
            )
            if isinstance(belief, Posterior):
                mean = trees.map_synapses(lambda m, x: x.astype(m.dtype), belief.mean, params)
                belief = belief._replace(mean=mean)
        return act(before, params, belief, **told)

    def update(
        updates: PyTree,
        state: OnDriftState,
        params: PyTree | None = None,
        *,
        value: Any = None,
        **extra: Any,
    ) -> tuple[PyTree, OnDriftState]:
        if params is None:
            raise ValueError(
                "on_drift() needs the parameters: call tx.update(grads, opt_state, params, "
                "value=loss)."
            )
        if value is None or jnp.ndim(value) != 0:
            raise ValueError(
                "on_drift() needs the loss, a scalar: call tx.update(grads, opt_state, params, "
                "value=loss)."
            )
        watching, alarm = detector.update(state.detector, value)
        signals = {"value": value, **extra}
        arrays, others = operands(signals)

        def closed(before: PyTree, params: PyTree, snapshots: Any, arrays: Any) -> PyTree:
            return boundary(before, params, snapshots, {**arrays, **others})

        happen = closed if others else boundary
        mine = jax.lax.cond(alarm, happen, _as_it_is, state.inner, params, state.snapshots, arrays)
        snapshots = state.snapshots
        if delay:
            older, newer = snapshots
            turn = state.age % delay == 0
            snapshots = (
                trees.map_synapses(lambda a, b: jnp.where(turn, b, a), older, newer),
                trees.map_synapses(
                    lambda a, p: jnp.where(turn, p.astype(a.dtype), a), newer, params
                ),
            )
        updates, mine = hand_on("on_drift()", chain, updates, mine, params, signals)
        alarms = state.alarms + alarm.astype(jnp.int32)
        age = increment(state.age)
        return updates, OnDriftState(watching, mine, alarm, alarms, age, snapshots)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _as_it_is(before: PyTree, *rest: Any) -> PyTree:
    del rest
    return before


def _check_consolidates(state: PyTree) -> None:
    def holds(node: Any) -> bool:
        return callable(getattr(node, "consolidated", None))

    if not any(holds(node) for node in jax.tree.leaves(state, is_leaf=holds)):
        raise ValueError(
            "on_drift() finds nothing in the chain that consolidates: add a rule, such as "
            "optax.chain(an.consolidation.elastic(1.0), optax.adam(1e-3)), or give act=."
        )
