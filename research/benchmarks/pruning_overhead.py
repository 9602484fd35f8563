"""What pruning adds to a training step, beside plain Adam in one interleaved run.

    python -m research.benchmarks.pruning_overhead [--repeats 15] [--steps 100]

An MLP 784-300-100-10, batch 128, in one jitted scan: magnitude pruning at several rates of events,
then every score, structure, allocation and regrowth rule with an event every 10 steps. If
``JAXPRUNER_PATH`` names a checkout of JaxPruner, its magnitude pruning runs in the same rounds.
Writes ``results/pruning_overhead.json``.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import optax

from adaptivenet import models, pruning
from research.benchmarks._timing import interleaved, show, write_results

SIZES = (784, 300, 100, 10)
BATCH = 128
MEMBERS = 8
LIMITS = {"not due": 1.05, "every 10": 1.3, "every step": 3.0, "vmap of 8, revise": 1.1}


def loss(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross entropy of the MLP."""
    logits = models.mlp(params, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def chunk(tx: Any, inputs: jax.Array, targets: jax.Array) -> Callable[[Any, Any], Any]:
    """A function that scans a transformation over batches."""

    def run(params: Any, state: Any) -> Any:
        def step(carry: Any, batch: Any) -> Any:
            params, state = carry
            grads = jax.grad(loss)(params, *batch)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), (inputs, targets))[0]

    return run


def ours(steps: int, inputs: jax.Array, targets: jax.Array) -> dict[str, Callable[[], Any]]:
    """Plain Adam and our cases: single networks, then populations."""
    far = 1_000_000
    params = models.mlp_init(jax.random.key(0), SIZES)
    many = jax.vmap(lambda key: models.mlp_init(key, SIZES))(
        jax.random.split(jax.random.key(0), MEMBERS)
    )

    def schedule() -> pruning.Schedule:
        return pruning.cubic(final=0.95, start=0, end=far)

    def single(tx: Any) -> Callable[[], Any]:
        run, state = jax.jit(chunk(tx, inputs, targets)), tx.init(params)
        return lambda: run(params, state)

    def population(tx: Any, pruner: pruning.Pruner | None = None) -> Callable[[], Any]:
        run = jax.vmap(chunk(tx, inputs, targets))
        revise = jax.vmap(lambda p, s: pruning.revise(pruner, p, s)) if pruner else None

        def chunk_and_event(params: Any, state: Any) -> Any:
            params, state = run(params, state)
            return revise(params, state) if revise else (params, state)

        compiled, state = jax.jit(chunk_and_event), jax.vmap(tx.init)(many)
        return lambda: compiled(many, state)

    later = pruning.prune(pruning.cubic(final=0.95, start=far, end=2 * far), every=10)
    between = pruning.prune(schedule(), every=None)
    return {
        "adam": single(optax.adam(1e-3)),
        "not due": single(optax.chain(optax.adam(1e-3), later)),
        "every 10": single(optax.chain(optax.adam(1e-3), pruning.prune(schedule(), every=10))),
        "every step": single(optax.chain(optax.adam(1e-3), pruning.prune(schedule(), every=1))),
        "vmap of 8, adam": population(optax.adam(1e-3)),
        "vmap of 8, revise": population(optax.chain(optax.adam(1e-3), between), between),
    }


def rules(inputs: jax.Array, targets: jax.Array) -> dict[str, Callable[[], Any]]:
    """Every rule in the step, an event every 10 steps; with the signals that it asks for.

    Left out is what needs more than the gradient: ``wanda`` (a pass over calibration data),
    ``snr`` (a posterior), the masks at initialization, and layer-wise reconstruction.
    """
    p, s = pruning, pruning.signals
    params = models.mlp_init(jax.random.key(0), SIZES)
    keep = {"fisher": s.fisher(0.99)}
    cases: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
        "score: magnitude": ({}, None),
        "score: random": ({"score": p.random}, None),
        "score: lamp": ({"score": p.lamp()}, None),
        "score: saliency": ({"score": p.saliency}, {}),
        "score: taylor": ({"score": p.taylor}, {}),
        "score: movement": ({"score": p.movement}, {"movement": s.movement()}),
        "score: fisher_tempered": ({"score": p.fisher_tempered()}, keep),
        "score: obd": ({"score": p.obd}, keep),
        "structure: 2:4": ({"structure": p.ByPath({"dense[12]": p.NofM(2, 4)})}, None),
        "structure: block 4x4": ({"structure": p.ByPath({"dense[12]": p.Block(4, 4)})}, None),
        "structure: fan-in": ({"structure": p.FanIn(), "allocation": p.Uniform()}, None),
        "structure: unit": ({"structure": p.ByPath({"dense[12]": p.Unit()})}, None),
        "allocation: uniform": ({"allocation": p.Uniform()}, None),
        "allocation: Erdos-Renyi": ({"allocation": p.ErdosRenyiKernel()}, None),
        "allocation: budget": ({"allocation": p.Budget(kind="bytes")}, None),
        "regrowth: random": ({"regrow": p.at_random(0.3)}, None),
        "regrowth: gradient": ({"regrow": p.by_gradient(0.3)}, {}),
        "regrowth: momentum": ({"regrow": p.by_momentum(0.3)}, {"momentum": s.momentum(0.9)}),
        "regrowth: homeostatic": ({"regrow": p.homeostatic(0.3, fan_in="mean")}, None),
        "regrowth: links": ({"regrow": p.by_link_prediction(0.3, rule="RA-L3")}, None),
        "record: ages": ({"ages": True}, None),
        "record: quantiles": ({"quantiles": (0.1, 0.5, 0.9)}, None),
        "record: effective": ({"effective": [f"dense{i}/kernel" for i in (1, 2, 3)]}, None),
    }

    def single(options: dict[str, Any], estimators: dict[str, Any] | None) -> Callable[[], Any]:
        schedule = p.cubic(final=0.95, start=0, end=1_000_000)
        tx = optax.chain(optax.adam(1e-3), p.prune(schedule, every=10, **options))
        tx = tx if estimators is None else p.with_signals(tx, **estimators)
        run, state = jax.jit(chunk(tx, inputs, targets)), tx.init(params)
        return lambda: run(params, state)

    return {name: single(*case) for name, case in cases.items()}


