"""Null models of the data: the labels or the pixels shuffled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from adaptivenet.data import DataError, Dataset
from adaptivenet.data.dataset import frozen

__all__ = ["shuffle_labels", "shuffle_pixels"]

_PARTS = ("train", "validation", "test")
# Examples permuted at once, to bound the memory that their random numbers take.
_BLOCK = 1024


def shuffle_labels(
    dataset: Dataset[Any], seed: int, *, fraction: float = 1.0, parts: Sequence[str] = ("train",)
) -> Dataset[Any]:
    """Permutes labels among examples: the task is gone, inputs and class counts stay exactly.

    The draw is the same on every machine and numpy version, as in ``adaptivenet.data.split``.

    Args:
      dataset: a data set.
      seed: non-negative integer.
      fraction: share of the labels, drawn at random, that are permuted among themselves, in
        [0, 1]. (Some come back to an example of their own class.)
      parts: which of "train", "validation" and "test" to shuffle, each within itself.

    Returns:
      A new data set, whose name says what was done.

    Raises:
      DataError: a bad argument, or no validation part although it is asked for.

    >>> x, y = np.zeros((4, 2)), np.array([0, 0, 1, 1], np.int32)
    >>> null = shuffle_labels(Dataset("toy", x, y, x, y, classes=("a", "b")), seed=1)
    >>> null.name, np.bincount(null.train_targets).tolist(), null.test_targets.tolist()
    ('toy, labels shuffled (seed 1)', [2, 2], [0, 0, 1, 1])
    """
    _check_seed(seed)
    if isinstance(fraction, bool) or not 0 <= fraction <= 1:
        raise DataError(f"fraction must be in [0, 1], not {fraction!r}")
    parts = (parts,) if isinstance(parts, str) else tuple(parts)
    unknown = [part for part in parts if part not in _PARTS]
    if unknown or not parts:
        raise DataError(f"parts must name some of {', '.join(_PARTS)}, not {parts!r}")
    if "validation" in parts and dataset.validation is None:
        raise DataError(f"{dataset.name} has no validation part; leave it out of parts=")

    def permuted(part: str, targets: np.ndarray) -> np.ndarray:
        if part not in parts:
            return targets
        count = round(fraction * len(targets))
        generator = np.random.PCG64([seed, _PARTS.index(part)])
        # A random order of random places: labels move along it.
        places = np.argsort(generator.random_raw(len(targets)), kind="stable")[:count]
        order = np.argsort(generator.random_raw(count), kind="stable")
        out = targets.copy()
        out[places] = targets[places[order]]
        return frozen(out)

    held = dataset.validation
    which = "" if parts == ("train",) else " and ".join(p for p in _PARTS if p in parts) + " "
    share = "" if fraction == 1 else f"{100 * fraction:g} %, "
    return dataclasses.replace(
        dataset,
        name=f"{dataset.name}, {which}labels shuffled ({share}seed {seed})",
        train_targets=permuted("train", dataset.train_targets),
        test_targets=permuted("test", dataset.test_targets),
        validation=None if held is None else (held[0], permuted("validation", held[1])),
    )


def shuffle_pixels(
    dataset: Dataset[Any], seed: int, *, per_example: bool = False, channels: bool = False
) -> Dataset[np.ndarray]:
    """Permutes the values within each example: their order is gone, their histogram stays exactly.

    One fixed permutation for all parts alike keeps the task for a network that knows no
    neighbours (an MLP) and takes the neighbourhood from one that does; one permutation an example
    takes the task too and leaves the histogram.

    Args:
      dataset: a data set whose inputs are arrays; labels stay.
      seed: non-negative integer.
      per_example: draw a permutation for each example.
      channels: the last axis holds channels (colours), which move together.

    Returns:
      A new data set, whose name says what was done.

    Raises:
      DataError: a bad argument, or inputs that have no values to permute (waveforms, events).

    >>> x, y = np.arange(6).reshape(2, 3), np.zeros(2, np.int32)
    >>> null = shuffle_pixels(Dataset("toy", x, y, x, y, classes=("a",)), seed=0)
    >>> null.name, np.sort(null.train_inputs, axis=1).tolist()
    ('toy, pixels shuffled (seed 0)', [[0, 1, 2], [3, 4, 5]])
    """
    _check_seed(seed)
    needed = 2 + channels
    if not isinstance(dataset.train_inputs, np.ndarray) or dataset.train_inputs.ndim < needed:
        raise DataError(
            f"{dataset.name}: shuffle_pixels needs inputs that are arrays of at least {needed} "
            "axes, of examples and of their values"
            + (" and channels; leave out channels=True" if channels else "")
        )

    def apply(part: str, inputs: np.ndarray) -> np.ndarray:
        last = inputs.shape[-1] if channels else 1
        pixels = inputs.reshape(len(inputs), -1, last)
        if per_example:
            source = np.random.PCG64([seed, 1 + _PARTS.index(part)])
            moved = _each_its_own(pixels, source.random_raw)
        else:
            keys = np.random.PCG64([seed, 0]).random_raw(pixels.shape[1])
            moved = pixels[:, np.argsort(keys, kind="stable")]
        return frozen(moved.reshape(inputs.shape))

    held = dataset.validation
    what = "pixels shuffled in each example" if per_example else "pixels shuffled"
    return dataclasses.replace(
        dataset,
        name=f"{dataset.name}, {what} (seed {seed})",
        train_inputs=apply("train", dataset.train_inputs),
        test_inputs=apply("test", dataset.test_inputs),
        validation=None if held is None else (apply("validation", held[0]), held[1]),
    )


def _each_its_own(pixels: np.ndarray, draw: Callable[[int], np.ndarray]) -> np.ndarray:
    moved = np.empty_like(pixels)
    for start in range(0, len(pixels), _BLOCK):
        block = pixels[start : start + _BLOCK]
        keys = draw(block.shape[0] * block.shape[1]).reshape(block.shape[:2])
        order = np.argsort(keys, axis=1, kind="stable")
        moved[start : start + _BLOCK] = np.take_along_axis(block, order[..., None], axis=1)
    return moved


def _check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise DataError(f"seed must be a non-negative integer, not {seed!r}")
