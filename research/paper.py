"""The paper's numbers and figures, from results files and from nothing else.

`build` writes `macros.tex` and the figures; `check` says what is stale, out of tolerance or changed
by hand, and counts what it checked.

    python -m research.paper build
    python -m research.paper check
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from research import study
from research.results import ResultsError, read_results

PAPER = Path(__file__).resolve().parents[1] / "paper"
PACKAGES = "texlive-latex-recommended texlive-fonts-recommended texlive-bibtex-extra latexmk"


class Number(NamedTuple):
    """A number of the paper: which results file, where in it, how written, how near to what."""

    name: str
    of: str
    at: str
    expect: float
    within: float
    times: float = 1.0
    format: str = ".2f"

    def read(self, results: Path) -> float:
        """The number, in the paper's unit."""
        value: Any = read_results(results / f"{self.of}.json")
        for key in self.at.split("/"):
            try:
                value = value[int(key)] if isinstance(value, list) else value[key]
            except (KeyError, IndexError, ValueError, TypeError):
                raise ResultsError(f"{self.name}: {self.of}.json has no {self.at!r}") from None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ResultsError(f"{self.name}: {self.at!r} of {self.of}.json is no number: {value}")
        return self.times * value


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


def macros(paper: Path) -> str:
    """The text of `macros.tex`: every number, and every verdict."""
    lines = ["% Written by research.paper from results/*.json; do not edit."]
    for number in numbers(paper):
        lines.append(_macro(number.name, format(number.read(paper / "results"), number.format)))
    for path in results_of(paper):
        for name, word in (read_results(path).get("verdict") or {}).items():
            lines.append(_macro(f"{path.stem}/{name}", word.lower()))
    return "\n".join(lines) + "\n"


def results_of(paper: Path) -> list[Path]:
    """The results files that the paper rests on."""
    return sorted((paper / "results").glob("*.json"))


def studies_of(paper: Path) -> list[Path]:
    """Those of studies with claims, which can be judged and drawn anew."""
    return [path for path in results_of(paper) if read_results(path).get("verdicts")]


def build(paper: Path = PAPER) -> None:
    """Writes macros and figures, and the PDF where LaTeX is installed."""
    (paper / "macros.tex").write_text(macros(paper), encoding="utf-8")
    figures = paper / "figures"
    figures.mkdir(exist_ok=True)
    for path in studies_of(paper):
        module, config, outcome, _ = study.rejudge(path)
        with study.style():
            figure = module.draw(config, outcome)
            figure.savefig(figures / f"{path.stem}.pdf", metadata={"CreationDate": None})
        stamp = figures / f"{path.stem}.stamp"
        stamp.write_text(_stamp(path) + "\n", encoding="utf-8")
        print(f"drawn: figures/{path.stem}.pdf")
    print(f"written: macros.tex, {len(numbers(paper))} numbers")
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
                study.rejudge(path)
        except ResultsError as error:
            yield str(error)
            return  # nothing that rests on it can be checked
        yield ""
    for number in numbers(paper):
        try:
            value = number.read(paper / "results")
        except ResultsError as error:
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
    file = paper / "macros.tex"
    fresh = file.exists() and file.read_text(encoding="utf-8") == macros(paper)
    yield "" if fresh else "macros.tex is stale: make paper"
    for path in studies_of(paper):
        stamp = paper / "figures" / f"{path.stem}.stamp"
        drawn = stamp.with_suffix(".pdf").exists() and stamp.exists()
        same = drawn and stamp.read_text(encoding="utf-8").strip() == _stamp(path)
        yield "" if same else f"figures/{path.stem}.pdf is stale: make paper"
    text = paper / "main.tex"
    if text.exists():
        known = set(re.findall(r"csname n:([^\\]+)\\endcsname", macros(paper)))
        for name in sorted(set(re.findall(r"\\n\{([^}#]+)\}", text.read_text(encoding="utf-8")))):
            yield "" if name in known else f"main.tex uses {name!r}, which no results file gives"


def check(paper: Path = PAPER) -> int:
    """Prints what is wrong and how much was checked; the number of problems."""
    found = list(problems(paper))
    wrong = [text for text in found if text]
    for text in wrong:
        print(f"paper: {text}")
    print(f"paper: {len(found)} things checked, {len(wrong)} wrong")
    return len(wrong)


def _macro(name: str, value: str) -> str:
    return rf"\expandafter\def\csname n:{name}\endcsname{{{value}}}"


def _stamp(path: Path) -> str:
    """What a figure is made of: its results, and the modules that draw it."""
    document = read_results(path)
    content = hashlib.sha256(document["seal"].encode())
    here = Path(__file__).parent
    for source in (here / f"{document['study']}_figure.py", here / "study.py"):
        if source.exists():
            content.update(source.read_bytes())
    return content.hexdigest()


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
