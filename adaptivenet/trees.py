"""Names and selections of the leaves of a parameter pytree.

A *synapse* is an element of a prunable leaf. By default these are the floating leaves of two or
more dimensions; ``select=`` chooses them by regular expressions on their path instead. Leaves that
are not chosen are represented by :class:`optax.MaskedNode`, an empty pytree node, so that a mask
has the structure of the parameters and yet holds arrays for synapses only.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

Class = TypeVar("Class", bound=type)
PyTree = Any
Select = str | Sequence[str] | None

# Positions within a leaf are 32-bit; a tree may be of any size.
LARGEST_LEAF = 2**32 - 1

__all__ = [
    "LARGEST_LEAF",
    "check_finite",
    "is_masked",
    "map_synapses",
    "merge_synapses",
    "paths",
    "register_dataclass",
    "select_leaves",
    "size",
    "synapses",
]


def register_dataclass(cls: Class) -> Class:
    """Makes a dataclass a pytree node, of a structure that equals no other class's.

    As :func:`jax.tree_util.register_dataclass`, in whose place it stands: under jaxlib 0.10.2 the
    structures of any two classes registered there compare equal where their numbers of fields and
    their static fields do. Their hashes differ, so that a jitted function mostly tells an instance
    of one from an instance of the other; where the hash table looks at both, it runs the program of
    the wrong class, and says nothing.

    Args:
      cls: a dataclass; fields with ``metadata={"static": True}`` are part of the structure and have
        to be hashable, all others are children. Rebuilt by a call with all fields by name.

    Returns:
      The class itself, so that this is a decorator.

    Raises:
      TypeError: if ``cls`` is no dataclass.

    >>> @register_dataclass
    ... @dataclasses.dataclass(frozen=True)
    ... class Scaled:
    ...     values: jax.Array
    ...     by: int = dataclasses.field(default=1, metadata={"static": True})
    >>> jax.tree.map(lambda x: x + 1, Scaled(2, by=3))
    Scaled(values=3, by=3)
    """
    fields = [field for field in dataclasses.fields(cls) if field.init]
    data = tuple(field.name for field in fields if not field.metadata.get("static", False))
    static = tuple(field.name for field in fields if field.metadata.get("static", False))
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in data)

    def flatten(node: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        children = tuple(getattr(node, name) for name in data)
        return children, tuple(getattr(node, name) for name in static)

    def flatten_with_keys(node: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        children, rest = flatten(node)
        return tuple(zip(keys, children, strict=True)), rest

    def unflatten(rest: tuple[Any, ...], children: Iterable[Any]) -> Any:
        known = zip((*data, *static), (*children, *rest), strict=True)
        return cls(**dict(known))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def is_masked(node: Any) -> bool:
    """Tells whether a node stands for a leaf that is not a synapse.

    Args:
      node: any node of a pytree.

    Returns:
      True for :class:`optax.MaskedNode`, which holds no array.

    >>> is_masked(optax.MaskedNode()), is_masked(1.0)
    (True, False)
    """
    return isinstance(node, optax.MaskedNode)


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute)).lstrip(".")
    return str(key)


@functools.lru_cache(maxsize=1024)
def _is_variable_type(kind: type) -> bool:
    # Recognized by name, because this floor does not import Flax.
    return any(
        base.__name__ in ("Variable", "VariableState") and base.__module__.startswith("flax.nnx")
        for base in kind.__mro__
    )


def _is_variable(node: Any) -> bool:
    return _is_variable_type(type(node))


def paths(tree: PyTree) -> tuple[str, ...]:
    """Names every leaf of a pytree by its path.

    Args:
      tree: any pytree: a Linen dict, an ``nnx.State``, an Equinox module, lists. Nodes that stand
        for leaves that are not synapses hold no leaf and are skipped.

    Returns:
      One string a leaf, in the order of ``jax.tree.leaves``; keys are joined by ``/`` and the
      trailing ``value`` of NNX variables is dropped.

    >>> paths({"dense1": {"kernel": 1.0, "bias": 2.0}, "scale": [3.0]})
    ('dense1/bias', 'dense1/kernel', 'scale/0')
    """
    names = []
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_variable):
        # NNX stores an array as the `value` of a Variable; Linen does not. Spell both alike.
        inner = jax.tree_util.tree_leaves_with_path(node) if _is_variable(node) else [((), node)]
        names += ["/".join(map(_key_name, (*path, *below[1:]))) for below, _ in inner]
    return tuple(names)


def size(tree: PyTree) -> int:
    """Counts the elements of all leaves, exactly (a Python integer).

    Args:
      tree: a pytree of arrays or of ``jax.ShapeDtypeStruct``.

    Returns:
      The number of elements.

    >>> size({"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)})
    16
    """
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree))


def _is_float(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _compile(select: str | Sequence[str]) -> list[re.Pattern[str]]:
    compiled = []
    for pattern in [select] if isinstance(select, str) else list(select):
        try:
            compiled.append(re.compile(pattern))
        except (re.error, TypeError) as error:
            raise ValueError(
                f"select={pattern!r} is not a regular expression: {error}. "
                "Give a pattern (or a list of them) such as 'dense.*/kernel'."
            ) from error
    if not compiled:
        raise ValueError("select=[] chooses nothing; leave it out to choose every matrix.")
    return compiled


def select_leaves(params: PyTree, select: Select = None) -> PyTree:
    """Chooses the prunable leaves of a parameter pytree.

    Args:
      params: pytree of arrays; floating leaves of any shape.
      select: regular expressions searched for in the paths (``re.search``). None chooses floating
        leaves of two or more dimensions.

    Returns:
      A pytree of Python bools, shaped like ``params`` (existing masked nodes stay).

    Raises:
      ValueError: a pattern matches no leaf, or nothing is chosen, or a chosen leaf is too large.
      TypeError: a chosen leaf is not of a floating dtype.

    >>> params = {"dense1": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}}
    >>> select_leaves(params)
    {'dense1': {'bias': False, 'kernel': True}}
    >>> select_leaves(params, "bias")
    {'dense1': {'bias': True, 'kernel': False}}
    """
    leaves, treedef = jax.tree.flatten(params)
    names = paths(params)
    if select is None:
        chosen = [_is_float(leaf) and jnp.ndim(leaf) >= 2 for leaf in leaves]
        if not any(chosen):
            raise ValueError(
                "no leaf is a floating array of two or more dimensions; name the leaves to prune "
                f"with select=. The leaves are: {_listing(names)}."
            )
    else:
        patterns = _compile(select)
        for pattern in patterns:
            if not any(pattern.search(name) for name in names):
                near = difflib.get_close_matches(pattern.pattern, names, n=1, cutoff=0.4)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"select={pattern.pattern!r} matches no leaf.{hint} "
                    f"The leaves are: {_listing(names)}."
                )
        chosen = [any(pattern.search(name) for pattern in patterns) for name in names]
    for leaf, name, is_chosen in zip(leaves, names, chosen, strict=True):
        if not is_chosen:
            continue
        if not _is_float(leaf):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise TypeError(
                f"leaf {name!r} has dtype {kind}; only floating leaves have synapses. "
                "Narrow select= so that it does not match this path."
            )
        if math.prod(leaf.shape) > LARGEST_LEAF:
            raise ValueError(
                f"leaf {name!r} has {math.prod(leaf.shape)} elements; a single leaf holds at most "
                f"{LARGEST_LEAF} because positions are 32-bit. Split it into several leaves."
            )
    return jax.tree.unflatten(treedef, chosen)


def _listing(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(names[:most]) or "(none)"
    return shown + (f", ... ({len(names)} in all)" if len(names) > most else "")


def synapses(params: PyTree, select: Select = None) -> PyTree:
    """Keeps the prunable leaves; every other one becomes an :class:`optax.MaskedNode`.

    Args:
      params: pytree of arrays.
      select: as for :func:`select_leaves`.

    Returns:
      A pytree with the chosen leaves of ``params``.

    Raises:
      ValueError, TypeError: as :func:`select_leaves`.

    >>> kept = synapses({"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)})
    >>> paths(kept), size(kept)
    (('kernel',), 12)
    """
    return jax.tree.map(
        lambda chosen, leaf: leaf if chosen else optax.MaskedNode(),
        select_leaves(params, select),
        params,
    )


def map_synapses(function: Callable[..., Any], mask: PyTree, *rest: PyTree) -> PyTree:
    """Maps a function over the synapses of a mask and the leaves of other trees beside them.

    (See :func:`merge_synapses` to keep the other leaves.)

    Args:
      function: called with the mask's leaf and the corresponding leaves of ``rest``.
      mask: pytree with an array for each prunable leaf and masked nodes elsewhere.
      *rest: pytrees that have at least the leaves of ``mask``.

    Returns:
      A pytree like ``mask``: results at synapses, masked nodes elsewhere.

    Raises:
      ValueError: a tree has another structure than the mask.

    >>> mask = {"bias": optax.MaskedNode(), "kernel": jnp.array([True, False])}
    >>> tree = {"bias": jnp.zeros(3), "kernel": jnp.array([2.0, 3.0])}
    >>> map_synapses(lambda m, x: int(m.sum()) * x, mask, tree)["kernel"].tolist()
    [2.0, 3.0]
    """
    leaves, treedef = jax.tree.flatten(mask, is_leaf=is_masked)
    columns = [leaves] + [_beside(mask, treedef, tree) for tree in rest]
    return jax.tree.unflatten(
        treedef,
        [row[0] if is_masked(row[0]) else function(*row) for row in zip(*columns, strict=True)],
    )


def merge_synapses(
    function: Callable[..., Any], mask: PyTree, tree: PyTree, *rest: PyTree
) -> PyTree:
    """Maps a function over synapses; other leaves of the first tree stay as they are.

    Args:
      function: called with the leaves of ``mask``, ``tree`` and ``rest``.
      mask: pytree with an array for each prunable leaf and masked nodes elsewhere.
      tree: pytree whose synapses are replaced.
      *rest: further pytrees.

    Returns:
      A pytree like ``tree``.

    Raises:
      ValueError: a tree has another structure than the mask.

    >>> mask = {"bias": optax.MaskedNode(), "kernel": jnp.array([True, False])}
    >>> tree = {"bias": 1.0, "kernel": jnp.array([2.0, 3.0])}
    >>> merge_synapses(lambda m, x: 0, mask, tree)
    {'bias': 1.0, 'kernel': 0}
    """
    leaves, treedef = jax.tree.flatten(mask, is_leaf=is_masked)
    columns = [leaves] + [_beside(mask, treedef, other) for other in (tree, *rest)]
    return jax.tree.unflatten(
        treedef,
        [row[1] if is_masked(row[0]) else function(*row) for row in zip(*columns, strict=True)],
    )


def _beside(mask: PyTree, treedef: Any, tree: PyTree) -> list[Any]:
    """The subtrees of a tree at the leaves of a mask."""
    try:
        return treedef.flatten_up_to(tree)
    except ValueError as error:
        if "flax.nnx" in str(error):
            raise ValueError(
                "the mask and the parameters wrap their arrays in different NNX variables: give "
                "nnx.as_pure(nnx.state(model, nnx.Param)) and nnx.as_pure(optimizer.opt_state)."
            ) from error
        raise ValueError(
            f"this mask belongs to another tree: its synapses are {_listing(paths(mask))}, but "
            f"the tree given has {_listing(paths(tree))}. Call init on the parameters that are "
            f"updated. ({error})"
        ) from error


def check_finite(tree: PyTree, what: str = "parameter") -> None:
    """Refuses leaves that hold nan, where their values are known (outside of jit).

    Args:
      tree: pytree of floating arrays; traced leaves are passed over.
      what: the word for a leaf in the message.

    Raises:
      ValueError: a leaf holds nan; the message names it.

    >>> check_finite({"kernel": jnp.array([1.0, jnp.nan])})
    Traceback (most recent call last):
      ...
    ValueError: parameter 'kernel' holds 1 nan of 2 elements; repair it before pruning.
    """
    for name, leaf in zip(paths(tree), jax.tree.leaves(tree), strict=True):
        if isinstance(leaf, jax.core.Tracer) or not _is_float(leaf):
            continue
        if isinstance(leaf, jax.Array):
            # Within a jit, operations on a known array would be traced.
            with jax.ensure_compile_time_eval():
                bad = int(jnp.isnan(leaf).sum()) if leaf.is_fully_addressable else 0
        else:
            bad = int(np.isnan(np.asarray(leaf, dtype=np.float64)).sum())
        if bad:
            raise ValueError(
                f"{what} {name!r} holds {bad} nan of {leaf.size} elements; "
                "repair it before pruning."
            )
