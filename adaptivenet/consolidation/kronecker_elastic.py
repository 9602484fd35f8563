r"""Elastic consolidation with correlations: Kronecker-factored, or full, Laplace approximations.

The penalty is ``strength / 2 * sum_k (w - a_k)^T H_k (w - a_k)`` with the curvature :math:`H_k` of
every task, which knows what :mod:`adaptivenet.consolidation.elastic` does not: that a synapse may
move if others move with it. Beliefs come from :func:`adaptivenet.posterior.laplace` at boundaries::

    def fit(params, inputs, labels):
        return laplace(apply, params, inputs, labels, likelihood="categorical",
                       structure="kronecker")

    like = functools.partial(fit, inputs=inputs[:1], labels=labels[:1])  # for shapes alone
    tx = optax.chain(structured_elastic(strength, like, tasks=5), optax.adam(1e-3))
    ...                                                     # train on the first task
    opt_state = consolidate(opt_state, params, fit(params, inputs, labels))

**Memory.** The curvature of a kernel ``[inputs, outputs]`` is kept as an orthonormal basis for
either side and its diagonal in their product, ``inputs^2 + outputs^2 + inputs outputs`` numbers a
slot, for which there are ``tasks`` slots. While these last the sum over tasks is exact; a sum of
Kronecker products is none, so when they are full the two oldest become one: the bases are those of
the sum's two partial traces, and the diagonal is that of the sum in this basis, which no other
diagonal in it surpasses (the argument of EKFAC) and which leaves the trace as it is. (To add the
factors themselves, ``(A_1 + A_2) (x) (G_1 + G_2)``, would bring in products of one task's inputs
with the other's gradients.) With ``tasks=1`` the memory is constant. Full matrices and leaves that
stand in no product simply add up.

**Prior.** Every Laplace approximation contains its prior. It is counted once: that of the first
belief is kept, of all others only the curvature of the data. The penalty is then the negative log
belief after all tasks, prior included: leave weight decay out of the loss from the second task on.
The strength multiplies both; the lambda of Ritter et al. multiplies the data's curvature alone, so
that beside a loss that is a sum theirs is a strength of lambda and a prior precision over lambda.

(Under ``optax.inject_hyperparams`` give ``static_args=("like", "tasks", "steps", "every")``.)

**Two forms**, as for :func:`adaptivenet.consolidation.elastic.elastic`. ``"online"`` has one
anchor, the latest mode, which was found under the penalty of all before: the recursion of Laplace
approximations, which is exact for quadratic losses. ``"separate"`` leaves every task its own.

References:
  Ritter, Botev and Barber, "Online structured Laplace approximations for overcoming catastrophic
  forgetting", NeurIPS 2018, arXiv:1805.07810; George et al., "Fast approximate natural gradient
  descent in a Kronecker-factored eigenbasis", NeurIPS 2018; Huszar, "Note on the quadratic
  penalties in elastic weight consolidation", PNAS 115 (2018).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptivenet import trees
from adaptivenet.consolidation._curvature import (
    Curvature,
    Like,
    Plan,
    Plans,
    as_one,
    as_structured,
    between,
    conditional,
    contents,
    each,
    even,
    implicit,
    plan_of,
    scaled,
    solved,
)
from adaptivenet.consolidation.boundary import check_share, check_strength, number
from adaptivenet.consolidation.elastic import Form
from adaptivenet.posterior._arrays import known, wide
from adaptivenet.posterior._states import cast
from adaptivenet.posterior.structured import Gaussian

PyTree = Any
Number = Any  # a Python number, or a traced scalar

__all__ = [
    "Curvature",
    "SeparateStructuredState",
    "StructuredProximalState",
    "StructuredState",
    "structured_conditional",
    "structured_elastic",
    "structured_penalty",
    "structured_proximal",
]


class StructuredState(NamedTuple):
    """State of :func:`structured_elastic`; every field is zero before the first boundary.

    Attributes:
      curvature: of the tasks before.
      anchors: for each believed leaf ``[1, *shape]``, or ``[slots, *shape]`` in the separate form.
      prior: for each believed leaf ``[1, *shape]``, the precision of the prior.
      count: int32 scalar, boundaries so far.
      decay: float scalar.
      summary: nothing, or the curvature of all slots as one.
    """

    curvature: Curvature
    anchors: tuple[jax.Array, ...]
    prior: tuple[jax.Array, ...]
    count: jax.Array
    decay: jax.Array
    summary: Curvature | tuple[()] = ()

    form = "online"

    def consolidated(self, params: PyTree, posterior: Any, **signals: Any) -> StructuredState:
        """The state after a boundary."""
        del params, signals
        gaussian = as_structured(posterior)
        _check_shapes(self, *contents(gaussian)[:2])
        return _boundary(self, gaussian)


class SeparateStructuredState(StructuredState):
    """State of :func:`structured_elastic` in its separate form: the same fields as the other."""

    __slots__ = ()
    form = "separate"


class StructuredProximalState(NamedTuple):
    """State of :func:`structured_proximal`.

    Attributes:
      memory: as of :func:`structured_elastic`.
      step: int32 scalar, updates so far.
    """

    memory: StructuredState
    step: jax.Array


def structured_elastic(
    strength: Number,
    like: Like,
    *,
    tasks: int = 1,
    form: Form = "online",
    decay: Number = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Adds ``strength * sum_k H_k (params - a_k)`` to the gradients: put it in front.

    Args:
      strength: of the penalty, at least 0; for losses that are means over n examples of a task,
        ``1 / n`` is Bayes' rule (see :mod:`adaptivenet.consolidation.elastic`).
      like: what beliefs will look like: a Laplace approximation or one of its Gaussians (arrays or
        ``jax.ShapeDtypeStruct``), or a function from parameters to one, of which only the shapes
        are taken (it may fit a single example).
      tasks: slots for curvature; see the module.
      form: ``"online"`` (one anchor) or ``"separate"`` (one a task, as many as there are slots).
      decay: share of the curvature of the data that is kept at a boundary, in [0, 1].

    Returns:
      A transformation, which is the identity before the first boundary. Leaves of which beliefs
      say nothing stay as they are.

    Raises:
      ValueError: a number out of range, an unknown form. At ``init``: ``like`` is of other
        parameters. At ``update``: no parameters. At a boundary: no belief, or one of another
        structure.
      TypeError: ``like`` is nothing of the kind.

    References:
      See the module.

    >>> from adaptivenet.consolidation.boundary import consolidate
    >>> from adaptivenet.posterior import laplace
    >>> x, params = jnp.array([[1.0, 1.0]]), {"w": jnp.array([[1.0], [0.0]])}
    >>> def fit(params):
    ...     net = lambda p, x: x @ p["w"]
    ...     return laplace(net, params, x, jnp.ones((1, 1)), likelihood="gaussian",
    ...                    prior_precision=0.5, structure="kronecker")
    >>> tx = structured_elastic(1.0, fit)
    >>> state = consolidate(tx.init(params), params, fit(params))
    >>> nothing = {"w": jnp.zeros((2, 1))}
    >>> def force(to): return tx.update(nothing, state, {"w": jnp.array(to)})[0]["w"].round(4)
    >>> force([[2.0], [-1.0]]).tolist()  # the output stays the same: only the prior pulls
    [[0.5], [-0.5]]
    >>> force([[2.0], [0.0]]).tolist()
    [[1.5], [1.0]]
    """
    check_strength("strength", strength)
    kind = _kind(form, decay, tasks)
    plans = Plans(like)

    def init(params: PyTree) -> StructuredState:
        return _blank(kind, plans, params, tasks, decay, summarised=False)

    def update(
        updates: PyTree, state: StructuredState, params: PyTree | None = None, **signals: Any
    ) -> tuple[PyTree, StructuredState]:
        del signals
        plan, leaves, steps, treedef = _opened("structured_elastic()", plans, updates, params)
        forces = _gradient(plan, state, [leaves[k] for k in plan.believed])
        for k, force in zip(plan.believed, forces, strict=True):
            grad = steps[k]
            pulled = (grad.astype(force.dtype) + cast(strength, force) * force).astype(grad.dtype)
            steps[k] = jnp.where(state.count > 0, pulled, grad)
        return treedef.unflatten(steps), state._replace(decay=number(decay))

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def structured_proximal(
    strength: Number,
    learning_rate: Number | Callable[[Any], Any],
    like: Like,
    *,
    tasks: int = 1,
    form: Form = "online",
    decay: Number = 1.0,
    steps: int = 10,
    every: int = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""The same penalty by an implicit step: put it behind the optimizer.

    With :math:`w'` where the update would lead and the rate :math:`\eta`, the update that comes out
    leads to the :math:`w` of least :math:`|w - w'|^2 / (2 \eta)` plus penalty, that is

    .. math::
        w = w' - \eta \lambda \Big(I + \eta \lambda \sum_k H_k\Big)^{-1} \sum_k H_k (w' - a_k).

    Full matrices are solved exactly, and so is a single Kronecker basis (``tasks=1``) where each
    kernel with its bias has one prior precision: that costs as much as the penalty's gradient.
    Otherwise it takes conjugate gradients, preconditioned with the curvature of all tasks in one
    Kronecker basis. Whatever the number of steps, the sum that is minimised falls with each, so
    that the penalty never rises: no strength makes it diverge. The metric is the parameters' own;
    see :func:`adaptivenet.consolidation.elastic.proximal` for what that means beside Adam.

    Args:
      strength: as for :func:`structured_elastic`.
      learning_rate: that of the optimizer: a number, or a function of the count of updates.
      like: as for :func:`structured_elastic`.
      tasks: as for :func:`structured_elastic`.
      form: as for :func:`structured_elastic`.
      decay: as for :func:`structured_elastic`.
      steps: of conjugate gradients, at most.
      every: takes the step for that many updates at once, with as many times the rate, at the last
        of them, and costs as much less. (The others are the identity. In a vmapped program all
        updates pay.)

    Returns:
      A transformation, which is the identity before the first boundary.

    Raises:
      ValueError: as :func:`structured_elastic`.
      TypeError: as :func:`structured_elastic`.

    References:
      See the module, and Hestenes and Stiefel, "Methods of conjugate gradients for solving linear
      systems", Journal of Research of the National Bureau of Standards 49 (1952).

    >>> from adaptivenet.consolidation.boundary import consolidate
    >>> from adaptivenet.posterior.structured import FullPosterior
    >>> params = {"w": jnp.zeros(2)}
    >>> matrix = jnp.array([[1.0, 1.0], [1.0, 1.0]])
    >>> belief = FullPosterior(params, (), (0,), (), matrix, matrix).with_prior(1e-6)
    >>> tx = structured_proximal(1e6, 0.1, belief)
    >>> state = consolidate(tx.init(params), params, belief)
    >>> updates, _ = tx.update({"w": jnp.array([3.0, 1.0])}, state, params)
    >>> [round(x, 1) for x in updates["w"].tolist()]  # what changes the sum is taken away
    [0.9, -0.9]
    """
    check_strength("strength", strength)
    if not callable(learning_rate):
        check_strength("learning_rate", learning_rate)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a number of steps >= 1, not {steps!r}.")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be a number of updates >= 1, not {every!r}.")
    kind = _kind(form, decay, tasks)
    plans = Plans(like)

    def init(params: PyTree) -> StructuredProximalState:
        memory = _blank(kind, plans, params, tasks, decay, summarised=True)
        return StructuredProximalState(memory, jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree,
        state: StructuredProximalState,
        params: PyTree | None = None,
        **signals: Any,
    ) -> tuple[PyTree, StructuredProximalState]:
        del signals
        memory = state.memory
        plan, leaves, moves, treedef = _opened("structured_proximal()", plans, updates, params)
        rate = learning_rate(state.step) if callable(learning_rate) else learning_rate
        there = [wide(leaves[k]) for k in plan.believed]
        there = [x + moves[k].astype(x.dtype) for k, x in zip(plan.believed, there, strict=True)]
        stiffness = cast(rate, there[0]) * cast(strength, there[0]) * every
        one = memory.summary if isinstance(memory.summary, Curvature) else memory.curvature

        def search() -> list[jax.Array]:
            pulls = _gradient(plan, memory, there)
            return implicit(plan, memory.curvature, one, memory.prior, pulls, stiffness, steps)

        def solve() -> list[jax.Array]:
            apart = _apart(memory, there)
            return solved(plan, memory.curvature, memory.prior, apart, stiffness)

        def step_back() -> list[jax.Array]:
            if memory.curvature.full or _slots(memory.curvature) > 1:
                return search()
            return jax.lax.cond(even(plan, memory.prior), solve, search)

        def stay() -> list[jax.Array]:
            return [jnp.zeros_like(x) for x in there]

        due = ((state.step + 1) % every == 0) & (memory.count > 0)
        back = step_back() if every == 1 else jax.lax.cond(due, step_back, stay)
        for k, step in zip(plan.believed, back, strict=True):
            move, param = moves[k], leaves[k]
            with jax.numpy_dtype_promotion("standard"):
                dtype = jnp.promote_types(move.dtype, param.dtype)
            moved = (move.astype(step.dtype) + step).astype(dtype)
            moves[k] = jnp.where(memory.count > 0, moved, move.astype(dtype))
        after = StructuredProximalState(
            memory._replace(decay=number(decay)), jnp.asarray(optax.safe_increment(state.step))
        )
        return treedef.unflatten(moves), after

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def structured_penalty(
    params: PyTree, state: StructuredState, like: Like, strength: Number = 1.0
) -> jax.Array:
    """``strength / 2 * sum_k (w - a_k)^T H_k (w - a_k)``, a differentiable number.

    Args:
      params: pytree of arrays.
      state: of :func:`structured_elastic`, or the ``memory`` of :func:`structured_proximal`.
      like: as for these.
      strength: a number.

    Returns:
      Scalar, zero before the first boundary.

    Raises:
      ValueError, TypeError: ``like`` is of other parameters, or nothing of the kind.
    """
    plan = Plans(like)(params)
    leaves = jax.tree.leaves(params)
    apart = _apart(state, [leaves[k] for k in plan.believed])
    pulls = each(plan, state.curvature, apart)
    total = sum(jnp.sum(d * h) for d, h in zip(apart, pulls, strict=True))
    total += sum(jnp.sum(p[0] * d[0] ** 2) for p, d in zip(state.prior, apart, strict=True))
    total = jnp.asarray(total)
    return jnp.where(state.count > 0, 0.5 * cast(strength, total) * total, jnp.zeros_like(total))


def structured_conditional(
    params: PyTree, state: StructuredState, like: Like, mask: PyTree, *, steps: int = 100
) -> PyTree:
    """The likeliest parameters under the memory, given that the synapses of a mask are zero.

    A Gaussian belief that is told that some of its numbers are zero moves the others: what stays
    makes up for what goes, as in the optimal brain surgeon, over all tasks at once. It is found by
    conjugate gradients from the parameters as they are.

    Args:
      params: pytree of arrays.
      state: of :func:`structured_elastic`, or the ``memory`` of :func:`structured_proximal`.
      like: as for these.
      mask: as of a pruner: pytree of bool, True where a synapse is kept, masked nodes for leaves
        that lose none.
      steps: of conjugate gradients, at most; each costs as much as the penalty's gradient.

    Returns:
      Parameters of least :func:`structured_penalty`, zero outside the mask. Where nothing is
      believed, and before the first boundary, they are the given ones with zeros.

    Raises:
      ValueError: ``like`` or the mask is of other parameters, or steps below 1.
      TypeError: ``like`` is nothing of the kind.

    References:
      Hassibi and Stork, "Second order derivatives for network pruning: optimal brain surgeon",
      NIPS 1992, for the step that makes up for a synapse.

    >>> from adaptivenet.posterior.structured import FullPosterior
    >>> params, matrix = {"w": jnp.ones(2)}, jnp.array([[2.0, 1.0], [1.0, 2.0]])
    >>> belief = FullPosterior(params, (), (0,), (), matrix, matrix).with_prior(1e-6)
    >>> state = structured_elastic(1.0, belief).init(params).consolidated(params, belief)
    >>> mask = {"w": jnp.array([True, False])}
    >>> structured_conditional(params, state, belief, mask)["w"].round(3).tolist()  # 1 + 1 / 2
    [1.5..., 0.0]
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a number of steps >= 1, not {steps!r}.")
    plan = Plans(like)(params)
    everywhere = jax.tree.map(lambda p: jnp.ones(jnp.shape(p), bool), params)
    free = jax.tree.leaves(trees.merge_synapses(lambda m, _: m, mask, everywhere))
    leaves, treedef = jax.tree.flatten(params)
    there = [
        jnp.where(f, wide(p), jnp.zeros_like(wide(p))) for f, p in zip(free, leaves, strict=True)
    ]
    believed = [there[k].astype(a.dtype) for k, a in zip(plan.believed, state.anchors, strict=True)]
    summary = state.summary if isinstance(state.summary, Curvature) else None
    if summary is None and plan.sites and _slots(state.curvature) == 1:
        summary = state.curvature
    back = conditional(
        plan,
        state.curvature,
        summary,
        state.prior,
        _gradient(plan, state, believed),
        [free[k] for k in plan.believed],
        steps,
    )
    for k, start, step in zip(plan.believed, believed, back, strict=True):
        there[k] = start + step
    return treedef.unflatten([x.astype(p.dtype) for x, p in zip(there, leaves, strict=True)])


