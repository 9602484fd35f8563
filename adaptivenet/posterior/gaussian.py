"""A diagonal Gaussian over a parameter pytree: the belief that pruning and consolidation share.

Everything here is a pure function of :class:`Posterior`; computation is in float32 (float64 where
the belief is), whatever the dtype of the parameters. Leaves of which nothing is believed are masked
nodes: they pass through, and add nothing to a sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet import trees

PyTree = Any
Number = float | jax.Array

# fmt: off
__all__ = [
    "Posterior", "calibrate", "check", "entropy", "find", "isotropic", "kl", "log_density", "obd",
    "product", "quotient", "sample", "snr", "temper",
]
# fmt: on


class Posterior(NamedTuple):
    """What is believed of each parameter: independent Gaussians.

    Attributes:
      mean: pytree like the parameters.
      precision: pytree like the parameters, positive, the inverse variance. Leaves that nothing is
        believed of are masked nodes in both.
    """

    mean: PyTree
    precision: PyTree


def find(opt_state: PyTree, params: PyTree) -> Posterior:
    """The belief that an optimizer state holds, however deep it lies.

    Every state with a method ``posterior(params)`` holds one; the outermost counts.

    Args:
      opt_state: any optimizer state.
      params: the parameters.

    Returns:
      The belief.

    Raises:
      ValueError: there is none.

    >>> from adaptivenet.posterior.fisher import squared_gradient
    >>> from adaptivenet.posterior.transformation import with_posterior
    >>> tx, params = with_posterior(squared_gradient(0.9), optax.sgd(0.1)), {"w": jnp.ones(1)}
    >>> _, state = tx.update({"w": jnp.array([2.0])}, tx.init(params), params)
    >>> find((optax.EmptyState(), state), params).precision["w"].tolist()
    [4.0]
    """

    def holds(node: Any) -> bool:
        return callable(getattr(node, "posterior", None))

    for node in jax.tree.leaves(opt_state, is_leaf=holds):
        if holds(node):
            return node.posterior(params)
    raise ValueError(
        "this optimizer state holds no posterior: wrap the chain in with_posterior(estimator, "
        "...), such as an.with_posterior(an.posterior.squared_gradient(0.99), optax.adam(1e-3))."
    )


def snr(posterior: Posterior) -> PyTree:
    """``|mean| sqrt(precision)``: the signal-to-noise ratio of each synapse.

    Its square is twice :func:`obd`. (:func:`adaptivenet.pruning.snr` is the score for training.)

    Args:
      posterior: a belief; a precision of zero is allowed.

    Returns:
      Pytree of non-negative floats like the mean.

    Raises:
      ValueError: the belief is malformed: see :func:`check`.

    References:
      Graves, "Practical variational inference for neural networks", NeurIPS 2011, section 7;
      Blundell et al., "Weight uncertainty in neural networks", ICML 2015, section 5.1.

    >>> snr(Posterior({"w": jnp.array([-3.0])}, {"w": jnp.array([4.0])}))["w"].tolist()
    [6.0]
    """
    _check(posterior, zero=True)
    return _map(lambda m, s: jnp.abs(m) * jnp.sqrt(s), *posterior)


def obd(posterior: Posterior) -> PyTree:
    """``mean^2 precision / 2``: the saliency of optimal brain damage.

    To second order, the rise of the negative log posterior when the synapse is cut.

    Args:
      posterior: a belief; a precision of zero is allowed.

    Returns:
      Pytree of non-negative floats like the mean, in nats.

    Raises:
      ValueError: the belief is malformed: see :func:`check`.

    References:
      LeCun et al., "Optimal brain damage", NeurIPS 1990, eq. 5.

    >>> obd(Posterior({"w": jnp.array([-3.0])}, {"w": jnp.array([4.0])}))["w"].tolist()
    [18.0]
    """
    _check(posterior, zero=True)
    return _map(lambda m, s: 0.5 * jnp.square(m) * s, *posterior)


def kl(p: Posterior, q: Posterior) -> jax.Array:
    """The Kullback-Leibler divergence ``KL(p || q)``, in nats, summed over all parameters.

    Args:
      p: a belief.
      q: another over the same parameters, such as a prior.

    Returns:
      Scalar, zero where they agree.

    Raises:
      ValueError: a belief is malformed (see :func:`check`), or they differ in leaves or shapes.

    >>> p = Posterior({"w": jnp.array([1.0])}, {"w": jnp.array([1.0])})
    >>> kl(p, Posterior({"w": jnp.array([0.0])}, {"w": jnp.array([1.0])})).item()
    0.5
    """
    _check(p)
    _check(q)
    _alike(p.mean, q.mean, "the second belief")

    def term(m: jax.Array, s: jax.Array, n: jax.Array, t: jax.Array) -> jax.Array:
        excess = (t - s) / s  # log1p keeps the digits of beliefs that nearly agree
        return 0.5 * jnp.sum(excess - jnp.log1p(excess) + t * jnp.square(m - n))

    return _total(term, *p, *q)


def entropy(posterior: Posterior) -> jax.Array:
    """The differential entropy, in nats, summed over all parameters.

    Args:
      posterior: a belief.

    Returns:
      Scalar, of either sign.

    Raises:
      ValueError: the belief is malformed: see :func:`check`.

    >>> p = Posterior({"w": jnp.zeros(2)}, {"w": jnp.array([1.0, 4.0])})
    >>> round(entropy(p).item(), 4)  # log(2 pi e) - log(4) / 2
    2.1447
    """
    _check(posterior)
    constant = math.log(2 * math.pi * math.e)
    return _total(lambda s: 0.5 * jnp.sum(constant - jnp.log(s)), posterior.precision)


def log_density(posterior: Posterior, params: PyTree) -> jax.Array:
    """The log density of a point, in nats, summed over all parameters that are believed of.

    Its negative is the quadratic penalty of consolidation, with its normalisation.

    Args:
      posterior: a belief.
      params: pytree with at least the leaves of the belief.

    Returns:
      Scalar.

    Raises:
      ValueError: the belief is malformed (see :func:`check`), or the parameters have other leaves
        or shapes.

    >>> p = Posterior({"w": jnp.zeros(1)}, {"w": jnp.ones(1)})
    >>> round(log_density(p, {"w": jnp.ones(1)}).item(), 4)  # -log(2 pi) / 2 - 1 / 2
    -1.4189
    """
    _check(posterior)
    _alike(posterior.mean, params, "the parameters", more=True)
    constant = math.log(2 * math.pi)

    def term(m: jax.Array, s: jax.Array, x: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum(jnp.log(s) - constant - s * jnp.square(x - m))

    return _total(term, *posterior, params)


def sample(key: jax.Array, posterior: Posterior, params: PyTree | None = None) -> PyTree:
    """One draw of all parameters; ``jax.vmap`` over keys draws many.

    Args:
      key: a random key.
      posterior: a belief.
      params: if given, the values of leaves that nothing is believed of.

    Returns:
      Pytree like the mean, and of its dtypes: noise finer than these hold is rounded away.

    Raises:
      ValueError: the belief is malformed (see :func:`check`), or belongs to other parameters.

    >>> p = Posterior({"w": jnp.zeros(2)}, {"w": jnp.full(2, 4.0)})
    >>> draws = jax.vmap(sample, (0, None))(jax.random.split(jax.random.key(0), 10_000), p)
    >>> draws["w"].std(0).round(2).tolist()
    [0.5, 0.5]
    """
    _check(posterior)
    place = iter(range(len(jax.tree.leaves(posterior.mean))))

    def draw(mean: Any, precision: Any) -> jax.Array:
        m, s = _wide(mean, precision)
        noise = jax.random.normal(jax.random.fold_in(key, next(place)), m.shape, m.dtype)
        return (m + noise * jax.lax.rsqrt(s)).astype(jnp.asarray(mean).dtype)

    drawn = trees.map_synapses(draw, *posterior)
    if params is None:
        return drawn
    _alike(posterior.mean, params, "the parameters", more=True)
    return trees.merge_synapses(lambda new, old: new, drawn, params)


def temper(posterior: Posterior, temperature: Number) -> Posterior:
    """The belief to the power ``1 / temperature``: the same mean, ``precision / temperature``.

    A cold belief (temperature below 1) is narrower. The whole belief is tempered, with whatever
    prior it contains; to temper the likelihood alone, divide ``examples`` of :func:`calibrate`.

    Args:
      posterior: a belief.
      temperature: a positive number, possibly traced.

    Returns:
      A belief.

    Raises:
      ValueError: the temperature is not positive, or the belief malformed: see :func:`check`.

    References:
      Wenzel et al., "How good is the Bayes posterior in deep neural networks really?", ICML 2020.

    >>> temper(Posterior({"w": jnp.ones(1)}, {"w": jnp.ones(1)}), 0.5).precision["w"].tolist()
    [2.0]
    """
    _positive(temperature, "temperature")
    _check(posterior)
    heat = jnp.asarray(temperature)
    return Posterior(posterior.mean, _map(lambda s: s / heat.astype(s.dtype), posterior.precision))


def product(p: Posterior, q: Posterior) -> Posterior:
    """The normalised product of two beliefs: precisions add, means average by precision.

    Where one believes nothing of a leaf, what the other believes is kept.

    Args:
      p: a belief, such as a prior.
      q: another over the same parameters, such as the likelihood of new data.

    Returns:
      A belief.

    Raises:
      ValueError: a belief is malformed (see :func:`check`), or they differ in structure or shapes.

    >>> p = Posterior({"w": jnp.array([0.0])}, {"w": jnp.array([1.0])})
    >>> both = product(p, Posterior({"w": jnp.array([4.0])}, {"w": jnp.array([3.0])}))
    >>> both.mean["w"].tolist(), both.precision["w"].tolist()
    ([3.0], [4.0])
    """
    _check(p)
    _check(q)

    def together(m: jax.Array, s: jax.Array, n: jax.Array, t: jax.Array) -> Any:
        return m + (n - m) * (t / (s + t)), s + t

    return _combine(p, q, together)


def quotient(p: Posterior, q: Posterior, *, floor: Number | None = None) -> Posterior:
    """The Gaussian that gives ``p`` when multiplied by ``q``: what ``p`` knows beyond ``q``.

    Precisions subtract; where ``q`` is as sure as ``p`` or surer there is no such Gaussian.

    Args:
      p: a belief, such as a posterior.
      q: another over the same parameters, such as the prior it was made with. Leaves that it
        believes nothing of stay as they are.
      floor: a precision, positive and possibly traced, to raise smaller ones to; where it does, the
        mean of ``p`` is kept. Without a floor a precision that is not positive is refused, but can
        be seen only outside of jit; within, it is returned as it comes out.

    Returns:
      A belief.

    Raises:
      ValueError: a precision would not be positive, and there is no floor; a belief is malformed
        (see :func:`check`), or they differ in structure or shapes; ``q`` believes something of a
        leaf that ``p`` believes nothing of.

    >>> p = Posterior({"w": jnp.array([3.0])}, {"w": jnp.array([4.0])})
    >>> rest = quotient(p, Posterior({"w": jnp.array([0.0])}, {"w": jnp.array([1.0])}))
    >>> rest.mean["w"].tolist(), rest.precision["w"].tolist()
    ([4.0], [3.0])
    """
    if floor is not None:
        _positive(floor, "floor")
    _check(p)
    _check(q)

    def apart(m: jax.Array, s: jax.Array, n: jax.Array, t: jax.Array) -> Any:
        rest = s - t
        if floor is None:
            return m + (m - n) * (t / rest), rest
        least = jnp.asarray(floor).astype(rest.dtype)
        sure = rest >= least
        rest = jnp.where(sure, rest, least)
        return jnp.where(sure, m + (m - n) * (t / rest), m), rest

    result = _combine(p, q, apart, divide=True)
    if floor is None:
        remedy = "the divisor is as sure as the belief there; give a floor="
        _refuse(result.precision, lambda s: s > 0, "the precision of the quotient", remedy)
    return result


def isotropic(params: PyTree, precision: PyTree, mean: Number = 0.0) -> Posterior:
    """The belief that all parameters are drawn alike: the usual prior.

    Args:
      params: pytree of arrays; only floating leaves are believed of.
      precision: a positive number, possibly traced, or a tree prefix of ``params`` with one number
        (or an array that broadcasts to the leaf) for each leaf or part, such as a layer.
      mean: a number.

    Returns:
      A belief, float32 (float64 for float64 parameters).

    Raises:
      ValueError: the precision is not positive, or fits no leaf.

    >>> prior = isotropic({"w": jnp.ones(2), "ids": jnp.arange(2)}, 25.0)
    >>> prior.precision
    {'ids': MaskedNode(), 'w': Array([25., 25.], dtype=float32)}
    """
    floats = _floats(params)
    filled = _spread(precision, floats, "precision")
    believed = Posterior(_map(lambda leaf: jnp.full_like(leaf, mean), floats), filled)
    _check(believed)
    return believed


def calibrate(
    params: PyTree, curvature: PyTree, *, prior: PyTree, examples: Number = 1.0
) -> Posterior:
    """The Laplace approximation on the diagonal: ``precision = examples * curvature + prior``.

    Conventions differ by factors of the number of examples N; with the log posterior
    ``-sum_i loss_i - prior |w|^2 / 2`` they are:

    - curvature summed over the data (:func:`adaptivenet.posterior.fisher_exact.fisher_diagonal`):
      ``examples=1``;
    - curvature averaged over the data (a running mean): ``examples=N``;
    - training by ``mean_i loss_i + decay |w|^2 / 2`` (L2 in the loss): ``prior = N * decay``, since
      that objective is the log posterior divided by N; what AdamW calls weight decay is decoupled
      from the loss, and is no prior in this sense;
    - a prior of standard deviation sigma: ``prior = 1 / sigma^2``.

    Args:
      params: the mode, which becomes the mean; the prior's mean is not needed, as the mode is where
        prior and data balance already.
      curvature: pytree like the parameters, non-negative; masked nodes where nothing is known.
      prior: precision of the prior: a number >= 0, possibly traced, or a tree prefix of
        ``curvature`` with numbers or arrays that broadcast to the leaves.
      examples: a positive number, possibly traced.

    Returns:
      A belief over the leaves of ``curvature``.

    Raises:
      ValueError: ``examples`` is not positive, a prior fits no leaf, or the precision that comes
        out is not finite or not positive.

    References:
      MacKay, "A practical Bayesian framework for backpropagation networks", Neural Computation 4
      (1992); Daxberger et al., "Laplace redux", NeurIPS 2021, section 2.

    >>> w = {"w": jnp.ones(2)}
    >>> calibrate(w, {"w": jnp.array([0.0, 0.5])}, prior=1.0, examples=100).precision["w"].tolist()
    [1.0, 51.0]
    """
    _positive(examples, "examples")
    _alike(curvature, params, "the parameters", more=True)
    number, prior = jnp.asarray(examples), _spread(prior, curvature, "prior")
    precision = _map(lambda c, p: c * number.astype(c.dtype) + p, curvature, prior)
    believed = Posterior(trees.map_synapses(lambda _, p: p, curvature, params), precision)
    _check(believed)
    return believed


def check(posterior: Posterior) -> Posterior:
    """Refuses a belief that is none, as far as values are known (outside of jit).

    All functions here do this to their arguments.

    Returns:
      The belief, as it is.

    Raises:
      TypeError: it has no mean or no precision.
      ValueError: mean and precision differ in structure or shapes; a mean is not finite; a
        precision is not finite or not positive. The message names the leaf.

    >>> check(Posterior({"w": jnp.zeros(2)}, {"w": jnp.array([1.0, jnp.inf])}))
    Traceback (most recent call last):
      ...
    ValueError: the precision of 'w' is not finite and positive (1 of 2 elements): such a belief \
