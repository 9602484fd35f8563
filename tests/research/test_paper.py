"""The paper's numbers, tables and figures: a wrong one is put in, and caught."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from adaptivenet.emergence.verdict import Hypothesis, Preregistration
from research import paper, paper_tables, paper_text, results, study
from research.study import judge  # noqa: F401 (a study has one; this module is a study below)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    """A paper of one results file and two numbers, freshly built."""
    kept = tmp_path / "paper" / "results"
    kept.mkdir(parents=True)
    measured = {"study": "x", "metrics": {"dense": {"mean": 0.98187}}, "per_seed": {"a": [1, 2]}}
    results.write_results(kept, measured).rename(kept / "job.json")
    declare(kept.parent)
    paper.build(kept.parent)
    return kept.parent


def declare(folder, **changes):
    dense = {"name": "dense", "of": "job", "at": "metrics/dense/mean", "times": 100}
    dense |= {"expect": 98.2, "within": 0.1, **changes}
    last = {"name": "last", "of": "job", "at": "per_seed/a/1", "expect": 2, "within": 0}
    (folder / "numbers.yaml").write_text(yaml.safe_dump([dense, last | {"format": ".0f"}]))


def wrong(folder):
    return [text for text in paper.problems(folder) if text]


# Numbers ------------------------------------------------------------------------------------------


def test_a_logarithm_is_printed_as_what_it_is_of(folder):
    declare(folder, log=True, expect=100 * math.exp(0.98187))
    assert rf"n:dense\endcsname{{{100 * math.exp(0.98187):.2f}}}" in paper.macros(folder)


def test_a_negative_number_has_a_minus_sign(folder):
    declare(folder, times=-100, expect=-98.2)
    assert r"n:dense\endcsname{\ensuremath{-98.19}}" in paper.macros(folder)


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


def test_keys_with_strokes_are_listed(folder):
    declare(folder, at=["metrics", "dense", "mean"])
    assert wrong(folder) == []


@pytest.mark.parametrize("at", ["metrics/sparse/mean", "metrics/dense", "per_seed/a/7"])
def test_a_number_that_no_file_gives_is_named(folder, at):
    declare(folder, at=at)
    (said,) = wrong(folder)
    assert said.startswith("dense: ")
    with pytest.raises(results.ResultsError, match=r"^dense: "):
        paper.macros(folder)


def test_numbers_declared_twice_or_badly_are_refused(folder):
    entries = yaml.safe_load((folder / "numbers.yaml").read_text())
    (folder / "numbers.yaml").write_text(yaml.safe_dump([entries[0], entries[0]]))
    with pytest.raises(results.ResultsError, match="declared twice: dense"):
        paper.numbers(folder)
    (folder / "numbers.yaml").write_text(json.dumps([{"name": "x"}]))
    with pytest.raises(results.ResultsError, match=r"numbers\.yaml"):
        paper.numbers(folder)


def test_a_table_that_no_results_file_gives_is_named(folder):
    (folder / "tables").mkdir()
    (folder / "tables" / "old.tex").write_text("98.3")
    assert wrong(folder) == ["tables/old.tex: no results file gives it; remove it"]


# The text -----------------------------------------------------------------------------------------


def test_a_number_that_the_text_makes_up_is_named(folder):
    (folder / "main.tex").write_text(r"It reaches \n{dense} and \n{invented}.")
    assert wrong(folder) == ["main.tex uses 'invented', which no results file gives"]


def test_a_source_that_the_library_has_not_is_named(folder):
    (folder / "references.bib").write_text("@book{known,\n  year = {2001},\n}\n")
    (folder / "main.tex").write_text(r"As \citet[p.~3]{known} say, but see \citep{known, lost}.")
    assert wrong(folder) == ["main.tex cites 'lost', which references.bib does not have"]


def test_a_number_typed_into_the_text_is_named_with_its_line(folder):
    (folder / "main.tex").write_text("It reaches \\n{dense}\\,\\%,\nwhich is 98.19\\,\\%.\n")
    assert wrong(folder) == [
        r"main.tex, line 2: 98.19\,\% is typed in; print it by a macro, or mark the line "
        "'% constant'"
    ]


@pytest.mark.parametrize(
    "line",
    [
        "accuracy of 0.98",
        "a loss of .05",
        r"cuts 70\,\% of them",
        r"cuts 70~\% of them",
        r"cuts $70\%$ of them",
        "cuts 70 per cent",
        "109,386 parameters",
        r"109{,}386 parameters",
        r"109\,386 parameters",
        "after 300 steps",
        "$n=500$ networks",
        "784-unit",
        r"\cite{lecun1998} reports 98.2",
        r"0.5 of \textwidth",
        r"100\% % no constant, this one",
        "it holds in 98.2 in all seeds",
    ],
)
def test_a_typed_number_is_found(line):
    assert len(paper_text.typed_numbers(line)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "two of 10 classes, 20 seeds, in 2024 and 1998",
        r"\n{main/s70/accuracy}\,\% and \n{job/123/0.5}",
        r"\cite[p.~123]{mackay1992.123} in \cref{fig:100}, \label{tab:0.95}",
        r"\includegraphics[width=0.95\textwidth]{figures/x_0.95}",
        r"\input{tables/run_123}",
        r"\vspace{-0.5em}\hspace{120pt}",
        "at alpha 0.05 % constant: fixed beforehand",
        "nothing % 98.2 in a comment",
        "float32, mnist1d, H1b",
        "layers 1,2 and 3",
    ],
)
def test_what_is_no_measurement_passes(line):
    assert paper_text.typed_numbers(line) == []


def test_what_stands_before_the_document_is_not_printed():
    text = "\\geometry{margin=25.4mm}\n\\def\\x{0.5}\n\\begin{document}\nfine\n0.5\n\\end{document}"
    assert paper_text.typed_numbers(text) == [(5, "0.5")]
    assert paper_text.typed_numbers("\\cite{a,\nb}\n0.5") == [(3, "0.5")]


def test_code_is_no_measurement():
    text = "\\begin{verbatim}\nprune(0.95)  % 3000\n\\end{verbatim}\n0.5"
    assert paper_text.typed_numbers(text) == [(4, "0.5")]


# The main job -------------------------------------------------------------------------------------


BEGIN, END = paper_tables.markers(paper.MAIN_JOB)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The main job's results file of this repository, in a paper of its own, built."""
    root = tmp_path_factory.mktemp("built")
    (root / "paper" / "results").mkdir(parents=True)
    shutil.copy(ROOT / "paper" / "results" / f"{paper.MAIN_JOB}.json", root / "paper" / "results")
    (root / "paper" / "numbers.yaml").write_text("[]")
    (root / "README.md").write_text(f"# Before\n\n{BEGIN}\n{END}\n\nAfter.\n")
    paper.build(root / "paper")
    return root


