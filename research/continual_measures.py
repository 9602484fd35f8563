"""Numbers, curves and tables of the study of continual learning."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import adaptivenet as an
from research.results import mean_interval
from research.study import Table

if TYPE_CHECKING:
    from research.continual import Config
    from research.continual_run import Learned

metrics = an.consolidation.metrics
MOST = 20  # tasks of which a results file holds the whole matrix

# What a table shows: the metric, its heading, and what it is multiplied by.
SHOWN = (
    ("average", "all tasks", 100),
    ("last5", "last five", 100),
    ("latest", "last task", 100),
    ("learning", "just learnt", 100),
    ("forgetting", "forgotten", 100),
    ("calibration", "ECE", 100),
    ("dormant", "dormant units", 100),
    ("capacity", "synapses taken", 100),
    ("gap", "worst within", 100),
    ("bytes", "kB of state", 1e-3),
)


class Summary(NamedTuple):
    """Numbers and curves of one row on one seed."""

    numbers: dict[str, float]
    curves: dict[str, np.ndarray]


class Target(NamedTuple):
    """What is aimed at, in per cent: at least, or within some points of, a value."""

    row: str
    metric: str
    value: float
    within: float | None


def read_target(text: str, rows: tuple[str, ...]) -> Target:
    """Reads a target.

    Args:
      text: ``row metric least value`` or ``row metric near value within value``.
      rows: of the config.

    Returns:
      The target.

    Raises:
      ValueError: it is none, or of an unknown row or metric.

    >>> read_target("ewc@100 average near 94.3 within 0.5", ("ewc@100",))
    Target(row='ewc@100', metric='average', value=94.3, within=0.5)
    """
    number = r"(-?[\d.]+)"
    found = re.fullmatch(rf"(\S+) (\S+) (?:least {number}|near {number} within {number})", text)
    names = [name for name, _, _ in SHOWN]
    if not found or found[1] not in rows or found[2] not in names:
        raise ValueError(
            f"targets: {text!r} is not 'row metric least value' or 'row metric near value within "
            f"value' of the rows {', '.join(rows)} and the metrics {', '.join(names)}."
        )
    near = found[3] is None
    value, within = (found[4], float(found[5])) if near else (found[3], None)
    return Target(found[1], found[2], float(value), within)


def summarised(learned: Learned) -> Summary:
    """What is kept of a row's matrices.

    Args:
      learned: of one row and seed.

    Returns:
      Numbers (what was not measured is left out) and curves over tasks.
    """
    matrix = learned.accuracy
    whole = metrics.summary(matrix)
    numbers = {
        "average": whole["average_accuracy"],
        "last5": whole["last_five"],
        "latest": float(matrix[-1, -1]),
        "learning": whole["learning_accuracy"],
        "forgetting": whole["forgetting"],
        "calibration": float(np.mean(learned.calibration[-1])),
        "dormant": learned.dormant,
        "bytes": float(learned.bytes),
    }
    curves = {"last": matrix[-1]}
    if not np.isnan(np.diagonal(matrix)).any():
        found = {
            "average": metrics.average_curve(matrix),
            "last5": metrics.last_five_curve(matrix),
            "learnt": np.diagonal(matrix).copy(),
        }
        # A file holds no nan: where not all tasks were tested after each, there is no such curve.
        curves |= {name: values for name, values in found.items() if not np.isnan(values).any()}
        if len(matrix) <= MOST:
            curves["matrix"] = np.nan_to_num(matrix, nan=-1.0)
    if not np.isnan(learned.capacity).any():
        numbers["capacity"] = float(learned.capacity[-1])
        curves["capacity"] = learned.capacity
    if learned.within.size:
        numbers["gap"] = float(learned.within[1:].min())
        curves["within"] = learned.within.ravel()
    return Summary({k: float(v) for k, v in numbers.items() if not np.isnan(v)}, curves)


def percent(values: Any, times: float = 100, sign: bool = False) -> str:
    """A mean with half of its interval; without one where all seeds have the same number."""
    values = times * np.asarray(values)
    found = mean_interval(values)
    known = found["ci_low"] is not None and np.ptp(values) > 0
    half = f" ± {(found['ci_high'] - found['ci_low']) / 2:.2f}" if known else ""
    return f"{found['mean']:{'+' if sign else ''}.2f}{half}"


def tables(config: Config, m: dict[str, np.ndarray]) -> list[Table]:
    """Accuracies of all rows, paired gains, targets."""
    aims = [read_target(text, config.rows) for text in config.targets]
    shown = [
        (name, head, times)
        for name, head, times in SHOWN
        if any(f"{name}/{row}" in m for row in config.rows)
        and (name != "latest" or any(aim.metric == name for aim in aims))
    ]
    rows = [
        [row, *(percent(m[f"{n}/{row}"], t) if f"{n}/{row}" in m else "" for n, _, t in shown)]
        for row in config.rows
    ]
    title = (
        f"{config.tasks} tasks ({config.protocol}, {config.data}): accuracy in % on "
        f"{config.measured_on} data, mean of {len(config.seeds)} seeds ± 95 % interval"
    )
    found = [Table(title, ["", *(head for _, head, _ in shown)], rows)]
    if config.pairs:
        gains = [[*pair.split(":"), percent(m[f"gain/{pair}"], sign=True)] for pair in config.pairs]
        found.append(Table("paired by seed", ["", "over", "points on all tasks"], gains))
    if aims:
        aimed = []
        for target in aims:
            values = 100 * m[f"{target.metric}/{target.row}"]
            off = float(np.mean(values)) - target.value
            if target.within is None:
                word = "reached" if off >= 0 else f"missed by {-off:.2f}"
                goal = f"at least {target.value:g}"
            else:
                far = abs(off) - target.within
                word = "reached" if far <= 0 else f"missed by {far:.2f}"
                goal = f"{target.value:g}, within {target.within:g}"
            aimed.append([target.row, target.metric, goal, percent(values, 1), word])
        found.append(Table("targets", ["row", "metric", "goal", "found", ""], aimed))
    return found
