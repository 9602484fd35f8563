"""A small data set of known content, and a web server that misbehaves as told."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from adaptivenet.data import digest_bytes, encode_idx
from adaptivenet.data.registry import ENTRIES, Entry, File

IMAGES = (np.arange(5 * 3 * 3) % 251).astype(np.uint8).reshape(5, 3, 3)
LABELS = np.array([0, 1, 2, 1, 0], np.uint8)
CONTENT = {"images": encode_idx(IMAGES), "labels": encode_idx(LABELS)}


@pytest.fixture(autouse=True)
def quiet_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reads or writes the user's cache, and the server is reached without a proxy."""
    monkeypatch.setenv("ADAPTIVENET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Entry:
    """A data set of two small idx files, entered in the table; ADAPTIVENET_DATA is unset."""
    monkeypatch.delenv("ADAPTIVENET_DATA", raising=False)
    shapes = {"images": IMAGES.shape, "labels": LABELS.shape}
    entry = Entry(
        name="toy",
        title="Toy",
        shape="5 images",
        licence="CC0",
        source="this test",
        reference="none",
        folder="toy",
        files=tuple(
            File(name, "idx", digest_bytes(content), len(content), shapes[name])
            for name, content in CONTENT.items()
        ),
        mirrors=("https://example.invalid/toy",),
    )
    monkeypatch.setitem(ENTRIES, "toy", entry)
    return entry


def place(root: Path, **files: bytes) -> Path:
    """Write the files of the toy set (gzipped, as given) under a data folder."""
    (root / "toy").mkdir(parents=True, exist_ok=True)
    for name, raw in files.items():
        (root / "toy" / f"{name}.gz").write_bytes(raw)
    return root


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A data folder with the right toy files."""
    packed = {name: gzip.compress(content) for name, content in CONTENT.items()}
    return place(tmp_path / "good", **packed)


class Server:
    """Serves `pages`; a path in `cut` loses its second half, one in `slow` keeps silent."""

    def __init__(self) -> None:
        self.pages: dict[str, bytes] = {}
        self.cut: set[str] = set()
        self.slow: set[str] = set()
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                if self.path in outer.slow:
                    time.sleep(1.0)
                    return
                page = outer.pages.get(self.path)
                if page is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(page)))
                self.end_headers()
                self.wfile.write(page[: len(page) // 2] if self.path in outer.cut else page)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


@pytest.fixture
def toy_server(server: Server) -> Server:
    """A server with the right toy files under /toy."""
    for name, content in CONTENT.items():
        server.pages[f"/toy/{name}.gz"] = gzip.compress(content)
    return server
