"""SWAG: a Gaussian fitted to the iterates of an optimizer.

Put it at the end of a chain, where it sees the parameters that every update leads to::

    tx = optax.chain(optax.sgd(0.05, momentum=0.9), swag(start=2_000, every=100, rank=20))
    ...
    belief = find(opt_state, params)                    # the diagonal, for pruning and protection
    drawn = sample_swag(opt_state, params, jax.random.key(0))  # with the low-rank part

The learning rate should be constant and rather large from ``start`` on, for the spread of the
iterates to tell of the loss and not of the schedule.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet import trees
from adaptivenet.posterior._states import check_positive, filled, normal, scalar
from adaptivenet.posterior.gaussian import Posterior

PyTree = Any
Number = Any  # a Python number, or a traced scalar

__all__ = ["SwagState", "sample_swag", "swag"]


class SwagState(NamedTuple):
    """State of :func:`swag`.

    Attributes:
      step: int32, number of updates.
      count: int32, number of iterates collected.
      mean: pytree of float32 (float64 for float64 parameters), their mean; masked nodes for leaves
        that are not floating.
      spread: pytree likewise, the sum of their squared deviations from the mean.
      deviations: pytree of ``[rank, *shape]``, the last iterates less the running mean of their
        time, each at ``(its number - 1) % rank``; empty without a low-rank part.
      floor: the least variance.
    """

    step: jax.Array
    count: jax.Array
    mean: PyTree
    spread: PyTree
    deviations: PyTree
    floor: jax.Array

    def diagonal(self) -> PyTree:
        """The variance of the iterates, elementwise, without the floor."""
        return trees.map_synapses(
            lambda s: s / jnp.maximum(self.count, 1).astype(s.dtype), self.spread
        )

    def posterior(self, params: PyTree) -> Posterior:
        """The belief; around the parameters, and as narrow as can be, before the first iterate.

        With a low-rank part the variances are those of the whole, half from each.
        """
        mean = trees.map_synapses(
            lambda m, p: jnp.where(self.count > 0, m, p.astype(m.dtype)), self.mean, params
        )
        variance = self.diagonal()
        if self.deviations:
            rows = self.rows()
            variance = trees.map_synapses(
                lambda v, d: 0.5 * (v + jnp.sum(jnp.square(d), 0) / self.freedom(rows, v)),
                variance,
                self.deviations[0],
            )
        return Posterior(
            mean,
            trees.map_synapses(
                lambda v: 1.0 / jnp.maximum(v, self.floor.astype(v.dtype)), variance
            ),
        )

    def rows(self) -> jax.Array:
        """How many deviations are filled."""
        rank = jax.tree.leaves(self.deviations)[0].shape[0]
        return jnp.minimum(self.count, rank)

    def freedom(self, rows: jax.Array, like: jax.Array) -> jax.Array:
        """``K - 1``, the denominator of the low-rank covariance."""
        return jnp.maximum(rows - 1, 1).astype(like.dtype)


def swag(
    start: Number, *, every: Number = 1, rank: int = 0, floor: Number = 1e-30
) -> optax.GradientTransformationExtraArgs:
    """Collects the moments of the iterates; the updates pass as they are.

    Iterates are the parameters after an update. In the place of the second moment, the sum of the
    squared deviations is kept (Welford's algorithm), which does not cancel in float32. The
    covariance is the diagonal of the iterates' variances, or, with ``rank=K``, half of it and half
    of ``D D^T / (K - 1)``, where D are the last K deviations from the running mean.

    Args:
      start: the first update whose iterate may be collected; ``start``, ``start + every``, ... are.
      every: updates between iterates, such as those of an epoch.
      rank: K, the number of deviations that are kept; 0 is SWAG-Diagonal. Costs K times the memory
        of the parameters.
      floor: the least variance, for parameters that have not moved.

    Returns:
      A transformation whose state has the method ``posterior(params)``.

    Raises:
      ValueError: a number is out of range; at ``update``: no parameters.

    References:
      Maddox et al., "A simple baseline for Bayesian uncertainty in deep learning", NeurIPS 2019,
      sections 3.2 and 3.3; Welford, Technometrics 4 (1962).

    >>> tx, params = optax.chain(optax.sgd(1.0), swag(start=2)), {"w": jnp.array([0.0])}
    >>> state = tx.init(params)
    >>> for gradient in (5.0, -1.0, -2.0):  # iterates -5, -4, -2, the last two of which count
    ...     updates, state = tx.update({"w": jnp.array([gradient])}, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> belief = state[-1].posterior(params)
    >>> belief.mean["w"].item(), belief.precision["w"].item()
    (-3.0, 1.0)
    """
    for name, value, least in (("start", start, 0), ("every", every, 1), ("rank", rank, 0)):
        whole = isinstance(value, jax.core.Tracer) or (
            np.issubdtype(np.asarray(value).dtype, np.integer)
            and np.all(np.asarray(value) >= least)
        )
        if not whole:
            raise ValueError(f"{name} must be a whole number >= {least}, not {value!r}.")
    if isinstance(rank, jax.core.Tracer):
        raise ValueError(
            "rank sets shapes and cannot be traced: optax.inject_hyperparams(swag, "
            "static_args=('rank',))."
        )
    if rank == 1:
        raise ValueError("rank=1 has no covariance; use rank=0 (the diagonal) or at least 2.")
    check_positive("floor", floor)

    def init(params: PyTree) -> SwagState:
        zeros = filled(params, 0.0)

        def rows(leaf: jax.Array) -> jax.Array:
            return jnp.zeros((rank, *leaf.shape), leaf.dtype)

        return SwagState(
            step=jnp.zeros((), jnp.int32),
            count=jnp.zeros((), jnp.int32),
            mean=zeros,
            spread=filled(params, 0.0),
            deviations=(trees.map_synapses(rows, zeros),) if rank else (),
            floor=scalar(floor),
        )

    def update(
        updates: PyTree, state: SwagState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, SwagState]:
        del extra
        if params is None:
            raise ValueError("swag() needs the parameters: call tx.update(grads, state, params).")
        step = jnp.asarray(optax.safe_increment(state.step))
        first = jnp.asarray(start).astype(jnp.int32)
        since = step - first
        due = (since >= 0) & (since % jnp.asarray(every).astype(jnp.int32) == 0)
        count = state.count + due.astype(jnp.int32)

        kept = (state.mean, state.spread, state.deviations)

        def collect(kept: Any, updates: PyTree, params: PyTree) -> Any:
            mean, spread, deviations = kept
            number = count

            def gap(mean: jax.Array, update: jax.Array, param: jax.Array) -> jax.Array:
                # What apply_updates lands on; XLA drops a cast that only rounds, but not this.
                info = jnp.finfo(param.dtype)
                total = param.astype(mean.dtype) + update.astype(mean.dtype)
                return jax.lax.reduce_precision(total, info.nexp, info.nmant) - mean

            gaps = trees.map_synapses(gap, mean, updates, params)
            mean = trees.map_synapses(lambda m, g: m + g / number.astype(m.dtype), mean, gaps)

            # (x - old mean) (x - new mean): the second factor is (1 - 1 / count) of the first.
            def rest(gap: jax.Array) -> jax.Array:
                return 1.0 - 1.0 / number.astype(gap.dtype)

            spread = trees.map_synapses(lambda s, g: s + jnp.square(g) * rest(g), spread, gaps)
            if rank:

                def put(rows: jax.Array, gap: jax.Array) -> jax.Array:
                    place = (number - 1) % rank
                    return jax.lax.dynamic_update_index_in_dim(rows, gap * rest(gap), place, 0)

                deviations = (trees.map_synapses(put, deviations[0], gaps),)
            return mean, spread, deviations

        # In a step without an iterate nothing is computed.
        mean, spread, deviations = jax.lax.cond(
            due, collect, lambda kept, updates, params: kept, kept, updates, params
        )
        return updates, SwagState(
            step=step,
            count=count,
            mean=mean,
            spread=spread,
            deviations=deviations,
            floor=scalar(floor),
        )

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def sample_swag(opt_state: PyTree, params: PyTree, key: jax.Array) -> PyTree:
    """Draws parameters from the Gaussian, with its low-rank part where one is kept.

    Args:
      opt_state: state with a :func:`swag` in it, at any depth; the outermost counts.
      params: the parameters, for the leaves that are not floating and for the dtypes.
      key: random key.

    Returns:
      A pytree like ``params``.

    Raises:
      ValueError: the state holds no :func:`swag`.

    References:
      Maddox et al., NeurIPS 2019, equation 1.

    >>> params = {"w": jnp.ones(2)}
    >>> sample_swag(swag(start=1).init(params), params, jax.random.key(0))["w"].tolist()
    [1.0, 1.0]
    """

    def here(node: Any) -> bool:
        return isinstance(node, SwagState)

    states = [node for node in jax.tree.leaves(opt_state, is_leaf=here) if here(node)]
    if not states:
        raise ValueError(
            "this optimizer state holds no swag(): put an.posterior.swag(start, ...) at the end of "
            "the chain."
        )
    state = states[0]
    wide, narrow = jax.random.split(key)
    share = 0.5 if state.deviations else 1.0
    drawn = trees.map_synapses(
        jnp.add,
        state.posterior(params).mean,
        normal(wide, trees.map_synapses(lambda v: jnp.sqrt(share * v), state.diagonal())),
    )
    if state.deviations:
        # The same weights in every leaf: the covariance reaches across leaves.
        leaf = jax.tree.leaves(state.deviations)[0]
        factors = jax.random.normal(narrow, (leaf.shape[0],), leaf.dtype)
        factors = factors / jnp.sqrt(2.0 * state.freedom(state.rows(), leaf))
        drawn = trees.map_synapses(
            lambda x, d: x + jnp.tensordot(factors.astype(d.dtype), d, 1),
            drawn,
            state.deviations[0],
        )
    return trees.merge_synapses(lambda x, p: x.astype(p.dtype), drawn, params)
