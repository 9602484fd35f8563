"""PackNet: tasks side by side in one network, by pruning and freezing.

A task trains the weights that nobody owns, on top of those of all earlier tasks, which are frozen.
Then the smallest of its weights are pruned and stay free for the tasks to come; what is kept is
retrained for a while, belongs to the task, and never changes again. With the task's number at hand
the network of any task comes back exactly (:func:`adaptivenet.consolidation.ownership.view`)::

    tx = optax.chain(optax.adam(1e-3), packnet(0.5))     # behind the optimizer
    for task in tasks:
        ...                                              # train
        opt_state = consolidate(opt_state, params)       # prune: from here on only the kept learn
        ...                                              # retrain
        opt_state = consolidate(opt_state, params)       # the next task
    params_of_task_1 = view(params, owners(opt_state), 1)

Pruned weights land on zero with the first update after pruning; to test in between,
:func:`prune` gives the pruned parameters at once. What an optimizer remembers of the weights of
another task (Adam's moments, say) should not move those of the next: begin each with
``reset_moments(opt_state, params, free(owners(opt_state)))``, or with a new optimizer as the
authors do.

Leaves that are not synapses (biases, norms) learn with the first task only, as in the paper. Output
layers of single tasks are named by ``heads=``; they are never touched.

References:
  Mallya and Lazebnik, "PackNet: adding multiple tasks to a single network by iterative pruning",
  CVPR 2018, arXiv:1711.05769.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet import counts, selection, trees
from adaptivenet.consolidation.ownership import FREE, capacity, free, nobody, view
from adaptivenet.counts import Share
from adaptivenet.posterior._arrays import known
from adaptivenet.pruning.masks import landing

PyTree = Any
Number = Any  # a Python number, or a traced scalar

__all__ = [
    "PackNetState",
    "capacity",
    "free",
    "owners",
    "packnet",
    "prune",
    "trainable",
    "view",
]


class PackNetState(NamedTuple):
    """State of :func:`packnet`.

    Attributes:
      owner: pytree of int32, the task of each synapse or -1 (free); masked nodes for other leaves.
      task: int32 scalar, the task that is learnt now, from 0.
      retraining: bool scalar, whether it was pruned already.
      fraction: of each leaf's trained synapses, pruned at the boundary.
    """

    owner: PyTree
    task: jax.Array
    retraining: jax.Array
    fraction: Share

    def consolidated(self, params: PyTree, posterior: Any = None, **signals: Any) -> PackNetState:
        """The state after a boundary: pruned after training, the next task after retraining.

        Raises:
          ValueError: the next task would find no free synapse (where values are known).
        """
        del posterior, signals
        _, owner = prune(params, self.owner, self.task, self.fraction)
        owner = jax.tree.map(
            lambda old, new: jnp.where(self.retraining, old, new), self.owner, owner
        )
        after = PackNetState(
            owner=owner,
            task=jnp.where(self.retraining, self.task + 1, self.task),
            retraining=~self.retraining,
            fraction=self.fraction,
        )
        if known(after.task, *jax.tree.leaves(owner)) and after.task.ndim == 0:
            _check_room(after)
        return after


def packnet(
    fraction: Number, *, select: trees.Select = None, heads: trees.Select = None
) -> optax.GradientTransformationExtraArgs:
    """Lets only the weights of the present task learn: put it at the end of the chain.

    While a task is trained, these are the free synapses; while it is retrained, its own, and free
    ones are exactly zero. (Behind it only what leaves zero updates zero may come: frozen weights
    must not decay.)

    Args:
      fraction: share of the synapses trained by a task that are pruned at its boundary, of each
        leaf, in [0, 1): what is left for later tasks.
      select: as for :func:`adaptivenet.trees.select_leaves`, the synapses.
      heads: patterns of leaves that belong to single tasks, such as ``"head"``: they always learn.

    Returns:
      A transformation; :func:`adaptivenet.consolidation.boundary.consolidate` prunes after training
      and goes on to the next task after retraining. No belief is needed.

    Raises:
      ValueError: the fraction is outside [0, 1); at ``init``: a pattern matches nothing, or all
        synapses are heads; at ``update``: no parameters; at a boundary: no free weights are left.

    References:
      Mallya and Lazebnik, CVPR 2018.

    >>> tx, params = packnet(0.5), {"w": jnp.array([[3.0, 1.0]])}
    >>> state = tx.init(params).consolidated(params)
    >>> updates, state = tx.update({"w": jnp.ones((1, 2))}, state, params)
    >>> (params["w"] + updates["w"]).tolist(), state.owner["w"].tolist()
    ([[4.0, 0.0]], [[0, -1]])
    """
    share = counts.as_share(fraction, "fraction")

    def init(params: PyTree) -> PackNetState:
        owner = nobody(params, select)
        if heads is not None:
            head = trees.select_leaves(params, heads)
            owner = jax.tree.map(
                lambda h, o: optax.MaskedNode() if h else o, head, owner, is_leaf=trees.is_masked
            )
            if not jax.tree.leaves(owner):
                raise ValueError(f"heads={heads!r} leaves no synapse to share out among tasks.")
        return PackNetState(owner, jnp.zeros((), jnp.int32), jnp.zeros((), bool), share)

    def update(
        updates: PyTree, state: PackNetState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, PackNetState]:
        del extra
        if params is None:
            raise ValueError(
                "packnet() needs the parameters: call tx.update(grads, opt_state, params)."
            )
        state = state._replace(fraction=share)
        first = state.task == 0
        belongs = (
            trees.select_leaves(params, heads)
            if heads is not None
            else jax.tree.map(lambda _: False, params)
        )

        def hold(head: bool, owner: Any, update: Any) -> Any:
            if head or trees.is_masked(update) or not jnp.issubdtype(update.dtype, jnp.floating):
                return update
            learns = first if trees.is_masked(owner) else _learns(owner, state)
            return jnp.where(learns, update, jnp.zeros_like(update))

        held = jax.tree.map(
            hold, belongs, _at_leaves(state.owner, params), updates, is_leaf=trees.is_masked
        )
        stays = jax.tree.map(lambda o: (o >= 0) | ~state.retraining, state.owner)
        return landing(held, params, stays), state

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def prune(params: PyTree, owner: PyTree, task: Any, fraction: Any) -> tuple[PyTree, PyTree]:
    """Gives the largest of the free weights of each leaf to a task; the others become zero.

    Args:
      params: pytree of arrays.
      owner: pytree of int32, as of :func:`adaptivenet.consolidation.ownership.nobody`.
      task: number of the task that trained the free weights, possibly traced.
      fraction: share of them that is pruned, in [0, 1), rounded to whole weights of each leaf.

    Returns:
      Parameters, and owners.

    Raises:
      ValueError: the fraction is out of range, or the owners belong to another tree.

    References:
      Mallya and Lazebnik, CVPR 2018: the lowest weights by magnitude, layer by layer.

    >>> params, owner = {"w": jnp.array([9.0, 1.0, -3.0])}, {"w": jnp.array([0, -1, -1])}
    >>> params, owner = prune(params, owner, 1, 0.5)
    >>> params["w"].tolist(), owner["w"].tolist()
    ([9.0, 0.0, -3.0], [0, -1, 1])
    """
    share = counts.as_share(fraction, "fraction")
    number = jnp.asarray(task).astype(jnp.int32)

    def give(o: jax.Array, p: jax.Array) -> jax.Array:
        loose = o < 0
        total = counts.as_count(jnp.sum(loose, dtype=jnp.uint32))
        kept = selection.top_mask(p, total - counts.part(share, total), where=loose)
        return jnp.where(kept & loose, number, o)

    given = trees.map_synapses(give, owner, params)
    pruned = trees.merge_synapses(
        lambda o, p: jnp.where(o < 0, jnp.zeros_like(p), p), given, params
    )
    return pruned, given


def trainable(owner: PyTree, task: Any, retraining: Any) -> PyTree:
    """Which synapses learn now.

    Args:
      owner: pytree of int32.
      task: number of the task that is learnt, possibly traced.
      retraining: whether it was pruned already, possibly traced.

    Returns:
      Pytree of bool: the free ones, or those of the task.

    >>> trainable({"w": jnp.array([-1, 0, 1])}, 1, True)["w"].tolist()
    [False, False, True]
    """
    state = PackNetState(
        owner, jnp.asarray(task).astype(jnp.int32), jnp.asarray(retraining), counts.as_share(0.0)
    )
    return jax.tree.map(lambda o: _learns(o, state), owner)


def owners(opt_state: PyTree) -> PyTree:
    """The owners within an optimizer state.

    Args:
      opt_state: state of a chain that holds one :func:`packnet`.

    Returns:
      Pytree of int32.

    Raises:
      ValueError: it holds none, or several.

    >>> tx = optax.chain(optax.sgd(0.1), packnet(0.5))
    >>> owners(tx.init({"w": jnp.ones((1, 2))}))["w"].tolist()
    [[-1, -1]]
    """

    def is_state(node: Any) -> bool:
        return isinstance(node, PackNetState)

    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
    if len(found) != 1:
        raise ValueError(
            f"the optimizer state holds {len(found)} states of packnet(), not one: put "
            "an.consolidation.packnet.packnet(...) at the end of the chain, and pass its state."
        )
    return found[0].owner


def _learns(owner: jax.Array, state: PackNetState) -> jax.Array:
    return owner == jnp.where(state.retraining, state.task, jnp.int32(FREE))


def _at_leaves(owner: PyTree, params: PyTree) -> PyTree:
    """Owners, or masked nodes, at the leaves of the parameters."""
    leaves, treedef = jax.tree.flatten(params)
    marks = jax.tree.leaves(owner, is_leaf=trees.is_masked)
    if len(marks) != len(leaves):
        trees.map_synapses(lambda o, p: o, owner, params)  # says what is wrong
    return treedef.unflatten(marks)


def _check_room(state: PackNetState) -> None:
    """Refuses a next task that would have nothing to learn with."""
    if bool(state.retraining):
        return
    left = sum(int(np.sum(np.asarray(leaf) < 0)) for leaf in jax.tree.leaves(state.owner))
    if not left:
        raise ValueError(
            f"no free weights are left for task {int(state.task)}: all {trees.size(state.owner)} "
            f"belong to the tasks before it. Give packnet() a larger fraction than "
            f"{float(state.fraction):.3g}, or a larger network."
        )
