"""Units that add nothing to any sum over them, and so could go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adaptivenet.pruning.tracing.axes import Atom, atoms, whereabouts
from adaptivenet.pruning.tracing.facts import Facts, given, learn
from adaptivenet.pruning.tracing.tape import Node, Tape


def learned(tape: Tape, leaves: Sequence[np.ndarray], data: Sequence[Any]) -> Facts:
    """What is known of a function with these parameters, for all inputs."""
    known = [given(leaf, varies=False) for leaf in leaves]
    return learn(tape, [*known, *(given(values, varies=True) for values in data)])


def dead_units(
    tape: Tape, leaves: list[np.ndarray], data: Sequence[Any], units: Sequence[Atom]
) -> dict[Atom, np.ndarray]:
    """Finds the units without which the function is the same.

    A unit that nothing reads makes those superfluous that only it reads, and so on: what a dead
    unit owns is set to zero until no further unit dies.

    Args:
      tape: the function; its first inputs are the leaves.
      leaves: the parameters; what belongs to dead units is zero in them afterwards.
      data: the other inputs, of the traced shapes; only their shapes matter.
      units: the atoms that may go.

    Returns:
      bool ``[count]`` an atom, True for the dead.
    """
    nodes = tape.inputs[: len(leaves)]
    gone = {atom: np.zeros(atom.count, bool) for atom in units}
    while True:
        facts = learned(tape, leaves, data)
        more = {atom: ~facts.adding(atom) & ~gone[atom] for atom in units}
        if not any(new.any() for new in more.values()):
            return gone
        for atom, new in more.items():
            gone[atom] |= new
        for number, node in enumerate(nodes):
            leaves[number] = cleared(leaves[number], node, gone)


def cleared(leaf: np.ndarray, node: Node, gone: Mapping[Atom, np.ndarray]) -> np.ndarray:
    """A parameter with zeros for all units that are gone."""
    for place, axis in enumerate(node.axes):
        for atom in dict.fromkeys(atoms(axis)):
            if atom not in gone or not gone[atom].any():
                continue
            for which in whereabouts(axis, atom):
                here = (which >= 0) & gone[atom][which]
                leaf = leaf.copy()
                leaf[(slice(None),) * place + (here,)] = 0
    return leaf
