"""Metaplastic synapses: how much a synapse can still change depends on what it has become.

:func:`metaplastic` is for networks whose weights are binary where they are used: a hidden real
weight that has gone far from zero is hard to turn back, so that what was learnt with certainty
stays, without any boundary between tasks::

    tx = optax.chain(optax.adam(5e-3), metaplastic(1.35))
    grads = jax.grad(lambda hidden: loss(binarize(hidden), batch))(hidden)

:func:`by_precision` takes the step from a belief instead: what is well known changes little. (MESU
and Bayesian gradient descent, :mod:`adaptivenet.posterior.mesu`, do the same as optimizers.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from adaptivenet import trees
from adaptivenet.consolidation.boundary import as_posterior, check_share, check_strength
from adaptivenet.posterior._arrays import wide
from adaptivenet.posterior._states import cast, check_positive, per_leaf

PyTree = Any
Number = Any  # a Python number, or a traced scalar
Direction = Literal["weakening", "both"]

__all__ = ["binarize", "by_precision", "metaplastic", "sech_squared", "straight_through_sign"]


def sech_squared(x: jax.Array) -> jax.Array:
    """``1 - tanh(x)^2``, in a form that neither cancels nor overflows.

    Args:
      x: non-negative numbers.

    Returns:
      Numbers in [0, 1].

    >>> sech_squared(jnp.array([0.0, 20.0])).tolist()
    [1.0, 1.69...e-17]
    """
    small = jnp.exp(-2.0 * x)
    return 4.0 * small / jnp.square(1.0 + small)


def metaplastic(
    strength: Number | PyTree,
    *,
    plasticity: Callable[[jax.Array], jax.Array] = sech_squared,
    direction: Direction = "weakening",
    select: trees.Select = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Makes hidden weights the harder to weaken the larger they are: put it after the optimizer.

    An update :math:`\Delta` of a hidden weight :math:`w` becomes

    .. math::

       f(m |w|)\, \Delta \text{ where } w \Delta < 0, \qquad \Delta \text{ elsewhere}, \qquad
       f(x) = 1 - \tanh^2 x,

    so that weights strengthen freely. The optimizer's moments do not see it, as in the authors'
    Adam. What the factor protects is the sign: it is meant for weights that :func:`binarize` makes
    binary where they are used, whose size says nothing but how sure the sign is.

    Args:
      strength: m, not negative, a number or a pytree like the parameters with a number for each
        leaf (as one strength a layer); 0 leaves the updates as they are.
      plasticity: f, a function of :math:`m |w| \geq 0`, elementwise.
      direction: ``"weakening"`` holds back updates towards zero; ``"both"`` all of them.
      select: regular expressions on paths; None takes floating leaves of two or more dimensions, so
        that biases and norms, which are not binary, learn as ever.

    Returns:
      A transformation without state.

    Raises:
      ValueError: the strength is negative, the direction unknown; at ``init``: a pattern matches
        nothing, or the strengths do not fit the parameters. At ``update``: no parameters.
      TypeError: at ``init``: a chosen leaf is not of a floating dtype.

    References:
      Laborieux, Ernoult, Hirtzlin and Querlioz, "Synaptic metaplasticity in binarized neural
      networks", Nature Communications 12 (2021), arXiv:2003.03533.

    >>> tx, params = metaplastic(1.0), {"w": jnp.array([[2.0, 2.0]])}
    >>> updates, _ = tx.update({"w": jnp.array([[0.5, -0.5]])}, tx.init(params), params)
    >>> updates["w"].round(4).tolist()  # towards zero: 0.5 (1 - tanh(2)^2) = 0.0353
    [[0.5, -0.035...]]
    """
    if direction not in ("weakening", "both"):
        raise ValueError(f'direction must be "weakening" or "both", not {direction!r}.')
    for part in jax.tree.leaves(strength):
        check_strength("strength", part)

    def strengths(params: PyTree) -> tuple[PyTree, PyTree]:
        weights = jax.tree.map(wide, trees.synapses(params, select))
        return weights, per_leaf("strength", strength, weights)

    def init(params: PyTree) -> optax.EmptyState:
        strengths(params)
        return optax.EmptyState()

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, optax.EmptyState]:
        del extra
        if params is None:
            raise ValueError(
                "metaplastic() needs the parameters: call tx.update(grads, opt_state, params)."
            )

        def hold(weight: jax.Array, move: jax.Array, m: jax.Array) -> jax.Array:
            held = (plasticity(m * jnp.abs(weight)) * move.astype(weight.dtype)).astype(move.dtype)
            if direction == "both":
                return held
            # Signs, because a product of small numbers may underflow.
            weakens = jnp.sign(weight) * jnp.sign(move).astype(weight.dtype) < 0
            return jnp.where(weakens, held, move)

        weights, m = strengths(params)
        return trees.merge_synapses(hold, weights, updates, m), state

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def straight_through_sign(x: jax.Array, window: Number | None = None) -> jax.Array:
    """The sign as +1 or -1, with a straight-through gradient.

    Args:
      x: an array, such as hidden weights or what comes into a layer.
      window: where given, the gradient passes for ``|x| <= window`` only, as if the sign were a
        hard tanh; with 1, the usual activation of binary networks.

    Returns:
      +1 where ``x >= 0``, -1 elsewhere, in its dtype; exactly.

    Raises:
      ValueError: the window is not positive.

    References:
      Courbariaux et al., "Binarized neural networks", arXiv:1602.02830; Bengio, Leonard
      and Courville, arXiv:1308.3432, for the estimator.

    >>> straight_through_sign(jnp.array([-0.3, 0.0, 5.0])).tolist()
    [-1.0, 1.0, 1.0]
    >>> slope = jax.grad(lambda x: straight_through_sign(x, 1.0).sum())
    >>> slope(jnp.array([-0.3, 0.0, 5.0])).tolist()
    [1.0, 1.0, 0.0]
    """
    one = jnp.ones_like(x)
    signs = jax.lax.stop_gradient(jnp.where(x >= 0, one, -one))
    if window is None:
        passed = x
    else:
        check_positive("window", window)
        passed = jnp.where(jnp.abs(x) <= cast(window, x), x, jnp.zeros_like(x))
    # First the difference, which is exactly 0, so that the sum is exactly the sign.
    return (passed - jax.lax.stop_gradient(passed)) + signs


