"""Input checks that all statistics share, and the message of a missing extra."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from adaptivenet.emergence import statistics
from adaptivenet.emergence._extras import MissingExtra, require
from adaptivenet.emergence.statistics._values import as_numbers, subsample

BAD = [1.0, np.nan, 3.0, np.inf, 5.0, 6.0]


@pytest.mark.parametrize(
    "use",
    [
        statistics.dip,
        statistics.mixture,
        statistics.modes,
        statistics.bca,
        statistics.student,
        statistics.paired,
        lambda values: statistics.paired([1.0] * 6, values),
        lambda values: statistics.equivalence(values, low=-1, high=1),
        statistics.holm,
        lambda values: statistics.page_trend([values, values]),
        lambda values: statistics.kaplan_meier(values, [True] * 6),
        lambda values: statistics.log_rank(values, [True] * 6, list("aaabbb")),
        lambda values: statistics.hazard([0, 1, 0, 1, 0, 1], {"x": values}),
    ],
)
def test_values_that_are_missing_are_counted_and_never_dropped(use):
    with pytest.raises(ValueError, match=r"holds \d+ values of \d+ that are nan or infinite"):
        use(BAD)


def test_the_shape_is_checked():
    with pytest.raises(ValueError, match=r"x must have 1 axes, got shape \(2, 2\)"):
        as_numbers(np.ones((2, 2)), "x")
    with pytest.raises(ValueError, match="x holds 1 values; at least 2 are needed"):
        as_numbers([1.0], "x", least=2)


def test_a_subsample_is_seeded_in_order_and_without_repeats():
    values = np.arange(1000)
    drawn = subsample(values, 100, seed=3)
    assert len(set(drawn.tolist())) == 100
    assert np.all(np.diff(drawn) > 0)
    assert np.array_equal(drawn, subsample(values, 100, seed=3))
    assert not np.array_equal(drawn, subsample(values, 100, seed=4))
    assert subsample(values, 1000, seed=3) is values
    with pytest.raises(ValueError, match="maximum must be at least 1"):
        subsample(values, 0, seed=0)


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "diptest", None)
    with pytest.raises(MissingExtra, match=r"needs diptest.*pip install 'adaptivenet\[research\]'"):
        statistics.dip([1.0, 2.0, 3.0, 4.0])
    with pytest.raises(ImportError, match=r"needs no_such_library.*adaptivenet\[bayes\]"):
        require("no_such_library.part", extra="bayes")
