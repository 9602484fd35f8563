"""Shuffled labels and pixels keep what they say they keep."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptivenet import data
from adaptivenet.emergence import nulls


def make(seed=0, train=40, shape=(3, 4), dtype=np.uint8):
    rng = np.random.default_rng(seed)

    def part(number):
        inputs = rng.integers(0, 200, (number, *shape)).astype(dtype)
        return inputs, rng.integers(0, 5, number).astype(np.int32)

    return data.Dataset(
        "toy",
        *part(train),
        *part(11),
        classes=tuple("abcde"),
        sha256="f" * 64,
        maximum=255.0,
        validation=part(7),
    )


def parts(dataset):
    return {
        "train": (dataset.train_inputs, dataset.train_targets),
        "validation": dataset.validation,
        "test": (dataset.test_inputs, dataset.test_targets),
    }


seeds = st.integers(0, 2**40)


@given(
    st.integers(0, 99),
    seeds,
    st.floats(0, 1),
    st.sets(st.sampled_from(["train", "validation", "test"]), min_size=1),
)
def test_labels_are_permuted_within_the_parts_asked_for(content, seed, fraction, chosen):
    before = make(content)
    null = nulls.shuffle_labels(before, seed, fraction=fraction, parts=sorted(chosen))
    for name, (inputs, targets) in parts(null).items():
        old_inputs, old_targets = parts(before)[name]
        assert inputs is old_inputs
        assert targets.dtype == np.int32
        if name in chosen:
            np.testing.assert_array_equal(np.sort(targets), np.sort(old_targets))
            assert np.sum(targets != old_targets) <= round(fraction * len(targets))
            assert not targets.flags.writeable
        else:
            np.testing.assert_array_equal(targets, old_targets)
    assert (null.sha256, null.maximum, null.classes) == (before.sha256, 255.0, before.classes)


def test_by_default_only_the_training_labels():
    before = make(train=400)
    null = nulls.shuffle_labels(before, 3)
    assert null.name == "toy, labels shuffled (seed 3)"
    np.testing.assert_array_equal(null.test_targets, before.test_targets)
    np.testing.assert_array_equal(null.validation_targets, before.validation_targets)
    # A label is right as often as two draws from the classes agree: about one in five.
    assert np.mean(null.train_targets == before.train_targets) == pytest.approx(0.2, abs=0.08)


def test_labels_are_independent_of_inputs_and_a_share_is_a_share():
    targets = np.arange(2_000, dtype=np.int32) % 2
    before = data.Dataset("toy", targets, targets, targets, targets, classes=("a", "b"))
    correlation = {}
    for fraction in (0.0, 0.5, 1.0):
        null = nulls.shuffle_labels(before, 0, fraction=fraction)
        correlation[fraction] = np.corrcoef(null.train_targets, null.train_inputs)[0, 1]
    assert correlation[0.0] == pytest.approx(1.0)
    assert correlation[0.5] == pytest.approx(0.5, abs=0.07)
    assert correlation[1.0] == pytest.approx(0.0, abs=0.09)


def test_names_say_what_was_done():
    both = nulls.shuffle_labels(make(), 3, fraction=0.25, parts=("test", "train"))
    assert both.name == "toy, train and test labels shuffled (25 %, seed 3)"
    assert nulls.shuffle_pixels(make(), 4).name == "toy, pixels shuffled (seed 4)"
    each = nulls.shuffle_pixels(nulls.shuffle_labels(make(), 1), 2, per_example=True)
    assert each.name == "toy, labels shuffled (seed 1), pixels shuffled in each example (seed 2)"


def test_the_same_seed_is_the_same_draw_here_and_everywhere():
    x = np.arange(6, dtype=np.int64).reshape(1, 6)
    y = np.arange(6, dtype=np.int32)
    names = tuple("abcdef")
    labels = data.Dataset("toy", y, y, y, y, classes=names)
    pixels = data.Dataset("toy", x, y[:1], x, y[:1], classes=names)
    # Pinned: a numpy or a machine that draws otherwise would make other null models.
    assert nulls.shuffle_labels(labels, 0).train_targets.tolist() == [2, 3, 1, 5, 4, 0]
    assert nulls.shuffle_pixels(pixels, 0).train_inputs[0].tolist() == [3, 2, 1, 0, 4, 5]
    other = nulls.shuffle_labels(labels, 1).train_targets.tolist()
    assert other != [2, 3, 1, 5, 4, 0]


@given(st.integers(0, 99), seeds, st.sampled_from([(12,), (3, 4), (2, 3, 2)]))
@settings(max_examples=25)
def test_one_permutation_for_all(content, seed, shape):
    before = make(content, shape=shape)
    null = nulls.shuffle_pixels(before, seed)
    columns = [
        np.concatenate([inputs.reshape(len(inputs), -1) for inputs, _ in parts(d).values()])
        for d in (before, null)
    ]
    # As tuples of all examples of all parts, the pixels are the same ones.
    assert sorted(map(tuple, columns[0].T)) == sorted(map(tuple, columns[1].T))
    for name, (inputs, targets) in parts(null).items():
        assert inputs.shape == parts(before)[name][0].shape
        assert inputs.dtype == np.uint8
        assert not inputs.flags.writeable
        np.testing.assert_array_equal(targets, parts(before)[name][1])
    assert null.maximum == 255.0
    # It is the same before and after the validation part is cut.
    whole = data.Dataset(
        "toy", before.train_inputs, before.train_targets, *parts(before)["test"], tuple("abcde")
    )
    np.testing.assert_array_equal(nulls.shuffle_pixels(whole, seed).train_inputs, null.train_inputs)


@given(st.integers(0, 99), seeds)
@settings(max_examples=25)
def test_one_permutation_an_example(content, seed):
    before = make(content, shape=(3, 4))
    null = nulls.shuffle_pixels(before, seed, per_example=True)
    for name, (inputs, _) in parts(null).items():
        old = parts(before)[name][0]
        assert inputs.shape == old.shape
        np.testing.assert_array_equal(
            np.sort(inputs.reshape(len(old), -1)), np.sort(old.reshape(len(old), -1))
        )


def test_examples_are_permuted_differently_and_in_blocks():
    x = np.tile(np.arange(20, dtype=np.int64), (2_500, 1))
    y = np.zeros(2_500, np.int32)
    null = nulls.shuffle_pixels(data.Dataset("toy", x, y, x, y, ("a",)), 0, per_example=True)
    assert len(set(map(tuple, null.train_inputs))) == 2_500
    assert not np.any(np.all(null.train_inputs == null.test_inputs, axis=1))
    # Each value is everywhere equally often.
    means = null.train_inputs.mean(axis=0)
    np.testing.assert_allclose(means, 9.5, atol=5 * np.sqrt(33.25 / 2_500))


@pytest.mark.parametrize("per_example", [False, True])
def test_channels_move_together(per_example):
    grey = np.arange(3 * 6).reshape(3, 2, 3, 1)
    x, y = np.concatenate([grey, grey + 100, grey + 200], axis=-1), np.zeros(3, np.int32)
    dataset = data.Dataset("toy", x, y, x, y, ("a",))
    moved = nulls.shuffle_pixels(dataset, 0, per_example=per_example, channels=True).train_inputs
    assert np.any(moved != x)
    np.testing.assert_array_equal(moved[..., 1:] - moved[..., :1], x[..., 1:] - x[..., :1])
    apart = nulls.shuffle_pixels(dataset, 0, per_example=per_example).train_inputs
    assert np.any(apart[..., 1] - apart[..., 0] != 100)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: nulls.shuffle_labels(d, -1), "seed must be"),
        (lambda d: nulls.shuffle_labels(d, True), "seed must be"),
        (lambda d: nulls.shuffle_labels(d, 0, fraction=1.5), "fraction must be in"),
        (lambda d: nulls.shuffle_labels(d, 0, fraction=True), "fraction must be in"),
        (lambda d: nulls.shuffle_labels(d, 0, parts=("tests",)), "parts must name"),
        (lambda d: nulls.shuffle_labels(d, 0, parts=()), "parts must name"),
        (lambda d: nulls.shuffle_labels(d, 0, parts="validation"), "no validation part"),
        (lambda d: nulls.shuffle_pixels(d, 1.5), "seed must be"),
        (lambda d: nulls.shuffle_pixels(d, 0, channels=True), "at least 3"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    x, y = np.zeros((4, 2)), np.zeros(4, np.int32)
    with pytest.raises(data.DataError, match=message):
        call(data.Dataset("toy", x, y, x, y, ("a",)))


def test_inputs_without_pixels_are_refused():
    waves = data.Waveforms(
        signal=np.arange(5, dtype=np.int16),
        offsets=np.array([0, 2, 5]),
        rate=8000,
        speaker=np.zeros(2, np.uint8),
        take=np.arange(2),
        speakers=("ann",),
    )
    targets = np.zeros(2, np.int32)
    for inputs in (waves, np.zeros(2)):
        dataset = data.Dataset("toy", inputs, targets, inputs, targets, ("a",))
        with pytest.raises(data.DataError, match="arrays of at least 2 axes"):
            nulls.shuffle_pixels(dataset, 0)
        assert nulls.shuffle_labels(dataset, 0).train_inputs is inputs
