"""`load`: from the name of a data set to its arrays."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from functools import partial
from importlib import resources
from itertools import pairwise
from typing import Any, Literal, cast, overload

import numpy as np

from adaptivenet.data.content import Content, check
from adaptivenet.data.dataset import Dataset, frozen
from adaptivenet.data.ecg import Electrocardiogram
from adaptivenet.data.errors import DataError
from adaptivenet.data.idx import decode_idx
from adaptivenet.data.mnist1d import published_mnist1d
from adaptivenet.data.ragged import Events, Waveforms
from adaptivenet.data.registry import Entry, File, describe
from adaptivenet.data.storage import read
from adaptivenet.data.text import Text, symbols

__all__ = ["load"]

Read = Callable[[str], Any]
_FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer")
_CIFAR10 += ("dog", "frog", "horse", "ship", "truck")
_DIGITS = tuple("0123456789")


def shipped(file: File) -> bytes:
    """Return a file that comes with the package, as it is.

    >>> shipped(describe("digits").files[0])[:2]
    b'PK'
    """
    return resources.files("adaptivenet.data").joinpath("files", file.name).read_bytes()


def _labels(array: np.ndarray) -> np.ndarray:
    return frozen(array.astype(np.int32))


def _dataset(entry: Entry, train: tuple, test: tuple, classes: Sequence[str], **more: Any) -> Any:
    """Assemble a data set from (inputs, targets) pairs and what the table says."""
    parts = [
        (frozen(inputs) if isinstance(inputs, np.ndarray) else inputs, _labels(targets))
        for inputs, targets in (train, test)
    ]
    return Dataset(
        entry.title,
        *parts[0],
        *parts[1],
        classes=tuple(classes),
        source=entry.source,
        licence=entry.licence,
        sha256=entry.fingerprint,
        **more,
    )


def _digits(entry: Entry, read: Read) -> Dataset[np.ndarray]:
    (file,) = entry.files
    name = f"{file.name} of the installed package adaptivenet (install it anew)"
    arrays = cast("dict", check(file, shipped(file), name))
    images, labels = arrays["images"], arrays["labels"]
    train, test = slice(None, 1437), slice(1437, None)
    parts = [(images[part].copy(), labels[part]) for part in (train, test)]
    return _dataset(entry, parts[0], parts[1], _DIGITS, maximum=16.0)


def _mnist1d(entry: Entry, read: Read) -> Dataset[np.ndarray]:
    return published_mnist1d()


def _idx(entry: Entry, read: Read, classes: Sequence[str]) -> Dataset[np.ndarray]:
    arrays = [decode_idx(read(file.name), file.name) for file in entry.files]
    return _dataset(entry, tuple(arrays[:2]), tuple(arrays[2:]), classes, maximum=255.0)


def _cifar10_jpeg(entry: Entry, read: Read) -> Dataset[np.ndarray]:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            f"{entry.title} is stored as JPEG files; decoding takes Pillow: pip install pillow"
        ) from error
    parts = []
    for name in ("train.npz", "test.npz"):
        arrays = read(name)
        jpeg, offsets = arrays["jpeg"].tobytes(), arrays["offsets"].tolist()
        images = np.empty((len(offsets) - 1, 32, 32, 3), np.uint8)
        for index, (start, stop) in enumerate(pairwise(offsets)):
            with Image.open(io.BytesIO(jpeg[start:stop])) as image:
                images[index] = np.asarray(image.convert("RGB"))
        parts.append((images, arrays["labels"]))
    return _dataset(entry, parts[0], parts[1], _CIFAR10, maximum=255.0)


def _nmnist(entry: Entry, read: Read) -> Dataset[Events]:
    parts = []
    for name in ("train.npz", "test.npz"):
        arrays = read(name)
        flat = {"x": "x", "y": "y", "polarity": "p", "time_us": "t_us", "offsets": "offsets"}
        fields: dict[str, Any] = {field: frozen(arrays[key]) for field, key in flat.items()}
        parts.append((Events(height=34, width=34, **fields), arrays["labels"]))
    return _dataset(entry, parts[0], parts[1], _DIGITS)


def _fsdd(entry: Entry, read: Read) -> Dataset[Waveforms]:
    parts = []
    for name in ("train.npz", "test.npz"):
        arrays = read(name)
        waves = Waveforms(
            signal=frozen(arrays["signal"]),
            offsets=frozen(arrays["offsets"]),
            rate=int(arrays["rate"]),
            speaker=frozen(arrays["speaker"]),
            take=frozen(arrays["take"]),
            speakers=tuple(map(str, arrays["speakers"])),
        )
        parts.append((waves, arrays["labels"]))
    return _dataset(entry, parts[0], parts[1], _DIGITS)


def _sensor(entry: Entry, read: Read) -> Dataset[np.ndarray]:
    arrays = read(entry.files[0].name)
    parts = [(arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in ("train", "test")]
    return _dataset(entry, parts[0], parts[1], [str(name) for name in arrays["classes"]])


def _ecg(entry: Entry, read: Read) -> Electrocardiogram:
    arrays = read(entry.files[0].name)
    return Electrocardiogram(
        name=entry.title,
        signal=frozen(arrays["signal"]),
        rate=int(arrays["rate"]),
        gain=int(arrays["gain"]),
        baseline=int(arrays["baseline"]),
        leads=tuple(map(str, arrays["leads"])),
        annotation_sample=frozen(arrays["ann_sample"]),
        annotation_code=frozen(arrays["ann_code"]),
        source=entry.source,
        licence=entry.licence,
        sha256=entry.fingerprint,
    )


def _text(entry: Entry, train: str, test: str, level: str) -> Text:
    # Symbols of both parts, so that every text has a code; nothing else is learnt from the test.
    vocabulary = sorted({*symbols(train, level), *symbols(test, level)})
    return Text(
        entry.title,
        train,
        test,
        tuple(vocabulary),
        level,
        source=entry.source,
        licence=entry.licence,
        sha256=entry.fingerprint,
    )


def _tinyshakespeare(entry: Entry, read: Read) -> Text:
    text = read("input.txt").decode("ascii")
    cut = len(text) * 9 // 10
    return _text(entry, text[:cut], text[cut:], "character")


def _wikitext2(entry: Entry, read: Read) -> Text:
    train, test = (read(name).decode() for name in ("valid.txt", "test.txt"))
    return _text(entry, train, test, "word")


_BUILDERS: dict[str, Callable[[Entry, Read], Any]] = {
    "digits": _digits,
    "mnist1d": _mnist1d,
    "mnist": partial(_idx, classes=_DIGITS),
    "fashion_mnist": partial(_idx, classes=_FASHION),
    "cifar10_jpeg": _cifar10_jpeg,
    "nmnist_small": _nmnist,
    "fsdd": _fsdd,
    "tinyshakespeare": _tinyshakespeare,
    "wikitext2_small": _wikitext2,
    "basicmotions": _sensor,
    "gunpoint": _sensor,
    "italypowerdemand": _sensor,
    "japanesevowels": _sensor,
    "pickupgesturewiimotez": _sensor,
    "mitbih_record100": _ecg,
}
_ArrayName = Literal[
    "digits",
    "mnist1d",
    "mnist",
    "fashion_mnist",
    "cifar10_jpeg",
    "basicmotions",
    "gunpoint",
    "italypowerdemand",
    "japanesevowels",
    "pickupgesturewiimotez",
]
_Folder = str | os.PathLike[str] | None


@overload
def load(
    name: _ArrayName, *, folder: _Folder = None, download: bool = True
) -> Dataset[np.ndarray]: ...
@overload
def load(
    name: Literal["nmnist_small"], *, folder: _Folder = None, download: bool = True
) -> Dataset[Events]: ...
@overload
def load(
    name: Literal["fsdd"], *, folder: _Folder = None, download: bool = True
) -> Dataset[Waveforms]: ...
@overload
def load(
    name: Literal["tinyshakespeare", "wikitext2_small"],
    *,
    folder: _Folder = None,
    download: bool = True,
) -> Text: ...
@overload
def load(
    name: Literal["mitbih_record100"], *, folder: _Folder = None, download: bool = True
) -> Electrocardiogram: ...
@overload
def load(name: str, *, folder: _Folder = None, download: bool = True) -> Any: ...
def load(name: str, *, folder: _Folder = None, download: bool = True) -> Any:
    """Load a data set by name; no set ever stands in for another.

    `digits` comes with the package and `mnist1d` is generated. The files of the others are looked
    for in `folder`, in the folder of the variable ADAPTIVENET_DATA and in the cache, then
    downloaded over https to `folder` or the cache. Every file is verified against pinned content
    each time. `cifar10_jpeg` takes some seconds: it decodes 60,000 JPEG files with Pillow, whose
    versions may differ by a grey level.

    Args:
        name: one of `names()`.
        folder: folder to look in first; it holds one folder a data set.
        download: whether to fetch files that are found nowhere.

    Returns:
        `Dataset` (inputs: arrays; `Events` for nmnist_small; `Waveforms` for fsdd), `Text` for
        tinyshakespeare and wikitext2_small, `Electrocardiogram` for mitbih_record100.

    Raises:
        UnknownDatasetError: no data set has this name.
        MissingDataError: a file is nowhere, and could not or was not to be fetched.
        CorruptDataError: a file is truncated, altered or mislabelled.

    References:
        `describe(name).reference` says what to cite.

    >>> load("digits")
    Dataset('Optical digits 8x8': train 1437 x (8, 8) uint8, validation none, test 360, 10 classes)
    """
    return load_from(name, folder=folder, download=download)


def load_from(
    name: str,
    *,
    folder: _Folder = None,
    download: bool = True,
    mirrors: Sequence[str] | None = None,
) -> Any:
    """Do what `load` does, with other mirrors than those of the table.

    >>> load_from("digits", mirrors=["https://example.invalid"]).name
    'Optical digits 8x8'
    """
    entry = describe(name)
    files = {file.name: file for file in entry.files}

    def content(file_name: str) -> Content:
        return read(entry, files[file_name], folder=folder, download=download, mirrors=mirrors)

    return _BUILDERS[entry.name](entry, content)
