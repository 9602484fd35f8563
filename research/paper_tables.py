"""The paper's and the README's tables, as text, from results documents and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from research.results import ResultsError

_SIGN = {"greater": ">", "less": "<", "equal": "="}
_SPECIAL = {c: f"\\{c}" for c in "&%$#_{}"} | {"<": "$<$", ">": "$>$", "~": "$\\sim$"}
_PASSED = {"met": "pass", "fooled, as it must be": "pass (must be fooled)"}


def escape(text: str) -> str:
    """Text as LaTeX prints it.

    >>> escape("h1a_oneshot: 70 %")
    'h1a\\\\_oneshot: 70 \\\\%'
    """
    return "".join(_SPECIAL.get(letter, letter) for letter in text)


def number(value: float | None) -> str:
    """Three significant digits, as a paper prints them, in text and in mathematics alike.

    >>> [number(value) for value in (0.5, 12.345, 5908.4, -2, 0.0, None)]
    ['0.500', '12.3', '5,908', '\\\\ensuremath{-2.00}', '0', '--']
    >>> number(0.000012345)
    '\\\\ensuremath{1.23\\\\times10^{-5}}'
    """
    if value is None:
        return "--"
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-4 or size >= 999_999_500:
        digits, power = f"{value:.2e}".split("e")
        return rf"\ensuremath{{{digits}\times10^{{{int(power)}}}}}"
    text = f"{size:,.0f}" if size >= 999.5 else f"{size:#.3g}".rstrip(".")
    return text if value > 0 else rf"\ensuremath{{-{text.replace(',', '{,}')}}}"


def probability(p: float | None) -> str:
    """A p value; below a thousandth only that is said.

    >>> [probability(p) for p in (0.01234, 0.0001, None)]
    ['0.0123', '\\\\ensuremath{<0.001}', '--']
    """
    return r"\ensuremath{<0.001}" if p is not None and p < 0.001 else number(p)


def tabular(document: Mapping[str, Any]) -> str | None:
    """The paper's table of a results document.

    Args:
      document: what :func:`research.results.read_results` read.

    Returns:
      A booktabs tabular: models of the main job, verdicts of a study with claims, or power and size
      of the controls; None for a document that has none of these.
    """
    if document["study"] == "adaptive_compression":
        return _models(document)
    if document.get("verdicts"):
        return _verdicts(document)
    return _controls(document) if document.get("simulations") else None


def printed(
    document: Mapping[str, Any], table: tuple[str, Sequence[str], Sequence[Sequence[str]]]
) -> str:
    """The paper's form of a table that a study prints.

    Args:
      document: the results that it comes from.
      table: title (which the caption says), headings, and rows of cells; the first column is text.

    Returns:
      A booktabs tabular.
    """
    _, heads, rows = table

    def cell(text: str) -> str:
        return escape(text).replace("±", r"$\pm$")

    lines = [[cell(text) for text in row] for row in rows]
    return _booktabs(document, "l" + "r" * (len(heads) - 1), [cell(h) for h in heads], lines)


def main_rows(document: Mapping[str, Any]) -> list[list[str]]:
    """Model, test accuracy, non-zero parameters, bytes of the file, sparsity; one row an arm."""
    rows = []
    for name, row in document["metrics"].items():
        accuracy = row["test_accuracy"]
        text = f"{100 * accuracy['mean']:.2f}"
        if accuracy["ci_low"] is not None:
            text += f" ± {50 * (accuracy['ci_high'] - accuracy['ci_low']):.2f}"
        counts = [f"{row[key]['mean']:,.0f}" for key in ("nonzero", "packed_bytes")]
        rows.append([name, text, *counts, f"{100 * row['sparsity']['mean']:.1f}"])
    return rows


def markers(name: str) -> tuple[str, str]:
    """The README's lines between which the table of a results file stands."""
    return f"<!-- {name}: begin, written by make paper -->", f"<!-- {name}: end -->"


def told(document: Mapping[str, Any]) -> tuple[str, Sequence[str], Sequence[Sequence[str]]]:
    """What the README says of results: a study's claims, or the main job's models.

    Args:
      document: the results.

    Returns:
      A title (none), the headings, and rows of cells.
    """
    if document.get("verdicts"):
        return "", ("claim", "mean [interval]", "verdict"), _claims(document)
    heads = ("model", "test accuracy %", "non-zero parameters", "bytes of the file", "sparsity %")
    return "", heads, main_rows(document)


