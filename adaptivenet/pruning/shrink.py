"""Models that really shrink: dead units are taken out of every array that has a slice for them.

:func:`shrink` takes any function of parameters and inputs with parameters that hold zeros, finds
the units that add nothing (:mod:`~adaptivenet.pruning.coupling`), and returns smaller parameters,
a function that takes them, and an optimizer state cut alike, so that training goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet import trees
from adaptivenet.pruning.coupling import Coupling, couple
from adaptivenet.pruning.slimming import slim_like, taken
from adaptivenet.pruning.tracing.absorb import absorb
from adaptivenet.pruning.tracing.costs import itemsize, macs, peak_bytes
from adaptivenet.pruning.tracing.dead import dead_units, learned
from adaptivenet.pruning.tracing.resized import evaluate

PyTree = Any

__all__ = ["Costs", "ShrinkReport", "Shrunk", "shrink"]

# Why axes stay that no one expects to go.
NATURAL = ("is an axis of the", "is a place in space", "is a single position", "counts parts")


class Costs(NamedTuple):
    """What a model costs on the traced inputs.

    Attributes:
      parameters: elements of all leaves.
      synapses: elements of the leaves that prune by default, of two or more dimensions.
      nonzero: those of them that are not zero.
      effective: those of them that are not zero and belong to no dead unit.
      bytes: of the parameters, stored densely.
      macs: multiply-accumulates of one evaluation.
      activations: peak bytes of intermediate values, as if nothing were fused.
    """

    parameters: int
    synapses: int
    nonzero: int
    effective: int
    bytes: int
    macs: int
    activations: int

    @property
    def sparsity(self) -> float:
        """Share of the synapses that are zero."""
        return 1 - self.nonzero / max(self.synapses, 1)

    @property
    def effective_sparsity(self) -> float:
        """Share of the synapses that are zero or lie on no path from input to output."""
        return 1 - self.effective / max(self.synapses, 1)


class ShrinkReport(NamedTuple):
    """What :func:`shrink` did.

    Attributes:
      before: what the given model costs.
      after: what the smaller one costs.
      units: units before and after, by group, of the groups that lost some.
      whole: groups that had to stay whole, and why; inputs, outputs and places in space aside.
      unabsorbed: why constant units were left that no bias could take up.
    """

    before: Costs
    after: Costs
    units: dict[str, tuple[int, int]]
    whole: dict[str, str]
    unabsorbed: tuple[str, ...]

    def __str__(self) -> str:
        """A table: before, after, and their ratio."""
        rows = [f"{'':22}{'before':>14}{'after':>14}{'ratio':>9}"]
        for name in ("parameters", "bytes", "macs", "activations"):
            old, new = getattr(self.before, name), getattr(self.after, name)
            ratio = f"{old / new:.2f}" if new else "-"
            rows.append(f"{name:22}{old:>14,}{new:>14,}{ratio:>9}")
        for name in ("sparsity", "effective_sparsity"):
            old, new = getattr(self.before, name), getattr(self.after, name)
            rows.append(f"{name.replace('_', ' '):22}{old:>14.4f}{new:>14.4f}")
        rows += [f"{name:40}{old:>8} -> {new}" for name, (old, new) in self.units.items()]
        rows += [f"{name} stays whole: {why}" for name, why in self.whole.items()]
        rows += [f"a constant unit was left: {why}" for why in self.unabsorbed]
        return "\n".join(rows)


class Shrunk(NamedTuple):
    """A smaller model.

    Attributes:
      apply: ``(params, *inputs) -> outputs`` for the smaller parameters and inputs of any batch
        size; the given function itself where that can take them.
      params: the smaller parameters.
      opt_state: the smaller optimizer state; None if none was given.
      report: what was done, and what it saved.
      kept: numbers of the units that stayed, by group, of the groups that lost some.
      coupling: the groups.
    """

    apply: Callable[..., Any]
    params: PyTree
    opt_state: PyTree
    report: ShrinkReport
    kept: dict[str, np.ndarray]
    coupling: Coupling


def shrink(
    apply: Callable[..., Any],
    params: PyTree,
    *inputs: Any,
    opt_state: PyTree = None,
    constants: bool = True,
    spare: bool = False,
) -> Shrunk:
    """Takes dead units out of a model.

    A unit is dead if it adds nothing to any sum over it, whatever the inputs: nothing reads it
    (all of its outgoing weights are zero), or what is read is zero. A unit that is the same for all
    inputs, because its incoming weights are zero, dies as well: what it gives is added to the
    biases behind it first. All that belongs to dead units goes: columns, biases, norms and their
    statistics, the rows of the next layer, moments of the optimizer, masks, a posterior.

    The outputs are those of the model as given, up to rounding; this is checked on the inputs.

    Args:
      apply: any function ``(params, *inputs) -> outputs`` that jax can trace.
      params: pytree of arrays, with exact zeros where they are pruned.
      *inputs: example inputs. Values matter to the final check alone.
      opt_state: state of the optimizer: whatever in it has the structure and the shapes of the
        parameters is cut like them. Other such trees (a posterior, an anchor) may be given in it,
        as a tuple with it.
      constants: whether units that are the same for all inputs are absorbed into biases.
      spare: whether one unit is kept of a group whose units are all dead; otherwise such a group
        is an error, as the model then ignores what goes through it.

    Returns:
      The smaller model. Without a dead unit it is the model as given.

    Raises:
      ValueError: the function cannot be traced; all units of a group are dead; the state is that
        of another model.
      RuntimeError: the smaller model does not give the outputs of the given one on the inputs;
        nothing is returned then. That is a fault of this function.

    References:
      Fang et al., "DepGraph: towards any structural pruning", CVPR 2023 (arXiv:2301.12900).
      Vysogorets and Kempe, "Connectivity matters: neural network pruning through the lens of
      effective sparsity", arXiv:2107.02306.

    >>> import adaptivenet as an
    >>> params = an.models.mlp_init(jax.random.key(0), (4, 8, 2))
    >>> params["dense2"]["kernel"] = params["dense2"]["kernel"].at[3:].set(0)
    >>> small = shrink(an.models.mlp, params, jnp.ones((1, 4)))
    >>> small.params["dense1"]["kernel"].shape, small.report.units
    ((4, 3), {'dense1/bias[0]': (8, 3)})
    """
    _check_leaves(params)
    coupling = couple(apply, params, *inputs)
    data = [np.asarray(leaf) if _plain(leaf) else leaf for leaf in jax.tree.leaves(inputs)]
    leaves = [np.array(leaf) for leaf in jax.tree.leaves(params)]
    units = {unit: g for unit, g in zip(coupling.units, coupling.groups, strict=True) if not g.why}
    before = _costs(coupling, leaves, _effective(coupling, leaves, data, units), {})
    left: list[str] = []
    if constants:
        left = absorb(coupling.tape, leaves, learned(coupling.tape, leaves, data))
    gone = dead_units(coupling.tape, leaves, data, list(units))
    kept = {}
    for unit, group in units.items():
        alive = np.flatnonzero(~gone[unit])
        if not len(alive):
            if not spare:
                raise ValueError(
                    f"all {group.count} units of {group.name} are dead, so the model ignores "
                    f"whatever goes through them ({group}). Prune less of it (a floor keeps every "
                    "layer alive), or keep one dead unit with spare=True."
                )
            alive = np.zeros(1, np.int64)
        if len(alive) < group.count:
            kept[group.name] = alive
    places = coupling.places(kept)
    treedef = jax.tree.structure(params)
    small = treedef.unflatten(
        jnp.asarray(taken(leaf, axes), old.dtype)
        for leaf, axes, old in zip(leaves, places, jax.tree.leaves(params), strict=True)
    )
    if opt_state is not None:
        opt_state = slim_like(opt_state, params, places)
    smaller = _chosen(apply, params, small, inputs, coupling, kept)
    flat = [np.asarray(leaf) for leaf in jax.tree.leaves(small)]
    effective = sum(int(np.count_nonzero(leaf)) for leaf in flat if leaf.ndim >= 2)
    report = ShrinkReport(
        before,
        _costs(coupling, flat, effective, kept),
        {g.name: (g.count, len(kept[g.name])) for g in coupling.free if g.name in kept},
        {g.name: g.why for g in coupling.groups if g.why and not g.why.startswith(NATURAL)},
        tuple(dict.fromkeys(left)),
    )
    return Shrunk(smaller, small, opt_state, report, kept, coupling)


def _check_leaves(params: PyTree) -> None:
    for path, leaf in zip(trees.paths(params), jax.tree.leaves(params), strict=True):
        if not hasattr(leaf, "shape") or not _plain(leaf):
            raise TypeError(
                f"params: {path} is a {type(leaf).__name__}; shrink() takes a pytree of arrays. "
                "Give what is no array (a key, an option) to the function itself."
            )


def _plain(leaf: Any) -> bool:
    return not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.extended))


def _effective(coupling: Coupling, leaves: Any, data: Any, units: Mapping[Any, Any]) -> int:
    """Synapses that are not zero once dead units are, constants not absorbed."""
    live = [leaf.copy() for leaf in leaves]
    dead_units(coupling.tape, live, data, list(units))
    return sum(int(np.count_nonzero(leaf)) for leaf in live if leaf.ndim >= 2)


def _costs(coupling: Coupling, leaves: Any, effective: int, kept: Any) -> Costs:
    keep = coupling.keeping(kept)
    synapses = [leaf for leaf in leaves if leaf.ndim >= 2]
    return Costs(
        sum(leaf.size for leaf in leaves),
        sum(leaf.size for leaf in synapses),
        sum(int(np.count_nonzero(leaf)) for leaf in synapses),
        effective,
        sum(leaf.size * itemsize(leaf.dtype) for leaf in leaves),
        macs(coupling.tape, keep),
        peak_bytes(coupling.tape, keep),
    )


def _chosen(
    apply: Callable[..., Any],
    params: PyTree,
    small: PyTree,
    inputs: tuple[Any, ...],
    coupling: Coupling,
    kept: dict[str, np.ndarray],
) -> Callable[..., Any]:
    """The function itself if it gives the same with smaller parameters, else a smaller one."""
    wanted = apply(params, *inputs)
    try:
        found = apply(small, *inputs)
    except Exception:
        found = None  # It insists on its own sizes, as Linen does.
    if found is not None and agree(wanted, found):
        return apply
    smaller = _Smaller(apply, params, inputs, coupling, kept)
    if not agree(wanted, smaller(small, *inputs)):
        raise RuntimeError(
            "the smaller model does not give the outputs of the given one; it is not returned. "
            f"Please report this, with these groups:\n{coupling}"
        )
    return smaller


def agree(one: PyTree, other: PyTree) -> bool:
    """Whether outputs are the same up to rounding."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False

    def close(a: Any, b: Any) -> bool:
        if jnp.shape(a) != jnp.shape(b) or not _plain(a):
            return jnp.shape(a) == jnp.shape(b)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale = float(np.max(np.abs(a), initial=1.0, where=np.isfinite(a)))
        return bool(np.allclose(a, b, rtol=1e-4, atol=1e-5 * scale, equal_nan=True))

    return all(jax.tree.leaves(jax.tree.map(close, one, other)))


