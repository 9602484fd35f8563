"""The figure of S1."""

from __future__ import annotations

from typing import Any

import numpy as np

SPOKEN = {
    "learning": "soft forgetting",
    "brief": "a quarter of the steps",
    "labels": "labels shuffled",
    "shuffled": "importance shuffled",
    "no_learning": "gradient off",
    "decay": "uniform decay",
    "truncation": "cut alone",
    "oneshot": "one cut, then\nfine-tuning",
    "gradual": "gradual",
    "random": "random cut, then\nfine-tuning",
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

    figure, axes = plt.subplots(2, 3, figsize=(10, 5.8))
    m, c = outcome.metrics, outcome.curves
    gains = np.array(config.gains)
    _dots(axes[0][0], m, ("truncation", "oneshot", "gradual", "random"), "{}_dip")
    axes[0][0].set(title="a  hard pruning: signed survivors", ylabel="dip (mean of the layers)")
    for axis, arm, letter in ((axes[0][1], "no_learning", "b"), (axes[0][2], "learning", "c")):
        _bifurcation(axis, gains, c[f"{arm}_modes"], c[f"{arm}_histogram"])
        axis.set(title=f"{letter}  first layer: {SPOKEN[arm]}", xlabel="gain of forgetting")
        axis.set_ylabel(r"$\log_{10}|w|$")
    axis = axes[1][0]
    for arm in ("learning", "brief", "no_learning", "shuffled", "decay", "labels"):
        dip = c[f"{arm}_log_dip"][:, :, :2, 0].mean(2)
        _line(axis, gains, dip, SPOKEN[arm], dashed=arm != "learning")
    axis.set(xscale="log", xlabel="gain of forgetting", ylabel=r"dip of $\log|w|$")
    axis.set_title("d  how far log-magnitudes split")
    axis.legend()
    _dots(axes[1][1], m, ("no_learning", "brief", "learning", "labels"), "{}_critical", np.exp)
    axes[1][1].set(yscale="log", ylabel="critical gain", title="e  where both large layers split")
    axis = axes[1][2]
    for arm in ("learning", "shuffled", "decay"):
        lost = 100 * (c[f"{arm}_accuracy"] - c[f"{arm}_cut"])
        _line(axis, gains, lost, SPOKEN[arm], dashed=arm != "learning")
    lost = 100 * (m["dense_accuracy"] - m["dense_cut_accuracy"])
    axis.axhline(lost.mean(), color="black", lw=0.8, ls=":")
    axis.annotate("dense network", (gains[-1], lost.mean()), ha="right", va="bottom", fontsize=7)
    axis.set(xscale="log", xlabel="gain of forgetting", ylabel="points lost")
    axis.set_title(f"f  price of a {config.sparsity:.0%} cut, no fine-tuning")
    axis.legend()
    return figure


def _dots(axis: Any, metrics: Any, arms: Any, name: str, unit: Any = lambda x: x) -> None:
    """Every seed a dot, the mean a bar."""
    for place, arm in enumerate(arms):
        values = unit(metrics[name.format(arm)])
        spread = np.linspace(-0.15, 0.15, len(values))
        axis.plot(place + spread, values, "o", ms=2.5, alpha=0.6)
        axis.plot([place - 0.25, place + 0.25], [np.mean(values)] * 2, color="black", lw=1.5)
    axis.set_xticks(range(len(arms)), [SPOKEN[arm] for arm in arms], rotation=20, ha="right")


def _line(axis: Any, gains: Any, values: Any, label: str, dashed: bool) -> None:
    """Mean over seeds, and the range of the seeds."""
    (line,) = axis.plot(gains, values.mean(0), "--" if dashed else "-", label=label)
    axis.fill_between(gains, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, lw=0)


def _bifurcation(axis: Any, gains: Any, modes: Any, histogram: Any) -> None:
    """Density of log|w| at each gain, and the modes of each seed."""
    shade = histogram.mean(0).T ** 0.5
    ticks = np.arange(len(gains))
    axis.pcolormesh(
        ticks, np.linspace(-12, 1, 27)[:-1] + 0.25, shade, cmap="Greys", rasterized=True
    )
    for place in ticks:
        dots = modes[:, place][np.isfinite(modes[:, place])]
        axis.plot(np.full(len(dots), place), dots, "_", color="#D55E00", ms=7)
    axis.set_xticks(ticks, [f"{gain:g}" for gain in gains])
