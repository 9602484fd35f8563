"""The JSONL tracker: exact numbers, valid JSON, and what a killed process leaves."""

from __future__ import annotations

import json
import math

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from adaptivenet.training import JsonlTracker, Tracker, read_jsonl


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def lines(path):
    return [(r["name"], r["epoch"]) for r in read_jsonl(path)]


def test_is_a_tracker(path):
    assert isinstance(JsonlTracker(path), Tracker)


@given(values=st.lists(st.floats(width=32), max_size=5), scalar=st.floats())
def test_numbers_come_back_exactly(tmp_path_factory, values, scalar):
    path = tmp_path_factory.mktemp("tracking") / "metrics.jsonl"
    array = np.asarray(values, np.float32)
    with_jax = jnp.asarray(array)
    tracker = JsonlTracker(path)
    tracker.log({"array": array, "jax": with_jax, "scalar": scalar, "nested": [{"x": scalar}]})
    tracker.close()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    (record,) = read_jsonl(path)
    np.testing.assert_array_equal(np.asarray(record["array"], np.float32), array)
    np.testing.assert_array_equal(np.asarray(record["jax"], np.float32), with_jax)
    np.testing.assert_array_equal(record["scalar"], scalar)
    np.testing.assert_array_equal(record["nested"][0]["x"], scalar)


def test_every_type_is_written(path):
    tracker = JsonlTracker(path)
    tracker.log(
        {
            "name": "dense",
            "none": None,
            "bool": np.bool_(True),
            "int": jnp.int32(3),
            "bfloat16": jnp.asarray([0.5, jnp.inf], jnp.bfloat16),
            "nan": np.float32("nan"),
            "minus": -math.inf,
        }
    )
    tracker.close()
    assert json.loads(path.read_text()) == {
        "name": "dense",
        "none": None,
        "bool": True,
        "int": 3,
        "bfloat16": [0.5, "Infinity"],
        "nan": "NaN",
        "minus": "-Infinity",
    }


def test_lines_are_on_disk_at_once(path):
    tracker = JsonlTracker(path)
    for epoch in range(3):
        tracker.log({"name": "a", "epoch": epoch})
        assert lines(path) == [("a", e) for e in range(epoch + 1)]
    tracker.close()


def test_resume_drops_only_what_comes_again(path):
    tracker = JsonlTracker(path)
    for name in ("dense", "pruned"):
        for epoch in range(4):
            tracker.log({"name": name, "epoch": epoch})
    tracker.log({"name": "pruned", "note": "no epoch"})
    tracker.resume("pruned", 2)
    tracker.log({"name": "pruned", "epoch": 2})
    tracker.close()
    records = read_jsonl(path)
    assert [(r["name"], r.get("epoch")) for r in records] == [
        *(("dense", epoch) for epoch in range(4)),
        ("pruned", 0),
        ("pruned", 1),
        ("pruned", None),
        ("pruned", 2),
    ]
    assert [item.name for item in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_torn_line_is_dropped_and_the_rest_goes_on(path):
    path.parent.mkdir()
    path.write_bytes(b'{"name": "a", "epoch": 0}\n{"name": "a", "epoch": 1, "loss": 0.\xc3')
    assert lines(path) == [("a", 0)]
    tracker = JsonlTracker(path)
    tracker.log({"name": "a", "epoch": 1})
    tracker.close()
    assert path.read_text() == '{"name": "a", "epoch": 0}\n{"name": "a", "epoch": 1}\n'


def test_a_new_tracker_continues_the_file(path):
    for epoch in range(2):
        tracker = JsonlTracker(path)
        tracker.log({"name": "a", "epoch": epoch})
        tracker.close()
        tracker.close()
    assert lines(path) == [("a", 0), ("a", 1)]


@pytest.mark.parametrize(("text", "message"), [("{}\n{x\n", "line 2: not"), ("[]\n", "not a")])
def test_damage_is_named_and_nothing_is_lost(path, text, message):
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_jsonl(path)
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        JsonlTracker(path).log({})
    assert path.read_text() == text


def test_resume_without_a_file_is_fine(path):
    JsonlTracker(path).resume("a", 0)
    with pytest.raises(FileNotFoundError):
        read_jsonl(path)
