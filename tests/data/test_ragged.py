from __future__ import annotations

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from adaptivenet.data import DataError, Dataset, Events, Waveforms, split


def waves(pieces: list[list[int]]) -> Waveforms:
    flat = [value for piece in pieces for value in piece]
    count = len(pieces)
    return Waveforms(
        signal=np.array(flat, np.int16),
        offsets=np.cumsum([0, *map(len, pieces)]),
        rate=8000,
        speaker=np.arange(count, dtype=np.uint8),
        take=np.zeros(count, np.uint8),
        speakers=tuple(map(str, range(count))),
    )


lists = st.lists(st.lists(st.integers(-9, 9), max_size=5), min_size=1, max_size=6)


@hypothesis.given(lists, st.data())
def test_picking_is_picking_from_a_list(pieces: list[list[int]], data: st.DataObject) -> None:
    whole = waves(pieces)
    assert [whole[i].tolist() for i in range(len(whole))] == pieces
    assert whole[-1].tolist() == pieces[-1]
    chosen = data.draw(st.lists(st.integers(-len(pieces), len(pieces) - 1), max_size=8))
    picked = whole[np.array(chosen, np.int64)]
    assert [picked[i].tolist() for i in range(len(picked))] == [pieces[i] for i in chosen]
    assert picked.speaker.tolist() == [i % len(pieces) for i in chosen]
    tail = whole[1:]
    assert [tail[i].tolist() for i in range(len(tail))] == pieces[1:]


@hypothesis.given(lists, st.integers(1, 7))
def test_padding(pieces: list[list[int]], length: int) -> None:
    rows, real = waves(pieces).padded(length)
    assert rows.dtype == np.int16
    assert rows.tolist() == [(piece + [0] * length)[:length] for piece in pieces]
    assert real.tolist() == [min(len(piece), length) for piece in pieces]


def test_a_mask_and_an_index_beyond_the_end() -> None:
    whole = waves([[1], [2, 3], [4]])
    assert whole[np.array([True, False, True])].signal.tolist() == [1, 4]
    with pytest.raises(IndexError):
        whole[3]
    with pytest.raises(DataError, match="length must be 1 or more"):
        whole.padded(0)


def test_broken_containers_are_refused() -> None:
    one = np.zeros(3, np.uint8)
    fields = {"x": one, "y": one, "polarity": one, "time_us": one, "height": 2, "width": 2}
    with pytest.raises(DataError, match="starts at 0 and never falls"):
        Events(offsets=np.array([0, 2, 1, 3]), **fields)
    with pytest.raises(DataError, match="x holds 3 entries, but offsets end at 4"):
        Events(offsets=np.array([0, 4]), **fields)
    with pytest.raises(DataError, match="speaker holds 0 entries for 1 examples"):
        Waveforms(
            signal=one, offsets=np.array([0, 3]), rate=1, speaker=one[:0], take=one[:1], speakers=()
        )


def test_split_works_on_containers() -> None:
    whole = waves([[i, i] for i in range(10)])
    y = np.array([0, 1] * 5, np.int32)
    parts = split(Dataset("toy", whole, y, whole, y, ("even", "odd")), 4, 3)
    held = parts.validation_inputs
    assert len(held) == 4
    for i in range(4):
        assert held[i][0] % 2 == parts.validation_targets[i]
    rest = [parts.train_inputs[i][0] for i in range(6)]
    assert sorted([*rest, *(held[i][0] for i in range(4))]) == list(range(10))
