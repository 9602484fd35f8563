"""A Sphinx extension: every public name has a docstring and stands in the API pages.

Public is what ``adaptivenet.__all__`` lists, and what the ``__all__`` of each such module lists. A
name that falls short is a warning, and the build runs with ``-W``.
"""

from __future__ import annotations

import importlib
import types
import typing
from collections.abc import Iterator
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)


def public_names(module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, object) of a module and of its public names, modules included."""
    yield module.__name__, module
    if not hasattr(module, "__all__"):
        logger.warning("%s has no __all__", module.__name__, type="api", subtype="coverage")
        return
    for name in module.__all__:
        if name.startswith("__"):
            continue
        value = getattr(module, name)
        if isinstance(value, types.ModuleType):
            yield from public_names(value)
        else:
            yield f"{module.__name__}.{name}", value


def lacks_docstring(value: Any) -> bool:
    """Whether a module, class or function has no docstring; data and type aliases can have none."""
    alias = typing.get_origin(value) is not None or isinstance(value, types.UnionType)
    if alias or not (isinstance(value, types.ModuleType | type) or callable(value)):
        return False
    text = (getattr(value, "__doc__", None) or "").strip()
    # A NamedTuple or dataclass without a docstring gets a made-up one: its signature.
    return not text or (isinstance(value, type) and text.startswith(f"{value.__name__}("))


def check(app: Sphinx, exception: Exception | None) -> None:
    """Warn of each public name without a docstring or without an entry in the API pages."""
    if exception is not None or app.builder.name != "html":
        return
    domain = app.env.domains["py"]
    documented = {name for name, *_ in domain.get_objects()}
    count = 0
    for name, value in public_names(importlib.import_module("adaptivenet")):
        count += 1
        if name not in documented:
            logger.warning(
                "%s is missing from the API pages: give it a docstring; an alias or a constant "
                "gets a py:data entry in docs/api/",
                name,
                type="api",
                subtype="coverage",
            )
        if lacks_docstring(value):
            logger.warning("%s has no docstring", name, type="api", subtype="coverage")
    logger.info("API coverage: %d public names checked", count)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the check, which needs the finished build."""
    app.connect("build-finished", check)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
