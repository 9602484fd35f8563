"""Which axes of which parameters are one unit, found in the trace of a function.

A hidden neuron is a column of one kernel, an element of a bias, a row of the next kernel; a channel
of a residual stream is a slice of everything that writes to the stream or reads it. :func:`couple`
finds these groups in the jaxpr of any function of parameters and inputs, without a rule for any
kind of layer: it follows every axis through products, convolutions, norms, sums, concatenations,
reshapes, loops. What it cannot follow stays whole, and says why.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from adaptivenet import trees
from adaptivenet.pruning.tracing import rules
from adaptivenet.pruning.tracing.axes import Atom, Axis, atoms, fix, positions, size, unify
from adaptivenet.pruning.tracing.tape import Node, Tape, contracted, record

PyTree = Any
Kept = Mapping[str, np.ndarray]

__all__ = ["Coupling", "Group", "couple"]


@dataclass(frozen=True)
class Group:
    """Units that stand and fall together, and everything that belongs to one of them.

    Attributes:
      name: path and axis of its first member, such as ``dense1/kernel[1]``.
      count: how many units.
      members: path and axis of every parameter that has a slice for each of them.
      why: why they have to stay; empty if they may go.
    """

    name: str
    count: int
    members: tuple[tuple[str, int], ...]
    why: str = ""

    def __str__(self) -> str:
        """One line: the count, the members, and why it stays."""
        where = ", ".join(f"{path}[{axis}]" for path, axis in self.members)
        return f"{self.count} x {where}" + (f"; stays: {self.why}" if self.why else "")


@dataclass(frozen=True, eq=False)
class Coupling:
    """The units of a function's parameters.

    Attributes:
      groups: all of them, those that have to stay as well.
      paths: of the parameters, as ``trees.paths`` names them.
      tape: the traced function.
      leaves: the parameters in it.
      outputs: structure of what the function returns.
      units: the symbolic units that each group is.
    """

    groups: tuple[Group, ...]
    paths: tuple[str, ...]
    tape: Tape
    leaves: tuple[Node, ...]
    units: tuple[Atom, ...]
    outputs: Any = None

    @property
    def free(self) -> tuple[Group, ...]:
        """The groups whose units may be taken out."""
        return tuple(group for group in self.groups if not group.why)

    def keeping(self, kept: Kept) -> Callable[[Atom], np.ndarray]:
        """Which units of an atom stay, of a selection by the groups' names."""
        names = {atom: group.name for atom, group in zip(self.units, self.groups, strict=True)}

        def keep(atom: Atom) -> np.ndarray:
            chosen = kept.get(names.get(atom, ""))
            return np.arange(atom.count) if chosen is None else np.asarray(chosen)

        return keep

    def places(self, kept: Kept) -> list[list[np.ndarray]]:
        """Which positions of every axis of every parameter stay.

        Args:
          kept: numbers of the units that stay, ascending, by name of their group; all stay of a
            group that is not named.

        Returns:
          One list a parameter, one array of ascending positions an axis.

        >>> import adaptivenet as an
        >>> params = an.models.mlp_init(jax.random.key(0), (4, 3, 2))
        >>> found = couple(an.models.mlp, params, np.ones((1, 4), "float32"))
        >>> [[len(axis) for axis in leaf] for leaf in found.places({"dense1/bias[0]": [0, 2]})]
        [[2], [4, 2], [2], [2, 2]]
        """
        keep = self.keeping(kept)
        return [[positions(axis, keep) for axis in node.axes] for node in self.leaves]

    def __str__(self) -> str:
        """A drawing in text: one paragraph a group, those that may go first."""
        parts = []
        for title, chosen in (
            ("may go", self.free),
            ("stay", [group for group in self.groups if group.why]),
        ):
            if not chosen:
                continue
            parts.append(f"units that {title}:")
            for group in chosen:
                where = ", ".join(f"{path}[{axis}]" for path, axis in group.members)
                lines = textwrap.wrap(where, 80, break_long_words=False)
                if group.why:
                    lines.append(f"({group.why})")
                parts += [f"{group.count:7d}  {lines[0]}", *(f"{'':9}{line}" for line in lines[1:])]
        return "\n".join(parts)


