r"""Memory aware synapses: a synapse is worth what it does to the output, labels or none.

The importance of a parameter is the mean over examples of how fast the squared length of the
network's output changes with it. It makes a belief that :func:`adaptivenet.consolidation.elastic`
takes at a boundary, from inputs alone: of the task that was learnt, or of what the network will
meet, for which it should forget nothing::

    opt_state = consolidate(opt_state, params, importance(apply, params, inputs))

The paper's penalty (equation 3) is ``lambda * sum(importance * (params - anchor)^2)``, without a
half: give ``elastic(2 * lambda)``, whose online form adds importances over tasks, as the authors'
code does. (Its lambda is 1 by default.)

References:
  Aljundi et al., "Memory aware synapses: learning what (not) to forget", ECCV 2018,
  arXiv:1711.09601.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adaptivenet import trees
from adaptivenet.posterior._arrays import wide
from adaptivenet.posterior.capture import Apply, Trace, trace
from adaptivenet.posterior.gaussian import Posterior
from adaptivenet.posterior.kronecker import summed
from adaptivenet.posterior.tracing import Site

PyTree = Any

__all__ = ["hebbian", "importance"]


def importance(
    apply: Apply,
    params: PyTree,
    inputs: PyTree,
    *,
    batch_size: int | None = None,
    select: trees.Select = None,
) -> Posterior:
    """How much each parameter matters to the output: ``mean_n |d ||f(x_n)||^2 / d w|``.

    The absolute value is taken of every example by itself. (The authors' code does so, or takes it
    of a batch, where examples of opposite sign cancel.) A kernel that an example uses once costs
    one product of absolute values for all examples; others take a gradient an example.

    Args:
      apply: ``apply(params, inputs) -> outputs [examples, ...]``, whose examples do not depend on
        each other. The authors take the outputs of the task at hand, before any softmax.
      params: pytree of arrays.
      inputs: array or pytree of arrays, ``[examples, ...]``; no labels.
      batch_size: examples at a time; None takes all at once.
      select: regular expressions on paths; None takes all floating leaves.

    Returns:
      A belief with the parameters for mean and the importance for precision, in float32 (float64
      for float64 parameters); masked nodes for other leaves. The importance may be zero, which
      elastic weight consolidation takes, but no density has.

    Raises:
      ValueError: no examples, a batch size below 1, ``select`` matches nothing, or ``apply`` does
        not map a batch to a batch.

    References:
      Aljundi et al., "Memory aware synapses", ECCV 2018, section 4.1, equation 2, with the squared
      norm of the output for functions of several outputs.

    >>> params, inputs = {"w": jnp.array([[1.0]])}, jnp.array([[1.0], [-2.0]])
    >>> apply = lambda p, x: x @ p["w"]
    >>> importance(apply, params, inputs).precision["w"].tolist()  # mean of 2 w x^2
    [[5.0]]
    """
    found = trace(apply, params, inputs, select=select)

    def batch(params: PyTree, data: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        outputs, rows, pull = found.pullback(params, data)
        deltas, rest = pull(2 * outputs)
        sums = [_absolute(a, d) for a, d in zip(rows, deltas, strict=True)]
        return sums, [jnp.abs(x).sum(axis=0) for x in rest]

    _check_examples(inputs)
    sums, rest = summed(batch, params, inputs, batch_size)
    leaves = dict(zip(found.rest, rest, strict=True))
    return _belief(found, found.sites, sums, leaves, params, inputs)


def hebbian(
    apply: Apply,
    params: PyTree,
    inputs: PyTree,
    *,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    batch_size: int | None = None,
    select: trees.Select = None,
) -> Posterior:
    """The local version: every layer takes its own activations for the output.

    With rectified units of activations ``y = relu(x W + b)`` it is ``2 mean_n |x_i| y_j``: Hebb's
    rule, the product of what is active on either side of a synapse. Nothing is propagated back. The
    product that is the output itself, if one is, has no activation.

    Args:
      apply: as for :func:`importance`.
      params: as for :func:`importance`.
      inputs: as for :func:`importance`.
      activation: what layers apply to the results of their products, elementwise.
      batch_size: as for :func:`importance`.
      select: as for :func:`importance`.

    Returns:
      As :func:`importance`, at its scale; leaves that stand in no product with an input have masked
      nodes.

    Raises:
      ValueError: as :func:`importance`; there is no kernel.

    References:
      Aljundi et al., "Memory aware synapses", ECCV 2018, "Connection to Hebbian learning".

    >>> params, inputs = {"w": jnp.array([[1.0, -1.0]])}, jnp.array([[2.0], [1.0]])
    >>> apply = lambda p, x: jax.nn.relu(x @ p["w"])
    >>> hebbian(apply, params, inputs).precision["w"].tolist()  # 2 mean of x y; the second is off
    [[5.0, 0.0]]
    """
    found = trace(apply, params, inputs, select=select)
    if not found.sites:
        raise ValueError(
            "hebbian() finds no kernel that multiplies an input: use importance(), which takes "
            "gradients through the whole network."
        )
    last = _last(found)

    def batch(params: PyTree, data: Any) -> list[jax.Array]:
        _, rows, _ = found.pullback(params, data)
        leaves = jax.tree.leaves(params)
        sums = []
        for site, a in zip(found.sites, rows, strict=True):
            z = jnp.matmul(a, site.matrix(leaves), precision=jax.lax.Precision.HIGHEST)
            act = (lambda z: z) if site == last else activation
            delta = jax.grad(lambda z, act=act: jnp.sum(jnp.square(act(z))))(z)
            sums.append(_absolute(a, delta))
        return sums

    _check_examples(inputs)
    sums = summed(batch, params, inputs, batch_size)
    return _belief(found, found.sites, sums, {}, params, inputs)


def _absolute(rows: jax.Array, deltas: jax.Array) -> jax.Array:
    """``sum_n |sum_s a_ns d_ns^T|``, of ``[n, s, inputs]`` and ``[n, s, outputs]``."""
    highest = jax.lax.Precision.HIGHEST
    if rows.shape[1] == 1:  # |a d^T| = |a| |d|^T
        a, d = jnp.abs(rows[:, 0]), jnp.abs(deltas[:, 0])
        return jnp.einsum("ni,no->io", a, d, precision=highest)
    return jnp.abs(jnp.einsum("nsi,nso->nio", rows, deltas, precision=highest)).sum(axis=0)


def _last(found: Trace) -> Site | None:
    try:
        return found.last()
    except ValueError:
        return None


def _check_examples(inputs: PyTree) -> None:
    if not jax.tree.leaves(inputs)[0].shape[0]:
        raise ValueError("there are no examples.")


def _belief(
    found: Trace,
    sites: tuple[Site, ...],
    sums: list[jax.Array],
    leaves: dict[int, jax.Array],
    params: PyTree,
    inputs: PyTree,
) -> Posterior:
    number = jax.tree.leaves(inputs)[0].shape[0]
    for site, total in zip(sites, sums, strict=True):
        leaves |= site.leaves(total)
    treedef = jax.tree.structure(params)
    places = range(len(found.names))
    precision = treedef.unflatten(
        [leaves[k] / number if k in leaves else optax.MaskedNode() for k in places]
    )
    return Posterior(trees.map_synapses(lambda _, p: wide(p), precision, params), precision)
