"""Containers for examples of unequal length: sound waves and event streams."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np

from adaptivenet.data.dataset import frozen
from adaptivenet.data.errors import DataError

__all__ = ["EventStream", "Events", "Waveforms"]

_Container = TypeVar("_Container", bound="_Ragged")


class EventStream(NamedTuple):
    """One recording of an event camera: parallel arrays, one entry an event.

    Attributes:
        x: [events] uint8 column.
        y: [events] uint8 row.
        polarity: [events] uint8; 1 brighter, 0 darker.
        time_us: [events] uint32 microseconds since the recording began.

    >>> EventStream(*(np.zeros(3, np.uint8) for _ in range(4))).x.shape
    (3,)
    """

    x: np.ndarray
    y: np.ndarray
    polarity: np.ndarray
    time_us: np.ndarray


@dataclass(frozen=True, eq=False, kw_only=True)
class _Ragged:
    """Examples laid end to end; example i is `[offsets[i]:offsets[i + 1]]` of each flat array."""

    offsets: np.ndarray

    # Names of the flat arrays (one entry per sample or event) and of the arrays per example.
    _flat = ()
    _each = ()

    def __post_init__(self) -> None:
        offsets = self.offsets
        if offsets.ndim != 1 or len(offsets) < 1 or offsets[0] != 0 or np.any(np.diff(offsets) < 0):
            raise DataError("offsets must be a vector that starts at 0 and never falls")
        for name in self._flat:
            size = len(getattr(self, name))
            if size != offsets[-1]:
                raise DataError(f"{name} holds {size} entries, but offsets end at {offsets[-1]}")
        for name in self._each:
            size = len(getattr(self, name))
            if size != len(offsets) - 1:
                raise DataError(f"{name} holds {size} entries for {len(offsets) - 1} examples")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """[n] int64 length of each example."""
        return np.diff(self.offsets)

    def _take(self: _Container, index: Any) -> _Container:
        """Return the examples at some positions (slice, positions or mask) as a new container."""
        positions = np.arange(len(self))[index]
        lengths = self.lengths[positions]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        starts = np.repeat(self.offsets[positions] - offsets[:-1], lengths)
        where = starts + np.arange(offsets[-1])
        arrays: dict[str, np.ndarray] = {"offsets": frozen(offsets)}
        arrays |= {name: frozen(getattr(self, name)[where]) for name in self._flat}
        arrays |= {name: frozen(getattr(self, name)[positions]) for name in self._each}
        return dataclasses.replace(self, **arrays)

    def _bounds(self, index: int) -> tuple[int, int]:
        position = range(len(self))[index]
        return int(self.offsets[position]), int(self.offsets[position + 1])


@dataclass(frozen=True, eq=False, kw_only=True)
class Waveforms(_Ragged):
    """Mono recordings of unequal length.

    `waves[3]` is one recording, an int16 array; `waves[2:5]` or `waves[positions]` are fewer.

    Attributes:
        signal: [samples] int16, all recordings end to end.
        offsets: [n + 1] int64 start of each recording, and the end.
        rate: samples a second.
        speaker: [n] uint8 index into `speakers`.
        take: [n] uint8 number of the recording of that speaker and word.
        speakers: names.

    >>> waves = Waveforms(signal=np.arange(5, dtype=np.int16), offsets=np.array([0, 2, 5]),
    ...     rate=8000, speaker=np.zeros(2, np.uint8), take=np.arange(2), speakers=("ann",))
    >>> waves[1], waves.padded(4)[0].tolist()
    (array([2, 3, 4], dtype=int16), [[0, 1, 0, 0], [2, 3, 4, 0]])
    """

    signal: np.ndarray
    rate: int
    speaker: np.ndarray
    take: np.ndarray
    speakers: tuple[str, ...]

    _flat = ("signal",)
    _each = ("speaker", "take")

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice | np.ndarray) -> Waveforms: ...
    def __getitem__(self, index: Any) -> Any:
        """Return one recording (int), or a container of some (slice, positions, mask)."""
        if isinstance(index, (int, np.integer)):
            start, stop = self._bounds(int(index))
            return self.signal[start:stop]
        return self._take(index)

    def padded(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the recordings as one array: the first `length` samples, zeros after the end.

        Args:
            length: samples kept of each recording.

        Returns:
            ([n, length] int16, [n] int64 number of real samples in each row).

        Raises:
            DataError: length is below 1.
        """
        if length < 1:
            raise DataError(f"length must be 1 or more, not {length}")
        real = np.minimum(self.lengths, length)
        step = np.arange(length)
        inside = step < real[:, None]
        where = np.where(inside, self.offsets[:-1, None] + step, 0)
        flat = self.signal if len(self.signal) else np.zeros(1, np.int16)
        return np.where(inside, flat[where], np.int16(0)), real


@dataclass(frozen=True, eq=False, kw_only=True)
class Events(_Ragged):
    """Recordings of an event camera, each a stream of events in order of time.

    `events[3]` is one `EventStream`; `events[2:5]` or `events[positions]` are fewer.

    Attributes:
        x: [events] uint8 column.
        y: [events] uint8 row.
        polarity: [events] uint8; 1 brighter, 0 darker.
        time_us: [events] uint32 microseconds since each recording began.
        offsets: [n + 1] int64 start of each recording, and the end.
        height: rows of the sensor.
        width: columns of the sensor.

    >>> one = np.zeros(3, np.uint8)
    >>> events = Events(x=one, y=one, polarity=one, time_us=np.array([1, 5, 2], np.uint32),
    ...     offsets=np.array([0, 2, 3]), height=34, width=34)
    >>> len(events), events[0].time_us.tolist(), events.lengths.tolist()
    (2, [1, 5], [2, 1])
    """

    x: np.ndarray
    y: np.ndarray
    polarity: np.ndarray
    time_us: np.ndarray
    height: int
    width: int

    _flat = ("x", "y", "polarity", "time_us")

    @overload
    def __getitem__(self, index: int) -> EventStream: ...
    @overload
    def __getitem__(self, index: slice | np.ndarray) -> Events: ...
    def __getitem__(self, index: Any) -> Any:
        """Return one stream (int), or a container of some (slice, positions, mask)."""
        if isinstance(index, (int, np.integer)):
            start, stop = self._bounds(int(index))
            return EventStream(*(getattr(self, name)[start:stop] for name in self._flat))
        return self._take(index)
