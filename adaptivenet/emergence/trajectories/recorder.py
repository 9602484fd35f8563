"""The recorder: turns each mask into a frame, inside jit, vmap and scan."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet import trees
from adaptivenet.emergence.trajectories.history import Trajectory, TrajectoryError
from adaptivenet.pruning.record import count_leaves

PyTree = Any

__all__ = ["Frame", "Recorder", "RecorderState"]


class RecorderState(NamedTuple):
    """What a recorder remembers between rounds.

    Attributes:
      mask: pytree of bool, the mask of the last round (of all synapses, for exact counts).
      age: int32 ``[n]``, rounds since a followed synapse woke; -1 where dead.
      round: int32, completed rounds.
    """

    mask: PyTree
    age: jax.Array
    round: jax.Array


class Frame(NamedTuple):
    """One round. ``n`` synapses are followed; counts are of the whole network.

    Attributes:
      round: int32, number of the round, from 1.
      alive: bool ``[n]``.
      magnitude: float32 ``[n]``, absolute values of the parameters, alive or not.
      score: float32 ``[n]``, or ``()`` if none were given.
      age: int32 ``[n]``, rounds since the synapse woke (or since recording began), 0 in the round
        in which it wakes; where it just died, the rounds it had lived; -1 where it was dead.
      born: bool ``[n]``, alive now and not in the round before.
      died: bool ``[n]``, alive in the round before and not now.
      births: uint32 ``[leaves]``, synapses of the network that woke.
      deaths: uint32 ``[leaves]``, synapses of the network that died.
      living: uint32 ``[leaves]``, synapses of the network that are alive.
    """

    round: Any
    alive: Any
    magnitude: Any
    score: Any
    age: Any
    born: Any
    died: Any
    births: Any
    deaths: Any
    living: Any


class Recorder:
    """Follows synapses from round to round; static, so jit, vmap and scan may close over it.

    Args:
      params: pytree of arrays or of ``jax.ShapeDtypeStruct`` (of one member of a population).
      sample: number of synapses to follow, drawn without replacement, from each leaf in proportion
        to its size; None for all.
      seed: non-negative integer; the draw is the same on every machine.
      select: which leaves hold synapses, as given to the pruner; see
        :func:`adaptivenet.trees.select_leaves`.

    Attributes:
      names: path of each leaf.
      sizes: synapses of each leaf.
      leaf: int32 ``[n]``, index of each followed synapse's leaf.
      position: int64 ``[n]``, its position in that leaf, row by row.

    Raises:
      ValueError: ``sample`` or ``seed`` is out of range, or as ``select_leaves``.

    >>> params = {"w": jnp.array([[1.0, -3.0], [0.2, 2.0]])}
    >>> recorder = Recorder(params)
    >>> state = recorder.init({"w": jnp.ones((2, 2), bool)})
    >>> mask = {"w": jnp.array([[False, True], [False, True]])}
    >>> state, frame = jax.jit(recorder.update)(state, params, mask)
    >>> frame.died.tolist(), frame.deaths.tolist()
    ([True, False, True, False], [2])
    """

    def __init__(
        self,
        params: PyTree,
        *,
        sample: int | None = None,
        seed: int = 0,
        select: trees.Select = None,
    ) -> None:
        kept = trees.synapses(params, select)
        leaves = jax.tree.leaves(kept)
        self.names = trees.paths(kept)
        self.sizes = tuple(int(leaf.size) for leaf in leaves)
        self._shapes = [tuple(leaf.shape) for leaf in leaves]
        total = sum(self.sizes)
        _check_integer("seed", seed, 0)
        if sample is not None:
            _check_integer("sample", sample, 1)
        if sample is None or sample >= total:
            chosen = [np.arange(size) for size in self.sizes]
            self._places: list[Any] = [None] * len(leaves)
        else:
            chosen = [
                _draw(size, number, [int(seed), place])
                for place, (size, number) in enumerate(
                    zip(self.sizes, _shares(self.sizes, int(sample)), strict=True)
                )
            ]
            # An index for each axis, so that any size of leaf is within 32 bits.
            self._places = [
                tuple(axis.astype(np.int32) for axis in np.unravel_index(at, shape))
                for at, shape in zip(chosen, self._shapes, strict=True)
            ]
        self.leaf = np.repeat(np.arange(len(leaves), dtype=np.int32), [len(at) for at in chosen])
        self.position = np.concatenate(chosen).astype(np.int64)

    def __repr__(self) -> str:
        """How many synapses of how many are followed."""
        return f"Recorder({len(self.leaf)} of {sum(self.sizes)} synapses, {len(self.names)} leaves)"

    def bytes_per_round(self, *, scores: bool = False) -> int:
        """Bytes of one frame of one member: what each round adds in memory.

        >>> Recorder({"w": jnp.zeros((10, 10))}, sample=50).bytes_per_round()
        566
        """
        return (15 if scores else 11) * len(self.leaf) + 12 * len(self.sizes) + 4

    def init(self, mask: PyTree) -> RecorderState:
        """The state before the first round: what is alive has age 0.

        Args:
          mask: pytree of bool; masked nodes for leaves that are not synapses.

        Returns:
          The state.

        Raises:
          ValueError: the mask is not one of the recorder's synapses.
        """
        self._check(mask)
        alive = self._of(mask)
        mask = jax.tree.map(jnp.asarray, mask)
        return RecorderState(mask, jnp.where(alive, 0, -1).astype(jnp.int32), jnp.int32(0))

    def update(
        self, state: RecorderState, params: PyTree, mask: PyTree, scores: PyTree | None = None
    ) -> tuple[RecorderState, Frame]:
        """Records a round.

        Args:
          state: the state after the round before.
          params: pytree of arrays.
          mask: the mask of this round.
          scores: pytree with a score for each synapse, or None (always, or never).

        Returns:
          The new state, and the frame.

        Raises:
          ValueError: a tree is not one of the recorder's synapses.
        """
        self._check(mask)
        alive, was = self._of(mask), self._of(state.mask)
        born, died = alive & ~was, was & ~alive
        older = state.age + 1  # of what wakes, 0, since the dead have -1
        woken = trees.map_synapses(lambda new, old: new & ~old, mask, state.mask)
        cut = trees.map_synapses(lambda new, old: old & ~new, mask, state.mask)
        frame = Frame(
            round=state.round + 1,
            alive=alive,
            magnitude=jnp.abs(self._beside(mask, params)),
            score=() if scores is None else self._beside(mask, scores),
            age=jnp.where(alive | was, older, -1),
            born=born,
            died=died,
            births=count_leaves(woken),
            deaths=count_leaves(cut),
            living=count_leaves(mask),
        )
        return RecorderState(mask, jnp.where(alive, older, -1), state.round + 1), frame

    def trajectory(self, *frames: Frame, seeds: Any = None) -> Trajectory:
        """Joins stacked frames into a trajectory.

        Args:
          *frames: consecutive chunks of frames, each as a scan stacks them, ``[rounds, ...]``, or
            as a vmapped scan does, ``[seeds, rounds, ...]``.
          seeds: the members' seeds, for the tables; 0, 1, ... by default.

        Returns:
          The trajectory, on the host.

        Raises:
          TrajectoryError: the frames are not stacked so, are not consecutive, or are of another
            recorder.
        """
        if not frames:
            raise TrajectoryError("trajectory() needs at least one chunk of frames.")
        chunks = [jax.tree.map(np.asarray, chunk) for chunk in frames]
        axes = chunks[0].round.ndim
        if axes not in (1, 2) or any(chunk.round.ndim != axes for chunk in chunks):
            raise TrajectoryError(
                "frames must be stacked as [rounds, ...] or [seeds, rounds, ...]; stack those of a "
                "Python loop with jax.tree.map(lambda *x: jnp.stack(x, axis), *frames), axis 0 for "
                "single runs and 1 for populations."
            )
        if len({jax.tree.structure(chunk) for chunk in chunks}) > 1:
            raise TrajectoryError("scores were recorded in some chunks of frames only.")
        if any(chunk.alive.shape[axes:] != self.leaf.shape for chunk in chunks):
            raise TrajectoryError(
                f"the frames follow {chunks[0].alive.shape[axes:]} synapses, this recorder "
                f"{self.leaf.shape}: use the recorder that made them."
            )
        whole = jax.tree.map(lambda *x: np.concatenate(x, axis=axes - 1), *chunks)
        whole = jax.tree.map(lambda x: x if axes == 2 else x[None], whole)
        rounds = whole.round[0]
        if np.any(whole.round != rounds) or np.any(np.diff(rounds) != 1):
            raise TrajectoryError(
                f"the rounds {rounds.tolist()} are not consecutive: give all chunks, in order."
            )
        was = (whole.alive[:, 0] & ~whole.born[:, 0]) | whole.died[:, 0]
        result = Trajectory(
            first=int(rounds[0]),
            alive=whole.alive,
            was=was,
            entry=np.where(was, whole.age[:, 0] - 1, -1).astype(np.int32),
            magnitude=whole.magnitude,
            score=None if isinstance(whole.score, tuple) else whole.score,
            births=whole.births,
            deaths=whole.deaths,
            living=whole.living,
            names=self.names,
            sizes=self.sizes,
            leaf=self.leaf,
            position=self.position,
            seeds=tuple(range(len(was)) if seeds is None else map(int, seeds)),
        )
        for field in ("born", "died", "age"):
            if np.any(getattr(result, field) != getattr(whole, field)):
                raise TrajectoryError(
                    f"the frames do not continue each other ({field!r} differs): give the state "
                    "that one chunk ended with to the next."
                )
        return result

    def _of(self, tree: PyTree) -> jax.Array:
        """The followed elements of a tree of synapses."""
        leaves = jax.tree.leaves(tree)
        return jnp.concatenate(
            [
                leaf.reshape(-1) if at is None else leaf[at]
                for leaf, at in zip(leaves, self._places, strict=True)
            ]
        )

    def _beside(self, mask: PyTree, tree: PyTree) -> jax.Array:
        values = trees.map_synapses(lambda _, leaf: jnp.asarray(leaf, jnp.float32), mask, tree)
        return self._of(values)

    def _check(self, mask: PyTree) -> None:
        shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(mask)]
        if trees.paths(mask) != self.names or shapes != self._shapes:
            raise ValueError(
                f"this mask is of {dict(zip(trees.paths(mask), shapes, strict=True))}, but the "
                f"recorder follows {dict(zip(self.names, self._shapes, strict=True))}: give the "
                "recorder the parameters and the select= of the pruner."
            )


def _check_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, not {value!r}.")


def _shares(sizes: tuple[int, ...], sample: int) -> np.ndarray:
    """Splits a number over leaves in proportion, by largest remainder."""
    total = sum(sizes)
    quotas = np.array([size * sample // total for size in sizes])
    remainders = np.array([size * sample % total for size in sizes])
    quotas[np.argsort(-remainders, kind="stable")[: sample - int(quotas.sum())]] += 1
    return quotas


def _draw(size: int, number: int, seed: list[int]) -> np.ndarray:
    """Positions of a sample without replacement, in order; by raw bits, as everywhere the same."""
    if not number:
        return np.zeros(0, np.int64)
    keys = np.random.PCG64(seed).random_raw(size)
    return np.sort(np.argpartition(keys, number - 1)[:number])
