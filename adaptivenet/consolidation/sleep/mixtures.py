"""A memory of classes as mixtures of factor analysers, fitted as examples stream by.

No example is kept and nothing is trained by gradients: for every class a few Gaussians, each with a
mean, some directions in which it is long (factors), and the variances of what is left::

    memory = init(features=784, classes=10, components=10, rank=8, seed=0)
    memory = observe(memory, inputs, labels)  # as often as there are batches
    inputs, labels = dream(memory, key, 128, low=0.0, high=1.0)

``inputs`` are pixels, or features of a hidden layer. With one component and no factors it holds
the mean and the variance of each class, exactly. Dreams differ from real examples, and a network
told dreams of old classes and real examples of new ones may learn to tell the two apart instead:
in a sleep phase dream of all classes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet.posterior._arrays import known
from adaptivenet.posterior._states import advanced, cast, initial_key

Number = Any  # a Python number, or a traced scalar

__all__ = ["Mixtures", "dream", "init", "log_density", "observe"]

# A component that explains a smaller share of its class's examples than this stays as it is.
_LEAST = 1e-6


class Mixtures(NamedTuple):
    """Mixtures of factor analysers, C classes of K components in D dimensions with R factors.

    Attributes:
      means: ``[C, K, D]``.
      factors: ``[C, K, D, R]``, L of the covariance ``L L^T + diag(noise)``.
      noise: ``[C, K, D]``, variances.
      shares: ``[C, K]``, probabilities of the components; zeros for a class that was never seen.
      squares: ``[C, K, D]``, running mean of ``r x^2``, with r how far the component explains x.
      products: ``[C, K, D, R + 1]``, of ``r x E[z]^T``, the latent z with a last 1.
      grams: ``[C, K, R + 1, R + 1]``, of ``r E[z z^T]``.
      seen: float32 ``[C]``, examples of each class.
      floor: scalar, the least variance.
      key: uint32, data of the random key.
    """

    means: jax.Array
    factors: jax.Array
    noise: jax.Array
    shares: jax.Array
    squares: jax.Array
    products: jax.Array
    grams: jax.Array
    seen: jax.Array
    floor: jax.Array
    key: jax.Array


def init(
    features: int,
    classes: int,
    *,
    components: int = 1,
    rank: int = 0,
    floor: Number = 1e-3,
    seed: Any = 0,
    dtype: Any = jnp.float32,
) -> Mixtures:
    """A memory of no examples.

    It takes ``classes * components * features * (2 * rank + 4)`` numbers.

    Args:
      features: numbers in an input.
      classes: number of classes.
      components: Gaussians a class.
      rank: factors of each; 0 for diagonal covariances.
      floor: the least variance of an input: inputs should be of the order of 1.
      seed: integer (possibly traced) or a random key.
      dtype: float32, or float64.

    Returns:
      The memory.

    Raises:
      ValueError: a size is out of range, or the floor not positive.

    >>> memory = init(features=3, classes=2, rank=1)
    >>> memory.factors.shape, memory.seen.tolist()
    ((2, 1, 3, 1), [0.0, 0.0])
    """
    sizes = {"features": features, "classes": classes, "components": components}
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, not {value!r}.")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= features:
        raise ValueError(f"rank must be an integer in [0, {features}], not {rank!r}.")
    if known(floor) and not np.all(np.asarray(floor) > 0):
        raise ValueError(f"floor must be positive, not {floor}.")
    own = (classes, components)

    def zeros(*shape: int) -> jax.Array:
        return jnp.zeros((*own, *shape), dtype)

    return Mixtures(
        means=zeros(features),
        factors=zeros(features, rank),
        noise=zeros(features) + 1.0,
        shares=zeros(),
        squares=zeros(features),
        products=zeros(features, rank + 1),
        grams=zeros(rank + 1, rank + 1),
        seen=jnp.zeros(classes, jnp.float32),
        floor=cast(floor, jnp.dtype(dtype)),
        key=initial_key(seed, ()),
    )


def observe(
    memory: Mixtures,
    inputs: jax.Array,
    labels: jax.Array,
    *,
    weights: jax.Array | None = None,
    forgetting: Number = 1.0,
) -> Mixtures:
    """Takes in a batch by one step of online expectation-maximization.

    For each class in the batch the statistics of the examples (under the parameters as they were)
    are averaged into those of the past at the rate ``(batch / seen)^forgetting``, counted in
    examples of the class, and the parameters are what maximizes the likelihood for them. The first
    examples of a class give its components a start: the first batch of a class should be large.
    Classes that are not in the batch stay as they are. One step on the same batch with the rate 1
    is one step of ordinary expectation-maximization.

    Args:
      memory: see :func:`init`.
      inputs: ``[batch, features]``. Memory of ``batch * classes * components * features`` numbers
        is needed.
      labels: int ``[batch]``; others than ``0 <= label < classes`` are passed over.
      weights: ``[batch]``, numbers or bools.
      forgetting: in (0.5, 1]: with 1 all examples count the same, which is exact for one component
        without factors; with less early ones, whose statistics come from poor parameters, fade,
        which several components and factors need (0.6 to 0.8, and two or three passes over what
        there is). 0 forgets all but the batch.

    Returns:
      The memory after the batch.

    Raises:
      ValueError: shapes do not fit.

    References:
      Cappe and Moulines, "On-line expectation-maximization algorithm for latent data models", JRSS
      B 71 (2009), for the online step; Ghahramani and Hinton, "The EM algorithm for mixtures of
      factor analyzers", technical report CRG-TR-96-1 (1996), for the statistics (here every
      component has a noise of its own); Liu, Rubin and Wu, "Parameter expansion to accelerate EM:
      the PX-EM algorithm", Biometrika 85 (1998), by which the variance of every input under a
      component is that of its statistics after each step; Arthur and Vassilvitskii, "k-means++:
      the advantages of careful seeding", SODA 2007, for the start.

    >>> memory = observe(init(1, 1), jnp.array([[1.0], [3.0]]), jnp.array([0, 0]))
    >>> memory.means.tolist(), memory.noise.tolist()
    ([[[2.0]]], [[[1.0]]])
    """
    classes, _, features = memory.means.shape
    if inputs.ndim != 2 or inputs.shape[1] != features:
        raise ValueError(f"inputs must be [batch, {features}], not {inputs.shape}.")
    labels = jnp.asarray(labels)
    if labels.shape != inputs.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be {inputs.shape[0]} integers, not {labels.dtype}{list(labels.shape)}."
        )
    kind = memory.means.dtype
    inputs = inputs.astype(kind)
    belongs = labels[:, None] == jnp.arange(classes, dtype=labels.dtype)
    member = belongs.astype(kind)
    if weights is not None:
        member = member * jnp.asarray(weights).astype(kind)[:, None]
    amount = jnp.sum(member, axis=0)
    here = amount > 0
    new = here & (memory.seen == 0)
    own = jax.random.wrap_key_data(memory.key)
    memory = jax.lax.cond(
        jnp.any(new),
        lambda memory: _started(memory, jax.random.fold_in(own, 1), inputs, member, new),
        lambda memory: memory,
        memory,
    )

    # Expectation: how far each component explains each example, and by which latents.
    scores, latents, spread = _explained(memory, inputs)
    scores = scores + jnp.log(memory.shares)
    scores = jnp.where(member[:, :, None] > 0, scores, jnp.zeros((), kind))
    take = jax.nn.softmax(scores, axis=-1) * member[:, :, None]
    take = take / jnp.where(here, amount, jnp.ones((), kind))[:, None]
    full = jnp.concatenate([latents, jnp.ones((*take.shape, 1), kind)], axis=-1)
    taken = take[..., None] * full
    squares = jnp.einsum("bck,bd->ckd", take, jnp.square(inputs))
    products = jnp.einsum("bckr,bd->ckdr", taken, inputs)
    grams = jnp.einsum("bckr,bcks->ckrs", taken, full)
    rank = memory.factors.shape[-1]
    total = jnp.sum(take, axis=0)
    grams = grams.at[..., :rank, :rank].add(total[..., None, None] * spread)

    seen = memory.seen + amount.astype(jnp.float32)
    part = amount.astype(jnp.float32) / jnp.maximum(seen, 1e-12)
    rate = jnp.where(here, jnp.power(jnp.maximum(part, 1e-12), cast(forgetting, part)), 0.0)
    rate = rate.astype(kind)

    def averaged(old: jax.Array, now: jax.Array) -> jax.Array:
        r = rate.reshape(classes, *(1,) * (old.ndim - 1))
        return old + r * (now - old)

    memory = memory._replace(
        squares=averaged(memory.squares, squares),
        products=averaged(memory.products, products),
        grams=averaged(memory.grams, grams),
        seen=seen,
        key=advanced(memory.key),
    )
    return _maximized(memory, here)


def log_density(memory: Mixtures, inputs: jax.Array) -> jax.Array:
    """The log density of inputs under every class.

    With equal priors the largest is the class that Bayes's rule gives: how good a classifier that
    is tells how much of the classes the memory holds.

    Args:
      memory: see :func:`init`.
      inputs: ``[batch, features]``.

    Returns:
      ``[batch, classes]``, in nats; -inf for a class that was never seen.

    >>> memory = observe(init(1, 2), jnp.array([[-1.0], [1.0]]), jnp.array([0, 0]))
    >>> log_density(memory, jnp.zeros((1, 1)))  # -log(2 pi) / 2
    Array([[-0.9189...,       -inf]], dtype=float32)
    """
    scores = _explained(memory, inputs.astype(memory.means.dtype))[0] + jnp.log(memory.shares)
    return jax.nn.logsumexp(scores, axis=-1)


def dream(
    memory: Mixtures,
    key: jax.Array,
    number: int,
    labels: jax.Array | None = None,
    *,
    low: Number | None = None,
    high: Number | None = None,
    grain: Number = 1.0,
    by_frequency: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Draws inputs of the classes.

    Args:
      memory: see :func:`init`.
      key: random key.
      number: how many.
      labels: int ``[number]``, the classes; by default drawn from those that were seen.
      low: inputs below it are set to it, such as 0 for pixels.
      high: inputs above it are set to it.
      grain: factor of the noise (as a standard deviation) that is left beside the factors; 1 for
        draws from the model. Noise that real inputs do not have is what a network tells dreams by:
        with enough factors, less of it serves better.
      by_frequency: whether labels are drawn as often as they were seen, or all equally often.

    Returns:
      Inputs ``[number, features]`` and labels int32 ``[number]``. Of a memory that has seen nothing
      they are noise.

    Raises:
      ValueError: labels do not fit.

    >>> memory = observe(init(1, 2, floor=1e-6), jnp.full((4, 1), 3.0), jnp.ones(4, jnp.int32))
    >>> inputs, labels = dream(memory, jax.random.key(0), 2)
    >>> inputs.round(1).tolist(), labels.tolist()
    ([[3.0], [3.0]], [1, 1])
    """
    kind, rank = memory.means.dtype, memory.factors.shape[-1]
    which, part, shade, rough = jax.random.split(key, 4)
    if labels is None:
        amounts = memory.seen if by_frequency else (memory.seen > 0).astype(jnp.float32)
        labels = _drawn(which, jnp.broadcast_to(amounts, (number, *amounts.shape)))
    labels = jnp.asarray(labels).astype(jnp.int32)
    if labels.shape != (number,):
        raise ValueError(f"labels must be {number} integers, not of the shape {labels.shape}.")
    place = labels, _drawn(part, memory.shares[labels])
    latents = jax.random.normal(shade, (number, rank), kind)
    noise = jax.random.normal(rough, (number, memory.means.shape[-1]), kind)
    noise = cast(grain, kind) * noise
    found = memory.means[place] + jnp.sqrt(memory.noise[place]) * noise
    found = found + jnp.einsum("bdr,br->bd", memory.factors[place], latents)
    if low is not None:
        found = jnp.maximum(found, cast(low, kind))
    if high is not None:
        found = jnp.minimum(found, cast(high, kind))
    return found, labels


