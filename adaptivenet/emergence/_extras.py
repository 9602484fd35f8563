"""Optional libraries: imported when first used, with a clear message when they are missing."""

from __future__ import annotations

import importlib
from typing import Any


class MissingExtra(ImportError):  # noqa: N818 - it is the extra that is missing
    """A library of an optional extra cannot be imported; the message says how to install it.

    >>> issubclass(MissingExtra, ImportError)
    True
    """


def require(module: str, extra: str = "research") -> Any:
    """Imports a module that only an extra of this package installs.

    Args:
      module: dotted name, as ``statsmodels.api``.
      extra: the extra that holds it.

    Returns:
      The module.

    Raises:
      MissingExtra: it cannot be imported.

    >>> require("math").gcd(4, 6)
    2
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise MissingExtra(
            f"this needs {library}, which cannot be imported ({error}); "
            f"run: pip install 'adaptivenet[{extra}]'",
            name=library,
        ) from error
