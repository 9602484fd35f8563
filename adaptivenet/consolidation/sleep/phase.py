"""A phase of sleep: a list of parts, each a function of its own.

A part is ``part(params, key) -> params`` or ``-> (params, report)``::

    night = {
        "replay": replay(loss, optax.adam(1e-3), draw, steps=500),
        "downscaling": keyless(downscale, factor=0.95),
        "pruning": pruning_of_unused(apply, inputs, batches=50, fraction=0.1),
    }
    params, report = sleep(params, night, key)
    mask = report["pruning"]["mask"]

Nothing here knows of the optimizer that learns while awake: its moments are of the parameters
before sleep, and are best started anew, or reset with :func:`adaptivenet.moments.reset_moments`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptivenet import trees
from adaptivenet.pruning.masks import landing

PyTree = Any
Part = Callable[[PyTree, jax.Array], Any]

__all__ = ["Part", "Replayed", "keyless", "replay", "sleep"]


def sleep(
    params: PyTree, parts: Mapping[str, Part] | Sequence[Part], key: jax.Array
) -> tuple[PyTree, dict[str, Any]]:
    """Runs the parts of a phase one after the other.

    Args:
      params: pytree of arrays.
      parts: parts by name, or a sequence, whose parts are named by their functions (and numbered
        from the second of a name on: ``replay``, ``replay_2``).
      key: random key; every part is given another.

    Returns:
      The parameters after the last part, and by name what the parts report, ``None`` for those that
      report nothing.

    Raises:
      TypeError: a part is no function.
      ValueError: a part returns something else than parameters like those it was given, alone or
        in a pair with a report. What a part raises itself says which part it was.

    >>> def halve(params, key):
    ...     return jax.tree.map(lambda p: p / 2, params)
    >>> def count(params, key):
    ...     return params, {"leaves": len(jax.tree.leaves(params))}
    >>> params, report = sleep({"w": jnp.ones(2)}, [halve, count], jax.random.key(0))
    >>> params["w"].tolist(), report
    ([0.5, 0.5], {'halve': None, 'count': {'leaves': 1}})
    """
    named = dict(parts) if isinstance(parts, Mapping) else _named(parts)
    report: dict[str, Any] = {}
    for turn, (name, part) in enumerate(named.items()):
        if not callable(part):
            raise TypeError(f"part {name!r} of the phase is {part!r}, not a function.")
        try:
            found = part(params, jax.random.fold_in(key, turn))
        except Exception as error:
            error.add_note(f"This was raised by part {name!r} of the sleep phase.")
            raise
        params, report[name] = _apart(name, params, found)
    return params, report


class Replayed(NamedTuple):
    """What :func:`replay` reports.

    Attributes:
      losses: ``[steps]``.
      opt_state: state of its optimizer after the last step, to go on from.
    """

    losses: jax.Array
    opt_state: PyTree


def replay(
    loss: Callable[[PyTree, Any], jax.Array],
    optimizer: optax.GradientTransformation,
    draw: Callable[[jax.Array], Any],
    *,
    steps: int,
    mask: PyTree | None = None,
    opt_state: PyTree | None = None,
) -> Part:
    """A part that trains on what is replayed: a scan of optimizer steps.

    Args:
      loss: ``loss(params, batch)``, a scalar.
      optimizer: any transformation.
      draw: ``draw(key) -> batch``, from a memory (``partial(draw, memory, batch_size=64)`` with the
        key in its place), a generator, or both; a loss that is random itself finds a key in a batch
        ``(examples, key)``.
      steps: how many.
      mask: pytree of bool, masked nodes for leaves that are not pruned: pruned synapses stay zero.
      opt_state: where the optimizer goes on; it starts anew by default.

    Returns:
      A part of a phase, which reports a :class:`Replayed`.

    Raises:
      ValueError: fewer than one step.

    >>> part = replay(lambda p, x: jnp.sum((p - x) ** 2), optax.sgd(0.5), lambda key: 3.0, steps=1)
    >>> params, report = part(jnp.zeros(()), jax.random.key(0))
    >>> params.item(), report.losses.tolist()
    (3.0, [9.0])
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive integer, not {steps!r}.")
    tx = optax.with_extra_args_support(optimizer)

    def replay(params: PyTree, key: jax.Array) -> tuple[PyTree, Replayed]:
        def step(carry: tuple[PyTree, PyTree], now: jax.Array) -> Any:
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, draw(now))
            updates, state = tx.update(grads, state, params)
            if mask is not None:
                updates = landing(updates, params, mask)
            return (optax.apply_updates(params, updates), state), value

        start = tx.init(params) if opt_state is None else opt_state
        carry, losses = jax.lax.scan(step, (params, start), jax.random.split(key, steps))
        return carry[0], Replayed(losses, carry[1])

    return replay


def keyless(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Part:
    """A part of a function that draws nothing.

    Args:
      function: ``function(params, *args, **kwargs)``.
      *args: passed on.
      **kwargs: passed on.

    Returns:
      A part of a phase.

    >>> keyless(lambda params, factor: factor * params, factor=2.0)(3.0, jax.random.key(0))
    6.0
    """

    @functools.wraps(function)
    def part(params: PyTree, key: jax.Array) -> Any:
        del key
        return function(params, *args, **kwargs)

    return part


def _named(parts: Sequence[Part]) -> dict[str, Part]:
    named: dict[str, Part] = {}
    for part in parts:
        name = _name(part)
        number = 1
        while (own := name if number == 1 else f"{name}_{number}") in named:
            number += 1
        named[own] = part
    return named


def _name(part: Any) -> str:
    while isinstance(part, functools.partial):
        part = part.func
    return getattr(part, "__name__", type(part).__name__)


def _apart(name: str, before: PyTree, found: Any) -> tuple[PyTree, Any]:
    """Parameters and report; parameters may be a pair themselves, which their structure tells."""
    structure = jax.tree.structure(before)
    report = None
    if jax.tree.structure(found) != structure:
        if not (isinstance(found, tuple) and len(found) == 2):
            raise ValueError(
                f"part {name!r} of the phase must return the parameters, or (parameters, report); "
                f"it returned {type(found).__name__} with the leaves "
                f"{', '.join(trees.paths(found)) or '(none)'}."
            )
        found, report = found
        if jax.tree.structure(found) != structure:
            raise ValueError(
                f"part {name!r} of the phase changed the parameters from {structure} to "
                f"{jax.tree.structure(found)}."
            )
    for path, old, new in zip(
        trees.paths(before), jax.tree.leaves(before), jax.tree.leaves(found), strict=True
    ):
        mine, theirs = ((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in (old, new))
        if mine != theirs:
            raise ValueError(
                f"part {name!r} of the phase changed leaf {path!r} from {mine[1]}{mine[0]} to "
                f"{theirs[1]}{theirs[0]}."
            )
    return found, report
