"""The paper's numbers, tables and figures, from results files and from nothing else.

`build` writes `macros.tex`, the tables and the figures, and the README's tables and figure; `check`
says what is stale, out of tolerance or changed by hand, which numbers the text holds itself, and
counts what it checked.

    python -m research.paper build
    python -m research.paper check
"""

from __future__ import annotations

import hashlib
import inspect
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from adaptivenet.emergence.verdict import ClaimError
from research import adaptive_compression_figure, paper_tables, study
from research.paper_text import macros_used, sources, typed_numbers, verdicts_claimed
from research.results import ResultsError, read_results

PAPER = Path(__file__).resolve().parents[1] / "paper"
MAIN_JOB = "adaptive_compression_mnist"
# The results files whose figures the README shows.
PICTURES = (
    MAIN_JOB,
    "frontier_small",
    "uncertainty_small",
    "shrinking_small",
    "continual_narrow_small",
    "continual_ewc_small",
    "continual_split_small",
    "continual_mesu_full",
)
# And those whose tables it shows: claims (or models), or a table that the study prints, by number.
IN_README = (
    (MAIN_JOB, 0),
    ("bimodality_small", 0),
    ("feedback_small", 0),
    ("frontier_small", 2),
    ("frontier_stretch", 2),
    ("frontier_lenet300_again", 3),
    ("frontier_lenet5_again", 3),
    ("uncertainty_small", 0),
    ("uncertainty_small", 5),
    ("uncertainty_blundell", 0),
    ("uncertainty_blundell", 1),
    ("shrinking_small", 0),
    ("shrinking_small", 6),
    ("continual_narrow_small", 0),
    ("continual_narrow_small", 1),
    ("continual_permuted10_small", 0),
    ("continual_permuted10_small", 1),
    ("continual_permuted10_small", 3),
    ("continual_ewc_small", 0),
    ("continual_lifelong_small", 0),
    ("continual_lifelong_small", 1),
    ("continual_mesu_small", 0),
    ("continual_mesu_small", 1),
    ("continual_mesu_full", 0),
    ("continual_mesu_full", 1),
    ("continual_mesu_full", 3),
    ("continual_stream_small", 0),
    ("continual_stream_small", 1),
    ("continual_speakers_small", 0),
    ("continual_split_small", 0),
    ("continual_split_small", 1),
    ("continual_split_small", 3),
)
PACKAGES = "texlive-latex-recommended texlive-fonts-recommended texlive-bibtex-extra latexmk"


class Number(NamedTuple):
    """A number of the paper: which results file, where in it, how written, how near to what."""

    name: str
    of: str
    at: str | Sequence[str]  # keys, joined by strokes, or listed where one has a stroke itself
    expect: float
    within: float
    times: float = 1.0
    format: str = ".2f"
    log: bool = False  # the file holds its logarithm

    def read(self, results: Path) -> float:
        """The number, in the paper's unit."""
        value: Any = read_results(results / f"{self.of}.json")
        for key in self.at.split("/") if isinstance(self.at, str) else self.at:
            try:
                value = value[int(key)] if isinstance(value, list) else value[key]
            except (KeyError, IndexError, ValueError, TypeError):
                raise ResultsError(f"{self.name}: {self.of}.json has no {self.at!r}") from None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ResultsError(f"{self.name}: {self.at!r} of {self.of}.json is no number: {value}")
        return self.times * (math.exp(value) if self.log else value)


def numbers(paper: Path) -> list[Number]:
    """The numbers that `numbers.yaml` declares."""
    entries = yaml.safe_load((paper / "numbers.yaml").read_text(encoding="utf-8")) or []
    found = []
    for entry in entries:
        try:
            found.append(Number(**entry))
        except TypeError as error:
            raise ResultsError(f"numbers.yaml: {entry}: {error}") from None
    names = [number.name for number in found]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ResultsError(f"numbers.yaml: declared twice: {', '.join(repeated)}")
    return found


def values(paper: Path) -> dict[str, str]:
    """What the text may print: name to LaTeX."""
    found = {n.name: _printed(n.read(paper / "results"), n.format) for n in numbers(paper)}
    for path in results_of(paper):
        facts = {f"{path.stem}/{key}": text for key, text in _facts(read_results(path)).items()}
        taken = sorted(found.keys() & facts.keys())
        if taken:
            raise ResultsError(f"numbers.yaml: {path.name} itself gives {', '.join(taken)}; rename")
        found |= facts
    return found


def macros(paper: Path) -> str:
    """The text of `macros.tex`: every number, every verdict, and what each study ran."""
    lines = [_macro(name, text) for name, text in values(paper).items()]
    return "\n".join(["% Written by research.paper from results/*.json; do not edit.", *lines, ""])


