"""The real data sets: shapes, label histograms, statistics, and refusal of damaged files."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from adaptivenet.data import (
    CorruptDataError,
    Dataset,
    Electrocardiogram,
    Events,
    Text,
    Waveforms,
    describe,
    digest_arrays,
    load,
    names,
)
from adaptivenet.data.loaders import load_from

FILES = [file.name for file in describe("mnist").files]
TEXTS = {"tinyshakespeare", "wikitext2_small"}
MNIST_TRAIN = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
MNIST_TEST = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def counts(targets: np.ndarray) -> list[int]:
    return np.bincount(targets).tolist()


def test_digits_need_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTIVENET_DATA", "no/such/folder")
    data = load("digits", download=False)
    assert data.train_inputs.shape == (1437, 8, 8)
    assert data.test_inputs.shape == (360, 8, 8)
    assert data.train_inputs.dtype == np.uint8
    assert data.train_targets.dtype == np.int32
    assert data.maximum == data.train_inputs.max() == 16
    assert sum(map(np.add, counts(data.train_targets), counts(data.test_targets))) == 1797


def test_digits_equal_those_of_scikit_learn() -> None:
    reference = pytest.importorskip("sklearn.datasets").load_digits()
    data = load("digits")
    np.testing.assert_array_equal(
        np.concatenate([data.train_inputs, data.test_inputs]), reference.images
    )
    np.testing.assert_array_equal(
        np.concatenate([data.train_targets, data.test_targets]), reference.target
    )


def test_mnist(data_folder: Path) -> None:
    data = load("mnist", download=False)
    assert data.name == "MNIST"
    assert data.train_inputs.shape == (60_000, 28, 28)
    assert data.test_inputs.shape == (10_000, 28, 28)
    assert data.train_inputs.dtype == np.uint8
    assert counts(data.train_targets) == MNIST_TRAIN
    assert counts(data.test_targets) == MNIST_TEST
    assert round(float(data.train_inputs.mean() / 255), 4) == 0.1307
    assert data.train_targets[:5].tolist() == [5, 0, 4, 1, 9]
    assert data.sha256 == describe("mnist").fingerprint


def test_fashion_mnist(data_folder: Path) -> None:
    data = load("fashion_mnist", download=False)
    assert counts(data.train_targets) == [6000] * 10
    assert counts(data.test_targets) == [1000] * 10
    scaled = data.train_inputs.astype(np.float32) / 255
    assert round(float(scaled.mean(dtype=np.float64)), 4) == 0.2860
    assert round(float(scaled.std(dtype=np.float64)), 4) == 0.3530
    assert data.classes[int(data.train_targets[0])] == "Ankle boot"


def test_cifar10_jpeg(data_folder: Path) -> None:
    pytest.importorskip("PIL")
    data = load("cifar10_jpeg", download=False)
    assert data.name == "CIFAR-10 (JPEG copy)"
    assert data.train_inputs.shape == (50_000, 32, 32, 3)
    assert data.test_inputs.shape == (10_000, 32, 32, 3)
    assert counts(data.train_targets) == [5000] * 10
    assert counts(data.test_targets) == [1000] * 10
    mean = data.train_inputs.mean(axis=(0, 1, 2)) / 255
    # Decoders differ by a grey level here and there, so to 0.001 only.
    np.testing.assert_allclose(mean, [0.4913, 0.4821, 0.4465], atol=1e-3)
    assert data.classes[0] == "airplane"


def test_nmnist_small(data_folder: Path) -> None:
    data = load("nmnist_small", download=False)
    events = data.train_inputs
    assert isinstance(events, Events)
    assert (len(events), len(data.test_inputs)) == (1000, 100)
    assert (len(events.x), len(data.test_inputs.x)) == (4_133_231, 385_596)
    assert max(events.x.max(), events.y.max()) < events.width == events.height == 34
    assert set(np.unique(events.polarity)) == {0, 1}
    assert max(events.time_us.max(), data.test_inputs.time_us.max()) == 336_040
    assert len(counts(data.train_targets)) == 10
    assert len(events[0].x) == events.lengths[0]


def test_fsdd(data_folder: Path) -> None:
    data = load("fsdd", download=False)
    waves = data.train_inputs
    assert isinstance(waves, Waveforms)
    assert counts(data.train_targets) == [270] * 10
    assert counts(data.test_targets) == [30] * 10
    assert waves.rate == 8000
    assert len(waves.speakers) == 6
    assert set(data.test_inputs.take) == set(range(5))
    assert waves.take.min() == 5
    lengths = np.concatenate([waves.lengths, data.test_inputs.lengths])
    assert (lengths.min(), lengths.max()) == (1148, 18_262)
    assert waves[0].dtype == np.int16


def test_tinyshakespeare(data_folder: Path) -> None:
    text = load("tinyshakespeare", download=False)
    assert isinstance(text, Text)
    assert (len(text.train), len(text.test)) == (1_003_854, 111_540)
    assert len(text.vocabulary) == 65
    assert text.train.startswith("First Citizen:\nBefore we proceed")
    assert text.decode(text.encode(text.test)) == text.test


def test_wikitext2_small(data_folder: Path) -> None:
    text = load("wikitext2_small", download=False)
    assert text.level == "word"
    assert (len(text.train.encode()), len(text.test.encode())) == (1_121_681, 1_256_449)
    assert "<unk>" in text.vocabulary
    # The published counts: 217,646 and 245,569 tokens, with one for the end of each line.
    assert (len(text.encode(text.train)), len(text.encode(text.test))) == (217_646, 245_569)


@pytest.mark.parametrize(
    ("name", "train", "test", "classes"),
    [
        ("basicmotions", (40, 6, 100), 40, 4),
        ("gunpoint", (50, 1, 150), 150, 2),
        ("italypowerdemand", (67, 1, 24), 1029, 2),
        ("japanesevowels", (270, 12, 25), 370, 9),
        ("pickupgesturewiimotez", (50, 1, 361), 50, 10),
    ],
)
def test_sensor_sets(
    data_folder: Path, name: str, train: tuple[int, ...], test: int, classes: int
) -> None:
    data = load(name, download=False)
    assert isinstance(data, Dataset)
    assert data.train_inputs.shape == train
    assert data.test_inputs.shape == (test, *train[1:])
    assert data.train_inputs.dtype == np.float32
    assert len(data.classes) == len(set(data.train_targets.tolist())) == classes


def test_mitbih_record100(data_folder: Path) -> None:
    record = load("mitbih_record100", download=False)
    assert isinstance(record, Electrocardiogram)
    assert record.signal.shape == (650_000, 2)
    # The checksums that the header of the record gives for its leads, in 16 bits.
    sums = record.signal.astype(np.int64).sum(axis=0).astype(np.int16)
    assert sums.tolist() == [-22131, 20052]
    assert np.unique(record.annotation_code, return_counts=True)[1].tolist() == [2239, 1, 33, 1]
    assert record.millivolts()[0, 0] == np.float32((record.signal[0, 0] - 1024) / 200)


@pytest.mark.parametrize("name", sorted(set(names()) - {"cifar10_jpeg"} - TEXTS))
def test_loaded_arrays_are_read_only(data_folder: Path, name: str) -> None:
    data = load(name, download=False)
    arrays = [value for value in vars(data).values() if isinstance(value, np.ndarray)]
    assert arrays
    assert not any(array.flags.writeable for array in arrays)


@pytest.fixture
def links(data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with links to the true MNIST, to be damaged one by one."""
    folder = tmp_path / "linked" / "mnist"
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / f"{name}.gz").symlink_to(data_folder / "mnist" / f"{name}.gz")
    monkeypatch.setenv("ADAPTIVENET_DATA", str(folder.parent))
    return folder


