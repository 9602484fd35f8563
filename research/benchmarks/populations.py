"""Populations of the founding MLP: vmap, lax.map, or one member after the other from the host.

    python -m research.benchmarks.populations [--steps 40] [--repeats 10]

Prints the ratios and writes `results/populations.json`, from which the default method of
`adaptivenet.training.over_population` on this kind of backend is set.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adaptivenet.models import mlp, mlp_init
from adaptivenet.training import default_method, init_state, make_epoch, over_population
from research.benchmarks._timing import interleaved, show, write_results

SIZES = (784, 128, 64, 10)
BATCH_SIZES = (128, 256)
MEMBERS = (2, 5, 8)


def loss(
    params: Any, inputs: jax.Array, targets: jax.Array, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The founding MLP's training loss."""
    logits = mlp(params, inputs, key=key, dropout=0.3)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(), {}


def candidates(batch_size: int, members: int, steps: int) -> dict[str, Callable[[], Any]]:
    """One epoch of `steps` steps of every member, by each method."""
    tx = optax.adam(1e-3)
    keys = jax.random.split(jax.random.key(0), members)
    states = jax.vmap(lambda key: init_state(lambda k: mlp_init(k, SIZES), tx, key))(keys)
    inputs = jax.random.uniform(jax.random.key(1), (steps * batch_size, SIZES[0]))
    targets = jax.random.randint(jax.random.key(2), (steps * batch_size,), 0, SIZES[-1])
    epoch = make_epoch(loss, tx, batch_size=batch_size)
    single = jax.jit(epoch)
    own = [jax.tree.map(lambda leaf, i=i: jnp.array(leaf[i]), states) for i in range(members)]
    by_vmap = over_population(epoch, (0, None, None), method="vmap")
    by_map = over_population(epoch, (0, None, None), method="map")
    return {
        "vmap": lambda: by_vmap(states, inputs, targets),
        "map": lambda: by_map(states, inputs, targets),
        "sequential": lambda: [single(state, inputs, targets) for state in own],
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs all sizes, prints a table for each, and writes the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="steps of a timed epoch")
    parser.add_argument("--repeats", type=int, default=10, help="timed rounds")
    arguments = parser.parse_args(argv)
    cases = []
    logs: dict[str, list[float]] = {"vmap": [], "sequential": []}
    for batch_size in BATCH_SIZES:
        for members in MEMBERS:
            timings = interleaved(
                candidates(batch_size, members, arguments.steps), arguments.repeats, warmup=1
            )
            title = f"\nbatch {batch_size}, {members} members, {arguments.steps} steps"
            show(timings.table("map", title))
            step = timings.min("map") / (members * arguments.steps)
            cases.append(
                {
                    "batch_size": batch_size,
                    "members": members,
                    "steps": arguments.steps,
                    "map_seconds_per_member_step": step,
                    "methods": timings.summary("map"),
                }
            )
            for name, values in logs.items():
                values.append(math.log(timings.ratio(name, "map")))
    means = {name: math.exp(sum(values) / len(values)) for name, values in logs.items()}
    faster = "vmap" if means["vmap"] < 1 else "map"
    backend = jax.default_backend()
    show(
        f"\ngeometric mean of the time relative to map: vmap {means['vmap']:.3f}, "
        f"sequential {means['sequential']:.3f}\n"
        f"faster on {backend}: {faster}; the default there is {default_method(backend)}"
    )
    payload = {"cases": cases, "geometric_mean_ratio_to_map": means, "faster": faster}
    write_results("populations", payload)
    return payload


if __name__ == "__main__":
    main()
