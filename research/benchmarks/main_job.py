"""The founding note's own Keras program beside ours: same data, epochs, batch size and rule.

    python -m research.benchmarks.main_job [--seeds 3] [--epochs 5] [--batch-size 32]

The rule: an MLP 784-128-64-10 (ReLU, dropout 0.3 after the first layer, Adam, cross entropy) trains
on MNIST, and after every epoch each weight of a kernel with |w| < 0.05 is set to zero; it may grow
again. (Keras's callback looks at the weights after the epoch's last step, ours at those before
it.) The Keras program is written from the description in the note. Both get the same
arrays, already flat and scaled to [0, 1].

Seconds are those of the five epochs with their pruning, plus one evaluation on the test images,
from arrays in host memory to numbers in Python; compilation happens before, on a throw-away step,
and is reported apart, as are the seconds of importing. Runs alternate: Keras, ours, Keras, ours.

The peer is optional. It needs its own interpreter, or this one, with Keras in it:

    python3 -m venv keras && keras/bin/pip install tensorflow-cpu keras
    KERAS_PYTHON=keras/bin/python python -m research.benchmarks.main_job

References:
    "Modelo de Compresión de IA Basado en Sistemas Complejos Adaptativos", PASAIA-LAB /
    J. A. Fontán Varela, 2025.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

# Nothing of JAX or of this package is imported up here: the peer's process runs this file too.

SIZES = (784, 128, 64, 10)
DROPOUT = 0.3
THRESHOLD = 0.05
LEARNING_RATE = 1e-3  # Adam's default in Keras
EVALUATION_BATCH = 1_024
TARGET = 5.0  # how many times as fast as the peer ours should be
ROOT = Path(__file__).resolve().parents[2]


# The peer ----------------------------------------------------------------------------------------


def run_keras(
    arrays: dict[str, np.ndarray], *, epochs: int, batch_size: int, seed: int
) -> dict[str, Any]:
    """Trains the note's program once; runs in the peer's interpreter."""
    began = time.perf_counter()
    import keras  # type: ignore[import-not-found]

    imported = time.perf_counter()
    keras.utils.set_random_seed(seed)

    class AdaptivePruning(keras.callbacks.Callback):
        """After each epoch, weights below the threshold become zero."""

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            for layer in self.model.layers:
                if isinstance(layer, keras.layers.Dense):
                    kernel, bias = layer.get_weights()
                    kernel[np.abs(kernel) < THRESHOLD] = 0.0
                    layer.set_weights([kernel, bias])

    model = keras.Sequential(
        [
            keras.Input((SIZES[0],)),
            keras.layers.Dense(SIZES[1], activation="relu", name="knowledge_reservoir"),
            keras.layers.Dropout(DROPOUT),
            keras.layers.Dense(SIZES[2], activation="relu"),
            keras.layers.Dense(SIZES[3], activation="softmax"),
        ]
    )
    optimizer = keras.optimizers.Adam(LEARNING_RATE)
    model.compile(optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])

    # One throw-away batch of each kind compiles; then everything is put back as it was.
    optimizer.build(model.trainable_variables)
    variables = [*model.variables, *optimizer.variables]
    before = [keras.ops.convert_to_numpy(variable) for variable in variables]
    x, y = arrays["train_inputs"], arrays["train_targets"]
    compiling = time.perf_counter()
    model.fit(x[:batch_size], y[:batch_size], batch_size=batch_size, epochs=1, verbose=0)
    model.evaluate(
        x[:EVALUATION_BATCH], y[:EVALUATION_BATCH], batch_size=EVALUATION_BATCH, verbose=0
    )
    for variable, value in zip(variables, before, strict=True):
        variable.assign(value)

    started = time.perf_counter()
    model.fit(x, y, batch_size=batch_size, epochs=epochs, verbose=0, callbacks=[AdaptivePruning()])
    trained = time.perf_counter()
    test = (arrays["test_inputs"], arrays["test_targets"])
    _, accuracy = model.evaluate(*test, batch_size=EVALUATION_BATCH, verbose=0)
    done = time.perf_counter()
    kernels = [weight for weight in model.get_weights() if weight.ndim == 2]
    return {
        "seconds": done - started,
        "train_seconds": trained - started,
        "compile_seconds": started - compiling,
        "import_seconds": imported - began,
        "accuracy": float(accuracy),
        "zeros": int(sum((kernel == 0).sum() for kernel in kernels)),
        "synapses": int(sum(kernel.size for kernel in kernels)),
        "parameters": int(model.count_params()),
        "versions": {"keras": keras.__version__, keras.backend.backend(): _backend_version(keras)},
    }


def _backend_version(keras: Any) -> str:
    module = sys.modules.get(keras.backend.backend())
    return getattr(module, "__version__", "unknown")


def find_peer() -> tuple[str | None, str]:
    """Returns the interpreter that has Keras, or None and what to do about it."""
    python = os.environ.get("KERAS_PYTHON", sys.executable)
    found = shutil.which(python)
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('keras') is None)"
    if found and subprocess.run([found, "-c", probe], check=False).returncode == 0:
        return found, ""
    return None, (
        f"The peer is missing: {python} has no Keras. To measure beside it:\n"
        "    python3 -m venv keras && keras/bin/pip install tensorflow-cpu keras\n"
        "    KERAS_PYTHON=keras/bin/python python -m research.benchmarks.main_job"
    )


def run_peer(python: str, arrays: Path, arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Runs `run_keras` in the peer's interpreter, by itself on the machine."""
    answer = arrays.with_name("answer.json")
    answer.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "-1"),
        "PYTHONPATH": str(ROOT),
    }
    command = [python, "-m", "research.benchmarks.main_job", "--peer", str(arrays), str(answer)]
    command += ["--epochs", str(arguments.epochs), "--batch-size", str(arguments.batch_size)]
    process = subprocess.run(
        [*command, "--first-seed", str(seed)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode != 0:
        raise SystemExit(f"the Keras program failed:\n{process.stderr[-4_000:]}")
    return json.loads(answer.read_text())


# Ours --------------------------------------------------------------------------------------------


class Ours:
    """The same job with this package; compiles once, runs any number of seeds."""

    def __init__(self, arrays: dict[str, np.ndarray], *, epochs: int, batch_size: int):
        began = time.perf_counter()
        import jax
        import optax

        import adaptivenet as an
        from adaptivenet.models import mlp, mlp_init
        from adaptivenet.training import init_state, make_epoch, make_evaluate

        self.import_seconds = time.perf_counter() - began
        self.jax, self.arrays, self.epochs = jax, arrays, epochs
        steps = len(arrays["train_inputs"]) // batch_size
        tx = optax.chain(
            optax.adam(LEARNING_RATE),
            an.pruning.prune(
                an.pruning.threshold(THRESHOLD), regrow=an.pruning.everything(), every=steps
            ),
        )

        def cross_entropy(logits: Any, targets: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

        def loss(params: Any, inputs: Any, targets: Any, key: Any) -> Any:
            logits = mlp(params, inputs, key=key, dropout=DROPOUT)
            return cross_entropy(logits, targets).mean(), {}

        def per_example(params: Any, inputs: Any, targets: Any) -> Any:
            logits = mlp(params, inputs)
            return {
                "loss": cross_entropy(logits, targets),
                "accuracy": logits.argmax(-1).astype(targets.dtype) == targets,
            }

        self.init = jax.jit(lambda key: init_state(lambda k: mlp_init(k, SIZES), tx, key))
        state = self.init(jax.random.key(0))
        train, test = self.put("train"), self.put("test")
        began = time.perf_counter()
        epoch = jax.jit(make_epoch(loss, tx, batch_size=batch_size))
        evaluate = jax.jit(make_evaluate(per_example, batch_size=EVALUATION_BATCH))
        self.epoch = epoch.lower(state, *train).compile()
        self.evaluate = evaluate.lower(state.params, *test).compile()
        self.compile_seconds = time.perf_counter() - began

    def put(self, part: str) -> tuple[Any, Any]:
        """Moves a part of the data to the device."""
        put = self.jax.device_put
        return put(self.arrays[f"{part}_inputs"]), put(self.arrays[f"{part}_targets"])

    def run(self, seed: int) -> dict[str, Any]:
        """Trains once."""
        state = self.jax.block_until_ready(self.init(self.jax.random.key(seed)))
        started = time.perf_counter()
        train = self.put("train")
        for _ in range(self.epochs):
            state, metrics = self.epoch(state, *train)
            float(metrics["loss"])  # as Keras does, hand each epoch's numbers to the host
        self.jax.block_until_ready(state)
        trained = time.perf_counter()
        accuracy = float(self.evaluate(state.params, *self.put("test"))["accuracy"])
        done = time.perf_counter()
        leaves = [np.asarray(leaf) for leaf in self.jax.tree.leaves(state.params)]
        kernels = [leaf for leaf in leaves if leaf.ndim == 2]
        return {
            "seconds": done - started,
            "train_seconds": trained - started,
            "compile_seconds": self.compile_seconds,
            "import_seconds": self.import_seconds,
            "accuracy": accuracy,
            "zeros": int(sum((kernel == 0).sum() for kernel in kernels)),
            "synapses": int(sum(kernel.size for kernel in kernels)),
            "parameters": int(sum(leaf.size for leaf in leaves)),
        }


# Both --------------------------------------------------------------------------------------------


def load_arrays() -> dict[str, np.ndarray]:
    """MNIST as both programs get it: float32 `[n, 784]` in [0, 1], int32 labels."""
    from adaptivenet import data

    mnist = data.load("mnist")

    def flat(images: np.ndarray) -> np.ndarray:
        return (images.reshape(len(images), -1) / np.float32(255)).astype(np.float32)

    return {
        "train_inputs": flat(mnist.train_inputs),
        "train_targets": np.asarray(mnist.train_targets, np.int32),
        "test_inputs": flat(mnist.test_inputs),
        "test_targets": np.asarray(mnist.test_targets, np.int32),
    }


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the runs, and the runs."""
    names = ("seconds", "train_seconds", "compile_seconds", "import_seconds", "accuracy")
    medians: dict[str, Any] = {n: statistics.median(run[n] for run in runs) for n in names}
    medians["sparsity"] = statistics.median(run["zeros"] / run["synapses"] for run in runs)
    return {"median": medians, "runs": runs}


def show(results: dict[str, dict[str, Any]]) -> None:
    """Prints one line a program."""
    print(f"{'':8} {'seconds':>9} {'compile':>9} {'import':>8} {'accuracy':>9} {'zeros':>8}")
    for name, result in results.items():
        m = result["median"]
        print(
            f"{name:8} {m['seconds']:9.2f} {m['compile_seconds']:9.2f} {m['import_seconds']:8.2f}"
            f" {m['accuracy']:9.2%} {m['sparsity']:8.1%}"
        )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m research.benchmarks.main_job",
        description="The founding note's Keras program beside ours, on MNIST.",
    )
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each program")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--peer", nargs=2, metavar=("ARRAYS", "ANSWER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    for name in ("epochs", "batch_size", "seeds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    arguments = parse(argv)
    settings = {"epochs": arguments.epochs, "batch_size": arguments.batch_size}
    if arguments.peer:
        with np.load(arguments.peer[0]) as arrays:
            answer = run_keras(dict(arrays), seed=arguments.first_seed, **settings)
        Path(arguments.peer[1]).write_text(json.dumps(answer))
        return 0

    arrays = load_arrays()
    peer, advice = find_peer()
    print(f"MNIST, {arguments.epochs} epochs at batch {arguments.batch_size}; CPU cores:", end=" ")
    print(os.cpu_count(), flush=True)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    runs: dict[str, list[dict[str, Any]]] = {"keras": [], "ours": []}
    ours = Ours(arrays, **settings)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "arrays.npz"
        if peer:
            np.savez(path, **arrays)  # type: ignore[arg-type]
        for seed in seeds:
            if peer:
                runs["keras"].append(run_peer(peer, path, arguments, seed))
                print(f"seed {seed}: keras {runs['keras'][-1]['seconds']:.2f} s", flush=True)
            runs["ours"].append(ours.run(seed))
            print(f"seed {seed}: ours  {runs['ours'][-1]['seconds']:.2f} s", flush=True)

    results = {name: summarise(each) for name, each in runs.items() if each}
    show(results)
    if not peer:
        print(f"{advice}\nNo ratio and no results file without the peer.")
        return 0
    from research.benchmarks._timing import Timings, write_results

    timings = Timings({name: [run["seconds"] for run in each] for name, each in runs.items()})
    # The fastest runs are the ones that other work on the machine disturbed least.
    ratio, paired = timings.ratio("keras", "ours"), timings.paired_ratio("keras", "ours")
    verdict = "met" if ratio >= TARGET else "MISSED"
    print(f"after compilation ours is {ratio:.1f} times as fast, fastest beside fastest run;")
    print(f"{paired:.1f} times in the median pair (target >= {TARGET:.0f}): {verdict}")
    write_results(
        "main_job",
        {
            "data": "MNIST, 60,000 training and 10,000 test images",
            "settings": {**settings, "seeds": list(seeds), "threshold": THRESHOLD},
            "results": results,
            "ratio": ratio,
            "paired_ratio": paired,
            "target": TARGET,
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
