"""Flax NNX modules that really shrink."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptivenet import pruning
from adaptivenet.models.functional import taken_apart
from adaptivenet.pruning.shrink import agree
from adaptivenet.pruning.slimming import taken


class ShrunkModule(NamedTuple):
    """A smaller module.

    Attributes:
        model: The smaller module: of the same class where that gives the same outputs, else a
            `TracedModule`.
        optimizer: The smaller optimizer; None if none was given.
        report: What was done, and what it saved.
        kept: Numbers of the units that stayed, by group, of the groups that lost some.
    """

    model: nnx.Module
    optimizer: nnx.Optimizer | None
    report: pruning.ShrinkReport
    kept: dict[str, np.ndarray]


class TracedModule(nnx.Module):
    """A function of parameters as a module, for a class that insists on its own sizes.

    A trace of the original module is evaluated on smaller arrays, so whatever it counts with as a
    number (the scale of attention, the divisor of a norm) stays what it was.

    Args:
        apply: `(params, *inputs) -> outputs`.
        state: The variables, nested by the names of the original module.
    """

    def __init__(self, apply: Callable[..., Any], state: nnx.State):
        self.apply = apply
        self.variables = nnx.data(_nested(state))

    def __call__(self, *inputs: Any) -> Any:
        """Evaluates the function on the variables."""
        values = jax.tree.map(
            lambda variable: variable.get_value(),
            self.variables,
            is_leaf=lambda node: isinstance(node, nnx.Variable),
        )
        return self.apply(values, *inputs)


def shrink(
    model: nnx.Module,
    *inputs: Any,
    optimizer: nnx.Optimizer | None = None,
    constants: bool = True,
    spare: bool = False,
) -> ShrunkModule:
    """Takes dead units out of an NNX module: `pruning.shrink` on all of its variables.

    Parameters, statistics of norms and whatever else the module keeps in variables shrink
    together; random keys stay. A Linen module needs no function of its own:
    `pruning.shrink(module.apply, variables, x)`.

    Args:
        model: The module, with exact zeros where it is pruned, as it is to be evaluated (call
            `model.eval()` first, so that no statistics are updated in the trace).
        *inputs: Example inputs.
        optimizer: Of the module; what it remembers of each parameter is cut alike.
        constants: Whether units that are the same for all inputs are absorbed into biases.
        spare: Whether one unit is kept of a group whose units are all dead; else an error.

    Returns:
        The smaller module and its optimizer; the ones given are not changed.

    Raises:
        TypeError: If `model` is not an NNX module.
        ValueError: As `pruning.shrink`; or the optimizer is that of another module.

    References:
        Fang et al., "DepGraph: towards any structural pruning", CVPR 2023 (arXiv:2301.12900).

    >>> from flax import nnx
    >>> from adaptivenet.models import MLP
    >>> model = MLP((4, 8, 2), rngs=nnx.Rngs(0))
    >>> kernel = model.dense2.kernel
    >>> kernel.set_value(kernel.get_value().at[3:].set(0))
    >>> small = shrink(model, jnp.ones((1, 4)))
    >>> small.model.dense1.kernel.shape, small.model(jnp.ones((5, 4))).shape
    ((4, 3), (5, 2))
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"models.shrink() takes a flax.nnx.Module, got {type(model).__name__}; for a Linen "
            "module or a function use pruning.shrink(apply, params, *inputs)."
        )
    params, rebuild = taken_apart(model, nnx.Not(nnx.RngState))

    def apply(params: Any, *inputs: Any) -> Any:
        return rebuild(params)(*inputs)

    small = pruning.shrink(apply, params, *inputs, constants=constants, spare=spare)
    rebuilt = rebuild(small.params)
    for _, part in nnx.iter_modules(rebuilt):
        _refit(part)
    if not _same(apply(params, *inputs), rebuilt, inputs):
        state = nnx.state(rebuilt, nnx.Not(nnx.RngState))
        rebuilt = TracedModule(small.apply, state)
    smaller = None
    if optimizer is not None:
        places = dict(zip(_flat(params), small.coupling.places(small.kept), strict=True))
        smaller = _optimizer(optimizer, rebuilt, _flat(params), places)
    return ShrunkModule(rebuilt, smaller, small.report, small.kept)


