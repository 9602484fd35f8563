"""Functional regularisation: what is held in place are the outputs, and not the weights.

**Learning without forgetting** distils the network as it was into the network as it is, on the
inputs of the new task, so that nothing is stored but the old parameters::

    old = teacher(apply, params)                               # at the boundary

    def loss(params, inputs, labels):
        logits = apply(params, inputs)
        kept = distillation(logits, old(inputs), classes=known_classes)
        return task_loss(logits, labels) + strength * jnp.mean(kept)

**FROMP** keeps a few memorable inputs of each task, and a Gaussian process over the outputs there,
which the belief about the weights implies: outputs that the belief is sure of are held, others are
free, and errors at similar inputs are counted once::

    memory = empty_memory(inputs[0], outputs=10, tasks=10, slots=200)
    ...                                                        # train
    places = memorable(apply, params, inputs, 200)             # at the boundary
    memory = remember(apply, params, posterior, memory, inputs[places])
    ...                                                        # then, in the loss:
    loss + functional_penalty(apply, params, memory, strength=tau / n)  # of a mean over n examples
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet import trees
from adaptivenet.consolidation.boundary import as_posterior, check_strength
from adaptivenet.posterior import gaussian
from adaptivenet.posterior._arrays import known, wide
from adaptivenet.posterior._states import cast, check_positive
from adaptivenet.posterior.laplace import LIKELIHOODS

PyTree = Any
Number = Any  # a Python number, or a traced scalar
Apply = Callable[[PyTree, jax.Array], jax.Array]

__all__ = [
    "Memory",
    "distillation",
    "empty_memory",
    "functional_penalty",
    "memorable",
    "noise_precision",
    "refresh",
    "remember",
    "teacher",
]


# --- learning without forgetting ---------------------------------------------------------------


def teacher(apply: Apply, params: PyTree) -> Callable[..., Any]:
    """The network as it is now, to learn from later.

    Args:
      apply: ``apply(params, *args, **kwargs)``.
      params: the parameters, which are copied, so that training may donate them.

    Returns:
      ``old(*args, **kwargs)``, which no gradient goes through.

    >>> old = teacher(lambda params, x: params["w"] * x, {"w": jnp.float32(3.0)})
    >>> old(2.0).item()
    6.0
    """
    held = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)

    def old(*args: Any, **kwargs: Any) -> Any:
        return jax.lax.stop_gradient(apply(held, *args, **kwargs))

    return old


def distillation(
    student: jax.Array,
    teacher: jax.Array,
    *,
    temperature: Number = 2.0,
    classes: jax.Array | None = None,
) -> jax.Array:
    """How far a student's probabilities are from a teacher's, softened by a temperature.

    It is ``KL(softmax(teacher / T) || softmax(student / T))``, which differs from the cross entropy
    of the article by the teacher's entropy, so that it is zero where they agree and has the same
    gradient. (Gradients shrink as 1/T^2 at high temperatures: multiply by T^2 to make strengths
    comparable between them.)

    Args:
      student: ``[..., classes]``, logits.
      teacher: likewise; no gradient goes through them.
      temperature: T, positive.
      classes: bool, broadcasts to ``[..., classes]``: the classes that the teacher knows; the
        probabilities are those among them. (A row without any gives 0.)

    Returns:
      ``[...]``, in nats; average it over the batch.

    Raises:
      ValueError: the temperature is not positive, or shapes differ.

    References:
      Li and Hoiem, "Learning without forgetting", ECCV 2016, arXiv:1606.09282; Hinton, Vinyals and
      Dean, "Distilling the knowledge in a neural network", arXiv:1503.02531.

    >>> student, teacher = jnp.array([0.0, 0.0]), jnp.array([0.0, 4.0])
    >>> distillation(student, teacher).round(4).item(), distillation(teacher, teacher).item()
    (0.327..., 0.0)
    """
    check_positive("temperature", temperature)
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's logits have the shape {student.shape}, the teacher's {teacher.shape}."
        )
    student, teacher = wide(student), jax.lax.stop_gradient(wide(teacher))
    heat = cast(temperature, student)
    where = jnp.ones(student.shape, bool)
    if classes is not None:
        where = jnp.broadcast_to(classes, student.shape)
    # Zeros in the place of logits that are left out keep their derivative zero, and not nan.
    rows = jnp.any(where, axis=-1, keepdims=True)
    logs = []
    for logits in (student, teacher.astype(student.dtype)):
        kept = jnp.where(where, logits / heat, 0.0)
        total = jax.nn.logsumexp(kept, axis=-1, keepdims=True, where=where | ~rows)
        logs.append(jnp.where(where, kept - total, 0.0))
    mine, theirs = logs
    return jnp.sum(jnp.where(where, jnp.exp(theirs) * (theirs - mine), 0.0), axis=-1)


# --- memorable past ------------------------------------------------------------------------------


class Memory(NamedTuple):
    """Inputs that are remembered, and what the network said there; of a fixed size.

    Attributes:
      inputs: ``[tasks, slots, ...]``.
      classes: ``[tasks, outputs]`` bool, the outputs that a task has (its head).
      mean: ``[tasks, slots, outputs]``, the outputs after their link: probabilities, say.
      factor: ``[tasks, outputs, slots, slots]``, lower Cholesky factors of the kernels.
      count: int32 scalar, the number of tasks that were remembered.
    """

    inputs: jax.Array
    classes: jax.Array
    mean: jax.Array
    factor: jax.Array
    count: jax.Array

    @property
    def filled(self) -> jax.Array:
        """``[tasks]`` bool: which places hold a task."""
        return jnp.arange(self.inputs.shape[0], dtype=jnp.int32) < self.count


def empty_memory(example: jax.Array, *, outputs: int, tasks: int, slots: int) -> Memory:
    """A memory of nothing, whose penalty is zero.

    Args:
      example: one input, without an axis of examples, for its shape and dtype.
      outputs: number of outputs of the network.
      tasks: number of tasks that it has room for; the next one takes the place of the oldest.
      slots: number of inputs a task.

    Returns:
      The memory. Its kernels take ``4 tasks outputs slots^2`` bytes.

    Raises:
      ValueError: a number is below 1.

    >>> memory = empty_memory(jnp.zeros(3), outputs=2, tasks=4, slots=5)
    >>> memory.inputs.shape, memory.factor.shape
    ((4, 5, 3), (4, 2, 5, 5))
    """
    for name, number in (("outputs", outputs), ("tasks", tasks), ("slots", slots)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}.")
    example = jnp.asarray(example)
    floats = jnp.result_type(float)
    return Memory(
        jnp.zeros((tasks, slots, *example.shape), example.dtype),
        jnp.ones((tasks, outputs), bool),
        jnp.zeros((tasks, slots, outputs), floats),
        jnp.broadcast_to(jnp.eye(slots, dtype=floats), (tasks, outputs, slots, slots)),
        jnp.zeros((), jnp.int32),
    )


def noise_precision(
    outputs: jax.Array, likelihood: str = "categorical", classes: jax.Array | None = None
) -> jax.Array:
    """The curvature of the loss in the outputs, its trace: large where an example is undecided.

    Args:
      outputs: ``[..., outputs]``: logits, or the mean of a gaussian.
      likelihood: "categorical" and "bernoulli": the sum of ``p (1 - p)``; "gaussian": the number of
        outputs, for unit noise.
      classes: bool, broadcasts to the outputs: those that count.

    Returns:
      ``[...]``.

    Raises:
      ValueError: an unknown likelihood.

    >>> noise_precision(jnp.array([[0.0, 0.0], [0.0, 40.0]])).round(4).tolist()
    [0.5, 0.0]
    """
    _check_likelihood(likelihood)
    where = jnp.ones(outputs.shape, bool)
    where = where if classes is None else jnp.broadcast_to(classes, outputs.shape)
    if likelihood == "gaussian":
        return jnp.sum(where, axis=-1, dtype=wide(outputs).dtype)
    means = _link(wide(outputs), where, likelihood)
    return jnp.sum(jnp.where(where, means * (1.0 - means), 0.0), axis=-1)


def memorable(
    apply: Apply,
    params: PyTree,
    inputs: jax.Array,
    count: int,
    *,
    labels: jax.Array | None = None,
    label_count: int | None = None,
    likelihood: str = "categorical",
    classes: jax.Array | None = None,
) -> jax.Array:
    """The examples that the belief about the weights leans on most: those that are undecided.

    They have the largest :func:`noise_precision`, the weight of an example in the curvature.

    Args:
      apply: ``apply(params, inputs) -> [examples, outputs]``, called once on all of them.
      params: the parameters.
      inputs: ``[examples, ...]``.
      count: number to keep.
      labels: ``[examples]`` integers, to keep as many of each class, as the authors do.
      label_count: the number of classes, from 0; needed with labels. It must divide ``count``.
      likelihood: as for :func:`noise_precision`.
      classes: as for :func:`noise_precision`.

    Returns:
      ``[count]`` int32 positions; by class, the largest first, and then from the largest down.

    Raises:
      ValueError: more to keep than there are examples (of a class, where that can be seen), or
        numbers that do not fit.

    References:
      Pan, Swaroop, Immer, Eschenhagen, Turner and Khan, "Continual deep learning by functional
      regularisation of memorable past", NeurIPS 2020, arXiv:2004.14070, section 3.

    >>> logits = jnp.array([[0.0, 9.0], [0.0, 0.1], [0.0, -1.0]])
    >>> memorable(lambda params, x: x, {}, logits, 2).tolist()
    [1, 2]
    """
    total = inputs.shape[0]
    if not 1 <= count <= total:
        raise ValueError(f"count must be between 1 and the {total} examples, not {count}.")
    weight = noise_precision(apply(params, inputs), likelihood, classes)
    if labels is None:
        return jax.lax.top_k(weight, count)[1].astype(jnp.int32)
    if label_count is None or count % label_count:
        raise ValueError(
            f"labels= need label_count=, a number that divides count={count}, not {label_count}."
        )
    each = count // label_count
    if known(labels):
        counts = [int(np.sum(np.asarray(labels) == c)) for c in range(label_count)]
        if min(counts) < each:
            raise ValueError(
                f"class {counts.index(min(counts))} has {min(counts)} examples, fewer than {each}: "
                "take a smaller count."
            )
    own = labels[None] == jnp.arange(label_count, dtype=labels.dtype)[:, None]
    places = jax.lax.top_k(jnp.where(own, weight[None], -1.0), each)[1]
    return places.reshape(-1).astype(jnp.int32)


def remember(
    apply: Apply,
    params: PyTree,
    posterior: Any,
    memory: Memory,
    inputs: jax.Array,
    *,
    classes: jax.Array | None = None,
    likelihood: str = "categorical",
    jitter: Number = 1e-5,
) -> Memory:
    """A boundary: takes in the memorable inputs of a task, and looks at all tasks anew.

    Args:
      apply: ``apply(params, inputs) -> [examples, outputs]``.
      params: the parameters as they are now.
      posterior: the belief about them, after this task; see :func:`refresh`.
      memory: the memory so far.
      inputs: ``[slots, ...]``. Where the memory is full, they take the place of the oldest task.
      classes: ``[outputs]`` bool, the outputs that the task has; all by default.
      likelihood: as for :func:`refresh`.
      jitter: as for :func:`refresh`.

    Returns:
      The memory, of the same shapes.

    Raises:
      ValueError: the inputs do not fit the memory; else as :func:`refresh`.

    References:
      Pan et al., NeurIPS 2020.

    >>> apply, params = lambda p, x: x @ p["w"], {"w": jnp.ones((1, 1))}
    >>> belief = gaussian.Posterior(params, {"w": jnp.full((1, 1), 4.0)})
    >>> memory = empty_memory(jnp.zeros(1), outputs=1, tasks=2, slots=1)
    >>> kind = {"likelihood": "gaussian"}
    >>> memory = remember(apply, params, belief, memory, jnp.full((1, 1), 3.0), **kind)
    >>> memory.count.item(), memory.mean[0].tolist(), memory.factor[0].tolist()  # 3 / 2
    (1, [[3.0]], [[[1.50...]]])
    """
    tasks, _, *_ = memory.inputs.shape
    if jnp.shape(inputs) != memory.inputs.shape[1:]:
        raise ValueError(
            f"the memory takes inputs of the shape {memory.inputs.shape[1:]}, not "
            f"{jnp.shape(inputs)}: give as many as it has slots, or make another empty_memory()."
        )
    own = jnp.ones(memory.classes.shape[1], bool) if classes is None else jnp.asarray(classes)
    place = memory.count % tasks
    memory = memory._replace(
        inputs=memory.inputs.at[place].set(jnp.asarray(inputs).astype(memory.inputs.dtype)),
        classes=memory.classes.at[place].set(own),
        count=memory.count + 1,
    )
    return refresh(apply, params, posterior, memory, likelihood=likelihood, jitter=jitter)


def refresh(
    apply: Apply,
    params: PyTree,
    posterior: Any,
    memory: Memory,
    *,
    likelihood: str = "categorical",
    jitter: Number = 1e-5,
) -> Memory:
    r"""What the network says now at all remembered inputs, and how sure the belief is of it.

    For each task and output c, the mean :math:`m` is the output after its link (a probability), and
    the kernel is :math:`K = J \Sigma J^\top` with the Jacobian :math:`J` of m in the parameters
    and the variances :math:`\Sigma` of the belief.

    Args:
      apply: ``apply(params, inputs) -> [examples, outputs]``.
      params: the parameters, at which the Jacobians are taken.
      posterior: the belief; its precision counts, its mean does not. Leaves that nothing is
        believed of are taken as certain.
      memory: the memory.
      likelihood: "categorical", "bernoulli" or "gaussian".
      jitter: added to the kernels' diagonals.

    Returns:
      The memory with new means and kernels, which the penalty is zero at. The work is that of
      ``tasks * outputs`` gradients at ``slots`` inputs, one after the other, each of which takes
      ``slots`` times the memory of the parameters.

    Raises:
      ValueError: no belief, or one that is malformed, an unknown likelihood, or outputs of another
        number than the memory's.

    References:
      Pan et al., NeurIPS 2020, section 3; Khan et al., "Approximate inference turns deep networks
      into Gaussian processes", NeurIPS 2019.
    """
    _check_likelihood(likelihood)
    belief = gaussian.check(as_posterior(posterior, params, "remember()"))
    variance = trees.map_synapses(lambda s: 1.0 / wide(s), belief.precision)
    part = trees.map_synapses(lambda _, p: p, variance, params)
    outputs = memory.classes.shape[1]

    def said(part: PyTree, example: jax.Array, classes: jax.Array) -> jax.Array:
        full = trees.merge_synapses(lambda new, _: new, part, params)
        return _means(apply, full, example[None], classes, likelihood)[0]

    def look(task: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        inputs, classes = task
        mean = jax.vmap(lambda x: said(part, x, classes))(inputs)

        def kernel(c: jax.Array) -> jax.Array:
            slope = jax.grad(lambda q, x: said(q, x, classes)[c])
            rows = jax.vmap(lambda x: slope(part, x))(inputs)
            products = trees.map_synapses(_product, variance, rows)
            terms = [t.astype(memory.factor.dtype) for t in jax.tree.leaves(products)]
            own = jnp.sum(jnp.stack(terms), axis=0)
            return jnp.linalg.cholesky(own + cast(jitter, own) * jnp.eye(len(own), dtype=own.dtype))

        factor = jax.lax.map(kernel, jnp.arange(outputs, dtype=jnp.int32))
        return mean.astype(memory.mean.dtype), factor

    mean, factor = jax.lax.map(look, (memory.inputs, memory.classes))
    # A place without a task may have a kernel that has no factor.
    blank = jnp.eye(factor.shape[-1], dtype=factor.dtype)
    factor = jnp.where(memory.filled[:, None, None, None], factor, blank)
    return memory._replace(mean=mean, factor=factor)


def functional_penalty(
    apply: Apply,
    params: PyTree,
    memory: Memory,
    *,
    strength: Number = 1.0,
    likelihood: str = "categorical",
) -> jax.Array:
    r"""How far the outputs at remembered inputs have moved, in units of what was believed of them.

    It is ``strength / 2`` times the sum over tasks and outputs of

    .. math:: (m - m_t)^\top K_t^{-1} (m - m_t).

    The terms of the Gaussian process's divergence that depend on the new belief's covariance are
    left out, as the authors do. For outputs that are linear in the parameters, and as many inputs
    as parameters, it is the quadratic penalty on the weights (elastic weight consolidation).

    Args:
      apply: ``apply(params, inputs) -> [examples, outputs]``, called once on all remembered inputs.
      params: the parameters.
      memory: as of :func:`remember`.
      strength: not negative. The belief's precision is summed over examples: beside a mean loss
        over n examples it is ``tau / n`` with the paper's tau. (The authors' code, whose loss is a
        mean, is given the quotient: 10 for Split MNIST, 0.5 for Permuted MNIST.)
      likelihood: as the memory was made with.

    Returns:
      Scalar, zero while nothing is remembered, and at the parameters that were.

    Raises:
      ValueError: the strength is negative, an unknown likelihood, or outputs of another number than
        the memory's.

    References:
      Pan et al., NeurIPS 2020, section 3.3, equation 8, and the authors' code for the sum over
      outputs.

    >>> apply, params = lambda p, x: x @ p["w"], {"w": jnp.ones((1, 1))}
    >>> belief = gaussian.Posterior(params, {"w": jnp.full((1, 1), 4.0)})
    >>> memory, kind = empty_memory(jnp.zeros(1), outputs=1, tasks=2, slots=1), "gaussian"
    >>> at = jnp.full((1, 1), 3.0)
    >>> memory = remember(apply, params, belief, memory, at, likelihood=kind, jitter=0.0)
    >>> moved = {"w": jnp.full((1, 1), 2.0)}
    >>> functional_penalty(apply, moved, memory, likelihood=kind).round(4).item()  # 4 * 1^2 / 2
    2.0
    """
    check_strength("strength", strength)
    _check_likelihood(likelihood)
    tasks, slots, *rest = memory.inputs.shape
    classes = jnp.repeat(memory.classes, slots, axis=0)
    means = _means(apply, params, memory.inputs.reshape(tasks * slots, *rest), classes, likelihood)
    gap = means.reshape(memory.mean.shape).astype(memory.mean.dtype) - memory.mean
    gap = jnp.where(memory.filled[:, None, None], gap, 0.0)
    columns = jnp.swapaxes(gap, 1, 2)[..., None]  # [tasks, outputs, slots, 1]
    solved = jax.lax.linalg.triangular_solve(memory.factor, columns, left_side=True, lower=True)
    return 0.5 * cast(strength, solved) * jnp.sum(jnp.square(solved))


def _means(
    apply: Apply, params: PyTree, inputs: jax.Array, classes: jax.Array, likelihood: str
) -> jax.Array:
    outputs = wide(apply(params, inputs))
    if outputs.shape != (inputs.shape[0], classes.shape[-1]):
        raise ValueError(
            f"apply() gives outputs of the shape {outputs.shape} for {inputs.shape[0]} inputs, but "
            f"the memory was made for [examples, {classes.shape[-1]}]."
        )
    return _link(outputs, jnp.broadcast_to(classes, outputs.shape), likelihood)


def _link(outputs: jax.Array, where: jax.Array, likelihood: str) -> jax.Array:
    """Probabilities of logits, or outputs as they are; zero where an output does not count."""
    if likelihood == "categorical":
        return jax.nn.softmax(outputs, axis=-1, where=where)
    means = jax.nn.sigmoid(outputs) if likelihood == "bernoulli" else outputs
    return jnp.where(where, means, 0.0)


def _product(variance: jax.Array, rows: jax.Array) -> jax.Array:
    """``J diag(variance) J^T`` of one leaf, ``[slots, slots]``."""
    flat = rows.reshape(rows.shape[0], -1).astype(variance.dtype)
    return jnp.matmul(flat * variance.reshape(-1), flat.T, precision=jax.lax.Precision.HIGHEST)


def _check_likelihood(likelihood: str) -> None:
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"likelihood must be one of {', '.join(LIKELIHOODS)}, not {likelihood!r}.")
