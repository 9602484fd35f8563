"""Cells of the contract suite: every kind of parameters and every mode, in nine of 25 pairs."""

import pytest

from adaptivenet import testing

CELLS = [(subject, "scan") for subject in testing.SUBJECTS]
CELLS += [("dict", mode) for mode in testing.MODES if mode != "scan"]
every_cell = pytest.mark.parametrize(("subject", "mode"), CELLS)