def refuse(path: Path, raw: bytes, message: str) -> None:
    path.unlink()
    path.write_bytes(raw)
    with pytest.raises(CorruptDataError, match=message) as caught:
        load("mnist")
    assert str(caught.value).startswith(f"{path}: ")
    assert "python -m adaptivenet.data fetch mnist --folder" in str(caught.value)


def test_truncated_mnist_is_refused_by_name(links: Path) -> None:
    path = links / "train-labels-idx1-ubyte.gz"
    refuse(path, path.read_bytes()[:20_000], "truncated: the gzip stream ends after 20000 bytes")


def test_mnist_cut_before_packing_is_refused(links: Path) -> None:
    path = links / "t10k-labels-idx1-ubyte.gz"
    refuse(path, gzip.compress(gzip.decompress(path.read_bytes())[:-8]), "header announces shape")


def test_one_wrong_label_is_refused(links: Path) -> None:
    path = links / "train-labels-idx1-ubyte.gz"
    labels = bytearray(gzip.decompress(path.read_bytes()))
    labels[1000] ^= 1
    refuse(path, gzip.compress(bytes(labels)), "content differs .* expected 65a50cbb")


def test_labels_in_the_place_of_images_are_refused(links: Path) -> None:
    labels = (links / "train-labels-idx1-ubyte.gz").read_bytes()
    refuse(links / "train-images-idx3-ubyte.gz", labels, "it holds the content of train-labels")


def test_test_part_in_the_place_of_train_is_refused(links: Path) -> None:
    labels = (links / "t10k-labels-idx1-ubyte.gz").read_bytes()
    refuse(links / "train-labels-idx1-ubyte.gz", labels, "it holds the content of t10k-labels")


def test_fashion_mnist_never_stands_in_for_mnist(links: Path, data_folder: Path) -> None:
    other = (data_folder / "fashion_mnist" / "train-labels-idx1-ubyte.gz").read_bytes()
    refuse(links / "train-labels-idx1-ubyte.gz", other, "train-labels-idx1-ubyte of Fashion-MNIST")


def test_the_table_s_digests_are_those_of_the_arrays(data_folder: Path) -> None:
    """The digest of an npz is of its arrays: written anew without compression, it is the same."""
    for name in ("gunpoint", "basicmotions"):
        with np.load(data_folder / "sensors" / f"{name}.npz") as arrays:
            assert digest_arrays(dict(arrays)) == describe(name).files[0].sha256


def test_mnist_downloads_from_a_mirror(data_folder: Path, server, monkeypatch) -> None:
    monkeypatch.delenv("ADAPTIVENET_DATA")
    for name in FILES:
        raw = (data_folder / "mnist" / f"{name}.gz").read_bytes()
        server.pages[f"/{name}.gz"] = raw
    first = load_from("mnist", mirrors=[server.url])
    again = load_from("mnist", mirrors=[])
    assert len(server.asked) == 4
    np.testing.assert_array_equal(first.train_inputs, again.train_inputs)


def test_import_brings_nothing_heavy() -> None:
    heavy = ["PIL", "matplotlib", "flax", "orbax", "scipy", "urllib.request", "sklearn", "tyro"]
    code = (
        "import sys; before = set(sys.modules); import numpy, jax; base = set(sys.modules)\n"
        "import adaptivenet.data\n"
        f"print([name for name in {heavy} if name in set(sys.modules) - base])"
    )
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
