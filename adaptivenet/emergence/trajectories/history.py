"""The history that frames make: arrays on the host, a file, a data frame, retention spells."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from adaptivenet.emergence._extras import require

__all__ = ["Spells", "Trajectory", "TrajectoryError", "load"]

_FORMAT = "adaptivenet trajectory 1"


class TrajectoryError(ValueError):
    """Frames that do not belong together, or a file that cannot be read as a trajectory.

    >>> issubclass(TrajectoryError, ValueError)
    True
    """


class Spells(NamedTuple):
    """Retention spells, one entry each: from waking to death, or to the end of the recording.

    Ready for Kaplan-Meier (``durations=duration, event_observed=died, entry=entry``) and, one row
    a round at risk, for hazards.

    Attributes:
      seed: int64, the member's seed.
      synapse: int64, index of the synapse among those followed.
      leaf: int32, index of its leaf.
      start: int64, the round in which it woke (or in which recording began).
      duration: int64, rounds lived: to the round that found it dead, or to the last one.
      died: bool, whether it was seen to die; False is censored.
      left_truncated: bool, whether it was alive before the first round of the trajectory.
      entry: int64, its age when it came under observation, 0 but for the left-truncated ones.
    """

    seed: np.ndarray
    synapse: np.ndarray
    leaf: np.ndarray
    start: np.ndarray
    duration: np.ndarray
    died: np.ndarray
    left_truncated: np.ndarray
    entry: np.ndarray


@dataclass(frozen=True, eq=False, kw_only=True)
class Trajectory:
    """A recorded history, on the host. Axes: ``s`` seeds, ``r`` rounds, ``n`` synapses.

    Attributes:
      first: number of the first round.
      alive: bool ``[s, r, n]``.
      was: bool ``[s, n]``, alive before the first round.
      entry: int32 ``[s, n]``, age before the first round; -1 where dead.
      magnitude: float32 ``[s, r, n]``.
      score: float32 ``[s, r, n]``, or None.
      births: uint32 ``[s, r, leaves]``, of the whole network; so are ``deaths`` and ``living``.
      deaths: uint32 ``[s, r, leaves]``.
      living: uint32 ``[s, r, leaves]``.
      names: path of each leaf.
      sizes: synapses of each leaf.
      leaf: int32 ``[n]``, index of each synapse's leaf.
      position: int64 ``[n]``, position in that leaf.
      seeds: the members' seeds.
    """

    first: int
    alive: np.ndarray
    was: np.ndarray
    entry: np.ndarray
    magnitude: np.ndarray
    score: np.ndarray | None
    births: np.ndarray
    deaths: np.ndarray
    living: np.ndarray
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    leaf: np.ndarray
    position: np.ndarray
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        """Checks that the parts fit together."""
        if np.ndim(self.alive) != 3 or not all(np.shape(self.alive)):
            raise TrajectoryError(
                f"alive must be [seeds, rounds, synapses], none of them 0; not of shape "
                f"{np.shape(self.alive)}."
            )
        s, r, n = self.alive.shape
        expected = {
            **dict.fromkeys(("magnitude", "score"), (s, r, n)),
            **dict.fromkeys(("was", "entry"), (s, n)),
            **dict.fromkeys(("births", "deaths", "living"), (s, r, len(self.names))),
            "leaf": (n,),
            "position": (n,),
            "sizes": (len(self.names),),
            "seeds": (s,),
        }
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is not None and np.shape(value) != shape:
                raise TrajectoryError(f"{name} must be of shape {shape}, not {np.shape(value)}.")

    def __repr__(self) -> str:
        """Counts of seeds, rounds and synapses."""
        s, r, n = self.alive.shape
        return f"Trajectory({s} seeds, {r} rounds, {n} of {sum(self.sizes)} synapses)"

    @property
    def rounds(self) -> np.ndarray:
        """int64 ``[r]``, numbers of the rounds."""
        return np.arange(self.first, self.first + self.alive.shape[1], dtype=np.int64)

    @property
    def born(self) -> np.ndarray:
        """Whether it woke, bool ``[s, r, n]``: alive now and not in the round before."""
        return self.alive & ~self._before()

    @property
    def died(self) -> np.ndarray:
        """Whether it died, bool ``[s, r, n]``: alive in the round before and not now."""
        return self._before() & ~self.alive

    @property
    def age(self) -> np.ndarray:
        """int32 ``[s, r, n]``, as in :class:`Frame`."""
        before, age = self._before(), self.entry
        out = np.empty(self.alive.shape, np.int32)
        for place in range(self.alive.shape[1]):
            alive, was = self.alive[:, place], before[:, place]
            out[:, place] = np.where(was, age + 1, np.where(alive, 0, -1))
            age = np.where(alive, out[:, place], -1)
        return out

    def _before(self) -> np.ndarray:
        return np.concatenate([self.was[:, None], self.alive[:, :-1]], axis=1)

    def spells(self) -> Spells:
        """Cuts the history into retention spells, in order of seeds, synapses and rounds."""
        s, r, n = self.alive.shape
        # Column 0 stands for the state before the first round.
        alive = np.concatenate([self.was[:, None], self.alive], axis=1).transpose(0, 2, 1)
        edge = np.zeros((s, n, 1), bool)
        starts = np.nonzero(alive & ~np.concatenate([edge, alive[..., :-1]], axis=2))
        ends = np.nonzero(alive & ~np.concatenate([alive[..., 1:], edge], axis=2))[2]
        member, synapse, begun = starts
        truncated = begun == 0
        entry = np.where(truncated, self.entry[member, synapse], 0).astype(np.int64)
        died = ends < r
        return Spells(
            seed=np.asarray(self.seeds, np.int64)[member],
            synapse=synapse.astype(np.int64),
            leaf=self.leaf[synapse],
            start=self.first - 1 + begun - entry,
            duration=ends + died - begun + entry,
            died=died,
            left_truncated=truncated,
            entry=entry,
        )

    def to_frame(self) -> Any:
        """A long pandas data frame, one row a seed, round and synapse (needs pandas).

        Returns:
          Columns seed, round, synapse, leaf (a category of paths), position, alive, age, magnitude,
          score (if recorded), born, died.

        Raises:
          MissingExtra: pandas is not installed.
        """
        pandas = require("pandas")
        s, r, n = self.alive.shape
        columns = {
            "seed": np.repeat(np.asarray(self.seeds, np.int64), r * n),
            "round": np.tile(np.repeat(self.rounds, n), s),
            "synapse": np.tile(np.arange(n), s * r),
            "leaf": pandas.Categorical.from_codes(np.tile(self.leaf, s * r), list(self.names)),
            "position": np.tile(self.position, s * r),
        }
        for name in ("alive", "age", "magnitude", "score", "born", "died"):
            values = getattr(self, name)
            if values is not None:
                columns[name] = values.reshape(-1)
        return pandas.DataFrame(columns)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        precision: Literal["float32", "float16"] = "float32",
    ) -> int:
        """Writes the trajectory to a compressed file (npz); births, deaths and ages follow from it.

        Args:
          path: the file, replaced atomically.
          precision: of magnitudes and scores; "float16" halves them, keeps three digits, and
            rounds to zero below 3e-8. They are read back as float32.

        Returns:
          The bytes of the file.

        Raises:
          TrajectoryError: a number is too large for float16.
          ValueError: another precision.
        """
        if precision not in ("float32", "float16"):
            raise ValueError(f"precision must be 'float32' or 'float16', not {precision!r}.")
        arrays = {
            "format": np.array(_FORMAT),
            "shape": np.array(self.alive.shape, np.int64),
            "first": np.array(self.first, np.int64),
            "alive": np.packbits(self.alive),
            "was": np.packbits(self.was),
            "entry": self.entry,
            "names": np.array(self.names, str),
            "sizes": np.array(self.sizes, np.int64),
            "seeds": np.array(self.seeds, np.int64),
        }
        for name in ("births", "deaths", "living", "leaf", "position"):
            arrays[name] = getattr(self, name)
        for name in ("magnitude", "score"):
            values = getattr(self, name)
            if values is None:
                continue
            if precision == "float16" and np.any(np.abs(values[np.isfinite(values)]) > 65504):
                raise TrajectoryError(f"a {name} is too large for float16: save as float32.")
            arrays[name] = values.astype(precision)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".part")
        with beside.open("wb") as file:
            np.savez_compressed(file, **arrays)
        size = beside.stat().st_size
        beside.replace(path)
        return size


def load(path: str | os.PathLike[str]) -> Trajectory:
    """Reads a trajectory that :meth:`Trajectory.save` wrote.

    Args:
      path: the file.

    Returns:
      The trajectory.

    Raises:
      TrajectoryError: the file is damaged or of another kind; the message names it.
      FileNotFoundError: there is no such file.

    >>> import tempfile
    >>> import jax, jax.numpy as jnp
    >>> from adaptivenet.emergence.trajectories import Recorder
    >>> mask = {"w": jnp.eye(2, dtype=bool)}
    >>> recorder = Recorder({"w": jnp.ones((2, 2))})
    >>> _, frame = recorder.update(recorder.init(mask), {"w": jnp.ones((2, 2))}, mask)
    >>> history = recorder.trajectory(jax.tree.map(lambda x: x[None], frame))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = history.save(Path(folder) / "run.npz")
    ...     load(Path(folder) / "run.npz")
    Trajectory(1 seeds, 1 rounds, 4 of 4 synapses)
    """
    broken = (zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError, OSError, TypeError)
    content = Path(path).read_bytes()  # so that only what follows is a matter of the content
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if str(arrays["format"]) != _FORMAT:
            raise TrajectoryError(f"its format is {arrays['format']}, not {_FORMAT!r}")
        s, r, n = map(int, arrays["shape"])
        score = arrays.get("score")
        return Trajectory(
            first=int(arrays["first"]),
            alive=_unpack(arrays["alive"], (s, r, n)),
            was=_unpack(arrays["was"], (s, n)),
            magnitude=arrays["magnitude"].astype(np.float32),
            score=None if score is None else score.astype(np.float32),
            names=tuple(map(str, arrays["names"])),
            sizes=tuple(map(int, arrays["sizes"])),
            seeds=tuple(map(int, arrays["seeds"])),
            **{
                name: arrays[name]
                for name in ("entry", "births", "deaths", "living", "leaf", "position")
            },
        )
    except broken as error:
        raise TrajectoryError(
            f"{path} is no trajectory, or damaged ({error or type(error).__name__}): give a file "
            "that Trajectory.save wrote."
        ) from error


def _unpack(bits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape))
    if len(bits) != (size + 7) // 8:
        raise TrajectoryError(f"{len(bits)} bytes cannot hold the bits of {shape}")
    return np.unpackbits(bits, count=size).astype(bool).reshape(shape)
