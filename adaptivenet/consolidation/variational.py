"""Variational continual learning: the posterior of one task is the prior of the next.

The belief is a :class:`adaptivenet.posterior.meanfield.MeanField`, trained by its ELBO. At a
boundary it becomes the prior, and nothing else is stored, unless a coreset is::

    prior = isotropic(params, 1.0)
    for task in tasks:
        kept = k_center(task.inputs, 200, key)           # or random_coreset(key, n, 200)
        rest = remainder(kept, n)                        # what is trained on
        ...                                              # maximise elbo(fields, ..., prior=prior)
        fields, prior = next_task(fields)

    for_prediction = refine(fields, log_likelihood, key, coreset, tx=optax.adam(1e-3), steps=500)

Predictions average over draws: :func:`adaptivenet.posterior.averaged` of ``posterior(fields)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet import trees
from adaptivenet.consolidation.boundary import copied
from adaptivenet.posterior import meanfield
from adaptivenet.posterior._arrays import known, wide
from adaptivenet.posterior._states import cast
from adaptivenet.posterior.gaussian import Posterior
from adaptivenet.posterior.meanfield import MeanField

PyTree = Any
Number = Any  # a Python number, or a traced scalar

__all__ = ["k_center", "next_task", "random_coreset", "refine", "remainder"]


def next_task(
    fields: MeanField,
    *,
    scale: Number | PyTree = None,
    widen: Number = 1.0,
    heads: trees.Select = None,
    initial: tuple[MeanField, Posterior] | None = None,
) -> tuple[MeanField, Posterior]:
    """A boundary: the belief becomes the prior of the next task, and where its training starts.

    Args:
      fields: the belief after a task.
      scale: standard deviations to start the next task from, a number or a pytree like the
        parameters; by default those of the belief, as in VCL. A belief that starts narrow takes in
        the means of a task first and its uncertainty after. (Swaroop et al. start every task at
        variances of exp(-6), and at means that are drawn anew, of deviation 0.1; here the means
        start where they are.)
      widen: factor of the prior's variances; 1 is Bayes' rule, and more forgets on purpose, as if
        the weights had drifted between the tasks.
      heads: regular expressions on paths of leaves that begin anew, such as an output layer that
        the next task has to itself; those of ``initial`` take their place. (Networks that hold a
        head for each task need it not: what no likelihood touches stays at its prior.)
      initial: what was started from, and its prior, for ``heads``.

    Returns:
      ``(fields, prior)``: what to train next, and the prior to hand to
      :func:`adaptivenet.posterior.meanfield.elbo`. The prior shares no buffer with the fields, so
      that a training step may donate these.

    Raises:
      ValueError: a number is not positive, ``widen`` is below 1, one of ``heads`` and ``initial``
        is given without the other, a pattern matches nothing, or trees do not fit.

    References:
      Nguyen, Li, Bui and Turner, "Variational continual learning", ICLR 2018, section 2; Swaroop,
      Nguyen, Bui and Turner, "Improving and understanding variational continual learning",
      arXiv:1905.02099, for where to start.

    >>> fields = meanfield.init({"w": jnp.array([3.0])}, 0.5)
    >>> fields, prior = next_task(fields, scale=0.01, widen=4.0)
    >>> prior.mean["w"].tolist(), prior.precision["w"].round(4).tolist()  # 1 / (4 * 0.5^2)
    ([3.0], [1.0])
    >>> meanfield.scales(fields)["w"].round(4).tolist()
    [0.009999999776482582]
    """
    if known(widen) and not np.all(np.asarray(widen) >= 1):
        raise ValueError(f"widen must be at least 1, not {widen}.")
    if (heads is None) != (initial is None):
        raise ValueError(
            "heads= and initial= belong together: give the paths of the leaves that begin anew, "
            "and the (fields, prior) that the first task began with."
        )
    belief = meanfield.posterior(fields)
    prior = Posterior(
        copied(belief.mean, belief.mean),
        trees.map_synapses(lambda s: s / cast(widen, s), belief.precision),
    )
    if scale is not None:
        fields = meanfield.init(fields.mean, scale)
    if heads is None or initial is None:
        return fields, prior
    start, first = initial
    chosen = trees.select_leaves(fields.mean, heads)

    def anew(tree: PyTree, fresh: PyTree) -> PyTree:
        return jax.tree.map(
            lambda yes, old, new: new if yes else old, chosen, tree, fresh, is_leaf=trees.is_masked
        )

    fields = MeanField(anew(fields.mean, start.mean), anew(fields.rho, start.rho))
    fresh = (copied(belief.mean, first.mean), copied(belief.precision, first.precision))
    return fields, Posterior(anew(prior.mean, fresh[0]), anew(prior.precision, fresh[1]))


def refine(
    fields: MeanField,
    log_likelihood: Callable[..., jax.Array],
    key: jax.Array,
    *args: Any,
    tx: optax.GradientTransformation,
    steps: int,
    samples: int = 1,
    scale: Number = 1.0,
    temperature: Number = 1.0,
    prior: Posterior | None = None,
) -> MeanField:
    """Takes what was kept of the data into the belief, right before it predicts.

    It is a run of the ELBO with the belief itself as the prior. What comes out is for predictions:
    the next task goes on from the belief that went in, so that no example is counted twice.

    Args:
      fields: the belief after all tasks so far, which the coresets had no part in.
      log_likelihood: ``log_likelihood(params, *args)``, summed over the examples.
      key: random key.
      *args: the coreset.
      tx: an optimizer of the fields, such as ``optax.adam(1e-3)``.
      steps: its updates.
      samples: draws an update.
      scale: factor of the likelihood, where the arguments are a part of the coreset.
      temperature: factor of the divergence.
      prior: another prior than the belief itself.

    Returns:
      The belief to predict with.

    Raises:
      ValueError: fewer than one sample or a negative number of steps, or trees do not fit.

    References:
      Nguyen et al., "Variational continual learning", ICLR 2018, section 2.1.

    >>> def log_likelihood(params, seen):
    ...     return -0.5 * jnp.sum((seen - params["w"]) ** 2)
    >>> fields = meanfield.init({"w": jnp.array([0.0])}, 1.0)
    >>> key, tx = jax.random.key(0), optax.adam(0.02)
    >>> found = refine(fields, log_likelihood, key, jnp.full(3, 4.0), tx=tx, steps=400, samples=8)
    >>> round(found.mean["w"].item())  # 3 * 4 / (1 + 3)
    3
    """
    if steps < 0:
        raise ValueError(f"steps must not be negative, not {steps}.")
    base = meanfield.posterior(fields) if prior is None else prior

    def whole(trained: MeanField) -> MeanField:
        means = trees.merge_synapses(lambda new, _: new, trained.mean, fields.mean)
        return MeanField(means, trained.rho)

    def objective(trained: MeanField, now: jax.Array) -> jax.Array:
        return -meanfield.elbo(
            whole(trained),
            log_likelihood,
            now,
            *args,
            samples=samples,
            scale=scale,
            temperature=temperature,
            prior=base,
        )

    def step(carry: Any, now: jax.Array) -> tuple[Any, None]:
        trained, state = carry
        updates, state = tx.update(jax.grad(objective)(trained, now), state, trained)
        return (optax.apply_updates(trained, updates), state), None

    start = MeanField(trees.map_synapses(lambda _, m: m, fields.rho, fields.mean), fields.rho)
    (trained, _), _ = jax.lax.scan(step, (start, tx.init(start)), jax.random.split(key, steps))
    return whole(trained)


def random_coreset(key: jax.Array, total: int, count: int) -> jax.Array:
    """Examples drawn without replacement.

    Args:
      key: random key.
      total: number of examples.
      count: number to keep.

    Returns:
      ``[count]`` int32 positions, all different.

    Raises:
      ValueError: ``count`` is not between 1 and ``total``.

    >>> sorted(random_coreset(jax.random.key(0), 3, 3).tolist())
    [0, 1, 2]
    """
    _check_count(count, total)
    return jax.random.permutation(key, jnp.arange(total, dtype=jnp.int32))[:count]


def k_center(inputs: jax.Array, count: int, key: jax.Array) -> jax.Array:
    """Examples that cover the others: each is the one farthest from those before it.

    The largest distance of an example to the nearest one kept is at most twice the smallest that
    is possible with so many. It takes ``count`` passes over the data.

    Args:
      inputs: ``[examples, ...]``; distances are Euclidean, of all that follows the first axis.
      count: number to keep.
      key: random key, for the first of them.

    Returns:
      ``[count]`` int32 positions, in the order of their choice; all different where the inputs are.

    Raises:
      ValueError: ``count`` is not between 1 and the number of examples.

    References:
      Gonzalez, "Clustering to minimize the maximum intercluster distance", Theoretical Computer
      Science 38 (1985); Nguyen et al., ICLR 2018, section 2.1, for coresets chosen by it.

    >>> places = k_center(jnp.array([[0.0], [0.1], [5.0], [5.1]]), 2, jax.random.key(0))
    >>> sorted((places // 2).tolist())  # one of each pair
    [0, 1]
    """
    total = inputs.shape[0]
    _check_count(count, total)
    points = wide(inputs).reshape(total, -1)

    def distance(place: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(points - points[place]), axis=1)

    def choose(carry: Any, _: None) -> tuple[Any, jax.Array]:
        nearest, place = carry
        # What is kept is never chosen again, not even among copies of it.
        nearest = jnp.where(nearest < 0, nearest, jnp.minimum(nearest, distance(place)))
        nearest = nearest.at[place].set(-1.0)
        return (nearest, jnp.argmax(nearest).astype(jnp.int32)), place

    first = jax.random.randint(key, (), 0, total, jnp.int32)
    start = (jnp.full(total, jnp.inf, points.dtype), first)
    return jax.lax.scan(choose, start, None, length=count)[1]


def remainder(chosen: jax.Array, total: int) -> jax.Array:
    """The examples that were not chosen.

    Args:
      chosen: ``[count]`` positions, all different.
      total: number of examples.

    Returns:
      ``[total - count]`` int32 positions, rising.

    Raises:
      ValueError: more are chosen than there are; where it can be seen, one is chosen twice.

    >>> remainder(jnp.array([3, 0]), 5).tolist()
    [1, 2, 4]
    """
    count = chosen.shape[0]
    if count > total:
        raise ValueError(f"{count} positions are chosen of {total} examples.")
    if known(chosen) and len(np.unique(np.asarray(chosen))) != count:
        raise ValueError("chosen holds a position twice: all must be different.")
    taken = jnp.zeros(total, bool).at[chosen].set(True)
    return jnp.argsort(taken, stable=True)[: total - count].astype(jnp.int32)


def _check_count(count: int, total: int) -> None:
    if not 1 <= count <= total:
        raise ValueError(f"count must be between 1 and the {total} examples, not {count}.")
