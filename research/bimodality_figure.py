"""The figure of S1."""

from __future__ import annotations

from typing import Any

import numpy as np

LIMITS = (-6.0, 1.0)  # of log10 |w|
SPOKEN = {
    "truncation": "cut\nalone",
    "oneshot": "one\ncut",
    "gradual": "gradual",
    "random": "random\ncut",
    "learning": "soft forgetting",
    "brief": "a quarter of the steps",
    "no_learning": "gradient off",
    "labels": "labels shuffled",
    "shuffled": "importance shuffled",
    "l1": "uniform L1",
    "decay": "uniform decay",
}
GRADIENT = {
    "no_learning": "off",
    "brief": "a quarter",
    "learning": "all",
    "labels": "all, labels\nshuffled",
}
COLOURS = {
    "learning": "#0072B2",
    "brief": "#56B4E9",
    "no_learning": "#D55E00",
    "labels": "#CC79A7",
    "shuffled": "#E69F00",
    "l1": "#009E73",
    "decay": "#000000",
}


def draw(config: Any, outcome: Any) -> Any:
    """Draws dips against their nulls, the bifurcation, critical gains, and what the split buys.

    Args:
      config: the study's config.
      outcome: what was measured, with a leading axis of seeds.

    Returns:
      A matplotlib figure.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3)
    m, c = outcome.metrics, outcome.curves
    gains = np.array(config.gains)
    hard = {arm: SPOKEN[arm] for arm in ("truncation", "oneshot", "gradual", "random")}
    _dots(axes[0][0], m, hard, "{}_dip")
    axes[0][0].set(title="a  hard pruning: signed survivors", ylabel="dip (mean of the layers)")
    axes[0][0].set_ylim(bottom=0)
    for axis, arm, letter in ((axes[0][1], "no_learning", "b"), (axes[0][2], "learning", "c")):
        _bifurcation(axis, gains, c[f"{arm}_modes"], c[f"{arm}_histogram"])
        axis.set(title=f"{letter}  first layer: {SPOKEN[arm]}", xlabel="gain of forgetting")
        axis.set_ylim(*LIMITS)
        axis.set_ylabel(r"$\log_{10}|w|$")
    axis = axes[1][0]
    for arm in COLOURS:
        _line(axis, gains, c[f"{arm}_log_dip"][:, :, :2, 0].mean(2), arm)
    axis.set(xscale="log", xlabel="gain of forgetting", ylabel=r"dip of $\log|w|$")
    axis.set_title("d  how far log-magnitudes split")
    axis = axes[1][1]
    _dots(axis, m, GRADIENT, "{}_critical", np.exp)
    axis.set(yscale="log", ylabel="critical gain", xlabel="steps with the gradient on")
    axis.set_title("e  where both large layers split")
    low, high = axis.get_ylim()
    grid = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2, 0.05, 0.1, 0.3)
    ticks = [tick for tick in grid if low < tick < high]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis = axes[1][2]
    lost = 100 * m["dense_price"].mean()
    dense = axis.axhline(lost, color="grey", lw=1, ls=":")
    for arm in ("decay", "shuffled", "l1", "learning"):
        _line(axis, gains, 100 * (c[f"{arm}_accuracy"] - c[f"{arm}_cut"]), arm)
    axis.set(xscale="log", xlabel="gain of forgetting", ylabel="points lost")
    axis.set_title(f"f  price of a {config.sparsity:.0%} cut, no fine-tuning")
    lines, labels = axes[1][0].get_legend_handles_labels()
    figure.legend(
        [*lines, dense], [*labels, "before forgetting (f)"], loc="outside lower center", ncols=4
    )
    return figure


def _dots(axis: Any, metrics: Any, arms: Any, name: str, unit: Any = lambda x: x) -> None:
    """Every seed a dot, the mean a bar."""
    for place, arm in enumerate(arms):
        values = unit(metrics[name.format(arm)])
        spread = np.linspace(-0.15, 0.15, len(values))
        axis.plot(place + spread, values, "o", ms=1.5, alpha=0.6, color=COLOURS.get(arm))
        axis.plot([place - 0.25, place + 0.25], [np.mean(values)] * 2, color="black", lw=1)
    axis.set_xticks(range(len(arms)), list(arms.values()))


def _line(axis: Any, gains: Any, values: Any, arm: str) -> None:
    """Mean over seeds, and the range of the seeds."""
    dashes = "-" if arm == "learning" else "--"
    axis.plot(gains, values.mean(0), dashes, color=COLOURS[arm], label=SPOKEN[arm])
    axis.fill_between(gains, values.min(0), values.max(0), color=COLOURS[arm], alpha=0.12, lw=0)


def _bifurcation(axis: Any, gains: Any, modes: Any, histogram: Any) -> None:
    """Density of log|w| at each gain, and the modes of each seed."""
    shade = histogram.mean(0).T ** 0.5
    ticks = np.arange(len(gains))
    edges = np.linspace(*LIMITS, len(shade) + 1), np.arange(len(gains) + 1) - 0.5
    axis.pcolormesh(edges[1], edges[0], shade, cmap="Greys", rasterized=True)
    for place in ticks:
        dots = modes[:, place][np.isfinite(modes[:, place])]
        dots = np.clip(dots, LIMITS[0] + 0.1, LIMITS[1])  # beyond the edge: at the edge
        axis.plot(np.full(len(dots), place), dots, "_", color="#D55E00", ms=7)
    axis.set_xticks(ticks, [f"{gain:g}".removeprefix("0") for gain in gains], rotation=45)
