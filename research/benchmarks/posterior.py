"""What belief costs: the Fisher diagonal, tracking in a training step, and Laplace after training.

    python -m research.benchmarks.posterior [--repeats 15] [--steps 100] [--examples 60000]

First the Fisher diagonal of the founding MLP 784-128-64-10, exact, sampled and empirical, beside an
epoch of forward and backward passes over the same examples, per-example gradients by ``vmap`` in
the fastest of a few chunk sizes, and one product of the generalised Gauss-Newton (GGN) matrix with
a vector, of which the way of laplax (a basis vector for each parameter) takes 109,386. Then
training steps of an MLP 784-300-100-10, batch 128, in one jitted scan: Adam alone, and each way to
keep a belief. Last, Laplace approximations of the founding MLP and of LeNet-5, beside an epoch of
theirs. Inputs are the pixels of MNIST where they are at hand, random ones otherwise; the file says
which. All candidates of a table take turns. Writes ``results/posterior.json``.

References:
    laplax, https://github.com/laplax-org/laplax: ``laplax.util.mv.diagonal``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from adaptivenet import data, models, posterior
from adaptivenet.posterior import meanfield
from research.benchmarks._timing import interleaved, show, write_results

PyTree = Any
Apply = Callable[[PyTree, jax.Array], jax.Array]

FOUNDING = (784, 128, 64, 10)
SIZES = (784, 300, 100, 10)
MOST = 60_000  # examples of MNIST
FEW = 2_048  # examples of the Laplace approximations
PROBED = 2_048  # examples that chunk sizes are compared on
EPOCH_BATCH = 256
BATCH = 128
CHUNKS = (1, 8, 32, 128)  # on a CPU one example at a time is fastest: products stay unbatched
VECTORS = (1, 2, 8, 32)
STRUCTURES = ("diagonal", "kronecker", "ekfac", "last_layer")
EXACT_LIMIT, STEP_LIMIT, IVON_LIMIT = 3.0, 1.3, 2.0
EPOCH = "forward and backward"


def loss(apply: Apply, params: PyTree, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean cross entropy of a batch, or the cross entropy of a single example."""
    logits = apply(params, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


# --- the diagonal of the Fisher information ------------------------------------------------------


def over_batches(function: Callable[..., PyTree], examples: PyTree, batch: int) -> PyTree:
    """The sum of ``function(*part)`` over batches of all examples; the last may be short."""
    number = len(jax.tree.leaves(examples)[0])
    whole = number // batch

    def part(start: Any, size: int) -> PyTree:
        # Slices, and no reshaped copy of all examples, which would burden the reference.
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), examples)

    def add(total: PyTree, place: jax.Array) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, function(*part(place * batch, batch))), None

    shapes = jax.eval_shape(lambda: function(*part(0, min(batch, number))))
    total = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    if whole:
        total, _ = jax.lax.scan(add, total, jnp.arange(whole))
    if number % batch:
        last = function(*part(whole * batch, number % batch))
        total = jax.tree.map(jnp.add, total, last)
    return total


def epoch(
    apply: Apply, params: PyTree, inputs: jax.Array, targets: jax.Array, *, batch: int = EPOCH_BATCH
) -> tuple[jax.Array, PyTree]:
    """Mean losses and mean gradients of batches, summed: an epoch without its updates."""
    slope = partial(jax.value_and_grad(loss, argnums=1), apply, params)
    return over_batches(slope, (inputs, targets), batch)


def squares_by_vmap(
    apply: Apply, params: PyTree, inputs: jax.Array, targets: jax.Array, *, chunk: int
) -> PyTree:
    """The empirical diagonal from a gradient for every example, squared and summed."""

    def one(x: jax.Array, y: jax.Array) -> PyTree:
        return jax.grad(loss, argnums=1)(apply, params, x, y)

    def part(xs: jax.Array, ys: jax.Array) -> PyTree:
        return jax.tree.map(lambda g: jnp.square(g).sum(0), jax.vmap(one)(xs, ys))

    return over_batches(part, (inputs, targets), chunk)