def _nested(state: nnx.State) -> Any:
    """The variables in plain dicts."""
    found: dict[Any, Any] = {}
    for path, variable in nnx.to_flat_state(state):
        inner = found
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = variable
    return found


def _flat(params: Any) -> dict[tuple[Any, ...], Any]:
    """Arrays by path."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        found[tuple(key.key for key in path)] = leaf
    return found


def _same(wanted: Any, model: nnx.Module, inputs: tuple[Any, ...]) -> bool:
    try:
        found = model(*inputs)  # pyright: ignore[reportCallIssue]
    except Exception:
        return False  # It insists on its own sizes.
    return agree(wanted, found)


def _refit(module: Any) -> None:
    """Sets the sizes that a layer remembers to those of its arrays."""
    kind = type(module).__name__
    if not type(module).__module__.startswith("flax.nnx"):
        return
    if kind in ("Linear", "LinearGeneral", "Conv") and not isinstance(module.in_features, tuple):
        shape = module.kernel.shape
        if kind == "Conv":
            groups = module.in_features // max(shape[-2], 1)
            if module.feature_group_count > 1:
                # Depthwise and grouped: as many groups as outputs, or as before.
                groups = shape[-1] if shape[-2] == 1 else module.feature_group_count
                module.feature_group_count = groups
                module.in_features = shape[-2] * groups
            else:
                module.in_features = shape[-2]
            module.kernel_shape = shape
        else:
            module.in_features = shape[0]
        module.out_features = shape[-1]
    elif kind == "LinearGeneral":
        shape, inputs = module.kernel.shape, len(module.in_features)
        module.in_features, module.out_features = shape[:inputs], shape[inputs:]
    elif kind == "Embed":
        module.num_embeddings, module.features = module.embedding.shape
    elif kind in ("BatchNorm", "LayerNorm", "RMSNorm"):
        for name in ("scale", "bias", "mean"):
            variable = getattr(module, name, None)
            if isinstance(variable, nnx.Variable):
                module.num_features = variable.shape[-1]
    elif kind in ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell"):
        for name in ("dense_h", "hi", "hr"):
            inner = getattr(module, name, None)
            if inner is not None:
                module.hidden_features = inner.kernel.shape[0]
    elif kind == "MultiHeadAttention":
        shape = module.query.kernel.shape
        module.num_heads, module.head_dim = shape[-2:]
        module.in_features, module.qkv_features = shape[0], shape[-2] * shape[-1]
        module.out_features = module.out.kernel.shape[-1]


def _optimizer(
    optimizer: nnx.Optimizer, model: nnx.Module, old: dict[Any, Any], places: dict[Any, Any]
) -> nnx.Optimizer:
    """A new optimizer of the smaller module, with what the old one remembers."""
    graph, state = nnx.split(optimizer)
    found = []
    hits = 0
    for path, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        owner = next((path[i:] for i in range(len(path)) if path[i:] in old), None)
        if owner is not None and jnp.size(value) > 1:
            if jnp.shape(value) != jnp.shape(old[owner]):
                raise ValueError(
                    f"the optimizer holds {jnp.shape(value)} for {'/'.join(map(str, owner))}, "
                    f"which has shape {jnp.shape(old[owner])}: it is that of another module, or "
                    "keeps rows and columns, which cannot be cut. Start it anew."
                )
            value = taken(value, places[owner])
            hits += 1
        found.append((path, variable.replace(value)))
    if not hits and any(jnp.size(v.get_value()) > 1 for _, v in nnx.to_flat_state(state)):
        raise ValueError("nothing that the optimizer remembers belongs to this module.")
    if not isinstance(model, TracedModule):
        return nnx.merge(graph, nnx.from_flat_state(found))
    # Its variables lie one level deeper.
    smaller = nnx.Optimizer(model, optimizer.tx, wrt=optimizer.wrt)
    graph, state = nnx.split(smaller)
    known = dict(found)
    moved = [
        (path, known[tuple(name for name in path if name != "variables")])
        for path, _ in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(moved))
