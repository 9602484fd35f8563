"""Optional libraries: loaded late, and missed with a message that helps."""

from __future__ import annotations

import subprocess
import sys

import pytest

from adaptivenet.emergence import _extras
from adaptivenet.emergence import statistics as package


def test_a_missing_library_says_how_to_install_it(monkeypatch):
    with pytest.raises(_extras.MissingExtra, match=r"pip install 'adaptivenet\[research\]'") as got:
        _extras.require("no_such_library.part")
    assert got.value.name == "no_such_library"
    assert isinstance(got.value, ImportError)
    for function, library in [
        (lambda: package.dip([1.0, 2.0, 3.0, 4.0]), "diptest"),
        (lambda: package.kaplan_meier([1, 2], [1, 1]), "lifelines"),
    ]:
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(_extras.MissingExtra, match=f"needs {library}"):
            function()


def test_importing_statistics_loads_no_library_of_the_extra():
    code = (
        "import sys, adaptivenet.emergence.statistics\n"
        "heavy = {'scipy.stats', 'sklearn', 'statsmodels', 'pandas', 'lifelines', 'diptest', "
        "'patsy', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_is_listed_once_in_order():
    assert package.__all__ == sorted(set(package.__all__))
    assert all(hasattr(package, name) for name in package.__all__)