def binarize(
    params: PyTree, select: trees.Select = None, *, window: Number | None = None
) -> PyTree:
    """The binary weights of hidden real ones, for use within a loss.

    Args:
      params: pytree of arrays, the hidden weights, which are what is trained.
      select: as for :func:`metaplastic`: None takes floating leaves of two or more dimensions.
      window: as for :func:`straight_through_sign`. None passes the gradient everywhere, as in the
        article, where hidden weights may grow without bound and consolidate by it.

    Returns:
      ``params`` with +1 and -1 in the leaves chosen; their derivative is the identity, or that of a
      hard tanh.

    Raises:
      ValueError, TypeError: as :func:`adaptivenet.trees.select_leaves`; the window is not positive.

    References:
      Laborieux et al., Nature Communications 12 (2021); Courbariaux et al., arXiv:1602.02830.

    >>> hidden = {"kernel": jnp.array([[0.2, -3.0]]), "bias": jnp.array([0.5, 0.1])}
    >>> binarize(hidden)["kernel"].tolist(), binarize(hidden)["bias"].tolist()
    ([[1.0, -1.0]], [0.5, 0.10000000149011612])
    """
    chosen = trees.synapses(params, select)
    return trees.merge_synapses(
        lambda _, weight: straight_through_sign(weight, window), chosen, params
    )


def by_precision(
    prior: Number | PyTree,
    *,
    power: Number = 1.0,
    least: Number = 0.0,
    select: trees.Select = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes steps inversely proportional to what is known: put it after the optimizer.

    Updates are multiplied by ``(prior / precision) ** power``, at most 1, where the precision is
    that of the belief that :func:`adaptivenet.posterior.with_posterior` hands on: the share of its
    first uncertainty that is left to a synapse. One that nothing is known of moves as the optimizer
    says, one that a hundred times the prior is known of moves by a hundredth (the gain of a Kalman
    filter). It belongs after optimizers that do not divide by the same curvature themselves.

    Args:
      prior: the precision of ignorance, positive: a number, or a pytree like the belief. Give the
        estimator the same.
      power: 1 for steps in proportion to the variance, 0.5 to the standard deviation; 0 leaves the
        updates as they are.
      least: the factor does not fall below this share, in [0, 1], so that no synapse freezes.
      select: regular expressions on paths; None takes all leaves that something is believed of.

    Returns:
      A transformation without state, whose ``update`` takes ``posterior=``.

    Raises:
      ValueError: a number is out of range; at ``init``: a pattern matches nothing. At ``update``:
        no belief, or the prior does not fit it.

    References:
      Khan and Rue, "The Bayesian learning rule", JMLR 24 (2023), for the step that divides by the
      precision; Aitchison et al., "Synaptic plasticity as Bayesian inference", Nature Neuroscience
      24 (2021), for synapses whose learning rates are their uncertainties.

    >>> from adaptivenet.posterior.gaussian import Posterior
    >>> params = {"w": jnp.zeros(2)}
    >>> belief = Posterior(params, {"w": jnp.array([2.0, 200.0])})
    >>> tx = by_precision(2.0)
    >>> updates, _ = tx.update({"w": jnp.ones(2)}, tx.init(params), params, posterior=belief)
    >>> updates["w"].round(4).tolist()
    [1.0, 0.009999999776482582]
    """
    for part in jax.tree.leaves(prior):
        check_positive("prior", part)
    check_strength("power", power)
    check_share("least", least)

    def init(params: PyTree) -> optax.EmptyState:
        if select is not None:
            trees.synapses(params, select)
        return optax.EmptyState()

    def update(
        updates: PyTree,
        state: optax.EmptyState,
        params: PyTree | None = None,
        *,
        posterior: Any = None,
        **extra: Any,
    ) -> tuple[PyTree, optax.EmptyState]:
        del extra
        if posterior is None:
            raise ValueError(
                "by_precision() needs the belief: wrap the chain in an.with_posterior(estimator, "
                "chain), or call tx.update(grads, opt_state, params, posterior=...)."
            )
        precision = as_posterior(posterior, params, "by_precision()").precision
        first = per_leaf("prior", prior, trees.map_synapses(wide, precision))

        def scale(sharp: jax.Array, update: jax.Array, ignorant: jax.Array) -> jax.Array:
            share = (ignorant / sharp.astype(ignorant.dtype)) ** cast(power, ignorant)
            share = jnp.clip(share, cast(least, share), 1.0)
            return (share * update.astype(share.dtype)).astype(update.dtype)

        if select is not None:
            chosen = trees.synapses(updates, select)
            precision = _both(chosen, precision)
        return trees.merge_synapses(scale, precision, updates, first), state

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _both(chosen: PyTree, precision: PyTree) -> PyTree:
    """The precision where a leaf is chosen as well."""
    return trees.map_synapses(
        lambda sharp, leaf: optax.MaskedNode() if trees.is_masked(leaf) else sharp,
        precision,
        chosen,
    )
