"""Sleep replay consolidation: noise drives a network of spikes, and its synapses learn by Hebb.

A trained network of rectified units is read as one of spiking neurons with the same kernels, scaled
layer by layer. Poisson noise, with the mean of what was learnt as its rates, drives the first
layer; what fires together is strengthened, what is silent before a neuron that fires is weakened;
then the kernels go back. No example and no label is needed::

    scales = 55.9 * jnp.stack(layer_scales(params, inputs))
    params, report = sleep_replay(
        params, key, inputs.mean(0), steps=15_000, scales=scales, thresholds=(14.5, 44.6, 38.0)
    )

These numbers and the defaults are, rounded, those of the authors' code for MNIST in five tasks
(784-1200-1200-10, no biases), which also shows one window of the mean at a time,
``view=windows((28, 28), 11)``, and sleeps 5,000 steps longer after every further task. Others need
a search of their own, which a population under ``vmap`` can make.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet import trees
from adaptivenet.posterior._arrays import known, wide
from adaptivenet.posterior._states import cast

PyTree = Any
Number = Any  # a Python number, or a traced scalar
Masked = Callable[[jax.Array, jax.Array], jax.Array]

__all__ = ["SleepReport", "layer_scales", "sleep_replay", "windows"]


class SleepReport(NamedTuple):
    """What happened in a sleep.

    Attributes:
      rates: for the inputs and for each layer ``[units]``, spikes a step.
      change: for each layer a scalar, the mean absolute change of a synapse.
    """

    rates: tuple[jax.Array, ...]
    change: tuple[jax.Array, ...]


def sleep_replay(
    params: PyTree,
    key: jax.Array,
    mean_inputs: jax.Array,
    *,
    steps: int,
    scales: Sequence[Number] | jax.Array,
    thresholds: Sequence[Number] | jax.Array,
    rate: Number = 0.479,
    increment: Number = 0.032,
    decrement: Number = 0.0033,
    decay: Number = 0.999,
    inhibition: Number = 0.0,
    sharpness: Number | None = 1e-3,
    kernels: Sequence[str] | None = None,
    view: Masked | None = None,
    mask: PyTree | None = None,
) -> tuple[PyTree, SleepReport]:
    """One phase of sleep replay consolidation.

    In each step an input spikes with probability ``rate * mean_input`` (at most 1). Layer by layer,
    with the spikes p of the layer below and its kernel W: the drive ``scale * p W``, less
    ``inhibition`` times its mean over the layer, is added to the potential, which keeps ``decay``
    of itself; units whose potential reaches their threshold spike, and fall to zero. For a unit
    that spikes, synapses from units that spiked in the same step grow by ``increment * f(W)``, the
    others of its synapses shrink by ``decrement * f(W)``, at once.
    ``f(W) = 2 / (1 + exp(W / sharpness))`` is 2 for negative weights and falls to 0 for positive
    ones: what has grown large enough changes no more.

    **Choices.** This is the procedure of the authors' published code. The paper's own pseudocode
    was not at hand, and may differ in f. A unit that spikes may do so again in the next step (their
    refractory time is zero); their final rescaling of the kernels, which is off in their
    experiments, is left out. Biases have no part in it, and stay.

    Args:
      params: pytree of arrays; computed in float32 (float64), returned in its dtypes.
      key: random key.
      mean_inputs: ``[inputs]``, the mean of what was learnt, in [0, 1].
      steps: time steps.
      scales: one number a layer, what its kernel is multiplied by in sleep: some number times
        :func:`layer_scales`.
      thresholds: one number a layer.
      rate: spikes a step of an input whose mean is 1.
      increment: see above, as for what follows.
      decrement: of synapses from silent units.
      decay: share of the potential that is kept, in [0, 1].
      inhibition: share of a layer's mean drive that is taken from each of its units.
      sharpness: width of f; None for ``f = 1``, which bounds nothing.
      kernels: regular expressions of the paths of the kernels ``[inputs, outputs]`` from the input
        on, one each; by default all leaves of two dimensions in the order of their paths, numbers
        counted as such.
      view: ``view(key, mean_inputs)``, what of the mean is shown in a step, such as
        :func:`windows`; all of it by default.
      mask: pytree of bool with the kernels' leaves: pruned synapses stay zero.

    Returns:
      The parameters after sleep and a report.

    Raises:
      ValueError: no kernels, or they do not follow on each other; numbers that are not one a layer
        or out of range.

    References:
      Tadros, Krishnan, Ramyaa and Bazhenov, "Sleep-like unsupervised replay reduces catastrophic
      forgetting in artificial neural networks", Nature Communications 13 (2022), Methods.

    >>> params = {"kernel": jnp.array([[0.0], [0.0]])}
    >>> slept, report = sleep_replay(
    ...     params, jax.random.key(0), jnp.array([1.0, 0.0]), steps=1, rate=1.0,
    ...     scales=[1.0], thresholds=[0.0], increment=0.1, decrement=0.01,
    ... )
    >>> slept["kernel"].tolist()  # the first input spikes, the second does not; the unit does
    [[0.10000000149011612], [-0.009999999776482582]]
    """
    places = _chain(params, kernels, mean_inputs)
    leaves, treedef = jax.tree.flatten(params)
    names = trees.paths(params)
    starts = [wide(leaves[place]) for place in places]
    _check(steps, increment, decrement, decay, sharpness)
    sizes = _per_layer("scales", scales, len(places))
    limits = _per_layer("thresholds", thresholds, len(places))
    keep = [jnp.ones_like(w, dtype=bool) for w in starts]
    if mask is not None:
        there = dict(zip(trees.paths(mask), jax.tree.leaves(mask), strict=True))
        keep = [there.get(names[p], k) for p, k in zip(places, keep, strict=True)]
    chances = jnp.clip(wide(mean_inputs), 0.0)

    def bounded(w: jax.Array) -> jax.Array:
        if sharpness is None:
            return jnp.ones_like(w)
        return 2.0 * jax.nn.sigmoid(-w / cast(sharpness, w))

    def step(carry: Any, now: jax.Array) -> tuple[Any, None]:
        weights, potentials, counts = carry
        look, spike = jax.random.split(now)
        shown = chances if view is None else view(look, chances)
        lots = jax.random.uniform(spike, shown.shape, shown.dtype)
        before = (lots < cast(rate, shown) * shown).astype(shown.dtype)
        after_weights, after_potentials, after_counts = [], [], [counts[0] + before]
        for layer, (w, v) in enumerate(zip(weights, potentials, strict=True)):
            drive = sizes[layer].astype(w.dtype) * (before.astype(w.dtype) @ w)
            drive = drive - cast(inhibition, w) * jnp.mean(drive)
            v = cast(decay, w) * v + drive
            fires = v >= limits[layer].astype(w.dtype)
            pre = before.astype(w.dtype)[:, None]
            change = cast(increment, w) * pre - cast(decrement, w) * (1.0 - pre)
            changed = fires[None, :] & keep[layer]
            after_weights.append(jnp.where(changed, w + change * bounded(w), w))
            after_potentials.append(jnp.where(fires, jnp.zeros_like(v), v))
            before = fires.astype(w.dtype)
            after_counts.append(counts[layer + 1] + before)
        return (after_weights, after_potentials, after_counts), None

    rest = [jnp.zeros(w.shape[1], w.dtype) for w in starts]
    counts = [jnp.zeros_like(chances), *rest]
    carry, _ = jax.lax.scan(step, (starts, rest, counts), jax.random.split(key, steps))
    ends, _, counts = carry
    for place, w in zip(places, ends, strict=True):
        leaves[place] = w.astype(leaves[place].dtype)
    report = SleepReport(
        rates=tuple(count / steps for count in counts),
        change=tuple(jnp.mean(jnp.abs(b - a)) for a, b in zip(starts, ends, strict=True)),
    )
    return jax.tree.unflatten(treedef, leaves), report


def layer_scales(
    params: PyTree,
    inputs: jax.Array,
    *,
    kernels: Sequence[str] | None = None,
    form: Literal["published", "exact"] = "published",
) -> tuple[jax.Array, ...]:
    """Data-based normalisation: by what each kernel is multiplied so that activities are of size 1.

    The network of rectified units without biases is run on the inputs, its last layer rectified
    too. With m the larger of a layer's largest activation and its largest weight, ``"exact"`` gives
    ``m_before / m``, under which no activity exceeds 1. ``"published"``, what sleep replay was
    tuned with, puts for ``m_before`` the quotient ``m / m_before`` that the layer before was
    divided by, which is the same for the first two layers only. (The authors' network for MNIST is
    trained with a dropout of 1/4 that is made up for at test time, not while it is trained: in m,
    hidden activations are multiplied by 3/4.)

    Args:
      params: pytree of arrays.
      inputs: ``[batch, inputs]``.
      kernels: as for :func:`sleep_replay`.
      form: ``"published"`` or ``"exact"``.

    Returns:
      One scalar a layer.

    Raises:
      ValueError: as :func:`sleep_replay`, or an unknown form.

    References:
      Diehl et al., "Fast-classifying, high-accuracy spiking deep networks through weight and
      threshold balancing", IJCNN 2015, data-based normalisation; Rueckauer et al., "Conversion of
      continuous-valued deep networks to efficient event-driven networks for image classification",
      Frontiers in Neuroscience 11 (2017), for the exact form.

    >>> params = [jnp.full((1, 1), 4.0), jnp.full((1, 1), 2.0)]
    >>> [float(s) for s in layer_scales(params, jnp.ones((1, 1)))]  # m: 4 and 8
    [0.25, 0.5]
    """
    if form not in ("published", "exact"):
        raise ValueError(f'form must be "published" or "exact", not {form!r}.')
    places = _chain(params, kernels, inputs[0])
    leaves = jax.tree.leaves(params)
    found, scales = wide(inputs), []
    previous: Any = 1.0
    for place in places:
        kernel = wide(leaves[place])
        found = jax.nn.relu(found.astype(kernel.dtype) @ kernel)
        size = jnp.maximum(jnp.max(found), jnp.max(kernel))
        size = jnp.where(size > 0, size, jnp.ones_like(size))
        divisor = size / previous
        scales.append(1.0 / divisor)
        previous = divisor if form == "published" else size
    return tuple(scales)


def windows(shape: tuple[int, int], size: int) -> Masked:
    """Shows a random square window of an image in each step, and zeros around it.

    Args:
      shape: height and width of the image that an input is, row by row.
      size: side of the window. (The authors' is 11 for MNIST, by a setting of 10.)

    Returns:
      A function for ``view=`` of :func:`sleep_replay`.

    Raises:
      ValueError: the window does not fit into the image.

    References:
      Tadros et al., Nature Communications 13 (2022), Methods.

    >>> windows((2, 2), 1)(jax.random.key(0), jnp.ones(4)).sum().item()
    1.0
    """
    if not 1 <= size <= min(shape):
        raise ValueError(f"size must be in [1, {min(shape)}], the image being {shape}, not {size}.")

    def view(key: jax.Array, inputs: jax.Array) -> jax.Array:
        if inputs.shape != (shape[0] * shape[1],):
            raise ValueError(f"an image {shape} has not {inputs.shape} inputs.")
        inside = jnp.ones((), bool)
        for axis, own in enumerate(jax.random.split(key)):
            low = jax.random.randint(own, (), 0, shape[axis] - size + 1, jnp.int32)
            place = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
            inside = inside & (place >= low) & (place < low + size)
        return jnp.where(inside.reshape(-1), inputs, jnp.zeros_like(inputs))

    return view


def _natural(name: str) -> list[Any]:
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def _chain(params: PyTree, kernels: Sequence[str] | None, inputs: jax.Array) -> list[int]:
    """The places of the kernels among the leaves, from the input on."""
    names, leaves = trees.paths(params), jax.tree.leaves(params)
    if kernels is None:
        places = [
            place
            for place, leaf in enumerate(leaves)
            if jnp.ndim(leaf) == 2 and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        ]
        places.sort(key=lambda place: _natural(names[place]))
    else:
        places = []
        for pattern in kernels:
            chosen = jax.tree.leaves(trees.select_leaves(params, pattern))
            own = [place for place, is_chosen in enumerate(chosen) if is_chosen]
            if len(own) != 1:
                found = ", ".join(names[place] for place in own)
                raise ValueError(f"kernels={pattern!r} must match one leaf, but matches {found}.")
            places += own
    if not places:
        raise ValueError("no leaf is a kernel [inputs, outputs]: name them with kernels=.")
    size, before = jnp.shape(inputs)[-1], "the inputs"
    for place in places:
        shape = jnp.shape(leaves[place])
        if len(shape) != 2 or shape[0] != size:
            raise ValueError(
                f"kernel {names[place]!r} of shape {shape} does not follow on {before} with {size} "
                "units: name the kernels of dense layers in their order with kernels=[...]."
            )
        size, before = shape[1], repr(names[place])
    return places


def _per_layer(name: str, values: Any, number: int) -> list[jax.Array]:
    found = [jnp.asarray(value) for value in values] if np.iterable(values) else []
    if len(found) != number:
        raise ValueError(f"{name}= must be {number} numbers, one a layer, not {values}.")
    return found


def _check(steps: Any, increment: Any, decrement: Any, decay: Any, sharpness: Any) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive integer, not {steps!r}.")
    for name, value in (("increment", increment), ("decrement", decrement)):
        if known(value) and not np.all(np.asarray(value) >= 0):
            raise ValueError(f"{name} must be at least 0, not {value}.")
    if known(decay) and not np.all((np.asarray(decay) >= 0) & (np.asarray(decay) <= 1)):
        raise ValueError(f"decay must be in [0, 1], not {decay}.")
    if sharpness is not None and known(sharpness) and not np.all(np.asarray(sharpness) > 0):
        raise ValueError(f"sharpness must be positive, not {sharpness}.")
