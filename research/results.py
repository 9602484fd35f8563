"""What a study leaves behind: run folder, results file with a seal, intervals, table."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from adaptivenet import training


class ResultsError(ValueError):
    """A results file that cannot be trusted."""


class Outcome(NamedTuple):
    """What a study measured.

    Attributes:
      metrics: name to one number a seed, ``[seeds]``.
      curves: name to ``[seeds, ...]``, what the figure and the judge need beside.
    """

    metrics: dict[str, np.ndarray]
    curves: dict[str, np.ndarray]

    def at(self, place: int) -> Outcome:
        """The outcome of one seed, with its axis."""
        one = slice(place, place + 1)
        return Outcome(
            {name: np.asarray(value)[one] for name, value in self.metrics.items()},
            {name: np.asarray(value)[one] for name, value in self.curves.items()},
        )

    def rounded(self, digits: int = 6) -> Outcome:
        """To so many significant digits, as the results file holds them."""

        def shorten(values: Any) -> np.ndarray:
            values = np.asarray(values, np.float64)
            texts = [float(f"{value:.{digits}g}") for value in values.ravel()]
            return np.asarray(texts, np.float64).reshape(values.shape)

        return Outcome(*({k: shorten(v) for k, v in group.items()} for group in self))

    def save(self, path: Path) -> None:
        """Writes one npz file, whole or not at all."""
        beside = path.with_suffix(".part")
        arrays = {
            f"{kind}:{name}": v
            for kind, group in self._asdict().items()
            for name, v in group.items()
        }
        with beside.open("wb") as stream:
            np.savez_compressed(stream, **arrays)
        beside.replace(path)

    @classmethod
    def load(cls, path: Path) -> Outcome:
        """Reads what :meth:`save` wrote."""
        groups: dict[str, dict[str, np.ndarray]] = {"metrics": {}, "curves": {}}
        with np.load(path) as file:
            for key in file.files:
                kind, name = key.split(":", 1)
                groups[kind][name] = file[key]
        return cls(**groups)

    def to_json(self) -> dict[str, Any]:
        """As ``per_seed`` and ``curves``; nan is null."""

        def plain(value: Any) -> Any:
            if isinstance(value, list):
                return [plain(item) for item in value]
            return value if math.isfinite(value) else None

        return {
            "per_seed": {name: plain(np.asarray(v).tolist()) for name, v in self.metrics.items()},
            "curves": {name: plain(np.asarray(v).tolist()) for name, v in self.curves.items()},
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Outcome:
        """Reads what :meth:`to_json` made."""
        groups = (document["per_seed"], document["curves"])
        return cls(*({k: np.array(v, np.float64) for k, v in group.items()} for group in groups))


def open_run(study: str, config: Any) -> tuple[Path, str]:
    """Makes (or finds again) the run folder ``<output>/<study>/<config hash>``.

    Args:
      study: name of the study.
      config: dataclass with a field ``output``, the root folder, which the hash leaves out (as it
        does ``keep``).

    Returns:
      The folder, with ``config.yaml`` in it, and the hash.
    """
    places = {f.name for f in dataclasses.fields(config)} & {"output", "keep"}
    digest = training.config_hash(dataclasses.replace(config, **dict.fromkeys(places, "")))
    folder = Path(config.output) / study / digest
    folder.mkdir(parents=True, exist_ok=True)
    training.save_config(config, folder / "config.yaml")
    return folder, digest


def config_text(config: Any) -> str:
    """The config as YAML, with its places (``output``, ``keep``) as they are by default."""
    fields = {f.name: f.default for f in dataclasses.fields(config)}
    places = {name: fields[name] for name in ("output", "keep") if name in fields}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        training.save_config(dataclasses.replace(config, **places), path)
        return path.read_text(encoding="utf-8")


def config_from_text(kind: type[Any], text: str) -> Any:
    """Reads what :func:`config_text` wrote, checked like any config file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return training.load_config(kind, ["--config", str(path)], prog="results")


def mean_interval(values: Any) -> dict[str, Any]:
    """Mean and 95 % interval over seeds by Student's t.

    Args:
      values: one number a seed; those that are nan (no estimate) are left out and not counted.

    Returns:
      ``mean``, ``ci_low``, ``ci_high`` (None for a single seed) and ``n``.

    >>> mean_interval([1.0, 2.0, 3.0])["mean"]
    2.0
    """
    from scipy import stats

    values = np.asarray(values, np.float64).ravel()
    values = values[np.isfinite(values)]
    n = int(values.size)
    if n == 0:
        return {"mean": None, "ci_low": None, "ci_high": None, "n": 0}
    mean = float(values.mean())
    if n < 2:
        return {"mean": mean, "ci_low": None, "ci_high": None, "n": n}
    half = float(stats.t.ppf(0.975, n - 1)) * float(values.std(ddof=1)) / math.sqrt(n)
    return {"mean": mean, "ci_low": mean - half, "ci_high": mean + half, "n": n}


def seal(document: Mapping[str, Any]) -> str:
    """SHA-256 of a results document, its own seal left out."""
    content = {key: value for key, value in document.items() if key != "seal"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_results(folder: Path, results: Mapping[str, Any]) -> Path:
    """Writes ``results.json`` atomically, with versions, device and seal added.

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
    # As it will be read: tuples are lists there.
    document = json.loads(json.dumps(document, allow_nan=False))
    document["seal"] = seal(document)
    path = folder / "results.json"
    beside = path.with_name("results.json.part")
    beside.write_text(_lay_out(document), encoding="utf-8")
    beside.replace(path)
    return path


def read_results(path: Path) -> dict[str, Any]:
    """Reads a results file and checks its seal.

    Args:
      path: the file.

    Returns:
      The document.

    Raises:
      ResultsError: it is missing, no JSON, has no seal, or was changed after it was written.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultsError(f"{path}: there is no such results file; run its study.") from None
    except ValueError as error:
        raise ResultsError(f"{path}: this is no JSON ({error}); run its study again.") from None
    if not isinstance(document, dict) or "seal" not in document:
        raise ResultsError(f"{path}: it has no seal, so no study wrote it; run its study again.")
    if document["seal"] != seal(document):
        raise ResultsError(
            f"{path}: its content does not match its seal: it was changed after the study wrote "
            "it. Restore it, or run its study again."
        )
    return document


def _lay_out(document: Mapping[str, Any]) -> str:
    """JSON that people can read and diff: one line for each array."""
    lines = []
    for key, value in document.items():
        if isinstance(value, dict):
            inner = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()]
            lines.append(f" {json.dumps(key)}: {{\n" + ",\n".join(inner) + "\n }")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


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
