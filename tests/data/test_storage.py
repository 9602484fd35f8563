from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from adaptivenet.data import (
    CorruptDataError,
    DataError,
    DownloadError,
    MissingDataError,
    cache_folder,
    fetch,
    locate,
    verify,
)
from adaptivenet.data import download as download_module
from adaptivenet.data.registry import Entry
from adaptivenet.data.storage import read, write_atomic

from .conftest import CONTENT, Server, place


def everything_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_order_of_the_places(
    toy: Entry, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = toy.files[0]
    assert locate("toy") == {"images": None, "labels": None}
    packed = gzip.compress(CONTENT["images"])
    place(cache_folder(), images=packed)
    assert locate("toy")["images"] == cache_folder() / "toy" / "images.gz"
    monkeypatch.setenv("ADAPTIVENET_DATA", str(good))
    assert locate("toy")["images"] == good / "toy" / "images.gz"
    own = place(tmp_path / "own", images=packed)
    assert locate("toy", folder=own)["images"] == own / "toy" / "images.gz"
    assert locate("toy", folder=own)["labels"] == good / "toy" / "labels.gz"
    assert read(toy, images, folder=own) == CONTENT["images"]


def test_cache_folder_follows_the_variables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("ADAPTIVENET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "adaptivenet"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "adaptivenet"


def test_unpacked_files_are_found_too(toy: Entry, tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    for name, content in CONTENT.items():
        (tmp_path / "toy" / name).write_bytes(content)
    assert verify("toy", folder=tmp_path) == [tmp_path / "toy" / name for name in CONTENT]


def test_a_data_variable_that_is_no_folder_is_an_error(
    toy: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTIVENET_DATA", "no/such/folder")
    with pytest.raises(DataError, match="'no/such/folder', which is not a folder"):
        verify("toy")


def test_nothing_anywhere_names_places_command_and_variable(toy: Entry, tmp_path: Path) -> None:
    with pytest.raises(MissingDataError) as caught:
        read(toy, toy.files[0], folder=tmp_path / "own", download=False)
    message = str(caught.value)
    for part in (
        "the file toy/images.gz was not found",
        f"looked in {tmp_path / 'own'}",
        f"looked in {cache_folder()} (cache)",
        "ADAPTIVENET_DATA is not set",
        "python -m adaptivenet.data fetch toy",
        "export ADAPTIVENET_DATA=<folder that holds toy/>",
    ):
        assert part in message


def test_no_network_is_reported_with_the_command(toy: Entry) -> None:
    with pytest.raises(DownloadError) as caught:
        # Port 9 of this machine: nobody listens.
        read(toy, toy.files[0], mirrors=["http://127.0.0.1:9/toy", "http://127.0.0.1:9/b"])
    message = str(caught.value)
    assert "python -m adaptivenet.data fetch toy" in message
    assert "http://127.0.0.1:9/toy/images.gz" in message
    assert "http://127.0.0.1:9/b/images.gz" in message
    assert "nothing was kept" in message
    assert everything_below(cache_folder().parent) == []


def test_sets_without_mirror_say_how_to_make_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("ADAPTIVENET_DATA", raising=False)
    with pytest.raises(MissingDataError, match=r"no public mirror\. To make it: lay the JPEG"):
        fetch("cifar10_jpeg")


def test_download_verifies_caches_and_is_then_offline(toy: Entry, toy_server: Server) -> None:
    mirrors = [f"{toy_server.url}/toy"]
    for file in toy.files:
        assert read(toy, file, mirrors=mirrors) == CONTENT[file.name]
    assert everything_below(cache_folder()) == ["images.gz", "labels.gz"]
    asked = len(toy_server.asked)
    assert read(toy, toy.files[0], mirrors=mirrors) == CONTENT["images"]
    assert len(toy_server.asked) == asked
    assert verify("toy") == [cache_folder() / "toy" / f"{name}.gz" for name in CONTENT]


def test_download_goes_to_the_folder_the_user_names(
    toy: Entry, toy_server: Server, tmp_path: Path
) -> None:
    fetch("toy", folder=tmp_path / "own", mirrors=[f"{toy_server.url}/toy"])
    assert everything_below(tmp_path / "own") == ["images.gz", "labels.gz"]
    assert not cache_folder().exists()


def test_uncompressed_mirrors_serve_as_well(toy: Entry, server: Server) -> None:
    server.pages["/images.gz"] = CONTENT["images"]
    assert read(toy, toy.files[0], mirrors=[server.url]) == CONTENT["images"]
    assert gzip.decompress((cache_folder() / "toy" / "images.gz").read_bytes()) == CONTENT["images"]


@pytest.mark.parametrize("fault", ["interrupted", "other content", "page", "missing", "too long"])
def test_a_bad_mirror_is_passed_over_and_alone_leaves_nothing(
    toy: Entry, toy_server: Server, fault: str
) -> None:
    path = "/bad/images.gz"
    if fault == "interrupted":
        toy_server.pages[path] = toy_server.pages["/toy/images.gz"]
        toy_server.cut.add(path)
    elif fault == "other content":
        toy_server.pages[path] = gzip.compress(CONTENT["labels"])
    elif fault == "page":
        toy_server.pages[path] = b"<html>Sign in to continue</html>"
    elif fault == "too long":
        toy_server.pages[path] = bytes(3_000_000)
    with pytest.raises(DownloadError) as caught:
        read(toy, toy.files[0], mirrors=[f"{toy_server.url}/bad"])
    reasons = {
        "interrupted": "interrupted after ",
        "other content": "holds the content of labels of Toy",
        "page": "not an idx file",
        "missing": "HTTP 404",
        "too long": "more than the",
    }
    assert f"{toy_server.url}{path}" in str(caught.value)
    assert reasons[fault] in str(caught.value)
    assert everything_below(cache_folder().parent) == []
    content = read(toy, toy.files[0], mirrors=[f"{toy_server.url}/bad", f"{toy_server.url}/toy"])
    assert content == CONTENT["images"]


def test_interrupting_the_user_s_way_leaves_nothing(
    toy: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(download_module, "get", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("toy", mirrors=["https://example.invalid"])
    assert everything_below(cache_folder().parent) == []


def test_a_write_that_fails_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomic(tmp_path / "a", b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot be written: No space left .* ADAPTIVENET_CACHE"):
        write_atomic(tmp_path / "a", b"new")
    assert everything_below(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_folder_that_cannot_be_made_is_named(toy: Entry, toy_server: Server) -> None:
    cache_folder().write_bytes(b"a file where the folder should be")
    with pytest.raises(DataError, match="cannot be written"):
        fetch("toy", mirrors=[f"{toy_server.url}/toy"])


def test_corrupt_data_folder_is_an_error_not_a_download(
    toy: Entry, good: Path, toy_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTIVENET_DATA", str(good))
    damaged = good / "toy" / "images.gz"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    before = damaged.read_bytes()
    mirrors = [f"{toy_server.url}/toy"]
    for attempt in (
        lambda: read(toy, toy.files[0], mirrors=mirrors),
        lambda: fetch("toy", mirrors=mirrors),
        lambda: verify("toy"),
    ):
        with pytest.raises(CorruptDataError) as caught:
            attempt()
        message = str(caught.value)
        assert message.startswith(f"{damaged}: truncated")
        assert f"python -m adaptivenet.data fetch toy --folder {good}" in message
    assert toy_server.asked == []
    assert damaged.read_bytes() == before
    # The command of the message does repair it.
    assert fetch("toy", folder=good, mirrors=mirrors) == [good / "toy" / f"{n}.gz" for n in CONTENT]
    assert toy_server.asked == ["/toy/images.gz"]
    assert len(verify("toy")) == 2


def test_corrupt_cache_is_an_error_and_fetch_replaces_it(toy: Entry, toy_server: Server) -> None:
    place(cache_folder(), images=gzip.compress(CONTENT["labels"]))
    with pytest.raises(CorruptDataError, match="mislabelled"):
        read(toy, toy.files[0], mirrors=[f"{toy_server.url}/toy"])
    said: list[str] = []
    fetch("toy", mirrors=[f"{toy_server.url}/toy"], report=said.append)
    assert said[0].startswith("replacing a corrupt file: ")
    assert len(verify("toy")) == 2


def test_a_failed_replacement_keeps_the_file(toy: Entry, tmp_path: Path) -> None:
    place(tmp_path / "own", images=b"damaged")
    with pytest.raises(DownloadError):
        fetch("toy", folder=tmp_path / "own", mirrors=["http://127.0.0.1:9"])
    assert (tmp_path / "own" / "toy" / "images.gz").read_bytes() == b"damaged"


def test_fetch_keeps_what_verifies(toy: Entry, good: Path, toy_server: Server) -> None:
    said: list[str] = []
    paths = fetch("toy", folder=good, mirrors=[f"{toy_server.url}/toy"], report=said.append)
    assert len(paths) == 2
    assert all(line.startswith("present and verified") for line in said)
    assert toy_server.asked == []