def ggn_product(
    apply: Apply, params: PyTree, inputs: jax.Array, vector: PyTree, *, batch: int = EPOCH_BATCH
) -> PyTree:
    """The generalised Gauss-Newton matrix of the summed cross entropy, times a vector."""

    def part(xs: jax.Array) -> PyTree:
        # Linearised once, and transposed: the forward pass serves both products.
        logits, push = jax.linearize(lambda p: apply(p, xs), params)
        p, pushed = jax.nn.softmax(logits), push(vector)
        curved = p * (pushed - (p * pushed).sum(-1, keepdims=True))
        return jax.linear_transpose(push, params)(curved)[0]

    return over_batches(part, (inputs,), batch)


def ggn_entries(
    apply: Apply, params: PyTree, inputs: jax.Array, places: jax.Array, *, batch: int = EPOCH_BATCH
) -> jax.Array:
    """Entries of that matrix's diagonal, by products with basis vectors, all of them at once.

    This is the inner step of laplax's diagonal, which maps over all parameters so.
    """
    flat, unravel = ravel_pytree(params)

    def one(place: jax.Array) -> jax.Array:
        vector = unravel(jnp.zeros_like(flat).at[place].set(1))
        return ravel_pytree(ggn_product(apply, params, inputs, vector, batch=batch))[0][place]

    return jax.vmap(one)(places)


def fisher_cases(
    apply: Apply, params: PyTree, inputs: jax.Array, targets: jax.Array
) -> dict[str, Callable[[], Any]]:
    """The reference, and our diagonals as they are called."""
    compiled, diagonal = jax.jit(partial(epoch, apply)), posterior.fisher_diagonal
    return {
        EPOCH: lambda: compiled(params, inputs, targets),
        "exact": lambda: diagonal(apply, params, inputs),
        "sampled, 1 draw": lambda: diagonal(
            apply, params, inputs, kind="sampled", key=jax.random.key(0), samples=1
        ),
        "empirical": lambda: diagonal(apply, params, inputs, targets, kind="empirical"),
    }


def vmap_case(
    apply: Apply, params: PyTree, inputs: jax.Array, targets: jax.Array, chunk: int
) -> Callable[[], Any]:
    """The peer with per-example gradients, compiled."""
    compiled = jax.jit(partial(squares_by_vmap, apply, chunk=chunk))
    return lambda: compiled(params, inputs, targets)


def ggn_case(apply: Apply, params: PyTree, inputs: jax.Array, vectors: int) -> Callable[[], Any]:
    """The first entries of the diagonal by basis vectors, compiled."""
    compiled, places = jax.jit(partial(ggn_entries, apply)), jnp.arange(vectors)
    return lambda: compiled(params, inputs, places)


def fisher_part(inputs: jax.Array, targets: jax.Array, repeats: int) -> dict[str, Any]:
    """Times the diagonals of the founding MLP; prints the table and the verdict."""
    apply, params = models.mlp, models.mlp_init(jax.random.key(0), FOUNDING)
    chunk, vectors = _fastest(apply, params, inputs[:PROBED], targets[:PROBED], repeats)
    peer, one, many = f"vmap of grad, {chunk} at once", "GGN product", f"GGN products, {vectors}"
    cases = fisher_cases(apply, params, inputs, targets)
    cases[peer] = vmap_case(apply, params, inputs, targets, chunk)
    cases[one] = ggn_case(apply, params, inputs, 1)
    if vectors > 1:
        cases[many] = ggn_case(apply, params, inputs, vectors)
    timings = interleaved(cases, repeats=repeats, warmup=1)
    title = (
        f"\nFisher diagonal, MLP {_widths(FOUNDING)}, {len(inputs):,} examples, ratio to {EPOCH}"
    )
    show(timings.table(EPOCH, title))
    number = floats(params)
    per_product = timings.min(one)
    if vectors > 1:
        per_product = min(per_product, timings.min(many) / vectors)
    show(
        f"diagonal by a GGN product for each of {number:,} parameters: {1e3 * per_product:.3f} ms "
        f"x {number:,} = {per_product * number / 3600:.2f} hours, "
        f"{per_product * number / timings.min('exact'):,.0f} times exact (extrapolated, not run)"
    )
    summary = timings.summary(EPOCH)
    show(_verdict("exact, over an epoch", _least(summary["exact"]), EXACT_LIMIT, below=True))
    return {
        "reference": EPOCH,
        "batch": EPOCH_BATCH,
        "cases": summary,
        "by GGN products": {
            "status": "extrapolated, not run",
            "parameters": number,
            "seconds_per_product": per_product,
            "seconds": per_product * number,
        },
    }


