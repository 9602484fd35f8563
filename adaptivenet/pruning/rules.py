"""Rules by path: what holds for which leaves, by regular expressions; the first match wins."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["as_rules", "match"]

Rules = tuple[tuple[str, Any], ...]


def as_rules(rules: Mapping[str, Any] | Sequence[tuple[str, Any]], owner: str) -> Rules:
    """Checks patterns and freezes them, so that what holds them can be hashed.

    Args:
      rules: a mapping from regular expressions to values, or pairs, in order.
      owner: what they belong to, for the message.

    Returns:
      The pairs.

    Raises:
      ValueError: a pattern is not a regular expression.

    >>> as_rules({"dense.*": 1}, "ByPath")
    (('dense.*', 1),)
    """
    pairs = tuple((pattern, value) for pattern, value in dict(rules).items())
    for pattern, _ in pairs:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"{owner}: {pattern!r} is not a regular expression: {error}. "
                "Give a pattern such as 'dense.*/kernel'."
            ) from error
    return pairs


def match(rules: Rules, names: Sequence[str], owner: str) -> list[int | None]:
    """Finds the rule of every leaf.

    Args:
      rules: pairs of :func:`as_rules`.
      names: paths of the prunable leaves.
      owner: what the rules belong to, for the message.

    Returns:
      The place of the first rule whose pattern is found in the path (``re.search``); None where
      there is none.

    Raises:
      ValueError: a pattern is found in no path.

    >>> match((("kernel", 0.5),), ["dense1/kernel", "scale"], "PerPath")
    [0, None]
    """
    for pattern, _ in rules:
        if not any(re.search(pattern, name) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            shown = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if names[12:] else "")
            raise ValueError(
                f"{owner}: {pattern!r} matches no prunable leaf.{hint} They are: {shown}."
            )
    places: list[int | None] = []
    for name in names:
        found = (place for place, (pattern, _) in enumerate(rules) if re.search(pattern, name))
        places.append(next(found, None))
    return places
