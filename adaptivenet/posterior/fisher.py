"""The Fisher information as a belief that is kept while a network trains.

Two estimators for :func:`adaptivenet.posterior.with_posterior`, which differ in what is squared:

- :func:`fisher` averages squared gradients of *single examples*, which the training loop hands in
  (:func:`value_and_squared_grads` computes them beside the gradient);
- :func:`squared_gradient` averages the square of the *mini-batch* gradient, which costs nothing and
  is not the Fisher information: see there.

Both make the belief of a Laplace approximation around the parameters as they are:
``precision = examples * running mean + prior``. Between tasks, or once, the exact diagonal of
:func:`adaptivenet.posterior.fisher_exact.fisher_diagonal` is the better choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet import trees
from adaptivenet.posterior._arrays import wide
from adaptivenet.posterior.fisher_exact import Plan, examples, in_chunks
from adaptivenet.posterior.gaussian import Posterior

PyTree = Any
Number = float | jax.Array

__all__ = [
    "Fisher",
    "FisherState",
    "SquaredGradient",
    "fisher",
    "squared_gradient",
    "value_and_squared_grads",
]


class FisherState(NamedTuple):
    """A running mean of squared gradients, without the bias of its start, and how it is scaled.

    Attributes:
      mean_square: pytree of float32 (float64 for float64 parameters); masked nodes for leaves that
        are not floating.
      weight: scalar, the sum of the weights of all that was averaged.
      scale: scalar, what the mean square is multiplied by.
      prior: scalar, precision of the prior.
    """

    mean_square: PyTree
    weight: jax.Array
    scale: jax.Array
    prior: jax.Array

    def posterior(self, params: PyTree) -> Posterior:
        """The belief; before the first gradient its precision is that of the prior."""
        precision = jax.tree.map(
            lambda s: s * self.scale.astype(s.dtype) + self.prior.astype(s.dtype), self.mean_square
        )
        return Posterior(trees.map_synapses(lambda _, p: p, self.mean_square, params), precision)


@dataclass(frozen=True)
class _Streaming:
    decay: Number
    prior: Number
    scale: Number

    def init(self, params: PyTree) -> FisherState:
        """No gradient yet."""

        def zeros(leaf: Any) -> Any:
            leaf = jnp.asarray(leaf)
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                return optax.MaskedNode()
            return jnp.zeros(leaf.shape, wide(leaf).dtype)

        start = jnp.zeros((), jnp.float32)
        return FisherState(jax.tree.map(zeros, params), start, *self._scales())

    def posterior(self, state: FisherState, params: PyTree) -> Posterior:
        """The belief."""
        return state.posterior(params)

    def _scales(self) -> tuple[jax.Array, jax.Array]:
        return jnp.asarray(self.scale, jnp.float32), jnp.asarray(self.prior, jnp.float32)

    def _then(self, state: FisherState, squares: PyTree) -> FisherState:
        # sum_i (1 - decay) decay^(t - i) x_i / (1 - decay^t), kept up to date term by term.
        rest = 1.0 - jnp.asarray(self.decay, jnp.float32)
        weight = state.weight + (1.0 - state.weight) * rest
        step = rest / weight
        mean_square = trees.map_synapses(
            lambda old, new: old + (new.astype(old.dtype) - old) * step.astype(old.dtype),
            state.mean_square,
            squares,
        )
        return FisherState(mean_square, weight, *self._scales())


@dataclass(frozen=True)
class Fisher(_Streaming):
    """Running mean of squared per-example gradients: see :func:`fisher`."""

    def update(
        self, state: FisherState, grads: PyTree, params: PyTree, **signals: Any
    ) -> FisherState:
        """One more batch, whose mean squares are ``signals["squared_grads"]``."""
        del grads, params
        if signals.get("squared_grads") is None:
            raise ValueError(
                "fisher() averages squared gradients of single examples: call tx.update(grads, "
                "opt_state, params, squared_grads=...) with those of an.posterior."
                "value_and_squared_grads(loss, params, batch). (squared_gradient() needs none, but "
                "squares the gradient of the batch, which is no Fisher information.)"
            )
        return self._then(state, _beside(state.mean_square, signals["squared_grads"]))


@dataclass(frozen=True)
class SquaredGradient(_Streaming):
    """Running mean of squared mini-batch gradients: see :func:`squared_gradient`."""

    def update(
        self, state: FisherState, grads: PyTree, params: PyTree, **signals: Any
    ) -> FisherState:
        """One more gradient."""
        del params, signals
        squares = trees.map_synapses(lambda _, g: jnp.square(wide(g)), state.mean_square, grads)
        return self._then(state, squares)


def fisher(decay: Number = 0.99, *, prior: Number = 1e-12, examples: Number = 1.0) -> Fisher:
    """The empirical Fisher information of single examples, as a running belief.

    The loop hands the squares in::

        value, grads, squares = value_and_squared_grads(loss, params, batch)
        updates, state = tx.update(grads, state, params, squared_grads=squares)

    (A mean of squares taken with labels drawn from the model estimates the true Fisher
    information instead; the estimator averages what it is given.)

    Args:
      decay: share of the past that is kept at each step, in [0, 1), possibly traced. The mean is
        corrected for the bias of its start. (Under ``optax.inject_hyperparams`` beside bfloat16
        parameters give ``hyperparam_dtype=jnp.float32``: 0.999 would become 1.)
      prior: precision of the prior, positive. The default is next to nothing, and only keeps the
        precision positive: enough to rank synapses; give the true one to draw from the belief, or
        to compare it with another.
      examples: the number of examples in the data, which turns the mean into a sum. The default
        gives the information of a single example.

    Returns:
      An estimator for :func:`adaptivenet.posterior.with_posterior`.

    Raises:
      ValueError: a number out of range. At ``update``: no ``squared_grads``, or squares of other
        parameters.

    References:
      Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 114 (2017);
      Schwarz et al., "Progress & compress", ICML 2018, for the running mean; Kunstner et al.,
      "Limitations of the empirical Fisher approximation", NeurIPS 2019.

    >>> estimator, w = fisher(0.5, prior=1.0, examples=10), jnp.zeros(2)
    >>> state = estimator.init(w)
    >>> for squares in ([1.0, 0.0], [4.0, 3.0]):
    ...     state = estimator.update(state, w, w, squared_grads=jnp.array(squares))
    >>> estimator.posterior(state, w).precision.tolist()  # 10 (0.25 * 1 + 0.5 * 4) / 0.75 + 1
    [31.0, 21.0]
    """
    _check(decay, prior, examples=examples)
    return Fisher(decay, prior, examples)


def squared_gradient(
    decay: Number = 0.99,
    *,
    batch_size: Number = 1.0,
    prior: Number = 1e-12,
    examples: Number = 1.0,
) -> SquaredGradient:
    """The square of the mini-batch gradient as a running belief: cheap, and biased.

    What Adam keeps, under its own name: with g_i the gradient of example i and B examples a batch,
    its expectation is ``(E g)^2 + Var(g) / B``, where the Fisher information of the empirical kind
    is ``E[g^2] = (E g)^2 + Var(g)``. Near a stationary point, where ``E g`` is small, it is B times
    too small and ``batch_size=B`` repairs that; elsewhere that factor overstates the share of
    ``(E g)^2``. Its order of synapses differs, too, wherever ``E g`` matters. Results of elastic
    weight consolidation depend on which of the two is used; :func:`fisher` keeps the other.

    Args:
      decay: share of the past that is kept at each step, in [0, 1), possibly traced. The mean is
        corrected for the bias of its start.
      batch_size: factor for the shrinkage of the variance; 1 takes the squares as they are.
      prior: precision of the prior, positive; see :func:`fisher`.
      examples: the number of examples in the data; see :func:`fisher`.

    Returns:
      An estimator for :func:`adaptivenet.posterior.with_posterior`, whose precision is
      ``examples * batch_size * running mean + prior``.

    Raises:
      ValueError: a number out of range.

    References:
      van de Ven, "On the computation of the Fisher information in continual learning", ICLR blog
      posts 2025 (the variant "batched"); Kingma and Ba, "Adam", ICLR 2015.

    >>> estimator, w = squared_gradient(0.9, prior=1.0, examples=10), jnp.zeros(2)
    >>> state = estimator.update(estimator.init(w), jnp.array([3.0, -1.0]), w)
    >>> estimator.posterior(state, w).precision.tolist()
    [91.0, 11.0]
    """
    _check(decay, prior, examples=examples, batch_size=batch_size)
    return SquaredGradient(decay, prior, examples * batch_size)


def value_and_squared_grads(
    loss: Callable[[PyTree, Any], jax.Array],
    params: PyTree,
    batch: PyTree,
    *,
    chunk: int | None = None,
) -> tuple[jax.Array, PyTree, PyTree]:
    """Mean loss, mean gradient and mean squared per-example gradient of a batch, in one pass.

    Dense layers take one more matrix product each, without a gradient of a single example: see
    :mod:`adaptivenet.posterior.fisher_exact`. Other parameters go through per-example gradients,
    for whose memory there is ``chunk``. Call it within ``jax.jit``.

    Args:
      loss: ``loss(params, example) -> scalar``, of one example without an axis of examples. (Leave
        penalties on the parameters out: they would be squared with every example.)
      params: pytree of arrays.
      batch: pytree of arrays, examples along the first axis.
      chunk: examples at a time, to save memory; None takes all at once.

    Returns:
      ``(value, grads, squared_grads)``: a scalar, gradients of the dtypes of the parameters, and
      squares in float32 (float64 for float64 parameters). Leaves that are not floating have masked
      nodes.

    Raises:
      ValueError: the loss of one example is no floating scalar, or the batch is malformed.

    References:
      Goodfellow, "Efficient per-example gradient computations", arXiv:1510.01799, 2015.

    >>> data = {"x": jnp.array([[1.0], [2.0]]), "y": jnp.array([1.0, 0.0])}
    >>> def loss(params, one):
    ...     return jnp.square(one["x"] @ params["w"] - one["y"]) / 2
    >>> value, grads, squares = value_and_squared_grads(loss, {"w": jnp.array([1.0])}, data)
    >>> value.item(), grads["w"].tolist(), squares["w"].tolist()  # per example: 0 and 4
    (1.0, [2.0], [8.0])
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} must be a positive number of examples.")
    batch = jax.tree.map(jnp.asarray, batch)
    number = examples(batch, "the batch")
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    out = jax.eval_shape(loss, params, first)
    if not isinstance(out, jax.ShapeDtypeStruct) or out.shape != ():
        raise ValueError(
            "loss(params, example) must return a scalar for one example (without an axis of "
            f"examples), not {out}."
        )
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(f"loss(params, example) must be floating, not {out.dtype}.")
    plan = Plan(loss, params, first)

    def body(part: PyTree, fresh: jax.Array, places: jax.Array) -> PyTree:
        del places
        values, squares, grads = plan.squares(
            params, part, fresh, lambda out, fresh: fresh.astype(out.dtype)[None], linear=True
        )
        return jnp.sum(jnp.where(fresh, wide(values), 0.0)), squares, grads

    value, squares, grads = in_chunks(body, batch, number, chunk or number)

    def mean(leaf: jax.Array) -> jax.Array:
        return leaf / number

    grads = trees.map_synapses(lambda g, p: mean(g).astype(p.dtype), plan.tree(grads), params)
    return mean(value).astype(out.dtype), grads, plan.tree(list(map(mean, squares)))


