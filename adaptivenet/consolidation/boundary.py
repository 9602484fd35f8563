"""Boundaries: the moment at which what was learnt becomes memory.

A rule of consolidation keeps its memory in its state, a NamedTuple with a method
``consolidated(params, posterior, **signals)`` that returns the state after a boundary: of the same
type, structure, shapes and dtypes, and with copies of whatever it keeps of its arguments, so that
a compiled step may donate parameters and optimizer state together. :func:`consolidate` finds every
such state within an optimizer state, however deep it lies, and calls the method.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet import trees
from adaptivenet.posterior._arrays import known
from adaptivenet.posterior._states import filled
from adaptivenet.posterior.gaussian import Posterior, find

PyTree = Any

__all__ = [
    "as_posterior",
    "check_share",
    "check_strength",
    "consolidate",
    "copied",
    "needs_belief",
    "nothing_yet",
    "number",
]


def consolidate(opt_state: PyTree, params: PyTree, posterior: Any = None, **signals: Any) -> PyTree:
    """The optimizer state after a boundary: a task was learnt, and is to be remembered.

    Every rule of consolidation in the state takes note, inner ones before the wrappers they are in.
    The function is pure, may be compiled, mapped over a population, or called within a scan::

        belief = Posterior(params, fisher_diagonal(apply, params, inputs))
        opt_state = consolidate(opt_state, params, belief)

    With ``nnx.Optimizer``, read the state and write it back::

        new = consolidate(
            nnx.as_pure(optimizer.opt_state), nnx.as_pure(nnx.state(model, nnx.Param)), belief
        )
        nnx.update(optimizer.opt_state, nnx.state(new))

    Args:
      opt_state: any optimizer state.
      params: the parameters as they are now.
      posterior: what is believed of them: a :class:`adaptivenet.posterior.Posterior`, what
        :func:`adaptivenet.posterior.laplace` returns, or its ``gaussian`` for rules that take
        correlations. By default the belief that the optimizer state holds, if it holds one (see
        :func:`adaptivenet.posterior.find`).
      **signals: whatever else a rule asks for.

    Returns:
      The state, of the same structure.

    Raises:
      ValueError: nothing in the state consolidates; a rule needs a belief and there is none; a
        belief of other parameters; a rule changed the structure, a shape or a dtype.

    >>> import optax
    >>> from adaptivenet.consolidation.elastic import elastic
    >>> tx, params = optax.chain(elastic(2.0), optax.sgd(1.0)), {"w": jnp.array([3.0])}
    >>> state = consolidate(tx.init(params), params, Posterior(params, {"w": jnp.array([0.25])}))
    >>> updates, _ = tx.update({"w": jnp.zeros(1)}, state, {"w": jnp.array([5.0])})
    >>> updates["w"]  # -2 * 0.25 * (5 - 3)
    Array([-1.], dtype=float32)
    """
    if not any(_holds(node) for node in jax.tree.leaves(opt_state, is_leaf=_holds)):
        raise ValueError(
            "consolidate() finds nothing in this optimizer state that consolidates: add a rule to "
            "the chain, such as optax.chain(an.consolidation.elastic(1.0), optax.adam(1e-3)), and "
            "pass the state of that chain (of nnx.Optimizer: nnx.as_pure(optimizer.opt_state))."
        )
    if posterior is None and any(
        _believes(n) for n in jax.tree.leaves(opt_state, is_leaf=_believes)
    ):
        posterior = find(opt_state, params)

    def visit(node: Any) -> Any:
        if not _holds(node):
            return node
        parts, treedef = jax.tree.flatten(node, is_leaf=lambda other: other is not node)
        node = treedef.unflatten([walk(part) for part in parts])
        after = node.consolidated(params, posterior, **signals)
        _check_alike(node, after)
        return after

    def walk(tree: Any) -> Any:
        return jax.tree.map(visit, tree, is_leaf=_holds)

    return walk(opt_state)


def needs_belief(who: str) -> ValueError:
    """The error of a rule that was given no belief.

    Args:
      who: the rule.

    Returns:
      The error, to be raised.
    """
    return ValueError(
        f"consolidate() reached {who}, which needs a belief, and there is none: pass "
        "posterior=..., such as an.posterior.laplace(...).gaussian.diagonal() or "
        "an.posterior.Posterior(params, an.posterior.fisher_diagonal(...)), or wrap the chain in "
        "an.with_posterior(estimator, ...)."
    )


def as_posterior(belief: Any, params: PyTree, who: str) -> Posterior:
    """A belief as independent Gaussians.

    Args:
      belief: a :class:`Posterior`, or whatever has a method ``posterior(params)``: a Laplace
        approximation, one of its Gaussians, the state of an estimator.
      params: the parameters.
      who: the rule that asks, for the message.

    Returns:
      The belief.

    Raises:
      ValueError: there is none.
      TypeError: it is something else.

    >>> belief = Posterior({"w": jnp.ones(1)}, {"w": jnp.ones(1)})
    >>> as_posterior(belief, belief.mean, "me()") is belief
    True
    """
    if belief is None:
        raise needs_belief(who)
    if _believes(belief):
        return belief.posterior(params)
    if hasattr(belief, "mean") and hasattr(belief, "precision"):
        return belief
    raise TypeError(
        f"{who} takes a belief such as an.posterior.Posterior(mean, precision) or "
        f"an.posterior.laplace(...), not {type(belief).__name__}."
    )


def nothing_yet(params: PyTree, select: trees.Select = None) -> PyTree:
    """Zeros for the leaves that a rule protects: a memory before the first boundary.

    Args:
      params: pytree of arrays.
      select: regular expressions on paths; None takes all floating leaves.

    Returns:
      Zeros in float32 (float64 for float64 parameters), masked nodes for the other leaves.

    Raises:
      ValueError, TypeError: as :func:`adaptivenet.trees.select_leaves`.

    >>> nothing_yet({"w": jnp.ones(2, jnp.bfloat16), "ids": jnp.arange(2)})
    {'ids': MaskedNode(), 'w': Array([0., 0.], dtype=float32)}
    """
    return filled(params if select is None else trees.synapses(params, select), 0.0)


def copied(like: PyTree, tree: PyTree) -> PyTree:
    """The leaves of a tree, in buffers of their own and in the dtypes of a memory.

    Args:
      like: pytree of arrays; masked nodes for leaves that are left out.
      tree: pytree with at least the leaves of ``like``; where it has masked nodes, the leaves of
        ``like`` stay.

    Returns:
      A pytree like ``like``.
    """
    return trees.map_synapses(
        lambda h, x: h if trees.is_masked(x) else jnp.array(x, dtype=h.dtype, copy=True), like, tree
    )


def number(value: Any) -> jax.Array:
    """A number of a rule, for its state: in the default floating dtype, in a buffer of its own.

    Args:
      value: a number, possibly traced.

    Returns:
      Scalar, float32 (float64 where that is enabled).
    """
    return jnp.array(value, jnp.result_type(float), copy=True)


def check_strength(name: str, value: Any) -> None:
    """Refuses a number below zero, as far as it is known.

    Args:
      name: of the argument.
      value: a number or an array.

    Raises:
      ValueError: it is negative or nan.
    """
    if known(value) and not np.all(np.asarray(value) >= 0):
        raise ValueError(f"{name} must be a number >= 0, not {value}.")


def check_share(name: str, value: Any) -> None:
    """Refuses a number outside of [0, 1], as far as it is known.

    Args:
      name: of the argument.
      value: a number or an array.

    Raises:
      ValueError: it is outside.
    """
    if known(value) and not np.all((np.asarray(value) >= 0) & (np.asarray(value) <= 1)):
        raise ValueError(f"{name} must be in [0, 1], not {value}.")


def _holds(node: Any) -> bool:
    return callable(getattr(node, "consolidated", None))


def _believes(node: Any) -> bool:
    return callable(getattr(node, "posterior", None))


def _check_alike(before: Any, after: Any) -> None:
    """Refuses a state that a compiled step, or a scan, would not take in the place of another."""

    def form(state: Any) -> Any:
        leaves, treedef = jax.tree.flatten(state)
        return treedef, [(jnp.shape(x), jnp.result_type(x)) for x in leaves]

    if form(before) != form(after):
        raise ValueError(
            f"{type(before).__name__}.consolidated() must return a state of the same structure, "
            f"shapes and dtypes; it made {jax.tree.map(_brief, after)} of "
            f"{jax.tree.map(_brief, before)}."
        )


def _brief(leaf: Any) -> str:
    return f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"
