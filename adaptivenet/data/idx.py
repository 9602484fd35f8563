"""The idx format of MNIST: a magic number, big-endian dimensions, then the raw array."""

from __future__ import annotations

import math
import struct

import numpy as np

from adaptivenet.data.errors import CorruptDataError

__all__ = ["decode_idx", "encode_idx"]

_CODES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_BY_TYPE = {np.dtype(text).newbyteorder("="): code for code, text in _CODES.items()}


def magic_number(ndim: int, dtype: np.typing.DTypeLike = np.uint8) -> int:
    """Return the idx magic number of an array.

    Args:
        ndim: number of dimensions, 0 to 255.
        dtype: element type: uint8, int8, int16, int32, float32 or float64.

    Returns:
        0x0803 for uint8 images [n, rows, columns], 0x0801 for uint8 labels [n].

    >>> hex(magic_number(3))
    '0x803'
    """
    return (_BY_TYPE[np.dtype(dtype).newbyteorder("=")] << 8) | ndim


def encode_idx(array: np.ndarray) -> bytes:
    """Write an array as the bytes of an idx file.

    Args:
        array: any shape of at most 255 dimensions; uint8, int8, int16, int32, float32 or float64.

    Returns:
        The uncompressed bytes.

    Raises:
        TypeError: the format has no code for the element type.

    References:
        Y. LeCun, C. Cortes, C. Burges, "The MNIST database", 1998 (section "File formats").

    >>> encode_idx(np.array([5, 0, 4], np.uint8)).hex()
    '0000080100000003050004'
    """
    code = _BY_TYPE.get(array.dtype.newbyteorder("="))
    if code is None:
        known = ", ".join(str(dtype) for dtype in _BY_TYPE)
        raise TypeError(f"idx has no code for {array.dtype}; it can hold {known}")
    header = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    return header + array.astype(_CODES[code]).tobytes()


def decode_idx(content: bytes, name: str = "idx") -> np.ndarray:
    """Read the bytes of an idx file.

    Args:
        content: the whole file, uncompressed.
        name: what to call the file in errors.

    Returns:
        The array, in the machine's byte order, read-only.

    Raises:
        CorruptDataError: wrong magic number, or fewer or more bytes than the header announces.

    References:
        Y. LeCun, C. Cortes, C. Burges, "The MNIST database", 1998 (section "File formats").

    >>> decode_idx(bytes.fromhex("0000080100000003050004"))
    array([5, 0, 4], dtype=uint8)
    """
    if len(content) < 4:
        raise CorruptDataError(
            f"{name}: truncated: {len(content)} bytes, an idx header takes 4 or more"
        )
    zero, code, ndim = struct.unpack(">HBB", content[:4])
    if zero != 0:
        raise CorruptDataError(
            f"{name}: not an idx file (the first two bytes are 0x{zero:04x}, 0x0000 expected)"
        )
    if code not in _CODES:
        known = ", ".join(f"0x{known:02x}" for known in _CODES)
        raise CorruptDataError(
            f"{name}: idx element type 0x{code:02x} is unknown; expected {known}"
        )
    start = 4 + 4 * ndim
    if len(content) < start:
        raise CorruptDataError(
            f"{name}: truncated: {len(content)} bytes, "
            f"the header of {ndim} dimensions takes {start}"
        )
    shape = struct.unpack(f">{ndim}I", content[4:start])
    dtype = np.dtype(_CODES[code])
    expected = start + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        what = "truncated" if len(content) < expected else "too long"
        raise CorruptDataError(
            f"{name}: {what}: the header announces shape {shape} of {dtype.name}, "
            f"{expected} bytes in all, but the file holds {len(content)}"
        )
    array = np.frombuffer(content, dtype, offset=start).reshape(shape)
    array = array.astype(dtype.newbyteorder("="), copy=False)
    array.flags.writeable = False
    return array
