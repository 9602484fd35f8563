"""Results files: what was measured comes back, and what was changed is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from research import results
from research.results import Outcome, ResultsError

OUTCOME = Outcome(
    {"gain": np.array([1 / 3, np.nan, 2e-9])}, {"curve": np.arange(6.0).reshape(3, 2) / 7}
)


def same(a: Outcome, b: Outcome) -> bool:
    return all(
        one.keys() == two.keys()
        and all(np.array_equal(one[name], two[name], equal_nan=True) for name in one)
        for one, two in zip(a, b, strict=True)
    )


def test_a_seeds_outcome_survives_its_file(tmp_path):
    OUTCOME.save(tmp_path / "3.npz")
    assert same(Outcome.load(tmp_path / "3.npz"), OUTCOME)
    assert [path.name for path in tmp_path.iterdir()] == ["3.npz"]
    assert OUTCOME.at(2).metrics["gain"].tolist() == [2e-9]


def test_a_rounded_outcome_survives_json():
    rounded = OUTCOME.rounded()
    assert rounded.metrics["gain"][0] == 0.333333
    assert same(Outcome.from_json(json.loads(json.dumps(rounded.to_json()))), rounded)


def test_a_sealed_file_is_read(tmp_path):
    path = results.write_results(tmp_path, {"study": "x", "numbers": (1.5, None), "deep": {"a": 1}})
    document = results.read_results(path)
    assert document["numbers"] == [1.5, None]
    assert "jax" in document["versions"]


@pytest.mark.parametrize("change", [("1.5", "1.6"), ('"x"', '"y"'), ("null", "0.5")])
def test_a_file_edited_by_hand_is_refused(tmp_path, change):
    path = results.write_results(tmp_path, {"study": "x", "numbers": [1.5, None]})
    path.write_text(path.read_text().replace(*change, 1))
    with pytest.raises(ResultsError, match="changed after the study wrote it"):
        results.read_results(path)


def test_layout_may_change_but_not_content(tmp_path):
    path = results.write_results(tmp_path, {"study": "x", "numbers": [1.5]})
    path.write_text(json.dumps(json.loads(path.read_text()), indent=4))
    assert results.read_results(path)["study"] == "x"


@pytest.mark.parametrize(
    ("text", "message"), [(None, "no such"), ("{", "no JSON"), ("{}", "no seal"), ("[]", "no seal")]
)
def test_what_is_no_results_file_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(ResultsError, match=message):
        results.read_results(tmp_path / "results.json")
