"""Compare the content of a file with what is pinned, whatever its compression."""

from __future__ import annotations

import gzip
import io
import zipfile
import zlib

import numpy as np

from adaptivenet.data.digest import digest_arrays, digest_bytes
from adaptivenet.data.errors import CorruptDataError
from adaptivenet.data.idx import decode_idx, magic_number
from adaptivenet.data.registry import ENTRIES, File

__all__ = ["Content", "check"]

Content = bytes | dict[str, np.ndarray]


def check(file: File, raw: bytes, name: str) -> Content:
    """Uncompress one file and compare it with its pinned content.

    >>> pinned = File("a", "text", digest_bytes(b"hello"), 5)
    >>> check(pinned, gzip.compress(b"hello"), "a.gz")
    b'hello'
    >>> check(pinned, b"hello", "a")
    b'hello'
    """
    if file.kind == "npz":
        arrays = _read_npz(file, raw, name)
        found, content = digest_arrays(arrays), arrays
    else:
        content = _gunzip(raw, file.size, name) if raw[:2] == b"\x1f\x8b" else raw
        found = digest_bytes(content)
    if found == file.sha256:
        return content
    for other in ENTRIES.values():
        for twin in other.files:
            if twin.sha256 == found:
                raise CorruptDataError(
                    f"{name}: mislabelled: it holds the content of {twin.name} of {other.title}, "
                    f"expected that of {file.name}"
                )
    if isinstance(content, bytes):
        _explain_bytes(file, content, name)
        what = f"content differs (SHA-256 of the uncompressed {len(content)} bytes)"
    else:
        listing = ", ".join(f"{key} {a.dtype}{a.shape}" for key, a in sorted(content.items()))
        what = f"content differs (digest of the arrays; they are {listing})"
    raise CorruptDataError(f"{name}: {what}: expected {file.sha256}, found {found}")


def _explain_bytes(file: File, content: bytes, name: str) -> None:
    """Raise the most telling error for wrong content, if there is a better one than the digest."""
    if file.kind == "idx":
        array = decode_idx(content, name)
        if (array.shape, array.dtype) != (file.shape, np.uint8):
            raise CorruptDataError(
                f"{name}: mislabelled: magic 0x{magic_number(array.ndim, array.dtype):04x} and "
                f"shape {array.shape}, expected magic 0x{magic_number(len(file.shape)):04x} and "
                f"shape {file.shape}"
            )
    if len(content) != file.size:
        what = "truncated" if len(content) < file.size else "too long"
        raise CorruptDataError(f"{name}: {what}: expected {file.size} bytes, found {len(content)}")


def _gunzip(raw: bytes, size: int, name: str) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as stream:
            # One byte more than expected: enough to notice, and no bomb can fill the memory.
            content = stream.read(size + 1)
    except EOFError as error:
        raise CorruptDataError(
            f"{name}: truncated: the gzip stream ends after {len(raw)} bytes; expected one that "
            f"unpacks to {size} bytes"
        ) from error
    except (OSError, zlib.error) as error:
        raise CorruptDataError(f"{name}: corrupt gzip stream: {error}") from error
    if len(content) > size:
        raise CorruptDataError(f"{name}: too long: expected {size} bytes, found more")
    return content


def _read_npz(file: File, raw: bytes, name: str) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            total = sum(member.file_size for member in archive.infolist())
        # Each member is an array and a small header.
        if total > file.size + 65_536:
            raise CorruptDataError(
                f"{name}: too long: its arrays take {total} bytes, expected {file.size}"
            )
        with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except CorruptDataError:
        raise
    except Exception as error:  # damaged zips raise a dozen types, from zlib.error to SyntaxError
        reason = f"{type(error).__name__}: {error}"
        raise CorruptDataError(f"{name}: not a readable npz file ({reason})") from error
