"""Sparse weights as functions of dense ones, for use within a loss.

Each function returns the *effective* parameters, in which synapses are exactly zero; what an
optimizer trains are the dense ones (and thresholds or gates beside them)::

    thresholds = str_init(params)

    def loss(both):
        params, thresholds = both
        return task(soft_threshold(params, thresholds), batch)

    grads = jax.grad(loss)((params, thresholds))

Trees of thresholds, gates and masks hold masked nodes for leaves that are not synapses. At the end
:func:`support` of the effective parameters is the mask with which pruning goes on.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet import trees
from adaptivenet.pruning.schedules import Number, known

PyTree = Any
Per = Literal["synapse", "input", "output"]

__all__ = [
    "hard_concrete",
    "hard_concrete_init",
    "l0_penalty",
    "soft_threshold",
    "str_init",
    "straight_through",
    "support",
]

# The stretch and the temperature of the paper.
_TEMPERATURE, _LOW, _HIGH = 2 / 3, -0.1, 1.1


def straight_through(params: PyTree, mask: PyTree) -> PyTree:
    """Prunes in the forward pass only: gradients pass as if nothing were cut.

    So pruned weights go on learning and may come back, once a mask is drawn anew from the dense
    weights (which are those to score).

    Args:
      params: pytree of arrays, the dense weights.
      mask: pytree of bool; masked nodes for leaves that are not synapses.

    Returns:
      ``params``, exactly zero where the mask is False; its derivative is the identity.

    Raises:
      ValueError: the mask belongs to another tree.

    References:
      Bengio, Leonard and Courville, "Estimating or propagating gradients through stochastic neurons
      for conditional computation", arXiv:1308.3432; Lin et al., "Dynamic model pruning with
      feedback", ICLR 2020, for pruning by it.

    >>> weights, mask = {"w": jnp.array([2.0, 3.0])}, {"w": jnp.array([True, False])}
    >>> straight_through(weights, mask)["w"].tolist()
    [2.0, 0.0]
    >>> jax.grad(lambda w: straight_through(w, mask)["w"].sum())(weights)["w"].tolist()
    [1.0, 1.0]
    """

    def pass_through(keep: jax.Array, weight: jax.Array) -> jax.Array:
        # w + (0 - w) is 0 and w + 0 is w in every float format.
        cut = jnp.where(keep, jnp.zeros_like(weight), -weight)
        return weight + jax.lax.stop_gradient(cut)

    return trees.merge_synapses(pass_through, mask, params)


def str_init(
    params: PyTree,
    value: Number = -5.0,
    *,
    per: Literal["leaf", "output"] = "leaf",
    select: trees.Select = None,
) -> PyTree:
    """Thresholds for :func:`soft_threshold`, to be trained like (and with) the weights.

    Args:
      params: pytree of arrays.
      value: initial s of all; the threshold is ``sigmoid(s)``, 0.0067 at -5. (The authors start far
        lower and let weight decay on s raise it.)
      per: one threshold a "leaf", or one for each "output" (last axis).
      select: as for :func:`adaptivenet.trees.select_leaves`.

    Returns:
      Pytree of float32: scalars, or ``[1, ..., out]``; masked nodes for other leaves.

    Raises:
      ValueError, TypeError: as :func:`adaptivenet.trees.select_leaves`, or an unknown ``per``.

    >>> str_init({"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}, per="output")["kernel"].shape
    (1, 2)
    """
    _choose(per, ("leaf", "output"))

    def initial(weight: jax.Array) -> jax.Array:
        shape = () if per == "leaf" else _gate_shape(weight, per)
        return jnp.broadcast_to(jnp.asarray(value).astype(jnp.float32), shape)

    return jax.tree.map(initial, trees.synapses(params, select))


def soft_threshold(params: PyTree, thresholds: PyTree) -> PyTree:
    """Soft thresholding with learnt thresholds (STR): ``sign(w) relu(|w| - sigmoid(s))``.

    Args:
      params: pytree of arrays.
      thresholds: pytree of s, as of :func:`str_init`: arrays that broadcast against the weights,
        masked nodes for leaves that are not synapses.

    Returns:
      Effective parameters; a weight below its threshold is exactly zero and has no gradient (weight
      decay still acts on it). Shapes and dtypes are those of ``params``.

    Raises:
      ValueError: the thresholds belong to another tree, or do not broadcast against its leaves.

    References:
      Kusupati et al., "Soft threshold weight reparameterization for learnable sparsity", ICML 2020.

    >>> thresholds = {"w": jnp.float32(0.0)}  # sigmoid(0) = 0.5
    >>> soft_threshold({"w": jnp.array([0.25, -2.0])}, thresholds)["w"].tolist()
    [0.0, -1.5]
    """
    _check_fit("threshold", thresholds, params)

    def shrink(s: jax.Array, weight: jax.Array) -> jax.Array:
        threshold = jax.nn.sigmoid(s.astype(jnp.float32)).astype(weight.dtype)
        left = jnp.abs(weight) - threshold
        return jnp.where(left > 0, jnp.sign(weight) * left, jnp.zeros_like(weight))

    return trees.merge_synapses(shrink, thresholds, params)


def hard_concrete_init(
    params: PyTree,
    key: jax.Array,
    *,
    rate: Number = 0.5,
    per: Per = "synapse",
    select: trees.Select = None,
) -> PyTree:
    """Gate parameters for :func:`hard_concrete`: normal around the log odds of staying.

    Args:
      params: pytree of arrays.
      key: random key.
      rate: initial rate at which gates drop, in (0, 1).
      per: one gate a "synapse", for each "input" (axis -2 of a kernel ``[..., in, out]``, which
        drops whole units of the layer before) or for each "output" (last axis; the bias stays).
      select: as for :func:`adaptivenet.trees.select_leaves`.

    Returns:
      Pytree of float32, of the shapes of the weights with 1 for the axes that share a gate; masked
      nodes for other leaves. The standard deviation is 0.01.

    Raises:
      ValueError: the rate is outside (0, 1), an unknown ``per``; ValueError, TypeError: as
        :func:`adaptivenet.trees.select_leaves`.

    >>> params = {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}
    >>> hard_concrete_init(params, jax.random.key(0), per="input")["kernel"].shape
    (3, 1)
    """
    if known(rate) and not np.all((np.asarray(rate) > 0) & (np.asarray(rate) < 1)):
        raise ValueError(f"rate must be in (0, 1), not {rate}.")
    _choose(per, ("synapse", "input", "output"))
    leaves, treedef = jax.tree.flatten(trees.synapses(params, select))
    rate = jnp.asarray(rate).astype(jnp.float32)
    mean = jnp.log1p(-rate) - jnp.log(rate)
    gates = [
        mean + 0.01 * jax.random.normal(jax.random.fold_in(key, place), shape, jnp.float32)
        for place, shape in enumerate(_gate_shape(leaf, per) for leaf in leaves)
    ]
    return jax.tree.unflatten(treedef, gates)


def hard_concrete(
    params: PyTree,
    log_alpha: PyTree,
    key: jax.Array | None = None,
    *,
    temperature: Number = _TEMPERATURE,
    low: Number = _LOW,
    high: Number = _HIGH,
) -> PyTree:
    """Weights times hard concrete gates, which are exactly 0 or 1 with positive probability (L0).

    A gate is ``clip(low + (high - low) s, 0, 1)`` with ``s = sigmoid((logit(u) + log_alpha) /
    temperature)`` for a uniform u; without a key it is ``s = sigmoid(log_alpha)``, the gate to test
    with.

    Args:
      params: pytree of arrays.
      log_alpha: pytree of gate parameters, as of :func:`hard_concrete_init`, that broadcast against
        the weights; masked nodes for leaves that are not synapses.
      key: random key of this step; None for the deterministic gate.
      temperature: > 0; the smaller, the more often a gate is 0 or 1.
      low: lower end of the stretched interval, < 0.
      high: its upper end, > 1.

    Returns:
      Effective parameters of the shapes and dtypes of ``params``, exactly zero where a gate is.

    Raises:
      ValueError: the gates belong to another tree or do not broadcast against its leaves, or a
        number is out of range.

    References:
      Louizos, Welling and Kingma, "Learning sparse neural networks through L0 regularization", ICLR
      2018, section 2.2.

    >>> log_alpha = {"w": jnp.array([-9.0, 0.0, 9.0])}
    >>> hard_concrete({"w": jnp.full(3, 4.0)}, log_alpha)["w"].tolist()
    [0.0, 2.0, 4.0]
    """
    _check_gate(temperature, low, high)
    _check_fit("gate", log_alpha, params)
    temperature, low, high = (jnp.asarray(x).astype(jnp.float32) for x in (temperature, low, high))
    places = iter(range(len(jax.tree.leaves(log_alpha))))

    def gate(alpha: jax.Array, weight: jax.Array) -> jax.Array:
        place, alpha = next(places), alpha.astype(jnp.float32)
        if key is None:
            s = jax.nn.sigmoid(alpha)
        else:
            noise = jax.random.logistic(jax.random.fold_in(key, place), alpha.shape, jnp.float32)
            s = jax.nn.sigmoid((noise + alpha) / temperature)
        z = jnp.clip(low + (high - low) * s, 0.0, 1.0)
        return jnp.where(z > 0, weight * z.astype(weight.dtype), jnp.zeros_like(weight))

    return trees.merge_synapses(gate, log_alpha, params)


def l0_penalty(
    log_alpha: PyTree,
    params: PyTree,
    *,
    temperature: Number = _TEMPERATURE,
    low: Number = _LOW,
    high: Number = _HIGH,
) -> jax.Array:
    """The expected number of synapses whose hard concrete gate is not zero.

    Args:
      log_alpha: gate parameters, as for :func:`hard_concrete`.
      params: pytree of arrays (or of their shapes); a gate that several synapses share counts for
        all of them.
      temperature: as for :func:`hard_concrete`.
      low: as for :func:`hard_concrete`.
      high: as for :func:`hard_concrete`.

    Returns:
      Float32 scalar between 0 and the number of synapses; differentiable in ``log_alpha``. Add it
      to a mean loss times a strength of about 1 / (number of training examples).

    Raises:
      ValueError: as :func:`hard_concrete`.

    References:
      Louizos, Welling and Kingma, "Learning sparse neural networks through L0 regularization", ICLR
      2018, section 2.2 (and 2.4 for shared gates).

    >>> log_alpha = {"w": jnp.array([[-40.0, 40.0]])}  # one gate for each of two columns
    >>> l0_penalty(log_alpha, {"w": jnp.zeros((3, 2))}).item()
    3.0
    """
    _check_gate(temperature, low, high)
    _check_fit("gate", log_alpha, params)
    low, high = (jnp.asarray(x).astype(jnp.float32) for x in (low, high))
    shift = jnp.asarray(temperature).astype(jnp.float32) * jnp.log(-low / high)

    def expected(alpha: jax.Array, weight: Any) -> jax.Array:
        shared = math.prod(jnp.shape(weight)) / max(alpha.size, 1)
        return shared * jnp.sum(jax.nn.sigmoid(alpha.astype(jnp.float32) - shift))

    numbers = jax.tree.leaves(trees.map_synapses(expected, log_alpha, params))
    return sum(numbers, start=jnp.zeros((), jnp.float32))


def support(params: PyTree, select: trees.Select = None) -> PyTree:
    """The mask of what is not zero.

    Args:
      params: pytree of arrays, such as effective parameters.
      select: as for :func:`adaptivenet.trees.select_leaves`.

    Returns:
      Pytree of bool; masked nodes for leaves that are not synapses.

    Raises:
      ValueError, TypeError: as :func:`adaptivenet.trees.select_leaves`.

    >>> support({"kernel": jnp.array([[0.0, -2.0]]), "bias": jnp.zeros(2)})["kernel"].tolist()
    [[False, True]]
    """
    return jax.tree.map(lambda leaf: leaf != 0, trees.synapses(params, select))


def _gate_shape(weight: jax.Array, per: str) -> tuple[int, ...]:
    if per == "synapse":
        return weight.shape
    axis = weight.ndim - (1 if per == "output" else 2)
    if axis < 0:
        raise ValueError(
            f"per={per!r} needs an axis of inputs before that of outputs, which a leaf of shape "
            f"{weight.shape} lacks; narrow select=."
        )
    return tuple(size if place == axis else 1 for place, size in enumerate(weight.shape))


def _choose(per: str, choices: tuple[str, ...]) -> None:
    if per not in choices:
        raise ValueError(f"per={per!r}; choose one of {', '.join(map(repr, choices))}.")


def _check_gate(temperature: Number, low: Number, high: Number) -> None:
    if known(temperature) and not np.all(np.asarray(temperature) > 0):
        raise ValueError(f"temperature must be > 0, not {temperature}.")
    if known(low) and not np.all(np.asarray(low) < 0):
        raise ValueError(f"low must be < 0, so that a gate can be zero, not {low}.")
    if known(high) and not np.all(np.asarray(high) > 1):
        raise ValueError(f"high must be > 1, so that a gate can be one, not {high}.")


def _check_fit(what: str, gates: PyTree, params: PyTree) -> None:
    """Refuses gates that would not broadcast to the shape of their weights."""
    names = iter(trees.paths(gates))

    def check(gate: Any, weight: Any) -> None:
        name, shape, own = next(names), jnp.shape(gate), jnp.shape(weight)
        fits = len(shape) <= len(own) and all(
            size in (1, most) for size, most in zip(shape[::-1], own[::-1], strict=False)
        )
        if not fits:
            raise ValueError(
                f"{what} {name!r} of shape {shape} does not broadcast to its weights' shape {own}."
            )

    trees.map_synapses(check, gates, params)
