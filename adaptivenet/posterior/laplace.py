"""Laplace approximations: a Gaussian around trained parameters, from curvature and a prior.

The curvature is the generalised Gauss-Newton matrix of the log likelihood, ``sum_n J_n^T H_n J_n``
with the Jacobian of the outputs and the Hessian by the outputs, summed over the data; for the
likelihoods here it is the Fisher information. The precision is that plus the prior's. The mean is
the given parameters, which should be a mode (trained with the prior as weight decay).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from adaptivenet import trees
from adaptivenet.posterior._arrays import known, wide
from adaptivenet.posterior.capture import Apply, Trace, trace
from adaptivenet.posterior.gaussian import Posterior
from adaptivenet.posterior.kronecker import kronecker, moments, summed
from adaptivenet.posterior.structured import (
    DiagonalPosterior,
    FullPosterior,
    Gaussian,
    prior_leaves,
)

PyTree = Any

LIKELIHOODS = ("categorical", "bernoulli", "gaussian")
STRUCTURES = ("diagonal", "kronecker", "ekfac", "full", "last_layer")
LARGEST_MATRIX = 20_000  # rows; 1.6 GB in float32

__all__ = [
    "LIKELIHOODS",
    "STRUCTURES",
    "Laplace",
    "as_gaussian",
    "laplace",
    "log_likelihood",
]


@trees.register_dataclass
@dataclass(frozen=True)
class Laplace:
    """A Laplace approximation, as :func:`laplace` makes it.

    Attributes:
      gaussian: the posterior: :class:`DiagonalPosterior`, :class:`KroneckerPosterior` or
        :class:`FullPosterior`; it has ``sample``, ``times``, ``solve``, ``variances``,
        ``diagonal`` and ``log_determinant``.
      log_likelihood: of all data at the mean, in nats.
      noise: variance of the observations (gaussian), else 1.
      likelihood: its name.
      count: how many numbers were observed.
    """

    gaussian: Any
    log_likelihood: jax.Array
    noise: jax.Array
    likelihood: str = field(metadata={"static": True})
    count: int = field(metadata={"static": True})

    def posterior(self, params: PyTree | None = None) -> Posterior:
        """The belief as independent Gaussians, by the diagonal of the precision."""
        return self.gaussian.posterior(params)

    def sample(self, key: jax.Array) -> PyTree:
        """A draw of the parameters."""
        return self.gaussian.sample(key)

    def with_prior(self, prior_precision: Any, *, shared: bool = False) -> Laplace:
        """The same data with another prior, without another pass over them."""
        return replace(self, gaussian=self.gaussian.with_prior(prior_precision, shared=shared))

    def with_noise(self, noise: Any) -> Laplace:
        """The same data with another variance of the observations (gaussian only).

        Raises:
          ValueError: another likelihood, or a variance that is not positive.
        """
        if self.likelihood != "gaussian":
            raise ValueError(f"likelihood={self.likelihood!r} has no noise.")
        noise = _positive(noise, "noise").astype(self.noise.dtype)
        squares = self.squares()
        found = -0.5 * (squares / noise + self.count * jnp.log(2 * math.pi * noise))
        scaled = self.gaussian.scaled(self.noise / noise)
        return replace(self, gaussian=scaled, noise=noise, log_likelihood=found)

    def squares(self) -> jax.Array:
        """The sum of squared errors at the mean, of a gaussian likelihood."""
        logs = self.count * jnp.log(2 * math.pi * self.noise)
        return -self.noise * (2 * self.log_likelihood + logs)


def laplace(
    apply: Apply,
    params: PyTree,
    inputs: PyTree,
    targets: jax.Array,
    *,
    likelihood: str,
    prior_precision: Any = 1.0,
    structure: str = "diagonal",
    noise: Any = 1.0,
    select: trees.Select = None,
    batch_size: int | None = None,
    samples: int | None = None,
    key: jax.Array | None = None,
    sharing: str = "expand",
) -> Laplace:
    """Fits a Laplace approximation around trained parameters.

    Products with kernels are found in the traced function (see
    :mod:`adaptivenet.posterior.capture`); no layer classes are needed. Each output (class) costs a
    backward pass over the data, without gradients by the kernels; ``samples`` replaces the sum
    over outputs by draws from the model's own predictions, which is unbiased.

    Args:
      apply: ``apply(params, inputs) -> outputs [examples, ...]``; logits for categorical and
        bernoulli, means for gaussian. Examples must not depend on each other (no batch norm in
        training mode) and nothing may be random.
      params: the mean, a pytree of arrays.
      inputs: all data, ``[examples, ...]``, or a pytree of such.
      targets: class numbers like the outputs without their last axis (categorical), or numbers of
        the outputs' shape: in [0, 1] (bernoulli), any (gaussian). A head ``[examples, time,
        classes]`` makes a prediction at each time, and the data are all of them.
      likelihood: "categorical", "bernoulli" or "gaussian".
      prior_precision: of a prior of mean 0 on every parameter: a positive number, or a pytree like
        the parameters with numbers or arrays that broadcast to the leaves.
      structure: "diagonal" (exact), "kronecker" (KFAC), "ekfac", "full" (exact, for few
        parameters), or "last_layer": full for the kernel and bias that make the output.
      noise: variance of the observations; gaussian only.
      select: regular expressions of the leaves to have a belief of; all floating ones by default.
      batch_size: examples at a time; None takes all at once.
      samples: draws of targets an example instead of all outputs.
      key: random key; with ``samples`` only.
      sharing: "expand" or "reduce"; for kernels that an example uses at several positions, of
        "kronecker" and "ekfac".

    Returns:
      The approximation; a pytree, so that it may be returned by a jitted function.

    Raises:
      ValueError: a head or targets that do not match the likelihood, an unknown name, a prior that
        is not positive or does not fit, a matrix too large, curvature that is not finite.

    References:
      MacKay, "A practical Bayesian framework for backpropagation networks", Neural Computation 4
      (1992); Ritter et al., "A scalable Laplace approximation for neural networks", ICLR 2018;
      Daxberger et al., "Laplace redux", NeurIPS 2021; Kristiadi et al., "Being Bayesian, even just
      a bit, fixes overconfidence in ReLU networks", ICML 2020, for the last layer; Kunstner et
      al., "Limitations of the empirical Fisher approximation", NeurIPS 2019, for what Fisher is.

    >>> x, y = jnp.array([[1.0], [2.0]]), jnp.array([[1.0], [2.0]])
    >>> fit = laplace(lambda p, x: x * p["w"], {"w": jnp.ones(1)}, x, y, likelihood="gaussian")
    >>> fit.posterior().precision["w"].tolist()  # 1 + 1^2 + 2^2
    [6.0]
    """
    _one_of("structure", structure, STRUCTURES)
    _one_of("likelihood", likelihood, LIKELIHOODS)
    if (samples is None) != (key is None):
        raise ValueError("samples= and key= go together: draws of targets need a random key.")
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be a number of draws >= 1, not {samples}.")
    variance = _positive(noise, "noise")
    if likelihood != "gaussian" and known(noise) and np.asarray(noise) != 1:
        raise ValueError(f"noise={noise} is for likelihood='gaussian'; {likelihood} has none.")
    targets = jnp.asarray(targets)
    found = trace(apply, params, inputs, select=select)
    shape = jax.eval_shape(apply, params, inputs)
    size = _check_examples(inputs, targets)
    _check_head(likelihood, shape, targets)
    _check_independent(apply, params, inputs)

    keys = () if key is None else jax.random.split(key, size)
    prior_leaves(prior_precision, params, _believed(found))  # refuses, while values are known
    chosen = select if select is None or isinstance(select, str) else tuple(select)
    fixed = _Fixed(likelihood, structure, chosen, batch_size, samples, sharing)
    try:
        hash(apply)
    except TypeError:  # callable objects that hold arrays
        held = apply
        apply = lambda params, inputs: held(params, inputs)  # noqa: E731
    given = (params, inputs, targets, prior_precision, variance, keys)
    gaussian, log = _fitted(apply, fixed, *given)
    _check_finite(gaussian, log)
    return Laplace(gaussian, log, variance.astype(log.dtype), likelihood, targets.size)


class _Fixed(NamedTuple):
    """What a program is compiled for."""

    likelihood: str
    structure: str
    select: trees.Select
    batch_size: int | None
    samples: int | None
    sharing: str


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fitted(
    apply: Apply,
    fixed: _Fixed,
    params: PyTree,
    inputs: PyTree,
    targets: jax.Array,
    prior_precision: Any,
    variance: jax.Array,
    keys: Any,
) -> tuple[Any, jax.Array]:
    """The Gaussian, and the log likelihood; compiled once for calls that are alike."""

    def likelihood_of(given: Any, data: Any) -> jax.Array:
        return log_likelihood(fixed.likelihood, apply(given[0], data[0]), data[1], given[1])

    log = summed(likelihood_of, (params, variance), (inputs, targets), fixed.batch_size)
    columns = functools.partial(_columns, fixed.likelihood, variance, fixed.samples)
    extra: dict[str, Any] = {"extra": keys, "batch_size": fixed.batch_size}
    found = trace(apply, params, inputs, select=fixed.select)
    if fixed.structure == "last_layer":
        members = found.last().members
        head = [f"^{re.escape(found.names[k])}$" for k in members]
        found = trace(apply, params, inputs, select=head)
    if fixed.structure in ("kronecker", "ekfac"):
        gaussian: Any = kronecker(
            found,
            params,
            inputs,
            columns,
            prior_precision=prior_precision,
            exact=fixed.structure == "ekfac",
            sharing=fixed.sharing,
            **extra,
        )
    else:
        fit = _diagonal if fixed.structure == "diagonal" else _full
        gaussian = fit(found, params, inputs, columns, extra).with_prior(prior_precision)
    return gaussian, log


def as_gaussian(belief: Any, params: PyTree | None = None) -> Gaussian:
    """The Gaussian of any belief: a Laplace approximation, a posterior, or what has one.

    Args:
      belief: :class:`Laplace`, one of the Gaussians, or a :class:`Posterior`.
      params: needed for a posterior that has masked leaves.

    Returns:
      The Gaussian.

    Raises:
      ValueError: masked leaves and no parameters.
      TypeError: something else.

    >>> belief = Posterior({"w": jnp.zeros(2)}, {"w": jnp.full(2, 4.0)})
    >>> as_gaussian(belief).variances()["w"].tolist()
    [0.25, 0.25]
    """
    if isinstance(belief, Laplace):
        return belief.gaussian
    if isinstance(belief, Gaussian):
        return belief
    if not isinstance(belief, Posterior):
        raise TypeError(
            "a belief is what laplace() returns, or a Posterior(mean, precision), not "
            f"{type(belief).__name__}."
        )
    means, treedef = jax.tree.flatten(belief.mean, is_leaf=trees.is_masked)
    believed = tuple(k for k, x in enumerate(means) if not trees.is_masked(x))
    if params is None and len(believed) < len(means):
        raise ValueError("this posterior has masked leaves: give the parameters as params=.")
    if params is not None:
        others = treedef.flatten_up_to(params)
        means = [others[k] if trees.is_masked(x) else x for k, x in enumerate(means)]
    precision = tuple(map(wide, jax.tree.leaves(belief.precision)))
    nothing = tuple(map(jnp.zeros_like, precision))
    return DiagonalPosterior(treedef.unflatten(means), precision, believed, (), nothing)


# --- structures ----------------------------------------------------------------------------------


def _believed(found: Trace) -> tuple[int, ...]:
    return tuple(sorted({*found.rest, *(k for site in found.sites for k in site.members)}))


def _diagonal(
    found: Trace, params: PyTree, inputs: PyTree, columns: Any, given: dict[str, Any]
) -> DiagonalPosterior:
    squares, rest = moments(found, params, inputs, columns, **given)
    leaves = dict(zip(found.rest, rest, strict=True))
    for site, square in zip(found.sites, squares, strict=True):
        leaves |= site.leaves(square)
    believed = _believed(found)
    return DiagonalPosterior(params, (), believed, found.sites, tuple(leaves[k] for k in believed))


def _full(
    found: Trace, params: PyTree, inputs: PyTree, columns: Any, given: dict[str, Any]
) -> FullPosterior:
    believed = _believed(found)
    leaves = jax.tree.leaves(params)
    size = sum(leaves[k].size for k in believed)
    if size > LARGEST_MATRIX:
        raise ValueError(
            f"a full matrix of {size} parameters takes {4 * size**2 / 1e9:.0f} GB: use "
            "structure='kronecker', or choose fewer leaves with select= or 'last_layer'."
        )

    alone = len(found.sites) == 1 and not found.rest and found.sites[0].positions == 1
    if alone:  # such as a last layer
        matrix = _one_product(found, params, inputs, columns, given)
        return FullPosterior(params, (), believed, found.sites, matrix, matrix)

    def batch(params: PyTree, data: Any) -> jax.Array:
        outputs, rows, pull = found.pullback(params, data[0])
        count, column = columns(outputs, data[1])

        def each(k: Any) -> jax.Array:
            deltas, rest = pull(column(k))
            parts = dict(zip(found.rest, rest, strict=True))
            for site, a, d in zip(found.sites, rows, deltas, strict=True):
                whole = jnp.einsum("nsi,nso->nio", a, d, precision=jax.lax.Precision.HIGHEST)
                parts |= jax.vmap(site.leaves)(whole)
            flat = [parts[k].reshape(outputs.shape[0], -1) for k in believed]
            return jnp.concatenate(flat, axis=1)

        jacobian = jax.lax.map(each, jnp.arange(count)).reshape(-1, size)
        return jnp.matmul(jacobian.T, jacobian, precision=jax.lax.Precision.HIGHEST)

    matrix = summed(batch, params, (inputs, given["extra"]), given["batch_size"])
    return FullPosterior(params, (), believed, found.sites, matrix, matrix)


def _one_product(
    found: Trace, params: PyTree, inputs: PyTree, columns: Any, given: dict[str, Any]
) -> jax.Array:
    """The matrix of one dense product: a sum of ``(a a^T) (x) (sum_k d_k d_k^T)`` over examples.

    That is as many times cheaper than products of whole gradients as there are columns.
    """
    (site,) = found.sites
    size, high = math.prod(site.shape), jax.lax.Precision.HIGHEST

    def batch(params: PyTree, data: Any) -> jax.Array:
        outputs, rows, pull = found.pullback(params, data[0])
        count, column = columns(outputs, data[1])
        deltas = jax.lax.map(lambda k: pull(column(k))[0][0][:, 0], jnp.arange(count))
        outer, a = jnp.einsum("kno,knp->nop", deltas, deltas, precision=high), rows[0][:, 0]

        def each(weights: jax.Array) -> jax.Array:  # of an output with all others
            weighed = (weights[:, :, None] * a[:, None, :]).reshape(len(a), -1)
            return jnp.matmul(weighed.T, a, precision=high)

        return jax.lax.map(each, jnp.moveaxis(outer, 2, 0))

    blocks = summed(batch, params, (inputs, given["extra"]), given["batch_size"])
    rows, outputs = site.shape
    whole = blocks.reshape(outputs, outputs, rows, rows).transpose(2, 1, 3, 0)
    places = site.leaves(jnp.arange(size).reshape(site.shape))
    order = jnp.concatenate([places[k].ravel() for k in _believed(found)])
    return whole.reshape(size, size)[order][:, order]


# --- likelihoods ---------------------------------------------------------------------------------


def log_likelihood(
    likelihood: str, outputs: jax.Array, targets: jax.Array, noise: Any = 1.0
) -> jax.Array:
    """The log likelihood of targets, summed, in nats.

    Args:
      likelihood: "categorical", "bernoulli" or "gaussian".
      outputs: logits or means, ``[examples, ...]``.
      targets: as for :func:`laplace`.
      noise: variance of the observations; gaussian only.

    Returns:
      A scalar.

    Raises:
      ValueError: an unknown likelihood.

    >>> round(log_likelihood("categorical", jnp.zeros((3, 4)), jnp.array([0, 1, 3])).item(), 4)
    -4.1589
    """
    _one_of("likelihood", likelihood, LIKELIHOODS)
    outputs = wide(outputs)
    if likelihood == "categorical":
        logs = jax.nn.log_softmax(outputs)
        return jnp.take_along_axis(logs, targets[..., None].astype(jnp.int32), axis=-1).sum()
    targets = targets.astype(outputs.dtype)
    if likelihood == "bernoulli":
        return (targets * outputs - jax.nn.softplus(outputs)).sum()
    noise = jnp.asarray(noise).astype(outputs.dtype)
    squares = jnp.square(targets - outputs)
    return -0.5 * (squares / noise + jnp.log(2 * math.pi * noise)).sum()


def _columns(
    likelihood: str, noise: jax.Array, samples: int | None, outputs: jax.Array, keys: Any
) -> tuple[int, Callable[[Any], jax.Array]]:
    """Cotangents whose outer products add up to the Hessian by the outputs of each example.

    For classes with probabilities p it is diag(p) - p p^T = R R^T, with sqrt(p_k) (e_k - p) for
    the k-th column of R; a drawn class y gives e_y - p, of the same expected outer product.
    """
    shape, outputs = outputs.shape, wide(outputs)
    categorical = likelihood == "categorical"
    p = jax.nn.softmax(outputs) if categorical else jax.nn.sigmoid(outputs)
    root = jax.lax.rsqrt(noise.astype(outputs.dtype))
    if samples is not None:

        def drawn(key: jax.Array, out: jax.Array, p: jax.Array) -> jax.Array:
            if categorical:
                return (
                    jax.nn.one_hot(jax.random.categorical(key, out), shape[-1], dtype=p.dtype) - p
                )
            if likelihood == "bernoulli":
                return jax.random.bernoulli(key, p).astype(p.dtype) - p
            return jax.random.normal(key, out.shape, out.dtype) * root

        def draw(k: Any) -> jax.Array:
            several = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, k)
            return jax.vmap(drawn)(several, outputs, p) / math.sqrt(samples)

        return samples, draw
    count = math.prod(shape[1:])
    width = shape[-1] if categorical else 1

    def column(k: Any) -> jax.Array:
        flat = p.reshape(shape[0], -1, width)
        here = (jnp.arange(count // width) == k // width)[:, None]
        if categorical:
            chosen = (jnp.arange(width) == k % width).astype(p.dtype)
            value = jnp.sqrt((flat * chosen).sum(axis=-1, keepdims=True)) * (chosen - flat)
        elif likelihood == "bernoulli":
            value = jnp.sqrt(flat * (1 - flat))
        else:
            value = jnp.broadcast_to(root, flat.shape)
        return jnp.where(here, value, jnp.zeros((), value.dtype)).reshape(shape)

    return count, column


# --- checks --------------------------------------------------------------------------------------


def _one_of(what: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise ValueError(f"{what} must be one of {', '.join(names)}, not {name!r}.")


def _positive(value: Any, what: str) -> jax.Array:
    found = wide(value)
    if found.ndim:
        raise ValueError(f"{what} must be a number, not an array of shape {found.shape}.")
    if known(found) and not 0 < float(found) < math.inf:
        raise ValueError(f"{what} must be positive and finite, not {value}.")
    return found


def _check_examples(inputs: PyTree, targets: jax.Array) -> int:
    size = jax.tree.leaves(inputs)[0].shape[0]
    if not size:
        raise ValueError("there are no examples.")
    if targets.shape[:1] != (size,):
        raise ValueError(f"{size} examples need as many targets, not {targets.shape}.")
    return size


def _check_head(likelihood: str, outputs: Any, targets: jax.Array) -> None:
    """Refuses outputs and targets that the likelihood is not for."""
    # As numpy, because jax would trace what is known within a jit.
    numbers = np.asarray(targets) if known(targets) else None
    if likelihood == "categorical":
        if len(outputs.shape) < 2 or outputs.shape[-1] < 2:
            raise ValueError(
                f"likelihood='categorical' needs logits [examples, ..., classes] of two classes or "
                f"more, but the head gives {outputs.shape}: use 'bernoulli' for one logit, "
                "'gaussian' for regression."
            )
        if not jnp.issubdtype(targets.dtype, jnp.integer) or targets.shape != outputs.shape[:-1]:
            raise ValueError(
                f"likelihood='categorical' with outputs {outputs.shape} needs whole class numbers "
                f"{outputs.shape[:-1]}, not {targets.dtype} targets {targets.shape}; for one-hot "
                "targets give targets.argmax(-1), for regression likelihood='gaussian'."
            )
        top = outputs.shape[-1] - 1
        if numbers is not None and not bool(((numbers >= 0) & (numbers <= top)).all()):
            raise ValueError(f"the targets must be class numbers from 0 to {top}, as the head has.")
        return
    if targets.shape != outputs.shape:
        raise ValueError(
            f"likelihood={likelihood!r} needs targets of the outputs' shape {outputs.shape}, not "
            f"{targets.shape}; for class numbers use likelihood='categorical'."
        )
    inside = numbers is None or bool(((numbers >= 0) & (numbers <= 1)).all())
    if likelihood == "bernoulli" and not inside:
        raise ValueError("likelihood='bernoulli' needs targets in [0, 1].")
    if likelihood == "gaussian" and not jnp.issubdtype(targets.dtype, jnp.floating):
        raise ValueError(
            f"likelihood='gaussian' needs floating targets, not {targets.dtype}; for classes use "
            "'categorical' or 'bernoulli'."
        )


def _check_independent(apply: Apply, params: PyTree, inputs: PyTree) -> None:
    """Compares two examples at once with each alone, where values are known."""
    leaves = jax.tree.leaves((params, inputs))
    if not all(map(known, leaves)) or leaves[-1].shape[0] < 2:
        return
    pair = jax.tree.map(lambda x: x[:2], inputs)
    compiled = jax.jit(apply)
    both, alone = compiled(params, pair), compiled(params, jax.tree.map(lambda x: x[:1], pair))
    if not known(both):
        return
    one, same = np.asarray(wide(alone))[0], np.asarray(wide(both))[0]
    finite = np.isfinite(one) & np.isfinite(same)  # what is not is found out later
    one, same = one[finite], same[finite]
    if not np.allclose(one, same, rtol=0.02, atol=0.02 * max(np.abs(one).max(initial=0), 1e-6)):
        raise ValueError(
            "the output of an example changes with the others in the batch (batch norm in training "
            "mode, or something random): give an apply for prediction."
        )


@jax.jit
def _facts(gaussian: Any) -> Any:
    leaves = jax.tree.leaves(gaussian.diagonal().precision)
    return [jnp.isfinite(x).all() for x in leaves], jnp.isfinite(gaussian.log_determinant())


def _check_finite(gaussian: Gaussian, value: jax.Array) -> None:
    if not all(map(known, jax.tree.leaves((gaussian, value)))):
        return
    if not bool(jnp.isfinite(value)):
        raise ValueError("the log likelihood of the data is not finite: look at inputs and params.")

    fine, positive = _facts(gaussian)
    if not known(positive):
        return
    for name, leaf in zip(gaussian.names, fine, strict=True):
        if not leaf:
            raise ValueError(f"the curvature of {name!r} is not finite: look at inputs and params.")
    if not positive:
        raise ValueError(
            "the precision matrix is not positive in this floating dtype: raise prior_precision, "
            "or compute in float64 (jax_enable_x64)."
        )
