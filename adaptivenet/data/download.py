"""Fetch one address with bounded time and size; imported only when something is missing."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request

__all__ = ["FAILURES", "get"]

# What a mirror that does not work can raise; timeouts and TLS errors are OSErrors.
FAILURES = (OSError, http.client.HTTPException, ValueError)
_CHUNK = 1 << 16


def get(url: str, *, limit: int, timeout: float = 20.0, total: float = 600.0) -> bytes:
    """Return the body of an http(s) address; certificates are checked as the system does.

    Args:
        url: an https (or http) address.
        limit: largest number of bytes to accept.
        timeout: seconds to wait for the connection, and for each piece.
        total: seconds for the whole body.

    Returns:
        The bytes.

    Raises:
        ValueError: not an http(s) address, or the body is too long.
        OSError: no network, refused, not found, timed out or cut short.

    >>> get("ftp://example.org/a", limit=10)
    Traceback (most recent call last):
    ...
    ValueError: only https and http addresses can be fetched, not 'ftp://example.org/a'
    """
    if not url.startswith(("https://", "http://")):
        raise ValueError(f"only https and http addresses can be fetched, not {url!r}")
    request = urllib.request.Request(url, headers={"User-Agent": "adaptivenet"})
    deadline = time.monotonic() + total
    pieces: list[bytes] = []
    size = 0
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            announced = response.headers.get("Content-Length")
            while piece := response.read(_CHUNK):
                size += len(piece)
                if size > limit:
                    raise ValueError(f"more than the {limit} bytes expected")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not finished after {total:.0f} s")
                pieces.append(piece)
    except http.client.IncompleteRead as error:
        raise OSError(f"interrupted after {size + len(error.partial)} bytes") from None
    except urllib.error.HTTPError as error:
        error.close()
        raise OSError(f"HTTP {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise OSError(f"not reached: {error.reason}") from None
    if announced is not None and announced.isdigit() and size < int(announced):
        raise OSError(f"interrupted after {size} of {announced} bytes")
    return b"".join(pieces)
