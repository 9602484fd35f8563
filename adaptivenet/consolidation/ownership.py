"""Which synapse carries which memory: owners, ages, capacity, and the view of one task.

An *owner* is a number for each synapse: the task (counted from 0) at whose boundary the synapse was
first kept, or -1 while it is free. A rule that releases synapses sets them free again, so that a
task's own part of the network can only shrink. Owners are kept by :mod:`.packnet`, where they
decide what may learn, and by :mod:`.lifelong`, where they are bookkeeping.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from adaptivenet import counts, trees
from adaptivenet.consolidation.piggyback import pack, unpack
from adaptivenet.counts import Count
from adaptivenet.posterior._arrays import known

PyTree = Any

__all__ = ["FREE", "Snapshots", "ages", "capacity", "claim", "free", "nobody", "snapshots", "view"]

FREE = -1


def nobody(params: PyTree, select: trees.Select = None) -> PyTree:
    """Owners before anything was learnt: all synapses are free.

    Args:
      params: pytree of arrays.
      select: as for :func:`adaptivenet.trees.select_leaves`.

    Returns:
      Pytree of int32, all -1; masked nodes for leaves that are not synapses.

    Raises:
      ValueError, TypeError: as :func:`adaptivenet.trees.select_leaves`.

    >>> nobody({"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2)})["kernel"].tolist()
    [[-1, -1]]
    """
    kept = trees.synapses(params, select)
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, FREE, dtype=jnp.int32), kept)


def free(owner: PyTree) -> PyTree:
    """The synapses that nobody owns, as a pytree of bool.

    >>> free({"w": jnp.array([-1, 0, 2])})["w"].tolist()
    [True, False, False]
    """
    return jax.tree.map(lambda o: o < 0, owner)


def claim(owner: PyTree, freed: PyTree, task: Any) -> PyTree:
    """Owners after a boundary: what is kept and had no owner belongs to the task just learnt.

    Args:
      owner: pytree of int32.
      freed: pytree of bool, True at synapses that are free from now on.
      task: number of the task, possibly traced.

    Returns:
      Pytree of int32.

    >>> owner, freed = {"w": jnp.array([0, 0, -1, -1])}, {"w": jnp.array([True, False] * 2)}
    >>> claim(owner, freed, 3)["w"].tolist()
    [-1, 0, -1, 3]
    """
    number = jnp.asarray(task).astype(jnp.int32)
    return trees.map_synapses(
        lambda o, f: jnp.where(f, jnp.int32(FREE), jnp.where(o < 0, number, o)), owner, freed
    )


def ages(owner: PyTree, task: Any) -> PyTree:
    """How many tasks ago each synapse was claimed.

    Args:
      owner: pytree of int32.
      task: number of the task learnt last, possibly traced.

    Returns:
      Pytree of int32: 0 for those of this task, -1 for free ones.

    >>> ages({"w": jnp.array([-1, 0, 2])}, 2)["w"].tolist()
    [-1, 2, 0]
    """
    number = jnp.asarray(task).astype(jnp.int32)
    return jax.tree.map(lambda o: jnp.where(o < 0, jnp.int32(-1), number - o), owner)


def capacity(owner: PyTree, tasks: int) -> Count:
    """How many synapses each task owns, exactly.

    Args:
      owner: pytree of int32.
      tasks: how many tasks to count (a Python integer).

    Returns:
      Counts ``[tasks + 1]``: the free ones, then those of tasks 0, 1, ... They are of any size, and
      can be made and stacked within jit and scan; ``.astype(jnp.int32)`` reads them.

    Raises:
      ValueError: ``tasks`` is no number of tasks.

    >>> capacity({"a": jnp.array([-1, 0, 0]), "b": jnp.array([[1]])}, 2).astype(jnp.int32).tolist()
    [1, 2, 1]
    """
    if isinstance(tasks, bool) or not isinstance(tasks, int | np.integer) or tasks < 0:
        raise ValueError(f"tasks must be a number of tasks >= 0, not {tasks!r}.")

    def number(wanted: jax.Array) -> Count:
        total = counts.as_count(0)
        for leaf in jax.tree.leaves(owner):
            total = total + counts.as_count(jnp.sum(leaf == wanted, dtype=jnp.uint32))
        return total

    return jax.lax.map(number, jnp.arange(FREE, int(tasks), dtype=jnp.int32))


def view(params: PyTree, owner: PyTree, task: Any) -> PyTree:
    """The network as a task sees it: its own synapses and those of the tasks before it.

    Args:
      params: pytree of arrays.
      owner: pytree of int32; masked nodes for leaves that are not synapses, which all tasks share.
      task: number of the task, possibly traced.

    Returns:
      ``params`` with zeros at free synapses and at those of later tasks.

    Raises:
      ValueError: the owners belong to another tree.

    References:
      Mallya and Lazebnik, "PackNet", CVPR 2018: the masks at test time.

    >>> w, owner = {"w": jnp.array([1.0, 2.0, 3.0])}, {"w": jnp.array([0, 1, -1])}
    >>> view(w, owner, 0)["w"].tolist(), view(w, owner, 1)["w"].tolist()
    ([1.0, 0.0, 0.0], [1.0, 2.0, 0.0])
    """
    number = jnp.asarray(task).astype(jnp.int32)
    return trees.merge_synapses(
        lambda o, p: jnp.where((o >= 0) & (o <= number), p, jnp.zeros_like(p)), owner, params
    )


class Snapshots(NamedTuple):
    """One mask a task, for networks whose tasks are known when they are used.

    A mask says which synapses carried the task at its boundary; what is released later is taken out
    of all masks (:meth:`released`), for its value belongs to others from then on. So a task's view
    shows what is left of its own network, with whatever its synapses have become; leaves that are
    not synapses (biases, norms) are shared, and shown as they are. Without task ids, nothing of
    this is needed: the whole network is used.

    Attributes:
      bits: pytree of uint8 ``[tasks, ceil(size / 8)]``; masked nodes for leaves that are not
        synapses.
      taken: bool ``[tasks]``, whether there is one yet.
    """

    bits: PyTree
    taken: jax.Array

    def take(self, task: Any, mask: PyTree) -> Snapshots:
        """With the mask of a task, such as what is claimed after its boundary.

        Args:
          task: its number, possibly traced.
          mask: pytree of bool.

        Returns:
          The snapshots.

        Raises:
          ValueError: there is no such task, or the mask is of another tree.
        """
        place = self._place(task)
        packed = pack(mask)
        bits = trees.map_synapses(lambda all_, one: all_.at[place].set(one), self.bits, packed)
        return Snapshots(bits, self.taken.at[place].set(True))

    def released(self, freed: PyTree) -> Snapshots:
        """Without the synapses that were set free, in the mask of every task.

        Args:
          freed: pytree of bool.

        Returns:
          The snapshots.
        """
        packed = pack(freed)
        return self._replace(
            bits=trees.map_synapses(lambda all_, gone: all_ & ~gone, self.bits, packed)
        )

    def mask(self, task: Any, params: PyTree) -> PyTree:
        """The mask of a task, as a pytree of bool; all True while there is none.

        Args:
          task: its number, possibly traced.
          params: the parameters, for their shapes.
        """
        place = self._place(task)
        there = self.taken[place]
        chosen = unpack(jax.tree.map(lambda leaf: leaf[place], self.bits), params)
        return jax.tree.map(lambda leaf: leaf | ~there, chosen)

    def view(self, params: PyTree, task: Any) -> PyTree:
        """The parameters as the task sees them: zeros beyond its mask."""
        mask = self.mask(task, params)
        return trees.merge_synapses(lambda m, p: jnp.where(m, p, jnp.zeros_like(p)), mask, params)

    @property
    def nbytes(self) -> int:
        """What the masks take, exactly."""
        return trees.size(self.bits)

    def _place(self, task: Any) -> jax.Array:
        tasks = self.taken.shape[-1]
        if known(task) and not np.all((np.asarray(task) >= 0) & (np.asarray(task) < tasks)):
            raise ValueError(f"task must be in [0, {tasks}), for which snapshots() made room.")
        return jnp.asarray(task).astype(jnp.int32)


def snapshots(params: PyTree, tasks: int, *, select: trees.Select = None) -> Snapshots:
    """Room for the masks of some tasks.

    Args:
      params: pytree of arrays.
      tasks: how many.
      select: as for :func:`adaptivenet.trees.select_leaves`.

    Returns:
      Snapshots, of no task yet.

    Raises:
      ValueError, TypeError: as :func:`adaptivenet.trees.select_leaves`, or ``tasks`` is below 1.

    >>> params, on = {"w": jnp.array([[1.0, 2.0]])}, {"w": jnp.array([[True, False]])}
    >>> kept = snapshots(params, 3).take(0, on)
    >>> kept.view(params, 0)["w"].tolist(), kept.view(params, 1)["w"].tolist(), kept.nbytes
    ([[1.0, 0.0]], [[1.0, 2.0]], 3)
    """
    if isinstance(tasks, bool) or not isinstance(tasks, int | np.integer) or tasks < 1:
        raise ValueError(f"tasks must be a number of tasks >= 1, not {tasks!r}.")

    def room(leaf: jax.Array) -> jax.Array:
        return jnp.zeros((int(tasks), -(-leaf.size // 8)), jnp.uint8)

    bits = jax.tree.map(room, trees.synapses(params, select))
    return Snapshots(bits, jnp.zeros(int(tasks), bool))