def couple(
    apply: Callable[..., Any],
    params: PyTree,
    *inputs: Any,
    stay: Sequence[str] = (),
    tie: Sequence[tuple[str, str]] = (),
) -> Coupling:
    """Finds which axes of which parameters are one unit.

    The function is traced, not run: parameters and inputs may be ``jax.ShapeDtypeStruct``. No layer
    has a rule; ``stay`` and ``tie`` add what a trace cannot know.

    Args:
      apply: any function ``(params, *inputs) -> outputs`` that jax can trace: a Linen module's
        ``apply``, what ``models.functional`` makes of an NNX module, a function of one's own.
      params: pytree of arrays.
      *inputs: pytrees of arrays of the shapes that the function will see.
      stay: regular expressions on paths of parameters: no unit goes that has a slice of them.
      tie: pairs of axes, each spelled as in a group's name, such as ``dense1/kernel[1]``: units of
        the one stand and fall with those of the other, position by position.

    Returns:
      The units, each with all parameters that hold a slice of it. Axes of inputs and of outputs
      stay, and what meets something that nothing is known of.

    Raises:
      ValueError: the function cannot be traced, because its shapes depend on the data; a pattern
        matches nothing; an axis that is tied does not exist, or is not as long as the other.

    References:
      Fang et al., "DepGraph: towards any structural pruning", CVPR 2023 (arXiv:2301.12900).

    >>> import adaptivenet as an
    >>> params = an.models.mlp_init(jax.random.key(0), (784, 128, 10))
    >>> print(couple(an.models.mlp, params, np.ones((1, 784), "float32")))
    units that may go:
        128  dense1/bias[0], dense1/kernel[1], dense2/kernel[0]
    units that stay:
        784  dense1/kernel[0]
             (is an axis of the inputs)
         10  dense2/bias[0], dense2/kernel[1]
             (is an axis of the outputs)
    """
    count = len(jax.tree.leaves(params))
    closed, outputs = _traced(apply, params, *inputs)
    nodes = [Node(var.aval) for var in closed.jaxpr.invars]
    for node in nodes[:count]:
        node.axes = [(Atom(n),) if n != 1 else () for n in node.aval.shape]
    for node in nodes[count:]:
        _fix(node, "is an axis of the inputs")
    tape = record(closed, nodes, rules.apply, rules.deeper)
    for node in tape.outputs:
        _fix(node, "is an axis of the outputs")
    names = trees.paths(params)
    for pair in tie:
        _tie(dict(zip(names, nodes[:count], strict=True)), pair)
    for pattern in stay:
        pairs = zip(names, nodes[:count], strict=True)
        chosen = [node for name, node in pairs if re.search(pattern, name)]
        if not chosen:
            raise ValueError(f"stay: {pattern!r} matches no parameter of {', '.join(names)}.")
        for node in chosen:
            _fix(node, f"is to stay, by {pattern!r}")
    found: dict[Atom, list[tuple[str, int]]] = {}
    for name, node in zip(names, nodes[:count], strict=True):
        for place, axis in enumerate(node.axes):
            for atom in dict.fromkeys(atoms(axis)):
                found.setdefault(atom, []).append((name, place))
    summed = set(_summed(tape))
    for atom in found:
        if atom not in summed:
            atom.why = atom.why or "is summed nowhere, with inputs of these shapes"
    return Coupling(tuple(_named(found)), names, tape, tuple(nodes[:count]), tuple(found), outputs)


def _summed(tape: Tape) -> Iterator[Atom]:
    """Units over which something sums: what does not is no hidden unit."""
    for step in tape.steps:
        for part in step.parts:
            yield from _summed(part)
        for node, dims in contracted(step):
            for place in dims:
                yield from atoms(node.axes[place])


def _fix(node: Node, why: str) -> None:
    for axis in node.axes:
        fix(axis, why)


def _tie(nodes: Mapping[str, Node], pair: tuple[str, str]) -> None:
    """Makes two axes one, by the user's word."""
    axes: list[Axis] = []
    for name in pair:
        spelled = re.fullmatch(r"(.*)\[(\d+)\]", name)
        node = nodes.get(spelled[1]) if spelled else None
        if node is None or spelled is None or int(spelled[2]) >= len(node.axes):
            raise ValueError(
                f"tie: {name!r} is no axis: write path[axis], of the parameters {', '.join(nodes)}."
            )
        axes.append(node.axes[int(spelled[2])])
    one, other = map(size, axes)
    if one != other:
        raise ValueError(f"tie: {pair[0]} has {one} positions, and {pair[1]} has {other}.")
    unify(axes[0], axes[1], f"is tied, {pair[0]} to {pair[1]}, and they are divided otherwise")


def _named(found: Mapping[Atom, Sequence[tuple[str, int]]]) -> list[Group]:
    """Groups with names of their own: an axis may hold several, as heads times head dimensions."""
    groups: list[Group] = []
    taken: dict[str, int] = {}
    for atom, members in found.items():
        path, axis = members[0]
        name = f"{path}[{axis}]"
        taken[name] = taken.get(name, 0) + 1
        if taken[name] > 1:
            name += f".{taken[name]}"
        groups.append(Group(name, atom.count, tuple(members), atom.why))
    return groups


def _traced(apply: Callable[..., Any], params: PyTree, *inputs: Any) -> tuple[Any, Any]:
    try:
        closed, shapes = jax.make_jaxpr(apply, return_shape=True)(params, *inputs)
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.NonConcreteBooleanIndexError,
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerBoolConversionError,
        jax.errors.TracerIntegerConversionError,
    ) as error:
        raise ValueError(
            "the function cannot be traced: shapes or branches in it depend on the values of its "
            "parameters or inputs. Units are found in a trace; write it with jnp.where, or "
            "jax.lax.cond, and fixed shapes."
        ) from error
    return closed, jax.tree.structure(shapes)
