"""The figure of the study of uncertainty."""

from __future__ import annotations

from typing import Any

import numpy as np

from research.results import mean_interval
from research.uncertainty_arms import TITLES, read_row
from research.uncertainty_data import SETS
from research.uncertainty_measures import CONTROL, REGIMES, WAYS, gain, sparse_end, title_of

COLOURS = {
    "adam": "0.55",
    "l2": "black",
    "noise": "#E69F00",
    "ivon": "#0072B2",
    "field": "#D55E00",
}
STYLES = {
    "magnitude": "-",
    "snr": "--",
    "shuffled": ":",
    "random": (0, (1, 3)),
    "obd": (0, (5, 1, 1, 1)),
    "fisher_tempered": "-.",
}
LINES = ("magnitude", "snr", "random")  # of the panels of accuracy; the others stand in the forest


def draw(config: Any, outcome: Any) -> Any:
    """Draws accuracy against weights kept by regime, paired differences, and predictions.

    Args:
      config: the study's config.
      outcome: what was measured, with a leading axis of seeds.

    Returns:
      A matplotlib figure.
    """
    import matplotlib.pyplot as plt

    shown = [name for name in SETS if getattr(config, name).epochs]
    figure = plt.figure(figsize=(6.75, 6.6))
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.55, 1))
    upper, lower = parts
    axes = upper.subplots(2, len(shown), squeeze=False, sharex=True)
    letters = iter("abcdefgh")
    for row, regime in enumerate(REGIMES):
        for axis, name in zip(axes[row], shown, strict=True):
            _accuracy(axis, config, outcome.metrics, name, regime)
            axis.set_title(f"{next(letters)}  {SETS[name]}, {REGIMES[regime]}", loc="left")
            if row:
                axis.set_xlabel("weights kept (%)")
        axes[row][0].set_ylabel("accuracy (%)")
    _legend(upper, config)
    forest, foreign = lower.subplots(1, 2, width_ratios=(1.3, 1))
    _forest(forest, config, outcome.metrics, shown)
    forest.set_title(f"{next(letters)}  over the magnitude of Adam + L2", loc="left")
    _foreign(foreign, outcome.metrics, shown)
    foreign.set_title(f"{next(letters)}  likelihood and foreign inputs", loc="left")
    return figure


def _accuracy(axis: Any, config: Any, m: Any, name: str, regime: str) -> None:
    kept = [100 * (1 - s) for s in config.sparsities]
    for row in config.rows:
        network, score = read_row(row)
        if score not in LINES:
            continue
        keys = [f"accuracy/{name}/{regime}/{row}/{s:g}" for s in config.sparsities]
        means = [100 * float(np.mean(m[key])) for key in keys]
        style = {"color": COLOURS[network], "ls": STYLES[score], "lw": 1.0}
        axis.plot(kept, means, marker="o", ms=1.8, **style)
    axis.set(xscale="log")
    axis.set_xlim(1.15 * max(kept), 0.85 * min(kept))
    ticks = [k for k in (50, 20, 10, 5, 2, 1, 0.5) if min(kept) <= k <= max(kept)]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()


def _legend(figure: Any, config: Any) -> None:
    from matplotlib.lines import Line2D

    rows = [read_row(row) for row in config.rows]
    networks = [n for n in COLOURS if any(r.network == n for r in rows)]
    scores = [s for s in LINES if any(r.score == s for r in rows)]
    handles = [Line2D([], [], color=COLOURS[n], label=TITLES[n]) for n in networks]
    handles += [Line2D([], [], color="0.3", ls=STYLES[s], label=_word(s)) for s in scores]
    figure.legend(
        handles=handles,
        fontsize=6,
        loc="outside upper center",
        ncols=len(handles),
        handlelength=2.2,
        columnspacing=1.2,
    )


def _word(score: str) -> str:
    return "SNR" if score == "snr" else score


def _forest(axis: Any, config: Any, m: Any, shown: list[str]) -> None:
    """Differences with intervals, means over data sets and the sparsities of the claims."""
    rows = [row for row in config.rows if row != CONTROL and read_row(row).score != "random"]
    for place, row in enumerate(reversed(rows)):
        for regime, offset, mark in (("once", 0.15, "o"), ("retrained", -0.15, "s")):
            parts: list[Any] = [gain(m, config, name, regime, row, CONTROL) for name in shown]
            found = mean_interval(100 * np.mean(np.stack(parts), axis=0))
            low, high = (
                found[k] if found[k] is not None else found["mean"] for k in ("ci_low", "ci_high")
            )
            colour = COLOURS[read_row(row).network]
            axis.plot([low, high], [place + offset] * 2, color=colour, lw=1.0)
            face = colour if regime == "once" else "white"
            label = REGIMES[regime] if place == 0 else None
            axis.plot(
                found["mean"], place + offset, mark, color=colour, mfc=face, ms=2.6, label=label
            )
    axis.axvline(0, color="black", lw=0.6)
    axis.set_yticks(range(len(rows)), [title_of(row) for row in reversed(rows)], fontsize=5.5)
    axis.set_xlabel(f"points, mean over data sets and sparsities from {min(sparse_end(config)):g}")
    axis.legend(fontsize=6, loc="lower left")


def _face(way: str) -> str | None:
    return "none" if way == "mean" else None


def _foreign(axis: Any, m: Any, shown: list[str]) -> None:
    """Likelihood after temperature scaling against detection, a mark a network and way."""
    marks = {"mean": "o", "drawn": "^", "linearised": "D"}
    best = min(float(np.mean(v)) for k, v in m.items() if k.startswith(f"nll_scaled/{shown[0]}/"))
    ways = []
    for key in (k for k in m if k.startswith(f"nll_scaled/{shown[0]}/")):
        _, name, network, way = key.split("/")
        ways += [way] if way not in ways else []
        style = {"marker": marks[way], "color": COLOURS[network], "ls": "", "ms": 3.5}
        worth = float(np.mean(m[f"auroc/{name}/{network}/{way}"]))
        axis.plot(float(np.mean(m[key])), worth, mfc="none" if way == "mean" else None, **style)
    for way in ways:
        axis.plot(
            [],
            [],
            marks[way],
            color="0.3",
            mfc="none" if way == "mean" else None,
            ms=3,
            label=WAYS[way],
        )
    axis.set(xlabel=f"NLL after scaling, {SETS[shown[0]]}", ylabel="AUROC of entropy")
    axis.margins(0.15)
    axis.axvline(best, color="0.8", lw=0.6, zorder=0)
    axis.legend(fontsize=6)
