r"""Hard attention to the task: every task learns which units it uses, and guards them.

A task has an embedding :math:`e_i` for each unit, and multiplies the unit by the attention
:math:`a_i = \sigma(s e_i)`, which becomes binary as the scale s grows over an epoch. The attention
of all tasks so far, :math:`a^{\le t} = \max(a^t, a^{\le t-1})`, scales the gradient of a weight
between units i and j by :math:`1 - \min(a_i, a_j)`, so that weights between units in use do not
move. A regulariser keeps tasks from using units that none has used before::

    units = units_of(couple(apply, params, inputs))            # or a mapping of your own
    tables = init(jax.random.key(0), units, tasks=10)
    tx = optax.chain(optax.sgd(0.05), hat_gradients(units))

    def loss(params, tables, scale):
        now = attention(tables, task, scale)
        data = task_loss(gated(params, units, now), batch)     # or multiply the activations
        return data + 0.75 * regulariser(now, held(opt_state))

    scale = anneal(batch, batches, largest=400)
    grads, of_tables = jax.grad(loss, (0, 1))(params, tables, scale)
    of_tables = compensate(of_tables, tables, scale, largest=400)
    ...                                                        # at the end of the task:
    opt_state = consolidate(opt_state, params, attention=attention(tables, task, 400))

Units are groups of slices of parameters, ``{group: [(path, axis), ...]}``: the bias and the outputs
of the kernel that makes them, and the inputs of those that read them. The groups that
:func:`adaptivenet.pruning.couple` finds in a traced model are such groups. Nothing here knows of
layers, so that convolutions and residual streams are served as well.

The paper gives every task an output layer of its own, which its rule leaves free to learn. Where
slices of output layers are among those that :func:`hat_gradients` is given, their weights from
units in use are held, those of a new task's outputs as well: for the paper's rule give it the same
groups without these slices (:func:`gated` needs them).

References:
  Serra et al., "Overcoming catastrophic forgetting with hard attention to the task", ICML 2018,
  arXiv:1801.01423.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet import trees
from adaptivenet.posterior._arrays import known
from adaptivenet.posterior._states import check_positive
from adaptivenet.pruning.coupling import Coupling, Group

PyTree = Any
Number = Any  # a Python number, or a traced scalar
Units = tuple[Group, ...]
ByUnit = dict[str, jax.Array]

__all__ = [
    "HatState",
    "anneal",
    "attention",
    "clip",
    "compensate",
    "cumulative",
    "factors",
    "gated",
    "hat_gradients",
    "held",
    "init",
    "regulariser",
    "units_of",
    "used",
]

# The paper's, section 2.5: s e is held within 50 where its hyperbolic cosine is taken, e within 6.
_COSINE, _EMBEDDING = 50.0, 6.0


def units_of(
    groups: Coupling | Mapping[str, Sequence[tuple[str, int]]], params: PyTree | None = None
) -> Units:
    """The groups of units, checked; outside of jit.

    Args:
      groups: of :func:`adaptivenet.pruning.couple`, of which those that may go are taken; or a
        mapping from names to the slices of each unit, as path and axis.
      params: the parameters, for a mapping: sizes are read from them.

    Returns:
      The groups.

    Raises:
      ValueError: there is no group or no slice, a path is unknown, an axis is none or was named
        twice, sizes differ, or a mapping comes without parameters.

    >>> params = {"one": {"kernel": jnp.ones((2, 3))}, "two": {"kernel": jnp.ones((3, 1))}}
    >>> hidden = units_of({"hidden": [("one/kernel", 1), ("two/kernel", 0)]}, params)
    >>> hidden[0].count
    3
    """
    if isinstance(groups, Coupling):
        found = groups.free
        shapes = {p: tuple(n.aval.shape) for p, n in zip(groups.paths, groups.leaves, strict=True)}
    else:
        if params is None:
            raise ValueError(
                "units_of() needs the parameters beside a mapping: units_of(groups, params)."
            )
        names = trees.paths(params)
        shapes = dict(zip(names, map(jnp.shape, jax.tree.leaves(params)), strict=True))
        found = tuple(
            Group(name, _count(name, members, shapes), tuple((p, int(a)) for p, a in members))
            for name, members in groups.items()
        )
    if not found:
        raise ValueError("there are no units to attend to: no group of them may go.")
    taken: dict[tuple[str, int], str] = {}
    units = []
    for group in found:
        members = []
        for path, axis in group.members:
            place = (path, axis % len(shapes[path]))
            if place in taken or shapes[path][axis] != group.count:
                raise ValueError(
                    f"axis {axis} of {path!r} with shape {shapes[path]} cannot be the "
                    f"{group.count} units of {group.name!r}"
                    + (f": it holds those of {taken[place]!r}." if place in taken else ".")
                    + " Give a mapping of groups that each have axes of their own."
                )
            taken[place] = group.name
            members.append(place)
        units.append(Group(group.name, group.count, tuple(members)))
    return tuple(units)


def _count(name: str, members: Sequence[tuple[str, int]], shapes: Mapping[str, Any]) -> int:
    if not members:
        raise ValueError(f"the group {name!r} has no slices: give pairs of path and axis.")
    for path, axis in members:
        if path not in shapes:
            raise ValueError(f"{name!r}: no leaf {path!r}; there are {', '.join(shapes)}.")
        if not -len(shapes[path]) <= axis < len(shapes[path]):
            raise ValueError(f"{name!r}: {path!r} of shape {shapes[path]} has no axis {axis}.")
    path, axis = members[0]
    return shapes[path][axis]


def init(key: jax.Array, units: Units, tasks: int) -> ByUnit:
    """Embeddings to train, beside the parameters: standard normal.

    Args:
      key: random key.
      units: of :func:`units_of`.
      tasks: how many.

    Returns:
      For each group float32 ``[tasks, count]``.

    Raises:
      ValueError: ``tasks`` is below 1.
    """
    if isinstance(tasks, bool) or not isinstance(tasks, int | np.integer) or tasks < 1:
        raise ValueError(f"tasks must be a number of tasks >= 1, not {tasks!r}.")
    return {
        group.name: jax.random.normal(
            jax.random.fold_in(key, place), (int(tasks), group.count), jnp.float32
        )
        for place, group in enumerate(units)
    }


def attention(embeddings: ByUnit, task: Any, scale: Number) -> ByUnit:
    """``sigmoid(scale * e)`` of one task.

    Args:
      embeddings: of :func:`init`.
      task: its number, possibly traced.
      scale: s: from :func:`anneal` in training, its largest value otherwise.

    Returns:
      For each group ``[count]``, within [0, 1].

    Raises:
      ValueError: there is no such task.

    References:
      Serra et al., ICML 2018, section 2.2: equation 1 with the gate of their choice.

    >>> attention({"hidden": jnp.array([[0.0, 2.0, -2.0]])}, 0, 400.0)["hidden"].tolist()
    [0.5, 1.0, 0.0]
    """
    for name, table in embeddings.items():
        if known(task) and not np.all((np.asarray(task) >= 0) & (np.asarray(task) < len(table))):
            raise ValueError(f"task {task} is none of the {len(table)} of {name!r}.")
    place = jnp.asarray(task).astype(jnp.int32)
    return {
        name: jax.nn.sigmoid(jnp.asarray(scale).astype(table.dtype) * table[place])
        for name, table in embeddings.items()
    }


def anneal(batch: Any, batches: Any, largest: Number = 400.0) -> jax.Array:
    """The scale of a batch: linear over an epoch from ``1 / largest`` to ``largest``.

    Args:
      batch: number of the batch within the epoch, from 0, possibly traced.
      batches: batches of an epoch.
      largest: the paper's s_max, > 0.

    Returns:
      float32 scalar.

    Raises:
      ValueError: ``largest`` is not positive or ``batches`` is below 1.

    References:
      Serra et al., ICML 2018, section 2.4, equation 3: ``s = 1/s_max + (s_max - 1/s_max) (b - 1) /
      (B - 1)``. (Their code divides by B, and so ends an epoch below ``s_max``.)

    >>> [anneal(b, 3, largest=4.0).item() for b in range(3)]
    [0.25, 2.125, 4.0]
    """
    check_positive("largest", largest)
    if known(batches) and not np.all(np.asarray(batches) >= 1):
        raise ValueError(f"batches must be at least 1, not {batches}.")
    top = jnp.asarray(largest).astype(jnp.float32)
    steps = jnp.maximum(jnp.asarray(batches).astype(jnp.float32) - 1.0, 1.0)
    share = jnp.asarray(batch).astype(jnp.float32) / steps
    return 1.0 / top + (top - 1.0 / top) * share


def cumulative(before: ByUnit, now: ByUnit) -> ByUnit:
    """``max(a^{<t}, a^t)``: what any task so far attends to.

    Raises:
      ValueError: the groups differ.

    >>> cumulative({"h": jnp.array([0.0, 1.0])}, {"h": jnp.array([0.5, 0.5])})["h"].tolist()
    [0.5, 1.0]
    """
    _same(before, now)
    return {name: jnp.maximum(a, now[name].astype(a.dtype)) for name, a in before.items()}


def regulariser(now: ByUnit, before: ByUnit) -> jax.Array:
    """The share of the room left by earlier tasks that a task attends to.

    Args:
      now: attention of the task that is learnt.
      before: cumulative attention of the tasks before it; zeros for the first.

    Returns:
      ``sum a (1 - a^{<t}) / sum (1 - a^{<t})`` over all units, float32; 0 where no room is left.

    Raises:
      ValueError: the groups differ.

    References:
      Serra et al., ICML 2018, section 2.6, equation 5: the weighted and normalised L1 of the
      attention.

    >>> regulariser({"h": jnp.array([1.0, 0.5, 1.0])}, {"h": jnp.array([1.0, 0.0, 0.0])}).item()
    0.75
    """
    _same(before, now)
    room = sum((jnp.sum(1.0 - a) for a in before.values()), start=jnp.zeros(()))
    taken = sum((jnp.sum(now[k] * (1.0 - a)) for k, a in before.items()), start=jnp.zeros(()))
    return jnp.where(room > 0, taken / jnp.where(room > 0, room, 1.0), 0.0)


def compensate(grads: ByUnit, embeddings: ByUnit, scale: Number, largest: Number = 400.0) -> ByUnit:
    r"""Gradients of embeddings as if the gate had been :math:`\sigma(e)` all along.

    The annealed gate passes little gradient where s is large; ``q' = s_max (cosh(s e) + 1) /
    (s (cosh(e) + 1)) q``, with ``s e`` held within 50. (A gate of exactly 1, in float32 from an
    ``s e`` of about 17 on, passes none, which nothing can make good.)

    Args:
      grads: of the embeddings.
      embeddings: of :func:`init`.
      scale: s of the batch.
      largest: s_max.

    Returns:
      Gradients of the same shapes.

    Raises:
      ValueError: the groups differ.

    References:
      Serra et al., ICML 2018, section 2.5: embedding gradient compensation.

    >>> one = {"h": jnp.ones((1, 1))}
    >>> compensate(one, one, scale=1.0, largest=1.0)["h"].item()
    1.0
    """
    _same(embeddings, grads)

    def fair(q: jax.Array, e: jax.Array) -> jax.Array:
        s, top = (jnp.asarray(x).astype(e.dtype) for x in (scale, largest))
        inner = jnp.cosh(jnp.clip(s * e, -_COSINE, _COSINE)) + 1.0
        return (q.astype(e.dtype) * (top / s) * inner / (jnp.cosh(e) + 1.0)).astype(q.dtype)

    return {name: fair(grads[name], e) for name, e in embeddings.items()}


def clip(embeddings: ByUnit, limit: Number = _EMBEDDING) -> ByUnit:
    """Embeddings held within a limit, after a step; beyond it the gate passes nothing.

    >>> clip({"h": jnp.array([-9.0, 1.0])})["h"].tolist()
    [-6.0, 1.0]
    """
    bound = jnp.asarray(limit)
    return {
        k: jnp.clip(e, -bound.astype(e.dtype), bound.astype(e.dtype)) for k, e in embeddings.items()
    }


def used(held: ByUnit, threshold: Number = 0.5) -> jax.Array:
    """The share of all units that is attended to: the capacity in use.

    Args:
      held: attention, of a task or cumulative.
      threshold: what counts as attended.

    Returns:
      float32 scalar in [0, 1].

    >>> used({"h": jnp.array([1.0, 0.0]), "g": jnp.array([1.0, 1.0])}).item()
    0.75
    """
    limit = jnp.asarray(threshold)
    hits = [jnp.sum(a > limit.astype(a.dtype), dtype=jnp.int32) for a in held.values()]
    total = sum(a.size for a in held.values())
    return sum(hits[1:], hits[0]).astype(jnp.float32) / total


def gated(params: PyTree, units: Units, now: ByUnit) -> PyTree:
    """Parameters that compute what the model computes with its units multiplied by the attention.

    What reads a unit is multiplied in its place: ``(a * h) W = h (a W)``. A slice reads a unit
    where its axis is not the last (the inputs of a kernel ``[..., inputs, outputs]``). Gradients
    are those of the multiplied activations.

    Args:
      params: pytree of arrays.
      units: of :func:`units_of`.
      now: attention.

    Returns:
      Pytree like ``params``.

    Raises:
      ValueError: the units are of other parameters, the attention of other groups, or nothing reads
        a group.

    >>> params = {"one": jnp.ones((1, 2)), "two": jnp.ones((2, 1))}
    >>> units = units_of({"h": [("one", 1), ("two", 0)]}, params)
    >>> gated(params, units, {"h": jnp.array([0.0, 0.5])})["two"].tolist()
    [[0.0], [0.5]]
    """
    _match(units, now)
    for group in units:
        if not any(axis < _rank(params, path) - 1 for path, axis in group.members):
            raise ValueError(
                f"nothing reads the units of {group.name!r}: its slices "
                f"{', '.join(f'{p}[{a}]' for p, a in group.members)} are outputs all. Multiply the "
                "activations by the attention in the model instead."
            )

    def gate(leaf: Any, axes: Sequence[tuple[int, Group]]) -> Any:
        for axis, group in axes:
            if axis < leaf.ndim - 1:
                leaf = leaf * _along(now[group.name], axis, leaf.ndim).astype(leaf.dtype)
        return leaf

    return _per_leaf(gate, params, units)


def factors(params: PyTree, units: Units, held: ByUnit) -> PyTree:
    """What gradients are multiplied by: one minus the least attention of the units they join.

    Args:
      params: pytree of arrays (or of their shapes).
      units: of :func:`units_of`.
      held: cumulative attention.

    Returns:
      Pytree of floats that broadcast against the parameters, of as many axes; masked nodes for
      leaves that have no slice of any unit.

    Raises:
      ValueError: the units are of other parameters, or the attention of other groups.

    References:
      Serra et al., ICML 2018, equation 2: ``1 - min(a_i, a_j)``, and their code: of a bias
      ``1 - a_i``. (A kernel with units on one side only, such as the first, has no other attention
      to take the least of; the output layers, in the paper, have the hard-coded one of their task.)

    >>> params = {"one": jnp.ones((1, 2)), "two": jnp.ones((2, 2))}
    >>> units = units_of({"g": [("one", 1), ("two", 0)], "h": [("two", 1)]}, params)
    >>> held = {"g": jnp.array([1.0, 0.0]), "h": jnp.array([1.0, 0.5])}
    >>> factors(params, units, held)["two"].tolist()
    [[0.0, 0.5], [1.0, 1.0]]
    """
    _match(units, held)

    def factor(leaf: Any, axes: Sequence[tuple[int, Group]]) -> Any:
        if not axes:
            return optax.MaskedNode()
        rank, least = len(jnp.shape(leaf)), None
        for axis, group in axes:
            own = _along(held[group.name], axis, rank)
            least = own if least is None else jnp.minimum(least, own)
        assert least is not None
        return 1.0 - least

    return _per_leaf(factor, params, units)


class HatState(NamedTuple):
    """State of :func:`hat_gradients`.

    Attributes:
      attention: for each group float32 ``[count]``, cumulative over the tasks so far; zeros before
        the first boundary.
    """

    attention: ByUnit

    def consolidated(
        self, params: PyTree, posterior: Any = None, *, attention: Any = None, **signals: Any
    ) -> HatState:
        """The state after a task: its attention is held, too."""
        del params, posterior, signals
        if attention is None:
            raise ValueError(
                "consolidate() reached hat_gradients(), which needs the attention of the task just "
                "learnt: pass attention=hat.attention(embeddings, task, largest_scale)."
            )
        return HatState(cumulative(self.attention, attention))


def hat_gradients(units: Units) -> optax.GradientTransformationExtraArgs:
    """Multiplies what passes by :func:`factors` of the attention of all tasks before.

    In front of plain SGD, or behind it, this is the paper's rule. Put it behind an optimizer that
    has momentum, adapts its steps or decays weights: these would undo a factor on the gradient, and
    move weights whose gradient is zero. Before the first boundary it is the identity.

    Args:
      units: of :func:`units_of`.

    Returns:
      A transformation; at a boundary it asks for ``attention=``, that of the task just learnt, and
      no belief.

    Raises:
      ValueError: at ``init``: the units are of other parameters; at a boundary: no attention, or of
        other groups.

    References:
      Serra et al., ICML 2018, equation 2.

    >>> params = {"one": jnp.ones((1, 2)), "two": jnp.ones((2, 1))}
    >>> tx = hat_gradients(units_of({"h": [("one", 1), ("two", 0)]}, params))
    >>> state = tx.init(params).consolidated(params, attention={"h": jnp.array([1.0, 0.0])})
    >>> updates, _ = tx.update(params, state)
    >>> updates["one"].tolist(), updates["two"].tolist()
    ([[0.0, 1.0]], [[0.0], [1.0]])
    """
    units = tuple(units)

    def init(params: PyTree) -> HatState:
        zeros = {group.name: jnp.zeros(group.count, jnp.float32) for group in units}
        factors(params, units, zeros)  # refuses units of other parameters
        return HatState(zeros)

    def update(
        updates: PyTree, state: HatState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, HatState]:
        del params, extra
        shares = factors(updates, units, state.attention)
        scaled = trees.merge_synapses(
            lambda f, u: (u.astype(f.dtype) * f).astype(u.dtype), shares, updates
        )
        return scaled, state

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def held(opt_state: PyTree) -> ByUnit:
    """The cumulative attention within an optimizer state.

    Args:
      opt_state: state of a chain that holds one :func:`hat_gradients`.

    Returns:
      For each group ``[count]``.

    Raises:
      ValueError: it holds none, or several.
    """

    def is_state(node: Any) -> bool:
        return isinstance(node, HatState)

    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
    if len(found) != 1:
        raise ValueError(
            f"the optimizer state holds {len(found)} states of hat_gradients(), not one: add "
            "an.consolidation.hat.hat_gradients(units) to the chain, and pass its state."
        )
    return found[0].attention


def _along(values: jax.Array, axis: int, rank: int) -> jax.Array:
    return values.reshape([-1 if place == axis else 1 for place in range(rank)])


def _rank(params: PyTree, path: str) -> int:
    ranks = dict(zip(trees.paths(params), map(jnp.ndim, jax.tree.leaves(params)), strict=True))
    return ranks.get(path, 0)


def _per_leaf(function: Any, params: PyTree, units: Units) -> PyTree:
    """Maps over leaves and the axes of each that are units."""
    axes: dict[str, list[tuple[int, Group]]] = {}
    for group in units:
        for path, axis in group.members:
            axes.setdefault(path, []).append((axis, group))
    leaves, treedef = jax.tree.flatten(params)
    names = trees.paths(params)
    shapes = dict(zip(names, map(jnp.shape, leaves), strict=True))
    for path, found in axes.items():
        for axis, group in found:
            shape = shapes.get(path)
            if shape is None or len(shape) <= axis or shape[axis] != group.count:
                raise ValueError(
                    f"the units of {group.name!r} are axis {axis} of {path!r} with {group.count} "
                    f"elements, and the parameters have "
                    f"{'no such leaf' if shape is None else f'shape {shape} there'}: give units of "
                    "the parameters that are trained."
                )
    return treedef.unflatten(
        [function(leaf, axes.get(name, [])) for name, leaf in zip(names, leaves, strict=True)]
    )


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    shapes = [{name: jnp.shape(leaf) for name, leaf in part.items()} for part in (one, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the groups of units differ: {shapes[0]} and {shapes[1]}.")


def _match(units: Units, by_unit: Mapping[str, Any]) -> None:
    _same({group.name: np.zeros(group.count) for group in units}, by_unit)