def in_readme(
    readme: str, name: str, table: tuple[str, Sequence[str], Sequence[Sequence[str]]]
) -> str:
    """The README with a table between its markers.

    Args:
      readme: its text.
      name: of the table.
      table: title, headings, and rows of cells.

    Returns:
      The text with this table; the same text if it held it.

    Raises:
      ResultsError: the markers are not there, once each and in order.
    """
    first, last = markers(name)
    before, begin, rest = readme.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end or first in rest or last in before + after:
        raise ResultsError(
            f"README.md: the table of {name} wants one line {first!r} and, below it, one line "
            f"{last!r}; put them around it."
        )
    title, heads, rows = table
    lines = [list(heads), ["---"] * len(heads), *rows]
    text = "\n".join(
        "|" + "|".join(cell if cell == "---" else f" {cell} " for cell in line) + "|"
        for line in lines
    )
    text = f"{title}:\n\n{text}" if title else text
    return f"{before}{first}\n{text}\n{last}{after}"


def _claims(document: Mapping[str, Any]) -> list[list[str]]:
    """Statement, mean with its interval, verdict; one row a claim."""

    def plain(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    return [
        [
            verdict["statement"].replace("|", "\\|"),
            f"{plain(verdict['estimate'])} [{plain(verdict['low'])}, {plain(verdict['high'])}]",
            verdict["word"],
        ]
        for verdict in document["verdicts"]
    ]


def _models(document: Mapping[str, Any]) -> str:
    heads = ("model", r"test accuracy (\%)", "non-zero", "bytes of the file", r"sparsity (\%)")
    rows = [[escape(cell).replace("±", r"$\pm$") for cell in row] for row in main_rows(document)]
    return _booktabs(document, "lrrrr", heads, rows)


def _verdicts(document: Mapping[str, Any]) -> str:
    claims = yaml.safe_load(document["config"])["claims"]
    level = f"{100 * (1 - claims['alpha']):g}"
    heads = ("claim", "primary metric", "mean", rf"{level}\,\% interval")
    heads += ("$d$", "$p$ (Holm)", "$n$", "verdict")
    rows = []
    for verdict in document["verdicts"]:
        claim = claims[verdict["name"]]
        bound = f"{_SIGN[claim['direction']]} {claim['than']:g}"
        if claim["direction"] == "equal":
            bound += rf" \pm {claim['margin']:g}"
        metric = f"{escape(verdict['metric'].replace('_', ' '))} ${bound}$"
        ends = f"[{number(verdict['low'])}, {number(verdict['high'])}]"
        word = verdict["word"].lower() + (" (exploratory)" if claims["exploratory"] else "")
        rows.append(
            [
                escape(verdict["name"]),
                metric,
                number(verdict["estimate"]),
                "--" if verdict["low"] is None else ends,
                number(verdict["effect_size"]),
                probability(verdict["p_adjusted"]),
                str(verdict["n"]),
                word,
            ]
        )
    return _booktabs(document, "llrrrrrl", heads, rows)


def _controls(document: Mapping[str, Any]) -> str:
    rows = []
    for name, simulation in document["simulations"].items():
        cells = [
            f"{item['mean']:.3f} [{item['ci_low']:.3f}, {item['ci_high']:.3f}]"
            for item in (document["metrics"][name][key] for key in ("power", "size"))
        ]
        said = simulation["targets"]
        passed = _PASSED.get(said, f"fail ({said.lower()})")
        size_of = escape(simulation["n"]).replace(" x ", r" $\times$ ")
        rows.append([escape(name), size_of, *cells, passed])
    power, size = document["targets"]["power"], document["targets"]["size"]
    heads = ("statistic", "$n$", rf"power ($\geq {power:g}$)", rf"size ($\leq {size:g}$)", "result")
    return _booktabs(document, "llrrl", heads, rows)


def _booktabs(
    document: Mapping[str, Any], columns: str, heads: Sequence[str], rows: Sequence[Sequence[str]]
) -> str:
    lines = [" & ".join(cells) + r" \\" for cells in (heads, *rows)]
    return "\n".join(
        [
            f"% Written by research.paper, run {document['config_hash']}; do not edit.",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )
