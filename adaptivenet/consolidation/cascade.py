r"""Complex synapses: a chain of hidden variables, ever slower, behind every weight.

The weight is the first of a row of beakers, each larger than the one before it and joined to it by
a tube that is narrower. What learning pours into the first seeps into the others, and flows back
when the weight is pushed elsewhere: old values pull, each on its own time scale, and a memory fades
as the square root of time instead of exponentially. No boundary between tasks is needed::

    tx = optax.chain(optax.adam(1e-3), cascade(8, rate=0.01), prune(...))
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet import trees
from adaptivenet.consolidation.boundary import check_strength, copied, nothing_yet
from adaptivenet.posterior._arrays import known, wide
from adaptivenet.posterior._states import cast

PyTree = Any
Number = Any  # a Python number, or a traced scalar
Step = Literal["implicit", "explicit"]

__all__ = ["CascadeState", "cascade", "diffuse", "memory_trace"]


class CascadeState(NamedTuple):
    """State of :func:`cascade`; the first level are the parameters themselves.

    Attributes:
      hidden: the levels from the second to the last, a pytree like the parameters each, in float32
        (float64 for float64 parameters); masked nodes for leaves without hidden levels. (They are
        parameter-like, so that :func:`adaptivenet.moments.reset_moments` empties all the levels of
        a synapse that wakes, and that a mesh shards them as it does the parameters.)
    """

    hidden: tuple[PyTree, ...]


def cascade(
    levels: int,
    *,
    base: Number = 2.0,
    rate: Number = 0.01,
    leak: Number = 0.0,
    step: Step = "implicit",
    select: trees.Select = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gives every weight hidden variables that it is pulled by: put it after the optimizer.

    Behind the weight :math:`u_1` are :math:`u_2, \dots, u_m`, with

    .. math::

       C_k \frac{du_k}{dt} = g_{k-1} (u_{k-1} - u_k) + g_k (u_{k+1} - u_k), \qquad
       C_k = b^{k-1}, \quad g_k = r\, b^{-(k-1)},

    to whose first line the optimizer adds its update. Level k follows on the time scale
    :math:`b^{2(k-1)} / r` steps, so that m levels span :math:`1 / r` to :math:`b^{2(m-1)} / r`:
    across that range the trace of a change fades as one over the square root of time. The state
    takes ``levels - 1`` times the memory of the parameters. They start at the parameters, in
    equilibrium. (The article's capacities, :math:`2^{k-1}`, and tubes, :math:`2^{-k-2}`, have the
    base 2 and the rate 1/8.)

    Nothing that rescales updates may follow it, since what flows out of the weight must flow into
    the next level; a pruner may (a dead synapse's levels fade to zero with it).

    Args:
      levels: m, the number of variables a synapse, the weight included; at least 2.
      base: b, above 1: the ratio of the capacities of neighbours, and of the tubes.
      rate: r, the flow between the first two levels in a step per unit of their difference; not
        negative, and 0 leaves the updates as they are.
      leak: of the last level towards zero, as a share of the tube that would follow, ``leak *
        g_m``; 1 as in the article. Without it :math:`\sum_k C_k u_k` changes by updates only.
      step: ``"implicit"`` solves for the levels after the step (backward Euler, a tridiagonal
        system), stable for all rates; ``"explicit"`` computes flows before the step, as others do,
        and is refused where it would be unstable.
      select: regular expressions on paths; None takes all floating leaves.

    Returns:
      A transformation.

    Raises:
      ValueError: a number is out of range, the explicit step is unstable, ``step`` is unknown; at
        ``init``: a pattern matches nothing, or the last level would move by less than its dtype
        resolves. At ``update``: no parameters.
      TypeError: at ``init``: a chosen leaf is not of a floating dtype.

    References:
      Benna and Fusi, "Computational principles of synaptic memory consolidation", Nature
      Neuroscience 19 (2016), for the model; Kaplanis, Shanahan and Clopath, "Continual
      reinforcement learning with complex synapses", ICML 2018, arXiv:1802.07239, for deep networks.

    >>> tx, params = cascade(2, base=2.0, rate=0.5, step="explicit"), {"w": jnp.array([1.0])}
    >>> state = tx.init(params)._replace(hidden=({"w": jnp.array([3.0])},))
    >>> updates, state = tx.update({"w": jnp.array([0.25])}, state, params)
    >>> updates["w"], state.hidden[0]["w"]  # 0.25 + 0.5 * (3 - 1), and 3 - 0.5 * (3 - 1) / 2
    (Array([1.25], dtype=float32), Array([2.5], dtype=float32))
    """
    _check(levels, base, rate, leak, step)

    def init(params: PyTree) -> CascadeState:
        empty = nothing_yet(params, select)
        _check_resolution(empty, levels, base, rate)
        # A copy for each level: buffers that are shared cannot be donated.
        return CascadeState(tuple(copied(empty, params) for _ in range(levels - 1)))

    def update(
        updates: PyTree, state: CascadeState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, CascadeState]:
        del extra
        if params is None:
            raise ValueError(
                "cascade() needs the parameters: call tx.update(grads, opt_state, params)."
            )
        if len(state.hidden) != levels - 1:
            raise ValueError(
                f"this state has {len(state.hidden) + 1} levels, but cascade() was built for "
                f"{levels}: call init again, or build it with levels={len(state.hidden) + 1}."
            )

        def advance(first: jax.Array, push: Any, param: Any, *rest: jax.Array) -> Any:
            u = (param.astype(first.dtype), first, *rest)
            push = push.astype(first.dtype)
            flows = _flows(u, push, base, rate, leak, step)
            return _pour((push, *u[1:]), flows, base)

        rows = trees.map_synapses(advance, state.hidden[0], updates, params, *state.hidden[1:])
        moves = trees.merge_synapses(
            lambda _, update, row: row[0].astype(update.dtype), state.hidden[0], updates, rows
        )
        hidden = tuple(
            trees.map_synapses(lambda _, row, k=k: row[k], state.hidden[0], rows)
            for k in range(1, levels)
        )
        return moves, CascadeState(hidden)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def diffuse(
    values: jax.Array,
    push: Any = 0.0,
    *,
    base: Number = 2.0,
    rate: Number = 0.01,
    leak: Number = 0.0,
    step: Step = "implicit",
) -> jax.Array:
    """One step of the chain on plain arrays: what :func:`cascade` does to each weight.

    Args:
      values: ``[levels, ...]``, the first level first.
      push: ``[...]``, or a number; added to the first level in this step.
      base: as for :func:`cascade`.
      rate: as for :func:`cascade`.
      leak: as for :func:`cascade`.
      step: as for :func:`cascade`.

    Returns:
      The values after the step, ``[levels, ...]``.

    Raises:
      ValueError: as :func:`cascade`.

    >>> diffuse(jnp.array([1.0, 0.0]), base=2.0, rate=0.5, step="explicit").tolist()
    [0.5, 0.25]
    """
    _check(len(values), base, rate, leak, step)
    values = wide(values)
    u = tuple(values)
    push = jnp.broadcast_to(cast(push, values), u[0].shape)
    flows = _flows(u, push, base, rate, leak, step)
    return jnp.stack(_pour((u[0] + push, *u[1:]), flows, base))


def memory_trace(
    levels: int,
    steps: int,
    *,
    base: Number = 2.0,
    rate: Number = 0.01,
    leak: Number = 0.0,
    step: Step = "implicit",
) -> jax.Array:
    """What is left in the weight of one unit of change, step by step.

    By the superposition of a linear system, it is the weight with which every update of the past
    counts in the parameters of today.

    Args:
      levels: as for :func:`cascade`.
      steps: how many steps to follow it for.
      base: as for :func:`cascade`.
      rate: as for :func:`cascade`.
      leak: as for :func:`cascade`.
      step: as for :func:`cascade`.

    Returns:
      ``[steps]``: after the step that makes the change, and after each that follows.

    Raises:
      ValueError: as :func:`cascade`.

    >>> memory_trace(2, 3, base=2.0, rate=0.5, step="explicit").tolist()
    [1.0, 0.5, 0.375]
    """
    _check(levels, base, rate, leak, step)

    def advance(u: jax.Array, push: jax.Array) -> tuple[jax.Array, jax.Array]:
        u = diffuse(u, push, base=base, rate=rate, leak=leak, step=step)
        return u, u[0]

    start = jnp.zeros(levels, jnp.result_type(float))
    return jax.lax.scan(advance, start, jnp.zeros(steps, start.dtype).at[0].set(1.0))[1]


def _tubes(levels: int, base: Any, rate: Any, leak: Any) -> list[Any]:
    """The conductance behind each level; the last is that of the leak."""
    tubes = [rate * base ** float(-k) for k in range(levels)]
    return [*tubes[:-1], leak * tubes[-1]]


def _flows(
    u: tuple[jax.Array, ...], push: jax.Array, base: Any, rate: Any, leak: Any, step: str
) -> list[jax.Array]:
    """What flows into each level from the one behind it; into the last from the ground at zero."""
    base, rate, leak = (cast(x, push) for x in (base, rate, leak))
    tubes = _tubes(len(u), base, rate, leak)
    if step == "implicit":
        u = _solve((u[0] + push, *u[1:]), tubes, base)
    behind = [*u[1:], jnp.zeros_like(u[-1])]
    return [g * (b - a) for g, a, b in zip(tubes, u, behind, strict=True)]


def _pour(u: tuple[jax.Array, ...], flows: list[jax.Array], base: Any) -> tuple[jax.Array, ...]:
    """Levels after the flows: what one loses the other gains, so that sums stay to rounding."""
    base = cast(base, u[0])
    poured = [u[0] + flows[0]]
    for k in range(1, len(u)):
        poured.append(u[k] + (flows[k] - flows[k - 1]) * base ** float(-k))
    return tuple(poured)


def _solve(u: tuple[jax.Array, ...], tubes: list[Any], base: Any) -> tuple[jax.Array, ...]:
    """The levels x with ``C (x - u) = flows(x)``, by Thomas's algorithm.

    The matrix is diagonally dominant, hence no pivots are needed; its factors are numbers that all
    weights share.
    """
    pivot = 1.0 + tubes[0]  # the first capacity is 1
    shares, lines = [tubes[0] / pivot], [u[0] / pivot]
    for k in range(1, len(u)):
        capacity, before = base ** float(k), tubes[k - 1]
        pivot = capacity + tubes[k] + before * (1.0 - shares[-1])
        lines.append((capacity * u[k] + before * lines[-1]) / pivot)
        shares.append(tubes[k] / pivot)
    solved = [lines[-1]]  # behind the last level is the ground, at zero
    for share, line in zip(shares[-2::-1], lines[-2::-1], strict=True):
        solved.append(line + share * solved[-1])
    return tuple(reversed(solved))


def _check(levels: Any, base: Any, rate: Any, leak: Any, step: str) -> None:
    if isinstance(levels, bool) or not isinstance(levels, (int, np.integer)) or levels < 2:
        raise ValueError(f"levels must be an integer of at least 2, not {levels!r}.")
    if step not in ("implicit", "explicit"):
        raise ValueError(f'step must be "implicit" or "explicit", not {step!r}.')
    if known(base) and not np.all(np.asarray(base) > 1):
        raise ValueError(f"base must be above 1, not {base}.")
    check_strength("rate", rate)
    check_strength("leak", leak)
    if step == "explicit" and known(base, rate, leak):
        fastest = _fastest(int(levels), *(np.max(np.asarray(x)) for x in (base, rate, leak)))
        if fastest >= 2:
            raise ValueError(
                f"the explicit step is unstable for rate={rate}: its fastest mode is multiplied by "
                f"{1 - fastest:.3g} in every step. Take a smaller rate, or step='implicit'."
            )


def _fastest(levels: int, base: Any, rate: Any, leak: Any) -> float:
    """The largest eigenvalue of the chain, per step."""
    base, rate, leak = (float(x) for x in (base, rate, leak))
    tubes = _tubes(levels, base, rate, leak)
    matrix = np.diag(tubes) + np.diag([0.0, *tubes[:-1]])
    matrix -= np.diag(tubes[:-1], 1) + np.diag(tubes[:-1], -1)
    root = base ** (-0.5 * np.arange(levels))
    return float(np.linalg.eigvalsh(root[:, None] * matrix * root)[-1])


def _check_resolution(empty: PyTree, levels: int, base: Any, rate: Any) -> None:
    """Refuses a chain whose last level would stand still by rounding."""
    if not known(base, rate) or not np.all(np.asarray(rate) > 0):
        return
    slowest = float(np.min(np.asarray(rate, np.float64)))
    slowest *= float(np.max(np.asarray(base, np.float64))) ** (3 - 2 * levels)
    for name, leaf in zip(trees.paths(empty), jax.tree.leaves(empty), strict=True):
        if slowest < float(jnp.finfo(leaf.dtype).eps) / 2:
            raise ValueError(
                f"cascade(levels={levels}, base={base}, rate={rate}): the last level of {name!r} "
                f"moves by {slowest:.2g} of a difference in a step, which {leaf.dtype} does not "
                "resolve, so that it would stand still. Take fewer levels, a smaller base or a "
                "larger rate."
            )