def results_of(paper: Path) -> list[Path]:
    """The results files that the paper rests on."""
    return sorted((paper / "results").glob("*.json"))


def tables(paper: Path) -> dict[Path, str]:
    """The tables that the results files give, each with its text."""
    texts: dict[str, str | None] = {}
    for path in results_of(paper):
        document = read_results(path)
        texts[path.stem] = paper_tables.tabular(document)
        for number, table in enumerate(_tables_of(path), start=1):
            texts[f"{path.stem}_{number}"] = paper_tables.printed(document, table)
    return {paper / "tables" / f"{stem}.tex": text for stem, text in texts.items() if text}


def pictures(paper: Path, path: Path) -> list[Path]:
    """The files that are drawn from a results file; none for one without a figure."""
    document = read_results(path)
    main_job = document["study"] == "adaptive_compression"
    if not (main_job or document.get("verdicts")):
        return []
    drawn = [paper / "figures" / f"{path.stem}.pdf"]
    if path.stem in PICTURES:
        drawn.append(paper.parent / "docs" / "figures" / f"{path.stem}.png")
    return drawn


def build(paper: Path = PAPER) -> None:
    """Writes macros, tables and figures, and the PDF where LaTeX is installed."""
    (paper / "macros.tex").write_text(macros(paper), encoding="utf-8")
    for file, text in tables(paper).items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    readme = _readme(paper)
    if readme:
        readme[0].write_text(readme[1], encoding="utf-8")
    for path in results_of(paper):
        drawn = pictures(paper, path)
        if drawn:
            _draw(path, drawn)
            _stamp_file(paper, path).write_text(_stamp(path, drawn), encoding="utf-8")
            print(f"drawn: {', '.join(picture.name for picture in drawn)}")
    print(f"written: macros.tex, {len(values(paper))} values; {len(tables(paper))} tables")
    if not (paper / "main.tex").exists():
        print("there is no main.tex yet: no PDF")
    elif shutil.which("latexmk") is None:
        print(f"no PDF: latexmk is not installed. On Debian: apt-get install {PACKAGES}")
    else:
        subprocess.run(
            ["latexmk", "-pdf", "-interaction=nonstopmode", "-halt-on-error", "main.tex"],
            cwd=paper,
            check=True,
        )


def problems(paper: Path = PAPER) -> Iterator[str]:
    """One item for each thing checked: empty where it holds, else what is wrong."""
    for path in results_of(paper):
        try:
            document = read_results(path)
            if document.get("verdicts"):
                _rejudge(path)
        except ResultsError as error:
            yield str(error)
            return  # nothing that rests on it can be checked
        yield ""
    unread = False
    for number in numbers(paper):
        try:
            value = number.read(paper / "results")
        except ResultsError as error:
            unread = True
            yield str(error)
            continue
        near = abs(value - number.expect) <= number.within
        yield (
            ""
            if near
            else (
                f"{number.name}: {value:g} is not within {number.within:g} of {number.expect:g} "
                f"(numbers.yaml), from {number.of}.json"
            )
        )
    if unread:
        return  # then there are no macros to compare with
    yield from _stale(paper)
    text = paper / "main.tex"
    if text.exists():
        content = text.read_text(encoding="utf-8")
        known = values(paper)
        for name in macros_used(content):
            yield "" if name in known else f"main.tex uses {name!r}, which no results file gives"
        for name, word in verdicts_claimed(content):
            said = known.get(name, "in no results file")
            yield "" if word == said else f"main.tex calls {name} {word}, but it is {said}"
        library = paper / "references.bib"
        for key, found in sources(content, library.read_text() if library.exists() else "").items():
            yield "" if found else f"main.tex cites {key!r}, which {library.name} does not have"
        typed = typed_numbers(content)
        for line, shown in typed:
            yield (
                f"main.tex, line {line}: {shown} is typed in; print it by a macro, or mark the "
                "line '% constant'"
            )
        if not typed:
            yield ""


def check(paper: Path = PAPER) -> int:
    """Prints what is wrong and how much was checked; the number of problems."""
    found = list(problems(paper))
    wrong = [text for text in found if text]
    for text in wrong:
        print(f"paper: {text}")
    print(f"paper: {len(found)} things checked, {len(wrong)} wrong")
    return len(wrong)


