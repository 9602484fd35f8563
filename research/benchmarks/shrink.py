"""What smaller models save on the clock: dense, masked, shrunk and condensed, on one core.

    python -m research.benchmarks.shrink [--repeats 50] [--share 0.5] [--no-onnx]

First five families of networks, and a wide residual one: the dense network, the same with half of
its multiply-accumulates masked, and shrunk by as much; batches of 1 and of 64; compiled by JAX and,
with the extra `edge`, run by ONNX Runtime. Units are drawn at random: time depends on sizes alone,
accuracy is a matter of ``research.shrinking``. Then the founding MLP in blocks, and single layers
of 1024 x 1024 in every sparse format beside dense, with what `condensed.choose` picks. All
candidates of a table take turns. Writes ``results/shrink.json``.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptivenet import models, pruning
from adaptivenet.pruning import condensed
from research import shrinking_blocks
from research.benchmarks._timing import Timings, interleaved, show, write_results
from research.rounds import Task
from research.shrinking import Blocks
from research.shrinking_subjects import SUBJECTS, Subject, stays_whole

BATCHES = (1, 64)
SHAPES = {
    "mlp": (784,),
    "lenet5": (784,),
    "resnet": (32, 32, 3),
    "lstm": (28, 28),
    "transformer": (64,),
    "wide resnet": (32, 32, 3),
}
WIDE = (64, 128, 256)
SIZE = 1024
FAN_IN_TARGET, CLOCK_TARGET, CHOICE_LIMIT = 3.4, 0.8, 1.05


def subjects() -> dict[str, Subject]:
    """The study's subjects, and its residual CNN four times as wide, untrained."""

    def init(key: jax.Array, task: Task) -> Any:
        params, stats = models.resnet_init(key, task.inputs.shape[-1], WIDE, 10)
        return {"params": params, "stats": stats}

    title = "residual CNN, four times as wide"
    return {**SUBJECTS, "wide resnet": SUBJECTS["resnet"]._replace(title=title, init=init)}


def networks(subject: Subject, task: Task, share: float) -> tuple[dict[str, Any], float]:
    """A subject's dense, masked and shrunk variables, and how many times fewer MACs there are."""
    dense = subject.init(jax.random.key(0), task)
    example = task.inputs[:2]
    coupling = pruning.couple(subject.apply, dense, example)
    removable = pruning.removable_groups(coupling, dense, example)
    drawn = np.random.default_rng(0)
    scores = {
        group.name: drawn.random(group.count)
        for group in coupling.free
        if group.name in removable and not stays_whole(subject, group.name)
    }
    kept = pruning.choose_units(coupling, scores, share, multiple=8, floor=1)
    masked = pruning.zero_units(coupling, dense, kept)
    small = pruning.shrink(subject.apply, masked, example)
    if small.apply is not subject.apply:
        raise RuntimeError(f"{subject.title}: its function does not take smaller arrays.")
    ratio = small.report.before.macs / small.report.after.macs
    return {"dense": dense, "masked": masked, "shrunk": small.params}, ratio


