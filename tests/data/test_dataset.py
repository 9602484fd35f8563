from __future__ import annotations

import dataclasses

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from adaptivenet.data import DataError, Dataset, flatten, map_inputs, normalise, split, standardise


def make(targets: list[int] | np.ndarray, classes: int = 5) -> Dataset[np.ndarray]:
    y = np.asarray(targets, np.int32)
    x = np.arange(len(y), dtype=np.int64)
    names = tuple(map(str, range(classes)))
    return Dataset("toy", x, y, x[:2] + 1000, y[:2], classes=names, sha256="f" * 64, maximum=9.0)


targets_and_count = st.lists(st.integers(0, 4), min_size=2, max_size=60).flatmap(
    lambda targets: st.tuples(st.just(targets), st.integers(1, len(targets) - 1))
)


@hypothesis.given(targets_and_count, st.integers(0, 2**40))
def test_split_is_disjoint_complete_stratified_and_deterministic(
    case: tuple[list[int], int], seed: int
) -> None:
    targets, count = case
    whole = make(targets)
    parts = split(whole, count, seed)
    train, held = parts.train_inputs, parts.validation_inputs
    assert len(held) == count
    assert sorted([*train, *held]) == list(range(len(targets)))  # disjoint and complete
    assert (np.diff(train) > 0).all()
    assert (np.diff(held) > 0).all()
    # Inputs are positions here, so targets must follow them.
    np.testing.assert_array_equal(parts.train_targets, whole.train_targets[train])
    np.testing.assert_array_equal(parts.validation_targets, whole.train_targets[held])
    sizes = np.bincount(whole.train_targets, minlength=5)
    shares = np.bincount(parts.validation_targets, minlength=5)
    assert (np.abs(shares - sizes * count / len(targets)) < 1).all()
    assert parts.test_inputs is whole.test_inputs
    assert parts.test_targets is whole.test_targets
    again = split(whole, count, seed)
    np.testing.assert_array_equal(again.validation_inputs, held)


def test_split_draws_the_same_on_every_machine() -> None:
    parts = split(make([0, 1] * 10), 6, seed=7)
    assert parts.validation_inputs.tolist() == [3, 4, 6, 11, 12, 13]


def test_seeds_differ_and_input_is_untouched() -> None:
    whole = make(np.zeros(200, np.int32))
    before = whole.train_inputs.copy()
    held = {tuple(split(whole, 0.25, seed).validation_inputs) for seed in range(5)}
    assert len(held) == 5
    assert whole.validation is None
    np.testing.assert_array_equal(whole.train_inputs, before)


def test_a_share_rounds_to_the_nearest_example() -> None:
    assert len(split(make(np.zeros(10, np.int32)), 0.26, 0).validation_targets) == 3
    assert len(split(make(np.zeros(10, np.int32)), np.int64(4), 0).validation_targets) == 4


@pytest.mark.parametrize(
    "validation", [0, 10, 11, -1, 0.0, 1.0, 1.5, 0.01, float("nan"), True, "a"]
)
def test_impossible_splits_are_refused(validation: int) -> None:
    with pytest.raises(DataError, match="validation"):
        split(make(np.zeros(10, np.int32)), validation, 0)


@pytest.mark.parametrize("seed", [-1, 0.5, None, True])
def test_bad_seeds_are_refused(seed: int) -> None:
    with pytest.raises(DataError, match="seed"):
        split(make(np.zeros(10, np.int32)), 2, seed)


def test_splitting_twice_is_refused() -> None:
    with pytest.raises(DataError, match="has a validation part already"):
        split(split(make(np.zeros(10, np.int32)), 2, 0), 2, 0)


def test_missing_validation_part_says_how_to_make_it() -> None:
    for name in ("validation_inputs", "validation_targets"):
        with pytest.raises(DataError, match=r"split\(dataset, validation=0\.1, seed=0\)"):
            getattr(make([0, 1]), name)


def test_parts_that_do_not_fit_are_refused() -> None:
    x, y = np.zeros(3), np.zeros(3, np.int32)
    with pytest.raises(DataError, match="2 train inputs but 3 train targets"):
        Dataset("toy", x[:2], y, x, y, ("a",))
    with pytest.raises(DataError, match="test_targets run from 0 to 1, but there are 1 classes"):
        Dataset("toy", x, y, x, np.array([0, 1, 0]), ("a",))
    with pytest.raises(DataError, match="train_targets must be a vector of class indices"):
        Dataset("toy", x, np.zeros(3), x, y, ("a",))
    with pytest.raises(DataError, match="validation_targets run from -1"):
        dataclasses.replace(make([0, 1]), validation=(x, np.array([0, -1, 0])))


def test_normalise_and_flatten_keep_values_and_reach_every_part() -> None:
    images = (np.arange(12 * 4) % 17).astype(np.uint8).reshape(12, 2, 2)
    y = np.zeros(12, np.int32)
    raw = split(Dataset("toy", images, y, images[:3], y[:3], ("a",), maximum=16.0), 4, 0)
    ready = flatten(normalise(raw))
    for part in ("train", "validation", "test"):
        before, after = getattr(raw, f"{part}_inputs"), getattr(ready, f"{part}_inputs")
        assert after.dtype == np.float32
        expected = before.reshape(len(before), 4).astype(np.float64) / 16
        np.testing.assert_array_equal(after, expected.astype(np.float32))
    assert ready.maximum == 1.0
    assert ready.sha256 == raw.sha256
    assert flatten(images).shape == (12, 4)
    np.testing.assert_array_equal(normalise(ready).train_inputs, ready.train_inputs)


def test_normalise_refuses_a_wrong_or_unknown_maximum() -> None:
    with pytest.raises(DataError, match="values from 0 to 255 do not lie in"):
        normalise(np.array([0, 255], np.uint8), 16)
    with pytest.raises(DataError, match="positive maximum"):
        normalise(np.zeros(2), 0)
    with pytest.raises(DataError, match="do not lie"):
        normalise(np.array([np.nan]), 1)
    with pytest.raises(DataError, match="use standardise"):
        normalise(dataclasses.replace(make([0, 1]), maximum=None))


def test_standardise_uses_training_statistics_only() -> None:
    x = np.array([[1.0, 5.0], [3.0, 5.0], [100.0, 7.0]])
    y = np.zeros(2, np.int32)
    data = Dataset("toy", x[:2], y, x[2:], y[:1], ("a",))
    each = standardise(data, axis=(0,))
    np.testing.assert_array_equal(each.train_inputs, [[-1, 0], [1, 0]])
    np.testing.assert_array_equal(each.test_inputs, [[98, 2]])
    everything = standardise(data).train_inputs
    assert everything.dtype == np.float32
    assert abs(everything.mean()) < 1e-6
    assert abs(everything.std() - 1) < 1e-6


def test_results_are_read_only_and_arguments_stay_writeable() -> None:
    own = make(np.zeros(6, np.int32))
    same = map_inputs(lambda part: part, own)
    for array in (same.train_inputs, split(own, 2, 0).train_targets):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    own.train_inputs[0] = 5  # the caller's own array was not frozen behind his back
    with pytest.raises(DataError, match="5 train inputs but 6"):
        map_inputs(lambda part: part[1:], own)


def test_one_line_of_description() -> None:
    assert repr(split(make([0, 1] * 3), 2, 0)) == (
        "Dataset('toy': train 4 x () int64, validation 2, test 2, 5 classes)"
    )
