"""Where metrics go while a run is under way: one JSON object a line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@runtime_checkable
class Tracker(Protocol):
    """What `fit` asks of a tracker: three methods, so that any logging service can be wrapped."""

    def resume(self, name: str, epoch: int) -> None:
        """Forgets the records of run `name` from `epoch` on; they will be logged again."""
        ...

    def log(self, record: Mapping[str, Any]) -> None:
        """Takes one record; metrics are scalars or arrays with one value a member."""
        ...

    def close(self) -> None:
        """Ends the log."""
        ...


class JsonlTracker:
    r"""Appends each record as one line of JSON, at once.

    Arrays become lists. JSON has no nan or infinity, so they are written as the strings "NaN",
    "Infinity" and "-Infinity", which `read_jsonl` turns back into floats. Numbers are written so
    that they read back exactly. A last line that a killed process left torn is dropped before the
    next one is written.

    Args:
        path: The file; its folder is made when needed, an existing file is continued.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> tracker = JsonlTracker(path)
    >>> tracker.log({"name": "dense", "epoch": 0, "loss": np.float32(0.5)})
    >>> tracker.log({"name": "dense", "epoch": 1, "loss": float("nan")})
    >>> tracker.resume("dense", 1)
    >>> tracker.close()
    >>> path.read_text()
    '{"name": "dense", "epoch": 0, "loss": 0.5}\n'
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._whole = False

    def resume(self, name: str, epoch: int) -> None:
        """Drops the lines of run `name` from `epoch` on, and a torn last line.

        Args:
            name: The run, as in the records' "name".
            epoch: First epoch, counted from 0, that will be logged again.

        Raises:
            ValueError: If a whole line of the file is not JSON.
        """

        def keep(record: Mapping[str, Any]) -> bool:
            past = isinstance(record.get("epoch"), int) and record["epoch"] >= epoch
            return not (past and record.get("name", "") == name)

        self._rewrite(keep)

    def log(self, record: Mapping[str, Any]) -> None:
        """Writes one record as one line.

        Args:
            record: Names and values: numbers, strings, arrays, and lists and dicts of these.
        """
        line = json.dumps(_plain(record), allow_nan=False)
        if not self._whole:
            self._rewrite(lambda record: True)
            self._whole = True
        # Opened anew each time: a line an epoch costs nothing, and no file is left open.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def close(self) -> None:
        """Does nothing: every line is on its way to the disk when `log` returns."""

    def _rewrite(self, keep: Callable[[Mapping[str, Any]], bool]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        text = self.path.read_text(encoding="utf-8", errors="replace")
        lines = _whole_lines(text)
        kept = "".join(
            line + "\n" for number, line in lines if keep(_parse(self.path, number, line))
        )
        if kept != text:
            # Written beside and renamed, so that a kill cannot lose the lines that stay.
            beside = self.path.with_name(self.path.name + ".tmp")
            beside.write_text(kept, encoding="utf-8")
            beside.replace(self.path)


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads a file that `JsonlTracker` wrote, also while it is being written.

    Args:
        path: The file.

    Returns:
        The records, with nan and infinities as floats again. A torn last line is left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a whole line is not JSON; names the file and the line.
    """
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    return [_restore(_parse(Path(path), number, line)) for number, line in _whole_lines(text)]


def _whole_lines(text: str) -> list[tuple[int, str]]:
    """Numbered lines that end in a newline; what follows the last newline is torn."""
    lines = text.split("\n")[:-1]
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}, line {number}: not a JSON object")
    return record


def _plain(value: Any) -> Any:
    """Turns a value into what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if not isinstance(value, float):
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":  # bfloat16 and its kin
            array = array.astype(np.float32)
        return _plain(array.tolist())
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def _restore(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _restore(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_restore(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
