"""The benchmarks' shared timer: turns, ratios and results files. No time is asserted."""

from __future__ import annotations

import json
import math

import jax.numpy as jnp
import pytest

from research.benchmarks._timing import Timings, interleaved, write_results


def test_candidates_take_turns_in_rotation():
    calls = []
    names = ("a", "b", "c")
    timings = interleaved(
        {name: lambda n=name: (calls.append(n), jnp.ones(2))[1] for name in names},
        repeats=3,
        warmup=1,
    )
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(timings.seconds[name]) for name in names} == {"a": 3, "b": 3, "c": 3}
    assert all(value > 0 for values in timings.seconds.values() for value in values)


def test_ratios_by_hand():
    timings = Timings({"slow": [4.0, 9.0, 6.0], "fast": [2.0, 3.0, 1.0]})
    assert timings.min("slow") == 4
    assert timings.median("slow") == 6
    assert timings.ratio("slow", "fast") == 4
    assert timings.paired_ratio("slow", "fast") == 3
    assert timings.summary("fast")["slow"] == {
        "min_seconds": 4,
        "median_seconds": 6,
        "ratio": 4,
        "paired_ratio": 3,
        "repeats": 3,
    }
    lines = timings.table("fast", "title").splitlines()
    assert lines[0] == "title"
    assert lines[2].split() == ["slow", "4000.000", "6000.000", "4.000", "3.000"]


def test_results_hold_the_environment(tmp_path, capsys):
    path = write_results("name", {"ratio": 1.5}, tmp_path)
    document = json.loads(path.read_text())
    assert document["benchmark"] == "name"
    assert document["ratio"] == 1.5
    assert document["environment"]["versions"]["jax"]
    assert document["environment"]["device"]["platform"] == "cpu"
    assert document["environment"]["cores"] >= 1
    assert [item.name for item in tmp_path.iterdir()] == ["name.json"]
    with pytest.raises(ValueError, match="JSON"):
        write_results("name", {"ratio": math.nan}, tmp_path)


def test_nothing_to_time():
    with pytest.raises(ValueError, match="candidate"):
        interleaved({})
    with pytest.raises(ValueError, match="repeat"):
        interleaved({"a": lambda: 1}, repeats=0)