@pytest.fixture
def root(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "copy"))


def test_the_main_job_gives_tables_and_figures(root, capsys):
    assert paper.check(root / "paper") == 0
    # results, macros, table, README, PDF, PNG
    assert capsys.readouterr().out == "paper: 6 things checked, 0 wrong\n"
    readme = (root / "README.md").read_text()
    assert readme.startswith("# Before\n\n<!--")
    assert readme.endswith("-->\n\nAfter.\n")
    printed = (ROOT / "README.md").read_text(encoding="utf-8")
    assert table_of(readme) == table_of(printed) != ""
    tex = (root / "paper" / "tables" / f"{paper.MAIN_JOB}.tex").read_text()
    assert r"scheduled 70.0\% & 98.18 $\pm$ 0.15 & 32,957 & 145,774 & 70.0 \\" in tex
    assert (
        rf"\csname n:{paper.MAIN_JOB}/seeds\endcsname{{5}}"
        in (root / "paper" / "macros.tex").read_text()
    )


def table_of(readme):
    return readme.partition(BEGIN)[2].partition(END)[0]


def test_the_results_file_is_small():
    assert (ROOT / "paper" / "results" / f"{paper.MAIN_JOB}.json").stat().st_size < 200_000


def test_a_digit_changed_in_the_readme_is_caught(root):
    file = root / "README.md"
    file.write_text(file.read_text().replace("| auto | 97.65", "| auto | 98.65"))
    assert wrong(root / "paper") == ["README.md (its tables) is stale: make paper"]


@pytest.mark.parametrize("marker", [BEGIN, END])
def test_a_lost_marker_of_the_readme_is_named(root, marker):
    file = root / "README.md"
    file.write_text(file.read_text().replace(marker, ""))
    (said,) = wrong(root / "paper")
    assert "put them around it" in said
    assert marker in said


def test_the_claims_of_a_study_stand_in_the_readme():
    verdict = {"statement": "a | b", "estimate": 0.12345, "low": -0.1, "high": None}
    document = {"verdicts": [{**verdict, "word": "REFUTED"}]}
    text = "\n".join(["Before.", *paper_tables.markers("x"), "After."])
    lines = paper_tables.in_readme(text, "x", paper_tables.told(document)).splitlines()
    assert lines[2:5] == [
        "| claim | mean [interval] | verdict |",
        "|---|---|---|",
        "| a \\| b | 0.123 [-0.1, -] | REFUTED |",
    ]
    assert (lines[0], lines[-1]) == ("Before.", "After.")


