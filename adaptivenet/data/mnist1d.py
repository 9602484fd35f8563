"""MNIST-1D: ten one-dimensional digit shapes, deformed and noised; generated, never downloaded.

Written from the published definition (S. Greydanus, Apache-2.0). The draws come from the same
legacy numpy stream in the same order, so the default arrays equal the published ones.
"""

from __future__ import annotations

import functools

import numpy as np

from adaptivenet.data.dataset import Dataset, frozen
from adaptivenet.data.digest import digest_arrays
from adaptivenet.data.errors import DataError

__all__ = ["generate_mnist1d"]

# Twelve points a digit, as drawn by the author of the set.
_SHAPES = (
    (5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5),
    (5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5),
    (5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5),
    (5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5),
    (5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5),
    (5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5),
    (5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5),
    (5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5),
)
_SOURCE = "generated; definition: github.com/greydanus/mnist1d, commit 7878d96, seed 42"
_LICENCE = "Apache-2.0 (S. Greydanus)"
# The labels are shuffled by the last draw, so they tell whether the whole stream was the same.
_LABELS_SHA256 = "640c7f7e655c66304acadf75b923d8bf3a775f6501df24d83e4a7cf21156c3aa"


def generate_mnist1d(
    *,
    samples: int = 5000,
    train_share: float = 0.8,
    length: int = 40,
    padding: tuple[int, int] = (36, 60),
    scale: float = 0.4,
    max_translation: int = 48,
    correlated_noise: float = 0.25,
    noise: float = 0.02,
    shear: float = 0.75,
    seed: int = 42,
) -> Dataset[np.ndarray]:
    """Generate MNIST-1D.

    Each example is a digit shape of 12 points, padded with a random number of zeros, stretched,
    scaled, rolled, laid on smooth noise where it is zero, noised, sheared and resampled. All
    inputs together have mean 0 and standard deviation 1.

    Args:
        samples: examples in all; a multiple of 10.
        train_share: share of them in the training part, in (0, 1).
        length: samples of each signal.
        padding: smallest and largest number of zeros appended to the 12 points.
        scale: width of the random factor around 1.
        max_translation: exclusive upper bound of the random roll, in points.
        correlated_noise: amplitude of the smooth noise.
        noise: amplitude of the white noise.
        shear: width of the random slope.
        seed: seed of the legacy numpy generator, 0 to 2**32 - 1.

    Returns:
        Inputs [n, length] float32. With the defaults: 4,000 training and 1,000 test examples,
        equal to the published arrays to rounding.

    Raises:
        DataError: an argument is out of range.

    References:
        S. Greydanus, D. Kobak, "Scaling down deep learning with MNIST-1D", ICML 2024.

    >>> toy = generate_mnist1d(samples=20)
    >>> toy.train_inputs.shape, toy.test_inputs.shape
    ((16, 40), (4, 40))
    """
    own = {
        "train_share": train_share,
        "length": length,
        "padding": tuple(padding),
        "scale": scale,
        "max_translation": max_translation,
        "correlated_noise": correlated_noise,
        "noise": noise,
        "shear": shear,
        "seed": seed,
    }
    inputs, targets = _examples(samples, **own)
    cut = int(samples * train_share)
    defaults = generate_mnist1d.__kwdefaults__ or {}
    published = all(
        defaults.get(name) == value for name, value in {"samples": samples, **own}.items()
    )
    return Dataset(
        name="MNIST-1D" if published else "MNIST-1D (own settings)",
        train_inputs=inputs[:cut],
        train_targets=targets[:cut],
        test_inputs=inputs[cut:],
        test_targets=targets[cut:],
        classes=tuple("0123456789"),
        source=_SOURCE if published else "generated with own settings",
        licence=_LICENCE,
        sha256=digest_arrays({"inputs": inputs, "targets": targets}),
    )


