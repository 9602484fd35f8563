from __future__ import annotations

import hashlib

import hypothesis
import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import strategies as st

from adaptivenet.data import digest_arrays, digest_bytes

numbers = arrays.arrays(np.int16, arrays.array_shapes(min_dims=0, max_dims=3, max_side=4))


def test_bytes_are_plain_sha256() -> None:
    assert digest_bytes(b"abc") == hashlib.sha256(b"abc").hexdigest()


@hypothesis.given(numbers, numbers)
def test_storage_makes_no_difference(a: np.ndarray, b: np.ndarray) -> None:
    swapped = (
        b.astype(b.dtype.newbyteorder()) if b.ndim == 0 else np.asfortranarray(b.astype(">i2"))
    )
    assert digest_arrays({"a": a, "b": b}) == digest_arrays({"b": swapped, "a": a.copy()})


@hypothesis.given(numbers, st.data())
def test_every_bit_makes_a_difference(a: np.ndarray, data: st.DataObject) -> None:
    before = digest_arrays({"a": a})
    raw = bytearray(a.tobytes())
    bit = data.draw(st.integers(0, len(raw) * 8 - 1))
    raw[bit // 8] ^= 1 << bit % 8
    assert digest_arrays({"a": np.frombuffer(bytes(raw), a.dtype).reshape(a.shape)}) != before


def test_names_types_and_shapes_count() -> None:
    a = np.arange(4, dtype=np.int32)
    variants = [{"a": a}, {"b": a}, {"a": a.reshape(2, 2)}, {"a": a.view(np.float32)}]
    variants += [{"a": a[:0]}, {"a": a[:0], "b": a[:0]}, {"a": np.int32(0)}, {"a": a[:1]}]
    digests = {digest_arrays(variant) for variant in variants}
    assert len(digests) == len(variants)


def test_strings_by_content_not_by_width() -> None:
    short, wide = np.array(["ann", "bo"]), np.array(["ann", "bo"], "<U20")
    assert digest_arrays({"s": short}) == digest_arrays({"s": wide})
    assert digest_arrays({"s": short}) != digest_arrays({"s": np.array(["an", "nbo"])})


def test_objects_are_refused() -> None:
    with pytest.raises(TypeError, match="bad: arrays of object"):
        digest_arrays({"bad": np.array([object()])})
