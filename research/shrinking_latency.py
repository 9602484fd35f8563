"""How long networks take, on one core, measured in turns in a process of its own.

    python -m research.shrinking_latency CASES OUT

A process of its own, because the number of threads is fixed when jax starts. ``CASES`` is a pickle
that :func:`measure` writes; ``OUT`` is the JSON that it reads back.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
ROOT = Path(__file__).resolve().parents[1]


def measure(
    subject: str, networks: Mapping[str, PyTree], inputs: Any, batches: tuple[int, ...], rounds: int
) -> dict[str, dict[str, float]]:
    """Times networks of one subject beside each other.

    Args:
      subject: its name; a network whose name begins with "condensed" is a perceptron of layers of
        ``pruning.condensed``.
      networks: variables by name.
      inputs: ``[examples, ...]``, at least as many as the largest batch.
      batches: sizes of a batch.
      rounds: timed rounds, each of which calls every network once.

    Returns:
      Seconds of the fastest round, by kind of call and then by network: "call/1" is one jitted call
      on a batch of 1, "stream/1" one batch of many that are evaluated one after the other in one
      program, for subjects so small that a call costs more than the network.

    Raises:
      RuntimeError: the process failed; what it printed stands in the message.
    """
    plain = jax.tree.map(np.asarray, dict(networks))
    case = {
        "subject": subject,
        "networks": plain,
        "inputs": np.asarray(inputs[: max(batches)]),
        "batches": batches,
        "rounds": rounds,
    }
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "cases.pickle", Path(folder) / "seconds.json"
        given.write_bytes(pickle.dumps(case))
        done = subprocess.run(
            [sys.executable, "-m", "research.shrinking_latency", str(given), str(found)],
            env={**os.environ, "XLA_FLAGS": flags.strip()},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"timing the {subject} failed:\n{done.stdout}{done.stderr}")
        return json.loads(found.read_text(encoding="utf-8"))


def timed(case: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What the process does: compiles every network, and times them in turns.

    Args:
      case: what :func:`measure` put together.

    Returns:
      As :func:`measure`.
    """
    from research.benchmarks._timing import interleaved
    from research.shrinking_blocks import mlp
    from research.shrinking_subjects import SUBJECTS

    subject = SUBJECTS[case["subject"]]
    found = {}
    for batch in case["batches"]:
        x = jnp.asarray(case["inputs"][:batch])
        many = jnp.broadcast_to(x, (max(subject.calls // batch, 1), *x.shape))
        calls, streams = {}, {}
        for name, network in case["networks"].items():
            apply = mlp if name.startswith("condensed") else subject.apply
            variables = jax.tree.map(jnp.asarray, network)
            calls[name] = partial(jax.jit(apply), variables, x)

            def stream(variables: PyTree, many: jax.Array, apply: Any = apply) -> jax.Array:
                return jax.lax.map(partial(apply, variables), many)

            streams[name] = partial(jax.jit(stream), variables, many)
        kinds = {"call": (calls, 1)}
        if subject.calls > 1:
            kinds["stream"] = (streams, len(many))
        for kind, (functions, each) in kinds.items():
            timings = interleaved(functions, repeats=case["rounds"])
            found[f"{kind}/{batch}"] = {name: timings.min(name) / each for name in functions}
    return found


def _one_core() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


if __name__ == "__main__":
    _one_core()
    cases, out = map(Path, sys.argv[1:])
    out.write_text(json.dumps(timed(pickle.loads(cases.read_bytes()))), encoding="utf-8")
