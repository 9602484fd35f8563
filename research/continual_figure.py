"""The figure of the study of continual learning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from research.continual_measures import read_target
from research.results import mean_interval
from research.study import Outcome

if TYPE_CHECKING:
    from research.continual import Config

FEWEST = 3  # strengths of a method that are worth a curve
MOST_BANDS = 13  # rows that are drawn with the range of their seeds


def draw(config: Config, outcome: Outcome) -> Any:
    """Accuracies over tasks, what is left of each at the end, capacity, strengths, and matrices.

    Where there are too many tasks for matrices, the last five tasks are drawn against all tasks; a
    split has a column for every scenario.

    Args:
      config: the study's.
      outcome: numbers and curves by row.

    Returns:
      A figure of six panels.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(10.5, 6.4))
    if config.protocol == "split":
        _by_scenario(axes, config, outcome)
        _legend(figure, axes)
        return figure
    places = iter(axes.flat)
    swept = strengths(config.rows)
    inner = _inner(swept)
    shown = {
        row: _look(place)
        for place, row in enumerate(row for row in config.rows if row not in inner)
    }
    whole = any(f"average/{row}" in outcome.curves for row in shown)
    first = ("average", "all tasks so far") if whole else ("last5", "the last five tasks")
    panels = [
        (first[0], f"mean of {first[1]}", "tasks learnt"),
        ("learnt", "each task, just learnt", "task"),
        ("last", "each task, after all", "task"),
    ]
    if any(f"capacity/{row}" in outcome.curves for row in shown):
        panels.append(("capacity", "synapses in use", "tasks learnt"))
    for name, title, label in panels:
        ax = next(places)
        _lines(ax, config, outcome, name, shown)
        unit = "share in %" if name == "capacity" else "accuracy in %"
        ax.set(title=title, xlabel=label, ylabel=unit)
        if name == "capacity":
            ax.set_ylim(bottom=0)  # a share that never changes looks like one
    if swept:
        _by_strength(next(places), outcome, swept)
    best = sorted(
        (row for row in config.rows if f"matrix/{row}" in outcome.curves),
        key=lambda row: -float(np.mean(outcome.metrics[f"average/{row}"])),
    )
    left = list(places)
    if left and not best:
        _against(left.pop(0), config, outcome)
    _matrices(figure, left, config.tasks, {row: outcome.curves[f"matrix/{row}"] for row in best})
    for ax in left[len(best) :]:
        ax.axis("off")
    _legend(figure, axes.flat[:3])
    return figure


def _legend(figure: Any, axes: Any) -> None:
    """One legend below, of all that is drawn in some panels."""
    more = {
        label: handle
        for ax in np.ravel(axes)
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        more.values(), more.keys(), loc="outside lower center", ncols=min(len(more), 6), fontsize=7
    )


def _by_scenario(axes: Any, config: Config, outcome: Outcome) -> None:
    """Above, all tasks so far; below, each task at the end; a method has one colour."""
    told = {"task": "task told", "domain": "first or second of a pair", "class": "which class"}
    apart = {row: config.apart(row) for row in config.rows}
    method = {row: found.rule.partition("@")[0] for row, found in apart.items()}
    looks = {name: _look(place) for place, name in enumerate(dict.fromkeys(method.values()))}
    for (scenario, title), (above, below) in zip(told.items(), axes.T, strict=True):
        mine = [row for row in config.rows if apart[row].protocol == f"split_{scenario}"]
        rows, labels = {row: looks[method[row]] for row in mine}, [method[row] for row in mine]
        for ax, name in ((above, "average"), (below, "last")):
            _lines(ax, config, outcome, name, rows, labels)
            ax.set(ylabel="accuracy in %", xlabel="tasks learnt" if ax is above else "task")
        above.set(title=f"{title}: mean of all tasks so far")
        below.set(title="each task, after all")


def _against(ax: Any, config: Config, outcome: Outcome) -> None:
    """The last five tasks against all tasks, with intervals; aims are dotted lines."""
    for place, row in enumerate(config.rows):
        found = [mean_interval(100 * outcome.metrics[f"{n}/{row}"]) for n in ("average", "last5")]
        x, y = (f["mean"] for f in found)
        reach = [
            [[f["mean"] - f["ci_low"]], [f["ci_high"] - f["mean"]]]
            if f["ci_low"] is not None
            else None
            for f in found
        ]
        ax.errorbar(x, y, reach[1], reach[0], fmt="o", color=_look(place)[0], markersize=4)
    aims = [read_target(text, config.rows) for text in config.targets]
    for metric, line in (("average", ax.axvline), ("last5", ax.axhline)):
        for value in sorted({t.value for t in aims if t.metric == metric and t.within is None}):
            line(value, color="0.5", linestyle=":", linewidth=1)
    ax.set(title="what is traded", xlabel="all tasks, in %", ylabel="last five tasks, in %")


