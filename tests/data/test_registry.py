from __future__ import annotations

import re
from typing import get_args
from urllib.parse import urlsplit

import pytest

from adaptivenet.data import UnknownDatasetError, describe, load, loaders, names


def test_every_name_has_a_loader_and_the_other_way_round() -> None:
    assert set(names()) == set(loaders._BUILDERS)
    assert set(get_args(loaders._ArrayName)) < set(names())


@pytest.mark.parametrize("name", names())
def test_entries_are_complete(name: str) -> None:
    entry = describe(name)
    assert all((entry.title, entry.shape, entry.licence, entry.source, entry.reference))
    for file in entry.files:
        assert re.fullmatch("[0-9a-f]{64}", file.sha256)
        assert file.size > 0
    for mirror in entry.mirrors:
        assert urlsplit(mirror).scheme == "https"
    # What has files to find has either a mirror or words on how to make them.
    assert bool(entry.folder) == bool(entry.mirrors or entry.obtain)


def test_no_two_files_have_the_same_content() -> None:
    pins = [file.sha256 for name in names() for file in describe(name).files]
    assert len(pins) == len(set(pins))


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("minst", "mnist"), ("Fashion-MNIST", "fashion_mnist"), ("cifar10", "cifar10_jpeg")],
)
def test_unknown_names_get_the_nearest_and_the_list(wrong: str, near: str) -> None:
    with pytest.raises(UnknownDatasetError, match=f"did you mean '{near}'") as caught:
        load(wrong)
    assert all(name in str(caught.value) for name in names())


def test_a_name_near_to_none_gets_the_list_only() -> None:
    with pytest.raises(UnknownDatasetError) as caught:
        load("qqqqqq")
    assert "did you mean" not in str(caught.value)
