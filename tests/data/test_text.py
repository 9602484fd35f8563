from __future__ import annotations

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from adaptivenet.data import DataError, Text, split_text

LETTERS = Text("toy", "abcabcabc", "cab", ("a", "b", "c"))
WORDS = Text("toy", "to be\n", "be", ("\n", "be", "to"), level="word")


@hypothesis.given(st.text("abc"))
def test_characters_round_trip(text: str) -> None:
    codes = LETTERS.encode(text)
    assert codes.dtype == np.int32
    assert LETTERS.decode(codes) == text


def test_words() -> None:
    assert WORDS.encode("to  be\nbe\n").tolist() == [2, 1, 0, 1, 0]
    assert WORDS.decode([2, 1]) == "to be"


def test_unknown_symbols_and_codes_are_named() -> None:
    with pytest.raises(DataError, match="symbol 'd' is not among the 3"):
        LETTERS.encode("abd")
    for codes in ([3], [-1]):
        with pytest.raises(DataError, match="vocabulary has 3 symbols"):
            LETTERS.decode(codes)


def test_the_validation_part_is_the_end_of_train() -> None:
    parts = split_text(LETTERS, 1 / 3)
    assert (parts.train, parts.validation, parts.test) == ("abcabc", "abc", "cab")
    with pytest.raises(DataError, match="already"):
        split_text(parts, 1)
    for count in (0, 9, -1, 1.0, True, "x"):
        with pytest.raises(DataError, match="validation"):
            split_text(LETTERS, count)


def test_bad_vocabularies_and_levels_are_refused() -> None:
    with pytest.raises(DataError, match="sorted"):
        Text("toy", "a", "a", ("b", "a"))
    with pytest.raises(DataError, match="level"):
        Text("toy", "a", "a", ("a",), level="byte")