def _matrices(figure: Any, places: Sequence[Any], tasks: int, curves: dict[str, Any]) -> None:
    """The accuracy matrices of the first rows, on one scale."""
    from matplotlib.ticker import MaxNLocator

    found = {
        row: 100 * values.mean(0).reshape(tasks, tasks)
        for (row, values), _ in zip(curves.items(), places, strict=False)
    }
    least = min((m[m >= 0].min() for m in found.values()), default=0.0)
    image = None
    for ax, (row, matrix) in zip(places, found.items(), strict=False):
        image = ax.imshow(
            np.where(matrix < 0, np.nan, matrix),
            vmin=least,
            vmax=100,
            cmap="viridis",
            extent=(0.5, tasks + 0.5, tasks + 0.5, 0.5),
        )
        ax.set(title=row, xlabel="tested on task", ylabel="after task")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
    if image is not None:
        shown = list(places[: len(found)])
        figure.colorbar(image, ax=shown, shrink=0.8, label="accuracy in %")


def strengths(rows: Sequence[str]) -> dict[str, list[tuple[float, str]]]:
    """Methods with several strengths: these, rising, with their rows.

    >>> strengths(["none", "ewc@10", "ewc@1", "ewc@100", "si@1"])
    {'ewc': [(1.0, 'ewc@1'), (10.0, 'ewc@10'), (100.0, 'ewc@100')]}
    """
    found: dict[str, list[tuple[float, str]]] = {}
    for row in rows:
        rule, star, keep = row.partition("*")
        method, sign, strength = rule.partition("@")
        if sign:
            found.setdefault(method + star + keep, []).append((float(strength), row))
    return {m: sorted(pairs) for m, pairs in found.items() if len(pairs) >= FEWEST}


def _inner(swept: dict[str, list[tuple[float, str]]]) -> set[str]:
    """Of a sweep, curves over tasks show the middle one only."""
    return {
        row
        for pairs in swept.values()
        for place, (_, row) in enumerate(pairs)
        if place != len(pairs) // 2
    }


def _look(place: int) -> tuple[Any, str]:
    """A colour and a style of line."""
    import matplotlib as mpl

    return mpl.colormaps["tab10"](place % 10), ("-", "--", ":")[place // 10 % 3]


def _lines(
    ax: Any,
    config: Config,
    outcome: Outcome,
    name: str,
    rows: dict[str, tuple[Any, str]],
    labels: Sequence[str] = (),
) -> None:
    """A curve of each row over tasks, with the range of its seeds; rows bring their looks."""
    from matplotlib.ticker import MaxNLocator

    numbers = 1 + np.arange(config.tasks)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    marker = "o" if config.tasks <= 10 else None
    for (row, (colour, style)), label in zip(rows.items(), labels or rows, strict=True):
        if f"{name}/{row}" not in outcome.curves:
            continue
        values = 100 * outcome.curves[f"{name}/{row}"]
        mean = values.mean(0)
        ax.plot(numbers, mean, style, label=label, color=colour, marker=marker, markersize=2.5)
        if len(rows) <= MOST_BANDS:
            lowest, highest = values.min(0), values.max(0)
            ax.fill_between(numbers, lowest, highest, color=colour, alpha=0.15, linewidth=0)


def _by_strength(ax: Any, outcome: Outcome, swept: dict[str, list[tuple[float, str]]]) -> None:
    """Average accuracy against the strength, with intervals; zero strength has no place here."""
    for method, pairs in swept.items():
        shown = [(x, row) for x, row in pairs if x > 0]
        found = [mean_interval(100 * outcome.metrics[f"average/{row}"]) for _, row in shown]
        x, middle = [x for x, _ in shown], [f["mean"] for f in found]
        line = ax.plot(x, middle, marker="o", markersize=3, label=method)[0]
        if all(f["ci_low"] is not None for f in found):
            low, high = ([f[side] for f in found] for side in ("ci_low", "ci_high"))
            ax.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    low, high = ax.get_ylim()
    ax.set(xscale="log", ylim=(max(low, 0), min(high, 100)))
    ax.set(title="mean of all tasks at the end", xlabel="strength", ylabel="accuracy in %")
    ax.legend(fontsize=7)