# --- the state -----------------------------------------------------------------------------------


def _kind(form: str, decay: Number, tasks: int) -> type[StructuredState]:
    if form not in ("online", "separate"):
        raise ValueError(f'form must be "online" or "separate", not {form!r}.')
    check_share("decay", decay)
    if isinstance(tasks, bool) or not isinstance(tasks, (int, np.integer)) or tasks < 1:
        raise ValueError(f"tasks must be a number of slots >= 1, not {tasks!r}.")
    return StructuredState if form == "online" else SeparateStructuredState


def _blank(
    kind: type[StructuredState],
    plans: Plans,
    params: PyTree,
    tasks: int,
    decay: Number,
    *,
    summarised: bool,
) -> StructuredState:
    plan = plans(params)  # refuses other parameters
    curvature, means, prior = jax.eval_shape(contents, plans.shapes(params))
    if not plan.sites and kind.form == "online":
        tasks = 1  # these add up without loss

    def slots(shapes: Any, size: int) -> Any:
        return jax.tree.map(lambda s: jnp.zeros((size, *s.shape), s.dtype), shapes)

    return kind(
        curvature=slots(curvature, tasks),
        anchors=slots(means, tasks if kind.form == "separate" else 1),
        prior=slots(prior, 1),
        count=jnp.zeros((), jnp.int32),
        decay=number(decay),
        summary=slots(curvature, 1) if summarised and tasks > 1 and not curvature.full else (),
    )