def test_a_table_that_a_study_prints_stands_in_the_readme_and_in_the_paper():
    table = ("Errors, in %", ["rule", "0.9"], [["dense", "1.5 ± 0.1"], ["obd+gradient*", "-"]])
    text = "\n".join(paper_tables.markers("x"))
    lines = paper_tables.in_readme(text, "x", table).splitlines()
    assert lines[1:-1] == [
        "Errors, in %:", "", "| rule | 0.9 |", "|---|---|", "| dense | 1.5 ± 0.1 |",
        "| obd+gradient* | - |",
    ]  # fmt: skip
    again = paper_tables.in_readme("\n".join(lines), "x", table).splitlines()
    assert again == lines
    written = paper_tables.printed({"config_hash": "abc"}, table)
    assert r"dense & 1.5 $\pm$ 0.1 \\" in written
    assert r"\begin{tabular}{lr}" in written


def test_a_digit_changed_in_a_table_is_caught(root):
    file = root / "paper" / "tables" / f"{paper.MAIN_JOB}.tex"
    file.write_text(file.read_text().replace("97.65", "98.65"))
    assert wrong(root / "paper") == [f"tables/{file.name} is stale: make paper"]
    file.unlink()
    assert wrong(root / "paper") == [f"tables/{file.name} is stale: make paper"]


def test_a_picture_changed_by_hand_is_caught(root):
    picture = root / "docs" / "figures" / f"{paper.MAIN_JOB}.png"
    picture.write_bytes(picture.read_bytes() + b"!")
    assert wrong(root / "paper") == [f"figures/{picture.name} is stale: make paper"]
    picture.unlink()
    assert wrong(root / "paper") == [f"figures/{picture.name} is stale: make paper"]


def test_pictures_of_other_results_or_other_code_are_caught(root):
    stamp = root / "paper" / "figures" / f"{paper.MAIN_JOB}.stamp"
    made_of, *hashes = stamp.read_text().splitlines()
    stamp.write_text("\n".join(["0" * len(made_of), *hashes]))
    assert wrong(root / "paper") == [
        f"figures/{paper.MAIN_JOB}.{suffix} is stale: make paper" for suffix in ("pdf", "png")
    ]
    stamp.unlink()
    assert len(wrong(root / "paper")) == 2


