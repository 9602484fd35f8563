from __future__ import annotations

import contextlib
import gzip
import io
import zipfile
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from adaptivenet.data import CorruptDataError, digest_arrays, digest_bytes, encode_idx
from adaptivenet.data.content import check
from adaptivenet.data.registry import Entry, File

LABELS = encode_idx(np.arange(50, dtype=np.uint8) % 10)
IDX = File("labels", "idx", digest_bytes(LABELS), len(LABELS), (50,))
ARRAYS = {"x": np.arange(300, dtype=np.float32).reshape(100, 3), "y": np.arange(100) % 7}
NPZ = File("a.npz", "npz", digest_arrays(ARRAYS), sum(a.nbytes for a in ARRAYS.values()))


def npz(arrays: dict[str, np.ndarray], *, compressed: bool = True) -> bytes:
    stream = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(stream, **arrays)
    return stream.getvalue()


@pytest.mark.parametrize("level", [0, 1, 9])
def test_any_recompression_passes(level: int) -> None:
    assert check(IDX, gzip.compress(LABELS, level, mtime=level), "f") == LABELS
    assert (
        check(IDX, gzip.compress(LABELS[:9], mtime=0) + gzip.compress(LABELS[9:], mtime=0), "f")
        == LABELS
    )
    assert check(IDX, LABELS, "f") == LABELS


def test_any_repacking_of_arrays_passes() -> None:
    for raw in (npz(ARRAYS), npz(dict(reversed(ARRAYS.items())), compressed=False)):
        content = check(NPZ, raw, "f")
        assert isinstance(content, dict)
        np.testing.assert_array_equal(content["x"], ARRAYS["x"])


@hypothesis.given(st.data())
def test_truncation_anywhere_is_refused_by_name(data: st.DataObject) -> None:
    file, raw = data.draw(
        st.sampled_from([(IDX, gzip.compress(LABELS)), (IDX, LABELS), (NPZ, npz(ARRAYS))])
    )
    cut = data.draw(st.integers(0, len(raw) - 1))
    with pytest.raises(CorruptDataError, match=r"^where/f"):
        check(file, raw[:cut], "where/f")


@hypothesis.settings(max_examples=200)
@hypothesis.given(st.data())
def test_a_flipped_bit_is_refused_or_harmless(data: st.DataObject) -> None:
    """A flip in a time stamp or a file name inside the archive changes no content."""
    file, raw = data.draw(st.sampled_from([(IDX, gzip.compress(LABELS)), (NPZ, npz(ARRAYS))]))
    bit = data.draw(st.integers(0, len(raw) * 8 - 1))
    flipped = bytearray(raw)
    flipped[bit // 8] ^= 1 << bit % 8
    content = None
    with contextlib.suppress(CorruptDataError):  # any other exception would be a fault
        content = check(file, bytes(flipped), "where/f")
    if content is not None:
        found = digest_bytes(content) if isinstance(content, bytes) else digest_arrays(content)
        assert found == file.sha256


@hypothesis.given(st.integers(0, len(LABELS) * 8 - 1))
def test_every_flipped_bit_of_content_is_refused(bit: int) -> None:
    flipped = bytearray(LABELS)
    flipped[bit // 8] ^= 1 << bit % 8
    for raw in (bytes(flipped), gzip.compress(bytes(flipped))):
        with pytest.raises(CorruptDataError, match=r"^f: "):
            check(IDX, raw, "f")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (gzip.compress(LABELS, mtime=0)[:-12], "truncated: the gzip stream ends after"),
        (LABELS[:-4], "truncated: the header announces shape .50,."),
        (gzip.compress(LABELS + b"more", mtime=0), "too long: expected 58 bytes, found more"),
        (encode_idx(np.arange(49, dtype=np.uint8)), r"shape \(49,\), expected magic 0x0801 and"),
        (encode_idx(np.zeros((7, 7), np.uint8)), r"mislabelled: magic 0x0802 .* magic 0x0801"),
        (b"<html>404</html>", "not an idx file"),
        (b"", "truncated"),
        (encode_idx(np.zeros(50, np.uint8)), "content differs .*: expected .*, found "),
    ],
    # Named, because the bytes of a gzip stream hold the time, and workers must agree on the names.
    ids=["cut gzip", "cut", "long", "short", "matrix", "page", "empty", "other content"],
)
def test_the_message_says_what_was_expected_and_found(raw: bytes, message: str) -> None:
    with pytest.raises(CorruptDataError, match=f"^f: .*{message}"):
        check(IDX, raw, "f")


def test_another_set_s_file_is_recognised(toy: Entry) -> None:
    images, labels = toy.files
    swapped = encode_idx(np.array([0, 1, 2, 1, 0], np.uint8))
    assert digest_bytes(swapped) == labels.sha256
    with pytest.raises(CorruptDataError, match="it holds the content of labels of Toy, expected"):
        check(images, gzip.compress(swapped, mtime=0), "images.gz")


def test_wrong_arrays_are_listed() -> None:
    other = {"x": ARRAYS["x"], "z": ARRAYS["y"]}
    with pytest.raises(CorruptDataError, match=r"x float32\(100, 3\), z int64\(100,\)"):
        check(NPZ, npz(other), "f")
    with pytest.raises(CorruptDataError, match="not a readable npz file"):
        check(NPZ, b"not a zip", "f")


def test_bombs_are_not_unpacked(tmp_path: Path) -> None:
    zeros = np.zeros(2_000_000, np.uint8)
    with pytest.raises(CorruptDataError, match="too long"):
        check(IDX, gzip.compress(zeros.tobytes(), mtime=0), "f")
    with pytest.raises(CorruptDataError, match="too long: its arrays take 2000"):
        check(NPZ, npz({"x": zeros}), "f")


def test_pickles_are_never_opened() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        inner = io.BytesIO()
        np.save(inner, np.array([{"a": 1}], dtype=object), allow_pickle=True)
        archive.writestr("x.npy", inner.getvalue())
    with pytest.raises(CorruptDataError, match="allow_pickle=False"):
        check(NPZ, stream.getvalue(), "f")
