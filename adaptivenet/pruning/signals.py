"""Signals: what a chain of transformations knows of the gradients, handed to all its members.

A score or a regrowth rule asks for signals by name. :func:`with_signals` keeps them: it wraps the
chain that ends in ``prune``, sees the raw gradients before any optimizer does, and passes them on
as ``grads=``, with the readings of its estimators: extra arguments, which is optax's own protocol::

    tx = with_signals(
        optax.chain(optax.adam(1e-3), prune(..., score=fisher_tempered(), regrow=by_gradient(0.3))),
        fisher=signals.fisher(0.99),
    )

**Gradients of dead synapses.** ``prune`` lands on exact zeros, so the forward pass is that of a
dense network some of whose weights are zero, and its gradient is the dense one: at a dead synapse
it is the true derivative of the loss by a weight that is now zero, which is what RigL asks for.
Nothing has to be unmasked for it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet import moments, trees
from adaptivenet.chains import hand_on
from adaptivenet.moments import Average, Resetting
from adaptivenet.pruning.schedules import Number, known
from adaptivenet.pruning.scores import Score, supply

PyTree = Any

__all__ = [
    "Estimator",
    "SignalState",
    "Total",
    "accepting",
    "fisher",
    "momentum",
    "movement",
    "reading",
    "readings",
    "smoothed",
    "with_signals",
]


class Estimator(Protocol):
    """Keeps a signal up to date, step by step."""

    def init(self, params: PyTree) -> Any:
        """The state before the first gradient."""
        ...

    def update(self, state: Any, grads: PyTree, params: PyTree) -> Any:
        """The state after one more gradient, taken at ``params``."""
        ...

    def read(self, state: Any) -> PyTree:
        """The signal. A state with an attribute ``reading`` can be read out of the step as well."""
        ...


class Total(NamedTuple):
    """A sum over all steps; it starts anew where a synapse wakes.

    Attributes:
      value: pytree of float32; masked nodes for leaves that are not floating.
    """

    value: PyTree

    @property
    def reading(self) -> PyTree:
        """The sum itself."""
        return self.value


@dataclass(frozen=True)
class _Averaging:
    decay: Number

    def init(self, params: PyTree) -> Average:
        return Average(moments.zeros(params), jnp.zeros((), jnp.float32))

    def read(self, state: Average) -> PyTree:
        return state.reading


@dataclass(frozen=True)
class Fisher(_Averaging):
    """Running mean of squared gradients: see :func:`fisher`."""

    def update(self, state: Average, grads: PyTree, params: PyTree) -> Average:
        """One more gradient."""
        del params
        squares = trees.map_synapses(
            lambda _, g: jnp.square(g.astype(jnp.float32)), state.value, grads
        )
        return state.then(self.decay, squares)


@dataclass(frozen=True)
class Momentum(_Averaging):
    """Running mean of gradients: see :func:`momentum`."""

    def update(self, state: Average, grads: PyTree, params: PyTree) -> Average:
        """One more gradient."""
        del params
        return state.then(self.decay, grads)


@dataclass(frozen=True)
class Movement:
    """Accumulated movement away from zero: see :func:`movement`."""

    def init(self, params: PyTree) -> Total:
        """Zeros."""
        return Total(moments.zeros(params))

    def update(self, state: Total, grads: PyTree, params: PyTree) -> Total:
        """One more gradient."""
        return Total(
            trees.map_synapses(
                lambda s, g, w: s - g.astype(jnp.float32) * w.astype(jnp.float32),
                state.value,
                grads,
                params,
            )
        )

    def read(self, state: Total) -> PyTree:
        """The sum."""
        return state.reading


@dataclass(frozen=True)
class Smoothed(_Averaging):
    """Running mean of a score: see :func:`smoothed`."""

    score: Score

    def update(self, state: Average, grads: PyTree, params: PyTree) -> Average:
        """One more value of the score."""
        floats = trees.map_synapses(lambda _, w: w, state.value, params)
        slopes = trees.map_synapses(lambda _, g: g, state.value, grads)
        return state.then(self.decay, supply(self.score, floats, {"grads": slopes}))


def fisher(decay: Number = 0.99) -> Fisher:
    """The diagonal of the empirical Fisher information: a running mean of squared gradients.

    ``grads`` are those of a batch, so that this is the square of the mean gradient (as in Adam),
    not the mean square over examples; both rank synapses, but their scales differ with the batch.

    Args:
      decay: share of the past that is kept at each step, in [0, 1).

    Returns:
      An estimator for ``with_signals(..., fisher=fisher(0.99))``; its reading is a pytree of
      float32, free of the bias of its start.

    Raises:
      ValueError: the decay is outside [0, 1).

    References:
      LeCun et al., "Optimal brain damage", NeurIPS 1989; Kingma and Ba, "Adam", ICLR 2015.

    >>> estimator = fisher(0.9)
    >>> state = estimator.update(estimator.init(jnp.ones(2)), jnp.array([3.0, -1.0]), jnp.ones(2))
    >>> estimator.read(state).tolist()
    [9.0, 1.0]
    """
    return Fisher(_checked(decay))


def momentum(decay: Number = 0.9) -> Momentum:
    """A running mean of gradients, whatever optimizer follows.

    Args:
      decay: share of the past that is kept at each step, in [0, 1).

    Returns:
      An estimator for ``with_signals(..., momentum=momentum(0.9))``.

    Raises:
      ValueError: the decay is outside [0, 1).

    References:
      Dettmers and Zettlemoyer, "Sparse networks from scratch", arXiv:1907.04840, section 3.2.

    >>> estimator = momentum(0.5)
    >>> state = estimator.init(jnp.ones(()))
    >>> for gradient in (1.0, 4.0):
    ...     state = estimator.update(state, jnp.float32(gradient), jnp.ones(()))
    >>> estimator.read(state).item()
    3.0
    """
    return Momentum(_checked(decay))


def movement() -> Movement:
    """The sum of ``-w g`` over all steps: large where training moved a weight away from zero.

    Returns:
      An estimator for ``with_signals(..., movement=movement())``; its reading is signed, and starts
      anew at synapses that wake.

    References:
      Sanh et al., "Movement pruning", NeurIPS 2020, equation 4.

    >>> estimator = movement()
    >>> weight, gradient = jnp.float32(2.0), jnp.float32(-0.5)
    >>> estimator.read(estimator.update(estimator.init(weight), gradient, weight)).item()
    1.0
    """
    return Movement()


def smoothed(score: Score, decay: Number = 0.9) -> Smoothed:
    """A running mean of a score, for scores that a single batch makes noisy.

    The score is computed in every step. Use it as ``score=reading("NAME")`` in the pruner of
    ``with_signals(chain, NAME=smoothed(score))``.

    Args:
      score: a score of the parameters and ``grads``.
      decay: share of the past that is kept at each step, in [0, 1).

    Returns:
      An estimator.

    Raises:
      ValueError: the decay is outside [0, 1); at ``update``: the score asks for another signal.

    References:
      Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019, section 3.

    >>> from adaptivenet.pruning.scores import magnitude
    >>> estimator = smoothed(magnitude, 0.5)
    >>> state = estimator.init(jnp.ones(()))
    >>> for weight in (1.0, 4.0):
    ...     state = estimator.update(state, jnp.ones(()), jnp.float32(weight))
    >>> estimator.read(state).item()
    3.0
    """
    return Smoothed(_checked(decay), score)


def reading(name: str) -> Score:
    """A score that is a signal: the absolute value of what an estimator reads.

    Args:
      name: the name that the estimator has in :func:`with_signals`.

    Returns:
      A score, which asks for that signal.

    >>> reading("smooth")({"w": 1.0}, smooth={"w": jnp.float32(-2.0)})["w"].item()
    2.0
    """

    def score(params: PyTree, **signals: Any) -> PyTree:
        del params
        return jax.tree.map(jnp.abs, signals[name])

    kinds = inspect.Parameter
    wanted = [
        kinds("params", kinds.POSITIONAL_OR_KEYWORD),
        kinds(name, kinds.KEYWORD_ONLY),
        kinds("signals", kinds.VAR_KEYWORD),
    ]
    score.__signature__ = inspect.Signature(wanted)  # pyright: ignore[reportFunctionMemberAccess]
    score.__name__ = f"reading({name!r})"
    return score


class SignalState(NamedTuple):
    """State of :func:`with_signals`.

    Attributes:
      inner: state of the chain.
      estimates: states of the estimators, by name.
      resets: ``(EmptyState(),)`` if the moments of woken synapses are reset, else ``()``.
    """

    inner: Any
    estimates: dict[str, Any]
    resets: Any


def with_signals(
    inner: optax.GradientTransformation, *, reset: bool = True, **estimators: Estimator
) -> optax.GradientTransformationExtraArgs:
    """Hands the raw gradients, and what estimators know of them, to every inner transformation.

    ``grads=`` are the gradients that this transformation receives. (Inside ``optax.MultiSteps``
    these are the accumulated ones; around it, those of the last micro-batch.) An estimator is
    updated in every step, before the chain. Extra arguments that the caller passes go through, and
    win over signals of the same name. Members of the chain that take no extra arguments work as
    they are; the few that refuse them (line searches, schedule-free) go into :func:`accepting`.

    Args:
      inner: a chain, usually one that ends in :func:`adaptivenet.pruning.prune`.
      reset: after an event, set what the chain's state remembers of woken synapses to what ``init``
        gives (see :func:`adaptivenet.pruning.reset_moments`); in steps without an event nothing is
        computed for it.
      **estimators: estimators by the name of the signal that they supply.

    Returns:
      The transformation.

    Raises:
      TypeError: ``inner`` is no transformation, or an estimator is none.
      ValueError: an estimator is named as a signal that exists already; at ``update``: no
        parameters.

    References:
      Evci et al., "Rigging the lottery", ICML 2020, for gradients of dead weights.

    >>> from adaptivenet.pruning import prune
    >>> from adaptivenet.pruning.regrowth import by_gradient
    >>> tx = with_signals(optax.chain(optax.sgd(0.1), prune(0.5, regrow=by_gradient(0.5))))
    >>> params = {"w": jnp.array([[3.0, 2.0, 1.0, 0.1]])}
    >>> grads = {"w": jnp.array([[0.0, 0.0, 1.0, 5.0]])}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> state.inner[-1].mask["w"].tolist()  # 3 is kept, and 0.1 starts again from zero
    [[True, False, False, True]]
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            "with_signals() wraps an optax transformation, such as optax.chain(...), not "
            f"{inner!r}."
        )
    for name, estimator in estimators.items():
        if name in ("grads", "params", "key", "mask", "step", "kept"):
            raise ValueError(f"the signal {name!r} is there without an estimator; choose a name.")
        if not all(callable(getattr(estimator, part, None)) for part in ("init", "update", "read")):
            raise TypeError(
                f"{name}={estimator!r} is no estimator: it needs init, update and read, as "
                "an.pruning.signals.fisher(0.99) has."
            )
    chain = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> SignalState:
        return SignalState(
            inner=chain.init(params),
            estimates={name: each.init(params) for name, each in estimators.items()},
            resets=(optax.EmptyState(),) if reset else (),
        )

    def update(
        updates: PyTree, state: SignalState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, SignalState]:
        if params is None:
            raise ValueError(
                "with_signals() needs the parameters: call tx.update(grads, opt_state, params)."
            )
        estimates = {
            name: each.update(state.estimates[name], updates, params)
            for name, each in estimators.items()
        }
        signals = {name: each.read(estimates[name]) for name, each in estimators.items()}
        signals = {"grads": updates, **signals, **extra}
        updates, after = hand_on("with_signals()", chain, updates, state.inner, params, signals)
        new = state._replace(inner=after, estimates=estimates)
        return updates, resetting(state, new, params) if reset else new

    resetting = Resetting(init)
    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def accepting(
    inner: optax.GradientTransformation, *names: str
) -> optax.GradientTransformationExtraArgs:
    """A transformation that is given no extra arguments but those named.

    For the few members of a chain that refuse arguments they do not know, such as optax's line
    searches, or that use the name of a signal for themselves, such as
    ``optax.contrib.schedule_free``.

    Args:
      inner: the transformation.
      *names: extra arguments that it needs, such as ``"value"``.

    Returns:
      The transformation.

    >>> tx = optax.chain(accepting(optax.contrib.schedule_free_sgd(0.1)), optax.identity())
    >>> params = {"w": jnp.ones(2)}
    >>> updates, _ = with_signals(tx).update(params, with_signals(tx).init(params), params)
    >>> updates["w"].shape
    (2,)
    """
    taking = optax.with_extra_args_support(inner)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        extra = {name: value for name, value in extra.items() if name in names}
        return taking.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(taking.init, update)


