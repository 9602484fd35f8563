"""Samples from a posterior, as the reference that Gaussian beliefs are held against.

``nuts`` and ``hmc`` are those of BlackJAX (the extra ``bayes``), for log densities of all data and
nets of up to some thousand parameters. ``sgld`` and ``sghmc`` follow noisy gradients of
mini-batches; they are written out here, since they are a line or two each and should not depend on
what is installed.

The log density is a function of the parameter pytree; it need not be normalized. :func:`moments`
turns samples into the :class:`~adaptivenet.posterior.gaussian.Posterior` that pruning and
consolidation read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from adaptivenet import trees
from adaptivenet.posterior.gaussian import Posterior

PyTree = Any
LogDensity = Callable[..., jax.Array]
Kind = Literal["nuts", "hmc", "sgld", "sghmc"]

__all__ = [
    "Diagnostics",
    "effective_size",
    "log_posterior",
    "moments",
    "sample_posterior",
    "split_r_hat",
]

_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "nuts": {"max_doublings": 10, "target_acceptance": 0.8},
    "hmc": {"integration_steps": 10, "target_acceptance": 0.8},
    "sgld": {"temperature": 1.0, "data": None, "batch_size": None},
    "sghmc": {"friction": 1.0, "temperature": 1.0, "data": None, "batch_size": None},
}


class Diagnostics(NamedTuple):
    """What the sampler reports of each kept sample.

    Attributes:
      log_density: [samples]; of a mini-batch where there are mini-batches.
      acceptance: [samples], mean acceptance probability; None for ``sgld`` and ``sghmc``, which
        accept everything.
      divergent: bool [samples]: the integrator lost the energy, or the log density is not finite.
      gradients: int32 [samples], gradients evaluated for it.
      step_size: [samples]; after warm-up, the adapted one.
    """

    log_density: jax.Array
    acceptance: jax.Array | None
    divergent: jax.Array
    gradients: jax.Array
    step_size: jax.Array


def sample_posterior(
    log_density: LogDensity,
    params: PyTree,
    key: jax.Array,
    kind: Kind = "nuts",
    *,
    samples: int = 1_000,
    warmup: int = 1_000,
    thin: int = 1,
    step_size: Any = None,
    **options: Any,
) -> tuple[PyTree, Diagnostics]:
    """Draws from a density over parameters by one Markov chain.

    For several chains use ``jax.vmap`` over keys (and starting points).

    ``sgld`` moves by ``theta + h g + sqrt(2 h T) n`` with the gradient g of the log density, the
    step size h, the temperature T and Gaussian noise n. ``sghmc`` keeps a momentum r, which starts
    at 0: ``theta + h r``, then ``r + h (g - C r) + sqrt(2 h C T) n`` with friction C and the
    gradient at the new place. Neither rejects, so both are biased at step size h: of a Gaussian of
    variance v, ``sgld`` finds the variance v / (1 - h / (2 v)); noise of mini-batches adds to it.
    (BlackJAX has the same steps for ``sgld``; its ``sghmc`` draws the momentum anew for each
    sample.) ``hmc`` has trajectories of one length, which may resonate with the posterior: watch
    :func:`effective_size`, or prefer ``nuts``.

    Args:
      log_density: function of the parameters to a scalar; with ``data=`` also of a mini-batch,
        whose expectation over mini-batches it has to match (:func:`log_posterior`).
      params: where the chain starts; floating leaves, of which those below 32 bits are sampled as
        float32. Masked nodes stay.
      key: a random key.
      kind: ``nuts``, ``hmc`` (both by BlackJAX), ``sgld`` or ``sghmc``.
      samples: how many are kept.
      warmup: steps before the first of them; ``nuts`` and ``hmc`` adapt their step size and a
        diagonal metric meanwhile (0 adapts nothing).
      thin: steps for each kept sample.
      step_size: ``nuts`` and ``hmc``: where the adaptation starts (1 by default), or the step size
        itself without warm-up. ``sgld`` and ``sghmc`` need it: a number, traced or not, or a
        function of the step (from 0, warm-up included).
      **options: ``max_doublings=10`` (nuts); ``integration_steps=10`` (hmc);
        ``target_acceptance=0.8`` (both); ``temperature=1.0`` (sgld, sghmc); ``friction=1.0``
        (sghmc); ``data=``, a pytree of arrays [n, ...], and ``batch_size=``, drawn with replacement
        in each step (sgld, sghmc).

    Returns:
      The samples, like ``params`` with a leading axis [samples], and the diagnostics.

    Raises:
      ImportError: BlackJAX is missing.
      TypeError: a leaf that is not floating, an option that the kind does not have.
      ValueError: an unknown kind, bad counts, a start whose log density is not finite, a log
        density that is no scalar, no step size.

    References:
      Hoffman and Gelman, "The no-U-turn sampler", JMLR 15, 2014; Welling and Teh, "Bayesian
      learning via stochastic gradient Langevin dynamics", ICML 2011, equation 4 (their step size is
      2 h); Chen et al., "Stochastic gradient Hamiltonian Monte Carlo", ICML 2014, equation 13.

    >>> draws, report = sample_posterior(
    ...     lambda x: -0.5 * jnp.sum(jnp.square(x - 3.0)), jnp.zeros(50), jax.random.key(0), "sgld",
    ...     samples=200, warmup=50, step_size=0.1)
    >>> draws.shape, abs(draws.mean().item() - 3.0) < 0.2, report.divergent.any().item()
    ((200, 50), True, False)
    """
    if kind not in _OPTIONS:
        raise ValueError(f"kind must be one of {', '.join(_OPTIONS)}, not {kind!r}.")
    for name, value, least in (("samples", samples, 1), ("warmup", warmup, 0), ("thin", thin, 1)):
        check_count(value, name, least)
    if wrong := sorted(options.keys() - _OPTIONS[kind].keys()):
        raise TypeError(
            f"{kind} has no option {wrong[0]!r}; it has {', '.join(sorted(_OPTIONS[kind]))}."
        )
    _check_floating(params)
    settings = {**_OPTIONS[kind], **options}
    counts = (samples, warmup, thin)
    start = jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(_at_least_single(leaf)), params)
    if kind in ("nuts", "hmc"):
        blackjax = _blackjax(kind)
        check_density(log_density, (start,))
        return _hamiltonian(blackjax, kind, log_density, start, key, counts, step_size, settings)
    if step_size is None:
        raise ValueError(f"{kind} needs step_size=: a number such as 1e-4, or a function of step.")
    return _stochastic(kind, log_density, start, key, counts, step_size, settings)


def check_count(value: Any, name: str, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, not {value!r}.")


def _check_number(value: Any, name: str, zero: bool = False) -> None:
    """Refuses what is no scalar > 0 (or >= 0), where that is known."""
    if np.shape(value) != ():
        raise ValueError(f"{name} must be a scalar, not of shape {np.shape(value)}; use jax.vmap.")
    if isinstance(value, jax.core.Tracer):
        return
    number = float(np.asarray(value))
    if not np.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise ValueError(f"{name} must be {'>=' if zero else '>'} 0, not {value}.")


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _check_floating(tree: PyTree, what: str = "params") -> None:
    leaves = jax.tree.leaves(tree)
    if not leaves:
        raise ValueError(f"{what} have no leaves: there is nothing to sample.")
    for name, leaf in zip(trees.paths(tree), leaves, strict=True):
        array = jnp.asarray(leaf)
        if not _is_float(array):
            raise TypeError(
                f"leaf {name!r} of {what} has dtype {array.dtype}; only floating leaves can be "
                "sampled: put optax.MaskedNode() in its place and close over it."
            )


def _at_least_single(leaf: Any) -> Any:
    dtype = jnp.asarray(leaf).dtype
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def check_density(log_density: LogDensity, arguments: tuple[Any, ...]) -> None:
    """Refuses what is no scalar, and a start that is not finite where that can be known."""
    out = jax.eval_shape(log_density, *arguments)
    if not isinstance(out, jax.ShapeDtypeStruct) or out.shape or not _is_float(out):
        shape = getattr(out, "shape", type(out).__name__)
        raise ValueError(f"log_density must return one floating number, not {shape}; sum over it.")
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments)):
        return
    value = jax.jit(log_density)(*arguments)
    if not isinstance(value, jax.core.Tracer) and not np.isfinite(np.asarray(value)):
        raise ValueError(f"the log density is {value} at params; start where it is finite.")


def _blackjax(kind: str) -> Any:
    try:
        import blackjax  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"kind={kind!r} needs blackjax, which cannot be imported ({error}); run: "
            "pip install 'adaptivenet[bayes]', or sample by kind='sgld' or 'sghmc' without it.",
            name="blackjax",
        ) from error
    return blackjax


def _hamiltonian(
    blackjax: Any,
    kind: str,
    log_density: LogDensity,
    start: PyTree,
    key: jax.Array,
    counts: tuple[int, int, int],
    step_size: Any,
    settings: dict[str, Any],
) -> tuple[PyTree, Diagnostics]:
    samples, warmup, thin = counts
    algorithm = blackjax.nuts if kind == "nuts" else blackjax.hmc
    if kind == "nuts":
        check_count(settings["max_doublings"], "max_doublings", 1)
        fixed = {"max_num_doublings": settings["max_doublings"]}
    else:
        check_count(settings["integration_steps"], "integration_steps", 1)
        fixed = {"num_integration_steps": settings["integration_steps"]}
    if warmup == 0 and step_size is None:
        raise ValueError(f"{kind} without warm-up needs step_size=; or give it warmup=1_000.")
    if callable(step_size):
        raise ValueError(f"{kind} adapts its step size: step_size= is a number, not a function.")
    size = 1.0 if step_size is None else step_size
    _check_number(size, "step_size")

    @jax.jit
    def run(start: PyTree, key: jax.Array, size: jax.Array) -> tuple[PyTree, Diagnostics]:
        warm_key, key = jax.random.split(key)
        if warmup:
            adaptation = blackjax.window_adaptation(
                algorithm,
                log_density,
                initial_step_size=size,
                target_acceptance_rate=settings["target_acceptance"],
                adaptation_info_fn=lambda *_: (),  # what it would keep fills the memory
                **fixed,
            )
            (state, tuned), _ = adaptation.run(warm_key, start, warmup)
            size, metric = tuned["step_size"], tuned["inverse_mass_matrix"]
        else:
            state, metric = algorithm.init(start, log_density), jnp.ones(trees.size(start))
        kernel = algorithm(log_density, size, metric, **fixed)

        def one(state: Any, key: jax.Array) -> tuple[Any, tuple[Any, ...]]:
            state, info = kernel.step(key, state)
            return state, (info.acceptance_rate, info.is_divergent, info.num_integration_steps)

        def several(state: Any, key: jax.Array) -> tuple[Any, tuple[Any, ...]]:
            state, (acceptance, divergent, steps) = jax.lax.scan(
                one, state, jax.random.split(key, thin)
            )
            spent = jnp.sum(jnp.asarray(steps, jnp.int32))
            row = (state.position, state.logdensity, acceptance.mean(), divergent.any(), spent)
            return state, row

        _, (kept, density, acceptance, divergent, spent) = jax.lax.scan(
            several, state, jax.random.split(key, samples)
        )
        divergent = divergent | ~jnp.isfinite(density)
        return kept, Diagnostics(
            density, acceptance, divergent, spent, jnp.full(samples, size, density.dtype)
        )

    return run(start, key, jnp.asarray(size).astype(jnp.result_type(float)))


def _stochastic(
    kind: str,
    log_density: LogDensity,
    start: PyTree,
    key: jax.Array,
    counts: tuple[int, int, int],
    step_size: Any,
    settings: dict[str, Any],
) -> tuple[PyTree, Diagnostics]:
    samples, warmup, thin = counts
    data, batch_size = settings["data"], settings["batch_size"]
    rows = _check_data(data, batch_size)
    if not callable(step_size):
        _check_number(step_size, "step_size")
    _check_number(settings["temperature"], "temperature", zero=True)
    if kind == "sghmc":
        _check_number(settings["friction"], "friction")

    def batch_of(key: jax.Array, data: PyTree) -> tuple[PyTree, ...]:
        if rows is None:
            return ()
        chosen = jax.random.randint(key, (batch_size,), 0, rows)
        return (jax.tree.map(lambda x: jnp.asarray(x)[chosen], data),)

    check_density(log_density, (start, *batch_of(key, data)))

    @jax.jit
    def run(
        start: PyTree, key: jax.Array, scalars: Mapping[str, Any], data: PyTree
    ) -> tuple[PyTree, Diagnostics]:
        evaluate = jax.value_and_grad(log_density)
        first_key, key = jax.random.split(key)

        def one(carry: tuple[Any, ...], step: jax.Array) -> tuple[tuple[Any, ...], jax.Array]:
            position, momentum, grad, _ = carry
            noise_key, batch_key = jax.random.split(jax.random.fold_in(key, step))
            size = jnp.asarray(step_size(step) if callable(step_size) else scalars["step_size"])
            h, heat = size.astype(jnp.float32), scalars["temperature"]
            noise = _noise(noise_key, position)
            if kind == "sgld":
                position = _add((position, 1.0), (grad, h), (noise, jnp.sqrt(2 * h * heat)))
            else:
                position = _add((position, 1.0), (momentum, h))
            value, grad = evaluate(position, *batch_of(batch_key, data))
            if kind == "sghmc":
                drag = scalars["friction"]
                scale = jnp.sqrt(2 * h * drag * heat)
                momentum = _add((momentum, 1 - h * drag), (grad, h), (noise, scale))
            return (position, momentum, grad, value), h

        def several(carry: Any, first: jax.Array) -> tuple[Any, tuple[Any, ...]]:
            steps = first + jnp.arange(thin, dtype=jnp.int32)
            carry, sizes = jax.lax.scan(one, carry, steps)
            return carry, (carry[0], carry[3], sizes[-1])

        value, grad = evaluate(start, *batch_of(first_key, data))
        momentum = jax.tree.map(jnp.zeros_like, start) if kind == "sghmc" else ()
        carry = (start, momentum, grad, value)
        carry, _ = jax.lax.scan(one, carry, jnp.arange(warmup, dtype=jnp.int32))
        firsts = warmup + thin * jnp.arange(samples, dtype=jnp.int32)
        _, (kept, density, sizes) = jax.lax.scan(several, carry, firsts)
        spent = jnp.full(samples, thin, jnp.int32)
        return kept, Diagnostics(density, None, ~jnp.isfinite(density), spent, sizes)

    scalars = {name: settings[name] for name in ("temperature", "friction") if name in settings}
    if not callable(step_size):
        scalars["step_size"] = step_size
    scalars = {name: jnp.asarray(x).astype(jnp.float32) for name, x in scalars.items()}
    return run(start, key, scalars, data)


def _check_data(data: PyTree, batch_size: Any) -> int | None:
    """The number of examples, None where there are no mini-batches."""
    if data is None and batch_size is None:
        return None
    if data is None or batch_size is None:
        raise ValueError("data= and batch_size= go together: give both or neither.")
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
    if len(lengths) != 1 or lengths <= {(), (0,)}:
        raise ValueError(
            f"data= must hold arrays of one leading axis [n], not {sorted(lengths)} of its leaves."
        )
    check_count(batch_size, "batch_size", 1)
    return lengths.pop()[0]


def _noise(key: jax.Array, tree: PyTree) -> PyTree:
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    draws = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, draws)


def _add(*terms: tuple[PyTree, Any]) -> PyTree:
    """Sums trees times numbers."""
    factors = [factor for _, factor in terms]

    def total(*leaves: jax.Array) -> jax.Array:
        return functools.reduce(
            jnp.add,
            [x * jnp.asarray(f).astype(x.dtype) for x, f in zip(leaves, factors, strict=True)],
        )

    return jax.tree.map(total, *(tree for tree, _ in terms))


def log_posterior(
    log_likelihood: Callable[[PyTree, PyTree], jax.Array],
    log_prior: Callable[[PyTree], jax.Array],
    size: Any,
) -> LogDensity:
    """The log posterior of all data, estimated from a mini-batch without bias.

    Args:
      log_likelihood: function of the parameters and a batch to one number an example, [batch].
      log_prior: function of the parameters to a scalar.
      size: number of examples in all.

    Returns:
      Function of the parameters and a batch to a scalar:
      ``log_prior + size * mean(log_likelihood)``.

    Raises:
      ValueError: ``size`` is not positive; the log likelihood is not one number an example.

    >>> density = log_posterior(lambda w, x: -jnp.square(x - w), lambda w: -w * w, size=100)
    >>> density(jnp.float32(1.0), jnp.array([1.0, 3.0])).item()  # -1 + 100 * mean(0, -4)
    -201.0
    """
    if not isinstance(size, jax.core.Tracer) and not np.asarray(size) > 0:
        raise ValueError(f"size must be the number of examples in all, not {size}.")

    def density(params: PyTree, batch: PyTree) -> jax.Array:
        terms = log_likelihood(params, batch)
        if jnp.ndim(terms) != 1:
            raise ValueError(
                f"log_likelihood must return one number an example, [batch], not an array of shape "
                f"{jnp.shape(terms)}."
            )
        return log_prior(params) + jnp.asarray(size).astype(terms.dtype) * jnp.mean(terms)

    return density


def moments(samples: PyTree, *, floor: Any = 1e-10) -> Posterior:
    """The diagonal Gaussian of the same means and variances as samples.

    Args:
      samples: pytree of floating arrays [n, ...], n >= 2; join the axes of several chains first.
      floor: smallest variance, so that the precision of what never moved is 1 / floor. May be
        traced.

    Returns:
      Means and inverse variances (of n - 1 degrees of freedom), float32 or wider. The inverse of
      an estimated variance is too large by (n_eff - 1) / (n_eff - 3) in expectation, where n_eff is
      :func:`effective_size`.

    Raises:
      TypeError, ValueError: a leaf that is not floating, fewer than two samples, leaves of
        different lengths, a floor that is not positive.

    >>> moments({"w": jnp.array([[1.0], [3.0]])})
    Posterior(mean={'w': Array([2.], dtype=float32)}, precision={'w': Array([0.5], dtype=float32)})
    """
    _length(samples, 2)
    if not isinstance(floor, jax.core.Tracer) and not np.asarray(floor) > 0:
        raise ValueError(f"floor must be a variance > 0, not {floor}.")
    wide = jax.tree.map(lambda x: jnp.asarray(x).astype(_at_least_single(x)), samples)
    mean = jax.tree.map(lambda x: jnp.mean(x, 0), wide)
    precision = jax.tree.map(
        lambda x: 1 / jnp.maximum(jnp.var(x, 0, ddof=1), jnp.asarray(floor).astype(x.dtype)), wide
    )
    return Posterior(mean, precision)


def _length(samples: PyTree, least: int) -> int:
    """The common length of the leading axis."""
    _check_floating(samples, "samples")
    shapes = dict(zip(trees.paths(samples), map(jnp.shape, jax.tree.leaves(samples)), strict=True))
    name, shape = next(iter(shapes.items()))
    for other, its in shapes.items():
        if its[:1] != shape[:1]:
            raise ValueError(f"leaf {other!r} has shape {its}, but {name!r} has {shape}.")
    if not shape or shape[0] < least:
        raise ValueError(f"leaf {name!r} of samples needs [n, ...] with n >= {least}, not {shape}.")
    return shape[0]


def effective_size(samples: PyTree) -> PyTree:
    """Effective sample size of each parameter's mean, from one chain.

    The number of independent draws that would give the same error; from the autocorrelation, cut
    off by Geyer's initial monotone sequence. It takes about 16 bytes a number of memory.

    Args:
      samples: pytree of floating arrays [n, ...], n >= 4, in the order drawn.

    Returns:
      Pytree without the leading axis; nan for what never moved.

    Raises:
      TypeError, ValueError: as :func:`moments`.

    References:
      Geyer, "Practical Markov chain Monte Carlo", Statistical Science 7, 1992, section 3.3.

    >>> draws = jax.random.normal(jax.random.key(0), (1000,))
    >>> 700 < effective_size(draws) < 1400
    Array(True, dtype=bool)
    """
    n = _length(samples, 4)

    def of(x: jax.Array) -> jax.Array:
        x = jnp.asarray(x).astype(_at_least_single(x))
        spectrum = jnp.fft.rfft(x - jnp.mean(x, 0), 2 * n, axis=0)
        power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
        covariance = jnp.fft.irfft(power, 2 * n, axis=0)[:n]
        correlation = covariance / covariance[0]
        # Sums of neighbours are positive and fall for a reversible chain; after the first that is
        # not positive there is only noise.
        even = n // 2 * 2
        pairs = correlation[0:even:2] + correlation[1:even:2]
        pairs = jax.lax.cummin(pairs, 0)
        total = jnp.sum(jnp.where(pairs > 0, pairs, 0.0), 0)
        # The estimate of a chain that alternates may come near 0: no more than n log10(n).
        time = jnp.maximum(2 * total - 1, 1 / np.log10(n).item())
        return jnp.where(jnp.all(x == x[0], 0), jnp.nan, n / time)

    return jax.tree.map(of, samples)


def split_r_hat(chains: PyTree) -> PyTree:
    """Potential scale reduction of chains cut in halves: near 1 where all tell the same.

    Args:
      chains: pytree of floating arrays [chains, n, ...], n >= 4; one chain is enough.

    Returns:
      Pytree without the two leading axes; above 1.01 the chains should run longer.

    Raises:
      TypeError, ValueError: a leaf that is not floating or has other axes.

    References:
      Gelman et al., "Bayesian Data Analysis", 3rd edition, 2013, section 11.4.

    >>> chains = jax.random.normal(jax.random.key(0), (4, 500))
    >>> abs(split_r_hat(chains) - 1.0) < 0.02
    Array(True, dtype=bool)
    """
    _check_floating(chains, "chains")

    def of(name: str, x: jax.Array) -> jax.Array:
        if jnp.ndim(x) < 2 or x.shape[1] < 4:
            raise ValueError(
                f"leaf {name!r} of chains needs [chains, n, ...] with n >= 4, not {jnp.shape(x)}; "
                "give x[None] for one chain."
            )
        x = jnp.asarray(x).astype(_at_least_single(x))
        half = x.shape[1] // 2
        halves = jnp.concatenate([x[:, :half], x[:, -half:]])
        within = jnp.mean(jnp.var(halves, 1, ddof=1), 0)
        between = jnp.var(jnp.mean(halves, 1), 0, ddof=1)
        return jnp.sqrt((half - 1) / half + between / within)

    leaves, treedef = jax.tree.flatten(chains)
    return jax.tree.unflatten(treedef, map(of, trees.paths(chains), leaves))
