"""Progress of a run on the screen: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import numpy as np

_SHOWN = ("train_loss", "validation_loss", "validation_accuracy", "density")


class Progress:
    """Shows the run's name, epoch, metrics (mean over the population) and the time to go.

    In a terminal it draws a bar with rich; when the output is no terminal, or `CI=true`, it prints
    one plain line an epoch.

    Args:
        show: Names of the metrics to show, in order; those that a run lacks are left out.
        plain: Plain lines (`True`), a bar (`False`), or whichever suits the output (`None`).
        stream: Where to write; standard output by default.

    >>> progress = Progress(plain=True, stream=sys.stdout)
    >>> progress.begin("dense", epochs=2)
    >>> progress.update({"epoch": 0, "seconds": 1.0, "validation_loss": np.array([0.5, 0.7])})
    dense  epoch 1/2  validation_loss 0.6000  1.00 s
    >>> progress.end()
    """

    def __init__(
        self,
        show: Sequence[str] = _SHOWN,
        *,
        plain: bool | None = None,
        stream: TextIO | None = None,
    ):
        self.show = tuple(show)
        self._stream = stream
        self._plain = plain
        self._bar: Any = None
        self._task: Any = None
        self._name = ""
        self._epochs = 0
        self._last = 0.0
        self._seconds: list[float] = []

    def begin(self, name: str, epochs: int, done: int = 0) -> None:
        """Starts a run of `epochs` epochs of which `done` are done already."""
        self.end()
        self._name, self._epochs, self._seconds = name, epochs, []
        self._last = time.perf_counter()
        stream = self._stream or sys.stdout
        plain = self._plain
        if plain is None:
            in_ci = os.environ.get("CI", "").lower() in ("1", "true", "yes")
            plain = in_ci or not stream.isatty()
        if plain:
            if done:
                self._print(f"{name or 'run'}  resumed after epoch {done}/{epochs}")
            return
        from rich import progress as rich_progress
        from rich.console import Console

        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("[bold]{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn("{task.fields[metrics]}"),
            rich_progress.TimeRemainingColumn(),
            console=Console(file=stream),
        )
        self._bar.start()
        self._task = self._bar.add_task(name or "run", total=epochs, completed=done, metrics="")

    def update(self, record: Mapping[str, Any]) -> None:
        """Shows the record of one epoch: "epoch" (from 0), "seconds" and metrics."""
        epoch = int(record["epoch"]) + 1
        now = time.perf_counter()
        self._seconds.append(now - self._last)
        self._last = now
        metrics = "  ".join(
            f"{name} {float(np.mean(np.asarray(record[name], np.float64))):.4f}"
            for name in self.show
            if name in record
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=epoch, metrics=metrics)
            return
        parts = [self._name or "run", f"epoch {epoch}/{self._epochs}", metrics]
        if "seconds" in record:
            parts.append(f"{float(record['seconds']):.2f} s")
        # The first epoch holds the compilation, so it says nothing of those to come.
        steady = self._seconds[1:]
        if steady and epoch < self._epochs:
            parts.append(f"to go {(self._epochs - epoch) * sum(steady) / len(steady):.0f} s")
        self._print("  ".join(part for part in parts if part))

    def end(self, message: str = "") -> None:
        """Ends the run's bar, and says why if there is something to say."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if message:
            self._print(message)

    def _print(self, line: str) -> None:
        print(line, file=self._stream or sys.stdout, flush=True)