def _check(decay: Number, prior: Number, **counts: Number) -> None:
    if not isinstance(decay, jax.core.Tracer) and not np.all(
        (np.asarray(decay) >= 0) & (np.asarray(decay) < 1)
    ):
        raise ValueError(f"decay must be in [0, 1), not {decay}.")
    for name, number in (("prior", prior), *counts.items()):
        if isinstance(number, jax.core.Tracer):
            continue
        value = np.asarray(number, np.float64)
        if not np.all((value > 0) & np.isfinite(value)):
            raise ValueError(f"{name} must be a positive number, not {number}.")


def _beside(tree: PyTree, squares: PyTree) -> PyTree:
    """The leaves of another tree at the paths of the first, which may have fewer."""
    there = dict(zip(trees.paths(squares), jax.tree.leaves(squares), strict=True))
    leaves, treedef = jax.tree.flatten(tree)
    found = []
    for name, leaf in zip(trees.paths(tree), leaves, strict=True):
        if name not in there:
            raise ValueError(
                f"squared_grads= has no leaf {name!r}; it has {', '.join(there) or '(none)'}. Give "
                "those of the parameters that are updated."
            )
        if jnp.shape(there[name]) != leaf.shape:
            raise ValueError(
                f"squared_grads= has shape {jnp.shape(there[name])} at {name!r}, but the parameter "
                f"has {leaf.shape}."
            )
        found.append(there[name])
    return jax.tree.unflatten(treedef, found)