def _fastest(
    apply: Apply, params: PyTree, inputs: jax.Array, targets: jax.Array, repeats: int
) -> tuple[int, int]:
    """The chunk of per-example gradients and the number of basis vectors that cost least."""
    count = len(inputs)
    cases: dict[str, Callable[[], Any]] = {
        f"vmap of grad, {chunk} at once": vmap_case(apply, params, inputs, targets, chunk)
        for chunk in CHUNKS
    }
    cases |= {f"GGN products, {n}": ggn_case(apply, params, inputs, n) for n in VECTORS}
    timings = interleaved(cases, repeats=repeats, warmup=1)
    first = f"vmap of grad, {CHUNKS[0]} at once"
    show(timings.table(first, f"\nsizes of the peers' chunks, {count:,} examples"))
    chunk = min(CHUNKS, key=lambda chunk: timings.min(f"vmap of grad, {chunk} at once"))
    return chunk, min(VECTORS, key=lambda n: timings.min(f"GGN products, {n}") / n)


# --- training steps ------------------------------------------------------------------------------


class Case(NamedTuple):
    """A way to train: what is trained, by what, and how gradients are taken.

    Attributes:
      params: pytree that is trained.
      tx: the transformation.
      slope: ``slope(params, state, inputs, targets, key) -> (gradients, extra arguments)``.
      limit: the most that a step may take of one of Adam's; None where no target is set.
    """

    params: PyTree
    tx: Any
    slope: Callable[..., tuple[PyTree, dict[str, Any]]]
    limit: float | None = STEP_LIMIT


def training_cases(sizes: Sequence[int]) -> dict[str, Case]:
    """Adam alone, and every way to keep a belief while training."""
    params, adam = models.mlp_init(jax.random.key(0), sizes), optax.adam(1e-3)
    mean_loss = partial(loss, models.mlp)

    def plain(params: PyTree, state: Any, x: jax.Array, y: jax.Array, key: Any) -> Any:
        del state, key
        return jax.grad(mean_loss)(params, x, y), {}

    def squared(params: PyTree, state: Any, x: jax.Array, y: jax.Array, key: Any) -> Any:
        del state, key
        _, grads, squares = posterior.value_and_squared_grads(
            lambda params, one: mean_loss(params, *one), params, (x, y)
        )
        return grads, {"squared_grads": squares}

    def drawn(params: PyTree, state: Any, x: jax.Array, y: jax.Array, key: Any) -> Any:
        del key  # the state has one
        return posterior.noisy_value_and_grad(mean_loss, state, params, x, y)[1:]

    def variational(fields: PyTree, state: Any, x: jax.Array, y: jax.Array, key: Any) -> Any:
        del state

        def objective(fields: PyTree) -> jax.Array:
            def likelihood(params: PyTree) -> jax.Array:
                return -len(x) * mean_loss(params, x, y)

            return -meanfield.elbo(fields, likelihood, key, scale=MOST / len(x))

        return jax.grad(objective)(fields), {}

    def swag(every: int) -> optax.GradientTransformationExtraArgs:
        return optax.chain(adam, posterior.swag(start=1, every=every))

    track, estimators = posterior.with_posterior, posterior
    mesu = posterior.mesu(300_000, init_scale=0.02, batch_size=BATCH)
    return {
        "adam": Case(params, adam, plain, None),
        "squared_gradient": Case(params, track(estimators.squared_gradient(0.99), adam), plain),
        "fisher": Case(params, track(estimators.fisher(0.99), adam), squared),
        "ivon": Case(params, posterior.ivon(0.1, ess=MOST), drawn),
        "mesu": Case(params, mesu, drawn),
        "swag, every step": Case(params, swag(1), plain),
        "swag, every 100": Case(params, swag(100), plain),
        "mean field": Case(meanfield.init(params, 0.02), adam, variational, None),
    }


