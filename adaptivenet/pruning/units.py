"""Unit pruning by need: which coupled units to give up so that a model fits a budget.

The scores are those of synapses, pooled over all that belongs to a unit in whatever parameters it
has slices of. What a choice costs is counted in the trace of the model, where multiply-accumulates
fall with the product of the widths on both sides, or measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet import trees
from adaptivenet.pruning.coupling import Coupling
from adaptivenet.pruning.tracing.axes import whereabouts
from adaptivenet.pruning.tracing.costs import itemsize, macs
from adaptivenet.pruning.tracing.dead import cleared, dead_units

PyTree = Any
Kept = dict[str, np.ndarray]
Kind = Literal["parameters", "bytes", "macs"]

__all__ = ["choose_units", "removable_groups", "unit_mask", "unit_scores", "zero_units"]


def unit_scores(
    coupling: Coupling,
    scores: PyTree,
    *,
    pooling: Literal["sum", "mean"] = "sum",
    normalise: bool = True,
) -> dict[str, np.ndarray]:
    """Scores of coupled units, from the scores of everything that belongs to them.

    A unit is worth the absolute value of the sum, so that a signed score such as ``w * g`` gives
    the first-order Taylor estimate of the unit as a whole.

    Args:
      coupling: the units.
      scores: pytree shaped like the parameters, from any score; masked nodes, and leaves of other
        dtypes than floating, count nothing.
      pooling: the "sum" over all elements of a unit, or their "mean".
      normalise: whether each group is divided by the mean of its units, so that groups of unlike
        layers compete.

    Returns:
      float64 ``[count]`` by name of the group, of the groups that may lose units.

    Raises:
      ValueError: the scores are not shaped like the parameters, or not finite.

    References:
      Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019; Fang et al.,
      "DepGraph: towards any structural pruning", CVPR 2023 (arXiv:2301.12900), for groups and
      their normalisation.

    >>> import adaptivenet as an
    >>> params = an.models.mlp_init(jax.random.key(0), (2, 3, 2))
    >>> coupling = an.pruning.couple(an.models.mlp, params, jnp.ones((1, 2)))
    >>> scores = unit_scores(coupling, jax.tree.map(jnp.ones_like, params), normalise=False)
    >>> {name: values.tolist() for name, values in scores.items()}  # 2 in, 1 bias, 2 out
    {'dense1/bias[0]': [5.0, 5.0, 5.0]}
    """
    leaves = jax.tree.leaves(scores, is_leaf=trees.is_masked)
    nodes = coupling.leaves
    if len(leaves) != len(nodes):
        raise ValueError(
            f"scores= has {len(leaves)} leaves where the parameters have {len(nodes)}; give a tree "
            "shaped like them, with masked nodes where nothing is scored."
        )
    sums = {unit: np.zeros(unit.count) for unit in coupling.units}
    sizes = {unit: np.zeros(unit.count) for unit in coupling.units}
    for path, leaf, node in zip(coupling.paths, leaves, nodes, strict=True):
        if trees.is_masked(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        values = np.asarray(leaf, np.float64)
        if values.shape != tuple(node.aval.shape):
            raise ValueError(
                f"scores= has shape {values.shape} for {path}, which has {node.aval.shape}."
            )
        if not np.isfinite(values).all():
            raise ValueError(f"scores= is not finite for {path}.")
        for place, axis in enumerate(node.axes):
            along = values.sum(axis=tuple(d for d in range(values.ndim) if d != place))
            each = values.size // max(values.shape[place], 1)
            for unit in sums:
                for which in whereabouts(axis, unit):
                    here = which >= 0
                    np.add.at(sums[unit], which[here], along[here])
                    np.add.at(sizes[unit], which[here], each)
    found = {}
    for unit, group in zip(coupling.units, coupling.groups, strict=True):
        if group.why:
            continue
        worth = np.abs(sums[unit] / sizes[unit] if pooling == "mean" else sums[unit])
        found[group.name] = worth / (worth.mean() or 1.0) if normalise else worth
    return found


def zero_units(coupling: Coupling, params: PyTree, kept: Mapping[str, np.ndarray]) -> PyTree:
    """Sets everything that belongs to the units that are given up to zero.

    Args:
      coupling: the units.
      params: the parameters.
      kept: numbers of the units that stay, by group; all stay of a group that is not named.

    Returns:
      The parameters, of the same shapes; :func:`~adaptivenet.pruning.shrink` takes the zeros out.

    Raises:
      ValueError: a group is unknown, or its units have to stay.

    >>> import adaptivenet as an
    >>> params = an.models.mlp_init(jax.random.key(0), (2, 3, 2))
    >>> coupling = an.pruning.couple(an.models.mlp, params, jnp.ones((1, 2)))
    >>> params = zero_units(coupling, params, {"dense1/bias[0]": [0, 2]})
    >>> (params["dense2"]["kernel"] != 0).any(axis=1).tolist()
    [True, False, True]
    """
    gone = _gone(coupling, kept)
    leaves, treedef = jax.tree.flatten(params)
    found = [
        jnp.asarray(cleared(np.asarray(leaf), node, gone), leaf.dtype)
        for leaf, node in zip(leaves, coupling.leaves, strict=True)
    ]
    return treedef.unflatten(found)


def unit_mask(coupling: Coupling, params: PyTree, kept: Mapping[str, np.ndarray]) -> PyTree:
    """The same choice as a mask: True for every element of the units that stay.

    Args:
      coupling: the units.
      params: the parameters.
      kept: as in :func:`zero_units`.

    Returns:
      Pytree of bool shaped like the parameters, biases and norms included.

    >>> import adaptivenet as an
    >>> params = an.models.mlp_init(jax.random.key(0), (2, 3, 2))
    >>> coupling = an.pruning.couple(an.models.mlp, params, jnp.ones((1, 2)))
    >>> unit_mask(coupling, params, {"dense1/bias[0]": [0, 2]})["dense1"]["bias"].tolist()
    [True, False, True]
    """
    ones = jax.tree.map(lambda leaf: jnp.ones(jnp.shape(leaf), bool), params)
    return zero_units(coupling, ones, kept)


def choose_units(
    coupling: Coupling,
    scores: Mapping[str, np.ndarray],
    target: float,
    *,
    kind: Kind = "macs",
    per_cost: bool = False,
    floor: int = 1,
    multiple: int = 1,
    cost: Callable[[Kept], float] | None = None,
) -> Kept:
    """Chooses the units that stay, so that what is left costs a share of the whole.

    Units of all groups give way in the order of their scores until the cost is met. Costs are
    those of the whole model, counted anew for every choice: a unit is cheaper where its neighbours
    are gone.

    Args:
      coupling: the units.
      scores: of :func:`unit_scores`; groups that are not named stay whole.
      target: share of the cost that may be left, in (0, 1].
      kind: "macs" of one evaluation, or "bytes" or number of "parameters".
      per_cost: whether units give way in the order of score per cost, what one unit less of its
        group saves of the whole model.
      floor: units of a group that stay whatever they score.
      multiple: groups keep a multiple of so many units (or all), for kernels that want that.
      cost: another cost of a choice, such as a measured time: ``kept -> number``, called for
        about ``log2(units)`` choices; the model as it is with ``{}``.

    Returns:
      Numbers of the units that stay, by group, of the groups that lose some.

    Raises:
      ValueError: a group is unknown or has to stay, the target is out of range, or cannot be met
        with the floor.

    References:
      Fang et al., "DepGraph: towards any structural pruning", CVPR 2023 (arXiv:2301.12900);
      Gordon et al., "MorphNet", CVPR 2018, for shares of a constrained resource.

    >>> import adaptivenet as an
    >>> params = an.models.mlp_init(jax.random.key(0), (8, 6, 2))
    >>> coupling = an.pruning.couple(an.models.mlp, params, jnp.ones((1, 8)))
    >>> scores = {"dense1/bias[0]": np.array([3.0, 1.0, 6.0, 2.0, 5.0, 4.0])}
    >>> {name: kept.tolist() for name, kept in choose_units(coupling, scores, 0.5).items()}
    {'dense1/bias[0]': [2, 4, 5]}
    """
    if not 0 < target <= 1:
        raise ValueError(f"target must be in (0, 1], a share of the cost, not {target}.")
    if floor < 1 or multiple < 1:
        raise ValueError(f"floor and multiple must be at least 1, not {floor} and {multiple}.")
    _check_names(coupling, scores)
    counted = cost or _counted(coupling, kind)
    whole = float(counted({}))
    names = sorted(scores)
    worth = {name: np.asarray(scores[name], np.float64) for name in names}
    if per_cost:
        for name in names:
            saved = whole - float(counted({name: np.arange(1, len(worth[name]))}))
            worth[name] = worth[name] / max(saved, 1e-30)
    # The best of every group are out of reach; the others go by score, then by place.
    order = []
    for number, name in enumerate(names):
        ranked = np.argsort(worth[name], kind="stable")[: max(len(worth[name]) - floor, 0)]
        order += [(worth[name][unit], number, int(unit)) for unit in ranked]
    order.sort()

    def left(count: int) -> Kept:
        gone: dict[str, list[int]] = {name: [] for name in names}
        for _, number, unit in order[:count]:
            gone[names[number]].append(unit)
        kept = {}
        for name in names:
            total = len(worth[name])
            spared = -(total - len(gone[name])) % multiple
            # The last to go come back until the number fits.
            lost = gone[name][: max(len(gone[name]) - spared, 0)]
            if lost:
                kept[name] = np.setdiff1d(np.arange(total), lost)
        return kept

    low, high = 0, len(order)
    if counted(left(high)) > target * whole:
        raise ValueError(
            f"{target} of the cost cannot be met: with {floor} unit(s) of each group left, "
            f"{counted(left(high)) / whole:.3f} of it remain. Raise the target, lower floor= or "
            "multiple=, or give scores for more groups."
        )
    while low < high:
        middle = (low + high) // 2
        if counted(left(middle)) <= target * whole:
            high = middle
        else:
            low = middle + 1
    return left(high)


def removable_groups(coupling: Coupling, params: PyTree, *inputs: Any) -> tuple[str, ...]:
    """Groups whose units are dead once they are zero.

    A stream that a layer norm averages over is not: zeros take part in its variance.

    Args:
      coupling: the units.
      params: the parameters.
      *inputs: example inputs.

    Returns:
      Names of groups.

    >>> import adaptivenet as an
    >>> params = an.models.mlp_init(jax.random.key(0), (2, 3, 2))
    >>> coupling = an.pruning.couple(an.models.mlp, params, jnp.ones((1, 2)))
    >>> removable_groups(coupling, params, jnp.ones((1, 2)))
    ('dense1/bias[0]',)
    """
    found = []
    for unit, group in zip(coupling.units, coupling.groups, strict=True):
        if group.why or group.count < 2:
            continue
        zeroed = zero_units(coupling, params, {group.name: np.arange(1, group.count)})
        leaves = [np.array(leaf) for leaf in jax.tree.leaves(zeroed)]
        if dead_units(coupling.tape, leaves, jax.tree.leaves(inputs), [unit])[unit][0]:
            found.append(group.name)
    return tuple(found)


def _counted(coupling: Coupling, kind: Kind) -> Callable[[Kept], float]:
    if kind not in ("parameters", "bytes", "macs"):
        raise ValueError(f"kind must be 'parameters', 'bytes' or 'macs', not {kind!r}.")
    if kind == "macs":
        return lambda kept: macs(coupling.tape, coupling.keeping(kept))

    def stored(kept: Kept) -> float:
        sizes = [[len(axis) for axis in leaf] for leaf in coupling.places(kept)]
        each = [itemsize(n.aval.dtype) if kind == "bytes" else 1 for n in coupling.leaves]
        return sum(int(np.prod(s)) * e for s, e in zip(sizes, each, strict=True))

    return stored


def _check_names(coupling: Coupling, kept: Mapping[str, Any]) -> None:
    known = {group.name: group for group in coupling.groups}
    for name, values in kept.items():
        if name not in known:
            raise ValueError(f"no group {name!r}; there are {', '.join(known)}.")
        if known[name].why:
            raise ValueError(f"the units of {name} have to stay: it {known[name].why}.")
        if len(np.shape(values)) != 1:
            raise ValueError(f"{name}: give a vector, not shape {np.shape(values)}.")


def _gone(coupling: Coupling, kept: Mapping[str, np.ndarray]) -> dict[Any, np.ndarray]:
    _check_names(coupling, kept)
    gone = {}
    for unit, group in zip(coupling.units, coupling.groups, strict=True):
        if group.name in kept:
            gone[unit] = np.ones(group.count, bool)
            gone[unit][np.asarray(kept[group.name], np.int64)] = False
    return gone