def _slots(curvature: Curvature) -> int:
    return jax.tree.leaves(curvature)[0].shape[0]


@jax.jit  # so that it is compiled once for all boundaries, also where these are not
def _boundary(state: StructuredState, gaussian: Gaussian) -> StructuredState:
    new, means, prior = contents(gaussian)
    plan, slots, first = plan_of(gaussian), _slots(state.curvature), state.count == 0
    separate = state.form == "separate"
    prior = tuple(
        jnp.where(first, p[None].astype(old.dtype), old)
        for p, old in zip(prior, state.prior, strict=True)
    )
    means = tuple(m.astype(a.dtype)[None] for m, a in zip(means, state.anchors, strict=True))
    kept = scaled(state.curvature, state.decay)

    def put() -> Any:
        at = jnp.minimum(state.count, slots - 1)
        curvature = jax.tree.map(lambda s, n: s.at[at].set(n), kept, new)
        if not separate:
            return curvature, means
        pairs = zip(state.anchors, means, strict=True)
        return curvature, tuple(a.at[at].set(m[0]) for a, m in pairs)

    def squeeze() -> Any:
        more = jax.tree.map(lambda s, n: jnp.concatenate([s, n[None]]), kept, new)
        oldest = jax.tree.map(lambda s: s[:2], more)
        curvature = jax.tree.map(
            lambda m, s: jnp.concatenate([m[None], s[2:]]), as_one(oldest), more
        )
        if not separate:
            return curvature, means
        both = [jnp.concatenate([a, m]) for a, m in zip(state.anchors, means, strict=True)]
        middle = between(plan, oldest, [a[:2] for a in both], prior)
        pairs = zip(both, middle, strict=True)
        return curvature, tuple(jnp.concatenate([m[None], a[2:]]) for a, m in pairs)

    curvature, anchors = jax.lax.cond(state.count < slots, put, squeeze)
    summary = state.summary
    if isinstance(summary, Curvature):
        pair = jax.tree.map(
            lambda s, n: jnp.concatenate([s, n[None]]), scaled(summary, state.decay), new
        )
        summary = jax.tree.map(lambda m: m[None], as_one(pair))
    return state._replace(
        curvature=curvature,
        anchors=anchors,
        prior=prior,
        count=optax.safe_increment(state.count),
        summary=summary,
    )