can neither be drawn from nor compared; give the estimator a positive prior=, or repair the leaf.
    """
    _check(posterior)
    return posterior


def _check(posterior: Any, zero: bool = False) -> None:
    if not (hasattr(posterior, "mean") and hasattr(posterior, "precision")):
        raise TypeError(
            f"a posterior has the trees mean and precision, which {type(posterior).__name__} has "
            "not: give an.posterior.Posterior(mean, precision)."
        )
    _alike(posterior.mean, posterior.precision, "the precision")
    _refuse(posterior.mean, jnp.isfinite, "the mean", "repair the leaf", "finite")
    remedy = "repair the leaf"
    if not zero:
        remedy = (
            "such a belief can neither be drawn from nor compared; give the estimator a positive "
            f"prior=, or {remedy}"
        )
    _refuse(
        posterior.precision,
        lambda s: jnp.isfinite(s) & ((s >= 0) if zero else (s > 0)),
        "the precision",
        remedy,
        "finite and non-negative" if zero else "finite and positive",
    )


def _refuse(
    tree: PyTree, good: Callable[[Any], Any], what: str, remedy: str, must: str = "positive"
) -> None:
    for name, leaf in zip(trees.paths(tree), jax.tree.leaves(tree), strict=True):
        if isinstance(leaf, jax.core.Tracer) or not getattr(leaf, "is_fully_addressable", True):
            continue
        with jax.ensure_compile_time_eval():
            bad = int(jnp.sum(~good(jnp.asarray(leaf))))
        if bad:
            share = f"({bad} of {np.size(leaf)} elements)"
            raise ValueError(f"{what} of {name!r} is not {must} {share}: {remedy}.")


def _positive(value: Any, name: str) -> None:
    if isinstance(value, jax.core.Tracer):
        return
    number = np.asarray(value, np.float64)
    if not np.all((number > 0) & np.isfinite(number)):
        raise ValueError(f"{name} must be a positive number, not {value}.")


def _alike(tree: PyTree, other: PyTree, what: str, more: bool = False) -> None:
    """Refuses another tree whose leaves or shapes are not those of the first."""
    names = iter(trees.paths(tree))

    def compare(leaf: Any, beside: Any) -> None:
        name = next(names)
        if trees.is_masked(beside) or not jax.tree_util.all_leaves([beside]):
            raise ValueError(f"{what} has no array at {name!r}, where the first tree has one.")
        if jnp.shape(leaf) != jnp.shape(beside):
            raise ValueError(
                f"{what} has shape {jnp.shape(beside)} at {name!r}, where the first tree has "
                f"{jnp.shape(leaf)}."
            )

    leaves, treedef = jax.tree.flatten(tree, is_leaf=trees.is_masked)
    try:
        beside = treedef.flatten_up_to(other)
    except ValueError as error:
        raise ValueError(
            f"{what} has another structure: it has the leaves {', '.join(trees.paths(other))}, and "
            f"the first tree {', '.join(trees.paths(tree))}."
        ) from error
    for leaf, part in zip(leaves, beside, strict=True):
        if not trees.is_masked(leaf):
            compare(leaf, part)
    extra = set(trees.paths(other)) - set(trees.paths(tree))
    if extra and not more:
        raise ValueError(
            f"{what} has an array at {min(extra)!r}, where the first tree has a masked node."
        )


def _wide(*leaves: Any) -> list[jax.Array]:
    """All in float64 if one is, else in float32."""
    arrays = list(map(jnp.asarray, leaves))
    dtype = jnp.float64 if any(a.dtype == jnp.float64 for a in arrays) else jnp.float32
    return [array.astype(dtype) for array in arrays]


def _map(function: Callable[..., Any], *columns: PyTree) -> PyTree:
    return trees.map_synapses(lambda *row: function(*_wide(*row)), *columns)


def _total(function: Callable[..., jax.Array], *columns: PyTree) -> jax.Array:
    terms = _wide(*jax.tree.leaves(_map(function, *columns)), jnp.zeros((), jnp.float32))
    return jnp.sum(jnp.stack(terms))


def _floats(params: PyTree) -> PyTree:
    """The floating leaves, at least float32; masked nodes for the others."""

    def keep(leaf: Any) -> Any:
        floating = jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating)
        return _wide(leaf)[0] if floating else optax.MaskedNode()

    return jax.tree.map(keep, params)


def _spread(prefix: PyTree, tree: PyTree, name: str) -> PyTree:
    """A tree prefix of numbers, as arrays like the leaves of a tree."""
    try:
        full = jax.tree.broadcast(prefix, tree, is_leaf=trees.is_masked)
    except ValueError as error:
        raise ValueError(
            f"{name}= is no prefix of the tree, whose leaves are {', '.join(trees.paths(tree))}: "
            f"give a number, or one for each of them. ({error})"
        ) from error
    names = iter(trees.paths(tree))

    def fill(leaf: Any, value: Any) -> jax.Array:
        leaf, path = _wide(leaf)[0], next(names)
        try:
            return jnp.broadcast_to(jnp.asarray(value).astype(leaf.dtype), leaf.shape)
        except ValueError as error:
            raise ValueError(
                f"{name}= has shape {jnp.shape(value)} for {path!r}, which has {leaf.shape}."
            ) from error

    return trees.map_synapses(fill, tree, full)


def _combine(
    p: Posterior, q: Posterior, function: Callable[..., Any], divide: bool = False
) -> Posterior:
    leaves = [jax.tree.flatten(tree, is_leaf=trees.is_masked) for tree in (*p, *q)]
    if any(shape != leaves[0][1] for _, shape in leaves):
        raise ValueError(
            f"the beliefs have another structure: the leaves are {', '.join(trees.paths(p.mean))} "
            f"and {', '.join(trees.paths(q.mean))}."
        )
    means, precisions = [], []
    for m, s, n, t in zip(*(column for column, _ in leaves), strict=True):
        if trees.is_masked(n):
            mean, precision = m, s
        elif trees.is_masked(m):
            if divide:
                known = ", ".join(trees.paths(p.mean)) or "(none)"
                raise ValueError(f"the divisor believes something of leaves beyond {known}.")
            mean, precision = n, t
        elif jnp.shape(m) != jnp.shape(n):
            raise ValueError(
                f"the beliefs have shapes {jnp.shape(m)} and {jnp.shape(n)} at the same leaf."
            )
        else:
            mean, precision = function(*_wide(m, s, n, t))
            mean = mean.astype(jnp.asarray(m).dtype)
        means.append(mean)
        precisions.append(precision)
    return Posterior(*(jax.tree.unflatten(leaves[0][1], new) for new in (means, precisions)))
