"""`Text`: a corpus for language models, with its split and its vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adaptivenet.data.errors import DataError

__all__ = ["Text", "split_text"]


@dataclass(frozen=True, eq=False)
class Text:
    r"""A text corpus and its contiguous parts.

    Attributes:
        name: honest name, as it should be printed.
        train: training text.
        test: test text, for one use at the end.
        vocabulary: symbols, sorted; the code of a symbol is its position.
        level: "character" (a symbol is a character) or "word" (words, and "\n" for line ends).
        source: where the text comes from.
        licence: terms of the text.
        sha256: fingerprint of the text as loaded.
        validation: text cut from the end of `train` by `split_text`, else None.

    >>> text = Text("toy", train="abba", test="cab", vocabulary=("a", "b", "c"))
    >>> text.encode("cab").tolist(), text.decode([0, 1])
    ([2, 0, 1], 'ab')
    """

    name: str
    train: str
    test: str
    vocabulary: tuple[str, ...]
    level: str = "character"
    source: str = ""
    licence: str = ""
    sha256: str = ""
    validation: str | None = None

    def __post_init__(self) -> None:
        """Check the level and the vocabulary."""
        if self.level not in ("character", "word"):
            raise DataError(f"level must be 'character' or 'word', not {self.level!r}")
        if list(self.vocabulary) != sorted(set(self.vocabulary)):
            raise DataError(f"{self.name}: the vocabulary must be sorted, without repeats")

    def __repr__(self) -> str:
        """One line: name, lengths and size of the vocabulary."""
        validation = "none" if self.validation is None else f"{len(self.validation)}"
        return (
            f"Text({self.name!r}: train {len(self.train)}, validation {validation}, test "
            f"{len(self.test)} characters; {len(self.vocabulary)} {self.level} symbols)"
        )

    def encode(self, text: str) -> np.ndarray:
        """Turn text into codes.

        Args:
            text: characters, or words with white space between.

        Returns:
            [symbols] int32 positions in the vocabulary.

        Raises:
            DataError: a symbol is not in the vocabulary.
        """
        codes = {symbol: code for code, symbol in enumerate(self.vocabulary)}
        try:
            return np.array([codes[symbol] for symbol in symbols(text, self.level)], np.int32)
        except KeyError as error:
            raise DataError(
                f"{self.name}: the symbol {error.args[0]!r} is not among the "
                f"{len(codes)} symbols of its vocabulary"
            ) from None

    def decode(self, codes: Sequence[int] | np.ndarray) -> str:
        """Turn codes back into text (words are joined by one space).

        Args:
            codes: positions in the vocabulary.

        Returns:
            The text.

        Raises:
            DataError: a code is outside the vocabulary.
        """
        array = np.asarray(codes, dtype=np.int64)
        if array.size and not (array.min() >= 0 and array.max() < len(self.vocabulary)):
            raise DataError(
                f"{self.name}: codes run from {array.min()} to {array.max()}, "
                f"but the vocabulary has {len(self.vocabulary)} symbols"
            )
        return (" " if self.level == "word" else "").join(self.vocabulary[code] for code in array)


def symbols(text: str, level: str) -> list[str]:
    r"""Cut a text into the symbols of a level.

    >>> symbols("to be\nor", "word")
    ['to', 'be', '\n', 'or']
    """
    if level == "character":
        return list(text)
    words: list[str] = []
    for number, line in enumerate(text.split("\n")):
        if number:
            words.append("\n")
        words.extend(line.split())
    return words


def split_text(text: Text, validation: int | float) -> Text:
    """Cut the end of the training text as validation part; nothing is shuffled.

    Args:
        text: a corpus without a validation part.
        validation: characters (int), or share of the training text (float in (0, 1)).

    Returns:
        A new corpus.

    Raises:
        DataError: there is a validation part already, or a part would be empty.

    >>> split_text(Text("toy", "abcabc", "a", ("a", "b", "c")), 2).validation
    'bc'
    """
    if text.validation is not None:
        raise DataError(f"{text.name} has a validation part already; split the loaded text")
    if isinstance(validation, bool) or not isinstance(validation, (int, float)):
        raise DataError(f"validation must be an int or a float, not {validation!r}")
    count = round(validation * len(text.train)) if isinstance(validation, float) else validation
    if not 0 < count < len(text.train):
        raise DataError(
            f"{text.name}: validation={validation} would hold {count} of {len(text.train)} "
            "training characters"
        )
    cut = len(text.train) - count
    return dataclasses.replace(text, train=text.train[:cut], validation=text.train[cut:])
