"""Fingerprints of arrays that do not depend on how a file was compressed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

__all__ = ["digest_arrays", "digest_bytes"]


def digest_bytes(content: bytes) -> str:
    """Return the SHA-256 of some bytes, in hexadecimal.

    Args:
        content: the uncompressed bytes.

    Returns:
        64 hexadecimal digits.

    >>> digest_bytes(b"")[:16]
    'e3b0c44298fc1c14'
    """
    return hashlib.sha256(content).hexdigest()


def digest_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """Return a SHA-256 of named arrays: names, element types, shapes and values.

    The order of the names, the memory layout, the byte order of the machine and the compression
    of the file they came from make no difference; a changed name, type, shape or bit does.

    Args:
        arrays: name -> array of numbers, bools or strings, any shapes.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: an array holds Python objects.

    >>> a, b = np.arange(3, dtype=np.int32), np.ones((2, 2), np.float32)
    >>> digest_arrays({"a": a, "b": b}) == digest_arrays({"b": b.T, "a": a.astype(">i4")})
    True
    >>> digest_arrays({"a": a}) == digest_arrays({"a": a.astype(np.int64)})
    False
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        if array.dtype.kind in "US":
            # The width of numpy's string type is storage, not content.
            kind = "str"
            texts = [str(text).encode() for text in array.ravel()]
            content = b"".join(len(text).to_bytes(8, "little") + text for text in texts)
        elif array.dtype.kind in "biufc":
            array = array.astype(array.dtype.newbyteorder("<"), copy=False)
            kind, content = array.dtype.str, array.tobytes(order="C")
        else:
            raise TypeError(f"{name}: arrays of {array.dtype} have no fingerprint")
        shape = "x".join(map(str, array.shape))
        digest.update(f"{name}\0{kind}\0{shape}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