def _is_state(node: Any) -> bool:
    return isinstance(node, SignalState)


def signal_states(opt_state: PyTree) -> list[SignalState]:
    """All states of :func:`with_signals` within an optimizer state, the outermost first."""
    found = []
    for node in jax.tree.leaves(opt_state, is_leaf=_is_state):
        if _is_state(node):
            found += [node, *signal_states(node.inner)]
    return found


def resets(opt_state: PyTree) -> bool:
    """Whether a wrapper in an optimizer state resets what is remembered of woken synapses."""

    def wraps(node: Any) -> bool:
        return hasattr(node, "resets") and hasattr(node, "inner")

    found = [node for node in jax.tree.leaves(opt_state, is_leaf=wraps) if wraps(node)]
    return any(node.resets or resets(node.inner) for node in found)


def readings(opt_state: PyTree) -> dict[str, PyTree]:
    """What the estimators within an optimizer state know, by the names of their signals.

    Args:
      opt_state: state of a chain that holds a :func:`with_signals`.

    Returns:
      The readings; where two have the same name, that of the outer one. (Gradients are not among
      them: they are not kept between steps. Neither are those of an estimator of your own whose
      state has no attribute ``reading``.)

    >>> tx, params = with_signals(optax.sgd(0.1), fisher=fisher(0.9)), {"w": jnp.ones(1)}
    >>> _, state = tx.update({"w": jnp.array([2.0])}, tx.init(params), params)
    >>> readings(state)["fisher"]["w"].tolist()
    [4.0]
    """
    found: dict[str, PyTree] = {}
    for state in reversed(signal_states(opt_state)):
        found |= {
            name: estimate.reading
            for name, estimate in state.estimates.items()
            if hasattr(estimate, "reading")
        }
    return found


def _checked(decay: Number) -> Number:
    if known(decay) and not np.all((np.asarray(decay) >= 0) & (np.asarray(decay) < 1)):
        raise ValueError(f"decay must be in [0, 1), not {decay}.")
    return decay
