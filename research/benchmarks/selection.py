"""The k-th largest score without sorting, beside sorting, argsort and top-k in one run.

    python -m research.benchmarks.selection [--repeats 5] [--sizes 266200 1000000 10000000]

Each candidate marks the largest tenth of the scores, and all must mark the same set. Writes
``results/selection.json``.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp

from adaptivenet import selection
from research.benchmarks._timing import interleaved, show, write_results

TARGET = 15.0


def by_sort(scores: jax.Array, k: int) -> jax.Array:
    """A mask by the threshold that a full sort finds (ties may keep more than k)."""
    return scores >= jnp.sort(scores)[scores.size - k]


def by_argsort(scores: jax.Array, k: int) -> jax.Array:
    """A mask by the positions of a full argsort, as pruning libraries do."""
    best = jnp.argsort(-scores, stable=True)[:k]
    return jnp.zeros(scores.shape, bool).at[best].set(True)


def by_top_k(scores: jax.Array, k: int) -> jax.Array:
    """A mask by ``lax.top_k``."""
    return jnp.zeros(scores.shape, bool).at[jax.lax.top_k(scores, k)[1]].set(True)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures all sizes, checks that the same set is kept, prints and writes the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--sizes", type=int, nargs="+", default=[266_200, 1_000_000, 10_000_000])
    options = parser.parse_args(argv)
    cases = []
    for size in options.sizes:
        scores = jnp.abs(jax.random.normal(jax.random.key(size), (size,)))
        k = size // 10
        functions = {
            "ours": lambda x, k=k: selection.top_mask(x, k),
            "ours, bisection": lambda x, k=k: selection.top_mask(x, k, method="bisection"),
            "jnp.sort": lambda x, k=k: by_sort(x, k),
            "jnp.argsort": lambda x, k=k: by_argsort(x, k),
            "lax.top_k": lambda x, k=k: by_top_k(x, k),
        }
        compiled = {name: jax.jit(function) for name, function in functions.items()}
        masks = {name: function(scores) for name, function in compiled.items()}
        kept = {name: int(mask.sum()) for name, mask in masks.items()}
        # A threshold keeps every tie, and so may keep more than k; the others keep exactly k.
        same = {
            name: bool(jnp.array_equal(mask, masks["jnp.argsort"])) for name, mask in masks.items()
        }
        if kept["ours"] != k or not same["ours"] or not same["ours, bisection"]:
            raise SystemExit(f"{size} scores: ours does not keep the set that argsort keeps.")
        timings = interleaved(
            {name: lambda f=function, x=scores: f(x) for name, function in compiled.items()},
            repeats=options.repeats,
            warmup=1,
        )
        show(timings.table("ours", f"\n{size:,} scores, the largest {k:,} kept"))
        gains = {name: timings.ratio(name, "ours") for name in ("jnp.sort", "jnp.argsort")}
        for name, gain in gains.items():
            verdict = "met" if gain >= TARGET else "MISSED"
            show(f"{gain:.1f} times as fast as {name} (target >= {TARGET:.0f}): {verdict}")
        show(f"the same set kept as argsort: {same}")
        cases.append({"size": size, "k": k, "same": same, "timings": timings.summary("ours")})
    payload = {"cases": cases}
    write_results("selection", payload)
    return payload


if __name__ == "__main__":
    main()