def published_mnist1d() -> Dataset[np.ndarray]:
    """Return the published MNIST-1D (generated once a process), after checking the draws.

    >>> published_mnist1d().train_inputs.shape
    (4000, 40)
    """
    dataset = generate_mnist1d()
    labels = np.concatenate([dataset.train_targets, dataset.test_targets])
    found = digest_arrays({"labels": labels})
    if found != _LABELS_SHA256:
        raise DataError(
            "MNIST-1D: this numpy draws other random numbers than the published set "
            f"(labels: expected {_LABELS_SHA256[:16]}, found {found[:16]}); "
            "please report it with the version of numpy"
        )
    return dataset


def _check(
    samples: int,
    train_share: float,
    length: int,
    padding: tuple[int, int],
    max_translation: int,
    seed: int,
) -> None:
    if samples < 10 or samples % 10:
        raise DataError(f"samples={samples} must be a positive multiple of 10 (the classes)")
    if not 1 <= int(samples * train_share) < samples:
        raise DataError(f"train_share={train_share} of {samples} leaves an empty part")
    if not 0 <= seed < 2**32:
        raise DataError(f"seed={seed} must lie between 0 and 2**32 - 1")
    if length < 2:
        raise DataError(f"length={length} must be 2 or more")
    if len(padding) != 2 or not 0 <= padding[0] <= padding[1]:
        raise DataError(f"padding={padding} must be (low, high) with 0 <= low <= high")
    if not 1 <= max_translation <= len(_SHAPES[0]) + padding[1]:
        raise DataError(
            f"max_translation={max_translation} must lie between 1 and the {12 + padding[1]} points"
        )


@functools.lru_cache(maxsize=4)
def _examples(
    samples: int,
    *,
    train_share: float,
    length: int,
    padding: tuple[int, int],
    scale: float,
    max_translation: int,
    correlated_noise: float,
    noise: float,
    shear: float,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    _check(samples, train_share, length, padding, max_translation, seed)
    draws = np.random.RandomState(seed)
    shapes = _templates()
    low, high = padding
    points = shapes.shape[1] + high
    fine = np.linspace(0, 1, points)
    slope = np.linspace(-0.5, 0.5, points)
    resampled = np.linspace(0, 1, length)

    signals = np.empty((samples, points))
    smooth = np.empty_like(signals)
    white = np.empty_like(signals)
    tilts = np.empty((samples, 1))
    for index in range(samples):
        # The order of the draws is part of the definition.
        shape = shapes[index // (samples // 10)]
        zeros = low + int(draws.rand() * (high - low + 1))
        # 1e-8 keeps points of the shape that are zero apart from the padding.
        padded = np.concatenate([shape + 1e-8, np.zeros(zeros)])
        signal = np.interp(fine, np.linspace(0, 1, len(padded)), padded)
        signal *= 1 + scale * (draws.rand() - 0.5)
        signals[index] = np.roll(signal, draws.choice(max_translation))
        smooth[index] = draws.randn(points)
        white[index] = draws.randn(points)
        tilts[index] = shear * (draws.rand() - 0.5)
    order = draws.permutation(samples)

    signals = np.where(signals != 0, signals, _smoothed(correlated_noise * smooth))
    signals = signals + noise * white - tilts * slope
    inputs = np.stack([np.interp(resampled, fine, signal) for signal in signals])[order]
    inputs = (inputs - inputs.mean()) / inputs.std()
    targets = np.repeat(np.arange(10, dtype=np.int32), samples // 10)[order]
    return frozen(inputs.astype(np.float32)), frozen(targets)


def _templates() -> np.ndarray:
    shapes = np.array(_SHAPES, np.float64)
    shapes -= shapes.mean(1, keepdims=True)
    shapes /= shapes.std(1, keepdims=True)
    return (shapes - shapes[:, :1]) / 6


def _smoothed(signals: np.ndarray, sigma: float = 2.0, radius: int = 8) -> np.ndarray:
    """Gaussian filter along the last axis, mirrored at the ends, cut at four sigma."""
    taps = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (taps / sigma) ** 2)
    weights /= weights.sum()
    extended = np.pad(signals, [(0, 0), (radius, radius)], mode="symmetric")
    windows = np.lib.stride_tricks.sliding_window_view(extended, len(taps), axis=1)
    return windows @ weights
