"""The file: a parameter tree as bytes, zeros not stored.

Each leaf is written in the smaller of two encodings: all its values ("dense"), or one bit an
element and the values whose bits are not all zero ("bitmask"). What is read back is identical bit
for bit.
Layout: ``ADNT``, version (1 byte), length of the header (4 bytes, little endian), header (JSON:
path, shape, dtype, encoding of each leaf), payload, CRC-32 of all that (4 bytes).
"""

from __future__ import annotations

import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet import trees

PyTree = Any

__all__ = ["PackError", "load_packed", "pack", "save_packed", "unpack"]

_MAGIC = b"ADNT\x01"


class PackError(ValueError):
    """A packed file cannot be read; the message says what is wrong with it.

    >>> issubclass(PackError, ValueError)
    True
    """


def pack(params: PyTree, *, zeros: bool = False) -> bytes:
    """Packs a tree of arrays into bytes.

    Args:
      params: pytree of dicts (with string keys that hold no ``/``), lists or tuples of arrays.
      zeros: store zeros too: the size of the dense network in the same container.

    Returns:
      The file's bytes.

    Raises:
      PackError: two leaves have one path.

    >>> w = {"w": jnp.zeros(1000).at[3].set(1.5)}
    >>> len(pack(w)) < len(pack(w, zeros=True)) // 15
    True
    """
    names = trees.paths(params)
    if len(set(names)) != len(names):
        raise PackError(f"two leaves of the tree have one path: {sorted(names)}.")
    header, payload = [], []
    for name, leaf in zip(names, jax.tree.leaves(params), strict=True):
        array = np.asarray(leaf)
        raw = np.ascontiguousarray(array).reshape(-1)
        # By bits, so that -0.0 comes back as -0.0.
        octets = raw.view(np.uint8).reshape(raw.size, raw.itemsize)
        stored = octets.any(axis=1)
        sparse = np.packbits(stored).tobytes() + raw[stored].tobytes()
        use_mask = not zeros and len(sparse) < raw.nbytes
        payload.append(sparse if use_mask else raw.tobytes())
        encoding = "bitmask" if use_mask else "dense"
        header.append([name, list(array.shape), array.dtype.name, encoding, int(stored.sum())])
    text = json.dumps(header, separators=(",", ":")).encode()
    body = _MAGIC + len(text).to_bytes(4, "little") + text + b"".join(payload)
    return body + zlib.crc32(body).to_bytes(4, "little")


def unpack(content: bytes) -> dict[str, Any]:
    """Reads packed bytes back.

    Args:
      content: what :func:`pack` returned.

    Returns:
      Nested dict of numpy arrays, by the parts of the leaves' paths (lists become dicts of their
      positions).

    Raises:
      PackError: the bytes are damaged or of another format.

    >>> unpack(pack({"a": {"b": jnp.array([0.0, -0.0, 2.0])}}))["a"]["b"]
    array([ 0., -0.,  2.], dtype=float32)
    """
    if content[:5] != _MAGIC:
        raise PackError("this is not a packed network of version 1 (its first bytes differ).")
    body, check = content[:-4], int.from_bytes(content[-4:], "little")
    if len(content) < 13 or zlib.crc32(body) != check:
        raise PackError("the packed network is damaged or cut short (its checksum differs).")
    length = int.from_bytes(body[5:9], "little")
    header, rest = json.loads(body[9 : 9 + length]), memoryview(body)[9 + length :]
    tree: dict[str, Any] = {}
    for name, shape, dtype_name, encoding, stored in header:
        dtype, size = jnp.dtype(dtype_name), math.prod(shape)
        if encoding == "bitmask":
            bits = np.frombuffer(rest[: (size + 7) // 8], np.uint8)
            rest = rest[(size + 7) // 8 :]
            raw = np.zeros(size, dtype)
            kept = np.unpackbits(bits, count=size).astype(bool)
            raw[kept] = np.frombuffer(rest[: stored * dtype.itemsize], dtype)
            rest = rest[stored * dtype.itemsize :]
        else:
            raw = np.frombuffer(rest[: size * dtype.itemsize], dtype).copy()
            rest = rest[size * dtype.itemsize :]
        node = tree
        *parents, last = name.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = raw.reshape(shape)
    return tree


def save_packed(path: str | os.PathLike[str], params: PyTree, *, zeros: bool = False) -> int:
    """Writes a packed network and reads it back to be sure.

    Args:
      path: the file, replaced atomically.
      params: as for :func:`pack`.
      zeros: as for :func:`pack`.

    Returns:
      The bytes of the file on disk.

    Raises:
      PackError: what was read back differs from what was written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_packed(Path(folder) / "net.adnt", {"w": jnp.zeros(80)})
    57
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(pack(params, zeros=zeros))
    back = unpack(beside.read_bytes())
    flat = dict(zip(trees.paths(back), jax.tree.leaves(back), strict=True))
    for name, leaf in zip(trees.paths(params), jax.tree.leaves(params), strict=True):
        if flat[name].tobytes() != np.ascontiguousarray(leaf).tobytes():
            raise PackError(f"leaf {name!r} read back from {path} differs from what was written.")
    size = beside.stat().st_size
    beside.replace(path)
    return size


def load_packed(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a packed network from a file.

    Args:
      path: the file.

    Returns:
      As :func:`unpack`.

    Raises:
      PackError: the file is damaged; the message names it.
      FileNotFoundError: there is no such file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_packed(Path(folder) / "net.adnt", {"w": jnp.ones(2)})
    ...     load_packed(Path(folder) / "net.adnt")
    {'w': array([1., 1.], dtype=float32)}
    """
    try:
        return unpack(Path(path).read_bytes())
    except PackError as error:
        raise PackError(f"{path}: {error}") from None