def test_check_draws_nothing(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it would fail
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert wrong(root / "paper") == []


# Studies with claims ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Claims(Preregistration):
    h1_up: Hypothesis = Hypothesis(statement="It grows.", metric="net_gain", than=0.5)
    h2: Hypothesis = Hypothesis(
        statement="It stays.", metric="drift", direction="equal", margin=0.2
    )
    h3: Hypothesis = Hypothesis(statement="It falls.", metric="absent", direction="less")


@dataclasses.dataclass(frozen=True)
class Config(study.Config):
    claims: Claims = Claims()


class Data:
    name, sha256 = "nothing", "0" * 64


def run(config, data, seeds, tick):
    noise = np.array([np.random.default_rng(seed).normal() for seed in seeds])
    metrics = {"net_gain": 1 + 0.1 * noise, "drift": -1e-5 * noise, "absent": np.nan * noise}
    return study.Outcome(metrics, {"noise": noise[:, None]})


def draw(config, outcome):
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots()
    axis.plot(outcome.curves["noise"])
    return figure


@pytest.fixture
def claimed(tmp_path, monkeypatch):
    """A paper of one study with claims, which is this module, built."""
    monkeypatch.setitem(sys.modules, "research.test_paper", sys.modules[__name__])
    folder = tmp_path / "paper"
    seeds = ["--seeds", *map(str, range(10)), "--output", str(tmp_path / "runs")]
    words = [*seeds, "--keep", str(folder / "results" / "trial.json")]
    study.main(Config, run, study.judge, draw, argv=words, load=lambda config: Data())
    (folder / "numbers.yaml").write_text("[]")
    paper.build(folder)
    return folder


def test_verdicts_are_a_table_and_macros(claimed, capsys):
    capsys.readouterr()
    assert paper.check(claimed) == 0
    # results, macros, table, PDF
    assert capsys.readouterr().out == "paper: 4 things checked, 0 wrong\n"
    document = results.read_results(claimed / "results" / "trial.json")
    first = document["verdicts"][0]
    macros = (claimed / "macros.tex").read_text()
    for name, value in {
        "h1_up": "supported",
        "h1_up/estimate": f"{first['estimate']:#.3g}",
        "h1_up/low": f"{first['low']:#.3g}",
        "h1_up/high": f"{first['high']:#.3g}",
        "h1_up/d": f"{first['effect_size']:#.3g}",
        "h1_up/p": r"\ensuremath{<0.001}",
        "h1_up/n": "10",
        "h3": "inconclusive",
        "h3/estimate": "--",
        "seeds": "10",
        "hash": document["config_hash"],
    }.items():
        assert rf"\csname n:trial/{name}\endcsname{{{value}}}" + "\n" in macros
    lines = (claimed / "tables" / "trial.tex").read_text().splitlines()
    assert r"95\,\% interval" in lines[3]
    assert lines[5].startswith(r"h1\_up & net gain $> 0.5$ & " + f"{first['estimate']:#.3g} & [")
    assert lines[5].endswith(r"\ensuremath{<0.001} & 10 & supported \\")
    assert r"h2 & drift $= 0 \pm 0.2$ & \ensuremath{" in lines[6]
    assert r"\times10^{-" in lines[6]
    assert lines[7] == r"h3 & absent $< 0$ & -- & -- & -- & -- & 10 & inconclusive \\"


def test_a_verdict_changed_in_a_table_is_caught(claimed):
    file = claimed / "tables" / "trial.tex"
    file.write_text(file.read_text().replace("inconclusive", "supported"))
    assert wrong(claimed) == ["tables/trial.tex is stale: make paper"]


def test_a_verdict_that_the_results_contradict_is_named(claimed):
    text = claimed / "main.tex"
    text.write_text(r"\newcommand{\verdict}[2]{#2} It grows: \verdict{trial/h1_up}{supported}.")
    assert wrong(claimed) == []
    text.write_text(r"\verdict{trial/h1_up}{refuted} \verdict{trial/h9}{supported}")
    assert wrong(claimed) == [
        "main.tex calls trial/h1_up refuted, but it is supported",
        "main.tex calls trial/h9 supported, but it is in no results file",
    ]


def test_a_changed_style_makes_the_figure_stale_and_the_rest_of_the_harness_does_not(
    claimed, monkeypatch
):
    monkeypatch.setattr(study, "load", lambda config: Data())
    assert wrong(claimed) == []
    monkeypatch.setattr(study, "style", lambda: None)
    assert wrong(claimed) == ["figures/trial.pdf is stale: make paper"]


def test_a_study_that_changed_since_is_named(claimed, monkeypatch):
    monkeypatch.setitem(sys.modules, "research.test_paper", None)
    (said,) = wrong(claimed)
    assert said.startswith("trial.json: its study has changed since, or is gone")


def test_a_name_that_a_results_file_gives_cannot_be_declared(claimed):
    number = {"name": "trial/h2", "of": "trial", "at": "per_seed/drift/0"}
    (claimed / "numbers.yaml").write_text(yaml.safe_dump([number | {"expect": 0, "within": 1}]))
    with pytest.raises(results.ResultsError, match=r"trial\.json itself gives trial/h2"):
        paper.macros(claimed)


def test_an_exploratory_verdict_is_called_so():
    claims = {"alpha": 0.05, "exploratory": True, "h1": {"direction": "less", "than": -2}}
    verdict = dict.fromkeys(("estimate", "low", "high", "effect_size", "p_adjusted"), -0.001234)
    verdict |= {"name": "h1", "metric": "a_b", "word": "REFUTED", "n": 7, "p_adjusted": 0.0123}
    document = {"study": "x", "config_hash": "1", "config": yaml.safe_dump({"claims": claims})}
    text = paper_tables.tabular({**document, "verdicts": [verdict]})
    assert text is not None
    assert r"h1 & a b $< -2$ & \ensuremath{-0.00123} & [\ensuremath{-0.00123}, " in text
    assert r"0.0123 & 7 & refuted (exploratory) \\" in text


def test_controls_are_a_table_of_power_and_size():
    item = {"mean": 0.998, "ci_low": 0.98891, "ci_high": 1.0}
    size = {"mean": 0.0715, "ci_low": 0.06, "ci_high": 0.083}
    targets = {"a_b": "MISSES size", "good": "met", "bad": "fooled, as it must be"}
    targets |= {"odd": "NOT FOOLED"}
    document = {
        "study": "controls",
        "config_hash": "1",
        "targets": {"power": 0.8, "size": 0.06},
        "metrics": {name: {"power": item, "size": size} for name in targets},
        "simulations": {n: {"n": "20 seeds x 4", "targets": said} for n, said in targets.items()},
    }
    text = paper_tables.tabular(document)
    assert text is not None
    lines = text.splitlines()
    cells = r"20 seeds $\times$ 4 & 0.998 [0.989, 1.000] & 0.071 [0.060, 0.083]"
    assert lines[5:9] == [
        rf"a\_b & {cells} & fail (misses size) \\",
        rf"good & {cells} & pass \\",
        rf"bad & {cells} & pass (must be fooled) \\",
        rf"odd & {cells} & fail (not fooled) \\",
    ]
