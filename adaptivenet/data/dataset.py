"""`Dataset`: one supervised data set in memory, and the pure functions that prepare it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, overload

import numpy as np

from adaptivenet.data.errors import DataError

__all__ = ["Dataset", "Examples", "flatten", "map_inputs", "normalise", "split", "standardise"]


class Examples(Protocol):
    """What the inputs of a data set can do: count, and pick examples by an array of positions.

    Arrays do (along the first axis), and so do `Waveforms` and `Events`.

    >>> len(np.zeros((3, 2))[np.array([0, 2])])
    2
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Any: ...


Inputs = TypeVar("Inputs", bound=Examples)


@dataclass(frozen=True, eq=False)
class Dataset(Generic[Inputs]):
    """A data set for classification, with its split, names, licence and fingerprint.

    Arrays are read-only: derive new ones, do not write into them.

    Attributes:
        name: honest name, as it should be printed ("CIFAR-10 (JPEG copy)").
        train_inputs: training examples along the first axis, as loaded (images are uint8).
        train_targets: [n] int32 class indices.
        test_inputs: test examples, for one use at the end.
        test_targets: [m] int32 class indices.
        classes: name of each class index.
        source: where the data come from.
        licence: terms of the data.
        sha256: fingerprint of the data as loaded; unchanged by splitting and preparing.
        maximum: largest value that the raw inputs can take (255, 16), or None if unbounded.
        validation: (inputs, targets) once `split` has cut it from the training part, else None.

    >>> x, y = np.zeros((4, 2), np.uint8), np.array([0, 1, 0, 1], np.int32)
    >>> Dataset("toy", x, y, x[:2], y[:2], classes=("no", "yes"))
    Dataset('toy': train 4 x (2,) uint8, validation none, test 2, 2 classes)
    """

    name: str
    train_inputs: Inputs
    train_targets: np.ndarray
    test_inputs: Inputs
    test_targets: np.ndarray
    classes: tuple[str, ...]
    source: str = ""
    licence: str = ""
    sha256: str = ""
    maximum: float | None = None
    validation: tuple[Inputs, np.ndarray] | None = None

    def __post_init__(self) -> None:
        """Check that inputs and targets fit together."""
        for part, inputs, targets in self._parts():
            if targets.ndim != 1 or not np.issubdtype(targets.dtype, np.integer):
                raise DataError(
                    f"{self.name}: {part}_targets must be a vector of class indices, "
                    f"not {targets.dtype} of shape {targets.shape}"
                )
            if len(inputs) != len(targets):
                raise DataError(
                    f"{self.name}: {len(inputs)} {part} inputs but {len(targets)} {part} targets"
                )
            if len(targets) and not 0 <= targets.min() <= targets.max() < len(self.classes):
                raise DataError(
                    f"{self.name}: {part}_targets run from {targets.min()} to {targets.max()}, "
                    f"but there are {len(self.classes)} classes"
                )

    def _parts(self) -> list[tuple[str, Inputs, np.ndarray]]:
        parts = [
            ("train", self.train_inputs, self.train_targets),
            ("test", self.test_inputs, self.test_targets),
        ]
        if self.validation is not None:
            parts.insert(1, ("validation", *self.validation))
        return parts

    @property
    def validation_inputs(self) -> Inputs:
        """Validation examples; an error says how to make them if there are none."""
        return self._validation()[0]

    @property
    def validation_targets(self) -> np.ndarray:
        """[k] int32 class indices of the validation part."""
        return self._validation()[1]

    def _validation(self) -> tuple[Inputs, np.ndarray]:
        if self.validation is None:
            raise DataError(
                f"{self.name} has no validation part yet: "
                "call adaptivenet.data.split(dataset, validation=0.1, seed=0)"
            )
        return self.validation

    def __repr__(self) -> str:
        """One line: name, counts, shape and number of classes."""
        inputs: Any = self.train_inputs
        what = (
            f" x {inputs.shape[1:]} {inputs.dtype}"
            if isinstance(inputs, np.ndarray)
            else f" {type(inputs).__name__}"
        )
        validation = "none" if self.validation is None else len(self.validation[1])
        return (
            f"Dataset({self.name!r}: train {len(self.train_targets)}{what}, "
            f"validation {validation}, test {len(self.test_targets)}, {len(self.classes)} classes)"
        )