class _Smaller:
    """The function, retraced at its old sizes and evaluated at the new ones.

    What is written in the function as a number, such as the divisor of a mean over units, stays.
    A trace is made for every new shape of the inputs.
    """

    def __init__(
        self,
        apply: Callable[..., Any],
        params: PyTree,
        inputs: tuple[Any, ...],
        coupling: Coupling,
        kept: dict[str, np.ndarray],
    ) -> None:
        self._apply, self._kept = apply, kept
        self._old = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
        self._traces = {_signature(inputs): coupling}
        self._positions = coupling.places(kept)

    def __call__(self, params: PyTree, *inputs: Any) -> Any:
        key = _signature(inputs)
        if key not in self._traces:
            self._traces[key] = self._traced(inputs)
        coupling = self._traces[key]
        leaves = [*jax.tree.leaves(params), *jax.tree.leaves(inputs)]
        outputs = evaluate(coupling.tape, leaves, coupling.keeping(self._kept))
        return jax.tree.unflatten(coupling.outputs, outputs)

    def _traced(self, inputs: tuple[Any, ...]) -> Coupling:
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype), inputs
        )
        coupling = couple(self._apply, self._old, *shapes)
        free = [group.name for group in coupling.free]
        tied = [name for name in self._kept if name not in free]
        if tied:
            raise ValueError(
                f"with inputs of shapes {jax.tree.map(jnp.shape, inputs)} the units of "
                f"{', '.join(tied)} cannot be told from others; shrink with inputs of this shape."
            )
        return coupling


def _signature(inputs: Any) -> Any:
    leaves, treedef = jax.tree.flatten(inputs)
    return treedef, tuple((jnp.shape(leaf), str(jnp.asarray(leaf).dtype)) for leaf in leaves)
