"""Reads the paper's text: every number that it prints must come from a results file."""

from __future__ import annotations

import re

# Arguments that name things, and lengths; neither is read as a number.
_NAMES = re.compile(
    r"\\(?:[Cc]ite\w*|\w*ref|label|input|include|includegraphics|n|verdict|url|bibliography)\*?"
    r"(?:\[[^\]]*\])*\{[^{}]*\}"
)
_LENGTH = re.compile(
    r"\d*\.?\d+(?:\\(?:text|line|column|paper)(?:width|height)|(?:pt|em|ex|cm|mm|in)\b)"
)
_CODE = re.compile(r"\\begin\{(verbatim|lstlisting)\}.*?\\end\{\1\}", re.DOTALL)
_CONSTANT = re.compile(r"(?<!\\)%\s*constant\b")
_COMMENT = re.compile(r"(?<!\\)%.*")
_GROUPED = re.compile(r"(?<=\d)(?:\{,\}|\\,)(?=\d{3})")
_NUMBER = re.compile(
    r"(?<![A-Za-z\d.])(?P<number>\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)"
    r"(?P<percent>(?:[\s~$]|\\,)*(?:\\%|per\s?cent\b))?"
)
_YEAR = re.compile(r"(?:19|20)\d\d")


def typed_numbers(text: str) -> list[tuple[int, str]]:
    r"""Numbers that the text holds itself, where a macro should stand.

    Found are decimal numbers, numbers with a per cent sign, and numbers of three digits or more but
    years (19xx, 20xx). Left out are what stands before ``\begin{document}``, comments, lines marked
    ``% constant``, names (arguments of ``\cite``, ``\ref``, ``\label``, ``\input``,
    ``\includegraphics``, ``\n``, ``\verdict``, ``\url``), lengths, and code in ``verbatim``.

    Args:
      text: of a LaTeX file.

    Returns:
      Line number, counted from 1, and number.

    >>> typed_numbers("It keeps \\n{main/auto/accuracy} of 10 classes\nand 98.2\\,\\% since 2018.")
    [(2, '98.2\\,\\%')]
    """
    start = text.find(r"\begin{document}")
    body = "\n" * text.count("\n", 0, max(start, 0)) + text[max(start, 0) :]
    body = _CODE.sub(_newlines, body)
    lines = ["" if _CONSTANT.search(line) else _COMMENT.sub("", line) for line in body.split("\n")]
    body = _NAMES.sub(_newlines, "\n".join(lines))
    body = _GROUPED.sub("", _LENGTH.sub("", body))
    typed = []
    for found in _NUMBER.finditer(body):
        digits = found["number"].replace(",", "")
        long = len(digits) >= 3 and not _YEAR.fullmatch(found["number"])
        if "." in digits or found["percent"] or long:
            line = body.count("\n", 0, found.start()) + 1
            typed.append((line, " ".join(found.group().split())))
    return typed


def macros_used(text: str) -> list[str]:
    r"""Names that the text prints by ``\n{name}``."""
    return sorted(set(re.findall(r"\\n\{([^}#]+)\}", text)))


def verdicts_claimed(text: str) -> list[tuple[str, str]]:
    r"""Claims with the word that the text has for each, by ``\verdict{study/claim}{word}``.

    >>> verdicts_claimed(r"It grows (\verdict{trial/h1}{supported}).")
    [('trial/h1', 'supported')]
    """
    return sorted(set(re.findall(r"\\verdict\{([^}#]+)\}\{([^}#]+)\}", text)))


def sources(text: str, library: str) -> dict[str, bool]:
    r"""Keys that the text cites, and whether the library (BibTeX) has each.

    >>> sources(r"As shown \citep{lecun1990obd,nobody}.", "@article{lecun1990obd,\n}")
    {'lecun1990obd': True, 'nobody': False}
    """
    listed = set(re.findall(r"@\w+\{\s*([^,\s]+)\s*,", library))
    lists = re.findall(r"\\[Cc]ite\w*\*?(?:\[[^\]]*\])*\{([^{}]*)\}", text)
    keys = sorted({key.strip() for found in lists for key in found.split(",")})
    return {key: key in listed for key in keys}


def _newlines(found: re.Match[str]) -> str:
    """As many lines as were there, so that those that follow keep their numbers."""
    return "\n" * found.group().count("\n")
