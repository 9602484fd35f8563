from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from adaptivenet.data import DataError, generate_mnist1d, load
from adaptivenet.data import mnist1d as module


def test_equal_to_the_published_arrays(data_folder: Path) -> None:
    own = load("mnist1d")
    with np.load(data_folder / "mnist1d" / "mnist1d.npz") as published:
        for part in ("train", "test"):
            inputs, targets = getattr(own, f"{part}_inputs"), getattr(own, f"{part}_targets")
            assert inputs.dtype == np.float32
            np.testing.assert_allclose(inputs, published[f"x_{part}"], rtol=0, atol=1e-6)
            np.testing.assert_array_equal(targets, published[f"y_{part}"])


def test_shape_balance_and_scale_without_any_file() -> None:
    own = generate_mnist1d()
    assert own.name == "MNIST-1D"
    assert own.train_inputs.shape == (4000, 40)
    assert own.test_inputs.shape == (1000, 40)
    everything = np.concatenate([own.train_inputs, own.test_inputs]).astype(np.float64)
    assert abs(everything.mean()) < 1e-6
    assert abs(everything.std() - 1) < 1e-6
    assert np.bincount(np.concatenate([own.train_targets, own.test_targets])).tolist() == [500] * 10


def test_smoothing_equals_scipy() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    signals = np.random.default_rng(0).normal(size=(4, 72))
    expected = np.stack([ndimage.gaussian_filter(signal, 2) for signal in signals])
    np.testing.assert_allclose(module._smoothed(signals), expected, rtol=0, atol=1e-12)


def test_own_settings_are_named_so_and_seeds_matter() -> None:
    first, again = generate_mnist1d(samples=50, seed=1), generate_mnist1d(samples=50, seed=1)
    other = generate_mnist1d(samples=50, seed=2)
    assert first.name == "MNIST-1D (own settings)"
    np.testing.assert_array_equal(first.train_inputs, again.train_inputs)
    assert first.sha256 == again.sha256 != other.sha256
    assert generate_mnist1d(samples=20, length=28).train_inputs.shape == (16, 28)
    clean = generate_mnist1d(samples=10, noise=0.0, correlated_noise=0.0, shear=0.0)
    assert np.isfinite(clean.train_inputs).all()


def test_kept_arrays_cannot_be_spoilt() -> None:
    with pytest.raises(ValueError, match="read-only"):
        generate_mnist1d(samples=20).train_inputs[0, 0] = 0


@pytest.mark.parametrize(
    "setting",
    [
        {"samples": 15},
        {"samples": 0},
        {"train_share": 1.0},
        {"train_share": 1e-9},
        {"length": 1},
        {"padding": (5, 4)},
        {"max_translation": 0},
        {"max_translation": 73},
        {"seed": -1},
        {"seed": 2**32},
    ],
)
def test_settings_out_of_range_are_named(setting: dict) -> None:
    with pytest.raises(DataError, match=next(iter(setting))):
        generate_mnist1d(**setting)


def test_another_random_stream_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LABELS_SHA256", "0" * 64)
    with pytest.raises(DataError, match="other random numbers than the published set"):
        load("mnist1d")
