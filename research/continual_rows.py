"""The register of learners, and how a row is spelled."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from research import continual_methods as methods
from research.continual_beliefs import BELIEVING
from research.continual_lifelong import LIFELONG
from research.continual_methods import Facts, Learner
from research.continual_replay import REPLAYING

METHODS: dict[str, type[Learner]] = {
    "none": Learner,
    "joint": methods.Joint,
    "ewc": methods.Elastic,
    "online_ewc": methods.Online,
    "batched_ewc": methods.Batched,
    "proximal_ewc": methods.Proximal,
    "mas": methods.Aware,
    "si": methods.Path,
    "mesu": methods.Mesu,
    "bgd": methods.Bgd,
    **BELIEVING,
    **REPLAYING,
    **LIFELONG,
}


class Row(NamedTuple):
    """How a row is spelled: ``method``, ``method@strength`` or ``method@strength*keep``.

    Attributes:
      method: its name.
      strength: nan where it has none.
      keep: share of the memory that is kept at a boundary; 1 where nothing is said.
    """

    method: str
    strength: float = math.nan
    keep: float = 1.0


def read_row(name: str) -> Row:
    """Reads a row's name.

    Args:
      name: such as ``ewc@100``, or ``online_ewc@100*0.9``.

    Returns:
      The row.

    Raises:
      ValueError: no such method; a strength that is missing, below zero or not wanted; a share that
        is not wanted, or none.

    >>> read_row("online_ewc@100*0.9")
    Row(method='online_ewc', strength=100.0, keep=0.9)
    """
    rule, star, keep = name.partition("*")
    method, sign, strength = rule.partition("@")
    if method not in METHODS:
        raise ValueError(f"row {name!r}: no method {method!r}; there are {', '.join(METHODS)}.")
    if METHODS[method].needs_strength != bool(sign):
        wanted = "needs a strength, as in" if not sign else "has no strength; write"
        raise ValueError(f"row {name!r}: {method} {wanted} {method}{'@1.0' if not sign else ''}.")
    if star and not METHODS[method].fades:
        can = ", ".join(name for name, method in METHODS.items() if method.fades)
        raise ValueError(
            f"row {name!r}: the memory of {method} does not fade; write {rule}. ({can} fade.)"
        )
    value = _number(name, "a strength", strength) if sign else math.nan
    kept = _number(name, "what is kept", keep) if star else 1.0
    if sign and not value >= 0:  # nan neither
        raise ValueError(f"row {name!r}: a strength is a number >= 0, not {strength}.")
    if not 0 <= kept <= 1:
        raise ValueError(f"row {name!r}: what is kept is a share in [0, 1], not {keep}.")
    return Row(method, value, kept)


def _number(name: str, what: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"row {name!r}: {what} is a number, and {text!r} is not a number."
        ) from None


@functools.cache
def learner(row: str, facts: Facts) -> Learner:
    """The learner of a row; made once, so that its programs are compiled once."""
    method, strength, keep = read_row(row)
    return METHODS[method](facts, strength, keep)
