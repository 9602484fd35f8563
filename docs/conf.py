"""Settings of the documentation site; ``make docs`` builds it without the network."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent))

import adaptivenet

project = "adaptivenet"
author = "The adaptivenet authors"
copyright = author
release = version = adaptivenet.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "api_coverage",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "adaptivenet"
html_copy_source = False

default_role = "code"  # a single backtick in a docstring is code
myst_heading_anchors = 3

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # the fields of a state stand once, in its docstring

# The names in a module's __all__ are its public names, wherever they are defined.
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88


def skip_fields_of_tuples(app, what, name, obj, skip, options):
    """Leave out "Alias for field number 0": the docstring of the class describes its fields."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app):
    """Connect the hook above."""
    app.connect("autodoc-skip-member", skip_fields_of_tuples)
