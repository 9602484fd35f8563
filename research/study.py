"""The skeleton that studies share: run folder, intervals, results file, table."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adaptivenet import training


def open_run(study: str, config: Any) -> tuple[Path, str]:
    """Makes (or finds again) the run folder ``<output>/<study>/<config hash>``.

    Args:
      study: name of the study.
      config: dataclass with a field ``output``, the root folder, which the hash leaves out.

    Returns:
      The folder, with ``config.yaml`` in it, and the hash.
    """
    digest = training.config_hash(dataclasses.replace(config, output=""))
    folder = Path(config.output) / study / digest
    folder.mkdir(parents=True, exist_ok=True)
    training.save_config(config, folder / "config.yaml")
    return folder, digest


def mean_interval(values: Any) -> dict[str, Any]:
    """Mean and 95 % interval over seeds by Student's t.

    Args:
      values: one number a seed.

    Returns:
      ``mean``, ``ci_low``, ``ci_high`` (None for a single seed) and ``n``.

    >>> mean_interval([1.0, 2.0, 3.0])["mean"]
    2.0
    """
    from scipy import stats

    values = np.asarray(values, np.float64).ravel()
    mean, n = float(values.mean()), int(values.size)
    if n < 2:
        return {"mean": mean, "ci_low": None, "ci_high": None, "n": n}
    half = float(stats.t.ppf(0.975, n - 1)) * float(values.std(ddof=1)) / math.sqrt(n)
    return {"mean": mean, "ci_low": mean - half, "ci_high": mean + half, "n": n}


def write_results(folder: Path, results: Mapping[str, Any]) -> Path:
    """Writes ``results.json`` atomically, with versions and device added.

    Args:
      folder: the run folder.
      results: what the study found.

    Returns:
      The file.
    """
    packages = ("jax", "flax", "optax", "numpy")
    device = jax.devices()[0]
    document = {
        **results,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "device": f"{device.platform} ({device.device_kind}), {os.cpu_count()} cores",
    }
    path = folder / "results.json"
    beside = path.with_name("results.json.part")
    beside.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    beside.replace(path)
    return path


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; the first column is left-aligned, the others are right-aligned.

    Args:
      title: stands above it.
      columns: headings.
      rows: cells.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # A table cut to the width of a pipe or a small window would lose its numbers.
    needed = Console(width=1000).measure(table).maximum
    Console(width=max(Console().width, needed)).print(table)
