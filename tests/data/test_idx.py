from __future__ import annotations

import hypothesis
import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import strategies as st

from adaptivenet.data import CorruptDataError, decode_idx, encode_idx
from adaptivenet.data.idx import magic_number

TYPES = ["uint8", "int8", "int16", "int32", "float32", "float64"]
any_array = st.sampled_from(TYPES).flatmap(
    lambda dtype: arrays.arrays(
        np.dtype(dtype), arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    )
)


@hypothesis.given(any_array)
def test_what_is_written_is_read(array: np.ndarray) -> None:
    read = decode_idx(encode_idx(array))
    assert read.dtype == array.dtype
    assert read.shape == array.shape
    assert read.tobytes() == array.tobytes()  # bit for bit, nan and -0.0 too


@hypothesis.given(any_array, st.data())
def test_every_shortened_file_is_refused(array: np.ndarray, data: st.DataObject) -> None:
    content = encode_idx(array)
    cut = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises(CorruptDataError, match=r"^some\.idx: truncated"):
        decode_idx(content[:cut], "some.idx")


def test_published_headers() -> None:
    images = encode_idx(np.zeros((2, 28, 28), np.uint8))
    assert images[:16].hex() == "00000803000000020000001c0000001c"
    assert magic_number(3) == 0x803
    assert magic_number(1) == 0x801
    assert encode_idx(np.array([-2], ">i2")) == encode_idx(np.array([-2], "<i2"))
    assert encode_idx(np.array([-2], np.int16))[-2:] == b"\xff\xfe"


def test_result_cannot_be_written() -> None:
    for dtype in (np.uint8, np.int32):
        with pytest.raises(ValueError, match="read-only"):
            decode_idx(encode_idx(np.zeros(2, dtype)))[0] = 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04" + bytes(20), "not an idx file"),
        (bytes.fromhex("00000a01") + bytes(20), "element type 0x0a is unknown; expected 0x08"),
        (encode_idx(np.zeros(3, np.uint8)) + b"x", "too long: .* 11 bytes in all, but .* 12"),
        (bytes.fromhex("00000803ffffffffffffffffffffffff"), "truncated"),
    ],
)
def test_wrong_files_say_what_was_found(content: bytes, message: str) -> None:
    with pytest.raises(CorruptDataError, match=f"^name: .*{message}"):
        decode_idx(content, "name")


def test_types_without_a_code_are_refused() -> None:
    with pytest.raises(TypeError, match="no code for int64; it can hold uint8"):
        encode_idx(np.zeros(2, np.int64))