def jaxpruner(path: str, inputs: jax.Array, targets: jax.Array) -> dict[str, Callable[[], Any]]:
    """JaxPruner's magnitude pruning on the same network, batches and optimizer."""
    if not hasattr(jax, "tree_map"):
        setattr(jax, "tree_map", jax.tree.map)  # noqa: B010 (removed from jax, still used there)
    sys.path.insert(0, path)
    import jaxpruner as jp  # pyright: ignore[reportMissingImports]

    params = models.mlp_init(jax.random.key(0), SIZES)
    many = jax.vmap(lambda key: models.mlp_init(key, SIZES))(
        jax.random.split(jax.random.key(0), MEMBERS)
    )

    def build(every: int, start: int = 0) -> tuple[Any, Callable[[Any, Any], Any]]:
        updater = jp.MagnitudePruning(
            scheduler=jp.PolynomialSchedule(
                update_freq=every, update_start_step=start, update_end_step=start + 1_000_000
            ),
            sparsity_distribution_fn=functools.partial(
                jp.sparsity_distributions.uniform, sparsity=0.95
            ),
        )
        tx = updater.wrap_optax(optax.adam(1e-3))

        def run(params: Any, state: Any) -> Any:
            def step(carry: Any, batch: Any) -> Any:
                params, state = carry
                live = updater.pre_forward_update(params, state)
                grads = jax.grad(loss)(live, *batch)
                updates, state = tx.update(grads, state, params)
                params = optax.apply_updates(params, updates)
                return (updater.post_gradient_update(params, state), state), None

            return jax.lax.scan(step, (params, state), (inputs, targets))[0]

        return tx, run

    def single(every: int, start: int = 0) -> Callable[[], Any]:
        tx, run = build(every, start)
        compiled, state = jax.jit(run), tx.init(params)
        return lambda: compiled(params, state)

    def population() -> Callable[[], Any]:
        tx, run = build(10, 1_000_000)
        compiled, state = jax.jit(jax.vmap(run)), jax.vmap(tx.init)(many)
        return lambda: compiled(many, state)

    return {
        "JaxPruner, not due": single(10, 1_000_000),
        "JaxPruner, every 10": single(10),
        "JaxPruner, every step": single(1),
        "JaxPruner, vmap of 8, not due": population(),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures all cases, prints ratios beside the limits, and writes the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds")
    parser.add_argument("--steps", type=int, default=100, help="steps of a scanned chunk")
    options = parser.parse_args(argv)
    inputs = jax.random.normal(jax.random.key(1), (options.steps, BATCH, SIZES[0]))
    targets = jax.random.randint(jax.random.key(2), (options.steps, BATCH), 0, SIZES[-1])
    cases = ours(options.steps, inputs, targets)
    peer = os.environ.get("JAXPRUNER_PATH")
    if peer:
        cases |= jaxpruner(peer, inputs, targets)
    else:
        show("JaxPruner is not measured: set JAXPRUNER_PATH to a checkout of it.")
    alone = {name: case for name, case in cases.items() if "vmap" not in name}
    together = {name: case for name, case in cases.items() if "vmap" in name}
    summary = {}
    beside = {"adam ": cases["adam"], **rules(inputs, targets)}
    groups = (("adam", alone), ("vmap of 8, adam", together), ("adam ", beside))
    for reference, group in groups:
        part = interleaved(group, repeats=options.repeats, warmup=1)
        show(part.table(reference, f"\n{options.steps} steps, ratio to {reference}"))
        summary |= part.summary(reference)
    show("")
    for name, limit in LIMITS.items():
        ratio = min(summary[name]["ratio"], summary[name]["paired_ratio"])
        show(f"{name}: {ratio:.3f} (target <= {limit}): {'met' if ratio <= limit else 'MISSED'}")
    payload = {"sizes": SIZES, "batch": BATCH, "steps": options.steps, "cases": summary}
    write_results("pruning_overhead", payload)
    return payload


if __name__ == "__main__":
    main()