def frozen(array: np.ndarray) -> np.ndarray:
    """Return a read-only view of an array.

    >>> frozen(np.zeros(2)).flags.writeable
    False
    """
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view


def split(dataset: Dataset[Inputs], validation: int | float, seed: int) -> Dataset[Inputs]:
    """Cut a validation part from the training part; the test part is untouched.

    Stratified: each class gives its share of the validation part, to within one example. Both
    parts keep the original order. The draw is the same on every machine and numpy version: it
    ranks the raw 64-bit output of PCG64.

    Args:
        dataset: a data set without a validation part.
        validation: number of examples (int), or share of the training part (float in (0, 1)),
            rounded to the nearest example.
        seed: non-negative integer.

    Returns:
        A new data set with `validation_inputs` and `validation_targets`.

    Raises:
        DataError: there is a validation part already, or one of the parts would be empty.

    >>> x, y = np.arange(10), np.array([0, 1] * 5, np.int32)
    >>> parts = split(Dataset("toy", x, y, x, y, classes=("a", "b")), 0.4, seed=0)
    >>> len(parts.train_inputs), np.bincount(parts.validation_targets).tolist()
    (6, [2, 2])
    """
    if dataset.validation is not None:
        raise DataError(f"{dataset.name} has a validation part already; split the loaded set")
    total = len(dataset.train_targets)
    if isinstance(validation, bool) or not isinstance(validation, (int, float, np.integer)):
        raise DataError(f"validation must be an int or a float, not {validation!r}")
    if isinstance(validation, float):
        if not 0 < validation < 1:
            raise DataError(
                f"validation={validation} must lie between 0 and 1; give an int for a count"
            )
        count = round(validation * total)
    else:
        count = int(validation)
    if not 0 < count < total:
        raise DataError(
            f"{dataset.name}: validation={validation} would hold {count} of {total} training "
            f"examples; it must hold from 1 to {total - 1}"
        )
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise DataError(f"seed must be a non-negative integer, not {seed!r}")

    held = _stratified(dataset.train_targets, count, int(seed))
    taken, kept = np.flatnonzero(held), np.flatnonzero(~held)
    return dataclasses.replace(
        dataset,
        train_inputs=_pick(dataset.train_inputs, kept),
        train_targets=_pick(dataset.train_targets, kept),
        validation=(_pick(dataset.train_inputs, taken), _pick(dataset.train_targets, taken)),
    )


def _pick(inputs: Any, positions: np.ndarray) -> Any:
    picked = inputs[positions]
    return frozen(picked) if isinstance(picked, np.ndarray) else picked


