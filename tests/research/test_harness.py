"""The skeleton of a study, on a study that costs nothing."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from adaptivenet.emergence.verdict import Hypothesis, Preregistration
from research import study


@dataclasses.dataclass(frozen=True)
class Claims(Preregistration):
    h1: Hypothesis = Hypothesis(statement="The mean is above zero.", metric="gain")


@dataclasses.dataclass(frozen=True)
class Config(study.Config):
    claims: Claims = Claims()
    shift: float = 1.0


class Data:
    name, sha256 = "nothing", "0" * 64

    def __repr__(self):
        return "no data"


def draw(config, outcome):
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots()
    axis.plot(outcome.curves["curve"].T)
    return figure


def start(tmp_path, *words, stop_at=None):
    """Runs the study; returns the seeds it trained, and its results document."""
    trained = []

    def run(config, data, seeds, tick):
        if stop_at in seeds:
            raise KeyboardInterrupt
        trained.extend(seeds)
        tick("all", 1.0)
        noise = np.array([np.random.default_rng(seed).normal() for seed in seeds])
        return study.Outcome(
            {"gain": config.shift + 0.1 * noise}, {"curve": noise[:, None] * [1, 2]}
        )

    argv = ["--seeds", "10", "11", "12", "13", "14", "--chunk", "2", "--output", str(tmp_path)]
    study.main(Config, run, study.judge, draw, argv=[*argv, *words], load=lambda config: Data())
    (path,) = tmp_path.glob("*/*/results.json")
    return trained, study.read_results(path)


def test_it_runs_judges_draws_and_keeps(tmp_path, capsys):
    keep = tmp_path / "kept" / "copy.json"
    trained, document = start(tmp_path, "--keep", str(keep))
    assert trained == [10, 11, 12, 13, 14]
    assert document["verdict"] == {"h1": "SUPPORTED"}
    assert document["seeds"] == trained
    assert len(document["per_seed"]["gain"]) == 5
    assert str(tmp_path) not in json.dumps(document)
    (folder,) = tmp_path.glob("test_harness/*")
    assert {"config.yaml", "results.json", "figure.png", "figure.pdf"} <= {
        path.name for path in folder.iterdir()
    }
    assert study.read_results(keep) == document
    said = capsys.readouterr().out
    assert "h1: The mean is above zero. [gain greater than 0]" in said
    assert "SUPPORTED: The mean is above zero." in said


def test_no_figure_is_kept_open(tmp_path):
    import matplotlib.pyplot as plt

    start(tmp_path)
    assert plt.get_fignums() == []


def test_a_stopped_run_goes_on_where_it_stopped(tmp_path, capsys):
    with pytest.raises(SystemExit, match="Start the same command again"):
        start(tmp_path / "a", stop_at=13)
    trained, document = start(tmp_path / "a")
    assert trained == [12, 13, 14]
    assert "resumed: 2 of 5 seeds are finished" in capsys.readouterr().out
    spent = [float(path.read_text()) for path in tmp_path.glob("a/*/*/seeds/*.seconds")]
    assert len(spent) == 5
    assert document["seconds"] == pytest.approx(sum(spent), abs=0.1)  # of both starts
    whole = start(tmp_path / "b")[1]
    for part in (document, whole):
        del part["seconds"], part["seal"]
    assert document == whole


def test_another_machine_goes_on_with_the_seeds_beside_the_results(tmp_path):
    keep = tmp_path / "copy.json"
    words = ["--keep", str(keep)]
    with pytest.raises(SystemExit, match=r"copy\.seeds"):
        start(tmp_path / "one", *words, stop_at=13)
    assert start(tmp_path / "other", *words, "--shift", "2")[0] == [10, 11, 12, 13, 14]
    trained, document = start(tmp_path / "four", *words)
    assert trained == [12, 13, 14]
    assert not (tmp_path / "copy.seeds").exists()
    whole = start(tmp_path / "whole")[1]
    for part in (document, whole):
        del part["seconds"], part["seal"]
    assert document == whole


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--claims.pilot-seeds", "1", "12"], r"seeds \[12\] were looked at in the pilot"),
        (["--claims.h1.metric", ""], "claims.h1 has no primary metric"),
        (["--claims.h1.metric", "loss"], "names the metric 'loss', which the study does not"),
        (["--claims.exclusions", "gain below 3"], "cannot be read"),
    ],
)
def test_a_claim_that_cannot_be_judged_stops_the_study(tmp_path, words, message):
    with pytest.raises(SystemExit, match=message):
        start(tmp_path, *words)


def test_an_exploratory_run_says_so(tmp_path, capsys):
    start(tmp_path, "--claims.exploratory", "True", "--claims.pilot-seeds", "10")
    assert "exploratory: at this scale nothing above is a test" in capsys.readouterr().out


def test_changed_claims_are_another_run(tmp_path):
    start(tmp_path)
    config = Config(output=str(tmp_path))
    other = dataclasses.replace(config, claims=Claims(alpha=0.01))
    assert study.open_run("x", config)[1] != study.open_run("x", other)[1]