def families(share: float, repeats: int, onnx: bool) -> dict[str, Any]:
    """Times of all subjects; every network as JAX compiles it and as ONNX Runtime runs it."""
    found: dict[str, Any] = {}
    for name, subject in subjects().items():
        task = _task(subject, SHAPES[name])
        variables, ratio = networks(subject, task, share)
        found[name] = {"macs_ratio": ratio}
        if name == "mlp":
            variables["condensed"] = blocks(variables["shrunk"])
        for batch in BATCHES:
            x = task.inputs[:batch]
            candidates: dict[str, Callable[[], Any]] = {}
            loop = max(subject.calls // batch, 1)
            for kind, network in variables.items():
                apply = shrinking_blocks.mlp if kind == "condensed" else subject.apply
                candidates[f"JAX, {kind}"] = partial(jax.jit(apply), network, x)
                if loop > 1:
                    candidates[f"JAX {loop} times in a loop, {kind}"] = _loop(
                        apply, network, x, loop
                    )
                if onnx:
                    candidates[f"ONNX, {kind}"] = session(partial(apply, network), x)
            few = max(repeats // 5, 1) if name == "wide resnet" else repeats
            timings = interleaved(candidates, repeats=few)
            title = f"{subject.title}, batch {batch}, {ratio:.2f} times fewer MACs when shrunk"
            show(_beside_dense(timings, title))
            found[name][f"batch {batch}"] = timings.summary("JAX, dense")
    return found


def layers(repeats: int) -> dict[str, Any]:
    """Times of single sparse layers beside dense, at three sparsities."""
    found: dict[str, Any] = {}
    weights = np.random.default_rng(0).normal(size=(SIZE, SIZE)).astype(np.float32)
    for batch in BATCHES:
        x = jax.random.normal(jax.random.key(1), (batch, SIZE))
        for sparsity in (0.9, 0.95, 0.99):
            packed = {"dense": condensed.pack_dense(weights), **_packed(weights, 1 - sparsity)}
            multiply = jax.jit(condensed.apply)
            candidates = {name: partial(multiply, layer, x) for name, layer in packed.items()}
            timings = interleaved(candidates, repeats=repeats)
            label = f"{SIZE} x {SIZE}, {sparsity:.0%} zero, batch {batch}"
            show(timings.table("dense", f"\n{label}: ratio to dense"))
            found[label] = timings.summary("dense")
            for name, layer in packed.items():
                found[label][name]["bytes"] = condensed.stored_bytes(layer)
            picked = condensed.choose(condensed.unpack(packed["fan-in"]), batch)
            again = interleaved(
                {"dense": candidates["dense"], "chosen": partial(multiply, picked.layer, x)},
                repeats=repeats,
            )
            least = min(again.ratio("chosen", "dense"), again.paired_ratio("chosen", "dense"))
            show(f"chosen for the fan-in mask: {picked.format}, {least:.2f} of the time of dense")
            found[label]["chosen"] = {"format": picked.format, **again.summary("dense")["chosen"]}
    return found


def blocks(params: Any, density: float = 0.15) -> Any:
    """The founding MLP, shrunk, with blocks of its first kernel cut at random."""
    first = params["dense1"]["kernel"]
    sizes = Blocks(sparsity=1 - density, block=(1, first.shape[1]))
    mask = _mask(np.random.default_rng(0), first.shape, sizes.block, density)
    kernel = jnp.asarray(np.where(mask, np.asarray(first), 0))
    cut = {**params, "dense1": {**params["dense1"], "kernel": kernel}}
    return shrinking_blocks.condense(sizes, cut)


def session(apply: Callable[..., jax.Array], x: jax.Array) -> Callable[[], Any]:
    """The network exported to ONNX, run on one thread; checked against JAX."""
    # It warns of plugins for libraries that nobody asked for.
    logging.getLogger("jax2onnx").setLevel(logging.ERROR)
    import jax2onnx  # pyright: ignore[reportMissingImports]
    import onnxruntime  # pyright: ignore[reportMissingImports]

    model = jax2onnx.to_onnx(apply, [jax.ShapeDtypeStruct(x.shape, x.dtype)])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    runs = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    given = {runs.get_inputs()[0].name: np.asarray(x)}
    np.testing.assert_allclose(runs.run(None, given)[0], apply(x), rtol=1e-3, atol=1e-4)
    return partial(runs.run, None, given)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints ratios beside the targets, and writes the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=50, help="timed rounds")
    parser.add_argument("--share", type=float, default=0.476, help="of the MACs that is left")
    parser.add_argument("--no-onnx", action="store_true", help="leave ONNX Runtime out")
    options = parser.parse_args(argv)
    one_core()
    onnx = not options.no_onnx and _importable("jax2onnx", "onnxruntime")
    if not onnx:
        show("ONNX Runtime is not measured: pip install 'adaptivenet[edge]' brings it.")
    nets = families(options.share, options.repeats, onnx)
    single = layers(options.repeats)
    show("")
    best = min(
        single[f"{SIZE} x {SIZE}, 90% zero, batch 1"]["fan-in"][kind]
        for kind in ("ratio", "paired_ratio")
    )
    verdict = "met" if 1 / best >= FAN_IN_TARGET else "MISSED"
    show(f"constant fan-in, 90 %, batch 1: {1 / best:.2f} (target {FAN_IN_TARGET}): {verdict}")
    for name in ("resnet", "wide resnet"):
        for batch in BATCHES:
            times = nets[name][f"batch {batch}"]
            gain = 1 / times["JAX, shrunk"]["ratio"] / nets[name]["macs_ratio"]
            verdict = "met" if gain >= CLOCK_TARGET else "MISSED"
            show(
                f"{subjects()[name].title}, batch {batch}: {gain:.2f} of the ratio of MACs shows "
                f"on the clock (target {CLOCK_TARGET}): {verdict}"
            )
    worst = max(
        min(case["chosen"]["ratio"], case["chosen"]["paired_ratio"]) for case in single.values()
    )
    verdict = "met" if worst <= CHOICE_LIMIT else "MISSED"
    show(f"slowest choice beside dense: {worst:.2f} (limit {CHOICE_LIMIT}): {verdict}")
    payload = {"share": options.share, "threads": 1, "families": nets, "layers": single}
    write_results("shrink", payload)
    return payload


def one_core() -> None:
    """Keeps the process, and every thread that it starts later, on one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()


def _task(subject: Subject, shape: tuple[int, ...]) -> Task:
    key, shape = jax.random.key(2), (max(BATCHES), *shape)
    if subject.inputs is None:
        x = jax.random.randint(key, shape, 0, 65)
        return Task(x, jnp.full(shape, 64), x, x)
    x = jax.random.normal(key, shape)
    return Task(x, jnp.zeros(len(x), int), x, jnp.zeros(len(x), int))


def _loop(apply: Any, network: Any, x: jax.Array, batches: int) -> Callable[[], Any]:
    """Many batches in one program, as a compiled program of a user's would evaluate them."""
    many = jnp.broadcast_to(x, (batches, *x.shape))
    return partial(jax.jit(lambda v, xs: jax.lax.map(partial(apply, v), xs)), network, many)


def _beside_dense(timings: Timings, title: str) -> str:
    """Times as fast as dense, of the same way of running it."""
    rows = [f"\n{title}", f"{'':38}{'min us':>10}  times as fast as dense"]
    for name in timings.seconds:
        dense = f"{name.split(',')[0]}, dense"
        ratio = timings.min(dense) / timings.min(name)
        rows.append(f"{name:38}{1e6 * timings.min(name):10.1f}  {ratio:.2f}")
    return "\n".join(rows)


def _mask(drawn: Any, shape: tuple[int, ...], block: tuple[int, int], density: float) -> np.ndarray:
    """The same number of blocks in every column of blocks, at random places."""
    rows, columns = shape[0] // block[0], shape[1] // block[1]
    order = np.argsort(drawn.random((rows, columns)), axis=0)
    chosen = order < max(1, round(rows * density))
    return np.kron(chosen, np.ones(block, bool)).astype(bool)


def _packed(weights: np.ndarray, density: float) -> Mapping[str, Any]:
    """The kernel in every format, each on a mask of its own structure."""
    drawn = np.random.default_rng(1)
    fan_in = np.where(_mask(drawn, weights.shape, (1, 1), density), weights, 0)
    found = {"fan-in": condensed.pack_fan_in(fan_in), "bcsr": condensed.pack_bcsr(fan_in)}
    for block in ((1, 16), (1, 64), (16, 16), (64, 64)):
        kernel = np.where(_mask(drawn, weights.shape, block, density), weights, 0)
        found[f"blocks {block[0]}x{block[1]}"] = condensed.pack_blocks(kernel, block)
    most = round(1 / density)
    if SIZE % most == 0 or most == 10:
        m = 8 if most == 10 else most
        order = np.argsort(drawn.random((SIZE // m, m, SIZE)), axis=1)
        kernel = np.where((order < 1).reshape(SIZE, SIZE), weights, 0)
        found[f"1:{m}"] = condensed.pack_nofm(kernel, 1, m)
    return found


def _importable(*names: str) -> bool:
    import importlib.util

    return all(importlib.util.find_spec(name) is not None for name in names)


if __name__ == "__main__":
    main()