def _check_shapes(state: StructuredState, new: Curvature, means: Sequence[jax.Array]) -> None:
    def shapes(tree: Any, skip: int) -> Any:
        return jax.tree.map(lambda x: "x".join(map(str, x.shape[skip:])), tree)

    held = shapes((state.curvature, state.anchors), 1)
    given = shapes((new, tuple(means)), 0)
    if held != given:
        raise ValueError(
            "this belief has another structure than the memory, which was built for like=: it has "
            f"{given}, the memory {held}. Fit it with the same structure=, select= and apply."
        )
    for name, leaf in zip(("curvature", "mean"), (new, means), strict=True):
        for x in jax.tree.leaves(leaf):
            if known(x) and not np.all(np.isfinite(np.asarray(x, np.float64))):
                raise ValueError(f"the {name} of this belief is not finite: repair it first.")


def _opened(
    who: str, plans: Plans, updates: PyTree, params: PyTree | None
) -> tuple[Plan, list[Any], list[Any], Any]:
    if params is None:
        raise ValueError(f"{who} needs the parameters: call tx.update(grads, opt_state, params).")
    plan, leaves = plans(params), jax.tree.leaves(params)
    steps, treedef = jax.tree.flatten(updates)
    if len(steps) != len(leaves):
        raise ValueError(
            f"{who} was given {len(steps)} updates for {len(leaves)} parameters "
            f"({', '.join(trees.paths(params))})."
        )
    return plan, leaves, steps, treedef


def _apart(state: StructuredState, leaves: Sequence[jax.Array]) -> list[jax.Array]:
    return [x.astype(a.dtype)[None] - a for x, a in zip(leaves, state.anchors, strict=True)]


def _gradient(plan: Plan, state: StructuredState, leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """``sum_k H_k (w - a_k)``, with the prior at the oldest anchor."""
    apart = _apart(state, leaves)
    pulls = [x.sum(axis=0) for x in each(plan, state.curvature, apart)]
    return [x + p[0] * d[0] for x, p, d in zip(pulls, state.prior, apart, strict=True)]
