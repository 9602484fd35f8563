"""The register of learners, and how a row is spelled."""

from __future__ import annotations

import functools
import math

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


def read_row(name: str) -> tuple[str, float]:
    """Reads a row's name.

    Args:
      name: such as ``ewc@100``.

    Returns:
      The method, and its strength (nan where it has none).

    Raises:
      ValueError: no such method; a strength that is missing, below zero or not wanted.

    >>> read_row("ewc@100")
    ('ewc', 100.0)
    """
    method, sign, strength = name.partition("@")
    if method not in METHODS:
        raise ValueError(f"row {name!r}: no method {method!r}; there are {', '.join(METHODS)}.")
    if METHODS[method].needs_strength != bool(sign):
        wanted = "needs a strength, as in" if not sign else "has no strength; write"
        raise ValueError(f"row {name!r}: {method} {wanted} {method}{'@1.0' if not sign else ''}.")
    if not sign:
        return method, math.nan
    try:
        value = float(strength)
    except ValueError:
        raise ValueError(f"row {name!r}: {strength!r} is not a number.") from None
    if not value >= 0:
        raise ValueError(f"row {name!r}: a strength is a number >= 0, not {strength}.")
    return method, value


@functools.cache
def learner(row: str, facts: Facts) -> Learner:
    """The learner of a row; made once, so that its programs are compiled once."""
    method, strength = read_row(row)
    return METHODS[method](facts, strength)
