"""The figure of the shrinking study."""

from __future__ import annotations

from typing import Any

import numpy as np

from research.results import mean_interval
from research.shrinking_measures import fewer, speed
from research.shrinking_subjects import SUBJECTS


def draw(config: Any, outcome: Any) -> Any:
    """Draws accuracy against what is left of costs, a panel a subject, and what the clock shows.

    Args:
      config: the study's config.
      outcome: what was measured, with a leading axis of seeds.

    Returns:
      A matplotlib figure.
    """
    import matplotlib.pyplot as plt

    shown = [name for name in SUBJECTS if getattr(config, name).shares]
    rows = 1 if len(shown) < 3 else 2
    columns = -(-(len(shown) + 1) // rows)
    figure, axes = plt.subplots(rows, columns, squeeze=False)
    places = list(axes.ravel())
    for axis, name, letter in zip(places, shown, "abcdef", strict=False):
        _subject(axis, config, outcome.metrics, name)
        axis.set_title(f"{letter}  {SUBJECTS[name].title}")
    for row in axes:
        row[0].set_ylabel("accuracy (%)")
    last = places[len(shown)]
    _clock(last, config, outcome.metrics, shown)
    last.set_title(f"{'abcdef'[len(shown)]}  what the clock shows")
    for axis in places[len(shown) + 1 :]:
        axis.set_visible(False)
    # The first panel has every line; below all of them it hides none.
    handles, labels = places[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=6)
    return figure


def _subject(axis: Any, config: Any, m: Any, name: str) -> None:
    shares = [f"{share:g}" for share in getattr(config, name).shares]
    dense = 100 * float(np.mean(m[f"accuracy/{name}/longer"]))
    axis.axhline(dense, color="black", lw=0.7, ls=(0, (4, 2)), label="dense, trained longer")

    def points(arm: str) -> tuple[list[float], list[float]]:
        found = [mean_interval(100 * m[f"accuracy/{name}/{arm}/{share}"]) for share in shares]
        halves = [0.0 if f["ci_low"] is None else f["mean"] - f["ci_low"] for f in found]
        return [f["mean"] for f in found], halves

    means, halves = points("shrunk")
    batch = config.batches[0]
    costs = {
        "MACs": [100 / np.mean(fewer(m, "macs", name, f"shrunk/{s}")) for s in shares],
        "bytes": [100 / np.mean(fewer(m, "bytes", name, f"shrunk/{s}")) for s in shares],
        f"time, batch {batch}": [
            100 / np.mean(speed(m, config, name, f"shrunk/{s}", batch)) for s in shares
        ],
    }
    for number, (label, left) in enumerate(costs.items()):
        style = {"color": f"C{number}", "marker": "osD"[number], "ms": 3, "lw": 1.1}
        axis.plot(left, means, label=f"shrunk: {label}", zorder=3, **style)
    axis.errorbar(costs["MACs"], means, halves, fmt="none", ecolor="C0", lw=0.8)
    others, halves = points("random")
    axis.errorbar(
        costs["MACs"], others, halves, fmt="v:", ms=3, lw=0.8, color="0.55", label="random units"
    )
    scratch = 100 * float(np.mean(m[f"accuracy/{name}/scratch/{shares[-1]}"]))
    axis.plot(costs["MACs"][-1], scratch, "k+", ms=5, label="from scratch")
    low, least = [*means, *others, scratch, dense], min(min(left) for left in costs.values())
    if f"accuracy/{name}/condensed" in m:
        values = 100 * float(np.mean(m[f"accuracy/{name}/condensed"]))
        left = 100 / np.mean(fewer(m, "bytes", name, "condensed"))
        axis.plot(left, values, "*", ms=6, color="C3", label="condensed: bytes")
        low.append(values)
        least = min(least, left)
    span = max(low) - min(low) or 1.0
    axis.set(xscale="log", xlabel="left of the dense network (%)")
    axis.set_ylim(min(low) - 0.2 * span, max(low) + 0.2 * span)
    axis.set_xlim(0.8 * least, 110)
    _ticks(axis.xaxis, (100, 50, 25, 10, 5), axis.get_xlim())


def _clock(axis: Any, config: Any, m: Any, shown: list[str]) -> None:
    """Times as fast against times fewer multiply-accumulates, on one core."""
    top = 1.0
    for number, name in enumerate(shown):
        shares = [f"{share:g}" for share in getattr(config, name).shares]
        ratios = [1.0, *(float(np.mean(fewer(m, "macs", name, f"shrunk/{s}"))) for s in shares)]
        for place, batch in enumerate(config.batches[:2]):
            found = [speed(m, config, name, f"shrunk/{s}", batch) for s in shares]
            times = [1.0, *(float(np.mean(values)) for values in found)]
            line, face = ("-", f"C{number}") if place == 0 else (":", "white")
            label = SUBJECTS[name].title if place == 0 else None
            axis.plot(
                ratios, times, f"o{line}", ms=3, lw=1, color=f"C{number}", mfc=face, label=label
            )
            top = max(top, *ratios, *times)
    axis.plot([1, top], [1, top], color="0.6", lw=0.7)
    axis.plot([1, top], [1, 1], color="0.6", lw=0.7, ls=(0, (4, 2)))
    axis.annotate("masked", (top, 1), (-2, 2), textcoords="offset points", ha="right", fontsize=5)
    axis.set(xscale="log", yscale="log", xlabel="times fewer MACs", ylabel="times as fast")
    for part, limits in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
        _ticks(part, (1, 2, 4, 8, 16), limits)
    sizes = ", ".join(
        f"{'full' if place == 0 else 'dotted'}: batch {batch}"
        for place, batch in enumerate(config.batches[:2])
    )
    axis.legend(loc="upper left", fontsize=4.5, title=sizes, title_fontsize=4.5)


def _ticks(axis: Any, values: tuple[int, ...], limits: tuple[float, float]) -> None:
    """Whole numbers in place of powers of ten."""
    from matplotlib.ticker import NullLocator

    shown = [value for value in values if limits[0] <= value <= limits[1]]
    axis.set_ticks(shown, [str(value) for value in shown])
    axis.set_minor_locator(NullLocator())