def _stale(paper: Path) -> Iterator[str]:
    """What `build` writes: each file, and whether it is as `build` would write it now."""

    def compare(file: Path, name: str, text: str) -> str:
        same = file.exists() and file.read_text(encoding="utf-8") == text
        return "" if same else f"{name} is stale: make paper"

    yield compare(paper / "macros.tex", "macros.tex", macros(paper))
    current = tables(paper)
    for file, text in current.items():
        yield compare(file, f"tables/{file.name}", text)
    for file in sorted(set((paper / "tables").glob("*.tex")) - current.keys()):
        yield f"tables/{file.name}: no results file gives it; remove it"
    try:
        readme = _readme(paper)
        if readme:
            yield compare(readme[0], "README.md (its tables)", readme[1])
    except ResultsError as error:
        yield str(error)
    for path in results_of(paper):
        drawn = pictures(paper, path)
        file = _stamp_file(paper, path)
        stamped = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        for picture in drawn:
            wanted = _stamp(path, [picture]).splitlines() if picture.exists() else ["absent"]
            fresh = stamped[:1] == wanted[:1] and wanted[-1] in stamped
            yield "" if fresh else f"{picture.parent.name}/{picture.name} is stale: make paper"


def _readme(paper: Path) -> tuple[Path, str] | None:
    """The README and its text with the tables that it shows, where there are results for them."""
    file, shown = (
        paper.parent / "README.md",
        [(paper / "results" / f"{n}.json", t) for n, t in IN_README],
    )
    shown = [(path, number) for path, number in shown if path.exists()]
    if not shown:
        return None
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    for path, number in shown:
        name = f"{path.stem}_{number}" if number else path.stem
        table = _tables_of(path)[number - 1] if number else paper_tables.told(read_results(path))
        text = paper_tables.in_readme(text, name, table)
    return file, text


def _facts(document: Mapping[str, Any]) -> dict[str, str]:
    """What every results file gives the text without a line in `numbers.yaml`."""
    shown, p = paper_tables.number, paper_tables.probability
    facts = {}
    for verdict in document.get("verdicts") or []:
        name = verdict["name"]
        facts[name] = verdict["word"].lower()
        for key in ("estimate", "low", "high"):
            facts[f"{name}/{key}"] = shown(verdict[key])
        facts[f"{name}/d"] = shown(verdict["effect_size"])
        facts[f"{name}/p"] = p(verdict["p_adjusted"])
        facts[f"{name}/n"] = str(verdict["n"])
    if document.get("emergence"):
        facts["emergence"] = paper_tables.escape(document["emergence"])
    if "seeds" in document:
        facts["seeds"] = str(len(document["seeds"]))
    if "seconds" in document:
        facts["seconds"] = f"{document['seconds']:,.0f}"
    if "config_hash" in document:
        facts["hash"] = document["config_hash"]
    return facts


def _printed(value: float, pattern: str) -> str:
    """A number in its format; a minus sign rather than a hyphen."""
    text = format(value, pattern)
    return rf"\ensuremath{{{text}}}" if text.startswith("-") else text


def _macro(name: str, value: str) -> str:
    return rf"\expandafter\def\csname n:{name}\endcsname{{{value}}}"


def _rejudge(path: Path) -> Any:
    try:
        return study.rejudge(path)
    except (ClaimError, ImportError, SystemExit) as error:
        why = "its config cannot be read" if isinstance(error, SystemExit) else error
        raise ResultsError(
            f"{path.name}: its study has changed since, or is gone ({why}); run it again."
        ) from None


def _tables_of(path: Path) -> Sequence[study.Table]:
    """The tables that a study prints beside its verdicts."""
    return _rejudge(path)[3].tables if read_results(path).get("tables") else ()


def _draw(path: Path, drawn: list[Path]) -> None:
    for picture in drawn:
        picture.parent.mkdir(parents=True, exist_ok=True)
    document = read_results(path)
    if document["study"] == "adaptive_compression":
        adaptive_compression_figure.save(document, *drawn)
        return
    module, config, outcome, _ = _rejudge(path)
    study.save_figure(module.draw, config, outcome, *drawn, dpi=200)


def _stamp_file(paper: Path, path: Path) -> Path:
    return paper / "figures" / f"{path.stem}.stamp"


def _stamp(path: Path, drawn: list[Path]) -> str:
    """What pictures are made of (results, and the code that draws), and the hash of each."""
    document = read_results(path)
    content = hashlib.sha256(document["seal"].encode())
    name, here = document["study"], Path(__file__).parent
    if name != "adaptive_compression":  # its figure brings its own style
        content.update(inspect.getsource(study.style).encode())
    sources = [here / f"{name}_figure.py", here / f"{name}.py"]
    content.update(next((file.read_bytes() for file in sources if file.exists()), b""))
    hashes = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in drawn]
    return "\n".join([content.hexdigest(), *hashes, ""])


def main(argv: list[str] | None = None) -> None:
    """`build` or `check`."""
    words = sys.argv[1:] if argv is None else argv
    if words not in (["build"], ["check"]):
        sys.exit("usage: python -m research.paper build|check")
    try:
        if words == ["build"]:
            build()
        elif check():
            sys.exit(1)
    except ResultsError as error:
        sys.exit(f"paper: {error}")


if __name__ == "__main__":
    main()