def steps(case: Case) -> Callable[..., tuple[PyTree, Any]]:
    """``run(params, state, batches) -> (params, state)`` of a case, a scan over batches."""

    def step(carry: Any, batch: Any) -> tuple[Any, None]:
        params, state = carry
        grads, extra = case.slope(params, state, *batch)
        updates, state = case.tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), None

    return lambda params, state, batches: jax.lax.scan(step, (params, state), batches)[0]


def batches_of(
    inputs: jax.Array, targets: jax.Array, number: int, batch: int = BATCH
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``number`` stacked batches of the examples, from the start again when they end, and keys."""
    places = jnp.arange(number * batch).reshape(number, batch) % len(inputs)
    return inputs[places], targets[places], jax.random.split(jax.random.key(1), number)


def floats(tree: PyTree) -> int:
    """How many floating numbers a pytree holds."""
    leaves = map(jnp.asarray, jax.tree.leaves(tree))
    return sum(leaf.size for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))


def memory(cases: Mapping[str, Case]) -> dict[str, dict[str, float]]:
    """Floats of the state, and of what is trained, for each parameter of the network."""
    number = floats(cases["adam"].params)
    return {
        name: {
            "state": floats(case.tx.init(case.params)) / number,
            "trained": floats(case.params) / number,
        }
        for name, case in cases.items()
    }


def training_part(
    inputs: jax.Array, targets: jax.Array, number: int, repeats: int
) -> dict[str, Any]:
    """Times the steps, counts the states; prints both tables and the verdicts."""
    cases, batches = training_cases(SIZES), batches_of(inputs, targets, number)

    def compiled(case: Case) -> Callable[[], Any]:
        run, state = jax.jit(steps(case)), case.tx.init(case.params)
        return lambda: run(case.params, state, batches)

    timed = {name: compiled(case) for name, case in cases.items()}
    timings = interleaved(timed, repeats=repeats, warmup=1)
    show(timings.table("adam", f"\n{number} steps, MLP {_widths(SIZES)}, ratio to adam"))
    summary, kept = timings.summary("adam"), memory(cases)
    width = max(map(len, cases))
    show(f"\nfloats for each parameter of the network\n{'':{width}}  {'state':>7}  {'trained':>7}")
    for name, counts in kept.items():
        show(f"{name:{width}}  {counts['state']:7.3f}  {counts['trained']:7.3f}")
    show("")
    for name, case in cases.items():
        if case.limit is not None:
            what = f"{name}, a step over a step of adam"
            show(_verdict(what, _least(summary[name]), case.limit))
    # IVON keeps two numbers beside the trees, which are not held against it.
    state = round(kept["ivon"]["state"], 2)
    show(_verdict("ivon, floats of the state over parameters", state, IVON_LIMIT))
    found = {name: {**summary[name], "floats_per_parameter": kept[name]} for name in cases}
    return {"reference": "adam", "sizes": SIZES, "batch": BATCH, "steps": number, "cases": found}


# --- after training ------------------------------------------------------------------------------


def networks() -> dict[str, tuple[Apply, PyTree]]:
    """The founding MLP and LeNet-5, untrained: the work does not depend on the numbers."""
    return {
        f"MLP {_widths(FOUNDING)}": (models.mlp, models.mlp_init(jax.random.key(0), FOUNDING)),
        "LeNet-5": (models.lenet5, models.lenet5_init(jax.random.key(0))),
    }


def fit(
    apply: Apply,
    structure: str,
    samples: int | None,
    params: PyTree,
    inputs: jax.Array,
    targets: jax.Array,
) -> posterior.Laplace:
    """A Laplace approximation, a batch of the epoch at a time."""
    return posterior.laplace(
        apply,
        params,
        inputs,
        targets,
        likelihood="categorical",
        structure=structure,
        batch_size=EPOCH_BATCH,
        samples=samples,
        key=None if samples is None else jax.random.key(0),
    )


def laplace_cases(
    apply: Apply, params: PyTree, inputs: jax.Array, targets: jax.Array
) -> dict[str, Callable[[], Any]]:
    """The epoch, and every structure, exact and from one draw an example; all compiled."""
    compiled: dict[str, Any] = {EPOCH: jax.jit(partial(epoch, apply))}
    for structure in STRUCTURES:
        compiled[structure] = jax.jit(partial(fit, apply, structure, None))
        compiled[f"{structure}, 1 draw"] = jax.jit(partial(fit, apply, structure, 1))
    return {name: partial(run, params, inputs, targets) for name, run in compiled.items()}


def called_once(
    apply: Apply, params: PyTree, inputs: jax.Array, targets: jax.Array
) -> dict[str, float]:
    """Seconds of one call outside of jit, as a user makes it: tracing, compiling and checks too."""
    seconds = {}
    for structure in STRUCTURES:
        started = time.perf_counter()
        jax.block_until_ready(fit(apply, structure, None, params, inputs, targets))
        seconds[structure] = time.perf_counter() - started
    return seconds


def laplace_part(inputs: jax.Array, targets: jax.Array, repeats: int) -> dict[str, Any]:
    """Times the approximations of both networks; prints a table for each."""
    found: dict[str, Any] = {}
    for name, (apply, params) in networks().items():
        cases = laplace_cases(apply, params, inputs, targets)
        timings = interleaved(cases, repeats=repeats, warmup=1)
        show(timings.table(EPOCH, f"\nLaplace, {name}, {len(inputs):,} examples, ratio to {EPOCH}"))
        once = called_once(apply, params, inputs, targets)
        listing = ", ".join(f"{structure} {value:.2f}" for structure, value in once.items())
        show(f"seconds of a single call outside of jit, compilation included: {listing}")
        found[name] = {"cases": timings.summary(EPOCH), "called_once_seconds": once}
    return {
        "reference": EPOCH,
        "examples": len(inputs),
        "batch": EPOCH_BATCH,
        "networks": found,
    }


# --- all of it -----------------------------------------------------------------------------------


def pixels(examples: int) -> tuple[jax.Array, jax.Array, str]:
    """Inputs ``[examples, 784]`` in [0, 1], classes, and what they are."""
    try:
        found = data.load("mnist", download=False)
    except data.MissingDataError:
        drawn = np.random.default_rng(0)
        inputs = drawn.random((examples, 784), np.float32)
        return jnp.asarray(inputs), jnp.asarray(drawn.integers(0, 10, examples, np.int32)), _RANDOM
    images = found.train_inputs[:examples].reshape(-1, 784) / np.float32(255)
    return jnp.asarray(images), jnp.asarray(found.train_targets[:examples]), "MNIST"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures the three parts, prints ratios beside the targets, and writes the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--repeats",
        type=int,
        default=15,
        help="timed rounds of the training steps; a third as many of the longer other parts",
    )
    parser.add_argument("--steps", type=int, default=100, help="steps of a scanned chunk")
    parser.add_argument(
        "--examples",
        type=int,
        default=MOST,
        help=f"for the Fisher diagonals; Laplace takes {FEW} of them",
    )
    options = parser.parse_args(argv)
    if options.repeats < 1 or options.steps < 1 or not 2 <= options.examples <= MOST:
        parser.error(f"--repeats and --steps must be positive, --examples in 2 .. {MOST}")
    inputs, targets, source = pixels(options.examples)
    show(f"inputs: {source}")
    few = max(options.repeats // 3, 1)
    payload = {
        "data": source,
        "examples": options.examples,
        "fisher": fisher_part(inputs, targets, few),
        "training": training_part(inputs, targets, options.steps, options.repeats),
        "laplace": laplace_part(inputs[:FEW], targets[:FEW], few),
    }
    write_results("posterior", payload)
    return payload


_RANDOM = "seeded random pixels (MNIST is not at hand: set ADAPTIVENET_DATA)"


def _widths(sizes: Sequence[int]) -> str:
    return "-".join(map(str, sizes))


def _least(summary: Mapping[str, float]) -> float:
    """The smaller of the two ratios, as every benchmark here judges."""
    return min(summary["ratio"], summary["paired_ratio"])


def _verdict(what: str, value: float, limit: float, *, below: bool = False) -> str:
    reached = value < limit if below else value <= limit
    sign = "<" if below else "<="
    return f"{what}: {value:.3f} (target {sign} {limit:g}): {'reached' if reached else 'MISSED'}"


if __name__ == "__main__":
    main()