def _stratified(targets: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return a mask with `count` True, shared over the classes by largest remainder."""
    classes, inverse, sizes = np.unique(targets, return_inverse=True, return_counts=True)
    # Integer arithmetic: quotas are exact and equal remainders break by class index.
    quotas, remainders = np.divmod(sizes.astype(np.int64) * count, len(targets))
    largest = np.argsort(-remainders, kind="stable")[: count - int(quotas.sum())]
    quotas[largest] += 1
    keys = np.random.PCG64(seed).random_raw(len(targets))
    held = np.zeros(len(targets), bool)
    for index in range(len(classes)):
        members = np.flatnonzero(inverse == index)
        order = np.argsort(keys[members], kind="stable")
        held[members[order[: quotas[index]]]] = True
    return held


def map_inputs(function: Callable[[Any], np.ndarray], dataset: Dataset[Any]) -> Dataset[np.ndarray]:
    """Apply a pure function to the inputs of every part.

    Args:
        function: inputs of one part -> array with the same number of examples.
        dataset: a data set.

    Returns:
        A new data set; its `maximum` is None, for the function may change the range.

    >>> x, y = np.ones((2, 3), np.float32), np.zeros(2, np.int32)
    >>> map_inputs(lambda part: part * 2, Dataset("toy", x, y, x, y, ("a",))).test_inputs.max()
    np.float32(2.0)
    """
    held = dataset.validation
    return dataclasses.replace(
        dataset,
        train_inputs=frozen(function(dataset.train_inputs)),
        test_inputs=frozen(function(dataset.test_inputs)),
        validation=None if held is None else (frozen(function(held[0])), held[1]),
        maximum=None,
    )


@overload
def normalise(data: np.ndarray, maximum: float) -> np.ndarray: ...
@overload
def normalise(data: Dataset[Any], maximum: float | None = None) -> Dataset[np.ndarray]: ...
def normalise(data: Any, maximum: float | None = None) -> Any:
    """Scale raw values from [0, maximum] to float32 in [0, 1].

    Args:
        data: an array, or a data set (every part is scaled).
        maximum: largest value the raw data can take: 255 for 8-bit images, 16 for `digits`.
            A data set knows its own.

    Returns:
        The same kind of thing, with float32 values.

    Raises:
        DataError: the maximum is not known, or a value lies outside [0, maximum].

    >>> normalise(np.array([0, 51, 255], np.uint8), 255)
    array([0. , 0.2, 1. ], dtype=float32)
    """
    if isinstance(data, Dataset):
        limit = data.maximum if maximum is None else maximum
        if limit is None:
            raise DataError(
                f"{data.name}: its inputs have no largest value; use standardise, or give maximum="
            )
        scaled = map_inputs(lambda part: normalise(part, limit), data)
        return dataclasses.replace(scaled, maximum=1.0)
    if maximum is None or not maximum > 0:
        raise DataError(f"normalise an array by a positive maximum=, not {maximum}")
    array = np.asarray(data)
    if array.size and not (array.min() >= 0 and array.max() <= maximum):
        raise DataError(
            f"values from {array.min()} to {array.max()} do not lie in [0, {maximum}]; "
            "give the right maximum="
        )
    return np.divide(array, np.float32(maximum), dtype=np.float32)


@overload
def flatten(data: np.ndarray) -> np.ndarray: ...
@overload
def flatten(data: Dataset[Any]) -> Dataset[np.ndarray]: ...
def flatten(data: Any) -> Any:
    """Join all axes but the first: [n, 28, 28] becomes [n, 784].

    Args:
        data: an array, or a data set (every part is flattened).

    Returns:
        The same kind of thing; row-major order, no copy where numpy needs none.

    >>> flatten(np.zeros((5, 8, 8), np.uint8)).shape
    (5, 64)
    """
    if isinstance(data, Dataset):
        return dataclasses.replace(map_inputs(flatten, data), maximum=data.maximum)
    array = np.asarray(data)
    return array.reshape(array.shape[0], int(np.prod(array.shape[1:])))


def standardise(dataset: Dataset[Any], *, axis: tuple[int, ...] | None = None) -> Dataset[Any]:
    """Subtract the mean and divide by the standard deviation of the training part.

    Validation and test parts use the training statistics. A constant is only centred.

    Args:
        dataset: a data set of arrays.
        axis: axes to average over; all by default. (0, 1, 2) keeps one mean per colour channel
            of [n, rows, columns, 3] images.

    Returns:
        A new data set with float32 inputs.

    >>> x, y = np.array([[1.0], [3.0]]), np.zeros(2, np.int32)
    >>> standardise(Dataset("toy", x, y, x, y, ("a",))).train_inputs.ravel()
    array([-1.,  1.], dtype=float32)
    """
    train = np.asarray(dataset.train_inputs)
    mean = train.mean(axis=axis, keepdims=True, dtype=np.float64)
    deviation = train.std(axis=axis, keepdims=True, dtype=np.float64)
    offset = mean.astype(np.float32)
    scale = np.where(deviation > 0, deviation, 1.0).astype(np.float32)
    return map_inputs(lambda part: (part.astype(np.float32) - offset) / scale, dataset)
