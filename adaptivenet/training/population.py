"""Many members in one program: a function mapped over a leading population axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax

Method = Literal["auto", "vmap", "map", "none"]

# Measured by `python -m research.benchmarks.populations`; see default_method.
_DEFAULT: dict[str, Method] = {"cpu": "vmap"}


def default_method(backend: str | None = None) -> Method:
    """Names the method that `over_population(method="auto")` takes on a backend.

    On the CPU the choice is measured on the founding MLP: vmap takes some 0.9 times the time of map
    on two cores (`research/benchmarks/populations.py` prints the ratios). Elsewhere it is "vmap",
    which fills a wide machine but was not measured.

    Args:
        backend: "cpu", "gpu" or "tpu"; by default the present one.

    Returns:
        "vmap" or "map".

    >>> default_method("gpu")
    'vmap'
    """
    return _DEFAULT.get(backend or jax.default_backend(), "vmap")


def over_population(
    fn: Callable[..., Any],
    in_axes: int | Sequence[int | None] | None = 0,
    *,
    method: Method = "auto",
    donate_argnums: int | Sequence[int] = (),
) -> Callable[..., Any]:
    """Maps a function over a leading population axis, and jits it.

    "vmap" runs all members at once; "map" (`jax.lax.map`) one after the other inside one program;
    "none" jits without mapping. Members get the same numbers from each method up to the rounding of
    batched matrix products (about 1e-6 relative a step in float32). Under "vmap" a `lax.cond` whose
    condition differs between members runs both branches in every step; a function with a costly
    rare branch is better served by "map".

    Args:
        fn: The function of one member, with positional arguments.
        in_axes: For each argument 0 (every leaf leads with the population axis) or `None` (shared
            by all members); one value stands for all arguments.
        method: "vmap", "map", "none", or "auto" for the measured default of the backend.
        donate_argnums: Arguments whose buffers the result may reuse; do not use them afterwards.

    Returns:
        The jitted function; results lead with the population axis.

    Raises:
        ValueError: If the method is unknown, an axis is neither 0 nor `None`, or none is 0; when
            called, if the arguments differ in number from the axes or in their population axis.

    >>> import jax.numpy as jnp
    >>> scale = over_population(lambda w, x: w * x, (0, None), method="map")
    >>> scale(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]))
    Array([[3., 4.],
           [6., 8.]], dtype=float32)
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}; got {method!r}")
    given = (in_axes,) if in_axes is None or isinstance(in_axes, int) else tuple(in_axes)
    if any(axis is not None and axis != 0 for axis in given) or (
        method != "none" and all(axis is None for axis in given)
    ):
        raise ValueError(f"in_axes must hold 0 (mapped) or None (shared), and a 0; got {in_axes}")
    if method == "auto":
        method = default_method()
    if method == "none":
        return jax.jit(fn, donate_argnums=donate_argnums)

    def mapped(*args: Any) -> Any:
        axes = given * len(args) if isinstance(in_axes, int) else given
        if len(axes) != len(args):
            raise ValueError(f"in_axes names {len(axes)} arguments, the call has {len(args)}")
        _check_members(args, axes)
        if method == "vmap":
            return jax.vmap(fn, axes)(*args)
        members = tuple(arg for arg, axis in zip(args, axes, strict=True) if axis == 0)

        def one(member: tuple[Any, ...]) -> Any:
            own = iter(member)
            return fn(
                *(next(own) if axis == 0 else arg for arg, axis in zip(args, axes, strict=True))
            )

        return jax.lax.map(one, members)

    return jax.jit(mapped, donate_argnums=donate_argnums)


def _check_members(args: Sequence[Any], axes: Sequence[int | None]) -> None:
    sizes = set()
    for number, (arg, axis) in enumerate(zip(args, axes, strict=True)):
        if axis is None:
            continue
        for path, leaf in jax.tree_util.tree_leaves_with_path(arg):
            if jax.numpy.ndim(leaf) == 0:
                raise ValueError(
                    f"argument {number}{jax.tree_util.keystr(path)} is mapped over the population "
                    "but has no axis"
                )
            sizes.add(jax.numpy.shape(leaf)[0])
    if len(sizes) != 1:
        raise ValueError(f"the mapped arguments disagree on the population size: {sorted(sizes)}")
