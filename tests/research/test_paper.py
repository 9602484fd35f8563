"""The paper's numbers: a wrong one is put in, and caught."""

from __future__ import annotations

import json

import pytest
import yaml

from research import paper, results


@pytest.fixture
def folder(tmp_path):
    """A paper of one results file and two numbers, freshly built."""
    kept = tmp_path / "results"
    kept.mkdir()
    measured = {"study": "x", "metrics": {"dense": {"mean": 0.98187}}, "per_seed": {"a": [1, 2]}}
    results.write_results(kept, measured).rename(kept / "job.json")
    declare(tmp_path)
    paper.build(tmp_path)
    return tmp_path


def declare(folder, **changes):
    dense = {"name": "dense", "of": "job", "at": "metrics/dense/mean", "times": 100}
    dense |= {"expect": 98.2, "within": 0.1, **changes}
    last = {"name": "last", "of": "job", "at": "per_seed/a/1", "expect": 2, "within": 0}
    (folder / "numbers.yaml").write_text(yaml.safe_dump([dense, last | {"format": ".0f"}]))


def wrong(folder):
    return [text for text in paper.problems(folder) if text]


def test_macros_hold_every_number_as_it_is_printed(folder):
    text = (folder / "macros.tex").read_text()
    assert r"\expandafter\def\csname n:dense\endcsname{98.19}" in text
    assert r"\csname n:last\endcsname{2}" in text


def test_a_fresh_paper_passes_and_says_what_was_checked(folder, capsys):
    assert paper.check(folder) == 0
    assert capsys.readouterr().out == "paper: 4 things checked, 0 wrong\n"


def test_a_number_edited_in_the_macros_is_stale(folder):
    file = folder / "macros.tex"
    file.write_text(file.read_text().replace("98.19", "98.91"))
    assert wrong(folder) == ["macros.tex is stale: make paper"]


def test_a_number_edited_in_the_results_is_refused(folder):
    file = folder / "results" / "job.json"
    file.write_text(file.read_text().replace("0.98187", "0.99187"))
    assert "changed after the study wrote it" in wrong(folder)[0]
    with pytest.raises(results.ResultsError, match="changed after the study wrote it"):
        paper.macros(folder)


def test_a_number_out_of_its_tolerance_is_named(folder):
    declare(folder, expect=98.4)
    assert wrong(folder) == [
        "dense: 98.187 is not within 0.1 of 98.4 (numbers.yaml), from job.json"
    ]


@pytest.mark.parametrize("at", ["metrics/sparse/mean", "metrics/dense", "per_seed/a/7"])
def test_a_number_that_no_file_gives_is_named(folder, at):
    declare(folder, at=at)
    with pytest.raises(results.ResultsError, match=r"^dense: "):
        paper.macros(folder)


def test_a_number_that_the_text_makes_up_is_named(folder):
    (folder / "main.tex").write_text(r"It reaches \n{dense} and \n{invented}.")
    assert wrong(folder) == ["main.tex uses 'invented', which no results file gives"]


def test_numbers_declared_twice_or_badly_are_refused(folder):
    entries = yaml.safe_load((folder / "numbers.yaml").read_text())
    (folder / "numbers.yaml").write_text(yaml.safe_dump([entries[0], entries[0]]))
    with pytest.raises(results.ResultsError, match="declared twice: dense"):
        paper.numbers(folder)
    (folder / "numbers.yaml").write_text(json.dumps([{"name": "x"}]))
    with pytest.raises(results.ResultsError, match=r"numbers\.yaml"):
        paper.numbers(folder)