def _drawn(key: jax.Array, weights: jax.Array) -> jax.Array:
    """An index for each row of weights; all are alike where a row has none."""
    none = jnp.sum(weights, axis=-1, keepdims=True) <= 0
    logits = jnp.where(none, jnp.zeros_like(weights), jnp.log(weights))
    return jax.random.categorical(key, logits).astype(jnp.int32)


def _explained(memory: Mixtures, inputs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log densities ``[B, C, K]``, latent means ``[B, C, K, R]``, covariances ``[C, K, R, R]``."""
    rank = memory.factors.shape[-1]
    gaps = inputs[:, None, None, :] - memory.means
    weighted = memory.factors / memory.noise[..., None]
    # The covariance is L L^T + N; all that is needed of it is of the size of I + L^T N^-1 L.
    inner = jnp.einsum("ckdr,ckds->ckrs", memory.factors, weighted)
    inner = inner + jnp.eye(rank, dtype=inner.dtype)
    root = jnp.linalg.cholesky(inner)
    spread = jnp.linalg.inv(inner)
    along = jnp.einsum("bckd,ckdr->bckr", gaps, weighted)
    latents = jnp.einsum("bckr,ckrs->bcks", along, spread)
    square = jnp.sum(jnp.square(gaps) / memory.noise, axis=-1) - jnp.sum(along * latents, axis=-1)
    volume = jnp.sum(jnp.log(memory.noise), axis=-1)
    volume = volume + 2.0 * jnp.sum(jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1)), axis=-1)
    constant = memory.means.shape[-1] * math.log(2.0 * math.pi)
    return -0.5 * (square + volume + constant), latents, spread


def _maximized(memory: Mixtures, here: jax.Array) -> Mixtures:
    """The parameters that are likeliest for the statistics, of the classes that are here."""
    rank, kind = memory.factors.shape[-1], memory.means.dtype
    total = memory.grams[..., -1, -1]
    moved = here[:, None] & (total > _LEAST)
    scale = jnp.where(total > _LEAST, total, jnp.ones((), kind))
    eye = jnp.eye(rank + 1, dtype=kind)
    grams = jnp.where(moved[..., None, None], memory.grams / scale[..., None, None], eye)
    products = memory.products / scale[..., None, None]
    loads = jnp.linalg.solve(grams, jnp.swapaxes(products, -1, -2))  # [C, K, R + 1, D]
    left = memory.squares / scale[..., None] - jnp.einsum("ckrd,ckdr->ckd", loads, products)
    shares = jnp.where(here[:, None], total / jnp.sum(total, axis=-1, keepdims=True), memory.shares)
    each = moved[..., None]
    # The latents as they were found, of mean m and covariance C C^T, are made standard again: the
    # factors take up C and the mean L m, and the statistics follow into the new coordinates.
    middle = grams[..., :rank, -1]
    spread = grams[..., :rank, :rank] - middle[..., :, None] * middle[..., None, :]
    root = jnp.linalg.cholesky(spread)
    back = jnp.linalg.inv(root)
    shift = -jnp.einsum("ckrs,cks->ckr", back, middle)
    turn = jnp.concatenate([back, shift[..., None]], axis=-1)
    last = jnp.broadcast_to(eye[-1:], (*total.shape, 1, rank + 1))
    turn = jnp.where(each[..., None], jnp.concatenate([turn, last], axis=-2), eye)
    factors = jnp.einsum("ckrd,ckrs->ckds", loads[..., :rank, :], root)
    means = loads[..., -1, :] + jnp.einsum("ckrd,ckr->ckd", loads[..., :rank, :], middle)
    return memory._replace(
        means=jnp.where(each, means, memory.means),
        factors=jnp.where(each[..., None], factors, memory.factors),
        noise=jnp.where(each, jnp.maximum(left, memory.floor), memory.noise),
        shares=jnp.where(here[:, None], shares, memory.shares),
        products=jnp.einsum("ckdr,cksr->ckds", memory.products, turn),
        grams=jnp.einsum("ckrs,ckir,ckjs->ckij", memory.grams, turn, turn),
    )


def _started(
    memory: Mixtures, key: jax.Array, inputs: jax.Array, member: jax.Array, new: jax.Array
) -> Mixtures:
    """A start for classes that are new: means at examples far from each other (k-means++)."""
    several, kind = memory.means.shape[1], memory.means.dtype
    pick, jitter, turn = jax.random.split(key, 3)
    weights = member.T
    total = jnp.where(new, jnp.sum(weights, axis=1), jnp.ones((), kind))
    lengths = jnp.sum(jnp.square(inputs), axis=1)

    def distances(points: jax.Array) -> jax.Array:
        own = jnp.sum(jnp.square(points), axis=1, keepdims=True)
        return jnp.maximum(own + lengths - 2.0 * points @ inputs.T, 0.0)

    def choose(nearest: jax.Array, now: jax.Array) -> tuple[jax.Array, Any]:
        places = _drawn(now, weights * nearest)
        # Where all of a class are alike, whichever of them.
        alike = jnp.sum(weights * nearest, axis=1) <= 0
        places = jnp.where(alike, jnp.argmax(weights, axis=1).astype(jnp.int32), places)
        away = distances(inputs[places])
        return jnp.minimum(nearest, away), away

    # The first is any of the class.
    _, away = choose(jnp.ones_like(weights), jax.random.fold_in(pick, several))
    _, others = jax.lax.scan(choose, away, jax.random.split(pick, several - 1))
    away = jnp.concatenate([away[None], others])  # [K, C, B]
    # Then one step of k-means: means of what is nearest, and the variances about them.
    nearest = jax.nn.one_hot(jnp.argmin(away, axis=0), several, dtype=kind) * weights[..., None]
    amounts = jnp.sum(nearest, axis=1)  # [C, K]
    some = jnp.where(amounts > 0, amounts, jnp.ones((), kind))
    chosen = jnp.einsum("cbk,bd->ckd", nearest, inputs) / some[..., None]
    between = jnp.einsum("ck,ckd->cd", amounts, jnp.square(chosen))
    within = (weights @ jnp.square(inputs) - between) / total[:, None]
    within = jnp.maximum(within, memory.floor)
    whole = weights @ inputs / total[:, None]
    chosen = jnp.where(amounts[..., None] > 0, chosen, whole[:, None])
    size = jnp.sqrt(within)[:, None]
    # Components of the same examples must differ.
    chosen = chosen + 0.1 * size * jax.random.normal(jitter, memory.means.shape, kind)
    factors = 0.1 * size[..., None] * jax.random.normal(turn, memory.factors.shape, kind)
    each = new[:, None, None]
    return memory._replace(
        means=jnp.where(each, chosen, memory.means),
        factors=jnp.where(each[..., None], factors, memory.factors),
        noise=jnp.where(each, within[:, None], memory.noise),
        shares=jnp.where(new[:, None], jnp.full((), 1.0 / several, kind), memory.shares),
    )
