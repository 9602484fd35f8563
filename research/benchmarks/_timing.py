"""Timing that compares: candidates take turns, so that a busy moment strikes all of them alike."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds of each candidate, one per repeat, in the order of the repeats."""

    seconds: dict[str, list[float]]

    def min(self, name: str) -> float:
        """Seconds of the fastest repeat: the one that other work disturbed least."""
        return min(self.seconds[name])

    def median(self, name: str) -> float:
        """Seconds of the median repeat."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, reference: str) -> float:
        """Ratio of the fastest repeats."""
        return self.min(name) / self.min(reference)

    def paired_ratio(self, name: str, reference: str) -> float:
        """Median over repeats of the ratio within a repeat; on a calm machine, `ratio`."""
        pairs = zip(self.seconds[name], self.seconds[reference], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def table(self, reference: str, title: str = "") -> str:
        """A table of all candidates beside the reference."""
        width = max(map(len, self.seconds))
        head = f"{'':{width}}  {'min ms':>9}  {'median ms':>9}  {'ratio':>6}  {'paired':>6}"
        rows = [
            f"{name:{width}}  {1e3 * self.min(name):9.3f}  {1e3 * self.median(name):9.3f}  "
            f"{self.ratio(name, reference):6.3f}  {self.paired_ratio(name, reference):6.3f}"
            for name in self.seconds
        ]
        return "\n".join([*([title] if title else []), head, *rows])

    def summary(self, reference: str) -> dict[str, dict[str, float]]:
        """What belongs into a results file."""
        return {
            name: {
                "min_seconds": self.min(name),
                "median_seconds": self.median(name),
                "ratio": self.ratio(name, reference),
                "paired_ratio": self.paired_ratio(name, reference),
                "repeats": len(self.seconds[name]),
            }
            for name in self.seconds
        }


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], repeats: int = 20, warmup: int = 2
) -> Timings:
    """Times candidates in turns, and waits for the device after each call.

    Args:
        candidates: Functions without arguments, by name. What they return is waited for.
        repeats: Timed rounds; each round calls every candidate once, each time in another order.
        warmup: Calls of each candidate before the first round; the first one compiles.

    Returns:
        The seconds of every call.

    Raises:
        ValueError: If there are no candidates or no repeats.
    """
    if not candidates or repeats < 1:
        raise ValueError("there must be a candidate, and a repeat")
    for _ in range(warmup):
        for function in candidates.values():
            jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for repeat in range(repeats):
        # Rotated, so that no candidate always runs after the same other one.
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            started = time.perf_counter()
            jax.block_until_ready(candidates[name]())
            seconds[name].append(time.perf_counter() - started)
    return Timings(seconds)


def environment() -> dict[str, Any]:
    """Versions, device and cores: what a timing depends on."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "versions": versions,
        "device": {"platform": device.platform, "kind": device.device_kind},
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "load": [round(value, 2) for value in os.getloadavg()],
    }


def write_results(name: str, payload: Mapping[str, Any], folder: Path | None = None) -> Path:
    """Writes `results/<name>.json` with the payload and the environment beside it.

    Args:
        name: Name of the benchmark.
        payload: What JSON can hold; nan is refused.
        folder: Where to write; by default `results` beside the benchmarks.

    Returns:
        The file.
    """
    folder = RESULTS if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    document = {"benchmark": name, **payload, "environment": environment()}
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    beside.replace(path)
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return path


def show(text: str) -> None:
    """Prints at once, also into a pipe."""
    print(text, file=sys.stdout, flush=True)
