from __future__ import annotations

import pytest

from adaptivenet.data.download import FAILURES, get

from .conftest import Server


def test_bytes_arrive_whole(server: Server) -> None:
    server.pages["/a"] = bytes(range(256)) * 1000
    assert get(f"{server.url}/a", limit=256_000) == server.pages["/a"]


def test_limits_of_size_and_time(server: Server) -> None:
    server.pages["/a"] = bytes(100_000)
    with pytest.raises(ValueError, match="more than the 99999 bytes"):
        get(f"{server.url}/a", limit=99_999)
    with pytest.raises(TimeoutError, match="not finished after 0 s"):
        get(f"{server.url}/a", limit=100_000, total=0.0)


def test_a_silent_server_does_not_hang_us(server: Server) -> None:
    server.slow.add("/a")
    with pytest.raises(OSError, match="timed out"):
        get(f"{server.url}/a", limit=10, timeout=0.1)


def test_a_connection_cut_short_is_a_failure(server: Server) -> None:
    server.pages["/a"] = bytes(100_000)
    server.cut.add("/a")
    with pytest.raises(FAILURES):
        get(f"{server.url}/a", limit=100_000)


def test_missing_pages_give_the_code(server: Server) -> None:
    with pytest.raises(OSError, match="HTTP 404"):
        get(f"{server.url}/none", limit=10)


@pytest.mark.parametrize("url", ["file:///tmp/a", "ftp://127.0.0.1/a", "a", ""])
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="only https and http"):
        get(url, limit=10)
