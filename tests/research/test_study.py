"""The shared skeleton: run folders, intervals, results, tables."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from scipy import stats

from research import study


@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 0.1
    output: str = "runs"


def test_the_run_folder_depends_on_values_and_not_on_its_root(tmp_path):
    one, first = study.open_run("job", Config(output=str(tmp_path / "a")))
    two, second = study.open_run("job", Config(output=str(tmp_path / "b")))
    _, third = study.open_run("job", Config(rate=0.2, output=str(tmp_path / "a")))
    assert first == second != third
    assert one.name == two.name == first
    assert (one / "config.yaml").exists()


def test_the_interval_is_students():
    values = np.array([97.8, 98.1, 98.0, 97.9])
    got = study.mean_interval(values)
    low, high = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    assert got["n"] == 4
    assert got["mean"] == pytest.approx(values.mean())
    assert (got["ci_low"], got["ci_high"]) == (pytest.approx(low), pytest.approx(high))


def test_one_seed_has_no_interval():
    assert study.mean_interval([3.0]) == {"mean": 3.0, "ci_low": None, "ci_high": None, "n": 1}


def test_results_name_versions_and_device_and_refuse_nan(tmp_path):
    document = json.loads(study.write_results(tmp_path, {"study": "job"}).read_text())
    assert {"jax", "flax", "optax"} <= set(document["versions"])
    assert "cores" in document["device"]
    with pytest.raises(ValueError, match="JSON"):
        study.write_results(tmp_path, {"loss": float("nan")})


def test_a_table_is_not_cut_to_the_width_of_a_pipe(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    study.print_table("title", ["model", "accuracy"], [["a" * 30, "98.00 ± 0.07"]])
    printed = capsys.readouterr().out
    assert "a" * 30 in printed
    assert "98.00 ± 0.07" in printed
